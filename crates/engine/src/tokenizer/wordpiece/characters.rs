//! BERT's normalizer and pre-tokenizer, character by character.
//!
//! Both process each character independently, except for the canonical ordering of combining marks,
//! which reorders adjacent marks. Where accents are stripped, those marks are removed in the end; a
//! text with a mark that is not removed falls back to the library.

use std::sync::OnceLock;

use tokenizers::normalizers::BertNormalizer;
use unicode_categories::UnicodeCategories;
use unicode_normalization_alignments::UnicodeNormalization;
use unicode_normalization_alignments::char::canonical_combining_class;

/// Characters per page, and the number of pages of all of Unicode.
const PAGE: usize = 256;
const PAGES: usize = (char::MAX as usize + 1) / PAGE;
/// Bytes of a normalized character: enough for the three parts of a Hangul syllable.
const BYTES_MAX: usize = 10;

/// The class of a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CharacterClass {
    /// A part of a word, or removed.
    Word,
    /// The end of a word.
    Space,
    /// A word of its own.
    Isolated,
    /// Not supported: the text falls back to the library.
    Fallback,
}

/// A normalized character.
#[derive(Debug, Clone, Copy)]
pub(super) struct Character {
    pub(super) class: CharacterClass,
    length: u8,
    bytes: [u8; BYTES_MAX],
}

impl Character {
    fn of(class: CharacterClass) -> Self {
        Self {
            class,
            length: 0,
            bytes: [0; BYTES_MAX],
        }
    }

    /// Its normalized form in UTF-8.
    #[inline]
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length.into()).unwrap_or_default()
    }
}

type Page = Box<[Character; PAGE]>;

/// The table of all characters. A page is computed when a text first has one of its characters.
pub(super) struct Characters {
    normalizer: BertNormalizer,
    /// Characters of added tokens that are matched after normalization: a text with one of these
    /// falls back to the library.
    guards: Vec<char>,
    pages: Box<[OnceLock<Page>]>,
}

impl Characters {
    pub(super) fn new(normalizer: BertNormalizer, guards: Vec<char>) -> Self {
        Self {
            normalizer,
            guards,
            pages: (0..PAGES).map(|_| OnceLock::new()).collect(),
        }
    }

    /// The normalized form and the class of a character.
    #[inline]
    pub(super) fn get(&self, character: char) -> Character {
        let code = character as usize;
        match self.pages.get(code / PAGE) {
            Some(page) => page.get_or_init(|| self.page(code / PAGE))[code % PAGE],
            None => Character::of(CharacterClass::Fallback),
        }
    }

    fn page(&self, number: usize) -> Page {
        Box::new(std::array::from_fn(|index| {
            let code = u32::try_from(number * PAGE + index).ok();
            let character = code.and_then(char::from_u32);
            character.map_or(Character::of(CharacterClass::Fallback), |it| {
                self.compute(it)
            })
        }))
    }

    fn compute(&self, original: char) -> Character {
        let Some(cleaned) = self.cleaned(original) else {
            return Character::of(CharacterClass::Word);
        };
        let Some(text) = self.folded(cleaned) else {
            return Character::of(CharacterClass::Fallback);
        };
        let mut classes = text.chars().map(class);
        let class = match (classes.next(), classes.next()) {
            (None, _) => CharacterClass::Word,
            (Some(only), None) => only,
            (Some(CharacterClass::Word), Some(CharacterClass::Word))
                if classes.all(|class| class == CharacterClass::Word) =>
            {
                CharacterClass::Word
            }
            _ => return Character::of(CharacterClass::Fallback),
        };
        // The spaces around an ideograph remain where the ideograph itself is removed.
        let ideograph = self.normalizer.handle_chinese_chars && is_chinese(cleaned);
        let class = match class {
            CharacterClass::Word if ideograph && text.is_empty() => CharacterClass::Space,
            CharacterClass::Word if ideograph => CharacterClass::Isolated,
            other => other,
        };
        let mut character = Character::of(class);
        let Some(room) = character.bytes.get_mut(..text.len()) else {
            return Character::of(CharacterClass::Fallback);
        };
        room.copy_from_slice(text.as_bytes());
        // At most `BYTES_MAX`.
        character.length = text.len() as u8;
        character
    }

    /// The first step: control characters are removed, and every white space is a space.
    fn cleaned(&self, original: char) -> Option<char> {
        if !self.normalizer.clean_text || matches!(original, '\t' | '\n' | '\r') {
            return Some(original);
        }
        if matches!(original, '\0' | '\u{fffd}') || original.is_other() {
            return None;
        }
        Some(if original.is_whitespace() {
            ' '
        } else {
            original
        })
    }

    /// The last steps: accents are stripped and letters lowercased. None where the character is not
    /// supported.
    fn folded(&self, cleaned: char) -> Option<String> {
        let BertNormalizer {
            strip_accents,
            lowercase,
            ..
        } = self.normalizer;
        let mut text = String::new();
        if strip_accents.unwrap_or(lowercase) {
            let parts = std::iter::once(cleaned).nfd().map(|(part, _)| part);
            text.extend(parts.filter(|part| !part.is_mark_nonspacing()));
            if text
                .chars()
                .any(|part| canonical_combining_class(part) != 0)
            {
                return None;
            }
        } else {
            text.push(cleaned);
        }
        if lowercase {
            text = text.chars().flat_map(char::to_lowercase).collect();
        }
        let guarded = text.chars().any(|part| self.guards.contains(&part));
        (!guarded).then_some(text)
    }
}

/// The pre-tokenizer's class of a normalized character.
fn class(character: char) -> CharacterClass {
    if character.is_whitespace() {
        CharacterClass::Space
    } else if character.is_ascii_punctuation() || character.is_punctuation() {
        CharacterClass::Isolated
    } else {
        CharacterClass::Word
    }
}

/// Whether a character is in the blocks of CJK ideographs that BERT isolates, as in the library.
fn is_chinese(character: char) -> bool {
    matches!(
        u32::from(character),
        0x3400..=0x4dbf
            | 0x4e00..=0x9fff
            | 0xf900..=0xfaff
            | 0x20000..=0x2a6df
            | 0x2a700..=0x2b73f
            | 0x2b740..=0x2b81f
            | 0x2b920..=0x2ceaf
            | 0x2f800..=0x2fa1f
    )
}
