//! Tokenization: from texts to token ids and back.

mod template;
mod wordpiece;

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::utils::truncation::{
    TruncationDirection, TruncationParams, TruncationStrategy, truncate_encodings,
};
use tokenizers::{PostProcessor, Tokenizer as Inner};

use crate::error::EngineError;
use template::{Template, truncate_ids, truncated_lengths};
use wordpiece::WordPiece;

/// Texts to test a new tokenizer with: one that fails on these is refused when it is loaded.
const PROBES: [&str; 3] = ["", "a", "one two, three"];

/// The tokenizer of one model, which any number of threads may share.
pub struct Tokenizer {
    inner: Inner,
    /// The fast path for most texts, where the tokenizer is BERT's.
    fast_path: Option<(WordPiece, Template)>,
    /// Token ids must be below this: the embedding table has no others.
    vocabulary: usize,
    tokens_max: usize,
}

/// A tokenized row: special tokens included, never padded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Token types: 0 for the first text and, where the model distinguishes them, 1 for the second.
    pub type_ids: Vec<u32>,
}

/// The input of one row.
#[derive(Debug, Clone, Copy)]
pub enum Text<'a> {
    /// One text.
    Single(&'a str),
    /// Two texts that the model reads together, for example a query and a passage.
    Pair(&'a str, &'a str),
}

/// The truncation of a text with too many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Truncation {
    /// No truncation: the text is refused.
    #[default]
    Refuse,
    /// The end is truncated; of a pair, the longer text's.
    Right,
    /// The beginning is truncated.
    Left,
}

/// One token and its offsets in the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The part of the text that it covers; for a special token its name.
    pub text: String,
    /// Whether it is a special token.
    pub special: bool,
    /// The offset of its first character, in characters; none for a special token.
    pub start: Option<usize>,
    /// The offset after its last character.
    pub stop: Option<usize>,
}

