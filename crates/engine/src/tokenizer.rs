//! Texts to token ids and back. Shared by any number of threads.

mod template;
mod wordpiece;

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::utils::truncation::{
    TruncationDirection, TruncationParams, TruncationStrategy, truncate_encodings,
};
use tokenizers::{PostProcessor, Tokenizer as Inner};

use crate::error::EngineError;
use template::{Template, cut, shares};
use wordpiece::WordPiece;

/// Probes of a new tokenizer: one that cannot take these is broken, whatever it is asked later.
const PROBES: [&str; 3] = ["", "a", "one two, three"];

/// The tokenizer of one model.
pub struct Tokenizer {
    inner: Inner,
    /// A shorter way for most texts, where the tokenizer is of BERT's kind.
    short: Option<(WordPiece, Template)>,
    /// Ids below this have an embedding.
    vocabulary: usize,
    tokens_max: usize,
}

/// One row of token ids: special tokens included, never padded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    /// Places in the vocabulary.
    pub ids: Vec<u32>,
    /// 0 for the first text and, where the model tells them apart, 1 for the second.
    pub type_ids: Vec<u32>,
}

/// What makes one row.
#[derive(Debug, Clone, Copy)]
pub enum Text<'a> {
    /// One text.
    One(&'a str),
    /// Two texts that the model sees side by side, for example a query and a passage.
    Pair(&'a str, &'a str),
}

/// What happens to a text of too many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Truncation {
    /// It is refused.
    #[default]
    Refuse,
    /// Its end is cut off; of a pair, the longer text's.
    Right,
    /// Its beginning is cut off.
    Left,
}

