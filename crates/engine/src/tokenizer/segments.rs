//! Parts of a text that the tokenizers library would tokenize alike alone: between added tokens,
//! and between words of a long text.
//!
//! The library looks for spaces before an added token from the beginning of the text, once for each
//! of them (version 0.23.2): a text of many needs quadratic time. In parts the time is linear, and
//! work for a caller who has left ends between two of them.

use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

use super::trie::{ROOT, Trie};

/// A part without added tokens is cut at the first boundary of words after so many bytes.
pub(super) const PART_BYTES: usize = 16 << 10;

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Segment<'t> {
    /// An added token, with the spaces that belong to it.
    Token(u32, &'t str),
    /// Text without added tokens.
    Text(&'t str),
}

impl Segment<'_> {
    /// The part of the text.
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Token(_, text) | Self::Text(text) => text,
        }
    }
}

/// The added tokens of a tokenizer whose texts may be cut.
pub(super) struct Segments {
    /// Indices of `added`, by the tokens that are matched before normalization.
    tokens: Trie,
    added: Vec<Added>,
    /// Whether a token begins with this byte.
    begins: [bool; 256],
}

struct Added {
    id: u32,
    /// Whether it takes the spaces before and after it.
    lstrip: bool,
    rstrip: bool,
}

impl Segments {
    /// None for a tokenizer whose texts may not be cut: it does more than split words at spaces and
    /// marks, or has an added token that depends on the words around it.
    pub(super) fn of_tokenizer(tokenizer: &Tokenizer) -> Option<Self> {
        let by_words = match (tokenizer.get_normalizer(), tokenizer.get_pre_tokenizer()) {
            (
                None | Some(NormalizerWrapper::BertNormalizer(_)),
                Some(PreTokenizerWrapper::BertPreTokenizer(_)),
            ) => true,
            (
                None | Some(NormalizerWrapper::NFC(_)),
                Some(PreTokenizerWrapper::ByteLevel(words)),
            ) => words.use_regex,
            _ => false,
        };
        let tokens = tokenizer.get_added_tokens_decoder();
        if !by_words || tokens.values().any(depends_on_words) {
            return None;
        }
        let raw = || tokens.iter().filter(|(_, token)| !token.normalized);
        let indices = raw().zip(0..);
        let strings: Vec<_> = indices
            .map(|((_, token), index)| (token.content.as_bytes(), index))
            .collect();
        let mut begins = [false; 256];
        for (string, _) in &strings {
            begins[usize::from(*string.first()?)] = true;
        }
        let added = raw().map(|(id, token)| Added {
            id: *id,
            lstrip: token.lstrip,
            rstrip: token.rstrip,
        });
        Some(Self {
            tokens: Trie::new(&strings)?,
            added: added.collect(),
            begins,
        })
    }

    /// The parts of a text, in order and without gaps.
    pub(super) fn of<'t>(&'t self, text: &'t str) -> impl Iterator<Item = Segment<'t>> {
        let mut position = 0;
        let mut next = self.token_from(text, 0);
        std::iter::from_fn(move || {
            if let Some(found) = next
                && found.start == position
            {
                position = found.end;
                next = self.token_from(text, position);
                let own = text.get(found.start..found.end)?;
                return Some(Segment::Token(found.id, own));
            }
            let end = next.map_or(text.len(), |found| found.start);
            let part = part(text.get(position..end)?);
            position += part.len();
            (!part.is_empty()).then_some(Segment::Text(part))
        })
    }

    /// The first added token at or after a position, the longest that begins there.
    fn token_from(&self, text: &str, position: usize) -> Option<Found> {
        let bytes = text.as_bytes();
        let begins = |byte: &u8| self.begins[usize::from(*byte)];
        let mut from = position;
        loop {
            let start = from + bytes.get(from..)?.iter().position(begins)?;
            let following = bytes.get(start..)?.iter().copied();
            let Some((index, length)) = self.tokens.longest(ROOT, following) else {
                from = start + 1;
                continue;
            };
            let added = self.added.get(index as usize)?;
            let (before, after) = (text.get(position..start)?, text.get(start + length..)?);
            let spaces_before = before.len() - before.trim_end().len();
            let spaces_after = after.len() - after.trim_start().len();
            return Some(Found {
                id: added.id,
                start: start - if added.lstrip { spaces_before } else { 0 },
                end: start + length + if added.rstrip { spaces_after } else { 0 },
            });
        }
    }
}

/// An added token in a text: its bytes, with the spaces that belong to it.
#[derive(Clone, Copy)]
struct Found {
    id: u32,
    start: usize,
    end: usize,
}

/// Whether a token may be matched otherwise when the text around it is cut off.
fn depends_on_words(token: &AddedToken) -> bool {
    let content = token.content.as_str();
    let word = |character: Option<char>| character.is_some_and(char::is_alphanumeric);
    token.single_word
        || content.starts_with(char::is_whitespace)
            && (!token.normalized || content.chars().any(|it| !it.is_whitespace()))
        || content.trim().contains(char::is_whitespace)
        || token.rstrip && word(content.chars().next_back())
}

/// The first part of a text: it ends before a space between two letters or digits, where words are
/// split whatever comes before and after.
fn part(text: &str) -> &str {
    let word = |byte: u8| byte.is_ascii_alphanumeric();
    let boundary = |bytes: &[u8]| matches!(bytes, [a, b' ', b] if word(*a) && word(*b));
    let from = text.as_bytes().get(PART_BYTES..).unwrap_or_default();
    let found = from.windows(3).position(boundary);
    let end = found.map_or(text.len(), |position| PART_BYTES + position + 1);
    text.get(..end).unwrap_or(text)
}
