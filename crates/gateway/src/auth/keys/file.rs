//! The file of keys, and how it is written: whole or not at all.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use platform::files::{ContentError, FileError, FileSource, from_toml};
use protocol::ModelName;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{KEY_PREFIX, PREFIX_BYTES};
use crate::auth::sha256;

/// Some ten thousand keys.
const BYTES_MAX: u64 = 4 << 20;

/// The digits of a prefix: 32, so that five bits choose one.
const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
/// The maximum lifetime of a key that expires.
const LIFE_MAX: Duration = Duration::from_secs(100 * 366 * 24 * 3600);
const NAME_BYTES_MAX: usize = 128;

const HEADING: &str = "# Made by `andon keys`. It holds hashes: a key itself is shown once.\n\n";

/// Why a file of keys cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file is unreadable or invalid.
    #[error(transparent)]
    File(#[from] FileError),
    /// It cannot be written.
    #[error("the file of the keys cannot be written: {0}")]
    Unwritable(#[from] io::Error),
    /// A field of a key is invalid.
    #[error("{0}")]
    Wrong(&'static str),
    /// There is no such key.
    #[error("no key has this prefix: `andon keys list` shows them")]
    Unknown,
    /// The random number generator failed.
    #[error("the random number generator of the system failed")]
    Random,
}

/// The keys of a file.
#[derive(Debug)]
pub struct KeyFile {
    path: PathBuf,
}

/// A key that is made now.
#[derive(Debug)]
pub struct NewKey {
    /// The tenant that it authenticates.
    pub tenant: String,
    /// A description of its purpose.
    pub name: Option<String>,
    /// The lifetime; none means that it never expires.
    pub life: Option<Duration>,
}

/// A key as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredKey {
    /// The part that identifies it.
    pub prefix: String,
    /// The hash of the whole key.
    #[serde(serialize_with = "to_hex", deserialize_with = "from_hex")]
    pub(super) sha256: [u8; 32],
    /// The tenant that it authenticates.
    pub tenant: String,
    /// A description of its purpose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// When it was made.
    #[serde(serialize_with = "to_time", deserialize_with = "from_time")]
    pub created: SystemTime,
    /// When it is no longer good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(serialize_with = "to_some_time", deserialize_with = "from_some_time")]
    pub expires: Option<SystemTime>,
    /// When it was revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(serialize_with = "to_some_time", deserialize_with = "from_some_time")]
    pub revoked: Option<SystemTime>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    #[serde(default)]
    keys: Vec<StoredKey>,
}

/// The key file of this path.
pub fn source(path: &Path) -> FileSource {
    FileSource::new(path, "key file", BYTES_MAX)
}

/// Parses and checks the text of a key file.
pub fn parse(text: &str) -> Result<Vec<StoredKey>, ContentError> {
    let contents: Contents = from_toml(text)?;
    let mut prefixes = std::collections::HashSet::new();
    for (index, key) in contents.keys.iter().enumerate() {
        if !prefixes.insert(&key.prefix) {
            let field = format!("keys[{index}].prefix");
            return Err(
                ContentError::new("must be unique: another key has the same prefix")
                    .in_field(field),
            );
        }
    }
    Ok(contents.keys)
}

impl KeyFile {
    /// The file of this name, which may not exist yet.
    pub fn at(path: &Path) -> Self {
        // A link stays one: what it points to is replaced.
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        Self { path }
    }

    /// Every key, in the order in which they were made.
    pub fn list(&self) -> Result<Vec<StoredKey>, KeyError> {
        let source = source(&self.path);
        let text = source.read_text()?;
        Ok(parse(&text).map_err(|error| source.invalid(error))?)
    }

    /// Makes a key and returns it: it is not stored, and cannot be shown again.
    pub fn create(&self, new: NewKey) -> Result<String, KeyError> {
        let wrong = |_| KeyError::Wrong("the tenant must have the form of a model name");
        ModelName::checked(&new.tenant, "tenant").map_err(wrong)?;
        let fits =
            |name: &String| name.len() <= NAME_BYTES_MAX && !name.chars().any(char::is_control);
        if !new.name.as_ref().is_none_or(fits) {
            return Err(KeyError::Wrong(
                "the key's name must be one line of at most 128 bytes",
            ));
        }
        if new.life.is_some_and(|life| life > LIFE_MAX) {
            return Err(KeyError::Wrong(
                "the lifetime must be at most 100 years, or not set",
            ));
        }
        let _lock = self.lock()?;
        let mut keys = if self.path.exists() {
            self.list()?
        } else {
            Vec::new()
        };
        let (prefix, key) = loop {
            let (prefix, key) = random()?;
            if keys.iter().all(|other| other.prefix != prefix) {
                break (prefix, key);
            }
        };
        let created = SystemTime::now();
        keys.push(StoredKey {
            prefix,
            sha256: sha256(key.as_bytes()),
            tenant: new.tenant,
            name: new.name,
            created,
            expires: new.life.and_then(|life| created.checked_add(life)),
            revoked: None,
        });
        self.write(keys)?;
        Ok(key)
    }

    /// Ends a key, known by its prefix, and returns it as it is stored. One
    /// that was revoked before stays so.
    pub fn revoke(&self, prefix: &str) -> Result<StoredKey, KeyError> {
        let prefix = prefix.strip_prefix(KEY_PREFIX).unwrap_or(prefix);
        if prefix.len() > PREFIX_BYTES {
            return Err(KeyError::Wrong(
                "give the key's prefix alone: the rest is a secret",
            ));
        }
        let _lock = self.lock()?;
        let mut keys = self.list()?;
        let key = keys.iter_mut().find(|key| key.prefix == prefix);
        let key = key.ok_or(KeyError::Unknown)?;
        key.revoked.get_or_insert_with(SystemTime::now);
        let revoked = key.clone();
        self.write(keys)?;
        Ok(revoked)
    }

    /// A path beside the file.
    fn beside(&self, ending: &str) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(ending);
        path.into()
    }

    /// Waits until no other process changes the file. The lock has a file of its
    /// own, since the keys' is replaced.
    fn lock(&self) -> io::Result<File> {
        let file = private().create(true).open(self.beside(".lock"))?;
        file.lock()?;
        Ok(file)
    }

    /// Replaces the file: a reader has the old keys or the new ones, also
    /// after the power fails.
    fn write(&self, keys: Vec<StoredKey>) -> Result<(), KeyError> {
        let text = toml::to_string(&Contents { keys })
            .map_err(|_| KeyError::Wrong("the keys cannot be written as TOML"))?;
        let text = format!("{HEADING}{text}");
        if text.len() as u64 > BYTES_MAX {
            return Err(KeyError::Wrong(
                "the file of the keys is full: remove old ones",
            ));
        }
        let new = self.beside(".new");
        // What a writer left that was killed; we have the lock.
        let _ = std::fs::remove_file(&new);
        let mut file = private().create_new(true).open(&new)?;
        // The variable umask may have taken more than it should.
        file.set_permissions(Permissions::from_mode(0o600))?;
        if let Ok(old) = std::fs::metadata(&self.path) {
            // The gateway may run as the owner of the file, and we as root;
            // anybody else may not give files away, and need not.
            let _ = chown(&new, Some(old.uid()), Some(old.gid()));
        }
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, &self.path)?;
        let folder = self
            .path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or_else(|| Path::new(".")))?.sync_all()?;
        Ok(())
    }
}

