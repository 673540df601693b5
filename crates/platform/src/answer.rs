//! An answer until it has been sent.
//!
//! hyper takes the next part of an answer when the part before it has left, as
//! far as flow control lets it, so an answer is handed over in parts, and the
//! last one is small.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::Version;
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

use crate::open_streams::OpenStream;
use crate::pot::Holder;
use crate::seats::Busy;

/// A part of an answer, and a frame of HTTP/2, have at most so many bytes.
pub const PART_BYTES_MAX: usize = 256 << 10;
/// Longer answers have a last part of this length, which leaves only when all
/// before it has left. Shorter ones are one part.
const LAST_PART_BYTES: usize = 4 << 10;

tokio::task_local! {
    /// The answer of the stream whose task runs.
    static ANSWER: Arc<Answer>;
}

/// For whom an answer is, as an extension of a response.
#[derive(Debug, Clone)]
pub struct AnswerFor {
    /// Its bytes count as in flight for this holder.
    pub holder: Holder,
    /// When the caller stops waiting for it.
    pub deadline: Instant,
    /// Whether its bytes are counted as in flight already.
    pub counted: bool,
}

/// What the body of an answer and its task tell each other.
#[derive(Debug, Default)]
pub struct Answer {
    /// Whether a part was handed over, and no more was asked for.
    waiting: AtomicBool,
    /// Bytes that have left.
    moved: AtomicUsize,
    /// Bytes of the last part that has left: some may wait for the connection.
    leaving: AtomicUsize,
    /// Bytes that have not left, as far as the body knows.
    rest: AtomicUsize,
    /// Whether these are counted as in flight already.
    counted: AtomicBool,
    owner: Mutex<Owner>,
}

/// Whose answer it is.
#[derive(Debug, Clone, Default)]
struct Owner {
    holder: Option<Holder>,
    deadline: Option<Instant>,
}

impl Answer {
    /// The answer of the stream whose task runs; none over HTTP/1.1.
    pub fn current() -> Option<Arc<Self>> {
        ANSWER.try_with(Arc::clone).ok()
    }

    /// Runs the task of a stream, whose answer this is.
    pub fn scope<F: Future>(self: &Arc<Self>, stream: F) -> impl Future<Output = F::Output> {
        ANSWER.scope(self.clone(), stream)
    }

    /// Whether a part waits for its reader.
    pub fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Bytes that have left, but for some of the last part.
    pub fn moved(&self) -> usize {
        self.moved.load(Ordering::Relaxed)
    }

