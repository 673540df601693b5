//! API keys: shown once, stored as hashes, known by their prefix.
//! See docs/decisions/identity.md.

mod file;

use std::collections::HashMap;
use std::time::SystemTime;

use aws_lc_rs::constant_time::verify_slices_are_equal;

use super::{Refusal, sha256};
use crate::policy::{Caller, Policy};

pub use file::{KeyError, KeyFile, NewKey, StoredKey, parse, source};

/// What every key begins with: a bearer that begins so is no token.
pub const BEGINNING: &str = "andon_";
/// Characters by which people and the gateway recognize a key.
pub const PREFIX_BYTES: usize = 8;
/// 256 random bits in base64.
const SECRET_BYTES: usize = 43;

/// What an unknown key is compared with, so that it takes as long.
const NOBODY: [u8; 32] = [0; 32];

const MALFORMED: Refusal = Refusal::new("key_malformed", "the key is not one of this server's");
const UNKNOWN: Refusal = Refusal::new("key_unknown", "the key is not known");
const REVOKED: Refusal = Refusal::new("key_revoked", "the key has been revoked");
const EXPIRED: Refusal = Refusal::new("key_expired", "the key has expired");
const NO_TENANT: Refusal = Refusal::new("tenant_unknown", "the key's tenant may not call any more");

/// The keys by their prefixes.
#[derive(Debug, Default)]
pub struct Keys(HashMap<String, Known>);

#[derive(Debug)]
struct Known {
    sha256: [u8; 32],
    expires: Option<SystemTime>,
    revoked: bool,
    /// None when the policy does not name its tenant.
    caller: Option<Caller>,
}

impl Keys {
    /// The stored keys with the tenants that they stand for.
    pub fn new(stored: &[StoredKey], policy: &Policy) -> Self {
        let known = |key: &StoredKey| Known {
            sha256: key.sha256,
            expires: key.expires,
            revoked: key.revoked.is_some(),
            caller: policy.tenants.get(&key.tenant).map(|tenant| Caller {
                tenant: tenant.clone(),
                credential: format!("key:{}", key.prefix).into(),
            }),
        };
        let keys = stored.iter().map(|key| (key.prefix.clone(), known(key)));
        let keys = Self(keys.collect());
        // Not refused: a key that is revoked in the same file must be.
        let strangers = keys.0.values().filter(|key| key.caller.is_none()).count();
        if strangers > 0 {
            tracing::warn!(
                keys = strangers,
                "some keys are of tenants that the policy does not name"
            );
        }
        keys
    }

    /// Who shows this key. Only who has the whole key learns that it has
    /// expired or was revoked.
    pub fn caller(&self, key: &str, now: SystemTime) -> Result<Caller, Refusal> {
        let prefix = prefix(key).ok_or(MALFORMED)?;
        let known = self.0.get(prefix);
        let expected = known.map_or(&NOBODY, |known| &known.sha256);
        let same = verify_slices_are_equal(&sha256(key.as_bytes()), expected).is_ok();
        let Some(known) = known.filter(|_| same) else {
            return Err(UNKNOWN);
        };
        if known.revoked {
            return Err(REVOKED);
        }
        if known.expires.is_some_and(|expires| expires <= now) {
            return Err(EXPIRED);
        }
        known.caller.clone().ok_or(NO_TENANT)
    }
}

/// The prefix of a text that has the form of a key.
fn prefix(key: &str) -> Option<&str> {
    let (prefix, secret) = key
        .strip_prefix(BEGINNING)?
        .split_at_checked(PREFIX_BYTES)?;
    let secret = secret.strip_prefix('_')?;
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    (secret.len() == SECRET_BYTES && key.bytes().all(fits)).then_some(prefix)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;

    fn stored(key: &str) -> StoredKey {
        StoredKey {
            prefix: prefix(key).unwrap().to_owned(),
            sha256: sha256(key.as_bytes()),
            tenant: "a".to_owned(),
            name: None,
            created: SystemTime::UNIX_EPOCH,
            expires: None,
            revoked: None,
        }
    }

    #[test]
    fn a_key_is_known_expired_or_revoked() {
        let key = format!("andon_abcd2345_{}", "A-_z".repeat(11)[..43].to_owned());
        let policy = Policy::parse("[tenants.a]", Path::new("p")).unwrap();
        let of = |key: StoredKey| Keys::new(&[key], &policy);
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        let reason = |keys: &Keys, key: &str| keys.caller(key, now).unwrap_err().reason;
        let keys = of(stored(&key));
        let caller = keys.caller(&key, now).unwrap();
        assert_eq!(caller.tenant.name, "a");
        assert_eq!(&*caller.credential, "key:abcd2345");
        let other = key.replace("A-_zA-_z", "A-_zB-_z");
        assert_eq!(reason(&keys, &other), "key_unknown");
        assert_eq!(reason(&keys, &key.replace("abcd", "abce")), "key_unknown");
        assert_eq!(reason(&Keys::default(), &key), "key_unknown");
        for wrong in [
            "andon_",
            "andon_é",
            &key[..57],
            &format!("{key}A"),
            &key.replace('z', " "),
        ] {
            assert_eq!(reason(&keys, wrong), "key_malformed", "{wrong}");
        }
        let mut expired = stored(&key);
        expired.expires = Some(now);
        assert_eq!(reason(&of(expired.clone()), &key), "key_expired");
        assert_eq!(reason(&of(expired.clone()), &other), "key_unknown");
        expired.revoked = Some(now);
        assert_eq!(reason(&of(expired), &key), "key_revoked");
        let mut stranger = stored(&key);
        stranger.tenant = "b".to_owned();
        assert_eq!(reason(&of(stranger), &key), "tenant_unknown");
    }
}
