//! How much of a caller's words an error repeats. A name, a key or a value of a
//! request may have megabytes, and an error goes into headers, into logs of the
//! caller, and to every other process on its way.

use std::borrow::Cow;

/// The most characters of one word of a caller's that an error repeats.
pub const WORD_CHARACTERS_MAX: usize = 128;
/// The most bytes of an error's description: the words of a caller and those
/// around them, such as the names that the model has.
pub const DESCRIPTION_BYTES_MAX: usize = 1024;
/// The most bytes of a message that comes in the status of another process.
pub const MESSAGE_BYTES_MAX: usize = 4096;

/// Stands in place of the rest of what is cut.
const ELLIPSIS: char = '…';

/// A word of a caller's: at most [`WORD_CHARACTERS_MAX`] characters of it, and
/// `…` in place of the rest.
///
/// ```
/// assert_eq!(protocol::words::cut("pixels"), "pixels");
/// let long = "x".repeat(8 << 20);
/// assert_eq!(protocol::words::cut(&long).chars().count(), 129);
/// ```
pub fn cut(text: &str) -> Cow<'_, str> {
    // A character has a byte at least.
    if text.len() <= WORD_CHARACTERS_MAX {
        return Cow::Borrowed(text);
    }
    let end = text.char_indices().nth(WORD_CHARACTERS_MAX);
    end.map_or(Cow::Borrowed(text), |(end, _)| {
        Cow::Owned(shortened(text, end))
    })
}

/// A text of at most `bytes_max` bytes, and `…` in place of the rest.
pub fn cut_bytes(mut text: String, bytes_max: usize) -> String {
    if text.len() > bytes_max {
        let end = text.floor_char_boundary(bytes_max);
        text.truncate(end);
        text.push(ELLIPSIS);
        // The rest of a long text would stay allocated as long as the error.
        text.shrink_to_fit();
    }
    text
}

fn shortened(text: &str, end: usize) -> String {
    let mut short = text.get(..end).unwrap_or_default().to_owned();
    short.push(ELLIPSIS);
    short
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_word_keeps_its_first_characters() {
        for short in ["", "a", &"é".repeat(WORD_CHARACTERS_MAX)] {
            assert!(matches!(cut(short), Cow::Borrowed(same) if same == short));
        }
        let long = "é".repeat(WORD_CHARACTERS_MAX + 1);
        let expected = format!("{}…", "é".repeat(WORD_CHARACTERS_MAX));
        assert_eq!(cut(&long), expected);
        assert_eq!(cut(&cut(&long)).chars().count(), WORD_CHARACTERS_MAX + 1);
    }

    proptest! {
        #[test]
        fn no_text_is_longer_than_its_bound(text in "\\PC{0,200}", bytes_max in 0_usize..300) {
            prop_assert!(cut(&text).chars().count() <= WORD_CHARACTERS_MAX + 1);
            let bounded = cut_bytes(text.clone(), bytes_max);
            prop_assert!(bounded.len() <= bytes_max + ELLIPSIS.len_utf8());
            prop_assert!(text.starts_with(bounded.trim_end_matches(ELLIPSIS)));
        }
    }
}
