use crate::Datatype;

/// One input or output of a model, as the Open Inference Protocol names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The tensor's name.
    pub name: String,
    /// The datatype of its elements.
    pub datatype: Datatype,
    /// Its shape; -1 is any size, and the leading -1 counts the rows of a
    /// batch.
    pub shape: Vec<i64>,
}

impl TensorSpec {
    /// A tensor of this name, datatype and shape.
    pub fn new(name: &str, datatype: Datatype, shape: &[i64]) -> Self {
        Self {
            name: name.to_owned(),
            datatype,
            shape: shape.to_vec(),
        }
    }

    /// Whether a shape has this rank and its fixed dimensions. A list is also
    /// taken as one column: clients that know every tensor as a batch of rows
    /// write `[n, 1]` for `[n]`.
    pub fn fits(&self, sizes: &[usize]) -> bool {
        let sizes = match sizes {
            [rows @ .., 1] if rows.len() == 1 && self.shape.len() == 1 => rows,
            sizes => sizes,
        };
        sizes.len() == self.shape.len()
            && sizes
                .iter()
                .zip(&self.shape)
                .all(|(&size, &dimension)| dimension < 0 || i64::try_from(size) == Ok(dimension))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_also_taken_as_one_column() {
        let list = TensorSpec::new("text", Datatype::Bytes, &[-1]);
        for (sizes, fits) in [
            (&[3][..], true),
            (&[3, 1], true),
            (&[0, 1], true),
            (&[1, 3], false),
            (&[3, 1, 1], false),
            (&[], false),
        ] {
            assert_eq!(list.fits(sizes), fits, "{sizes:?}");
        }
        let rows = TensorSpec::new("pixels", Datatype::Fp32, &[-1, 2]);
        assert!(rows.fits(&[3, 2]) && !rows.fits(&[3]) && !rows.fits(&[3, 2, 1]));
        assert!(!TensorSpec::new("one", Datatype::Fp32, &[2]).fits(&[1, 1]));
    }
}
