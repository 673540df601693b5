//! Properties of the codec: what is written reads back, and no bytes panic.

use bytes::Bytes;
use proptest::prelude::*;
use tensor::{
    Datatype, ElementError, Shape, Tensor, TensorError, TypedContents, bytes_elements,
    encode_bytes_elements, encode_typed,
};

fn any_datatype() -> impl Strategy<Value = Datatype> {
    proptest::sample::select(Datatype::ALL.to_vec())
}

proptest! {
    #[test]
    fn any_bytes_make_a_tensor_or_an_error(
        datatype in any_datatype(),
        shape in proptest::collection::vec(any::<i64>(), 0..20),
        raw in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        if let Ok(shape) = Shape::checked(&shape) {
            let _ = Tensor::from_raw(datatype, shape, raw.into());
        }
    }

    #[test]
    fn small_shapes_agree_with_their_bytes(
        datatype in any_datatype(),
        shape in proptest::collection::vec(0_i64..5, 0..4),
        raw in proptest::collection::vec(0_u8..3, 0..300),
    ) {
        let shape = Shape::checked(&shape).unwrap();
        let elements = shape.elements();
        let length = raw.len();
        let made = Tensor::from_raw(datatype, shape, raw.into());
        if let (Ok(tensor), Some(width)) = (&made, datatype.element_bytes()) {
            prop_assert_eq!(length, elements * width);
            prop_assert_eq!(tensor.raw().len(), length);
        }
    }

    #[test]
    fn byte_strings_read_back(elements in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..40)) {
        let raw = encode_bytes_elements(&elements).unwrap();
        let back: Vec<Vec<u8>> = bytes_elements(&raw).map(|element| element.unwrap().to_vec()).collect();
        prop_assert_eq!(back, elements);
    }

    #[test]
    fn cut_byte_strings_are_refused(elements in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 1..10), cut in 1_usize..5) {
        let raw = encode_bytes_elements(&elements).unwrap();
        let shape = Shape::checked(&[elements.len() as i64]).unwrap();
        let cut = Bytes::from(raw).slice(..(elements.iter().map(|e| e.len() + 4).sum::<usize>() - cut.min(elements.last().unwrap().len() + 3)));
        prop_assert!(Tensor::from_raw(Datatype::Bytes, shape, cut).is_err());
    }

    #[test]
    fn floats_read_back(values in proptest::collection::vec(any::<f32>(), 0..50)) {
        let shape = Shape::checked(&[values.len() as i64]).unwrap();
        let contents = TypedContents { fp32_contents: values.clone(), ..Default::default() };
        let raw = encode_typed(Datatype::Fp32, &shape, &contents).unwrap();
        let tensor = Tensor::from_raw(Datatype::Fp32, shape, raw.into()).unwrap();
        let back: Vec<u32> = tensor.to_f32().unwrap().iter().map(|v| v.to_bits()).collect();
        prop_assert_eq!(back, values.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
    }

    #[test]
    fn narrow_integers_keep_their_value_or_are_refused(values in proptest::collection::vec(any::<i32>(), 1..20)) {
        let shape = Shape::checked(&[values.len() as i64]).unwrap();
        let contents = TypedContents { int_contents: values.clone(), ..Default::default() };
        match encode_typed(Datatype::Int16, &shape, &contents) {
            Ok(raw) => {
                let back: Vec<i32> = raw.chunks(2).map(|b| i16::from_le_bytes([b[0], b[1]]).into()).collect();
                prop_assert_eq!(back, values);
            }
            Err(error) => {
                let outside = values.iter().any(|v| i16::try_from(*v).is_err());
                prop_assert!(outside, "{}", error);
            }
        }
    }
}

#[test]
fn overflow_is_seen_beside_a_zero() {
    assert_eq!(
        Shape::checked(&[0, i64::MAX, 4]),
        Err(TensorError::ShapeOverflow)
    );
    assert_eq!(
        Shape::checked(&[1 << 32, 1 << 32]),
        Err(TensorError::ShapeOverflow)
    );
    assert_eq!(
        Shape::checked(&[2, -1]),
        Err(TensorError::NegativeDimension { axis: 1, size: -1 })
    );
}

#[test]
fn a_lying_length_is_named() {
    let raw = Bytes::from_static(&[255, 255, 255, 255, 1, 2]);
    let error = Tensor::from_raw(Datatype::Bytes, Shape::checked(&[1]).unwrap(), raw);
    assert_eq!(
        error,
        Err(TensorError::Element {
            element: 0,
            problem: ElementError::Length {
                claimed: u32::MAX as usize,
                left: 2
            }
        })
    );
}

#[test]
fn contents_of_another_datatype_are_refused() {
    let shape = Shape::checked(&[1]).unwrap();
    let contents = TypedContents {
        fp64_contents: vec![1.0],
        ..Default::default()
    };
    assert!(matches!(
        encode_typed(Datatype::Fp32, &shape, &contents),
        Err(TensorError::WrongField {
            expected: "fp32_contents",
            actual: "fp64_contents",
            ..
        })
    ));
    assert_eq!(
        encode_typed(Datatype::Bf16, &shape, &contents),
        Err(TensorError::NoTypedForm(Datatype::Bf16))
    );
    let ones = Shape::checked(&[2]).unwrap();
    let contents = TypedContents {
        fp32_contents: vec![1.0],
        ..Default::default()
    };
    assert_eq!(
        encode_typed(Datatype::Fp32, &ones, &contents),
        Err(TensorError::ElementCount {
            expected: 2,
            actual: 1
        })
    );
}
