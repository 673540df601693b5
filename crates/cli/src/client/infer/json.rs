//! Nested JSON arrays: their nesting is the shape.

use anyhow::{Context, bail};
use serde_json::Value;
use tensor::Shape;

use super::scalar::Scalar;

/// What a JSON text holds.
#[derive(Debug, PartialEq)]
pub struct Array {
    /// The lengths from the outermost array to the innermost; one value that is
    /// no array has the shape `[1]`.
    pub shape: Vec<i64>,
    /// The values in row-major order.
    pub values: Vec<Scalar>,
}

/// Reads a value or a nested array whose rows are equally long. serde_json
/// bounds the depth that it follows.
pub fn parse(text: &[u8]) -> anyhow::Result<Array> {
    let value: Value = serde_json::from_slice(text).context("not JSON")?;
    let mut walk = Walk::default();
    walk.visit(value, 0)?;
    if walk.lengths.is_empty() {
        walk.lengths.push(1);
    }
    Ok(Array {
        shape: walk
            .lengths
            .iter()
            .map(|&length| i64::try_from(length))
            .collect::<Result<_, _>>()?,
        values: walk.values,
    })
}

#[derive(Default)]
struct Walk {
    lengths: Vec<usize>,
    /// The first value or empty array has been seen: the lengths stand.
    settled: bool,
    values: Vec<Scalar>,
}

impl Walk {
    fn visit(&mut self, value: Value, depth: usize) -> anyhow::Result<()> {
        let scalar = match value {
            Value::Array(items) => return self.visit_array(items, depth),
            Value::Bool(value) => Scalar::Bool(value),
            Value::String(text) => Scalar::Text(text),
            Value::Number(number) => {
                let integer = number.as_i64().map(i128::from);
                match integer.or_else(|| number.as_u64().map(i128::from)) {
                    Some(integer) => Scalar::Integer(integer),
                    None => Scalar::Float(number.as_f64().context("a number is out of range")?),
                }
            }
            Value::Null | Value::Object(_) => bail!(
                "value {} is null or an object: give numbers, texts or booleans in arrays",
                self.values.len()
            ),
        };
        self.settled = true;
        if depth != self.lengths.len() {
            bail!(
                "value {} is nested less deeply than others",
                self.values.len()
            );
        }
        self.values.push(scalar);
        Ok(())
    }

    fn visit_array(&mut self, items: Vec<Value>, depth: usize) -> anyhow::Result<()> {
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
            None if self.settled => bail!(
                "after value {} an array is nested more deeply than others",
                self.values.len()
            ),
            None => self.lengths.push(items.len()),
        }
        if items.is_empty() {
            self.settled = true;
        }
        for item in items {
            self.visit(item, depth + 1)?;
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
                Scalar::Integer(1),
                Scalar::Float(-2.5),
                Scalar::Integer(u64::MAX.into()),
                Scalar::Bool(true),
                Scalar::Text("x".into()),
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
