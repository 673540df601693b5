//! Paths of the fields that errors are about.

use std::fmt;

use crate::words::{DESCRIPTION_BYTES_MAX, WORD_CHARACTERS_MAX, cut, cut_bytes};

/// The path of a field in a request, such as `inputs[0].contents[3]` or
/// `parameters[truncate]`. It travels as text and is built and read in
/// [`Segment`]s. Names and keys are a caller's words, and are cut as such.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldPath(String);

/// One step of a [`FieldPath`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment<'p> {
    /// A field of a message, a header or a metadata key.
    Name(&'p str),
    /// An element of a list, counted from zero.
    Index(usize),
    /// An entry of a map.
    Key(&'p str),
}

impl FieldPath {
    /// An input of an inference request: `inputs[index]`.
    pub fn input(index: usize) -> Self {
        Self::from("inputs").index(index)
    }

    /// A requested output of an inference request: `outputs[index]`.
    pub fn output(index: usize) -> Self {
        Self::from("outputs").index(index)
    }

    /// A parameter of a request: `parameters[name]`.
    pub fn parameter(name: &str) -> Self {
        Self::from("parameters").key(name)
    }

    /// A field of the message at this path.
    #[must_use]
    pub fn field(self, name: &str) -> Self {
        self.then(Segment::Name(name))
    }

    /// An element of the list at this path.
    #[must_use]
    pub fn index(self, index: usize) -> Self {
        self.then(Segment::Index(index))
    }

    /// An entry of the map at this path.
    #[must_use]
    pub fn key(self, key: &str) -> Self {
        self.then(Segment::Key(key))
    }

    /// This path and one more step. Steps beyond the longest path are left out.
    #[must_use]
    pub fn then(mut self, segment: Segment<'_>) -> Self {
        if self.0.len() > DESCRIPTION_BYTES_MAX {
            return self;
        }
        match segment {
            Segment::Name(name) if self.0.is_empty() => self.0.push_str(&cut(name)),
            Segment::Name(name) => self.0.extend([".", &cut(name)]),
            Segment::Index(index) => self.0.extend(["[", &index.to_string(), "]"]),
            Segment::Key(key) => self.0.extend(["[", &cut(key), "]"]),
        }
        self
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The steps of the path. A text that is no path is one name.
    pub fn segments(&self) -> Vec<Segment<'_>> {
        parsed(&self.0).unwrap_or_else(|| vec![Segment::Name(&self.0)])
    }

    /// The index of the element that the path ends in: 3 for
    /// `inputs[0].contents[3]`, none for `inputs[0].shape`.
    pub fn element(&self) -> Option<usize> {
        match self.segments().last() {
            Some(Segment::Index(index)) => Some(*index),
            _ => None,
        }
    }
}

impl<'p> FromIterator<Segment<'p>> for FieldPath {
    fn from_iter<I: IntoIterator<Item = Segment<'p>>>(segments: I) -> Self {
        segments.into_iter().fold(Self(String::new()), Self::then)
    }
}

impl From<&str> for FieldPath {
    fn from(text: &str) -> Self {
        Self::from(text.to_owned())
    }
}

impl From<String> for FieldPath {
    fn from(text: String) -> Self {
        if text.len() <= WORD_CHARACTERS_MAX {
            return Self(text);
        }
        // It may have a long word: its steps are taken again, each cut.
        let path = Self(cut_bytes(text, DESCRIPTION_BYTES_MAX));
        path.segments().into_iter().collect()
    }
}

impl From<&String> for FieldPath {
    fn from(text: &String) -> Self {
        Self::from(text.as_str())
    }
}

impl From<&FieldPath> for FieldPath {
    fn from(path: &FieldPath) -> Self {
        path.clone()
    }
}

impl PartialEq<str> for FieldPath {
    fn eq(&self, text: &str) -> bool {
        self.0 == text
    }
}

impl PartialEq<&str> for FieldPath {
    fn eq(&self, text: &&str) -> bool {
        self.0 == *text
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// The steps of a text that is a path: names with a dot between them, indices
/// and keys in brackets.
fn parsed(text: &str) -> Option<Vec<Segment<'_>>> {
    let mut segments = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (segment, after) = match rest.strip_prefix('[') {
            Some(inside) => bracketed(inside)?,
            None if segments.is_empty() => name(rest)?,
            None => name(rest.strip_prefix('.')?)?,
        };
        segments.push(segment);
        rest = after;
    }
    Some(segments)
}

