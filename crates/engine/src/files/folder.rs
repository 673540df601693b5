//! A model folder: the only code that opens its files.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;

use crate::error::EngineError;

/// The size of a JSON file: a configuration takes a few KiB, and a list of labels more.
pub(super) const JSON_BYTES_MAX: u64 = 4 << 20;

/// What is told the bytes that are read of a model's files: the name of the file inside the folder,
/// the offset, and the bytes.
pub type Observe = Arc<dyn Fn(&str, u64, &[u8]) + Send + Sync>;

/// Where a model is loaded from.
#[derive(Clone)]
pub struct ModelFolder {
    /// The folder.
    pub path: PathBuf,
    /// The folder out of which no link may lead; none for a folder outside a repository. Then it
    /// is the folder itself, or the `models--…` folder of a Hugging Face cache, whose
    /// `snapshots/<revision>` link to the `blobs` next to them.
    pub boundary: Option<PathBuf>,
    /// What is told everything that is read.
    pub observe: Option<Observe>,
}

impl ModelFolder {
    /// A folder outside a repository.
    pub fn bare(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            boundary: None,
            observe: None,
        }
    }
}

impl fmt::Debug for ModelFolder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ModelFolder")
            .field("path", &self.path)
            .field("boundary", &self.boundary)
            .finish_non_exhaustive()
    }
}

/// A model folder whose files may not lie outside its boundary.
pub(crate) struct Folder {
    path: PathBuf,
    boundary: PathBuf,
    observe: Option<Observe>,
}

impl Folder {
    /// Opens the folder. Its symbolic links may lead to files within the boundary and no further.
    pub(crate) fn open(source: &ModelFolder) -> Result<Self, EngineError> {
        let canonical = |path: &Path| {
            path.canonicalize().map_err(|error| {
                EngineError::invalid_file(
                    file_name(path),
                    format!("the model folder cannot be opened: {}", error.kind()),
                )
            })
        };
        let path = canonical(&source.path)?;
        if !path.is_dir() {
            return Err(EngineError::invalid_file(
                file_name(&path),
                "is not a folder: a model is a folder with config.json in it",
            ));
        }
        let boundary = match &source.boundary {
            Some(boundary) => canonical(boundary)?,
            None => cache_folder(&path).unwrap_or(&path).to_path_buf(),
        };
        Ok(Self {
            path,
            boundary,
            observe: source.observe.clone(),
        })
    }

    /// Tells what was read of a file.
    pub(super) fn observe(&self, name: &str, offset: u64, bytes: &[u8]) {
        if let Some(observe) = &self.observe {
            observe(name, offset, bytes);
        }
    }

    /// What is told everything that is read.
    pub(super) fn observer(&self) -> Option<Observe> {
        self.observe.clone()
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
        self.observe(name, 0, &bytes);
        check_head(name, &bytes)?;
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

/// The `models--…` folder of a Hugging Face cache, if this is one of its snapshots.
fn cache_folder(path: &Path) -> Option<&Path> {
    let snapshots = path.parent()?;
    let model = snapshots.parent()?;
    let is_cache = file_name(snapshots) == "snapshots" && file_name(model).starts_with("models--");
    is_cache.then_some(model)
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

/// How a file begins that Git LFS left in the place of the real one.
const LFS_POINTER: &[u8] = b"version https:/";

/// Refuses bytes that begin like a pickle, or like the zip archive that torch wraps one in:
/// unpickling runs code, so the file is refused whatever its name. Refuses pointers of Git LFS too.
pub(super) fn check_head(name: &str, head: &[u8]) -> Result<(), EngineError> {
    let is_archive = head.starts_with(b"PK\x03\x04");
    let is_pickle = head.first() == Some(&0x80) && head.get(1).is_some_and(|byte| *byte <= 5);
    if head.starts_with(LFS_POINTER) {
        return Err(EngineError::invalid_file(
            name,
            "is a pointer of Git LFS in the place of the file: fetch the file with `git lfs pull`",
        ));
    }
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
