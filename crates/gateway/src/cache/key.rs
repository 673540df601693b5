//! What stands for a row: a hash of everything that its answer depends on.

use aws_lc_rs::digest::{SHA256, digest};

/// SHA-256 over a row in its one form. Rows with equal keys have equal answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(pub(super) [u8; 32]);

/// What all rows of a request have in common.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Tenants of one scope share answers.
    pub scope: &'a str,
    /// The model.
    pub model: &'a str,
    /// The version's number: answers say it.
    pub version: u64,
    /// What stands for the version's files and how they are computed.
    pub digest: &'a str,
}

/// Writes what a key stands for. Every part is preceded by its length, so that
/// no two rows can be written alike.
#[derive(Debug)]
pub struct KeyWriter(Vec<u8>);

impl KeyWriter {
    /// Begins with the kind of call and where its answer comes from.
    pub fn new(call: &str, source: &Source<'_>) -> Self {
        let mut writer = Self(Vec::with_capacity(512));
        writer
            .part(b"andon row 1")
            .part(call.as_bytes())
            .part(source.scope.as_bytes())
            .part(source.model.as_bytes())
            .number(source.version)
            .part(source.digest.as_bytes());
        writer
    }

    /// Adds some bytes.
    pub fn part(&mut self, bytes: &[u8]) -> &mut Self {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
        self
    }

    /// Adds a number.
    pub fn number(&mut self, number: u64) -> &mut Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    /// The key of what was written.
    pub fn key(&self) -> Key {
        let mut key = [0; 32];
        key.copy_from_slice(digest(&SHA256, &self.0).as_ref());
        Key(key)
    }

    /// Forgets all but its hash, and leaves a place to come back to: what the
    /// rows of a request have in common is hashed once.
    pub fn fold(&mut self) -> usize {
        let key = self.key();
        self.0.clear();
        self.0.extend_from_slice(&key.0);
        self.0.len()
    }

    /// Goes back to a place.
    pub fn back(&mut self, place: usize) {
        self.0.truncate(place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: Source<'_> = Source {
        scope: "team",
        model: "minilm",
        version: 1,
        digest: "abc",
    };

    fn key(call: &str, source: Source<'_>, parts: &[&[u8]]) -> Key {
        let mut writer = KeyWriter::new(call, &source);
        for part in parts {
            writer.part(part);
        }
        writer.key()
    }

    #[test]
    fn everything_that_an_answer_depends_on_changes_the_key() {
        let keys = [
            key("call", SOURCE, &[b"ab", b"c"]),
            key("call", SOURCE, &[b"a", b"bc"]),
            key("call", SOURCE, &[b"abc"]),
            key("call", SOURCE, &[b"abc", b""]),
            key("calla", SOURCE, &[b"bc"]),
            key("other", SOURCE, &[b"ab", b"c"]),
            key(
                "call",
                Source {
                    scope: "te",
                    model: "amminilm",
                    ..SOURCE
                },
                &[b"ab", b"c"],
            ),
            key(
                "call",
                Source {
                    scope: "two",
                    ..SOURCE
                },
                &[b"ab", b"c"],
            ),
            key(
                "call",
                Source {
                    model: "digits",
                    ..SOURCE
                },
                &[b"ab", b"c"],
            ),
            key(
                "call",
                Source {
                    version: 2,
                    ..SOURCE
                },
                &[b"ab", b"c"],
            ),
            key(
                "call",
                Source {
                    digest: "abd",
                    ..SOURCE
                },
                &[b"ab", b"c"],
            ),
        ];
        for (index, key) in keys.iter().enumerate() {
            assert!(!keys[..index].contains(key), "{index}");
        }
        assert_eq!(keys[0], key("call", SOURCE, &[b"ab", b"c"]));
    }

    #[test]
    fn a_folded_writer_still_tells_apart() {
        let mut one = KeyWriter::new("call", &SOURCE);
        let mut other = KeyWriter::new(
            "call",
            &Source {
                scope: "two",
                ..SOURCE
            },
        );
        let place = one.fold();
        other.fold();
        assert_ne!(one.part(b"row").key(), other.part(b"row").key());
        let first = one.key();
        one.back(place);
        assert_ne!(one.part(b"another").key(), first);
        one.back(place);
        assert_eq!(one.part(b"row").key(), first);
    }
}
