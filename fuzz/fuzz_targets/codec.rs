//! Any bytes: peeked, decoded, checked and read as every datatype. Nothing may
//! panic, and what a peek reads must be what the decoder reads.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use protocol::inference::ModelInferRequest;
use protocol::{InferRequest, peek};

fuzz_target!(|bytes: &[u8]| {
    let peeked = peek(bytes);
    let decoded = ModelInferRequest::decode(bytes);
    if let (Ok(peeked), Ok(decoded)) = (&peeked, &decoded) {
        assert_eq!(peeked.name, decoded.model_name);
        assert_eq!(peeked.version, decoded.model_version);
        assert_eq!(peeked.id, decoded.id);
    }
    let Ok(decoded) = decoded else { return };
    let Ok(request) = InferRequest::checked(decoded) else { return };
    for input in &request.inputs {
        let _ = input.tensor.to_f32();
        let _ = input.tensor.to_i64();
        if let Ok(elements) = input.tensor.to_elements() {
            assert_eq!(elements.len(), input.tensor.shape().elements());
        }
    }
});
