//! The throughput of the engine without a server around it.
//!
//! `library MODEL DTYPE KERNELS NAME=TEXTS...` loads the folder MODEL, tokenizes each file of
//! texts, one on a line, prints `{"ready": true, "vectors": true}`, and responds to each line of its
//! input with one, so that a driver can measure it and its peers in turn (`benches/run_peers.py`):
//!
//! - `{"corpus": NAME, "seconds": S}`: measures the texts per second, in whole passes over the
//!   corpus, at least one. Tokenization is not counted.
//! - `{"corpus": NAME, "vectors": FILE}`: writes the normalized embeddings as little-endian floats
//!   in the order of the corpus.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use engine::{
    DeviceChoice, EncoderModel, LoadOptions, Model, Text, TextOutput, TextRow, TokenRow,
    Truncation, load,
};

type Failure = Box<dyn std::error::Error>;

/// Maximum number of tokens of a server's batch.
const BATCH_TOKENS: usize = 8192;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, dtype, kernels, corpora @ ..] = arguments.as_slice() else {
        return Err("usage: library MODEL DTYPE KERNELS NAME=TEXTS...".into());
    };
    let options = LoadOptions {
        device: DeviceChoice::Cpu,
        dtype: dtype.parse()?,
        kernels: kernels.parse()?,
        ..LoadOptions::default()
    };
    let Model::Encoder(mut model) = load(Path::new(folder), &options)? else {
        return Err("this is not a text model".into());
    };
    let tokenizer = model.tokenizer().clone();
    let mut texts = BTreeMap::new();
    for corpus in corpora {
        let (name, path) = corpus.split_once('=').ok_or("NAME=TEXTS")?;
        let file = std::fs::read_to_string(path)?;
        let rows = file.lines().filter(|line| !line.is_empty());
        let rows = rows.map(|line| tokenizer.encode(Text::Single(line), Truncation::Right));
        texts.insert(name.to_owned(), rows.collect::<Result<Vec<_>, _>>()?);
    }
    println!("{}", json!({"ready": true, "vectors": true}));
    for line in std::io::stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let corpus = request["corpus"].as_str().ok_or("corpus")?;
        let rows = texts.get(corpus).ok_or("no such corpus")?;
        let response = match (&request["vectors"], request["seconds"].as_f64()) {
            (Value::String(file), _) => write_vectors(&mut model, rows, file)?,
            (_, Some(seconds)) => measure(&mut model, rows, Duration::from_secs_f64(seconds))?,
            _ => json!({"error": "seconds or vectors is required"}),
        };
        println!("{response}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// The texts in batches as a server would form them.
fn batches(texts: &[TokenRow]) -> Vec<Vec<TextRow<'_>>> {
    let (mut batches, mut batch, mut tokens) = (Vec::new(), Vec::new(), 0);
    for row in texts {
        if tokens + row.ids.len() > BATCH_TOKENS {
            batches.push(std::mem::take(&mut batch));
            tokens = 0;
        }
        tokens += row.ids.len();
        batch.push(TextRow {
            tokens: row,
            output: TextOutput::Embedding,
        });
    }
    batches.push(batch);
    batches
}

fn measure(model: &mut EncoderModel, texts: &[TokenRow], time: Duration) -> Result<Value, Failure> {
    let batches = batches(texts);
    let start = Instant::now();
    let mut passes = 0;
    while passes == 0 || start.elapsed() < time {
        for batch in &batches {
            model.forward(batch, &|| true)?;
        }
        passes += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    let tokens: usize = texts.iter().map(|row| row.ids.len()).sum();
    Ok(json!({
        "texts_per_second": (passes * texts.len()) as f64 / seconds,
        "tokens_per_second": (passes * tokens) as f64 / seconds,
        "texts": passes * texts.len(),
        "seconds": seconds,
    }))
}

fn write_vectors(
    model: &mut EncoderModel,
    texts: &[TokenRow],
    file: &str,
) -> Result<Value, Failure> {
    let mut bytes = Vec::new();
    for batch in batches(texts) {
        for mut vector in model.forward(&batch, &|| true)? {
            engine::normalize(&mut vector);
            bytes.extend(vector.iter().flat_map(|number| number.to_le_bytes()));
        }
    }
    std::fs::write(file, bytes)?;
    Ok(json!({"texts": texts.len(), "width": model.card().width}))
}
