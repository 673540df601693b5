//! The readers of answers: each must take its answer at the least speed. An
//! answer that waits for its reader counts as bytes in flight, and ends.
//!
//! While hyper waits for a reader it polls neither the answer nor anything else
//! that could end the wait: the task of the stream does, and where the peer does
//! not read from the connection itself, the connection.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::answer::Answer;
use crate::grpc::MessageLimits;
use crate::pace::Progress;
use crate::pot::{Held, PotFull};
use crate::tasks::ConnectionExecutor;

/// The wait for a reader.
struct Wait {
    progress: Progress,
    /// Bytes that have moved, as far as the progress knows.
    moved: usize,
    timer: Pin<Box<Sleep>>,
    _held: Held,
}

impl Wait {
    /// Begins to wait; the bytes of the answer count as in flight until it ends.
    fn begin(answer: &Answer, limits: &MessageLimits, moved: usize) -> Result<Self, PotFull> {
        let held = limits.hold_for(&answer.holder(), answer.uncounted())?;
        // What has left may take its time to arrive.
        let moved = moved.saturating_sub(answer.leaving());
        let progress = limits.pace.begin();
        let timer = Box::pin(sleep_until(due(&progress, answer)));
        Ok(Self {
            progress,
            moved,
            timer,
            _held: held,
        })
    }

    /// Ready when the reader was too slow.
    fn poll(&mut self, answer: &Answer, moved: usize, context: &mut Context<'_>) -> Poll<()> {
        while self.timer.as_mut().poll(context).is_ready() {
            self.progress.moved(moved.saturating_sub(self.moved));
            self.moved = moved;
            let due = due(&self.progress, answer);
            if due <= Instant::now() {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(due);
        }
        Poll::Pending
    }
}

/// When an answer ends if no more of it is read.
fn due(progress: &Progress, answer: &Answer) -> Instant {
    let due = progress.due();
    answer.deadline().map_or(due, |end| due.min(end))
}

/// Waits for the reader of an answer; ready when the answer must end. `moved` are
/// the bytes that have left since the beginning.
fn poll_reader(
    waiting: &mut Option<Wait>,
    answer: &Answer,
    limits: &MessageLimits,
    moved: usize,
    context: &mut Context<'_>,
) -> Poll<()> {
    let wait = match waiting {
        Some(wait) => wait,
        none => match Wait::begin(answer, limits, moved) {
            Ok(wait) => none.insert(wait),
            Err(_) => return Poll::Ready(()),
        },
    };
    let ended = wait.poll(answer, moved, context);
    if ended.is_ready() {
        limits.too_slow();
    }
    ended
}

/// Runs the streams of a connection, and ends those whose readers are too slow.
#[derive(Debug, Clone)]
pub struct Readers(pub Arc<MessageLimits>);

impl<F> hyper::rt::Executor<F> for Readers
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, stream: F) {
        let limits = self.0.clone();
        // Boxed, since it is moved several times before it runs.
        let stream = Box::pin(stream);
        ConnectionExecutor.execute(async move {
            let answer = Arc::new(Answer::default());
            let mut stream = pin!(answer.scope(stream));
            let mut waiting = None;
            poll_fn(|context| {
                if stream.as_mut().poll(context).is_ready() {
                    return Poll::Ready(());
                }
                if !answer.is_waiting() {
                    waiting = None;
                    return Poll::Pending;
                }
                // The stream is reset when its future is dropped.
                poll_reader(&mut waiting, &answer, &limits, answer.moved(), context)
            })
            .await;
        });
    }
}

/// A connection whose peer must read at the least speed.
pub struct Read<T> {
    io: T,
    answer: Arc<Answer>,
    limits: Arc<MessageLimits>,
    written: usize,
    waiting: Option<Wait>,
}

impl<T> Read<T> {
    /// Wraps a connection. `answer` is what it sends, if that is one at a time.
    pub fn new(io: T, answer: Arc<Answer>, limits: Arc<MessageLimits>) -> Self {
        Self {
            io,
            answer,
            limits,
            written: 0,
            waiting: None,
        }
    }

    /// An error when the peer reads too slowly.
    fn check<R>(
        &mut self,
        context: &mut Context<'_>,
        outcome: Poll<io::Result<R>>,
    ) -> Poll<io::Result<R>> {
        if outcome.is_ready() {
            return outcome;
        }
        let waiting = &mut self.waiting;
        let slow = poll_reader(waiting, &self.answer, &self.limits, self.written, context);
        ready!(slow);
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    fn count(&mut self, written: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(count)) = written {
            self.written = self.written.wrapping_add(*count);
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Read<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Read<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(context, bytes);
        self.count(&written);
        self.check(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(context, slices);
        self.count(&written);
        self.check(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(context);
        if flushed.is_ready() {
            self.waiting = None;
        }
        self.check(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.io).poll_shutdown(context);
        self.check(context, shut)
    }
}