/// One token and where it stands in its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Its place in the vocabulary.
    pub id: u32,
    /// The part of the text that it stands for; a special token's own name.
    pub text: String,
    /// Whether it is a special token.
    pub special: bool,
    /// Its first character's place, counted in characters; none for a special token.
    pub start: Option<usize>,
    /// The place after its last character.
    pub stop: Option<usize>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. Padding and truncation that stand in it are not the model's
    /// and are dropped. The error is the reason, in words.
    pub(crate) fn from_bytes(
        bytes: &[u8],
        vocabulary: usize,
        tokens_max: usize,
    ) -> Result<Self, String> {
        let mut inner = guarded(|| Inner::from_bytes(bytes).map_err(|error| error.to_string()))?;
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| error.to_string())?;
        let largest = inner.get_vocab(true).into_values().max().unwrap_or(0);
        if largest as usize >= vocabulary {
            return Err(format!(
                "it has token id {largest}, but the model's vocabulary ends at {vocabulary}"
            ));
        }
        let mut tokenizer = Self {
            inner,
            short: None,
            vocabulary,
            tokens_max,
        };
        for probe in PROBES {
            for text in [Text::One(probe), Text::Pair(probe, probe)] {
                let row = tokenizer.encode(text, Truncation::Right);
                row.map_err(|error| format!("it cannot take a simple text: {error}"))?;
            }
        }
        let words = WordPiece::new(&tokenizer.inner);
        tokenizer.short = words.zip(Template::learn(&tokenizer.inner));
        Ok(tokenizer)
    }

    /// The row of a text or of a pair, at most the model's token limit long.
    ///
    /// # Errors
    /// [`EngineError::TooManyTokens`] for a longer one under [`Truncation::Refuse`].
    pub fn encode(&self, text: Text<'_>, truncation: Truncation) -> Result<TokenRow, EngineError> {
        let row = match self.encode_short(text, truncation) {
            Some(row) => row?,
            None => self.encode_whole(text, truncation)?,
        };
        self.known(&row.ids)?;
        Ok(row)
    }

    /// The row by the short way. None where only the library may answer.
    fn encode_short(
        &self,
        text: Text<'_>,
        truncation: Truncation,
    ) -> Option<Result<TokenRow, EngineError>> {
        let (words, template) = self.short.as_ref()?;
        let plain = |text: &str| {
            // English has about five bytes per token.
            let mut ids = Vec::with_capacity(text.len() / 4 + 1);
            words.encode(text, &mut ids).then_some(ids)
        };
        let (mut first, mut second) = match text {
            Text::One(text) => (plain(text)?, None),
            Text::Pair(first, second) => (plain(first)?, Some(plain(second)?)),
        };
        let own = first.len() + second.as_ref().map_or(0, Vec::len);
        let added = template.added(second.is_some());
        if own + added > self.tokens_max {
            let params = match self.truncation(truncation, own + added, added) {
                Ok(params) => params,
                Err(error) => return Some(Err(error)),
            };
            let others = second.as_ref().map_or(0, Vec::len);
            let (kept, others) = shares(first.len(), others, params.max_length);
            cut(&mut first, kept, params.direction);
            if let Some(second) = &mut second {
                cut(second, others, params.direction);
            }
        }
        Some(Ok(template.row(&first, second.as_deref())))
    }

    /// The row by the library.
    fn encode_whole(
        &self,
        text: Text<'_>,
        truncation: Truncation,
    ) -> Result<TokenRow, EngineError> {
        let (first, second) = match text {
            Text::One(text) => (text, None),
            Text::Pair(first, second) => (first, Some(second)),
        };
        let plain = |text: &str| {
            self.inner
                .encode_fast(text, false)
                .map_err(|error| error.to_string())
        };
        let encoding = guarded(|| {
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
            let params = self.truncation(truncation, own + added, added)?;
            truncate_encodings(first, second, &params)
                .map_err(|error| EngineError::InvalidInput(error.to_string()))?
        };
        let row = guarded(|| {
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

    /// How a text of `tokens` tokens is cut so that the `added` special ones still fit.
    fn truncation(
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

    /// The tokens of a text of any length, with the places that they stand for.
    ///
    /// # Errors
    /// [`EngineError::InvalidInput`] when the tokenizer cannot take the text.
    pub fn tokens(&self, text: &str, add_special_tokens: bool) -> Result<Vec<Token>, EngineError> {
        let encoding = guarded(|| {
            self.inner
                .encode_char_offsets(text, add_special_tokens)
                .map_err(|error| error.to_string())
        });
        let encoding = encoding.map_err(EngineError::InvalidInput)?;
        // Byte places of the characters, so that a slice costs no walk from the beginning.
        let mut places: Vec<usize> = text.char_indices().map(|(place, _)| place).collect();
        places.push(text.len());
        let part = |start: usize, stop: usize| text.get(*places.get(start)?..*places.get(stop)?);
        let tokens = encoding.get_ids().iter().zip(encoding.get_tokens());
        let places = encoding.get_offsets().iter();
        let marks = encoding.get_special_tokens_mask().iter();
        let tokens = tokens.zip(places).zip(marks);
        Ok(tokens
            .map(|(((id, name), (start, stop)), mark)| {
                let special = *mark == 1;
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

    /// The text of token ids.
    ///
    /// # Errors
    /// [`EngineError::UnknownTokenId`] for an id that the vocabulary does not have.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, EngineError> {
        for id in ids {
            if self.inner.id_to_token(*id).is_none() {
                return Err(EngineError::UnknownTokenId { id: *id });
            }
        }
        let text = guarded(|| {
            self.inner
                .decode(ids, skip_special_tokens)
                .map_err(|error| error.to_string())
        });
        text.map_err(EngineError::InvalidInput)
    }

    fn known(&self, ids: &[u32]) -> Result<(), EngineError> {
        match ids.iter().find(|id| **id as usize >= self.vocabulary) {
            Some(id) => Err(EngineError::UnknownTokenId { id: *id }),
            None => Ok(()),
        }
    }
}

/// Turns a panic of the library into an error: a `tokenizer.json` is a program of rules, and not
/// every combination that it can spell was foreseen there.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err("the tokenizer's rules contradict each other".to_owned()))
}
