//! Types that are read from the kind of JSON that the OpenAPI document has for
//! them, and from no other: what serde derives would also read an object from a
//! list of its fields' values, and an enumeration from an object of one entry.

/// Implements `Deserialize` for types that derive it with
/// `#[serde(remote = "Self")]`: `object` from objects only, `word`, which is an
/// enumeration, from strings only.
macro_rules! strict {
    (object $($name:ident $(<$bytes:lifetime>)?),+) => {$(
        impl<'de $(: $bytes, $bytes)?> serde::Deserialize<'de> for $name $(<$bytes>)? {
            fn deserialize<D: serde::Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
                struct Object<T>(std::marker::PhantomData<T>);

                impl<'de $(: $bytes, $bytes)?> serde::de::Visitor<'de> for Object<$name $(<$bytes>)?> {
                    type Value = $name $(<$bytes>)?;

                    fn expecting(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        to.write_str("an object")
                    }

                    fn visit_map<A>(self, map: A) -> Result<Self::Value, A::Error>
                    where
                        A: serde::de::MapAccess<'de>,
                    {
                        Self::Value::deserialize(serde::de::value::MapAccessDeserializer::new(map))
                    }
                }

                reader.deserialize_map(Object(std::marker::PhantomData))
            }
        }
    )+};
    (word $($name:ident),+) => {$(
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
                struct Word;

                impl serde::de::Visitor<'_> for Word {
                    type Value = $name;

                    fn expecting(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        to.write_str("a string")
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$name, E> {
                        $name::deserialize(serde::de::value::StrDeserializer::new(text))
                    }
                }

                reader.deserialize_str(Word)
            }
        }
    )+};
}

pub(super) use strict;
