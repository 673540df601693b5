//! Numbers of 32 bits without a sign: what is generated calls them `int32`,
//! which has one and ends at half of them.

use serde_json::{Value, json};

/// Gives every such number of a document its whole range.
pub fn widen(node: &mut Value) {
    let parts: Vec<&mut Value> = match node {
        Value::Object(fields) => {
            let unsigned = fields
                .get("minimum")
                .is_some_and(|least| least.as_f64() >= Some(0.0));
            if unsigned && fields.get("format").is_some_and(|format| format == "int32") {
                fields.insert("format".to_owned(), json!("int64"));
                fields.entry("maximum").or_insert(json!(u32::MAX));
            }
            fields.values_mut().collect()
        }
        Value::Array(elements) => elements.iter_mut().collect(),
        _ => return,
    };
    parts.into_iter().for_each(widen);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsigned_numbers_may_be_as_large_as_they_are() {
        let number = json!({"type": "integer", "format": "int32", "minimum": 1});
        let signed = json!({"type": "integer", "format": "int32"});
        let mut document = json!({"properties": [number, signed]});
        widen(&mut document);
        let wide = json!({
            "type": "integer", "format": "int64", "minimum": 1, "maximum": u32::MAX
        });
        assert_eq!(document, json!({"properties": [wide, signed]}));
    }
}
