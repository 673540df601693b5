//! Every kernel, in every instruction set that this CPU supports, against 64-bit arithmetic.

use half::bf16;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;

fn sets() -> Vec<InstructionSet> {
    #[cfg(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu"))]
    gemm::amx::emulated::install_where_missing();
    let sets = InstructionSet::ALL.into_iter();
    let sets: Vec<_> = sets.filter(|set| set.supported()).collect();
    assert!(sets.contains(&InstructionSet::Portable));
    sets
}

/// Numbers that look like activations: mostly small, some large.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count)
        .map(|_| (next() + next() + next()) * 2.0)
        .collect()
}

fn activation(value: f64, activation: Activation) -> f64 {
    // erf by its series: enough terms for the numbers here.
    let erf = |x: f64| {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        if x.abs() > 5.0 {
            x.signum()
        } else {
            sum * 2.0 / std::f64::consts::PI.sqrt()
        }
    };
    match activation {
        Activation::Identity => value,
        Activation::Gelu => 0.5 * value * (1.0 + erf(value / 2f64.sqrt())),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (value + 0.044_715 * value.powi(3));
            0.5 * value * (1.0 + inner.tanh())
        }
        Activation::Relu => value.max(0.0),
        Activation::Silu => value / (1.0 + (-value).exp()),
        Activation::Tanh => value.tanh(),
    }
}

const ACTIVATIONS: [Activation; 6] = [
    Activation::Identity,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Silu,
    Activation::Tanh,
];

/// A linear layer, with weights of `[outputs, inputs]`.
struct Layer {
    inputs: usize,
    weights: Vec<f32>,
    bias: Vec<f32>,
    function: Activation,
}

/// The exact result of a GEMM, with operands rounded or quantized to the dtype.
fn exact_gemm(dtype: WeightDtype, input: &[f32], layer: &Layer) -> Vec<f64> {
    let float = |row: &[f32]| -> Vec<f64> { row.iter().map(|value| f64::from(*value)).collect() };
    let narrow = |row: &[f32]| -> Vec<f64> {
        row.iter()
            .map(|value| bf16::from_f32(*value).to_f64())
            .collect()
    };
    // Quantization is symmetric for weights, and asymmetric for inputs.
    let weight = |row: &[f32]| -> Vec<f64> {
        let most = row.iter().fold(0f32, |most, value| most.max(value.abs()));
        let scale = f64::from(most / 127.0);
        float(row)
            .iter()
            .map(|value| (value / scale).round() * scale)
            .collect()
    };
    let byte = |row: &[f32]| -> Vec<f64> {
        let low = f64::from(row.iter().copied().fold(0.0, f32::min));
        let high = f64::from(row.iter().copied().fold(0.0, f32::max));
        let scale = (high - low) / 255.0;
        let zero = (-low / scale).round();
        let whole = |value: &f64| (value / scale + zero).round().clamp(0.0, 255.0);
        float(row)
            .iter()
            .map(|value| (whole(value) - zero) * scale)
            .collect()
    };
    let rounded = |numbers: &[f32], int8: &dyn Fn(&[f32]) -> Vec<f64>| -> Vec<Vec<f64>> {
        let rows = numbers.chunks(layer.inputs);
        match dtype {
            WeightDtype::F32 => rows.map(float).collect(),
            WeightDtype::Bf16 => rows.map(narrow).collect(),
            WeightDtype::Int8 => rows.map(int8).collect(),
        }
    };
    let (rows, outputs) = (rounded(input, &byte), rounded(&layer.weights, &weight));
    let mut results = Vec::new();
    for row in &rows {
        for (output, bias) in outputs.iter().zip(&layer.bias) {
            let sum: f64 = row.iter().zip(output).map(|(a, b)| a * b).sum();
            results.push(activation(sum + f64::from(*bias), layer.function));
        }
    }
    results
}

/// Leaves NaN in the arena of this thread, for the next matrices.
fn fill_arena_with_nan() {
    let none = vec![f32::from_bits(u32::MAX); 1 << 18];
    let sizes = (4..=18).map(|power| Matrix::from_floats(&none[..1 << power], 1 << power));
    drop(sizes.collect::<Vec<_>>());
}

#[derive(Clone, Copy)]
struct GemmShape {
    rows: usize,
    inputs: usize,
    outputs: usize,
}

