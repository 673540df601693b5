//! Every kernel, in every instruction set that this processor has, against 64-bit arithmetic.

use half::bf16;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;

fn sets() -> Vec<Instructions> {
    #[cfg(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu"))]
    products::amx::emulated::where_missing();
    let sets = Instructions::ALL.into_iter();
    let sets: Vec<_> = sets.filter(|set| set.supported()).collect();
    assert!(sets.contains(&Instructions::Portable));
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

/// What a product is to give, from numbers rounded as the precision rounds them.
fn exact_product(
    precision: Precision,
    (input, weights): (&[f32], &[f32]),
    (bias, function): (&[f32], Activation),
    inputs: usize,
) -> Vec<f64> {
    let float = |row: &[f32]| -> Vec<f64> { row.iter().map(|value| f64::from(*value)).collect() };
    let narrow = |row: &[f32]| -> Vec<f64> {
        row.iter()
            .map(|value| bf16::from_f32(*value).to_f64())
            .collect()
    };
    // Weights are rounded on both sides of zero alike, inputs from their least to their largest.
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
        let rows = numbers.chunks(inputs);
        match precision {
            Precision::F32 => rows.map(float).collect(),
            Precision::Bf16 => rows.map(narrow).collect(),
            Precision::Int8 => rows.map(int8).collect(),
        }
    };
    let (rows, outputs) = (rounded(input, &byte), rounded(weights, &weight));
    let mut results = Vec::new();
    for row in &rows {
        for (output, bias) in outputs.iter().zip(bias) {
            let sum: f64 = row.iter().zip(output).map(|(a, b)| a * b).sum();
            results.push(activation(sum + f64::from(*bias), function));
        }
    }
    results
}

/// Leaves numbers that are none in the memory that the next matrices get, on this thread.
fn spoil_memory() {
    let none = vec![f32::from_bits(u32::MAX); 1 << 18];
    let sizes = (4..=18).map(|power| Matrix::from_floats(&none[..1 << power], 1 << power));
    drop(sizes.collect::<Vec<_>>());
}

fn check_product(
    (rows, inputs, outputs): (usize, usize, usize),
    seed: u64,
    set: Instructions,
    precision: Precision,
) {
    let input = numbers(rows * inputs, seed);
    let weights = numbers(outputs * inputs, seed + 1);
    let bias = numbers(outputs, seed + 2);
    let function = ACTIVATIONS[seed as usize % ACTIVATIONS.len()];
    let exact = exact_product(precision, (&input, &weights), (&bias, function), inputs);
    let packed = Packed::new(set, precision, &weights, Some(&bias), inputs);
    let matrix = Matrix::from_floats(&input, inputs);
    spoil_memory();
    let result = multiply(&packed, &matrix, function, Format::F32);
    // Sums of `inputs` products of numbers below 3; an 8-bit input may fall on the other side of
    // a half, which costs one step of its scale times a weight.
    let tolerance = match precision {
        Precision::F32 => 1e-5 * (inputs as f64).sqrt() + 2e-6,
        Precision::Bf16 => 2e-5 * (inputs as f64).sqrt() + 2e-5,
        Precision::Int8 => 0.08,
    };
    for (place, (value, exact)) in result.floats().iter().zip(&exact).enumerate() {
        let difference = (f64::from(*value) - exact).abs();
        assert!(
            difference <= tolerance * (1.0 + exact.abs()),
            "{set} {precision:?} {rows}x{inputs}x{outputs} {function:?} at {place}: \
             {value} is not {exact}"
        );
    }
    let narrow = multiply(&packed, &matrix, function, Format::Bf16);
    assert_eq!((narrow.rows(), narrow.width()), (rows, outputs));
    let again = Packed::new(set, Precision::Bf16, &identity(outputs), None, outputs);
    let wide = multiply(&again, &narrow, Activation::Identity, Format::F32);
    for (wide, value) in wide.floats().iter().zip(result.floats()) {
        // Half a step of bfloat16, and what the function may be off where it is to be rounded.
        let due = value.abs() / 256.0 + 4e-5;
        assert!(
            (wide - value).abs() <= due,
            "{set} {precision:?}: {wide} is not near {value}"
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
fn products_of_any_shape() {
    let shape = (1usize..40, 1usize..200, 1usize..150, any::<u32>());
    let mut runner = TestRunner::new(Config::with_cases(60));
    runner
        .run(&shape, |(rows, inputs, outputs, seed)| {
            for set in sets() {
                for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
                    check_product((rows, inputs, outputs), seed.into(), set, precision);
                }
            }
            Ok(())
        })
        .unwrap();
    for set in sets() {
        for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
            check_product((512, 384, 130), 1, set, precision);
            check_product((75, 100, 200), 3, set, precision);
            check_product((1, 1, 1), 2, set, precision);
        }
    }
}

/// What attention is to give.
fn exact_attention(
    joined: &[f32],
    (heads, width): (usize, usize),
    spans: &[(usize, usize)],
    window: Option<usize>,
) -> Vec<f64> {
    let hidden = heads * width;
    let at = |token: usize, part: usize, column: usize| {
        f64::from(joined[token * 3 * hidden + part * hidden + column])
    };
    let mut output = vec![0.0; joined.len() / 3];
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

fn check_attention(lengths: &[usize], (heads, width): (usize, usize), window: Option<usize>) {
    let mut start = 0;
    let spans: Vec<(usize, usize)> = lengths
        .iter()
        .map(|length| {
            start += length;
            (start - length, *length)
        })
        .collect();
    let joined = numbers(start * 3 * heads * width, lengths.len() as u64 + 7);
    let exact = exact_attention(&joined, (heads, width), &spans, window);
    let joined = Matrix::from_floats(&joined, 3 * heads * width);
    for set in sets() {
        for (format, tolerance) in [(Format::F32, 2e-6), (Format::Bf16, 2e-2)] {
            let attention = Attention {
                joined: &joined,
                heads,
                spans: &spans,
                window,
                format,
            };
            let output = attend(set, &attention);
            let widen = Packed::new(
                set,
                Precision::Bf16,
                &identity(heads * width),
                None,
                heads * width,
            );
            let output = match format {
                Format::F32 => output,
                Format::Bf16 => multiply(&widen, &output, Activation::Identity, Format::F32),
            };
            for (place, (value, exact)) in output.floats().iter().zip(&exact).enumerate() {
                assert!(
                    (f64::from(*value) - exact).abs() < tolerance,
                    "{set} {format:?} {lengths:?} {heads}x{width} {window:?} at {place}: \
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
            check_attention(&rows, (heads, width), window);
            Ok(())
        })
        .unwrap();
    check_attention(&[512, 1], (2, 32), None);
    check_attention(&[300], (1, 64), Some(64));
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
            let parameters = NormParameters {
                weight: &weight,
                bias: &bias,
                epsilon: 1e-5,
            };
            let matrices = [&input, &added].map(|values| Matrix::from_floats(values, width));
            for set in sets() {
                let output = norm(
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
fn a_plainer_set_is_always_there() {
    assert!(Instructions::best().supported());
    assert!(Instructions::Portable.supported());
}