/// A file that is its owner's alone.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600);
    options
}

/// A prefix and the whole key, of 256 random bits.
fn random() -> Result<(String, String), KeyError> {
    let (mut short, mut long) = ([0; PREFIX_BYTES], [0; 32]);
    aws_lc_rs::rand::fill(&mut short).map_err(|_| KeyError::Random)?;
    aws_lc_rs::rand::fill(&mut long).map_err(|_| KeyError::Random)?;
    let digit = |byte: &u8| char::from(DIGITS[usize::from(byte % 32)]);
    let prefix: String = short.iter().map(digit).collect();
    let secret = URL_SAFE_NO_PAD.encode(long);
    let key = format!("{KEY_PREFIX}{prefix}_{secret}");
    Ok((prefix, key))
}

fn to_hex<S: Serializer>(bytes: &[u8; 32], writer: S) -> Result<S::Ok, S::Error> {
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    writer.serialize_str(&text)
}

fn from_hex<'de, D: Deserializer<'de>>(reader: D) -> Result<[u8; 32], D::Error> {
    let wrong = || de::Error::custom("must be 64 hexadecimal digits");
    let text = String::deserialize(reader)?;
    if text.len() != 64 || !text.is_ascii() {
        return Err(wrong());
    }
    let mut bytes = [0; 32];
    for (index, byte) in bytes.iter_mut().enumerate() {
        let digits = text.get(2 * index..2 * index + 2).ok_or_else(wrong)?;
        *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
    }
    Ok(bytes)
}