fn name(rest: &str) -> Option<(Segment<'_>, &str)> {
    let end = rest.find(['.', '[']).unwrap_or(rest.len());
    let (name, after) = rest.split_at(end);
    (!name.is_empty()).then_some((Segment::Name(name), after))
}

/// An index or a key up to the bracket that ends it. A key may have brackets
/// of its own: the one that ends it has the end or another step behind it.
fn bracketed(inside: &str) -> Option<(Segment<'_>, &str)> {
    let ends = |after: &str| after.is_empty() || after.starts_with(['.', '[']);
    let (content, after) = inside
        .match_indices(']')
        .map(|(at, _)| (&inside[..at], &inside[at + 1..]))
        .find(|(_, after)| ends(after))?;
    let canonical = !content.starts_with('0') || content == "0";
    let digits = canonical && content.bytes().all(|byte| byte.is_ascii_digit());
    let index = content.parse().ok().filter(|_| digits);
    Some((index.map_or(Segment::Key(content), Segment::Index), after))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_are_built_and_read() {
        let path = FieldPath::input(0).field("contents").index(3);
        assert_eq!(path, "inputs[0].contents[3]");
        assert_eq!(path.element(), Some(3));
        assert_eq!(
            path.segments(),
            [
                Segment::Name("inputs"),
                Segment::Index(0),
                Segment::Name("contents"),
                Segment::Index(3)
            ]
        );
        let parameter = FieldPath::parameter("a.b");
        assert_eq!(parameter, "parameters[a.b]");
        assert_eq!(
            parameter.segments(),
            [Segment::Name("parameters"), Segment::Key("a.b")]
        );
        assert_eq!(FieldPath::output(1).field("name").element(), None);
        assert_eq!(FieldPath::from("[1]").segments(), [Segment::Index(1)]);
        assert_eq!(FieldPath::from("andon-model").segments().len(), 1);
    }

    #[test]
    fn what_is_no_path_is_one_name() {
        for text in ["a..b", ".a", "a]b[", "a[b", "a[b]c", "a.", "a b."] {
            assert_eq!(FieldPath::from(text).segments(), [Segment::Name(text)]);
        }
        assert_eq!(
            FieldPath::from("parameters[x]y]").segments(),
            [Segment::Name("parameters"), Segment::Key("x]y")]
        );
        for key in ["007", "", "-1", "99999999999999999999999999"] {
            let path = FieldPath::from("settings").key(key);
            assert_eq!(path.segments()[1], Segment::Key(key));
        }
    }

    #[test]
    fn words_of_a_path_are_cut() {
        let long = "x".repeat(8 << 20);
        let key = format!("{}…", "x".repeat(128));
        for path in [
            FieldPath::parameter(&long),
            FieldPath::from("parameters").key(&long),
        ] {
            assert_eq!(path, *format!("parameters[{key}]"));
            assert_eq!(path.segments()[1], Segment::Key(&key));
        }
        for text in [
            long.clone(),
            format!("inputs[0].{long}"),
            format!("inputs[{long}]"),
        ] {
            let path = FieldPath::from(text);
            assert!(path.as_str().len() < 150, "{path}");
        }
        // Each step is short, and there are many.
        for part in ["a.", "[a]", "a[0]", "x]y[", "é"] {
            let path = FieldPath::from(part.repeat(1 << 20));
            assert!(path.as_str().len() <= DESCRIPTION_BYTES_MAX + 300, "{part}");
        }
        let many = (0..100_000).fold(FieldPath::input(0), FieldPath::index);
        assert!(many.as_str().len() <= DESCRIPTION_BYTES_MAX + 300);
        let legal = format!("parameters[{}]", "k".repeat(128));
        assert_eq!(FieldPath::from(legal.as_str()), *legal);
    }

    proptest! {
        #[test]
        fn the_segments_of_a_text_make_the_text(text in "[a-c0-2.\\[\\]é]{0,12}") {
            let path = FieldPath::from(text.as_str());
            let again: FieldPath = path.segments().into_iter().collect();
            prop_assert_eq!(again.as_str(), text);
        }
    }
}
