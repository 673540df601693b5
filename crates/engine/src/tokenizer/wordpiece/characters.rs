//! What BERT's normalizer and pre-tokenizer make of a character, by itself.
//!
//! Both look at one character after the other, but for the canonical ordering of combining marks:
//! it moves marks past each other. As long as accents are stripped, those marks are gone in the
//! end; a mark that stays sends its text to the library.

use std::sync::OnceLock;

use tokenizers::normalizers::BertNormalizer;
use unicode_categories::UnicodeCategories;
use unicode_normalization_alignments::UnicodeNormalization;
use unicode_normalization_alignments::char::canonical_combining_class;

/// Characters per page, and the greatest number of pages that Unicode needs.
const PAGE: usize = 256;
const PAGES: usize = (char::MAX as usize + 1) / PAGE;
/// Enough for the three parts of a Hangul syllable.
const BYTES_MAX: usize = 10;

/// What a character becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A part of a word, or nothing.
    Word,
    /// The end of a word.
    Space,
    /// A word of its own.
    Alone,
    /// Something that only the library may answer.
    Library,
}

/// A character after normalization.
#[derive(Debug, Clone, Copy)]
pub(super) struct Character {
    pub(super) kind: Kind,
    length: u8,
    bytes: [u8; BYTES_MAX],
}

impl Character {
    fn of(kind: Kind) -> Self {
        Self {
            kind,
            length: 0,
            bytes: [0; BYTES_MAX],
        }
    }

    /// Its text in UTF-8.
    #[inline]
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length.into()).unwrap_or_default()
    }
}

type Page = Box<[Character; PAGE]>;

/// All characters. A page of them is computed when a text first needs it.
pub(super) struct Characters {
    normalizer: BertNormalizer,
    /// Whoever becomes one of these is for the library.
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

    /// What becomes of a character.
    #[inline]
    pub(super) fn get(&self, character: char) -> Character {
        let code = character as usize;
        match self.pages.get(code / PAGE) {
            Some(page) => page.get_or_init(|| self.page(code / PAGE))[code % PAGE],
            None => Character::of(Kind::Library),
        }
    }

    fn page(&self, number: usize) -> Page {
        Box::new(std::array::from_fn(|place| {
            let code = u32::try_from(number * PAGE + place).ok();
            let character = code.and_then(char::from_u32);
            character.map_or(Character::of(Kind::Library), |it| self.compute(it))
        }))
    }

    fn compute(&self, original: char) -> Character {
        let Some(cleaned) = self.cleaned(original) else {
            return Character::of(Kind::Word);
        };
        let Some(text) = self.folded(cleaned) else {
            return Character::of(Kind::Library);
        };
        let mut kinds = text.chars().map(kind);
        let kind = match (kinds.next(), kinds.next()) {
            (None, _) => Kind::Word,
            (Some(only), None) => only,
            (Some(Kind::Word), Some(Kind::Word)) if kinds.all(|kind| kind == Kind::Word) => {
                Kind::Word
            }
            _ => return Character::of(Kind::Library),
        };
        // An ideograph has spaces around it, and they stay where it is removed.
        let ideograph = self.normalizer.handle_chinese_chars && is_chinese(cleaned);
        let kind = match kind {
            Kind::Word if ideograph && text.is_empty() => Kind::Space,
            Kind::Word if ideograph => Kind::Alone,
            other => other,
        };
        let mut character = Character::of(kind);
        let Some(room) = character.bytes.get_mut(..text.len()) else {
            return Character::of(Kind::Library);
        };
        room.copy_from_slice(text.as_bytes());
        // At most `BYTES_MAX`.
        character.length = text.len() as u8;
        character
    }

    /// The first step: control characters go, and all spaces are one.
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

    /// The last steps: without accents, in lower case. None where only the library may answer.
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

/// What the pre-tokenizer makes of a normalized character.
fn kind(character: char) -> Kind {
    if character.is_whitespace() {
        Kind::Space
    } else if character.is_ascii_punctuation() || character.is_punctuation() {
        Kind::Alone
    } else {
        Kind::Word
    }
}

/// The blocks of CJK ideographs that BERT separates, as the library lists them.
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
