//! Streams that wait: for a caller's next message, or for something to report.
//! They have no deadline, and none is ended for being idle. They are bounded for
//! each connection, for each holder and in all: at the bound the newest is
//! refused, and when the process has few left, the idlest goes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::metrics::{Bound, Metrics};
use crate::peer::Peer;
use crate::pot::Holder;
use crate::seats::{Busy, Occupant, Seat, Seats};

/// When another stream may be opened.
const RETRY: Duration = Duration::from_secs(1);

/// The streams of a process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Streams(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    seats: Seats,
    per_connection: usize,
    full: Bound,
    connection_full: Bound,
}

/// An open stream, until it is dropped.
#[derive(Debug)]
pub struct OpenStream {
    seat: Seat,
    counted: CountedStream,
    evicted: Bound,
}

impl Streams {
    /// At most so many streams in all, and so many of one connection: limits that
    /// `--waiting-streams-max` and `--waiting-streams-per-connection-max` set.
    pub fn new(max: usize, per_connection: usize, metrics: &Metrics) -> Self {
        let seats = Seats::new(max);
        let read = seats.clone();
        metrics.reading("andon_waiting_streams", "Open streams", move || {
            read.count()
        });
        Self(Arc::new(Inner {
            seats,
            per_connection,
            full: metrics.bound("--waiting-streams-max"),
            connection_full: metrics.bound("--waiting-streams-per-connection-max"),
        }))
    }

    /// Open streams.
    pub fn count(&self) -> usize {
        self.0.seats.count()
    }

    /// Opens a stream for a holder: a tenant, or the peer where nobody asks who
    /// it is.
    pub fn open(&self, peer: &Arc<Peer>, holder: &Holder) -> Result<OpenStream, Status> {
        let inner = &self.0;
        let counted = CountedStream(peer.clone());
        let before = peer.connection.0.waiting.fetch_add(1, Ordering::Relaxed);
        if before >= inner.per_connection {
            inner.connection_full.reached();
            return Err(refused("the connection has as many open streams as it may"));
        }
        let occupant = Occupant {
            end: peer.connection.0.end.child_token(),
            ..Occupant::default()
        };
        let seat = inner.seats.take(holder, occupant).map_err(|_| {
            inner.full.reached();
            refused("overloaded: too many open streams")
        })?;
        Ok(OpenStream {
            seat,
            counted,
            evicted: inner.full.clone(),
        })
    }
}

/// A stream of a connection.
#[derive(Debug)]
struct CountedStream(Arc<Peer>);

impl Drop for CountedStream {
    fn drop(&mut self) {
        self.0.connection.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// UNAVAILABLE, to be tried again.
pub(crate) fn refused(message: &str) -> Status {
    let details = ErrorDetails::with_retry_info(Some(RETRY));
    Status::with_error_details(Code::Unavailable, message, details)
}

impl OpenStream {
    /// Notes that a message moved.
    pub fn touch(&self) {
        self.seat.touch();
    }

    /// Keeps the stream from being idle until the guard is dropped: a message of
    /// it is in flight.
    pub fn busy(&self) -> Busy {
        self.seat.busy()
    }

    /// Returns when the stream must end: few are left, or its connection closes.
    pub async fn evicted(&self) -> Status {
        self.seat.end().cancelled().await;
        if !self.counted.0.connection.0.end.is_cancelled() {
            self.evicted.reached();
        }
        refused("the stream was idle, and the server has too many open streams")
    }

    /// The same messages, with this stream's place held until they end; they end
    /// early when it must be left.
    pub fn hold<T: Send + 'static>(
        self,
        messages: BoxStream<'static, Result<T, Status>>,
    ) -> BoxStream<'static, Result<T, Status>> {
        stream::unfold(Some((self, messages)), |state| async {
            let (open, mut messages) = state?;
            tokio::select! {
                biased;
                next = messages.next() => {
                    open.touch();
                    next.map(|next| (next, Some((open, messages))))
                }
                status = open.evicted() => Some((Err(status), None)),
            }
        })
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> Arc<Peer> {
        Arc::default()
    }

    fn code<T>(result: Result<T, Status>) -> Code {
        result.err().map_or(Code::Ok, |status| status.code())
    }

    #[tokio::test]
    async fn streams_are_bounded_per_connection_and_per_holder() {
        let metrics = Metrics::default();
        let streams = Streams::new(8, 3, &metrics);
        let (a, b) = (Holder::Tenant("a".into()), Holder::Tenant("b".into()));
        let connection = peer();
        let mut open: Vec<_> = (0..3)
            .map(|_| streams.open(&connection, &a).unwrap())
            .collect();
        assert_eq!(code(streams.open(&connection, &a)), Code::Unavailable);
        open.push(streams.open(&peer(), &b).unwrap());
        open.push(streams.open(&peer(), &a).unwrap());
        assert_eq!(
            code(streams.open(&peer(), &a)),
            Code::Unavailable,
            "its share"
        );
        assert_eq!(code(streams.open(&peer(), &b)), Code::Ok);
        open.clear();
        assert_eq!(streams.count(), 0);
        assert_eq!(code(streams.open(&connection, &a)), Code::Ok);
        let text = metrics.to_text().unwrap();
        for flag in ["waiting-streams-max", "waiting-streams-per-connection-max"] {
            let line = format!("andon_limits_reached_total{{flag=\"--{flag}\"}} 1");
            assert!(text.contains(&line), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_stream_stays_until_few_are_left() {
        let streams = Streams::new(8, 100, &Metrics::default());
        let a = Holder::Tenant("a".into());
        let silent = || stream::pending::<Result<(), Status>>().boxed();
        let mut oldest = streams.open(&peer(), &a).unwrap().hold(silent());
        let days = tokio::time::timeout(Duration::from_secs(3 * 24 * 3600), oldest.next());
        assert!(days.await.is_err());
        let busy = streams.open(&peer(), &a).unwrap();
        let _busy = busy.busy();
        let _others: Vec<_> = (0..5).map(|_| streams.open(&peer(), &a).unwrap()).collect();
        assert!(futures::poll!(oldest.next()).is_pending());
        let _new = streams.open(&peer(), &a).unwrap();
        let end = oldest.next().await.unwrap().unwrap_err();
        assert_eq!(end.code(), Code::Unavailable);
        assert!(oldest.next().await.is_none());
    }

    #[tokio::test]
    async fn streams_end_with_a_connection_that_must_be_closed() {
        let streams = Streams::new(8, 100, &Metrics::default());
        let connection = peer();
        let silent = stream::pending::<Result<(), Status>>().boxed();
        let open = streams.open(&connection, &Holder::Own).unwrap();
        let mut messages = open.hold(silent);
        connection.connection.0.end.cancel();
        assert!(messages.next().await.unwrap().is_err());
    }
}
