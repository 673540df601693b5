//! Files that settings name: read at start within a size limit, and polled
//! where they may change. A change that cannot be used is logged once, and the
//! last good value stays in use.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_path_to_error::{Path as FieldPath, Segment};

use crate::tasks::{OwnedTask, spawn_owned};

/// How often files are polled. A secret that Kubernetes mounts is replaced
/// within a minute or so of its change; this adds little, and a revoked key
/// works for no longer than this.
pub const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Where a file is, its kind in messages and its size limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSource {
    path: PathBuf,
    kind: Cow<'static, str>,
    bytes_max: u64,
}

/// Why a file cannot be used. Names the file without its folder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// The file cannot be read, or has more bytes than its limit.
    #[error("{file} cannot be read: {reason}")]
    Unreadable {
        /// Its kind and name.
        file: String,
        /// Why.
        reason: String,
    },
    /// The contents of the file are wrong.
    #[error("{file}: {error}")]
    Invalid {
        /// Its kind and name.
        file: String,
        /// The problem, with its line and field.
        error: ContentError,
    },
}

/// A problem of a file's contents, with its line and field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ContentError {
    line: Option<usize>,
    field: Option<String>,
    reason: String,
}

impl ContentError {
    /// A reason without a position. It must not repeat a secret.
    pub fn new(reason: impl fmt::Display) -> Self {
        // A parser's message may have several lines; a log entry has one.
        let reason = reason.to_string().trim().replace('\n', ", ");
        Self {
            line: None,
            field: None,
            reason,
        }
    }

    /// Adds the path of the field, such as `tenants.search.models[0]`.
    #[must_use]
    pub fn in_field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    /// Adds the line of a byte offset into the text.
    #[must_use]
    pub fn at_offset(mut self, text: &str, offset: usize) -> Self {
        let before = text.as_bytes().iter().take(offset);
        self.line = Some(1 + before.filter(|byte| **byte == b'\n').count());
        self
    }
}

impl fmt::Display for ContentError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.line, &self.field) {
            (Some(line), Some(field)) => write!(formatter, "line {line}, {field}: ")?,
            (Some(line), None) => write!(formatter, "line {line}: ")?,
            (None, Some(field)) => write!(formatter, "{field}: ")?,
            (None, None) => {}
        }
        formatter.write_str(&self.reason)
    }
}

/// Parses TOML; the error names the line and the field.
pub fn from_toml<T: DeserializeOwned>(text: &str) -> Result<T, ContentError> {
    let located = |reason: String, error: &toml::de::Error| {
        let reason = ContentError::new(reason);
        match error.span() {
            Some(span) => reason.at_offset(text, span.start),
            None => reason,
        }
    };
    let reader = toml::Deserializer::parse(text)
        .map_err(|error| located(format!("not TOML: {}", error.message()), &error))?;
    serde_path_to_error::deserialize(reader).map_err(|error| {
        let located = located(error.inner().message().to_owned(), error.inner());
        match field_name(error.path()) {
            Some(field) => located.in_field(field),
            None => located,
        }
    })
}

/// The path of a field in the usual notation: `tenants.search.models[0]`.
fn field_name(path: &FieldPath) -> Option<String> {
    let mut name = String::new();
    for segment in path.iter() {
        match segment {
            Segment::Seq { index } => name.push_str(&format!("[{index}]")),
            // The wrapper by which toml reports a value's span.
            Segment::Map { key } if key.starts_with("$__") => {}
            Segment::Map { key } | Segment::Enum { variant: key } => {
                if !name.is_empty() {
                    name.push('.');
                }
                name.push_str(key);
            }
            Segment::Unknown => {}
        }
    }
    (!name.is_empty()).then_some(name)
}

impl FileSource {
    /// A file of at most `bytes_max` bytes. Messages call it by `kind`, such as
    /// "policy file", and by its name.
    pub fn new(path: &Path, kind: impl Into<Cow<'static, str>>, bytes_max: u64) -> Self {
        Self {
            path: path.to_owned(),
            kind: kind.into(),
            bytes_max,
        }
    }

    /// Reads the whole file.
    pub fn read(&self) -> Result<Vec<u8>, FileError> {
        let io_error = |error: std::io::Error| self.unreadable(error);
        let file = File::open(&self.path).map_err(io_error)?;
        let mut bytes = Vec::new();
        file.take(self.bytes_max + 1)
            .read_to_end(&mut bytes)
            .map_err(io_error)?;
        if bytes.len() as u64 > self.bytes_max {
            return Err(self.unreadable(format!("it has more than {} bytes", self.bytes_max)));
        }
        Ok(bytes)
    }

