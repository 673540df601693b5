//! The digest of a model version: over the bytes that were read of its files, and
//! everything else that its outputs depend on.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::digest::{Context, SHA256, SHA256_OUTPUT_LEN};
use engine::{Card, EngineError, LoadOptions, Observe};

type Hash = [u8; SHA256_OUTPUT_LEN];

/// What was read of the files of a version while it was loaded. A digest of what
/// lies on the disk later may be that of other weights.
#[derive(Debug, Clone, Default)]
pub struct Reads(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The hash of each piece, by its file, offset and length. Files may be read
    /// in any order.
    pieces: BTreeMap<(String, u64, u64), Hash>,
    /// A file of which one piece was read twice, and was another one then.
    changed: Option<String>,
}

impl Reads {
    /// Notes what is read.
    pub fn observer(&self) -> Observe {
        let state = self.0.clone();
        Arc::new(move |name, offset, bytes| {
            let place = (name.to_owned(), offset, bytes.len() as u64);
            let mut context = Context::new(&SHA256);
            context.update(bytes);
            let hash = finish(context);
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            let before = state.pieces.insert(place, hash);
            if before.is_some_and(|before| before != hash) {
                state.changed = Some(name.to_owned());
            }
        })
    }

    /// SHA-256, in hexadecimal digits, over everything that was read and how it
    /// is computed.
    ///
    /// # Errors
    /// A file that changed between two reads.
    pub fn digest(&self, options: &LoadOptions, card: &Card) -> Result<String, EngineError> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &state.changed {
            return Err(EngineError::InvalidFile {
                file: file.clone(),
                reason: "has changed while the model was loaded: load it again".to_owned(),
            });
        }
        let mut context = Context::new(&SHA256);
        let computed = format!(
            "{:?} {:?} {:?} {} {} {} {}",
            options.task,
            options.tokens_max,
            options.overrides,
            card.dtype,
            card.kernels,
            card.device,
            card.family
        );
        context.update(computed.as_bytes());
        // What is put before texts, which settings may say as well as files.
        let prompts = format!(" {:?} {:?}", card.default_prompt, card.prompts);
        context.update(prompts.as_bytes());
        // Another version of the program may compute other numbers.
        context.update(concat!(" ", env!("CARGO_PKG_VERSION"), "\0").as_bytes());
        for ((name, offset, length), hash) in &state.pieces {
            context.update(name.as_bytes());
            context.update(&[0]);
            context.update(&offset.to_le_bytes());
            context.update(&length.to_le_bytes());
            context.update(hash);
        }
        let digits = finish(context).map(|byte| format!("{byte:02x}"));
        Ok(digits.concat())
    }
}

fn finish(context: Context) -> Hash {
    let mut hash = [0; SHA256_OUTPUT_LEN];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use engine::{Model, ModelFolder};

    use super::*;

    /// A copy of the demo model `digits`, removed with the test.
    struct Digits(PathBuf);

    impl Drop for Digits {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    const FILES: [&str; 2] = ["config.json", "model.safetensors"];

    impl Digits {
        fn copy(name: &str) -> Self {
            let folder = format!("andon-digest-{}-{name}", std::process::id());
            let folder = std::env::temp_dir().join(folder);
            std::fs::create_dir_all(&folder).unwrap();
            let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/digits/1");
            for file in FILES {
                std::fs::copy(demo.join(file), folder.join(file)).unwrap();
            }
            Self(folder)
        }

        /// Loads the model, and returns its digest and what it computes. `before`
        /// is called before the bytes of each read are noted.
        fn load(&self, before: impl Fn(&str) + Send + Sync + 'static) -> (String, Vec<f32>) {
            let reads = Reads::default();
            let note = reads.observer();
            let folder = ModelFolder {
                observe: Some(Arc::new(move |name, offset, bytes| {
                    before(name);
                    note(name, offset, bytes);
                })),
                ..ModelFolder::bare(&self.0)
            };
            let options = LoadOptions::default();
            let Model::Tabular(mut model) = engine::load_from(&folder, &options).unwrap() else {
                panic!("digits is a tabular model");
            };
            let outputs = model.forward(&[1.0; 64], 1, &|| true).unwrap();
            (reads.digest(&options, model.card()).unwrap(), outputs)
        }
    }

    /// Weights of the same shapes with another value at the end, in place of the
    /// file or into it.
    fn change_weights(folder: &Path, value: f32, in_place: bool) {
        let path = folder.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 4;
        bytes[last..].copy_from_slice(&value.to_le_bytes());
        let file = if in_place {
            path.clone()
        } else {
            folder.join("new")
        };
        std::fs::write(&file, bytes).unwrap();
        std::fs::rename(file, path).unwrap();
    }

    #[test]
    fn a_file_that_changes_while_it_loads_has_the_digest_of_what_was_read() {
        let digits = Digits::copy("changes");
        let mut old = digits.load(|_| ());
        assert_eq!(digits.load(|_| ()), old);
        for in_place in [false, true] {
            let (folder, once) = (digits.0.clone(), std::sync::Once::new());
            // The change comes when the header has been read, and no tensor.
            let during = digits.load(move |name| {
                if name == "model.safetensors" {
                    let value = if in_place { 2e3 } else { 1e3 };
                    once.call_once(|| change_weights(&folder, value, in_place));
                }
            });
            let new = digits.load(|_| ());
            assert_ne!((&new.0, &new.1), (&old.0, &old.1));
            // The digest is that of the weights, old or new.
            assert_eq!(during, if in_place { new.clone() } else { old });
            old = new;
        }
    }

    #[test]
    fn every_byte_and_every_option_counts() {
        let digits = Digits::copy("counts");
        let reads = |bytes: &[u8], name: &str| {
            let reads = Reads::default();
            reads.observer()(name, 0, bytes);
            reads
        };
        let card = engine::load(&digits.0, &LoadOptions::default()).unwrap();
        let card = card.card().clone();
        let digest = |reads: &Reads, options: &LoadOptions| reads.digest(options, &card).unwrap();
        let options = LoadOptions::default();
        let others = LoadOptions {
            tokens_max: Some(7),
            ..LoadOptions::default()
        };
        let raw = LoadOptions {
            overrides: engine::Overrides {
                activation: Some(engine::ScoreActivation::Identity),
                ..Default::default()
            },
            ..LoadOptions::default()
        };
        let one = digest(&reads(b"one", "a"), &options);
        assert_ne!(one, digest(&reads(b"one", "a"), &raw));
        assert_eq!(one, digest(&reads(b"one", "a"), &options));
        assert_ne!(one, digest(&reads(b"two", "a"), &options));
        assert_ne!(one, digest(&reads(b"one", "b"), &options));
        assert_ne!(one, digest(&reads(b"one", "a"), &others));
        let with_prompt = |text: &str, default: Option<&str>| {
            let mut card = card.clone();
            card.prompts = [("query".to_owned(), text.to_owned())].into();
            card.default_prompt = default.map(str::to_owned);
            reads(b"one", "a").digest(&options, &card).unwrap()
        };
        let prompted = with_prompt("query: ", Some("query"));
        assert_ne!(prompted, one);
        assert_ne!(prompted, with_prompt("query: ", None));
        assert_ne!(prompted, with_prompt("title: ", Some("query")));
        let changed = reads(b"one", "a");
        changed.observer()("a", 0, b"two");
        let error = changed.digest(&options, &card).unwrap_err();
        assert!(error.to_string().contains("has changed"), "{error}");
    }
}