fn check_gemm(shape: GemmShape, seed: u64, set: InstructionSet, dtype: WeightDtype) {
    let GemmShape {
        rows,
        inputs,
        outputs,
    } = shape;
    let input = numbers(rows * inputs, seed);
    let function = ACTIVATIONS[seed as usize % ACTIVATIONS.len()];
    let layer = Layer {
        inputs,
        weights: numbers(outputs * inputs, seed + 1),
        bias: numbers(outputs, seed + 2),
        function,
    };
    let exact = exact_gemm(dtype, &input, &layer);
    let packed = PackedWeights::new(set, dtype, &layer.weights, Some(&layer.bias), inputs);
    let matrix = Matrix::from_floats(&input, inputs);
    fill_arena_with_nan();
    let result = matmul(&packed, &matrix, function, MatrixDtype::F32);
    // Sums of `inputs` products of numbers below 3; a quantized input may be rounded to the other
    // side of a half, which costs one step of its scale times a weight.
    let tolerance = match dtype {
        WeightDtype::F32 => 1e-5 * (inputs as f64).sqrt() + 2e-6,
        WeightDtype::Bf16 => 2e-5 * (inputs as f64).sqrt() + 2e-5,
        WeightDtype::Int8 => 0.08,
    };
    for (index, (value, exact)) in result.floats().iter().zip(&exact).enumerate() {
        let difference = (f64::from(*value) - exact).abs();
        assert!(
            difference <= tolerance * (1.0 + exact.abs()),
            "{set} {dtype:?} {rows}x{inputs}x{outputs} {function:?} at {index}: \
             {value} is not {exact}"
        );
    }
    let narrow = matmul(&packed, &matrix, function, MatrixDtype::Bf16);
    assert_eq!((narrow.rows(), narrow.width()), (rows, outputs));
    let again = PackedWeights::new(set, WeightDtype::Bf16, &identity(outputs), None, outputs);
    let wide = matmul(&again, &narrow, Activation::Identity, MatrixDtype::F32);
    for (wide, value) in wide.floats().iter().zip(result.floats()) {
        // Half a step of bfloat16, and the error of the activation function where it is rounded.
        let due = value.abs() / 256.0 + 4e-5;
        assert!(
            (wide - value).abs() <= due,
            "{set} {dtype:?}: {wide} is not near {value}"
        );
    }
}

fn identity(size: usize) -> Vec<f32> {
    let mut values = vec![0.0; size * size];
    values
        .iter_mut()
        .step_by(size + 1)
        .for_each(|value| *value = 1.0);
    values
}

#[test]
fn gemm_of_any_shape() {
    let shape = (1usize..40, 1usize..200, 1usize..150, any::<u32>());
    let mut runner = TestRunner::new(Config::with_cases(60));
    runner
        .run(&shape, |(rows, inputs, outputs, seed)| {
            for set in sets() {
                for dtype in [WeightDtype::F32, WeightDtype::Bf16, WeightDtype::Int8] {
                    let shape = GemmShape {
                        rows,
                        inputs,
                        outputs,
                    };
                    check_gemm(shape, seed.into(), set, dtype);
                }
            }
            Ok(())
        })
        .unwrap();
    for set in sets() {
        for dtype in [WeightDtype::F32, WeightDtype::Bf16, WeightDtype::Int8] {
            for (seed, [rows, inputs, outputs]) in
                [(1, [512, 384, 130]), (3, [75, 100, 200]), (2, [1, 1, 1])]
            {
                let shape = GemmShape {
                    rows,
                    inputs,
                    outputs,
                };
                check_gemm(shape, seed, set, dtype);
            }
        }
    }
}

/// The exact result of attention.
fn exact_attention(
    qkv: &[f32],
    [heads, width]: [usize; 2],
    spans: &[(usize, usize)],
    window: Option<usize>,
) -> Vec<f64> {
    let hidden = heads * width;
    let at = |token: usize, part: usize, column: usize| {
        f64::from(qkv[token * 3 * hidden + part * hidden + column])
    };
    let mut output = vec![0.0; qkv.len() / 3];
    for (start, length) in spans {
        for (query, head) in
            (0..*length).flat_map(|query| (0..heads).map(move |head| (query, head)))
        {
            let columns = head * width..(head + 1) * width;
            let seen = |key: &usize| window.is_none_or(|reach| key.abs_diff(query) <= reach);
            let keys: Vec<usize> = (0..*length).filter(seen).collect();
            let score = |key: &usize| {
                let products = columns
                    .clone()
                    .map(|column| at(start + query, 0, column) * at(start + key, 1, column));
                (products.sum::<f64>() / (width as f64).sqrt()).exp()
            };
            let weights: Vec<f64> = keys.iter().map(score).collect();
            let sum: f64 = weights.iter().sum();
            for column in columns.clone() {
                let products = keys.iter().zip(&weights);
                let value = products.map(|(key, weight)| weight * at(start + key, 2, column));
                output[(start + query) * hidden + column] = value.sum::<f64>() / sum;
            }
        }
    }
    output
}

