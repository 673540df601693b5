//! Decompresses messages and bodies within limits: a few bytes may expand to a
//! thousand times as many.

use std::collections::VecDeque;
use std::io::{self, Read};

use bytes::buf::Reader;
use bytes::{Buf, Bytes};
use flate2::bufread::{MultiGzDecoder, ZlibDecoder};
use tonic::Status;

use crate::limits::{ByteBudget, BytesHeld, MessageLimits};
use crate::pool::Cancelled;

/// So much is decompressed where it arrives, and the rest on a thread for work.
const INLINE_BYTES: usize = 64 << 10;
/// The first buffer.
const BUFFER_BYTES_MIN: usize = 1 << 10;

/// A format of compressed bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952, of one member or several.
    Gzip,
    /// RFC 1950, which HTTP calls `deflate`.
    Zlib,
}

impl Compression {
    /// Whether a coding is gzip by one of its names, in any case (RFC 9110, 8.4.1).
    pub fn is_gzip(coding: &[u8]) -> bool {
        coding.eq_ignore_ascii_case(b"gzip") || coding.eq_ignore_ascii_case(b"x-gzip")
    }
}

/// Why bytes cannot be decompressed.
#[derive(Debug, thiserror::Error)]
pub enum InflateError {
    /// They are not in this format.
    #[error("cannot be decompressed: {0}")]
    Invalid(#[from] io::Error),
    /// They have more bytes than a message may have, at least so many.
    #[error("too large: {0} bytes")]
    TooLarge(usize),
    /// Too much is in flight, or waits; or the caller left.
    #[error("{}", .0.message())]
    Refused(Status),
}

/// Compressed bytes in the chunks that they came in.
#[derive(Debug)]
pub struct Compressed {
    /// The chunks.
    pub chunks: Vec<Bytes>,
    /// What they hold of the bytes in flight, until they are decompressed.
    pub held: Option<BytesHeld>,
    /// Their format.
    pub compression: Compression,
    /// So many bytes are left free before the first decompressed one.
    pub prefix_bytes: usize,
}

/// Decompressed bytes.
#[derive(Debug)]
pub struct Inflated {
    /// The bytes, after those of the prefix.
    pub bytes: Vec<u8>,
    /// Their memory counts as in flight until this is dropped.
    pub held: BytesHeld,
}

/// Decompresses bytes within the limits of a message.
pub async fn inflate(
    compressed: Compressed,
    limits: &MessageLimits,
) -> Result<Inflated, InflateError> {
    let bytes: usize = compressed.chunks.iter().map(Bytes::len).sum();
    let mut inflating = Inflating::new(compressed, limits)?;
    // Much that is compressed may be decompressed to nothing.
    if bytes <= INLINE_BYTES && inflating.fill(INLINE_BYTES)? {
        return Ok(inflating.inflated);
    }
    let rest = move |cancelled: &Cancelled| {
        while !inflating.fill(INLINE_BYTES)? {
            if cancelled.is_set() {
                let left = Status::cancelled("the caller left");
                return Err(InflateError::Refused(left));
            }
        }
        Ok(inflating.inflated)
    };
    let inflated = limits.work(usize::MAX, rest).await;
    inflated.map_err(InflateError::Refused)?
}

/// Bytes that are decompressed step by step. Their memory is taken from the
/// budget before it is made.
struct Inflating {
    decoder: Box<dyn Read + Send>,
    inflated: Inflated,
    /// The most bytes, with those of the prefix.
    bytes_max: usize,
    prefix_bytes: usize,
    budget: ByteBudget,
    /// The compressed bytes count until the end.
    _compressed: Option<BytesHeld>,
}

impl Inflating {
    fn new(compressed: Compressed, limits: &MessageLimits) -> Result<Self, InflateError> {
        let held = limits.budget.hold(BUFFER_BYTES_MIN);
        let mut bytes = Vec::with_capacity(BUFFER_BYTES_MIN);
        bytes.resize(compressed.prefix_bytes, 0);
        let inflated = Inflated {
            bytes,
            held: held.map_err(InflateError::Refused)?,
        };
        let mut chunks = compressed.chunks;
        // An empty one would look like the end.
        chunks.retain(|chunk| !chunk.is_empty());
        let chunks = Chunks(chunks.into()).reader();
        Ok(Self {
            decoder: decoder(chunks, compressed.compression),
            inflated,
            bytes_max: limits.message_bytes_max + compressed.prefix_bytes,
            prefix_bytes: compressed.prefix_bytes,
            budget: limits.budget.clone(),
            _compressed: compressed.held,
        })
    }

