//! Tokenization: from texts to token ids and back.

mod rules;
mod segments;
mod template;
#[cfg(test)]
mod tests;
mod trie;
mod wordpiece;

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::utils::truncation::TruncationDirection;
use tokenizers::{PostProcessor, Tokenizer as Inner};

use crate::error::EngineError;
pub(crate) use rules::TokenizerRules;
use segments::{PART_BYTES, Segment, Segments};
use template::{Template, around, post_processed, truncated, truncated_lengths};
use wordpiece::WordPiece;

/// Texts to test a new tokenizer with: one that fails on these is refused when it is loaded.
const PROBES: [&str; 3] = ["", "a", "one two, three"];

/// The tokenizer of one model, which any number of threads may share.
pub struct Tokenizer {
    inner: Inner,
    /// The fast path for most texts, where the tokenizer is BERT's.
    words: Option<WordPiece>,
    /// The fast path of the post-processor.
    template: Option<Template>,
    /// Where long texts may be cut.
    segments: Option<Segments>,
    /// The special tokens before and after a text.
    around: (Vec<u32>, Vec<u32>),
    /// Whether offsets leave out the spaces before a word.
    trims: bool,
    /// Token ids must be below this: the embedding table has no others.
    vocabulary: usize,
    /// Whether the tokenizer has an id.
    known: Vec<bool>,
    /// The side that the file truncates, if it truncates at all.
    file_side: Option<Side>,
    /// Whether rows have token types; else all are 0.
    token_types: bool,
    /// Whether the tokens of a prompt are pooled.
    include_prompt: bool,
    tokens_max: usize,
}

/// A tokenized row: special tokens included, never padded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Token types: 0 for the first text and, where the model distinguishes them, 1 for the second.
    pub type_ids: Vec<u32>,
    /// How many of the first tokens pooling leaves out: those of a prompt, for a model that was
    /// trained so.
    pub skipped: usize,
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

/// A side of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Side {
    /// The beginning.
    Left,
    /// The end.
    #[default]
    Right,
}

impl Side {
    /// The name in configuration files.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Right => "right",
        }
    }
}

