//! What the engine computes in a second, without a server around it.
//!
//! `library MODEL DTYPE KERNELS NAME=TEXTS...` loads the folder MODEL, tokenizes each file of
//! texts, one on a line, and answers lines `{"corpus": NAME, "seconds": S}` on its input with
//! `{"texts_per_second": R, "tokens_per_second": T}`, so that a driver can ask it and its peers
//! in turn. Tokenizing is not counted.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use engine::{DeviceChoice, LoadOptions, Model, Text, TextRow, TokenRow, Truncation, Wanted, load};

type Failure = Box<dyn std::error::Error>;

/// Tokens that a server's batch has at most.
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
    let mut model = load(Path::new(folder), &options)?;
    let tokenizer = model.tokenizer.clone().ok_or("this is no text model")?;
    let mut texts = BTreeMap::new();
    for corpus in corpora {
        let (name, path) = corpus.split_once('=').ok_or("NAME=TEXTS")?;
        let file = std::fs::read_to_string(path)?;
        let rows = file.lines().filter(|line| !line.is_empty());
        let rows = rows.map(|line| tokenizer.encode(Text::One(line), Truncation::Right));
        texts.insert(name.to_owned(), rows.collect::<Result<Vec<_>, _>>()?);
    }
    for line in std::io::stdin().lock().lines() {
        let request: serde_json::Value = serde_json::from_str(&line?)?;
        let corpus = request["corpus"].as_str().ok_or("corpus")?;
        let seconds = request["seconds"].as_f64().ok_or("seconds")?;
        let rows = texts.get(corpus).ok_or("no such corpus")?;
        let answer = measure(&mut model, rows, Duration::from_secs_f64(seconds))?;
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// Goes through the texts in batches again and again.
fn measure(
    model: &mut Model,
    texts: &[TokenRow],
    time: Duration,
) -> Result<serde_json::Value, Failure> {
    let mut batches: Vec<Vec<TextRow<'_>>> = vec![Vec::new()];
    let mut tokens = 0;
    for row in texts {
        if tokens + row.ids.len() > BATCH_TOKENS {
            batches.push(Vec::new());
            tokens = 0;
        }
        tokens += row.ids.len();
        batches.last_mut().ok_or("no batch")?.push(TextRow {
            tokens: row,
            wanted: Wanted::Pooled,
        });
    }
    let start = Instant::now();
    let (mut rows, mut tokens) = (0, 0);
    while start.elapsed() < time {
        for batch in &batches {
            model.network.forward_text(batch, &|| true)?;
            rows += batch.len();
            tokens += batch.iter().map(|row| row.tokens.ids.len()).sum::<usize>();
            if start.elapsed() >= time {
                break;
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(serde_json::json!({
        "texts_per_second": rows as f64 / seconds,
        "tokens_per_second": tokens as f64 / seconds,
    }))
}
