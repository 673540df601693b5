//! Keys of outside services: read from files or variables, never shown.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use http::HeaderValue;

use super::catalogue::{Model, Shape};

/// A file with a key has less.
const KEY_BYTES_MAX: usize = 16 << 10;

/// The key of one model. It is in no Debug output.
pub struct Key {
    file: Option<PathBuf>,
    prefix: &'static str,
    current: ArcSwapOption<Secret>,
}

/// What a service knows the gateway by. It is in no Debug output.
pub struct Secret {
    text: String,
    header: HeaderValue,
}

impl Secret {
    /// What says who calls.
    pub fn header(&self) -> HeaderValue {
        self.header.clone()
    }

    /// A text of the service without the key, should it repeat it.
    pub fn hidden(&self, text: &str) -> String {
        text.replace(&self.text, "…")
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Key(…)")
    }
}

impl Key {
    /// Reads a model's key; the error says which field names it.
    pub fn of(model: &Model) -> Result<Self, (&'static str, String)> {
        let prefix = match model.kind {
            Shape::Anthropic => "",
            Shape::Openai | Shape::Cohere => "Bearer ",
        };
        let secret = match (&model.key_file, &model.key_variable) {
            (Some(path), _) => Some(read(path, prefix).map_err(|reason| ("key_file", reason))?),
            (None, Some(name)) => {
                let text = std::env::var(name).map_err(|_| {
                    let reason = format!("the variable {name} is not set");
                    ("key_variable", reason)
                })?;
                Some(secret(&text, prefix).map_err(|reason| ("key_variable", reason))?)
            }
            (None, None) => None,
        };
        Ok(Self {
            file: model.key_file.clone(),
            prefix,
            current: ArcSwapOption::new(secret.map(Arc::new)),
        })
    }

    /// What is sent with a call, if anybody asks.
    pub fn current(&self) -> Option<Arc<Secret>> {
        self.current.load_full()
    }

    /// Reads the file again; true when there is another key in it. A file that
    /// cannot be used changes nothing: it may be half written.
    pub fn read_again(&self) -> bool {
        let Some(path) = &self.file else {
            return false;
        };
        let Ok(secret) = read(path, self.prefix) else {
            return false;
        };
        let same = |current: &Arc<Secret>| current.text == secret.text;
        if self.current.load().as_ref().is_some_and(same) {
            return false;
        }
        self.current.store(Some(Arc::new(secret)));
        true
    }
}

fn read(path: &Path, prefix: &str) -> Result<Secret, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("the file cannot be read: {error}"))?;
    secret(&text, prefix)
}

pub(super) fn secret(text: &str, prefix: &str) -> Result<Secret, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("there is no key in it".to_owned());
    }
    if text.len() > KEY_BYTES_MAX {
        return Err("this is too long for a key".to_owned());
    }
    let mut header = HeaderValue::try_from(format!("{prefix}{text}"))
        .map_err(|_| "a key is one line of ASCII".to_owned())?;
    header.set_sensitive(true);
    Ok(Secret {
        text: text.to_owned(),
        header,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_never_shown() {
        let secret = secret(" sk-secret\n", "Bearer ").unwrap();
        assert_eq!(secret.header, "Bearer sk-secret");
        assert!(!format!("{:?}", secret.header).contains("secret"));
        let key = Key {
            file: None,
            prefix: "",
            current: ArcSwapOption::new(Some(Arc::new(secret))),
        };
        assert!(!format!("{key:?}").contains("secret"));
        let current = key.current().unwrap();
        let said = current.hidden("wrong key sk-secret given");
        assert_eq!(said, "wrong key … given");
        assert!(super::secret("", "").is_err() && super::secret("a\nb", "").is_err());
    }
}
