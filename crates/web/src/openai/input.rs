//! The input of an embedding request: one text or several, or their token ids.

use std::fmt;

use protocol::Error;
use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, SeqAccess, Visitor};
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::super::body::reject_rest;
use super::super::texts::TEXTS_MAX;
use super::super::waiting;

/// Tokens of one input; the limits of models are lower as a rule.
pub const TOKENS_MAX: usize = 8192;

/// One text or several, or the token ids of one or several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// In the order of the request.
    pub items: Items,
    /// Whether there is one input, which is not in a list.
    pub single: bool,
}

/// The inputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Items {
    /// Texts.
    Texts(Vec<String>),
    /// Token ids of the model's vocabulary.
    Tokens(Vec<Vec<u32>>),
}

impl Input {
    /// The number of inputs.
    pub fn len(&self) -> usize {
        match &self.items {
            Items::Texts(texts) => texts.len(),
            Items::Tokens(lists) => lists.len(),
        }
    }

    /// The path of one input, for errors.
    pub fn field(&self, index: usize) -> String {
        if self.single {
            "input".to_owned()
        } else {
            format!("input[{index}]")
        }
    }

    /// An error if there is no input, if one of them is empty, or if a limit is
    /// exceeded.
    pub fn checked(self) -> Result<Self, Error> {
        let count = self.len();
        if count == 0 {
            return Err(Error::invalid("input", "must not be empty"));
        }
        if count > TEXTS_MAX {
            let reason = format!("has {count} inputs, but the maximum is {TEXTS_MAX}");
            return Err(Error::invalid("input", reason));
        }
        let sizes: Vec<usize> = match &self.items {
            Items::Texts(texts) => texts.iter().map(String::len).collect(),
            Items::Tokens(lists) => lists.iter().map(Vec::len).collect(),
        };
        if let Some(empty) = sizes.iter().position(|size| *size == 0) {
            return Err(Error::invalid(self.field(empty), "must not be empty"));
        }
        let long = sizes.iter().position(|size| *size > TOKENS_MAX);
        match (&self.items, long) {
            (Items::Tokens(_), Some(long)) => Err(Error::invalid(
                self.field(long),
                format!(
                    "has {} tokens, but the maximum is {TOKENS_MAX}",
                    sizes[long]
                ),
            )),
            _ => Ok(self),
        }
    }
}

/// One element of the list.
enum Element {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

/// The kind of the elements of a list, once it is known.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ElementKind {
    Any,
    Texts,
    Tokens,
    Lists,
}

impl ElementKind {
    /// An error if the element is of another kind. It is made where the element
    /// is read, so that it names the element.
    fn take<E: de::Error>(self, kind: Self, element: Element) -> Result<Element, E> {
        if self == Self::Any || self == kind {
            return Ok(element);
        }
        Err(E::custom("texts and tokens must not be mixed"))
    }
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(InputVisitor)
    }
}

impl<'de> DeserializeSeed<'de> for ElementKind {
    type Value = Element;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Element, D::Error> {
        deserializer.deserialize_any(self)
    }
}

struct InputVisitor;

impl<'de> Visitor<'de> for InputVisitor {
    type Value = Input;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a text, a list of texts, a list of tokens or a list of such lists")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Input, E> {
        Ok(Input {
            items: Items::Texts(vec![text.to_owned()]),
            single: true,
        })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Input, A::Error> {
        let (mut texts, mut tokens, mut lists) = (Vec::new(), Vec::new(), Vec::new());
        // The others must be of the kind of the first.
        let mut kind = ElementKind::Any;
        while let Some(element) = list.next_element_seed(kind)? {
            kind = match element {
                Element::Text(text) => {
                    texts.push(text);
                    ElementKind::Texts
                }
                Element::Token(token) => {
                    tokens.push(token);
                    ElementKind::Tokens
                }
                Element::Tokens(list) => {
                    lists.push(list);
                    ElementKind::Lists
                }
            };
            let (count, what, count_max) = match kind {
                ElementKind::Tokens => (tokens.len(), "tokens", TOKENS_MAX),
                _ => (texts.len() + lists.len(), "inputs", TEXTS_MAX),
            };
            waiting::check::<A::Error>(count)?;
            if count == count_max {
                reject_rest(&mut list, count, |count| {
                    format!("has {count} {what}, but the maximum is {count_max}")
                })?;
                break;
            }
        }
        let single = !tokens.is_empty();
        if single {
            lists.push(tokens);
        }
        let items = if lists.is_empty() {
            Items::Texts(texts)
        } else {
            Items::Tokens(lists)
        };
        Ok(Input { items, single })
    }
}