    /// Decompresses about `more` bytes; true at the end.
    fn fill(&mut self, more: usize) -> Result<bool, InflateError> {
        let Inflated { bytes, held } = &mut self.inflated;
        let until = bytes.len() + more;
        while bytes.len() < until {
            if bytes.len() == bytes.capacity() {
                // One byte more shows that there are too many.
                let capacity = (bytes.len() * 2).min(self.bytes_max + 1);
                let more = capacity - bytes.len();
                let grown = self.budget.grow(held, more);
                grown.map_err(InflateError::Refused)?;
                bytes.reserve_exact(more);
            }
            let room = bytes.capacity().min(until) - bytes.len();
            let mut part = (&mut self.decoder).take(room as u64);
            let read = part.read_to_end(bytes)?;
            if bytes.len() > self.bytes_max {
                return Err(InflateError::TooLarge(bytes.len() - self.prefix_bytes));
            }
            if read < room {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn decoder(chunks: Reader<Chunks>, compression: Compression) -> Box<dyn Read + Send> {
    match compression {
        Compression::Gzip => Box::new(MultiGzDecoder::new(chunks)),
        Compression::Zlib => Box::new(OnlyZlib(ZlibDecoder::new(chunks))),
    }
}

/// One stream of zlib, and nothing behind it. A gzip may go on with a further
/// member, so its decoder reads on by itself.
struct OnlyZlib(ZlibDecoder<Reader<Chunks>>);

impl Read for OnlyZlib {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(into)?;
        let ended = read == 0 && !into.is_empty();
        if ended && self.0.get_ref().get_ref().has_remaining() {
            let reason = "bytes follow the end of the stream";
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        Ok(read)
    }
}

/// Chunks that are read one after the other; one that was read is dropped.
struct Chunks(VecDeque<Bytes>);

impl Buf for Chunks {
    fn remaining(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    fn chunk(&self) -> &[u8] {
        self.0.front().map_or(&[], |chunk| chunk)
    }

    fn advance(&mut self, mut count: usize) {
        while let Some(first) = self.0.front_mut() {
            if count < first.len() {
                return first.advance(count);
            }
            count -= first.len();
            self.0.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression as Level;
    use flate2::write::{GzEncoder, ZlibEncoder};

    use super::*;

    const PREFIX_BYTES: usize = 5;

    fn packed(length: usize, compression: Compression) -> Vec<u8> {
        let bytes = vec![7; length];
        match compression {
            Compression::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), Level::fast());
                encoder.write_all(&bytes).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Zlib => {
                let mut encoder = ZlibEncoder::new(Vec::new(), Level::fast());
                encoder.write_all(&bytes).unwrap();
                encoder.finish().unwrap()
            }
        }
    }

    fn compressed(length: usize, compression: Compression) -> Compressed {
        let packed = packed(length, compression);
        Compressed {
            chunks: packed.chunks(13).map(Bytes::copy_from_slice).collect(),
            held: None,
            compression,
            prefix_bytes: PREFIX_BYTES,
        }
    }

    #[tokio::test]
    async fn inflating_takes_its_memory_from_the_budget_before_it_is_made() {
        let limits = MessageLimits::new(1 << 20, 4 << 20);
        for compression in [Compression::Gzip, Compression::Zlib] {
            for length in [0, 1, 1000, 65_536, 1 << 20] {
                let mut inflating =
                    Inflating::new(compressed(length, compression), &limits).unwrap();
                while !inflating.fill(INLINE_BYTES).unwrap() {
                    assert_eq!(limits.budget.used(), inflating.inflated.bytes.capacity());
                }
                assert_eq!(inflating.inflated.bytes[PREFIX_BYTES..], vec![7; length]);
                assert!(limits.budget.used() >= inflating.inflated.bytes.len());
            }
            assert_eq!(limits.budget.used(), 0);
            let large = inflate(compressed((1 << 20) + 1, compression), &limits).await;
            assert!(
                matches!(large, Err(InflateError::TooLarge(_))),
                "{compression:?}"
            );
            let _others = limits.budget.take(3 << 20).unwrap();
            let full = inflate(compressed(1 << 20, compression), &limits).await;
            assert!(
                matches!(full, Err(InflateError::Refused(_))),
                "{compression:?}"
            );
        }
    }

    #[tokio::test]
    async fn members_follow_each_other_and_what_is_not_compressed_is_refused() {
        let limits = MessageLimits::new(1 << 20, 4 << 20);
        for compression in [Compression::Gzip, Compression::Zlib] {
            let of = |chunks: Vec<Vec<u8>>| Compressed {
                chunks: chunks.into_iter().map(Bytes::from).collect(),
                held: None,
                compression,
                prefix_bytes: 0,
            };
            let member = packed(3, compression);
            let two = inflate(of(vec![member.clone(), vec![], member.clone()]), &limits).await;
            match compression {
                Compression::Gzip => assert_eq!(two.unwrap().bytes, [7; 6]),
                Compression::Zlib => assert!(matches!(two, Err(InflateError::Invalid(_)))),
            }
            let followed = |rest: &[u8]| [&member[..], rest].concat();
            for wrong in [
                vec![],
                b"not compressed".to_vec(),
                member[..member.len() - 1].to_vec(),
                followed(b"\0"),
                followed(b"rubbish"),
                followed(&[0x1f, 0x8b]),
                followed(&[0; 512]),
            ] {
                // In one chunk, and what follows in a chunk of its own.
                let (first, rest) = wrong.split_at(wrong.len().min(member.len()));
                for chunks in [vec![wrong.clone()], vec![first.to_vec(), rest.to_vec()]] {
                    let error = inflate(of(chunks), &limits).await;
                    assert!(matches!(error, Err(InflateError::Invalid(_))), "{error:?}");
                }
            }
        }
        assert_eq!(limits.budget.used(), 0);
    }

    #[test]
    fn gzip_is_known_by_its_names_in_any_case() {
        for name in ["gzip", "GZIP", "x-gzip", "X-GZip"] {
            assert!(Compression::is_gzip(name.as_bytes()), "{name}");
        }
        for other in ["", "gzip2", "zip", "identity", "x-zip"] {
            assert!(!Compression::is_gzip(other.as_bytes()), "{other}");
        }
    }
}
