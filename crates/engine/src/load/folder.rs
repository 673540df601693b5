//! A model folder, and the only place where its files are opened.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::EngineError;

/// Configuration files are a few KiB; this is the room that a label list may take.
const JSON_BYTES_MAX: u64 = 4 << 20;

/// A model folder whose files may not lie outside its repository.
pub(crate) struct Folder {
    path: PathBuf,
    boundary: PathBuf,
}

impl Folder {
    /// Opens the folder. Links inside it may lead to files of the same repository and no
    /// further: `<repository>/<model>/<version>`, or the `snapshots/<revision>` of a Hugging
    /// Face cache, whose files link to a `blobs` folder beside it. Of any other folder nothing
    /// leads outside.
    pub(crate) fn open(path: &Path) -> Result<Self, EngineError> {
        let path = path.canonicalize().map_err(|error| {
            EngineError::unusable(
                file_name(path),
                format!("the model folder cannot be opened ({})", error.kind()),
            )
        })?;
        if !path.is_dir() {
            return Err(EngineError::unusable(file_name(&path), "it is no folder"));
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

    /// Whether a file of this name is there, be it usable or not.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.path.join(name).symlink_metadata().is_ok()
    }

    /// The names of the files in the folder itself.
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

    /// Opens a regular file of at most `bytes_max` bytes, and gives its size.
    pub(crate) fn file(&self, name: &str, bytes_max: u64) -> Result<(File, u64), EngineError> {
        let failed =
            |error: std::io::Error| EngineError::unusable(name, format!("{}", error.kind()));
        let real = self.path.join(name).canonicalize().map_err(failed)?;
        if !real.starts_with(&self.boundary) {
            return Err(EngineError::unusable(
                name,
                "it is a link out of the model repository",
            ));
        }
        // The kind is asked before the file is opened: opening a pipe would wait for its writer.
        if !real.metadata().map_err(failed)?.is_file() {
            return Err(EngineError::unusable(name, "it is no regular file"));
        }
        let file = File::open(&real).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        if size > bytes_max {
            return Err(EngineError::unusable(
                name,
                format!("it has {size} bytes: at most {bytes_max} are allowed"),
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
            .map_err(|error| EngineError::unusable(name, format!("{}", error.kind())))?;
        refuse_pickle(name, &bytes)?;
        Ok(bytes)
    }

    /// A JSON file.
    pub(crate) fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T, EngineError> {
        serde_json::from_slice(&self.bytes(name, JSON_BYTES_MAX)?)
            .map_err(|error| EngineError::unusable(name, format!("not the expected JSON: {error}")))
    }

    /// A JSON file that need not be there.
    pub(crate) fn json_if_there<T: DeserializeOwned>(
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

/// Refuses bytes that begin as a pickle does, or as the zip archive that torch wraps one in.
/// Unpickling runs code, so the name of the file does not matter.
pub(crate) fn refuse_pickle(name: &str, head: &[u8]) -> Result<(), EngineError> {
    let is_archive = head.starts_with(b"PK\x03\x04");
    let is_protocol = head.first() == Some(&0x80) && head.get(1).is_some_and(|byte| *byte <= 5);
    // Torch files from before the archive begin with a pickled magic number of protocol 2. In a
    // safetensors file the same two bytes begin the header's length, and its JSON follows.
    let is_safetensors = head.get(8) == Some(&b'{');
    if is_archive || (is_protocol && !is_safetensors) {
        return Err(EngineError::unusable(
            name,
            "it is a pickle, which can run code when it is read: convert it to safetensors",
        ));
    }
    Ok(())
}

/// The last part of a path: all of it that an error may show.
fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