impl Tokenizer {
    /// Parses a `tokenizer.json`. Its padding and truncation settings are not the model's and are
    /// dropped. The error is the reason, for a message about the file.
    pub(crate) fn from_bytes(
        bytes: &[u8],
        vocabulary: usize,
        tokens_max: usize,
    ) -> Result<Self, String> {
        let mut inner =
            catch_panic(|| Inner::from_bytes(bytes).map_err(|error| error.to_string()))?;
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| error.to_string())?;
        let largest = inner.get_vocab(true).into_values().max().unwrap_or(0);
        if largest as usize >= vocabulary {
            return Err(format!(
                "has token id {largest}, but the model's vocabulary (vocab_size) has {vocabulary} tokens"
            ));
        }
        let mut tokenizer = Self {
            inner,
            fast_path: None,
            vocabulary,
            tokens_max,
        };
        for probe in PROBES {
            for text in [Text::Single(probe), Text::Pair(probe, probe)] {
                let row = tokenizer.encode(text, Truncation::Right);
                row.map_err(|error| format!("fails on a simple text: {error}"))?;
            }
        }
        let words = WordPiece::new(&tokenizer.inner);
        tokenizer.fast_path = words.zip(Template::learn(&tokenizer.inner));
        Ok(tokenizer)
    }

    /// Tokenizes a text or a pair to one row, of at most the model's maximum number of tokens.
    ///
    /// # Errors
    /// [`EngineError::TooManyTokens`] for a longer one with [`Truncation::Refuse`];
    /// [`EngineError::InvalidInput`] for a text that the tokenizer fails on.
    pub fn encode(&self, text: Text<'_>, truncation: Truncation) -> Result<TokenRow, EngineError> {
        let row = match self.encode_fast_path(text, truncation) {
            Some(row) => row?,
            None => self.encode_with_library(text, truncation)?,
        };
        self.check_ids(&row.ids)?;
        Ok(row)
    }

    /// Tokenizes by the fast path; none for a text that requires the library.
    fn encode_fast_path(
        &self,
        text: Text<'_>,
        truncation: Truncation,
    ) -> Option<Result<TokenRow, EngineError>> {
        let (words, template) = self.fast_path.as_ref()?;
        let plain = |text: &str| {
            // English has about five bytes per token.
            let mut ids = Vec::with_capacity(text.len() / 4 + 1);
            words.encode(text, &mut ids).then_some(ids)
        };
        let (mut first, mut second) = match text {
            Text::Single(text) => (plain(text)?, None),
            Text::Pair(first, second) => (plain(first)?, Some(plain(second)?)),
        };
        let own = first.len() + second.as_ref().map_or(0, Vec::len);
        let added = template.added(second.is_some());
        if own + added > self.tokens_max {
            let params = match self.truncation_params(truncation, own + added, added) {
                Ok(params) => params,
                Err(error) => return Some(Err(error)),
            };
            let others = second.as_ref().map_or(0, Vec::len);
            let (length, others) = truncated_lengths(first.len(), others, params.max_length);
            truncate_ids(&mut first, length, params.direction);
            if let Some(second) = &mut second {
                truncate_ids(second, others, params.direction);
            }
        }
        Some(Ok(template.row(&first, second.as_deref())))
    }

    /// Tokenizes with the library.
    fn encode_with_library(
        &self,
        text: Text<'_>,
        truncation: Truncation,
    ) -> Result<TokenRow, EngineError> {
        let (first, second) = match text {
            Text::Single(text) => (text, None),
            Text::Pair(first, second) => (first, Some(second)),
        };
        let plain = |text: &str| {
            self.inner
                .encode_fast(text, false)
                .map_err(|error| error.to_string())
        };
        let encoding = catch_panic(|| {
            let first = plain(first)?;
            Ok((first, second.map(plain).transpose()?))
        });
        let (first, second) = encoding.map_err(EngineError::InvalidInput)?;
        let added = self
            .inner
            .get_post_processor()
            .map_or(0, |processor| processor.added_tokens(second.is_some()));
        let own = first.len() + second.as_ref().map_or(0, tokenizers::Encoding::len);
        let (first, second) = if own + added <= self.tokens_max {
            (first, second)
        } else {
            let params = self.truncation_params(truncation, own + added, added)?;
            truncate_encodings(first, second, &params)
                .map_err(|error| EngineError::InvalidInput(error.to_string()))?
        };
        let row = catch_panic(|| {
            self.inner
                .post_process(first, second, true)
                .map_err(|error| error.to_string())
        });
        let row = row.map_err(EngineError::InvalidInput)?;
        Ok(TokenRow {
            ids: row.get_ids().to_vec(),
            type_ids: row.get_type_ids().to_vec(),
        })
    }

    /// The truncation of a text of `tokens` tokens, so that its `added` special tokens fit.
    fn truncation_params(
        &self,
        truncation: Truncation,
        tokens: usize,
        added: usize,
    ) -> Result<TruncationParams, EngineError> {
        let tokens_max = self.tokens_max;
        let too_long = EngineError::TooManyTokens { tokens, tokens_max };
        let direction = match truncation {
            Truncation::Refuse => return Err(too_long),
            Truncation::Right => TruncationDirection::Right,
            Truncation::Left => TruncationDirection::Left,
        };
        Ok(TruncationParams {
            direction,
            max_length: tokens_max.checked_sub(added).ok_or(too_long)?,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
        })
    }

    /// The tokens of a text of any length, with their offsets.
    ///
    /// # Errors
    /// [`EngineError::InvalidInput`] for a text that the tokenizer fails on.
    pub fn tokens(&self, text: &str, add_special_tokens: bool) -> Result<Vec<Token>, EngineError> {
        let encoding = catch_panic(|| {
            self.inner
                .encode_char_offsets(text, add_special_tokens)
                .map_err(|error| error.to_string())
        });
        let encoding = encoding.map_err(EngineError::InvalidInput)?;
        // Byte offsets of the characters, so that a slice needs no scan from the beginning.
        let mut bytes: Vec<usize> = text.char_indices().map(|(byte, _)| byte).collect();
        bytes.push(text.len());
        let part = |start: usize, stop: usize| text.get(*bytes.get(start)?..*bytes.get(stop)?);
        let tokens = encoding.get_ids().iter().zip(encoding.get_tokens());
        let offsets = encoding.get_offsets().iter();
        let mask = encoding.get_special_tokens_mask().iter();
        let tokens = tokens.zip(offsets).zip(mask);
        Ok(tokens
            .map(|(((id, name), (start, stop)), mask)| {
                let special = *mask == 1;
                let text = if special { None } else { part(*start, *stop) };
                Token {
                    id: *id,
                    text: text.unwrap_or(name).to_owned(),
                    special,
                    start: (!special).then_some(*start),
                    stop: (!special).then_some(*stop),
                }
            })
            .collect())
    }

    /// Detokenizes: the text of token ids.
    ///
    /// # Errors
    /// [`EngineError::UnknownTokenId`] for an id that the vocabulary does not have.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, EngineError> {
        for id in ids {
            if self.inner.id_to_token(*id).is_none() {
                return Err(EngineError::UnknownTokenId { id: *id });
            }
        }
        let text = catch_panic(|| {
            self.inner
                .decode(ids, skip_special_tokens)
                .map_err(|error| error.to_string())
        });
        text.map_err(EngineError::InvalidInput)
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), EngineError> {
        match ids.iter().find(|id| **id as usize >= self.vocabulary) {
            Some(id) => Err(EngineError::UnknownTokenId { id: *id }),
            None => Ok(()),
        }
    }
}

/// Turns a panic of the library into an error: a `tokenizer.json` is a program of rules, and the
/// library panics on some combinations of them.
fn catch_panic<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err("the rules of the tokenizer are not valid together".to_owned()))
}
