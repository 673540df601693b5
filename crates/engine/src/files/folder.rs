//! A model folder: the only code that opens its files.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::error::EngineError;

/// The size of a JSON file: a configuration takes a few KiB, and a list of labels more.
pub(super) const JSON_BYTES_MAX: u64 = 4 << 20;

/// A model folder whose files may not lie outside its repository.
pub(crate) struct Folder {
    path: PathBuf,
    boundary: PathBuf,
}

impl Folder {
    /// Opens the folder. Its symbolic links may lead to files of the same repository and no
    /// further: `<repository>/<model>/<version>`, or the `snapshots/<revision>` of a Hugging
    /// Face cache, whose files link to the `blobs` folder next to it. In any other folder no link
    /// may lead outside.
    pub(crate) fn open(path: &Path) -> Result<Self, EngineError> {
        let path = path.canonicalize().map_err(|error| {
            EngineError::invalid_file(
                file_name(path),
                format!("the model folder cannot be opened: {}", error.kind()),
            )
        })?;
        if !path.is_dir() {
            return Err(EngineError::invalid_file(
                file_name(&path),
                "is not a folder: a model is a folder with config.json in it",
            ));
        }
        let name = file_name(&path);
        let is_version = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
        let is_snapshot = path
            .parent()
            .is_some_and(|parent| file_name(parent) == "snapshots");
        let repository = path.parent().and_then(Path::parent);
        let boundary = match repository {
            Some(repository) if is_version || is_snapshot => repository.to_path_buf(),
            _ => path.clone(),
        };
        Ok(Self { path, boundary })
    }

    /// Whether a file of this name exists, usable or not.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.path.join(name).symlink_metadata().is_ok()
    }

    /// The names of the files directly in the folder, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(&self.path) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// Opens a regular file of at most `bytes_max` bytes, and returns its size.
    pub(crate) fn file(&self, name: &str, bytes_max: u64) -> Result<(File, u64), EngineError> {
        let failed = |error: io::Error| cannot_be_read(name, &error);
        let real = self.path.join(name).canonicalize().map_err(failed)?;
        if !real.starts_with(&self.boundary) {
            return Err(EngineError::invalid_file(
                name,
                "is a link out of the model repository",
            ));
        }
        // The file type is checked before the file is opened: opening a named pipe would block
        // until a writer opens it.
        if !real.metadata().map_err(failed)?.is_file() {
            return Err(EngineError::invalid_file(name, "is not a regular file"));
        }
        let file = File::open(&real).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        if size > bytes_max {
            return Err(EngineError::invalid_file(
                name,
                format!("has {size} bytes, but at most {bytes_max} are allowed"),
            ));
        }
        Ok((file, size))
    }

    /// The bytes of a file of at most `bytes_max` bytes.
    pub(crate) fn bytes(&self, name: &str, bytes_max: u64) -> Result<Vec<u8>, EngineError> {
        let (file, _) = self.file(name, bytes_max)?;
        let mut bytes = Vec::new();
        file.take(bytes_max)
            .read_to_end(&mut bytes)
            .map_err(|error| cannot_be_read(name, &error))?;
        refuse_pickle(name, &bytes)?;
        Ok(bytes)
    }

    /// Parses a JSON file.
    pub(crate) fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T, EngineError> {
        parse_json(name, &self.bytes(name, JSON_BYTES_MAX)?)
    }

    /// Parses a JSON file; none where the file does not exist.
    pub(crate) fn optional_json<T: DeserializeOwned>(
        &self,
        name: &str,
    ) -> Result<Option<T>, EngineError> {
        if self.has(name) {
            self.json(name).map(Some)
        } else {
            Ok(None)
        }
    }
}

/// Parses the JSON of a file; an error names the key.
pub(super) fn parse_json<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, EngineError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let invalid = |reason: String| EngineError::invalid_file(name, reason);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        match path.as_str() {
            // The whole document, for example one with a missing key, which the error names.
            "." | "?" => invalid(error.inner().to_string()),
            key => invalid(format!("{key}: {}", error.inner())),
        }
    })?;
    let end = deserializer.end();
    end.map_err(|error| invalid(error.to_string()))?;
    Ok(value)
}

/// Refuses bytes that begin like a pickle, or like the zip archive that torch wraps one in.
/// Unpickling runs code, so the file is refused whatever its name.
pub(super) fn refuse_pickle(name: &str, head: &[u8]) -> Result<(), EngineError> {
    let is_archive = head.starts_with(b"PK\x03\x04");
    let is_pickle = head.first() == Some(&0x80) && head.get(1).is_some_and(|byte| *byte <= 5);
    // Torch files from before the archive begin with a pickled magic number of protocol 2. In a
    // safetensors file the same two bytes may begin the length of the header, whose JSON follows.
    let is_safetensors = head.get(8) == Some(&b'{');
    if is_archive || (is_pickle && !is_safetensors) {
        return Err(EngineError::invalid_file(
            name,
            "is a pickle, which can run code when it is read: convert it to safetensors",
        ));
    }
    Ok(())
}

fn cannot_be_read(name: &str, error: &io::Error) -> EngineError {
    EngineError::invalid_file(name, format!("cannot be read: {}", error.kind()))
}

/// The last part of a path, which is all of it that an error may show.
fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
