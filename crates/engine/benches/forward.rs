//! What a batch of sentences costs, by the lengths of its rows, and which way of attending to
//! packed rows is the fastest. `cargo bench -p engine --bench forward`; needs `make models`.

use std::hint::black_box;
use std::path::Path;

use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine::layers::Batch;
use engine::layers::attention::{Heads, attend_by_group, attend_by_row};
use engine::{DeviceChoice, LoadOptions, Text, TextRow, TokenRow, Truncation, Wanted, load};

/// Lengths of rows as they come from callers: most are a sentence, few are a page.
const MIX: [usize; 16] = [
    6, 9, 11, 12, 14, 15, 17, 18, 21, 24, 28, 33, 41, 60, 120, 256,
];

fn batches() -> [(&'static str, Vec<usize>); 5] {
    [
        ("one of 16", vec![16]),
        ("32 of 16", vec![16; 32]),
        ("one of 256", vec![256]),
        ("8 of 256", vec![256; 8]),
        ("mix of 16", MIX.to_vec()),
    ]
}

/// Attention of MiniLM's size: 12 heads of 32.
fn attention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    for (name, lengths) in batches() {
        let rows: Vec<Vec<u32>> = lengths.iter().map(|length| vec![1; *length]).collect();
        let rows: Vec<(&[u32], &[u32])> = rows.iter().map(|row| (&row[..], &row[..])).collect();
        let Ok(batch) = Batch::pack(&rows, &Device::Cpu) else {
            continue;
        };
        let tokens = batch.tokens();
        let joined = Tensor::randn(0f32, 1.0, (tokens, 3 * 384), &Device::Cpu);
        let Some(heads) = joined
            .ok()
            .and_then(|joined| Heads::split(&joined, 12).ok())
        else {
            continue;
        };
        let mut lengths: Vec<u32> = lengths.iter().map(|length| *length as u32).collect();
        lengths.sort_unstable();
        group.throughput(Throughput::Elements(tokens as u64));
        let pool = |work: &(dyn Fn() + Sync)| Device::Cpu.with_context(work);
        group.bench_function(BenchmarkId::new("by row", name), |bencher| {
            bencher.iter(|| pool(&|| drop(black_box(attend_by_row(&heads, &batch, None)))));
        });
        group.bench_function(BenchmarkId::new("by group", name), |bencher| {
            bencher.iter(|| pool(&|| drop(black_box(attend_by_group(&heads, &batch, None)))));
        });
        group.bench_function(BenchmarkId::new("candle varlen", name), |bencher| {
            bencher.iter(|| pool(&|| drop(black_box(candle_varlen(&heads, &lengths)))));
        });
    }
    group.finish();
}

fn candle_varlen(heads: &Heads, lengths: &[u32]) -> candle_core::Result<Tensor> {
    let longest = lengths.iter().max().map_or(0, |length| *length as usize);
    let lengths = Tensor::new(lengths, &Device::Cpu)?;
    let scale = 1.0 / 32f32.sqrt();
    let (queries, keys, values) = (&heads.queries, &heads.keys, &heads.values);
    candle_nn::attention::flash_attn_varlen_cpu(
        queries, keys, values, None, &lengths, &lengths, longest, longest, scale, false, None, None,
    )
}

/// The whole forward pass of MiniLM, in rows of each length.
fn forward(criterion: &mut Criterion) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/minilm/1");
    let options = LoadOptions {
        device: DeviceChoice::Cpu,
        ..LoadOptions::default()
    };
    let Ok(mut model) = load(&folder, &options) else {
        return eprintln!("models/minilm/1 is missing: run `make models`");
    };
    let Some(tokenizer) = model.tokenizer.clone() else {
        return;
    };
    let mut group = criterion.benchmark_group("minilm");
    for (name, lengths) in batches() {
        let tokens: Vec<TokenRow> = lengths
            .iter()
            .filter_map(|length| {
                let text = "lantern ".repeat(length - 2);
                tokenizer.encode(Text::One(&text), Truncation::Right).ok()
            })
            .collect();
        let rows: Vec<TextRow<'_>> = tokens
            .iter()
            .map(|tokens| TextRow {
                tokens,
                wanted: Wanted::Pooled,
            })
            .collect();
        group.throughput(Throughput::Elements(rows.len() as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| black_box(model.network.forward_text(&rows, &|| true)));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(500))
        .measurement_time(std::time::Duration::from_secs(2));
    targets = attention, forward
}
criterion_main!(benches);
