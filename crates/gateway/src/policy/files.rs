//! Files of settings that are read again when they change.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_path_to_error::{Path as FieldPath, Segment};

use super::PolicyError;

/// A file, and what it held when it was last looked at.
#[derive(Debug, Clone)]
pub struct Followed {
    path: PathBuf,
    what: &'static str,
    bytes_max: u64,
    text: String,
    readable: bool,
}

impl Followed {
    /// Reads a file; `what` it holds is said in errors, in place of its path.
    pub fn open(path: &Path, what: &'static str, bytes_max: u64) -> Result<Self, PolicyError> {
        Ok(Self {
            path: path.to_owned(),
            what,
            bytes_max,
            text: read(path, what, bytes_max)?,
            readable: true,
        })
    }

    /// What the file holds.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The new text, if it is another than at the last look. A file that
    /// cannot be read changes nothing, and is logged once.
    pub fn look(&mut self) -> Option<&str> {
        match read(&self.path, self.what, self.bytes_max) {
            Ok(text) => {
                self.readable = true;
                if text == self.text {
                    return None;
                }
                self.text = text;
                Some(&self.text)
            }
            Err(error) => {
                if std::mem::replace(&mut self.readable, false) {
                    tracing::error!(%error, "what was read before stays");
                }
                None
            }
        }
    }
}

/// Reads a file of at most so many bytes.
pub fn read(path: &Path, what: &'static str, bytes_max: u64) -> Result<String, PolicyError> {
    let unreadable = |reason: String| PolicyError::Unreadable { what, reason };
    let file = File::open(path).map_err(|error| unreadable(error.to_string()))?;
    let mut text = String::new();
    file.take(bytes_max + 1)
        .read_to_string(&mut text)
        .map_err(|error| unreadable(error.to_string()))?;
    if text.len() as u64 > bytes_max {
        return Err(unreadable(format!("it has more than {bytes_max} bytes")));
    }
    Ok(text)
}

/// Reads TOML; the error names the line and the field.
pub fn from_toml<T: DeserializeOwned>(text: &str, what: &'static str) -> Result<T, PolicyError> {
    let wrong = |field: Option<String>, error: &toml::de::Error| {
        let at = error.span().map(|span| span.start);
        wrong(
            what,
            at.map(|at| line(text, at)),
            field.as_deref(),
            error.message(),
        )
    };
    let reader = toml::Deserializer::parse(text).map_err(|error| wrong(None, &error))?;
    serde_path_to_error::deserialize(reader)
        .map_err(|error| wrong(field(error.path()), error.inner()))
}

/// The line of a place in a text, counted from 1.
pub fn line(text: &str, at: usize) -> usize {
    let before = text.as_bytes().iter().take(at);
    1 + before.filter(|byte| **byte == b'\n').count()
}

/// An error that says where.
pub fn wrong(
    what: &'static str,
    line: Option<usize>,
    field: Option<&str>,
    reason: &str,
) -> PolicyError {
    let place = match (line, field) {
        (Some(line), Some(field)) => format!("line {line}, {field}: "),
        (Some(line), None) => format!("line {line}: "),
        (None, Some(field)) => format!("{field}: "),
        (None, None) => String::new(),
    };
    // A parser's message may have several lines; a log entry has one.
    let reason = reason.trim().replace('\n', ", ");
    PolicyError::Wrong {
        what,
        reason: format!("{place}{reason}"),
    }
}

/// A field's name as people write it: `tenants.search.models[0]`.
fn field(path: &FieldPath) -> Option<String> {
    let mut name = String::new();
    for segment in path.iter() {
        match segment {
            Segment::Seq { index } => name.push_str(&format!("[{index}]")),
            // What toml wraps a value in whose place it is asked for.
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
