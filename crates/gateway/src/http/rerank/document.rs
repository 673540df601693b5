//! A document: its text alone, or an object that has it.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use utoipa::openapi::schema::{AdditionalProperties, ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// The text of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document(pub String);

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(DocumentVisitor)
    }
}

struct DocumentVisitor;

impl<'de> Visitor<'de> for DocumentVisitor {
    type Value = Document;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a text or an object with `text`")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Document, E> {
        Ok(Document(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Document, E> {
        Ok(Document(text))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Document, A::Error> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Object {
            text: String,
        }
        let object = Object::deserialize(de::value::MapAccessDeserializer::new(map))?;
        Ok(Document(object.text))
    }
}

impl PartialSchema for Document {
    fn schema() -> RefOr<Schema> {
        let text = || {
            ObjectBuilder::new()
                .schema_type(Type::String)
                .min_length(Some(1))
        };
        let object = ObjectBuilder::new()
            .property("text", text().description(Some("Its text")))
            .required("text")
            .additional_properties(Some(AdditionalProperties::<Schema>::FreeForm(false)));
        let one_of = OneOfBuilder::new()
            .description(Some("A text, or an object that has it"))
            .item(text())
            .item(object);
        RefOr::T(Schema::from(one_of))
    }
}

impl ToSchema for Document {
    fn name() -> std::borrow::Cow<'static, str> {
        "RerankDocument".into()
    }
}
