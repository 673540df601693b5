//! Datatypes, shapes and tensors of the Open Inference Protocol, and the codec
//! between them and the two forms they travel in: raw bytes and typed contents.
//!
//! Nothing here knows of messages, models or devices. No function panics,
//! whatever the bytes or the shape.

mod codec;
mod datatype;
mod shape;
mod spec;
mod tensor;

pub use codec::{TypedContents, bytes_elements, encode_bytes_elements, encode_typed};
pub use datatype::Datatype;
pub use shape::Shape;
pub use spec::TensorSpec;
pub use tensor::Tensor;

/// Why bytes, contents or a shape do not make a tensor: a predicate of the
/// field that holds them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// The name is no datatype of the protocol.
    #[error("'{0}' is not a datatype of the protocol")]
    UnknownDatatype(String),
    /// A dimension is negative.
    #[error("has a negative dimension: dimension {axis} is {size}")]
    NegativeDimension {
        /// The dimension's index in the shape.
        axis: usize,
        /// Its size.
        size: i64,
    },
    /// There are more dimensions than any model takes.
    #[error("has {rank} dimensions, over the limit of {max}")]
    TooManyDimensions {
        /// Dimensions in the shape.
        rank: usize,
        /// Dimensions allowed.
        max: usize,
    },
    /// The product of the dimensions, or the bytes they need, overflows.
    #[error("has more elements than can be counted")]
    ShapeOverflow,
    /// The raw bytes are more or fewer than the shape and datatype need.
    #[error("has {actual} bytes, but the shape and datatype need {expected}")]
    ByteCount {
        /// Bytes needed.
        expected: usize,
        /// Bytes there.
        actual: usize,
    },
    /// The elements are more or fewer than the shape needs.
    #[error("has {actual} elements, but the shape needs {expected}")]
    ElementCount {
        /// Elements needed.
        expected: usize,
        /// Elements there.
        actual: usize,
    },
    /// One element is invalid.
    #[error("element {element} {problem}")]
    Element {
        /// The element's index, counted over the whole tensor.
        element: usize,
        /// The problem.
        problem: ElementError,
    },
    /// Typed contents are in a field that is not the datatype's.
    #[error("must be in '{expected}' for {datatype}, but '{actual}' is filled")]
    WrongField {
        /// The tensor's datatype.
        datatype: Datatype,
        /// The datatype's field.
        expected: &'static str,
        /// The field that is filled.
        actual: &'static str,
    },
    /// The datatype has no typed contents.
    #[error("must be raw: {0} has no typed contents, use raw_input_contents")]
    NoTypedForm(Datatype),
    /// The tensor was read as another datatype than it has.
    #[error("is {actual}, but is read as {requested}")]
    DatatypeMismatch {
        /// The requested datatype.
        requested: Datatype,
        /// The tensor's datatype.
        actual: Datatype,
    },
}

impl TensorError {
    /// The index of the element that is invalid, if the error is about one.
    pub fn element(&self) -> Option<usize> {
        match self {
            Self::Element { element, .. } => Some(*element),
            _ => None,
        }
    }
}

/// The problem of one element: a predicate of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ElementError {
    /// An element of raw BYTES claims to be longer than the bytes that are
    /// left.
    #[error("claims {claimed} bytes, but {left} are left")]
    Length {
        /// The length it claims.
        claimed: usize,
        /// Bytes left after the length.
        left: usize,
    },
    /// Raw BYTES end inside the element's length.
    #[error("is cut off inside its length")]
    LengthCut,
    /// An integer does not fit the datatype.
    #[error("is {value}, out of range for {datatype}")]
    OutOfRange {
        /// Its value.
        value: i64,
        /// The tensor's datatype.
        datatype: Datatype,
    },
    /// A BOOL byte is neither 0 nor 1.
    #[error("is {value}, but BOOL must be 0 or 1")]
    NotBoolean {
        /// The byte.
        value: u8,
    },
}
