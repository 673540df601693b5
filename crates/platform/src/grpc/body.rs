use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use http::{HeaderMap, HeaderValue};
use http_body::{Frame, SizeHint};
use tokio::time::Instant;
use tonic::Status;

use super::BytesHeld;
use super::status::bounded;
use crate::answer::Answer;
use crate::pot::Holder;
use crate::streams::OpenStream;

/// The body of a gRPC request or response.
pub struct Body {
    frames: Frames,
    /// A value that lives until the body has been sent, for example a permit.
    guard: Option<Box<dyn Send + Sync>>,
    /// For whom its bytes are held; the peer if nobody is named.
    holder: Option<Holder>,
    /// Whether its bytes are counted as in flight by what it guards.
    counted: bool,
}

enum Frames {
    /// Data that is complete, then trailers if any.
    Whole {
        chunks: std::vec::IntoIter<Bytes>,
        first: Option<Bytes>,
        trailers: Option<HeaderMap>,
    },
    /// Framed messages as they are produced, then their status.
    Stream(BoxStream<'static, Result<Bytes, Status>>),
    /// The status of a stream was sent.
    Ended,
    /// The body of a stream of a generated tonic service.
    Tonic(tonic::body::Body, Ending),
}

/// Returns why a stream must end before its body does.
type Ending = BoxFuture<'static, Status>;

impl Body {
    /// No data and no trailers.
    pub fn empty() -> Self {
        Self::whole(None, Vec::new(), None)
    }

    /// One framed message and an OK status.
    pub fn unary(framed: Bytes) -> Self {
        Self::whole(Some(framed), Vec::new(), Some(ok_trailers()))
    }

    /// Data as it was received, and its trailers.
    pub fn whole(first: Option<Bytes>, rest: Vec<Bytes>, trailers: Option<HeaderMap>) -> Self {
        Self {
            frames: Frames::Whole {
                chunks: rest.into_iter(),
                first,
                trailers,
            },
            guard: None,
            holder: None,
            counted: false,
        }
    }

    /// Framed messages as they are produced, then their status.
    pub fn stream(messages: BoxStream<'static, Result<Bytes, Status>>) -> Self {
        Self {
            frames: Frames::Stream(messages),
            guard: None,
            holder: None,
            counted: false,
        }
    }

    /// The body of a stream of a generated tonic service.
    pub(crate) fn tonic_stream(body: tonic::body::Body, open: OpenStream) -> Self {
        Self {
            frames: Frames::Tonic(body, Box::pin(async move { open.evicted().await })),
            guard: None,
            holder: None,
            counted: false,
        }
    }

    /// Counts the bytes as in flight until the body has been sent or dropped.
    #[must_use]
    pub fn counted(mut self, held: Vec<BytesHeld>) -> Self {
        self.counted = !held.is_empty();
        self.guarded(held)
    }

    /// Names for whom the bytes are held.
    #[must_use]
    pub fn held_for(mut self, holder: Holder) -> Self {
        self.holder = Some(holder);
        self
    }

    /// Tells what sends the body what it must know. An answer that is whole must
    /// be read by the deadline of its call.
    pub(crate) fn describe(&self, answer: &Answer, deadline: Instant) {
        if let Some(holder) = &self.holder {
            answer.held_for(holder.clone());
        }
        if self.counted {
            answer.is_counted();
        }
        if matches!(self.frames, Frames::Whole { .. }) {
            answer.until(deadline);
        }
    }

    /// Keeps a value alive until the body has been sent or dropped.
    #[must_use]
    pub fn guarded(mut self, guard: impl Send + Sync + 'static) -> Self {
        self.guard = Some(match self.guard.take() {
            Some(other) => Box::new((other, guard)),
            None => Box::new(guard),
        });
        self
    }
}

impl std::fmt::Debug for Body {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Body")
    }
}

fn ok_trailers() -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    trailers
}

fn status_trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    let status = bounded(status);
    if status.add_header(&mut trailers).is_err() {
        trailers.insert("grpc-status", HeaderValue::from(status.code() as i32));
    }
    trailers
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let body = self.get_mut();
        match &mut body.frames {
            Frames::Whole {
                chunks,
                first,
                trailers,
            } => {
                let data = first.take().or_else(|| chunks.next());
                let frame = match data {
                    Some(data) => Some(Frame::data(data)),
                    None => trailers.take().map(Frame::trailers),
                };
                Poll::Ready(frame.map(Ok))
            }
            Frames::Stream(messages) => {
                let frame = match ready!(messages.as_mut().poll_next(context)) {
                    Some(Ok(message)) => Frame::data(message),
                    Some(Err(status)) => {
                        body.frames = Frames::Ended;
                        Frame::trailers(status_trailers(&status))
                    }
                    None => {
                        body.frames = Frames::Ended;
                        Frame::trailers(ok_trailers())
                    }
                };
                Poll::Ready(Some(Ok(frame)))
            }
            Frames::Ended => Poll::Ready(None),
            Frames::Tonic(tonic, ending) => {
                let frame = Pin::new(tonic).poll_frame(context);
                if frame.is_ready() {
                    return frame;
                }
                let status = ready!(ending.as_mut().poll(context));
                body.frames = Frames::Ended;
                Poll::Ready(Some(Ok(Frame::trailers(status_trailers(&status)))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.frames {
            Frames::Whole {
                chunks,
                first,
                trailers,
            } => first.is_none() && chunks.len() == 0 && trailers.is_none(),
            Frames::Stream(_) => false,
            Frames::Ended => true,
            Frames::Tonic(tonic, _) => tonic.is_end_stream(),
        }
    }

    /// No exact size: a gRPC response has no `content-length`.
    fn size_hint(&self) -> SizeHint {
        let mut hint = SizeHint::default();
        if let Frames::Whole { chunks, first, .. } = &self.frames {
            let rest = chunks.as_slice().iter().chain(first);
            hint.set_lower(rest.map(|chunk| chunk.len() as u64).sum());
        }
        hint
    }
}