impl<'de> Visitor<'de> for ElementKind {
    type Value = Element;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Any => "a text, a token or a list of tokens",
            Self::Texts => "a text",
            Self::Tokens => "a token",
            Self::Lists => "a list of tokens",
        })
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Element, E> {
        self.visit_string(text.to_owned())
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Element, E> {
        self.take(Self::Texts, Element::Text(text))
    }

    fn visit_u64<E: de::Error>(self, token: u64) -> Result<Element, E> {
        let token = u32::try_from(token);
        let token = token.map_err(|_| E::custom("a token must be from 0 to 4294967295"))?;
        self.take(Self::Tokens, Element::Token(token))
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Element, E> {
        Err(E::custom("a token must be from 0 to 4294967295"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Element, A::Error> {
        let mut tokens = Vec::new();
        while let Some(token) = list.next_element()? {
            waiting::check::<A::Error>(tokens.len())?;
            tokens.push(token);
            if tokens.len() == TOKENS_MAX {
                reject_rest(&mut list, TOKENS_MAX, |count| {
                    format!("has {count} tokens, but the maximum is {TOKENS_MAX}")
                })?;
                break;
            }
        }
        self.take(Self::Lists, Element::Tokens(tokens))
    }
}

impl PartialSchema for Input {
    fn schema() -> RefOr<Schema> {
        let text = || {
            ObjectBuilder::new()
                .schema_type(Type::String)
                .min_length(Some(1))
        };
        let token = || {
            ObjectBuilder::new()
                .schema_type(Type::Integer)
                .minimum(Some(0))
                .maximum(Some(u32::MAX))
        };
        let tokens = || {
            ArrayBuilder::new()
                .items(token())
                .min_items(Some(1))
                .max_items(Some(TOKENS_MAX))
        };
        let list = |items: RefOr<Schema>| {
            ArrayBuilder::new()
                .items(items)
                .min_items(Some(1))
                .max_items(Some(TEXTS_MAX))
        };
        let one_of = OneOfBuilder::new()
            .description(Some(
                "One text, several texts, the token ids of one text, or those of several",
            ))
            .item(text().description(Some("One text")))
            .item(list(text().into()).description(Some("Several texts")))
            .item(tokens().description(Some("The token ids of one text")))
            .item(list(tokens().into()).description(Some("The token ids of several texts")));
        RefOr::T(Schema::from(one_of))
    }
}

impl ToSchema for Input {
    fn name() -> std::borrow::Cow<'static, str> {
        "EmbeddingInput".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Input, String> {
        let input: Input = serde_json::from_str(json).map_err(|error| error.to_string())?;
        input.checked().map_err(|error| error.to_string())
    }

    #[test]
    fn every_form_of_input_is_read() {
        let texts = |texts: &[&str]| Items::Texts(texts.iter().map(ToString::to_string).collect());
        assert_eq!(read("\"a\"").unwrap().items, texts(&["a"]));
        assert_eq!(read("[\"a\", \"b\"]").unwrap().items, texts(&["a", "b"]));
        let one = read("[7, 8]").unwrap();
        assert_eq!(
            (one.items.clone(), one.single),
            (Items::Tokens(vec![vec![7, 8]]), true)
        );
        let several = read("[[7, 8], [9]]").unwrap();
        assert_eq!(several.items, Items::Tokens(vec![vec![7, 8], vec![9]]));
        assert_eq!(several.field(1), "input[1]");
    }

    #[test]
    fn invalid_input_is_refused() {
        for (json, reason) in [
            ("[]", "must not be empty"),
            ("\"\"", "input: must not be empty"),
            ("[\"a\", \"\"]", "input[1]: must not be empty"),
            ("[[1], []]", "input[1]: must not be empty"),
            ("[1, \"a\"]", "texts and tokens must not be mixed"),
            ("[1, [2]]", "texts and tokens must not be mixed"),
            ("[-1]", "a token must be from 0"),
            ("[4294967296]", "a token must be from 0"),
            ("[1.5]", "a text, a token or a list of tokens"),
            ("null", "a text, a list of texts"),
            ("{}", "a text, a list of texts"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(reason), "{json}: {error}");
        }
        for json in ["[\"a\", 1]", "[1, \"a\"]", "[[1], 2]", "[\"a\", null]"] {
            let error = super::super::super::body::json::<Input>(json.as_bytes());
            let error = error.unwrap_err();
            assert_eq!(error.violation().unwrap().field, "[1]", "{json}");
        }
        let many = serde_json::to_string(&vec!["a"; TEXTS_MAX + 1]).unwrap();
        let error = read(&many).unwrap_err();
        assert!(
            error.contains("has 2049 inputs, but the maximum is 2048"),
            "{error}"
        );
        let many = vec![vec![1]; TEXTS_MAX + 2];
        let error = read(&serde_json::to_string(&many).unwrap()).unwrap_err();
        assert!(
            error.contains("has 2050 inputs, but the maximum is 2048"),
            "{error}"
        );
        let long = vec![1; TOKENS_MAX + 1];
        for json in [serde_json::json!(long), serde_json::json!([[2], long])] {
            let error = read(&json.to_string()).unwrap_err();
            assert!(
                error.contains("has 8193 tokens, but the maximum is 8192"),
                "{error}"
            );
        }
    }
}
