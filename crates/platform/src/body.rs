//! The body of a request as it comes over HTTP/2.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::rt::Executor;
use tokio::runtime::Handle;

use crate::tasks::ConnectionExecutor;

/// How much is read that nobody wants, and for how long.
const UNWANTED_BYTES_MAX: usize = 4 << 20;
const UNWANTED_TIME: Duration = Duration::from_secs(1);

/// A body that is read to its end, beside the answer, when it is dropped before.
///
/// HTTP/2 would reset the stream of a call that is answered before all of it
/// has come. The rest is on its way all the same: h2 takes it for an error of
/// the caller's and, after some thousand of those, breaks the connection with
/// every call that it has.
#[derive(Debug)]
pub struct RequestBody(Option<Incoming>);

impl From<Incoming> for RequestBody {
    fn from(body: Incoming) -> Self {
        Self(Some(body))
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        match &mut self.0 {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        let Some(body) = self.0.take().filter(|body| !body.is_end_stream()) else {
            return;
        };
        // Almost always it has come already.
        let mut reading = Box::pin(read_out(body));
        let ended = (&mut reading).now_or_never().is_some();
        if !ended && Handle::try_current().is_ok() {
            ConnectionExecutor.execute(async {
                // Whoever sends for longer finds the stream reset.
                let _ = tokio::time::timeout(UNWANTED_TIME, reading).await;
            });
        }
    }
}

async fn read_out(mut body: Incoming) {
    let mut left = UNWANTED_BYTES_MAX;
    while let Some(Ok(frame)) = body.frame().await {
        let length = frame.data_ref().map_or(0, Bytes::len);
        match left.checked_sub(length) {
            Some(less) => left = less,
            None => return,
        }
    }
}