impl From<Side> for Truncation {
    fn from(side: Side) -> Self {
        match side {
            Side::Left => Self::Left,
            Side::Right => Self::Right,
        }
    }
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
    /// dropped, but for the side that is truncated. The error is the reason, for a message about
    /// the file.
    pub(crate) fn from_bytes(
        bytes: &[u8],
        vocabulary: usize,
        rules: TokenizerRules,
    ) -> Result<Self, String> {
        let mut inner =
            catch_panic(|| Inner::from_bytes(bytes).map_err(|error| error.to_string()))?;
        catch_panic(|| rules.apply(&mut inner))?;
        let file_side = inner
            .get_truncation()
            .map(|truncation| match truncation.direction {
                TruncationDirection::Left => Side::Left,
                TruncationDirection::Right => Side::Right,
            });
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| error.to_string())?;
        let ids: Vec<u32> = inner.get_vocab(true).into_values().collect();
        let largest = ids.iter().copied().max().unwrap_or(0);
        if largest as usize >= vocabulary {
            return Err(format!(
                "has token id {largest}, but the model's vocabulary (vocab_size) has {vocabulary} tokens"
            ));
        }
        let mut known = vec![false; largest as usize + 1];
        for id in ids {
            known[id as usize] = true;
        }
        let mut tokenizer = Self {
            inner,
            words: None,
            template: None,
            segments: None,
            around: Default::default(),
            trims: false,
            vocabulary,
            known,
            file_side,
            token_types: rules.token_types,
            include_prompt: rules.include_prompt,
            tokens_max: rules.tokens_max,
        };
        for probe in PROBES {
            for text in [Text::Single(probe), Text::Pair(probe, probe)] {
                let row = tokenizer.encode(text, Truncation::Right);
                row.map_err(|error| format!("fails on a simple text: {error}"))?;
            }
        }
        let inner = &tokenizer.inner;
        let (words, template) = (WordPiece::new(inner), Template::learn(inner));
        let (segments, around) = (Segments::of_tokenizer(inner), around(inner));
        let second = tokenizer.tokens_with_library("a b", false).ok();
        tokenizer.trims = second.is_some_and(|it| it.get(1).is_some_and(|it| it.start == Some(2)));
        (tokenizer.words, tokenizer.template, tokenizer.segments) = (words, template, segments);
        tokenizer.around = around.unwrap_or_default();
        Ok(tokenizer)
    }

    /// Tokenizes a text or a pair to one row, of at most the model's maximum number of tokens.
    ///
    /// # Errors
    /// [`EngineError::TooManyTokens`] for a longer one with [`Truncation::Refuse`];
    /// [`EngineError::InvalidInput`] for a text that the tokenizer fails on.
    pub fn encode(&self, text: Text<'_>, truncation: Truncation) -> Result<TokenRow, EngineError> {
        self.encode_while(text, truncation, &|| true)
    }

    /// The same for a caller who may leave: `should_continue` is called before each part of a long
    /// text.
    ///
    /// # Errors
    /// [`EngineError::Cancelled`] once `should_continue` returns false, and those of
    /// [`Self::encode`].
    pub fn encode_while(
        &self,
        text: Text<'_>,
        truncation: Truncation,
        should_continue: &dyn Fn() -> bool,
    ) -> Result<TokenRow, EngineError> {
        match text {
            Text::Single(text) => self.row(&self.ids(text, should_continue)?, None, truncation),
            Text::Pair(first, second) => {
                let first = self.ids(first, should_continue)?;
                let second = self.ids(second, should_continue)?;
                self.row(&first, Some(&second), truncation)
            }
        }
    }

    /// Makes the row of a pair by the [`ids`](Self::ids) of each text, so that the ids of a text
    /// that is in many pairs are made once.
    ///
    /// # Errors
    /// Those of [`Self::encode`].
    pub fn encode_pair(
        &self,
        first: &[u32],
        second: &[u32],
        truncation: Truncation,
    ) -> Result<TokenRow, EngineError> {
        self.row(first, Some(second), truncation)
    }

    /// Makes the row of a text that is given by its token ids. The model's special tokens are put
    /// around them as around a text, unless the ids begin and end with them already.
    ///
    /// # Errors
    /// [`EngineError::UnknownTokenId`] for an id that the vocabulary does not have, and
    /// [`EngineError::TooManyTokens`] as of [`Self::encode`].
    pub fn encode_ids(&self, ids: &[u32], truncation: Truncation) -> Result<TokenRow, EngineError> {
        self.check_known(ids)?;
        let (before, after) = &self.around;
        let own = ids.strip_prefix(before.as_slice());
        let own = own.and_then(|ids| ids.strip_suffix(after.as_slice()));
        self.row(own.unwrap_or(ids), None, truncation)
    }

    /// The ids of a text, without special tokens around it. `should_continue` is called before each
    /// part of a long text.
    ///
    /// # Errors
    /// [`EngineError::InvalidInput`] for a text that the tokenizer fails on;
    /// [`EngineError::Cancelled`] once `should_continue` returns false.
    pub fn ids(
        &self,
        text: &str,
        should_continue: &dyn Fn() -> bool,
    ) -> Result<Vec<u32>, EngineError> {
        // English has about five bytes per token.
        let mut ids = Vec::with_capacity(text.len() / 4 + 1);
        if text.len() <= PART_BYTES && self.push_words(text, &mut ids) {
            return Ok(ids);
        }
        let Some(segments) = &self.segments else {
            self.push_with_library(text, &mut ids)?;
            return Ok(ids);
        };
        for segment in segments.of(text) {
            if !should_continue() {
                return Err(EngineError::Cancelled);
            }
            match segment {
                Segment::Token(id, _) => ids.push(id),
                Segment::Text(text) if self.push_words(text, &mut ids) => {}
                Segment::Text(text) => self.push_with_library(text, &mut ids)?,
            }
        }
        Ok(ids)
    }

    /// Appends the ids of a text by the fast path; false for one that requires the library.
    fn push_words(&self, text: &str, ids: &mut Vec<u32>) -> bool {
        let words = self.words.as_ref();
        words.is_some_and(|words| words.encode(text, ids))
    }

    /// Appends the ids of a text by the library.
    fn push_with_library(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), EngineError> {
        let encoding = catch_panic(|| {
            let encoding = self.inner.encode_fast(text, false);
            encoding.map_err(|error| error.to_string())
        });
        let encoding = encoding.map_err(EngineError::InvalidInput)?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// The side that `tokenizer.json` truncates; none where it does not say.
    pub(crate) fn file_side(&self) -> Option<Side> {
        self.file_side
    }

    /// How many tokens of a row pooling leaves out whose text begins with this prompt: its own and
    /// the special tokens before it, for a model that was trained so ([`TokenRow::skipped`]).
    ///
    /// # Errors
    /// [`EngineError::InvalidInput`] for a prompt that the tokenizer fails on.
    pub fn skipped(&self, prompt: &str) -> Result<usize, EngineError> {
        if self.include_prompt || prompt.is_empty() {
            return Ok(0);
        }
        let (before, _) = &self.around;
        Ok(before.len() + self.ids(prompt, &|| true)?.len())
    }

    /// The row of a text or a pair by the ids of each, truncated where they are too many.
    fn row(
        &self,
        mut first: &[u32],
        mut second: Option<&[u32]>,
        truncation: Truncation,
    ) -> Result<TokenRow, EngineError> {
        let added = match &self.template {
            Some(template) => template.added(second.is_some()),
            None => {
                let processor = self.inner.get_post_processor();
                processor.map_or(0, |processor| processor.added_tokens(second.is_some()))
            }
        };
        let others = second.map_or(0, <[u32]>::len);
        let tokens = first.len() + others + added;
        if tokens > self.tokens_max {
            let (length, direction) = self.truncation(truncation, tokens, added)?;
            let (length, others) = truncated_lengths(first.len(), others, length);
            first = truncated(first, length, direction);
            second = second.map(|second| truncated(second, others, direction));
        }
        let mut row = match &self.template {
            Some(template) => template.row(first, second),
            None => catch_panic(|| post_processed(&self.inner, first, second))
                .map_err(EngineError::InvalidInput)?,
        };
        if !self.token_types {
            row.type_ids.fill(0);
        }
        let is_unknown = |id: &&u32| **id as usize >= self.vocabulary;
        match row.ids.iter().find(is_unknown) {
            Some(id) => Err(EngineError::UnknownTokenId { id: *id }),
            None => Ok(row),
        }
    }

    /// The length without special tokens of a text of `tokens` tokens, so that its `added` special
    /// tokens fit, and the side that is truncated.
    fn truncation(
        &self,
        truncation: Truncation,
        tokens: usize,
        added: usize,
    ) -> Result<(usize, TruncationDirection), EngineError> {
        let tokens_max = self.tokens_max;
        let too_long = EngineError::TooManyTokens { tokens, tokens_max };
        let direction = match truncation {
            Truncation::Refuse => return Err(too_long),
            Truncation::Right => TruncationDirection::Right,
            Truncation::Left => TruncationDirection::Left,
        };
        Ok((tokens_max.checked_sub(added).ok_or(too_long)?, direction))
    }

    /// The tokens of a text of any length, with their offsets. `should_continue` is called before
    /// each part of a long text.
    ///
    /// # Errors
    /// [`EngineError::InvalidInput`] for a text that the tokenizer fails on;
    /// [`EngineError::Cancelled`] once `should_continue` returns false.
    pub fn tokens(
        &self,
        text: &str,
        add_special_tokens: bool,
        should_continue: &dyn Fn() -> bool,
    ) -> Result<Vec<Token>, EngineError> {
        let segments = self.segments.as_ref().filter(|_| text.len() > PART_BYTES);
        let Some(segments) = segments else {
            return self.tokens_with_library(text, add_special_tokens);
        };
        let (before, after) = &self.around;
        let around = |ids: &[u32]| {
            let ids = ids.iter().filter(|_| add_special_tokens);
            ids.map(|id| self.special(*id)).collect::<Vec<_>>()
        };
        let (mut tokens, mut position) = (around(before), 0);
        for segment in segments.of(text) {
            if !should_continue() {
                return Err(EngineError::Cancelled);
            }
            let characters = segment.text().chars().count();
            match segment {
                Segment::Token(id, text) => tokens.push(self.added(id, text).moved(position)),
                Segment::Text(text) => {
                    let mut own = self.tokens_with_library(text, false)?;
                    self.trim_first(&mut own, text, position > 0);
                    tokens.extend(own.into_iter().map(|token| token.moved(position)));
                }
            }
            position += characters;
        }
        tokens.extend(around(after));
        Ok(tokens)
    }

    /// The library keeps the space before the first word of a text, and trims that of others.
    fn trim_first(&self, tokens: &mut [Token], text: &str, is_later: bool) {
        let first = tokens.first_mut().filter(|token| token.start == Some(0));
        if let Some(token) = first.filter(|_| self.trims && is_later && text.starts_with(' ')) {
            token.text = token.text.trim_start().to_owned();
            token.start = Some(1);
            token.stop = token.stop.max(Some(1));
        }
    }

    /// An added token at the beginning of a text.
    fn added(&self, id: u32, text: &str) -> Token {
        let (mut start, mut stop) = (0, text.chars().count());
        let mut own = text;
        if self.trims {
            own = text.trim_start();
            start = stop - own.chars().count();
            own = own.trim_end();
            stop = start + own.chars().count();
        }
        Token {
            id,
            text: own.to_owned(),
            special: false,
            start: Some(start),
            stop: Some(stop),
        }
    }

    /// A special token that stands for no part of a text.
    fn special(&self, id: u32) -> Token {
        Token {
            id,
            text: self.inner.id_to_token(id).unwrap_or_default(),
            special: true,
            start: None,
            stop: None,
        }
    }

    /// The tokens of a text by the library.
    fn tokens_with_library(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<Vec<Token>, EngineError> {
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
        self.check_known(ids)?;
        let text = catch_panic(|| {
            self.inner
                .decode(ids, skip_special_tokens)
                .map_err(|error| error.to_string())
        });
        text.map_err(EngineError::InvalidInput)
    }

    fn check_known(&self, ids: &[u32]) -> Result<(), EngineError> {
        let is_known = |id: &u32| self.known.get(*id as usize).copied().unwrap_or(false);
        match ids.iter().find(|id| !is_known(id)) {
            Some(id) => Err(EngineError::UnknownTokenId { id: *id }),
            None => Ok(()),
        }
    }
}

impl Token {
    /// The same token of a text that follows so many characters.
    fn moved(self, characters: usize) -> Self {
        let moved = |offset: Option<usize>| offset.map(|offset| offset + characters);
        Self {
            start: moved(self.start),
            stop: moved(self.stop),
            ..self
        }
    }
}

/// Turns a panic of the library into an error: a `tokenizer.json` is a program of rules, and the
/// library panics on some combinations of them.
fn catch_panic<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err("the rules of the tokenizer are not valid together".to_owned()))
}
