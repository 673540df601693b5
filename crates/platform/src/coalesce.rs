//! Write coalescing: a flush waits for one round of the scheduler.
//!
//! HTTP/2 libraries flush the head of a message, its data and its trailers one
//! by one, since different tasks make them: each becomes a system call, a packet
//! and a wake-up of the peer. A task that yields on a single-threaded runtime
//! runs again after every task that is ready; their writes go out in the same
//! system call.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::yield_now;
use tokio_util::sync::ReusableBoxFuture;

/// Longer writes are not copied: they go out at once, after the buffered ones.
const COPIED_BYTES_MAX: usize = 16 << 10;
/// The size of the buffer.
const BUFFERED_BYTES_MAX: usize = 64 << 10;

/// A connection whose small writes are buffered until the next flush.
#[derive(Debug)]
pub struct Coalesced<T> {
    io: T,
    buffer: BytesMut,
    flush: Flush,
    yielded: ReusableBoxFuture<'static, ()>,
}

/// The state of a flush.
#[derive(Debug, PartialEq)]
enum Flush {
    /// No flush has begun.
    Idle,
    /// The flush yields to the other tasks.
    Yielding,
    /// The other tasks have run: the buffer is written.
    Writing,
}

impl<T> Coalesced<T> {
    /// Wraps a connection.
    pub fn new(io: T) -> Self {
        Self {
            io,
            buffer: BytesMut::new(),
            flush: Flush::Idle,
            yielded: ReusableBoxFuture::new(yield_now()),
        }
    }
}

impl<T: AsyncWrite + Unpin> Coalesced<T> {
    /// Writes the whole buffer.
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.buffer.is_empty() {
            let count = ready!(Pin::new(&mut self.io).poll_write(context, &self.buffer))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.buffer.advance(count);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Coalesced<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Coalesced<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let own = self.get_mut();
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        if total > COPIED_BYTES_MAX {
            ready!(own.poll_drain(context))?;
            return Pin::new(&mut own.io).poll_write_vectored(context, slices);
        }
        if own.buffer.len() + total > BUFFERED_BYTES_MAX {
            ready!(own.poll_drain(context))?;
        }
        for slice in slices {
            own.buffer.extend_from_slice(slice);
        }
        Poll::Ready(Ok(total))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let own = self.get_mut();
        if !own.buffer.is_empty() {
            if own.flush == Flush::Idle {
                own.yielded.set(yield_now());
                own.flush = Flush::Yielding;
            }
            if own.flush == Flush::Yielding {
                ready!(own.yielded.poll(context));
                own.flush = Flush::Writing;
            }
        }
        ready!(own.poll_drain(context))?;
        own.flush = Flush::Idle;
        Pin::new(&mut own.io).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let own = self.get_mut();
        ready!(own.poll_drain(context))?;
        Pin::new(&mut own.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn everything_arrives_in_order() {
        let (near, mut far) = tokio::io::duplex(1000);
        let written: Vec<u8> = (0..200_000_u32).map(|number| number as u8).collect();
        let expected = written.clone();
        let writer = async move {
            let mut io = Coalesced::new(near);
            let mut rest = written.as_slice();
            for length in [1, 100, 20_000, 7, 60_000, 3, 90_000].iter().cycle() {
                let (now, later) = rest.split_at((*length).min(rest.len()));
                io.write_all(now).await.unwrap();
                if length % 2 == 1 {
                    io.flush().await.unwrap();
                }
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            io.shutdown().await.unwrap();
        };
        let mut read = Vec::new();
        let (_, result) = tokio::join!(writer, far.read_to_end(&mut read));
        result.unwrap();
        assert_eq!(read, expected);
    }
}
