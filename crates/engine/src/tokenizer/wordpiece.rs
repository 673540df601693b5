//! WordPiece tokenization for BERT-like models: the same token ids as the tokenizers library at a
//! fraction of its cost, without copies of the text, offsets and names of tokens.
//!
//! WordPiece (Wu and others 2016) splits a word into the longest pieces that the vocabulary has,
//! from left to right. Words are BERT's (Devlin and others 2019): without control characters,
//! accents and capitals where the model is configured so, separated by spaces, with every
//! punctuation mark and every ideograph isolated.

mod characters;
#[cfg(test)]
mod tests;

use tokenizers::models::ModelWrapper;
use tokenizers::{
    AddedToken, NormalizedString, Normalizer, NormalizerWrapper, PreTokenizerWrapper, Tokenizer,
};

use super::trie::{ROOT, Trie};
use characters::{CharacterClass, Characters};

/// A tokenizer whose normalizer, pre-tokenizer and model are all BERT's.
pub(crate) struct WordPiece {
    /// The class of each byte of an ASCII text.
    classes: [ByteClass; 256],
    characters: Characters,
    pieces: Trie,
    /// The trie node after `##`, from which the pieces go that continue a word.
    continued: u32,
    /// The id of a word that cannot be split into pieces.
    unknown: u32,
    /// Maximum length of a word in characters; a longer one is unknown.
    word_max: usize,
    added: Vec<AddedTokens>,
}

/// The class of a byte, with its normalized form if it is a character.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ByteClass {
    /// A part of a word, as this byte.
    Word(u8),
    Space,
    /// A word of its own, of this byte.
    Isolated(u8),
    /// The character is to be looked up: it is removed, or not ASCII.
    Lookup,
}

/// Added tokens that are matched before normalization and begin with the same byte.
struct AddedTokens {
    first: u8,
    contents: Vec<String>,
}

impl WordPiece {
    /// None where the tokenizer has a part that this implementation does not support.
    pub(crate) fn new(tokenizer: &Tokenizer) -> Option<Self> {
        let ModelWrapper::WordPiece(model) = tokenizer.get_model() else {
            return None;
        };
        let Some(NormalizerWrapper::BertNormalizer(normalizer)) = tokenizer.get_normalizer() else {
            return None;
        };
        let Some(PreTokenizerWrapper::BertPreTokenizer(_)) = tokenizer.get_pre_tokenizer() else {
            return None;
        };
        if tokenizer.get_truncation().is_some() || tokenizer.get_padding().is_some() {
            return None;
        }
        let vocabulary = tokenizer.get_vocab(false);
        let strings: Vec<(&[u8], u32)> = vocabulary
            .iter()
            .map(|(piece, id)| (piece.as_bytes(), *id))
            .collect();
        let pieces = Trie::new(&strings)?;
        let (mut added, mut guards) = (Vec::new(), Vec::new());
        for token in tokenizer.get_added_tokens_decoder().values() {
            if token.normalized {
                guards.push(guard_character(token, normalizer)?);
            } else {
                add_token(&mut added, &token.content)?;
            }
        }
        let characters = Characters::new(*normalizer, guards);
        Some(Self {
            classes: std::array::from_fn(|byte| byte_class(&characters, byte)),
            characters,
            continued: pieces.node(model.continuing_subword_prefix.as_bytes()),
            pieces,
            unknown: *vocabulary.get(&model.unk_token)?,
            word_max: model.max_input_chars_per_word,
            added,
        })
    }

    /// Appends the ids of a text, without special tokens, to `ids`. Returns false, with `ids`
    /// unchanged, for a text that requires the fallback to the library, for example one with a
    /// special token in it.
    pub(crate) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> bool {
        if self.added.iter().any(|added| added.may_be_in(text)) {
            return false;
        }
        let before = ids.len();
        let done = self.push_words(text, ids).is_some();
        if !done {
            ids.truncate(before);
        }
        done
    }

    /// Appends the ids of all words; none where the text requires the fallback to the library.
    fn push_words(&self, text: &str, ids: &mut Vec<u32>) -> Option<()> {
        let mut position = 0;
        let mut gathered = Vec::new();
        while let Some(rest) = text.as_bytes().get(position..) {
            let plain = rest
                .iter()
                .position(|byte| !matches!(self.class(*byte), ByteClass::Word(_)));
            let word = rest.get(..plain.unwrap_or(rest.len()))?;
            let next = rest.get(word.len()).map(|byte| self.class(*byte));
            if next == Some(ByteClass::Lookup) {
                gathered.clear();
                gathered.extend(word.iter().map(|byte| self.folded(*byte)));
                let from = position + word.len();
                position = from + self.push_gathered(text.get(from..)?, &mut gathered, ids)?;
                continue;
            }
            self.push_word(word, |byte| self.folded(byte), ids);
            match next {
                Some(ByteClass::Isolated(byte)) => self.push_word(&[byte], |byte| byte, ids),
                Some(_) => {}
                None => break,
            }
            position += word.len() + 1;
        }
        Some(())
    }

