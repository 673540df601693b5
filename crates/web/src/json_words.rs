//! What an error says about a value of JSON of the wrong type, in the words of
//! JSON: serde names the types of Rust, which say nothing to a caller.

use std::borrow::Cow;
use std::fmt::Display;

/// What a value must be instead, from serde's sentence about it. None for a
/// sentence of another form.
///
/// The value itself, which serde repeats, is left out: it is the caller's.
pub fn must_be(sentence: &str) -> Option<String> {
    let (kind, rest) = sentence.strip_prefix("invalid ")?.split_once(": ")?;
    let (found, expected) = rest.rsplit_once(", expected ")?;
    // A value of the right type is wrong for its size.
    if kind == "value" {
        return Some(format!("must be {}", in_range(expected)));
    }
    let found = found.split(['"', '`']).next().unwrap_or_default().trim();
    Some(format!(
        "must be {}, not {}",
        named(expected),
        with_article(found)
    ))
}

/// A type that a value must have.
fn named(expected: &str) -> &str {
    match expected {
        "i8" | "i16" | "i32" | "i64" | "isize" | "u8" | "u16" | "u32" | "u64" | "usize" => {
            "an integer"
        }
        "f32" | "f64" => "a number",
        "a sequence" => "an array",
        "a map" => "an object",
        "a borrowed string" => "a string",
        "unit" => "null",
        expected if expected.starts_with("struct ") => "an object",
        expected => expected,
    }
}

/// The same with the range of integers.
fn in_range(expected: &str) -> Cow<'_, str> {
    let range = |least: &dyn Display, most: &dyn Display| {
        Cow::Owned(format!("an integer from {least} to {most}"))
    };
    match expected {
        "i8" => range(&i8::MIN, &i8::MAX),
        "i16" => range(&i16::MIN, &i16::MAX),
        "i32" => range(&i32::MIN, &i32::MAX),
        "i64" | "isize" => range(&i64::MIN, &i64::MAX),
        "u8" => range(&0, &u8::MAX),
        "u16" => range(&0, &u16::MAX),
        "u32" => range(&0, &u32::MAX),
        "u64" | "usize" => range(&0, &u64::MAX),
        expected => Cow::Borrowed(named(expected)),
    }
}

/// A type that a value has.
fn with_article(found: &str) -> &str {
    match found {
        "boolean" => "a boolean",
        "integer" => "an integer",
        "floating point" => "a decimal number",
        "string" => "a string",
        "sequence" => "an array",
        "map" => "an object",
        "unit" => "null",
        found => found,
    }
}

#[cfg(test)]
mod tests {
    use serde::de::DeserializeOwned;

    use super::*;

    /// The reason in the error of a text that is not of the type.
    fn reason<T: DeserializeOwned + std::fmt::Debug>(json: &str) -> String {
        let error = serde_json::from_str::<T>(json).unwrap_err().to_string();
        let (sentence, _) = error.rsplit_once(" at line ").unwrap();
        must_be(sentence).unwrap()
    }

    #[test]
    fn types_have_the_names_of_json() {
        assert_eq!(reason::<u32>("\"4\""), "must be an integer, not a string");
        assert_eq!(
            reason::<i64>("1.5"),
            "must be an integer, not a decimal number"
        );
        assert_eq!(reason::<f64>("[]"), "must be a number, not an array");
        assert_eq!(reason::<f32>("{}"), "must be a number, not an object");
        assert_eq!(reason::<bool>("1"), "must be a boolean, not an integer");
        assert_eq!(reason::<String>("true"), "must be a string, not a boolean");
        assert_eq!(reason::<Vec<u8>>("null"), "must be an array, not null");
        type Object = serde_json::Map<String, serde_json::Value>;
        assert_eq!(reason::<Object>("[]"), "must be an object, not an array");
    }

    #[test]
    fn a_number_out_of_range_has_its_range() {
        assert_eq!(
            reason::<u32>("-1"),
            "must be an integer from 0 to 4294967295"
        );
        assert_eq!(reason::<u8>("256"), "must be an integer from 0 to 255");
        assert_eq!(
            reason::<i64>("9223372036854775808"),
            "must be an integer from -9223372036854775808 to 9223372036854775807"
        );
    }

    #[test]
    fn a_value_is_not_repeated() {
        for json in ["\"secret\"", "\"secret, expected `x`\"", "\"a: secret\""] {
            let reason = reason::<bool>(json);
            assert_eq!(reason, "must be a boolean, not a string");
        }
        assert_eq!(must_be("invalid length 1, expected an array"), None);
        assert_eq!(must_be("missing field `model`"), None);
    }
}
