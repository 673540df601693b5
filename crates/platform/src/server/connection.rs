//! The common parts of connections of every protocol: limits, the first bytes,
//! maximum age and graceful shutdown.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper_util::server::graceful::GracefulConnection;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::sleep;

use super::{Place, Server};
use crate::answer::PART_BYTES_MAX;
use crate::drain::{Drain, Phase};

/// The connection preface of HTTP/2 (RFC 9113, 3.4).
pub(super) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Flow-control windows that let a tensor of 600 KB pass without a pause.
pub(super) const STREAM_WINDOW_BYTES: u32 = 2 << 20;
pub(super) const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// The window that HTTP/2 gives each connection at least.
pub(super) const WINDOW_BYTES_MIN: u32 = 65_535;
/// A connection gets this part of what all windows may still take together.
pub(super) const WINDOW_PARTS: usize = 64;
/// Frames of this size halve the work of large messages against the default.
pub(super) const FRAME_BYTES_MAX: u32 = PART_BYTES_MAX as u32;
/// How long a peer may take to acknowledge a ping.
pub(super) const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a connection lives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lifetime {
    /// When it is told to end, if nothing ends it before.
    pub age: Duration,
    /// How long it may be idle; without it, for its whole life.
    pub idle: Option<Duration>,
}

/// Serves until the peer closes, the connection reaches the end of its lifetime,
/// others need its place or the server drains.
pub(super) async fn run<C>(
    connection: C,
    server: &Server,
    place: &Place,
    lifetime: Lifetime,
    mut drain: Drain,
) where
    C: GracefulConnection,
    C::Error: std::fmt::Display,
{
    let mut connection = pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => Some(outcome),
        () = sleep(jittered(lifetime.age)) => None,
        () = idled(place, lifetime.idle) => None,
        () = must_close(place, &mut drain) => None,
    };
    let outcome = match outcome {
        Some(outcome) => outcome,
        None => {
            // GOAWAY; calls in flight finish. Age cuts off no stream: it ends by
            // itself, while its caller's next call is on a new connection.
            connection.as_mut().graceful_shutdown();
            let cut_off = async {
                must_close(place, &mut drain).await;
                sleep(server.settings.drain_deadline).await;
            };
            tokio::select! {
                outcome = connection => outcome,
                () = cut_off => Ok(()),
            }
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(listener = server.name, %error, "a connection failed");
    }
}

/// Returns when others need the place, or the server closes.
async fn must_close(place: &Place, drain: &mut Drain) {
    tokio::select! {
        () = place.seat.end().cancelled() => {}
        () = drain.reached(Phase::Closing) => {}
    }
}

/// Returns when the connection has been idle for so long.
async fn idled(place: &Place, timeout: Option<Duration>) {
    let Some(timeout) = timeout else {
        return std::future::pending().await;
    };
    loop {
        let idle = place.seat.idle_for().unwrap_or_default();
        if idle >= timeout {
            return;
        }
        sleep(timeout - idle).await;
    }
}

/// The age with jitter of a fifth, so that connections that were opened together
/// do not end together.
fn jittered(age: Duration) -> Duration {
    age.mul_f64(rand::random_range(0.8..1.2))
}

/// Reads the connection preface of HTTP/2; other bytes are an error.
pub(super) async fn read_preface(io: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut read = [0_u8; PREFACE.len()];
    let mut filled = 0;
    while filled < read.len() {
        let count = io.read(&mut read[filled..]).await?;
        // Another protocol is detected at its first bytes.
        if count == 0 || read[..filled + count] != PREFACE[..filled + count] {
            return Err(io::ErrorKind::InvalidData.into());
        }
        filled += count;
    }
    Ok(())
}

/// Reads until the bytes are the whole preface of HTTP/2 or cannot become it;
/// empty when the peer closes without sending any.
pub(super) async fn read_first(io: &mut (impl AsyncRead + Unpin)) -> io::Result<Bytes> {
    let mut first = BytesMut::with_capacity(4096);
    loop {
        let count = io.read_buf(&mut first).await?;
        let partial = first.len() < PREFACE.len() && PREFACE.starts_with(&first);
        if count == 0 || !partial {
            return Ok(first.freeze());
        }
    }
}

/// A connection whose first bytes were read, and are replayed to hyper.
pub(super) struct Rewound<T> {
    io: T,
    first: Bytes,
}

impl<T> Rewound<T> {
    pub(super) fn new(io: T, first: Bytes) -> Self {
        Self { io, first }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Rewound<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.first.is_empty() {
            let count = self.first.len().min(buffer.remaining());
            buffer.put_slice(&self.first.split_to(count));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Rewound<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_part_of_a_preface_is_not_enough() {
        let (mut near, mut far) = tokio::io::duplex(64);
        near.write_all(&PREFACE[..10]).await.unwrap();
        let wait = Duration::from_secs(60);
        assert!(timeout(wait, read_first(&mut far)).await.is_err());

        for (sent, complete) in [
            (&PREFACE[..], true),
            (b"PRI * HTTP/2.0\r\n\r\nXX", true),
            (b"POST / HTTP/1.1\r\n", true),
            (b"PRI *", false),
            (b"", false),
        ] {
            let (mut near, mut far) = tokio::io::duplex(64);
            near.write_all(sent).await.unwrap();
            if !complete {
                drop(near);
            }
            assert_eq!(read_first(&mut far).await.unwrap(), sent);
        }
    }
}
