//! Benchmarks of the kernels against the CPU's peak, and of the whole forward pass of MiniLM.
//!
//! `cargo bench -p engine --bench kernels`; needs `make models`. GEMM prints its rate and its share
//! of the peak that the same run measures.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine::kernels::{
    Activation, AttentionInput, InstructionSet, LayerNormParameters, Matrix, MatrixDtype,
    PackedWeights, WeightDtype, attend, layer_norm, matmul, peak,
};
use engine::{
    DeviceChoice, Dtype, LoadOptions, Model, Text, TextOutput, TextRow, TokenRow, Truncation, load,
};

const DTYPES: [WeightDtype; 3] = [WeightDtype::F32, WeightDtype::Bf16, WeightDtype::Int8];
/// Lengths of rows as in typical requests: most are a sentence, few are a page.
const MIX: [usize; 16] = [
    6, 9, 11, 12, 14, 15, 17, 18, 21, 24, 28, 33, 41, 60, 120, 256,
];

fn numbers(count: usize) -> Vec<f32> {
    (0..count)
        .map(|at| ((at * 7_919) % 1_000) as f32 / 500.0 - 1.0)
        .collect()
}

fn sets() -> Vec<InstructionSet> {
    InstructionSet::ALL
        .into_iter()
        .filter(|set| set.supported())
        .collect()
}

/// GEMM in the shapes of MiniLM's layers: rows by inputs by outputs.
fn gemm(criterion: &mut Criterion) {
    let shapes = [
        (8, 384, 1152, Activation::Identity),
        (30, 384, 1152, Activation::Identity),
        (256, 384, 1152, Activation::Identity),
        (256, 384, 1536, Activation::Gelu),
        (256, 1536, 384, Activation::Identity),
    ];
    let mut group = criterion.benchmark_group("product");
    for set in sets() {
        for dtype in DTYPES {
            let peak = peak(set, dtype);
            for (rows, inputs, outputs, activation) in shapes {
                let weights =
                    PackedWeights::new(set, dtype, &numbers(inputs * outputs), None, inputs);
                let input = Matrix::from_floats(&numbers(rows * inputs), inputs);
                let work = 2 * rows * inputs * outputs;
                let name = format!("{set} {dtype:?} {rows}x{inputs}x{outputs} {activation:?}");
                let best = (0..20)
                    .map(|_| {
                        let start = Instant::now();
                        black_box(matmul(&weights, &input, activation, MatrixDtype::F32));
                        start.elapsed().as_secs_f64()
                    })
                    .fold(f64::MAX, f64::min);
                let rate = work as f64 / best / 1e9;
                println!("{name}: {rate:.0} of {peak:.0} GFLOP/s, {:.2}", rate / peak);
                group.throughput(Throughput::Elements(work as u64));
                group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
                    bencher.iter(|| {
                        black_box(matmul(&weights, &input, activation, MatrixDtype::F32));
                    });
                });
            }
        }
    }
    group.finish();
}

/// AttentionInput and norms of MiniLM's size: 12 heads of 32.
fn rows(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("rows");
    for set in sets() {
        for (name, lengths) in [("32 of 16", vec![16; 32]), ("8 of 256", vec![256; 8])] {
            let tokens: usize = lengths.iter().sum();
            let mut start = 0;
            let spans: Vec<(usize, usize)> = lengths
                .iter()
                .map(|length| {
                    start += length;
                    (start - length, *length)
                })
                .collect();
            let qkv = Matrix::from_floats(&numbers(tokens * 1152), 1152);
            group.throughput(Throughput::Elements(tokens as u64));
            for dtype in [MatrixDtype::F32, MatrixDtype::Bf16] {
                let attention = AttentionInput {
                    qkv: &qkv,
                    heads: 12,
                    spans: &spans,
                    window: None,
                    dtype,
                };
                let name = format!("attention {set} {dtype:?} {name}");
                group.bench_function(name, |bencher| {
                    bencher.iter(|| black_box(attend(set, &attention)));
                });
            }
            let hidden = Matrix::from_floats(&numbers(tokens * 384), 384);
            let parameters = numbers(384);
            let parameters = LayerNormParameters {
                weight: &parameters,
                bias: &parameters,
                epsilon: 1e-12,
            };
            group.bench_function(format!("norm of a sum {set} {name}"), |bencher| {
                bencher.iter(|| black_box(layer_norm(set, parameters, &hidden, Some(&hidden))));
            });
        }
    }
    group.finish();
}

/// The whole forward pass of MiniLM, in rows of each length.
fn forward(criterion: &mut Criterion) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/minilm/1");
    let batches = [
        ("one of 16", vec![16]),
        ("32 of 16", vec![16; 32]),
        ("one of 256", vec![256]),
        ("8 of 256", vec![256; 8]),
        ("mix of 16", MIX.to_vec()),
    ];
    let mut group = criterion.benchmark_group("minilm");
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8] {
        let options = LoadOptions {
            device: DeviceChoice::Cpu,
            dtype,
            ..LoadOptions::default()
        };
        let Ok(Model::Encoder(mut model)) = load(&folder, &options) else {
            return eprintln!("models/minilm/1 is missing: run `make models`");
        };
        let tokenizer = model.tokenizer().clone();
        for (name, lengths) in &batches {
            let texts = lengths.iter().map(|length| "lantern ".repeat(length - 2));
            let tokens: Vec<TokenRow> = texts
                .filter_map(|text| {
                    tokenizer
                        .encode(Text::Single(&text), Truncation::Right)
                        .ok()
                })
                .collect();
            let rows: Vec<TextRow<'_>> = tokens
                .iter()
                .map(|tokens| TextRow {
                    tokens,
                    output: TextOutput::Embedding,
                })
                .collect();
            group.throughput(Throughput::Elements(rows.len() as u64));
            group.bench_function(format!("{dtype} {name}"), |bencher| {
                bencher.iter(|| black_box(model.forward(&rows, &|| true)));
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(1));
    targets = gemm, rows, forward
}
criterion_main!(benches);
