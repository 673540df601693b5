//! The fields of an object that its type does not have: they are kept as they
//! came, so that they can be passed on or refused by their names.

use serde::de::value::StringDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::value::RawValue;

use gateway::stack::ChatOption;

/// Such fields of one object, so that short ones cannot take much memory.
const FIELDS_MAX: usize = 64;
/// The bytes of the name of one, which stands in errors.
const NAME_BYTES_MAX: usize = 128;

/// Implements `Deserialize` from objects for types that derive it with
/// `#[serde(remote = "Self")]`, and have what is left in `more`, which serde skips.
macro_rules! open {
    ($($name:ident),+) => {$(
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
                struct Object;

                impl<'de> serde::de::Visitor<'de> for Object {
                    type Value = $name;

                    fn expecting(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        to.write_str("an object")
                    }

                    fn visit_map<A>(self, map: A) -> Result<$name, A::Error>
                    where
                        A: serde::de::MapAccess<'de>,
                    {
                        let mut more = Vec::new();
                        let reader = super::more::Open::new(map, &mut more);
                        let value = $name::deserialize(reader)?;
                        Ok($name { more, ..value })
                    }
                }

                reader.deserialize_map(Object)
            }
        }
    )+};
}

pub(super) use open;

/// Reads a type from an object. What the type does not have goes to `more`,
/// unless it is null, which is absent.
pub struct Open<'m, A> {
    map: A,
    more: &'m mut Vec<ChatOption>,
}

impl<'m, A> Open<'m, A> {
    /// Of an object whose entries have not been read.
    pub fn new(map: A, more: &'m mut Vec<ChatOption>) -> Self {
        Self { map, more }
    }
}

impl<'de, A: MapAccess<'de>> Deserializer<'de> for Open<'_, A> {
    type Error = A::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, A::Error> {
        visitor.visit_map(self.map)
    }

    /// The derived code says here which fields the type has.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        visitor.visit_map(Known {
            map: self.map,
            known,
            more: self.more,
        })
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// The entries that a type has.
struct Known<'m, A> {
    map: A,
    known: &'static [&'static str],
    more: &'m mut Vec<ChatOption>,
}

impl<A> Known<'_, A> {
    /// Keeps an entry that the type does not have.
    fn keep<'de>(&mut self, name: String) -> Result<(), A::Error>
    where
        A: MapAccess<'de>,
    {
        let value: Box<RawValue> = self.map.next_value()?;
        if name.len() > NAME_BYTES_MAX {
            let reason = format!("has a field with a name of over {NAME_BYTES_MAX} bytes");
            return Err(A::Error::custom(reason));
        }
        if self.more.iter().any(|field| field.name == name) {
            return Err(A::Error::custom(format_args!("duplicate field `{name}`")));
        }
        if self.more.len() == FIELDS_MAX {
            let reason = format!("has over {FIELDS_MAX} fields that are not described");
            return Err(A::Error::custom(reason));
        }
        if value.get() != "null" {
            self.more.push(ChatOption {
                name: name.into(),
                value,
            });
        }
        Ok(())
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Known<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        while let Some(name) = self.map.next_key::<String>()? {
            if self.known.contains(&name.as_str()) {
                return seed.deserialize(StringDeserializer::new(name)).map(Some);
            }
            self.keep(name)?;
        }
        Ok(None)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.map.next_value_seed(seed)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::body::json;
    use super::super::request::ChatCompletionRequest;
    use super::*;

    /// What is read of a chat with these fields.
    fn read(fields: &str) -> Result<Vec<ChatOption>, protocol::Error> {
        let message = r#"{"role": "user", "content": "a"}"#;
        let text = format!(r#"{{"model": "a", "messages": [{message}], {fields}}}"#);
        let chat: ChatCompletionRequest = json(text.as_bytes())?;
        Ok(chat.into_chat()?.options)
    }

    #[test]
    fn what_a_type_does_not_have_is_kept_as_it_came() {
        let number = r#"{"x": 1.50, "a": 12345678901234567890123}"#;
        let fields = format!(r#""b": {number}, "seed": 1, "c": null, "a": [1]"#);
        let options = read(&fields).unwrap();
        let options: Vec<_> = options.iter().map(|o| (&*o.name, o.value.get())).collect();
        assert_eq!(options, [("seed", "1"), ("b", number), ("a", "[1]")]);
    }

    #[test]
    fn what_a_type_does_not_have_is_bounded_and_given_once() {
        let fields = |count: usize| {
            let fields = (0..count).map(|index| format!("\"x{index}\": 1"));
            fields.collect::<Vec<_>>().join(", ")
        };
        assert_eq!(read(&fields(FIELDS_MAX)).unwrap().len(), FIELDS_MAX);
        let error = read(&fields(FIELDS_MAX + 1)).unwrap_err().to_string();
        assert!(error.contains("over 64 fields"), "{error}");
        let twice = read(r#""b": 1, "b": 2"#).unwrap_err();
        assert_eq!(twice.violation().unwrap().field, "b");
        let name = "x".repeat(NAME_BYTES_MAX + 1);
        let error = read(&format!("\"{name}\": 1")).unwrap_err().to_string();
        assert!(
            error.contains("over 128 bytes") && error.len() < 300,
            "{error}"
        );
    }

    #[test]
    fn a_wrong_value_behind_what_is_kept_is_named() {
        let error = read(r#""b": 1, "seed": "x""#).unwrap_err();
        assert_eq!(error.violation().unwrap().field, "seed");
    }
}
