//! HTTP/1.1 callers that have sent all they will send. One that has closed its half
//! of the connection waits for its answer, and one that has left looks the same
//! until something is sent to it. So an interim response is (RFC 9110, 15.2), which
//! every client of HTTP/1.1 must skip: a caller who has left resets the connection.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use crate::answer::Requests;

const INTERIM: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
/// The pause before the first interim response. The pauses double, since a caller
/// who has read a few is there; two of them show one that has left.
const PAUSE: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(8);

/// A connection whose reader sees its end when every answer has been sent. hyper
/// ends a connection at once, with what it has not sent, when it reads the end
/// before.
pub(super) struct HalfClosed<T> {
    io: T,
    requests: Requests,
    /// From when its end was read.
    ended: Option<Ended>,
    /// Whether the end is held back until an answer is sent.
    is_held: bool,
    /// Whether a part of an answer was written since the last bytes were read:
    /// nothing may come between.
    is_answering: bool,
    /// Whether what was written is not flushed yet.
    is_unflushed: bool,
    /// The rest of an interim response.
    unsent: &'static [u8],
}

struct Ended {
    pause: Duration,
    timer: Pin<Box<Sleep>>,
}

impl<T> HalfClosed<T> {
    /// Wraps a connection with these requests.
    pub(super) fn new(io: T, requests: Requests) -> Self {
        Self {
            io,
            requests,
            ended: None,
            is_held: false,
            is_answering: false,
            is_unflushed: false,
            unsent: &[],
        }
    }

    /// Whether an answer has not been sent yet.
    fn waits(&self) -> bool {
        self.is_unflushed || self.requests.in_flight()
    }
}

impl<T: AsyncWrite + Unpin> HalfClosed<T> {
    /// Ready when the reader may see the end, or with the error of a caller who has
    /// left.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.is_held |= self.waits();
        while self.is_held {
            let Some(ended) = &mut self.ended else { break };
            ready!(ended.timer.as_mut().poll(context));
            // A caller who has left is noticed by a part of the answer, too.
            if self.requests.in_flight() && !self.is_answering {
                if !self.requests.take_interim() {
                    // One who cannot be asked has left.
                    break;
                }
                if self.unsent.is_empty() {
                    self.unsent = INTERIM;
                }
                ready!(self.poll_unsent(context))?;
                // What cannot be flushed now is flushed by hyper, which tries it
                // whenever it is polled.
                if let Poll::Ready(Err(error)) = Pin::new(&mut self.io).poll_flush(context) {
                    return Poll::Ready(Err(error));
                }
            }
            if let Some(ended) = &mut self.ended {
                ended.pause = (ended.pause * 2).min(PAUSE_MAX);
                ended.timer.as_mut().reset(Instant::now() + ended.pause);
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Sends the rest of an interim response.
    fn poll_unsent(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unsent.is_empty() {
            let sent = ready!(Pin::new(&mut self.io).poll_write(context, self.unsent))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unsent = self.unsent.get(sent..).unwrap_or_default();
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for HalfClosed<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let own = &mut *self;
        if own.ended.is_none() {
            let (before, room) = (buffer.filled().len(), buffer.remaining());
            ready!(Pin::new(&mut own.io).poll_read(context, buffer))?;
            if buffer.filled().len() > before || room == 0 {
                own.is_answering = false;
                return Poll::Ready(Ok(()));
            }
            if !own.waits() {
                return Poll::Ready(Ok(()));
            }
            own.ended = Some(Ended {
                pause: PAUSE,
                timer: Box::pin(sleep(PAUSE)),
            });
        }
        own.poll_end(context)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for HalfClosed<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_unsent(context))?;
        (self.is_answering, self.is_unflushed) = (true, true);
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_unsent(context))?;
        (self.is_answering, self.is_unflushed) = (true, true);
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.io).poll_flush(context))?;
        self.is_unflushed = false;
        if self.is_held && !self.requests.in_flight() {
            // Its reader waits for a timer, and may see the end now.
            self.is_held = false;
            context.waker().wake_by_ref();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use http::Version;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::timeout;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_caller_who_waits_is_kept_until_its_answer_is_sent() {
        let (mut caller, io) = duplex(4096);
        let requests = Requests::default();
        let mut io = HalfClosed::new(io, requests.clone());
        let request = requests.begin(Version::HTTP_11);
        caller.write_all(b"GET").await.unwrap();
        caller.shutdown().await.unwrap();
        let mut read = [0; 8];
        assert_eq!(io.read(&mut read).await.unwrap(), 3);
        assert!(timeout(LONG, io.read(&mut read)).await.is_err());
        io.write_all(b"HTTP/1.1 200 OK").await.unwrap();
        // Nothing comes between the parts of an answer.
        assert!(timeout(LONG, io.read(&mut read)).await.is_err());
        io.write_all(b"\r\n\r\n").await.unwrap();
        drop(request);
        assert!(
            timeout(LONG, io.read(&mut read)).await.is_err(),
            "unflushed"
        );
        io.flush().await.unwrap();
        assert_eq!(io.read(&mut read).await.unwrap(), 0);
        drop(io);
        let mut answer = String::new();
        caller.read_to_string(&mut answer).await.unwrap();
        let interim = answer.matches("HTTP/1.1 100 Continue\r\n\r\n").count();
        assert!((2..20).contains(&interim), "{answer}");
        let last = answer.rsplit("100 Continue\r\n\r\n").next();
        assert_eq!(last, Some("HTTP/1.1 200 OK\r\n\r\n"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_who_has_left_is_noticed() {
        for version in [Version::HTTP_11, Version::HTTP_10] {
            let (caller, io) = duplex(4096);
            let requests = Requests::default();
            let mut io = HalfClosed::new(io, requests.clone());
            let _request = requests.begin(version);
            drop(caller);
            let read = timeout(LONG, io.read_u8()).await;
            assert!(matches!(read, Ok(Err(_))), "{version:?}: {read:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_a_request_ends_at_once() {
        let (caller, io) = duplex(4096);
        let mut io = HalfClosed::new(io, Requests::default());
        drop(caller);
        let begun = Instant::now();
        assert_eq!(io.read(&mut [0; 8]).await.unwrap(), 0);
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