    /// Reads the file as text.
    pub fn read_text(&self) -> Result<String, FileError> {
        String::from_utf8(self.read()?).map_err(|_| self.invalid(not_text()))
    }

    /// Reads and parses the file as TOML.
    pub fn read_toml<T: DeserializeOwned>(&self) -> Result<T, FileError> {
        from_toml(&self.read_text()?).map_err(|error| self.invalid(error))
    }

    /// The error of a file whose contents are wrong.
    pub fn invalid(&self, error: ContentError) -> FileError {
        FileError::Invalid {
            file: self.to_string(),
            error,
        }
    }

    fn unreadable(&self, reason: impl fmt::Display) -> FileError {
        FileError::Unreadable {
            file: self.to_string(),
            reason: reason.to_string(),
        }
    }
}

fn not_text() -> ContentError {
    ContentError::new("not text in UTF-8")
}

impl fmt::Display for FileSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        write!(formatter, "{} {}", self.kind, name.display())
    }
}

type Parse<T> = dyn Fn(&[Vec<u8>]) -> Result<T, FileError> + Send + Sync;

/// The value of one or several files: what was parsed from the last contents
/// that could be used. A clone follows its files by itself.
pub struct Followed<T> {
    sources: Arc<[FileSource]>,
    parse: Arc<Parse<T>>,
    /// The contents that were parsed last, also when they were rejected.
    contents: Vec<Vec<u8>>,
    /// Whether every file could be read at the last poll.
    readable: bool,
    value: Arc<T>,
}

/// The outcome of one poll.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change<T> {
    /// The contents are the same, or cannot be read.
    Unchanged,
    /// The contents have changed and are wrong: the value stays.
    Rejected,
    /// The contents have changed, and this is their value.
    Accepted(Arc<T>),
}

impl<T> Change<T> {
    /// The new value, if there is one.
    pub fn accepted(self) -> Option<Arc<T>> {
        match self {
            Self::Accepted(value) => Some(value),
            Self::Unchanged | Self::Rejected => None,
        }
    }
}

impl<T> Clone for Followed<T> {
    fn clone(&self) -> Self {
        Self {
            sources: self.sources.clone(),
            parse: self.parse.clone(),
            contents: self.contents.clone(),
            readable: self.readable,
            value: self.value.clone(),
        }
    }
}

/// Shows no contents: they may be secret.
impl<T> fmt::Debug for Followed<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Followed")
            .field("sources", &self.sources)
            .finish_non_exhaustive()
    }
}

impl<T> Followed<T> {
    /// Reads and parses files that make one value together. `parse` gets their
    /// contents in the order of `sources`.
    pub fn open(
        sources: Vec<FileSource>,
        parse: impl Fn(&[Vec<u8>]) -> Result<T, FileError> + Send + Sync + 'static,
    ) -> Result<Self, FileError> {
        let contents = read_all(&sources)?;
        Ok(Self {
            value: Arc::new(parse(&contents)?),
            sources: sources.into(),
            parse: Arc::new(parse),
            contents,
            readable: true,
        })
    }

    /// Reads and parses one file of text.
    pub fn open_text(
        source: FileSource,
        parse: impl Fn(&str) -> Result<T, ContentError> + Send + Sync + 'static,
    ) -> Result<Self, FileError> {
        Self::open(vec![source.clone()], move |contents| {
            let bytes = contents.first().map_or(&[][..], Vec::as_slice);
            std::str::from_utf8(bytes)
                .map_err(|_| not_text())
                .and_then(&parse)
                .map_err(|error| source.invalid(error))
        })
    }

    /// The value of the last contents that could be used.
    pub fn value(&self) -> &Arc<T> {
        &self.value
    }

