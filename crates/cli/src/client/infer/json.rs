//! Nested JSON arrays: their nesting is the shape.

use anyhow::{Context, bail};
use serde_json::Value;
use tensor::Shape;

use super::elements::Element;

/// A value or nested array.
#[derive(Debug, PartialEq)]
pub struct Array {
    /// The lengths from the outermost array to the innermost; a single value
    /// has the shape `[1]`.
    pub shape: Vec<i64>,
    /// The values in row-major order.
    pub values: Vec<Element<'static>>,
}

/// Parses a value or a nested array whose rows are equally long. serde_json
/// bounds the depth.
pub fn parse(text: &[u8]) -> anyhow::Result<Array> {
    let value: Value = serde_json::from_slice(text).context("not JSON")?;
    let mut flattened = Flattened::default();
    flattened.push(value, 0)?;
    if flattened.lengths.is_empty() {
        flattened.lengths.push(1);
    }
    Ok(Array {
        shape: flattened
            .lengths
            .iter()
            .map(|&length| i64::try_from(length))
            .collect::<Result<_, _>>()?,
        values: flattened.values,
    })
}

/// The values seen so far.
#[derive(Default)]
struct Flattened {
    /// The length of the arrays at each depth.
    lengths: Vec<usize>,
    /// A value or an empty array has been seen, so that the depth is known.
    depth_known: bool,
    values: Vec<Element<'static>>,
}

impl Flattened {
    fn push(&mut self, value: Value, depth: usize) -> anyhow::Result<()> {
        let element = match value {
            Value::Array(items) => return self.push_array(items, depth),
            Value::Bool(value) => Element::Bool(value),
            Value::String(text) => Element::Text(text.into()),
            Value::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(integer), _) => Element::Signed(integer),
                (None, Some(integer)) => Element::Unsigned(integer),
                (None, None) => {
                    Element::Float64(number.as_f64().context("a number is out of range")?)
                }
            },
            Value::Null | Value::Object(_) => bail!(
                "value {} is null or an object, but must be a number, string or boolean",
                self.values.len()
            ),
        };
        self.depth_known = true;
        if depth != self.lengths.len() {
            bail!(
                "value {} is nested less deeply than others",
                self.values.len()
            );
        }
        self.values.push(element);
        Ok(())
    }

    fn push_array(&mut self, items: Vec<Value>, depth: usize) -> anyhow::Result<()> {
        if depth >= Shape::RANK_MAX {
            bail!("arrays are nested more than {} deep", Shape::RANK_MAX);
        }
        match self.lengths.get(depth) {
            Some(&length) if length == items.len() => {}
            Some(length) => bail!(
                "after value {} an array has {} elements where others have {length}",
                self.values.len(),
                items.len()
            ),
            None if self.depth_known => bail!(
                "after value {} an array is nested more deeply than others",
                self.values.len()
            ),
            None => self.lengths.push(items.len()),
        }
        if items.is_empty() {
            self.depth_known = true;
        }
        for item in items {
            self.push(item, depth + 1)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shape(text: &str) -> Option<Vec<i64>> {
        parse(text.as_bytes()).ok().map(|array| array.shape)
    }

    #[test]
    fn nesting_is_the_shape() {
        assert_eq!(shape("[[1,2,3],[4,5,6]]"), Some(vec![2, 3]));
        assert_eq!(shape("[\"a\",\"b\"]"), Some(vec![2]));
        assert_eq!(shape("7"), Some(vec![1]));
        assert_eq!(shape("[]"), Some(vec![0]));
        assert_eq!(shape("[[],[]]"), Some(vec![2, 0]));
        let values = parse(b"[1, -2.5, 18446744073709551615, true, \"x\"]").unwrap();
        assert_eq!(
            values.values,
            [
                Element::Signed(1),
                Element::Float64(-2.5),
                Element::Unsigned(u64::MAX),
                Element::Bool(true),
                Element::Text("x".into()),
            ]
        );
    }

    #[test]
    fn what_is_no_array_of_values_is_refused() {
        let deep = format!("{}1{}", "[".repeat(17), "]".repeat(17));
        for wrong in [
            "",
            "[1,",
            "[1,[2]]",
            "[[1],2]",
            "[[1],[2,3]]",
            "[[],1]",
            "[null]",
            "{}",
            "[1]]",
            &deep,
            &"[".repeat(100_000),
            "1e999",
        ] {
            assert_eq!(shape(wrong), None, "{wrong:.40}");
        }
    }

    /// A nested array of any form, often ragged.
    fn arrays() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<i64>().prop_map(Value::from),
            any::<bool>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
            Just(Value::Null),
        ];
        leaf.prop_recursive(5, 64, 4, |inner| {
            prop::collection::vec(inner, 0..4).prop_map(Value::from)
        })
    }

    proptest! {
        #[test]
        fn hostile_bytes_do_no_harm(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
        }

        #[test]
        fn accepted_arrays_have_as_many_values_as_their_shape_says(value in arrays()) {
            if let Ok(array) = parse(value.to_string().as_bytes()) {
                let shape = Shape::checked(&array.shape).unwrap();
                prop_assert_eq!(shape.elements(), array.values.len());
            }
        }
    }
}