fn to_time<S: Serializer>(time: &SystemTime, writer: S) -> Result<S::Ok, S::Error> {
    writer.collect_str(&humantime::format_rfc3339_seconds(*time))
}

fn from_time<'de, D: Deserializer<'de>>(reader: D) -> Result<SystemTime, D::Error> {
    humantime::parse_rfc3339(&String::deserialize(reader)?)
        .map_err(|_| de::Error::custom("must be a time such as 2027-01-31T12:00:00Z"))
}

fn to_some_time<S: Serializer>(time: &Option<SystemTime>, writer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => to_time(time, writer),
        None => writer.serialize_none(),
    }
}

fn from_some_time<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<SystemTime>, D::Error> {
    from_time(reader).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("andon-keys-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        folder.join("keys.toml")
    }

    fn new(tenant: &str) -> NewKey {
        NewKey {
            tenant: tenant.to_owned(),
            name: Some("a \"quoted\" name".to_owned()),
            life: Some(Duration::from_secs(3600)),
        }
    }

    #[test]
    fn a_key_is_shown_once_and_stored_as_a_hash() {
        let path = scratch("once");
        let file = KeyFile::at(&path);
        let key = file.create(new("a")).unwrap();
        let other = file.create(new("b")).unwrap();
        assert_ne!(key, other);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains(&key) && !text.contains(&key[15..]), "{text}");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let stored = file.list().unwrap();
        assert_eq!(stored.len(), 2);
        assert_eq!(super::super::prefix(&key), Some(stored[0].prefix.as_str()));
        assert_eq!(stored[0].sha256, sha256(key.as_bytes()));
        assert!(stored[0].expires.unwrap() > SystemTime::now());
        assert!(file.revoke(&key).is_err() && file.revoke("none").is_err());
        let revoked = file.revoke(&stored[0].prefix).unwrap();
        assert!(revoked.revoked.is_some());
        let after = file.list().unwrap();
        assert!(after[0].revoked.is_some() && after[1].revoked.is_none());
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn keys_made_at_once_are_all_there() {
        let path = scratch("at-once");
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| KeyFile::at(&path).create(new("a")).unwrap());
            }
        });
        assert_eq!(KeyFile::at(&path).list().unwrap().len(), 8);
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn wrong_files_and_keys_are_refused() {
        let path = scratch("wrong");
        let file = KeyFile::at(&path);
        let too_long = Some(LIFE_MAX + Duration::from_secs(1));
        let name = Some("two\nlines".to_owned());
        assert!(file.create(new("a b")).is_err());
        assert!(
            file.create(NewKey {
                life: too_long,
                ..new("a")
            })
            .is_err()
        );
        assert!(file.create(NewKey { name, ..new("a") }).is_err());
        assert!(!path.exists());
        file.create(new("a")).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        for (from, to, expected) in [
            ("sha256 = \"", "sha256 = \"é", "keys[0].sha256"),
            ("created = \"2", "created = \"x", "keys[0].created"),
            ("tenant", "owner", "line"),
        ] {
            let error = parse(&text.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let twice = format!("{text}\n{}", text.trim_start_matches(HEADING));
        assert!(
            parse(&twice)
                .unwrap_err()
                .to_string()
                .contains("keys[1].prefix")
        );
        assert!(parse("").unwrap().is_empty());
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }
}