    /// Reads the files, and parses them if their contents have changed. Each
    /// change is logged once, and so is a file that can no longer be read.
    pub fn poll(&mut self) -> Change<T> {
        let contents = match read_all(&self.sources) {
            Ok(contents) => contents,
            Err(error) => {
                if std::mem::replace(&mut self.readable, false) {
                    tracing::error!(%error, "a file cannot be read: its last good contents stay in use");
                }
                return Change::Unchanged;
            }
        };
        self.readable = true;
        if contents == self.contents {
            return Change::Unchanged;
        }
        let before = std::mem::replace(&mut self.contents, contents);
        match (self.parse)(&self.contents) {
            Ok(value) => {
                let pairs = self.contents.iter().zip(&before);
                let changed = self.sources.iter().zip(pairs);
                for (source, _) in changed.filter(|(_, (now, before))| now != before) {
                    tracing::info!(file = %source, "a file has changed and was reloaded");
                }
                self.value = Arc::new(value);
                Change::Accepted(self.value.clone())
            }
            Err(error) => {
                tracing::error!(%error, "a changed file is rejected: its last good contents stay in use");
                Change::Rejected
            }
        }
    }

    /// Polls until the returned task is dropped, and gives each new value to
    /// `apply`.
    pub fn follow(mut self, apply: impl Fn(Arc<T>) + Send + 'static) -> OwnedTask
    where
        T: Send + Sync + 'static,
    {
        spawn_owned(async move {
            loop {
                tokio::time::sleep(POLL_INTERVAL).await;
                if let Change::Accepted(value) = self.poll() {
                    apply(value);
                }
            }
        })
    }
}

fn read_all(sources: &[FileSource]) -> Result<Vec<Vec<u8>>, FileError> {
    sources.iter().map(FileSource::read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of its own for each test.
    fn scratch(name: &str, text: &str) -> FileSource {
        let name = format!("andon-files-{}-{name}.toml", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, text).unwrap();
        FileSource::new(&path, "number file", 16)
    }

    fn number(text: &str) -> Result<u64, ContentError> {
        text.trim().parse().map_err(ContentError::new)
    }

    #[test]
    fn errors_name_the_file_the_line_and_the_field() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(dead_code, reason = "only whether it parses is tested")]
        struct Table {
            numbers: Vec<toml::Spanned<u64>>,
        }
        for (text, expected) in [
            ("numbers = [", "line 1"),
            ("\n\nnumbers =", "line 3: not TOML"),
            ("\nnumbers=[1,\n-1]", "line 3, numbers[1]: "),
            ("\nnumber = [1]", "line 2, number"),
        ] {
            let source = scratch("errors", text);
            let error = source.read_toml::<Table>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
            assert!(error.starts_with("number file andon-files-"), "{error}");
            assert!(!error.contains('\n'), "{error}");
            std::fs::remove_file(&source.path).unwrap();
        }
    }

    #[test]
    fn a_file_over_its_limit_cannot_be_read() {
        let source = scratch("limit", &"1".repeat(16));
        assert_eq!(source.read().unwrap().len(), 16);
        std::fs::write(&source.path, "1".repeat(17)).unwrap();
        let error = source.read_text().unwrap_err().to_string();
        assert!(error.contains("more than 16 bytes"), "{error}");
        std::fs::write(&source.path, [0xff]).unwrap();
        assert!(source.read_text().is_err());
        std::fs::remove_file(&source.path).unwrap();
        assert!(source.read_text().is_err());
    }

    #[test]
    fn a_bad_file_keeps_the_last_good_value() {
        let source = scratch("kept", "1");
        let mut followed = Followed::open_text(source.clone(), number).unwrap();
        assert_eq!(**followed.value(), 1);
        assert_eq!(followed.poll(), Change::Unchanged);
        std::fs::write(&source.path, "two").unwrap();
        assert_eq!(followed.poll(), Change::Rejected);
        // It is judged once for each change.
        assert_eq!(followed.poll(), Change::Unchanged);
        std::fs::remove_file(&source.path).unwrap();
        assert_eq!(followed.poll(), Change::Unchanged);
        assert_eq!(**followed.value(), 1);
        std::fs::write(&source.path, "3").unwrap();
        assert_eq!(followed.poll(), Change::Accepted(Arc::new(3)));
        assert_eq!(**followed.value(), 3);
        std::fs::remove_file(&source.path).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_of_a_followed_file_is_applied() {
        let source = scratch("followed", "1");
        let (applied, mut values) = tokio::sync::mpsc::unbounded_channel();
        let followed = Followed::open_text(source.clone(), number).unwrap();
        let _following = followed.follow(move |value| applied.send(*value).unwrap());
        std::fs::write(&source.path, "2").unwrap();
        assert_eq!(values.recv().await, Some(2));
        std::fs::remove_file(&source.path).unwrap();
    }
}
