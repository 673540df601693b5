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

    /// Whether a shape has this rank and its fixed dimensions.
    pub fn fits(&self, sizes: &[usize]) -> bool {
        sizes.len() == self.shape.len()
            && sizes
                .iter()
                .zip(&self.shape)
                .all(|(&size, &dimension)| dimension < 0 || i64::try_from(size) == Ok(dimension))
    }
}