    /// Continues a word that begins with `word`, with characters of any class, up to its end, and
    /// appends its ids. Returns the number of bytes of the text that were read.
    fn push_gathered(&self, text: &str, word: &mut Vec<u8>, ids: &mut Vec<u32>) -> Option<usize> {
        let mut characters = text.char_indices();
        while let Some((_, original)) = characters.next() {
            let character = self.characters.get(original);
            match character.class {
                CharacterClass::Word => {
                    word.extend_from_slice(character.bytes());
                    continue;
                }
                CharacterClass::Space => self.push_word(word, |byte| byte, ids),
                CharacterClass::Isolated => {
                    self.push_word(word, |byte| byte, ids);
                    self.push_word(character.bytes(), |byte| byte, ids);
                }
                CharacterClass::Fallback => return None,
            }
            return Some(characters.offset());
        }
        self.push_word(word, |byte| byte, ids);
        Some(text.len())
    }

    /// Appends the ids of a word, whose bytes `folded` normalizes.
    #[inline]
    fn push_word(&self, word: &[u8], folded: impl Fn(u8) -> u8, ids: &mut Vec<u32>) {
        // A character has at least one byte, so that most words need not be counted.
        if word.len() > self.word_max && count_characters(word) > self.word_max {
            return ids.push(self.unknown);
        }
        let (before, mut from) = (ids.len(), ROOT);
        let mut rest = word;
        while !rest.is_empty() {
            let bytes = rest.iter().map(|byte| folded(*byte));
            let piece = self.pieces.longest(from, bytes);
            let Some((id, left)) = piece.and_then(|(id, length)| Some((id, rest.get(length..)?)))
            else {
                ids.truncate(before);
                return ids.push(self.unknown);
            };
            ids.push(id);
            rest = left;
            from = self.continued;
        }
    }

    #[inline]
    fn class(&self, byte: u8) -> ByteClass {
        self.classes[usize::from(byte)]
    }

    /// The normalized form of a byte of a word.
    #[inline]
    fn folded(&self, byte: u8) -> u8 {
        match self.class(byte) {
            ByteClass::Word(folded) => folded,
            _ => byte,
        }
    }
}

impl AddedTokens {
    /// Whether the characters of one of the tokens are in a text. Whether the library matches it as
    /// a token there depends on more.
    fn may_be_in(&self, text: &str) -> bool {
        text.as_bytes().contains(&self.first)
            && self.contents.iter().any(|content| text.contains(content))
    }
}

/// Adds a token to those that begin with the same byte; none if it is empty.
fn add_token(added: &mut Vec<AddedTokens>, content: &str) -> Option<()> {
    let first = *content.as_bytes().first()?;
    match added.iter_mut().find(|added| added.first == first) {
        Some(same) => same.contents.push(content.to_owned()),
        None => added.push(AddedTokens {
            first,
            contents: vec![content.to_owned()],
        }),
    }
    Some(())
}

/// A character that every normalized text with this token has; none if the token is empty.
fn guard_character(token: &AddedToken, normalizer: &impl Normalizer) -> Option<char> {
    let mut content = NormalizedString::from(token.content.as_str());
    normalizer.normalize(&mut content).ok()?;
    let seen = || content.get().chars().filter(|it| !it.is_whitespace());
    // Letters and digits are in more texts than marks like `<` are.
    seen().find(|it| !it.is_alphanumeric()).or(seen().next())
}

fn byte_class(characters: &Characters, byte: usize) -> ByteClass {
    let Some(byte) = u8::try_from(byte).ok().filter(u8::is_ascii) else {
        return ByteClass::Lookup;
    };
    let character = characters.get(char::from(byte));
    match (character.class, character.bytes()) {
        (CharacterClass::Word, [byte]) => ByteClass::Word(*byte),
        (CharacterClass::Isolated, [byte]) => ByteClass::Isolated(*byte),
        (CharacterClass::Space, _) => ByteClass::Space,
        _ => ByteClass::Lookup,
    }
}

/// The number of characters of valid UTF-8: of bytes that do not continue one.
fn count_characters(word: &[u8]) -> usize {
    word.iter().filter(|byte| **byte & 0xc0 != 0x80).count()
}
