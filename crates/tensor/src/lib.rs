//! Datatypes, shapes and tensors of the Open Inference Protocol, and the codec
//! between them and the two forms they travel in: raw bytes and typed contents.
//!
//! Nothing here knows of messages, models or devices. No function panics,
//! whatever the bytes or the shape.

mod codec;
mod datatype;
mod shape;
mod tensor;

pub use codec::{TypedContents, bytes_elements, encode_bytes_elements, encode_typed};
pub use datatype::Datatype;
pub use shape::Shape;
pub use tensor::Tensor;

/// Why bytes, contents or a shape do not make a tensor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// The name is no datatype of the protocol.
    #[error("unknown datatype '{0}'")]
    UnknownDatatype(String),
    /// A dimension is negative.
    #[error("dimension {axis} is {size}: a dimension cannot be negative")]
    NegativeDimension {
        /// The dimension's place in the shape.
        axis: usize,
        /// Its size.
        size: i64,
    },
    /// There are more dimensions than any model takes.
    #[error("{rank} dimensions: at most {max} are allowed")]
    TooManyDimensions {
        /// Dimensions in the shape.
        rank: usize,
        /// Dimensions allowed.
        max: usize,
    },
    /// The product of the dimensions, or the bytes they need, overflows.
    #[error("the shape's element count is too large")]
    ShapeOverflow,
    /// The raw bytes are more or fewer than the shape and datatype need.
    #[error("{actual} bytes, but the shape and datatype need {expected}")]
    ByteCount {
        /// Bytes needed.
        expected: usize,
        /// Bytes there.
        actual: usize,
    },
    /// The elements are more or fewer than the shape needs.
    #[error("{actual} elements, but the shape needs {expected}")]
    ElementCount {
        /// Elements needed.
        expected: usize,
        /// Elements there.
        actual: usize,
    },
    /// A BYTES element says that it is longer than the bytes that are left.
    #[error("element {element} of BYTES claims {claimed} bytes, but {left} are left")]
    ElementLength {
        /// The element's place.
        element: usize,
        /// The length it claims.
        claimed: usize,
        /// Bytes left after the length.
        left: usize,
    },
    /// A BYTES tensor ends inside an element's length.
    #[error("BYTES contents end inside the length of element {element}")]
    LengthCut {
        /// The element's place.
        element: usize,
    },
    /// Typed contents stand in a field that is not the datatype's.
    #[error("{datatype} contents must be in '{expected}', not in '{actual}'")]
    WrongField {
        /// The tensor's datatype.
        datatype: Datatype,
        /// The datatype's field.
        expected: &'static str,
        /// The field that is filled.
        actual: &'static str,
    },
    /// The datatype has no typed contents.
    #[error("{0} has no typed contents: send raw_input_contents")]
    NoTypedForm(Datatype),
    /// An element does not fit the datatype.
    #[error("element {element} is {value}: out of range for {datatype}")]
    OutOfRange {
        /// The element's place.
        element: usize,
        /// Its value.
        value: i64,
        /// The tensor's datatype.
        datatype: Datatype,
    },
    /// A BOOL byte is neither 0 nor 1.
    #[error("byte {element} of BOOL is {value}: only 0 and 1 are allowed")]
    NotBoolean {
        /// The element's place.
        element: usize,
        /// The byte.
        value: u8,
    },
    /// The tensor was read as another datatype than it has.
    #[error("a {actual} tensor cannot be read as {wanted}")]
    DatatypeMismatch {
        /// The datatype asked for.
        wanted: Datatype,
        /// The tensor's datatype.
        actual: Datatype,
    },
}
