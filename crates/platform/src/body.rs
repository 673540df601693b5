//! Request bodies, and the rest of those that are not read to their end.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::timeout;

use crate::tasks::ScopeHandle;

/// How much of a rejected request is still read, and for how long.
const DISCARDED_BYTES_MAX: usize = 4 << 20;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(1);

/// Reads the rest of a body, within limits, and drops it: many clients see no
/// response before they have sent everything.
pub async fn discard(body: impl Body<Data = Bytes> + Unpin) {
    // A client that sends for longer finds the stream or connection closed.
    let _ = timeout(DISCARD_TIMEOUT, read_to_end(body)).await;
}

async fn read_to_end(mut body: impl Body<Data = Bytes> + Unpin) {
    let mut left = DISCARDED_BYTES_MAX;
    while let Some(Ok(frame)) = body.frame().await {
        let length = frame.data_ref().map_or(0, Bytes::len);
        match left.checked_sub(length) {
            Some(less) => left = less,
            None => return,
        }
    }
}

/// The body of an HTTP/2 request. When it is dropped early, the rest is read
/// and discarded by a task of its connection.
///
/// HTTP/2 would reset the stream of a call whose response is complete before
/// its request is. The rest of the request arrives all the same: h2 counts it
/// as an error of the client and, after some thousand of those, closes the
/// connection with every call in flight. See docs/decisions/own_grpc_path.md.
#[derive(Debug)]
pub struct RequestBody {
    body: Option<Incoming>,
    connection: ScopeHandle,
}

impl RequestBody {
    /// A body whose rest is read by a task of `connection`.
    pub fn new(body: Incoming, connection: ScopeHandle) -> Self {
        Self {
            body: Some(body),
            connection,
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        let Some(body) = self.body.take().filter(|body| !body.is_end_stream()) else {
            return;
        };
        // Almost always the rest has arrived already.
        let mut reading = Box::pin(read_to_end(body));
        if (&mut reading).now_or_never().is_none() {
            self.connection.spawn(async {
                // A client that sends for longer finds the stream reset.
                let _ = timeout(DISCARD_TIMEOUT, reading).await;
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::StreamBody;

    /// A body that sends a chunk of so many bytes at an interval, without end.
    fn endless(bytes: usize, pause: Duration) -> impl Body<Data = Bytes> + Unpin {
        let chunks = futures::stream::repeat_with(move || async move {
            tokio::time::sleep(pause).await;
            Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from(vec![0; bytes])))
        });
        StreamBody::new(Box::pin(futures::StreamExt::buffered(chunks, 1)))
    }

    #[tokio::test(start_paused = true)]
    async fn discarding_ends_by_bytes_and_by_time() {
        read_to_end(endless(1 << 20, Duration::ZERO)).await;
        let begun = tokio::time::Instant::now();
        discard(endless(1, Duration::from_millis(10))).await;
        assert!(begun.elapsed() >= DISCARD_TIMEOUT);
    }
}
