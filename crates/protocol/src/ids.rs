use std::fmt;
use std::sync::Arc;

use crate::Error;

/// A model's name: `^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`. Such a name is safe
/// as a folder, a label and a metric. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelName(Arc<str>);

impl ModelName {
    /// Checks a name; `field` is the request's field that held it.
    pub fn checked(name: &str, field: &str) -> Result<Self, Error> {
        if name.is_empty() {
            return Err(Error::invalid(field, "must not be empty"));
        }
        let first_fits = name.starts_with(|c: char| c.is_ascii_alphanumeric());
        let rest_fits = name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
        if !first_fits || !rest_fits || name.len() > 128 {
            return Err(Error::invalid(
                field,
                "must be 1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit",
            ));
        }
        Ok(Self(name.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// A model's version: a positive integer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelVersion(u64);

impl ModelVersion {
    /// Checks a version's digits; `field` is the request's field that held it.
    pub fn checked(version: &str, field: &str) -> Result<Self, Error> {
        let canonical = version.bytes().all(|byte| byte.is_ascii_digit())
            && !version.starts_with('0')
            && version.len() <= 18;
        version
            .parse()
            .ok()
            .filter(|_| canonical)
            .map(Self)
            .ok_or_else(|| {
                Error::invalid(
                    field,
                    "must be a positive integer such as \"1\", or empty for the newest",
                )
            })
    }

    /// Like [`Self::checked`], with none for an empty text.
    pub fn optional(version: &str, field: &str) -> Result<Option<Self>, Error> {
        if version.is_empty() {
            return Ok(None);
        }
        Self::checked(version, field).map(Some)
    }

    /// The number.
    pub fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ModelVersion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl Error {
    /// The model, or the requested version of it, is unknown.
    pub fn unknown_model(name: &ModelName, version: Option<ModelVersion>) -> Self {
        match version {
            Some(version) => Self::not_found(
                "model_version",
                format!("model '{name}' has no version {version}"),
            ),
            None => Self::not_found("model_name", format!("unknown model '{name}'")),
        }
    }
}