    /// Bytes of the last part that has left, some of which may wait for the
    /// connection.
    pub fn leaving(&self) -> usize {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Bytes that have not left, and are not counted as in flight.
    pub fn uncounted(&self) -> usize {
        if self.counted.load(Ordering::Relaxed) {
            0
        } else {
            self.rest.load(Ordering::Relaxed) + self.leaving()
        }
    }

    /// For whom it is held.
    pub fn holder(&self) -> Holder {
        self.owner().holder.clone().unwrap_or_default()
    }

    /// When the caller stops waiting for it, if that is known.
    pub fn deadline(&self) -> Option<Instant> {
        self.owner().deadline
    }

    /// Notes that its bytes are counted as in flight.
    pub fn is_counted(&self) {
        self.counted.store(true, Ordering::Relaxed);
    }

    /// For whom the answer is held.
    pub fn held_for(&self, holder: Holder) {
        // The first is the caller's.
        self.owner().holder.get_or_insert(holder);
    }

    /// When the caller stops waiting for it.
    pub fn until(&self, deadline: Instant) {
        // The first is the call's.
        self.owner().deadline.get_or_insert(deadline);
    }

    /// Notes for whom the answer is.
    pub fn describe(&self, known: &AnswerFor) {
        self.held_for(known.holder.clone());
        self.until(known.deadline);
        if known.counted {
            self.is_counted();
        }
    }

    /// Makes it the next answer of a connection that has one at a time.
    pub fn renew(&self) {
        *self.owner() = Owner::default();
        self.counted.store(false, Ordering::Relaxed);
    }

    fn owner(&self) -> MutexGuard<'_, Owner> {
        self.owner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a request has of its port until its answer has been sent.
#[derive(Debug)]
#[must_use = "it is given back when it is dropped"]
pub struct Open {
    /// Its connection is not idle.
    pub _busy: Busy,
    /// It is one of the open streams of all connections; none for a request
    /// that is refused since too many are open.
    pub stream: Option<OpenStream>,
    /// It is a request over HTTP/1.1, whose connection waits for its answer.
    pub _request: Option<InFlight>,
}

impl Open {
    /// The same of a request over HTTP/1.1.
    pub fn of(self, request: InFlight) -> Self {
        Self {
            _request: Some(request),
            ..self
        }
    }
}

/// The requests of a connection that has one at a time. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Requests(Arc<RequestsState>);

#[derive(Debug, Default)]
struct RequestsState {
    in_flight: AtomicUsize,
    /// Whether the caller of the last one takes interim responses.
    take_interim: AtomicBool,
}

/// A request until its answer has been sent.
#[derive(Debug)]
#[must_use = "it ends when it is dropped"]
pub struct InFlight(Requests);

impl Requests {
    /// A request of this version of HTTP has come.
    pub fn begin(&self, version: Version) -> InFlight {
        let takes = version == Version::HTTP_11;
        self.0.take_interim.store(takes, Ordering::Relaxed);
        self.0.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(self.clone())
    }

    /// Whether one waits for its answer, or for the rest of it.
    pub fn in_flight(&self) -> bool {
        self.0.in_flight.load(Ordering::Relaxed) > 0
    }

    /// Whether its caller takes interim responses, which HTTP/1.0 does not know.
    pub fn take_interim(&self) -> bool {
        self.0.take_interim.load(Ordering::Relaxed)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The body of an answer, in parts.
#[derive(Debug)]
pub struct Parts<B> {
    body: B,
    /// The rest of a chunk.
    chunk: Bytes,
    /// The length of the part that was handed over.
    part: usize,
    answer: Arc<Answer>,
    _open: Open,
}

impl<B: Body<Data = Bytes>> Parts<B> {
    /// Sends a body in parts.
    pub fn new(body: B, answer: Arc<Answer>, open: Open) -> Self {
        Self {
            body,
            chunk: Bytes::new(),
            part: 0,
            answer,
            _open: open,
        }
    }

    fn next_part(&mut self) -> Bytes {
        let length = self.chunk.len();
        let later = usize::try_from(self.body.size_hint().lower()).unwrap_or(usize::MAX);
        let part = if length > PART_BYTES_MAX {
            self.chunk.split_to(PART_BYTES_MAX)
        } else if later == 0 && length > LAST_PART_BYTES {
            self.chunk.split_to(length - LAST_PART_BYTES)
        } else {
            std::mem::take(&mut self.chunk)
        };
        self.part = part.len();
        let answer = &self.answer;
        answer.waiting.store(true, Ordering::Relaxed);
        let rest = later.saturating_add(self.chunk.len() + part.len());
        answer.rest.store(rest, Ordering::Relaxed);
        part
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Parts<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let own = &mut *self;
        // Whoever asks for more has sent what it has.
        let sent = std::mem::take(&mut own.part);
        own.answer.moved.fetch_add(sent, Ordering::Relaxed);
        own.answer.leaving.store(sent, Ordering::Relaxed);
        if own.chunk.is_empty() {
            let Poll::Ready(frame) = Pin::new(&mut own.body).poll_frame(context) else {
                // Everything was taken: the reader owes nothing.
                own.answer.waiting.store(false, Ordering::Relaxed);
                return Poll::Pending;
            };
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(chunk) if chunk.is_empty() => {
                        return Poll::Ready(Some(Ok(Frame::data(chunk))));
                    }
                    Ok(chunk) => own.chunk = chunk,
                    Err(frame) => return Poll::Ready(Some(Ok(frame))),
                },
                other => return Poll::Ready(other),
            }
        }
        Poll::Ready(Some(Ok(Frame::data(own.next_part()))))
    }

    fn is_end_stream(&self) -> bool {
        self.chunk.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.chunk.len() as u64;
        let hint = self.body.size_hint();
        let mut all = SizeHint::new();
        all.set_lower(hint.lower() + rest);
        if let Some(upper) = hint.upper() {
            all.set_upper(upper + rest);
        }
        all
    }
}
