//! API keys of outside services: read from files or environment variables, and
//! never shown.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use http::{HeaderName, HeaderValue};

use crate::dialect::Authentication;
use crate::settings::{Invalid, ModelSettings};

/// Characters of a service's own message that a caller is told.
const MESSAGE_CHARS_MAX: usize = 200;
/// A file with a key is shorter.
const KEY_BYTES_MAX: usize = 16 << 10;

/// The API key of one model, which may be replaced while it is used. It is in
/// no Debug output.
pub struct Credential {
    file: Option<PathBuf>,
    authentication: Authentication,
    current: ArcSwapOption<Secret>,
}

/// An API key. It is in no Debug output.
pub struct Secret {
    text: String,
    header: HeaderValue,
}

impl Secret {
    /// The value of the header that carries it.
    pub fn header(&self) -> HeaderValue {
        self.header.clone()
    }

    /// A service's text without the key, should the service repeat it.
    pub fn redact(&self, text: &str) -> String {
        text.replace(&self.text, "…")
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Credential(…)")
    }
}

impl Credential {
    /// Reads a model's key; the error says which field names it.
    pub fn read(model: &ModelSettings) -> Result<Self, Invalid> {
        let authentication = model.kind.authentication();
        let prefix = authentication.prefix;
        let secret = match (&model.key_file, &model.key_variable) {
            (Some(path), _) => Some(read(path, prefix).map_err(|reason| ("key_file", reason))?),
            (None, Some(name)) => {
                let text = std::env::var(name).map_err(|_| {
                    let reason = format!("the environment variable {name} is not set");
                    ("key_variable", reason)
                })?;
                Some(parse(&text, prefix).map_err(|reason| ("key_variable", reason))?)
            }
            (None, None) => None,
        };
        Ok(Self {
            file: model.key_file.clone(),
            authentication,
            current: ArcSwapOption::new(secret.map(Arc::new)),
        })
    }

    /// The header that carries the key.
    pub fn header_name(&self) -> HeaderName {
        self.authentication.header.clone()
    }

    /// The key, unless the service asks for none.
    pub fn current(&self) -> Option<Arc<Secret>> {
        self.current.load_full()
    }

    /// Reads the file again; true when it holds another key. A file that
    /// cannot be used changes nothing: it may be half written.
    pub fn reload(&self) -> bool {
        let Some(path) = &self.file else {
            return false;
        };
        let Ok(secret) = read(path, self.authentication.prefix) else {
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
    parse(&text, prefix)
}

pub(crate) fn parse(text: &str, prefix: &str) -> Result<Secret, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("the key is empty".to_owned());
    }
    if text.len() > KEY_BYTES_MAX {
        return Err(format!("a key has at most {KEY_BYTES_MAX} bytes"));
    }
    let mut header = HeaderValue::try_from(format!("{prefix}{text}"))
        .map_err(|_| "a key is one line of ASCII".to_owned())?;
    header.set_sensitive(true);
    Ok(Secret {
        text: text.to_owned(),
        header,
    })
}

/// A service's own message as a caller may read it: printable, without the
/// key, and cut short.
pub(crate) fn printable(message: &str, secret: Option<&Secret>) -> String {
    let text: String = message.chars().filter(|c| !c.is_control()).collect();
    // Before it is cut: a part of a key is a secret too.
    let text = secret.map_or_else(|| text.clone(), |secret| secret.redact(&text));
    text.chars().take(MESSAGE_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect;
    use http::header::AUTHORIZATION;

    #[test]
    fn a_key_is_never_shown() {
        let secret = parse(" sk-secret\n", "Bearer ").unwrap();
        assert_eq!(secret.header, "Bearer sk-secret");
        assert!(!format!("{:?}", secret.header).contains("secret"));
        let credential = Credential {
            file: None,
            authentication: Authentication {
                header: AUTHORIZATION,
                prefix: "",
            },
            current: ArcSwapOption::new(Some(Arc::new(secret))),
        };
        assert!(!format!("{credential:?}").contains("secret"));
        let current = credential.current().unwrap();
        let redacted = current.redact("wrong key sk-secret given");
        assert_eq!(redacted, "wrong key … given");
        assert!(parse("", "").is_err() && parse("a\nb", "").is_err());
    }
    /// What a caller would read of an error's body.
    fn read(body: &str, secret: Option<&Secret>) -> String {
        let openai = dialect::find("openai").unwrap();
        let message = openai.error_message(body.as_bytes());
        printable(&message.unwrap_or_default(), secret)
    }

    #[test]
    fn the_message_of_a_service_is_printable_and_cut() {
        let long = format!(r#"{{"error":"{}"}}"#, "é\\n".repeat(500));
        assert_eq!(read(&long, None), "é".repeat(MESSAGE_CHARS_MAX));
        assert_eq!(read("no JSON", None), "");
    }

    #[test]
    fn no_part_of_the_key_is_passed_on() {
        let secret = parse("sk-0123456789", "").unwrap();
        for before in 180..210 {
            let body = format!(r#"{{"error":"{}sk-01234\n56789"}}"#, "é".repeat(before));
            let message = read(&body, Some(&secret));
            assert!(!message.contains("sk-"), "{message}");
        }
    }
}
