//! The cache key of a row: a hash of everything that its response depends on.

use aws_lc_rs::digest::{SHA256, digest};

/// SHA-256 over a row in its canonical form. Rows with equal keys have equal
/// responses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RowKey(pub(super) [u8; 32]);

/// The part of a key that all rows of a request have in common.
#[derive(Debug, Clone, Copy)]
pub struct KeyContext<'a> {
    /// The cache scope: tenants of one scope share cached rows.
    pub scope: &'a str,
    /// The model.
    pub model: &'a str,
    /// The number of the version, which responses contain.
    pub version: u64,
    /// The digest of the version's files and of how they are computed.
    pub digest: &'a str,
}

/// Writes the canonical form of a row. Every part is preceded by its length, so
/// that no two rows have the same form.
#[derive(Debug)]
pub struct KeyWriter(Vec<u8>);

impl KeyWriter {
    /// Begins with the kind of call and the part that all rows have in common.
    pub fn new(call: &str, source: &KeyContext<'_>) -> Self {
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

    /// Appends bytes, preceded by their length.
    pub fn part(&mut self, bytes: &[u8]) -> &mut Self {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
        self
    }

    /// Appends a number.
    pub fn number(&mut self, number: u64) -> &mut Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    /// The key of the bytes written so far.
    pub fn key(&self) -> RowKey {
        let mut key = [0; 32];
        key.copy_from_slice(digest(&SHA256, &self.0).as_ref());
        RowKey(key)
    }

    /// Replaces what has been written with its hash, and returns the position to
    /// rewind to: the part that the rows of a request have in common is hashed
    /// once.
    pub fn fold(&mut self) -> usize {
        let key = self.key();
        self.0.clear();
        self.0.extend_from_slice(&key.0);
        self.0.len()
    }

    /// Drops the bytes after a position.
    pub fn rewind(&mut self, position: usize) {
        self.0.truncate(position);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: KeyContext<'_> = KeyContext {
        scope: "team",
        model: "minilm",
        version: 1,
        digest: "abc",
    };

    fn key(call: &str, source: KeyContext<'_>, parts: &[&[u8]]) -> RowKey {
        let mut writer = KeyWriter::new(call, &source);
        for part in parts {
            writer.part(part);
        }
        writer.key()
    }

    #[test]
    fn everything_that_a_response_depends_on_changes_the_key() {
        let keys = [
            key("call", SOURCE, &[b"ab", b"c"]),
            key("call", SOURCE, &[b"a", b"bc"]),
            key("call", SOURCE, &[b"abc"]),
            key("call", SOURCE, &[b"abc", b""]),
            key("calla", SOURCE, &[b"bc"]),
            key("other", SOURCE, &[b"ab", b"c"]),
            key(
                "call",
                KeyContext {
                    scope: "te",
                    model: "amminilm",
                    ..SOURCE
                },
                &[b"ab", b"c"],
            ),
            key(
                "call",
                KeyContext {
                    scope: "two",
                    ..SOURCE
                },
                &[b"ab", b"c"],
            ),
            key(
                "call",
                KeyContext {
                    model: "digits",
                    ..SOURCE
                },
                &[b"ab", b"c"],
            ),
            key(
                "call",
                KeyContext {
                    version: 2,
                    ..SOURCE
                },
                &[b"ab", b"c"],
            ),
            key(
                "call",
                KeyContext {
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
            &KeyContext {
                scope: "two",
                ..SOURCE
            },
        );
        let position = one.fold();
        other.fold();
        assert_ne!(one.part(b"row").key(), other.part(b"row").key());
        let first = one.key();
        one.rewind(position);
        assert_ne!(one.part(b"another").key(), first);
        one.rewind(position);
        assert_eq!(one.part(b"row").key(), first);
    }
}
