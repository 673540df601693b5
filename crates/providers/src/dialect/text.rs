//! Texts of responses, which services write as a string, as null or as a list of
//! parts.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The joined text of all parts that are texts. What a model thinks is a part
/// of another type, and no text.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct JoinedText(pub String);

impl<'de> Deserialize<'de> for JoinedText {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(TextVisitor)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = JoinedText;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a text, a list of parts or null")
    }

    fn visit_str<E>(self, text: &str) -> Result<JoinedText, E> {
        Ok(JoinedText(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<JoinedText, E> {
        Ok(JoinedText(text))
    }

    fn visit_unit<E>(self) -> Result<JoinedText, E> {
        Ok(JoinedText::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<JoinedText, A::Error> {
        let mut joined = JoinedText::default();
        while let Some(part) = parts.next_element::<JoinedText>()? {
            joined.0.push_str(&part.0);
        }
        Ok(joined)
    }

    /// A part, which is a text if its type says so or if it has none.
    fn visit_map<A: MapAccess<'de>>(self, mut part: A) -> Result<JoinedText, A::Error> {
        let (mut kind, mut text) = (None, JoinedText::default());
        while let Some(key) = part.next_key::<String>()? {
            match key.as_str() {
                "type" => kind = part.next_value::<Option<String>>()?,
                "text" => text = part.next_value()?,
                _ => {
                    part.next_value::<IgnoredAny>()?;
                }
            }
        }
        let is_text = kind.is_none_or(|kind| matches!(kind.as_str(), "text" | "output_text"));
        Ok(if is_text { text } else { JoinedText::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_in_every_form() {
        for (json, text) in [
            (r#""a\n\u00e9""#, "a\n\u{e9}"),
            ("null", ""),
            ("[]", ""),
            (
                r#"[{"type":"text","text":"a"},{"type":"text","text":"b"}]"#,
                "ab",
            ),
            (
                r#"[{"type":"thinking","text":"no"},{"text":"b","type":"text"}]"#,
                "b",
            ),
            (
                r#"[{"type":"thinking","thinking":[{"type":"text","text":"no"}]},"b"]"#,
                "b",
            ),
            (r#"[{"text":"a"},null,{"type":"text","text":null}]"#, "a"),
            (r#"{"type":"output_text","text":"a"}"#, "a"),
        ] {
            let read: JoinedText = serde_json::from_str(json).unwrap();
            assert_eq!(read.0, text, "{json}");
        }
        for wrong in ["1", "true", r#"[{"text":{"a":1}},2]"#] {
            assert!(
                serde_json::from_str::<JoinedText>(wrong).is_err(),
                "{wrong}"
            );
        }
    }
}
