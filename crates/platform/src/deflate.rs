//! Compresses answers on the threads for work.

use std::io::{self, Write};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use tonic::Status;

use crate::limits::{BytesHeld, MessageLimits};
use crate::pool::Cancelled;

/// So much is compressed before the next look at whether the caller has left.
const PIECE_BYTES: usize = 64 << 10;
/// What bytes that cannot be compressed become is longer by a part of them, and by
/// the head and the end.
const EXPANSION: usize = 1000;
const FRAME_BYTES: usize = 64;

/// The chunks as one gzip, which counts as in flight until what is held is
/// dropped.
pub async fn gzip(
    chunks: Vec<Bytes>,
    limits: &MessageLimits,
) -> Result<(Bytes, BytesHeld), Status> {
    let bytes: usize = chunks.iter().map(Bytes::len).sum();
    let bytes_max = bytes + bytes / EXPANSION + FRAME_BYTES;
    let mut held = limits.budget.hold(bytes_max)?;
    let write = move |cancelled: &Cancelled| {
        let mut encoder = GzEncoder::new(Vec::with_capacity(bytes_max), Compression::fast());
        for piece in chunks.iter().flat_map(|chunk| chunk.chunks(PIECE_BYTES)) {
            if cancelled.is_set() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            encoder.write_all(piece)?;
        }
        let mut packed = encoder.finish()?;
        packed.shrink_to_fit();
        held.shrink(packed.capacity());
        Ok((Bytes::from(packed), held))
    };
    let packed: io::Result<_> = limits.work(bytes, write).await?;
    packed.map_err(|_| Status::cancelled("the caller left"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inflate::{Compressed, Compression, inflate};

    #[tokio::test]
    async fn what_is_compressed_is_read_again_and_counted() {
        let limits = MessageLimits::new(1 << 20, 4 << 20);
        let noise = (0..300_000_u32).map(|number| (number.wrapping_mul(0x9e37_79b9) >> 13) as u8);
        let chunks = vec![
            Bytes::from(vec![7; 200_000]),
            noise.collect::<Vec<u8>>().into(),
        ];
        let whole = chunks.concat();
        let (packed, held) = gzip(chunks, &limits).await.unwrap();
        assert!(held.amount() >= packed.len() && held.amount() < 400_000);
        assert_eq!(limits.budget.used(), held.amount());
        let compressed = Compressed {
            chunks: vec![packed],
            held: Some(held),
            compression: Compression::Gzip,
            prefix_bytes: 0,
        };
        let inflated = inflate(compressed, &limits).await.unwrap();
        assert_eq!(inflated.bytes, whole);
        drop(inflated);
        assert_eq!(limits.budget.used(), 0);
        assert!(gzip(vec![vec![0; 5 << 20].into()], &limits).await.is_err());
    }
}
