//! API keys of outside services: read from files or environment variables, and
//! never shown.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use http::{HeaderName, HeaderValue};
use platform::files::{ContentError, FileSource, Followed};
use platform::tasks::OwnedTask;

use crate::dialect::Authentication;
use crate::settings::{InvalidSetting, ModelSettings};

/// Characters of a service's own message in the caller's error message.
const MESSAGE_CHARS_MAX: usize = 200;
/// A file with a key is shorter.
const KEY_BYTES_MAX: u64 = 16 << 10;

/// The API key of one model, which may be replaced while it is used. It is in
/// no Debug output.
pub struct Credential {
    file: Option<Followed<Secret>>,
    authentication: Authentication,
    current: Arc<ArcSwapOption<Secret>>,
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
    pub fn read(model: &ModelSettings) -> Result<Self, InvalidSetting> {
        let authentication = model.kind.authentication();
        let prefix = authentication.prefix;
        let (mut file, mut secret) = (None, None);
        if let Some(path) = &model.key_file {
            let source = FileSource::new(path, "key file", KEY_BYTES_MAX);
            let followed = Followed::open_text(source, move |text| parse(text, prefix))
                .map_err(|error| InvalidSetting::new("key_file", error.to_string()))?;
            secret = Some(followed.value().clone());
            file = Some(followed);
        } else if let Some(name) = &model.key_variable {
            let invalid = |reason| InvalidSetting::new("key_variable", reason);
            let text = std::env::var(name)
                .map_err(|_| invalid(format!("the environment variable {name} is not set")))?;
            let parsed = parse(&text, prefix).map_err(|error| invalid(error.to_string()))?;
            secret = Some(Arc::new(parsed));
        }
        Ok(Self {
            file,
            authentication,
            current: Arc::new(ArcSwapOption::new(secret)),
        })
    }

    /// The header that carries the key.
    pub fn header_name(&self) -> HeaderName {
        self.authentication.header.clone()
    }

    /// The key, unless the service requires none.
    pub fn current(&self) -> Option<Arc<Secret>> {
        self.current.load_full()
    }

    /// Reloads the key when its file changes, until the task is dropped. A file
    /// that cannot be used changes nothing: it may be half written.
    pub fn follow(&self) -> Option<OwnedTask> {
        let (file, current) = (self.file.clone()?, self.current.clone());
        Some(file.follow(move |secret| current.store(Some(secret))))
    }
}

fn parse(text: &str, prefix: &str) -> Result<Secret, ContentError> {
    let text = text.trim();
    if text.is_empty() {
        return Err(ContentError::new("the key is empty"));
    }
    if text.len() as u64 > KEY_BYTES_MAX {
        let reason = format!("the key must have at most {KEY_BYTES_MAX} bytes");
        return Err(ContentError::new(reason));
    }
    let mut header = HeaderValue::try_from(format!("{prefix}{text}"))
        .map_err(|_| ContentError::new("the key must be one line of ASCII"))?;
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
            current: Arc::new(ArcSwapOption::new(Some(Arc::new(secret)))),
        };
        assert!(!format!("{credential:?}").contains("secret"));
        let current = credential.current().unwrap();
        let redacted = current.redact("wrong key sk-secret given");
        assert_eq!(redacted, "wrong key … given");
        assert!(parse("", "").is_err() && parse("a\nb", "").is_err());
    }
    /// The message that a caller reads for an error's body.
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
