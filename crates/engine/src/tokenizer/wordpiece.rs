//! The token ids of a text for models of BERT's kind, as the tokenizers library finds them, at a
//! fraction of its cost: no copies of the text, no places, no names of tokens.
//!
//! WordPiece (Wu and others 2016) cuts a word into the longest pieces that the vocabulary has,
//! from left to right. What is a word is BERT's (Devlin and others 2019): without control
//! characters, accents and capitals where the model wants that, ended by spaces, with every
//! punctuation mark and every ideograph by itself.

mod characters;
#[cfg(test)]
mod tests;
mod trie;

use tokenizers::models::ModelWrapper;
use tokenizers::{
    AddedToken, NormalizedString, Normalizer, NormalizerWrapper, PreTokenizerWrapper, Tokenizer,
};

use characters::{Characters, Kind};
use trie::{ROOT, Trie};

/// A tokenizer whose every part is BERT's.
pub(crate) struct WordPiece {
    /// What the bytes of an ASCII text are.
    steps: [Step; 256],
    characters: Characters,
    pieces: Trie,
    /// Where the pieces begin that continue a word: behind `##`.
    continued: u32,
    /// The id of a word that has no pieces.
    unknown: u32,
    /// A longer word, in characters, has no pieces.
    word_max: usize,
    added: Vec<Added>,
}

/// What a byte is, and what it becomes if it is a character.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// This byte in a word.
    Word(u8),
    Space,
    /// A word of this byte.
    Alone(u8),
    /// To be looked up: a removed character, or a part of one that is not ASCII.
    Look,
}

/// Tokens that are looked for in texts before normalization and begin with the same byte.
struct Added {
    first: u8,
    contents: Vec<String>,
}

impl WordPiece {
    /// None where the tokenizer has a part that this does not reproduce.
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
                guards.push(guard(token, normalizer)?);
            } else {
                note(&mut added, &token.content)?;
            }
        }
        let characters = Characters::new(*normalizer, guards);
        Some(Self {
            steps: std::array::from_fn(|byte| step(&characters, byte)),
            characters,
            continued: pieces.place(model.continuing_subword_prefix.as_bytes()),
            pieces,
            unknown: *vocabulary.get(&model.unk_token)?,
            word_max: model.max_input_chars_per_word,
            added,
        })
    }

    /// Appends the ids of a text, without special tokens, to `ids`. False, and `ids` as they were,
    /// where only the library may answer: for example where the text names a special token.
    pub(crate) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> bool {
        if self.added.iter().any(|added| added.may_stand_in(text)) {
            return false;
        }
        let before = ids.len();
        let done = self.words(text, ids).is_some();
        if !done {
            ids.truncate(before);
        }
        done
    }

    /// The ids of all words, or none where only the library may answer.
    fn words(&self, text: &str, ids: &mut Vec<u32>) -> Option<()> {
        let mut place = 0;
        let mut gathered = Vec::new();
        while let Some(rest) = text.as_bytes().get(place..) {
            let plain = rest
                .iter()
                .position(|byte| !matches!(self.step(*byte), Step::Word(_)));
            let word = rest.get(..plain.unwrap_or(rest.len()))?;
            let next = rest.get(word.len()).map(|byte| self.step(*byte));
            if next == Some(Step::Look) {
                gathered.clear();
                gathered.extend(word.iter().map(|byte| self.folded(*byte)));
                let from = place + word.len();
                place = from + self.gathered(text.get(from..)?, &mut gathered, ids)?;
                continue;
            }
            self.word(word, |byte| self.folded(byte), ids);
            match next {
                Some(Step::Alone(byte)) => self.word(&[byte], |byte| byte, ids),
                Some(_) => {}
                None => break,
            }
            place += word.len() + 1;
        }
        Some(())
    }

    /// Goes on with a word of which `word` is known, through characters of any kind, up to the
    /// word's end. Returns how many bytes of the text that took.
    fn gathered(&self, text: &str, word: &mut Vec<u8>, ids: &mut Vec<u32>) -> Option<usize> {
        let mut places = text.char_indices();
        while let Some((_, original)) = places.next() {
            let character = self.characters.get(original);
            match character.kind {
                Kind::Word => {
                    word.extend_from_slice(character.bytes());
                    continue;
                }
                Kind::Space => self.word(word, |byte| byte, ids),
                Kind::Alone => {
                    self.word(word, |byte| byte, ids);
                    self.word(character.bytes(), |byte| byte, ids);
                }
                Kind::Library => return None,
            }
            return Some(places.offset());
        }
        self.word(word, |byte| byte, ids);
        Some(text.len())
    }

    /// The ids of a word, whose bytes `folded` completes.
    #[inline]
    fn word(&self, word: &[u8], folded: impl Fn(u8) -> u8, ids: &mut Vec<u32>) {
        // A character has at least one byte, so that most words need no count.
        if word.len() > self.word_max && characters_of(word) > self.word_max {
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
    fn step(&self, byte: u8) -> Step {
        self.steps[usize::from(byte)]
    }

    /// A byte of a word in its normalized form.
    #[inline]
    fn folded(&self, byte: u8) -> u8 {
        match self.step(byte) {
            Step::Word(folded) => folded,
            _ => byte,
        }
    }
}

impl Added {
    /// Whether one of the tokens is in a text. Whether the library takes it as a token there
    /// depends on more.
    fn may_stand_in(&self, text: &str) -> bool {
        text.as_bytes().contains(&self.first)
            && self.contents.iter().any(|content| text.contains(content))
    }
}

/// Adds a token to those that begin with the same byte. None if it is empty.
fn note(added: &mut Vec<Added>, content: &str) -> Option<()> {
    let first = *content.as_bytes().first()?;
    match added.iter_mut().find(|added| added.first == first) {
        Some(same) => same.contents.push(content.to_owned()),
        None => added.push(Added {
            first,
            contents: vec![content.to_owned()],
        }),
    }
    Some(())
}

/// A character without which a token is not in a normalized text. None if all would do.
fn guard(token: &AddedToken, normalizer: &impl Normalizer) -> Option<char> {
    let mut content = NormalizedString::from(token.content.as_str());
    normalizer.normalize(&mut content).ok()?;
    let seen = || content.get().chars().filter(|it| !it.is_whitespace());
    // Letters and digits are in more texts than marks like `<` are.
    seen().find(|it| !it.is_alphanumeric()).or(seen().next())
}

fn step(characters: &Characters, byte: usize) -> Step {
    let Some(byte) = u8::try_from(byte).ok().filter(u8::is_ascii) else {
        return Step::Look;
    };
    let character = characters.get(char::from(byte));
    match (character.kind, character.bytes()) {
        (Kind::Word, [byte]) => Step::Word(*byte),
        (Kind::Alone, [byte]) => Step::Alone(*byte),
        (Kind::Space, _) => Step::Space,
        _ => Step::Look,
    }
}

/// How many characters valid UTF-8 has: the bytes that do not continue one.
fn characters_of(word: &[u8]) -> usize {
    word.iter().filter(|byte| **byte & 0xc0 != 0x80).count()
}