fn check_attention(lengths: &[usize], [heads, width]: [usize; 2], window: Option<usize>) {
    let mut start = 0;
    let spans: Vec<(usize, usize)> = lengths
        .iter()
        .map(|length| {
            start += length;
            (start - length, *length)
        })
        .collect();
    let qkv = numbers(start * 3 * heads * width, lengths.len() as u64 + 7);
    let exact = exact_attention(&qkv, [heads, width], &spans, window);
    let qkv = Matrix::from_floats(&qkv, 3 * heads * width);
    for set in sets() {
        for (dtype, tolerance) in [(MatrixDtype::F32, 2e-6), (MatrixDtype::Bf16, 2e-2)] {
            let attention = AttentionInput {
                qkv: &qkv,
                heads,
                spans: &spans,
                window,
                dtype,
            };
            let output = attend(set, &attention);
            let widen = PackedWeights::new(
                set,
                WeightDtype::Bf16,
                &identity(heads * width),
                None,
                heads * width,
            );
            let output = match dtype {
                MatrixDtype::F32 => output,
                MatrixDtype::Bf16 => {
                    matmul(&widen, &output, Activation::Identity, MatrixDtype::F32)
                }
            };
            for (index, (value, exact)) in output.floats().iter().zip(&exact).enumerate() {
                assert!(
                    (f64::from(*value) - exact).abs() < tolerance,
                    "{set} {dtype:?} {lengths:?} {heads}x{width} {window:?} at {index}: \
                     {value} is not {exact}"
                );
            }
        }
    }
}

#[test]
fn attention_over_any_rows() {
    let rows = prop::collection::vec(1usize..90, 1..5);
    let window = prop::option::of(0usize..40);
    let shape = (rows, 1usize..4, 1usize..40, window);
    let mut runner = TestRunner::new(Config::with_cases(40));
    runner
        .run(&shape, |(rows, heads, width, window)| {
            check_attention(&rows, [heads, width], window);
            Ok(())
        })
        .unwrap();
    check_attention(&[512, 1], [2, 32], None);
    check_attention(&[300], [1, 64], Some(64));
}

#[test]
fn norms_of_any_width() {
    let shape = (1usize..9, 1usize..300, any::<bool>(), any::<bool>());
    let mut runner = TestRunner::new(Config::with_cases(100));
    runner
        .run(&shape, |(rows, width, is_sum, has_bias)| {
            let input = numbers(rows * width, width as u64);
            let added = numbers(rows * width, 3);
            let weight = numbers(width, 4);
            let bias = if has_bias {
                numbers(width, 5)
            } else {
                Vec::new()
            };
            let parameters = LayerNormParameters {
                weight: &weight,
                bias: &bias,
                epsilon: 1e-5,
            };
            let matrices = [&input, &added].map(|values| Matrix::from_floats(values, width));
            for set in sets() {
                let output = layer_norm(
                    set,
                    parameters,
                    &matrices[0],
                    is_sum.then_some(&matrices[1]),
                );
                for row in 0..rows {
                    let at = |values: &[f32], column| f64::from(values[row * width + column]);
                    let sums: Vec<f64> = (0..width)
                        .map(|column| {
                            let added = if is_sum { at(&added, column) } else { 0.0 };
                            at(&input, column) + added
                        })
                        .collect();
                    let mean = sums.iter().sum::<f64>() / width as f64;
                    let squares = sums.iter().map(|sum| (sum - mean).powi(2)).sum::<f64>();
                    let deviation = (squares / width as f64 + 1e-5).sqrt();
                    for column in 0..width {
                        let bias = bias.get(column).map_or(0.0, |bias| f64::from(*bias));
                        let exact = (sums[column] - mean) / deviation * f64::from(weight[column]);
                        let difference = at(output.floats(), column) - exact - bias;
                        prop_assert!(difference.abs() < 1e-4, "{set}: {difference}");
                    }
                }
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_portable_set_is_always_supported() {
    assert!(InstructionSet::best().supported());
    assert!(InstructionSet::Portable.supported());
}
