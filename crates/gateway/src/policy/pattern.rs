//! Names with room for others.

use std::str::FromStr;

use serde::Deserialize;

/// A model's name, where `*` matches any characters, also none.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern(String);

/// A text that no model's name could match.
#[derive(Debug, thiserror::Error)]
#[error("a pattern is 1 to 128 letters, digits, '.', '_', '-' or '*'")]
pub struct PatternError;

impl TryFrom<String> for Pattern {
    type Error = PatternError;

    fn try_from(text: String) -> Result<Self, PatternError> {
        let fits =
            |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'*');
        if text.is_empty() || text.len() > 128 || !text.bytes().all(fits) {
            return Err(PatternError);
        }
        Ok(Self(text))
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        text.to_owned().try_into()
    }
}

impl Pattern {
    /// The pattern of all names.
    pub fn any() -> Self {
        Self("*".to_owned())
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the pattern matches a name.
    pub fn matches(&self, name: &str) -> bool {
        let (pattern, name) = (self.0.as_bytes(), name.as_bytes());
        let (mut p, mut n) = (0, 0);
        // Where the last `*` stands, and how much of the name was left to it:
        // when the rest does not match, it takes one character more.
        let mut star: Option<(usize, usize)> = None;
        while n < name.len() {
            match (pattern.get(p), star) {
                (Some(b'*'), _) => {
                    star = Some((p, n));
                    p += 1;
                }
                (Some(byte), _) if Some(byte) == name.get(n) => {
                    p += 1;
                    n += 1;
                }
                (_, Some((at, taken))) => {
                    star = Some((at, taken + 1));
                    p = at + 1;
                    n = taken + 1;
                }
                (_, None) => return false,
            }
        }
        pattern.iter().skip(p).all(|byte| *byte == b'*')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_characters() {
        for (pattern, name, matches) in [
            ("*", "", true),
            ("*", "minilm", true),
            ("minilm", "minilm", true),
            ("minilm", "minilm2", false),
            ("minilm", "minil", false),
            ("rerank-*", "rerank-", true),
            ("rerank-*", "rerank", false),
            ("*-large", "bge-large", true),
            ("*-large", "bge-large-2", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("**a**", "bab", true),
            ("a*a", "a", false),
            ("*ab", "aab", true),
        ] {
            let found = pattern.parse::<Pattern>().unwrap().matches(name);
            assert_eq!(found, matches, "{pattern} {name}");
        }
    }

    #[test]
    fn many_stars_take_no_long_time() {
        let pattern: Pattern = "*a".repeat(64).parse().unwrap();
        assert!(!pattern.matches(&"a".repeat(63)));
        assert!(pattern.matches(&"ba".repeat(64)));
        assert!(!pattern.matches(&"ab".repeat(20_000)));
    }

    #[test]
    fn other_texts_are_no_patterns() {
        for wrong in ["", "a b", "a/b", "é", &"a".repeat(129)] {
            assert!(wrong.parse::<Pattern>().is_err(), "{wrong}");
        }
    }
}
