use std::fmt;

use crate::TensorError;

/// A shape whose element count is known to fit.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Shape {
    dimensions: Vec<usize>,
    elements: usize,
}

impl Shape {
    /// The most dimensions a tensor may have.
    pub const RANK_MAX: usize = 16;

    /// Checks a shape as it came: no dimension negative, the product in range.
    pub fn checked(dimensions: &[i64]) -> Result<Self, TensorError> {
        if dimensions.len() > Self::RANK_MAX {
            return Err(TensorError::TooManyDimensions {
                rank: dimensions.len(),
                max: Self::RANK_MAX,
            });
        }
        let sizes = dimensions
            .iter()
            .enumerate()
            .map(|(axis, &size)| {
                if size < 0 {
                    return Err(TensorError::NegativeDimension { axis, size });
                }
                usize::try_from(size).map_err(|_| TensorError::ShapeOverflow)
            })
            .collect::<Result<Vec<_>, _>>()?;
        Self::from_sizes(sizes)
    }

    /// A shape of sizes that a model made.
    pub fn from_sizes(sizes: Vec<usize>) -> Result<Self, TensorError> {
        // A zero anywhere must not hide that the others overflow.
        sizes
            .iter()
            .filter(|&&size| size != 0)
            .try_fold(1_usize, |product, &size| product.checked_mul(size))
            .filter(|&product| i64::try_from(product).is_ok())
            .ok_or(TensorError::ShapeOverflow)?;
        let elements = sizes.iter().product();
        Ok(Self {
            dimensions: sizes,
            elements,
        })
    }

    /// The sizes in order, the batch dimension first.
    pub fn sizes(&self) -> &[usize] {
        &self.dimensions
    }

    /// The sizes as the protocol writes them.
    pub fn to_wire(&self) -> Vec<i64> {
        self.dimensions.iter().map(|&size| size as i64).collect()
    }

    /// The product of the sizes; 1 for a scalar.
    pub fn elements(&self) -> usize {
        self.elements
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}", self.dimensions)
    }
}
