//! Tensors in JSON and in the binary extension.
