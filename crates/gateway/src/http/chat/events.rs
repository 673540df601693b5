//! An answer in parts, as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderName, StatusCode};
use protocol::Error;
use providers::{ChatDelta, ChatStream};
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use super::super::gate::{RequestId, Visit};
use super::super::problem::Shape;

/// How the parts of an answer are written.
pub trait Events: Send + Sync + 'static {
    /// What comes before the first part.
    fn first(&self) -> Option<Value>;
    /// The events of one part.
    fn part(&self, part: ChatDelta) -> Vec<Value>;
    /// What comes after the last part of an answer that is whole.
    fn last(&self) -> Option<&'static str>;
}

/// A response of events. Dropping it ends the answer at its source.
pub fn response(parts: ChatStream, writer: impl Events, shape: Shape, visit: &Visit) -> Response {
    let events = Parts {
        parts,
        waiting: writer.first().iter().map(event).collect(),
        writer,
        ended: false,
        shape,
        id: visit.id.clone(),
        deadline: visit.ends,
    };
    let headers = [
        (CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (CACHE_CONTROL, "no-cache"),
        // A proxy that gathers the parts would undo them.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(events.into_stream())).into_response()
}

struct Parts<W> {
    parts: ChatStream,
    writer: W,
    /// Of one part, so that there are few.
    waiting: VecDeque<Bytes>,
    ended: bool,
    shape: Shape,
    id: RequestId,
    deadline: Instant,
}

impl<W: Events> Parts<W> {
    fn into_stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
        stream::unfold(self, |mut events| async move {
            let next = events.next().await?;
            Some((Ok(next), events))
        })
    }

    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match timeout_at(self.deadline, self.parts.next()).await {
                Ok(Some(Ok(part))) => {
                    let events = self.writer.part(part);
                    self.waiting.extend(events.iter().map(event));
                }
                Ok(Some(Err(error))) => self.fail(&error),
                Ok(None) => {
                    self.ended = true;
                    let last = self.writer.last();
                    self.waiting.extend(last.map(|last| line(last.as_bytes())));
                }
                Err(_) => self.fail(&Error::deadline_passed()),
            }
        }
    }

    /// The status is sent already: the error is the last event.
    fn fail(&mut self, error: &Error) {
        self.ended = true;
        let status = StatusCode::from_u16(error.kind().http_status());
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = self.shape.body(error, status, &self.id);
        self.waiting.push_back(event(&body));
    }
}

fn event(value: &Value) -> Bytes {
    line(value.to_string().as_bytes())
}

/// JSON has no line breaks outside its texts, and writes those inside as two
/// characters.
fn line(data: &[u8]) -> Bytes {
    [b"data: ", data, b"\n\n"].concat().into()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use protocol::Kind;
    use serde_json::json;
    use std::time::Duration;

    use super::*;

    struct Plain;

    impl Events for Plain {
        fn first(&self) -> Option<Value> {
            Some(json!("first"))
        }

        fn part(&self, part: ChatDelta) -> Vec<Value> {
            vec![json!(part.text)]
        }

        fn last(&self) -> Option<&'static str> {
            Some("[DONE]")
        }
    }

    async fn written(parts: ChatStream, patience: Duration) -> String {
        let events = Parts {
            parts,
            waiting: Plain.first().iter().map(event).collect(),
            writer: Plain,
            ended: false,
            shape: Shape::OpenAi,
            id: RequestId(HeaderValue::from_static("1")),
            deadline: Instant::now() + patience,
        };
        let all: Vec<_> = events.into_stream().collect().await;
        let bytes: Vec<u8> = all.into_iter().flat_map(|part| part.unwrap()).collect();
        String::from_utf8(bytes).unwrap()
    }

    fn part(text: &str) -> Result<ChatDelta, Error> {
        Ok(ChatDelta {
            text: text.into(),
            end: None,
        })
    }

    #[tokio::test]
    async fn parts_are_events_and_the_end_is_said() {
        let parts = stream::iter([part("a\nb"), part("c")]).boxed();
        let text = written(parts, Duration::from_secs(60)).await;
        assert_eq!(
            text,
            "data: \"first\"\n\ndata: \"a\\nb\"\n\ndata: \"c\"\n\ndata: [DONE]\n\n"
        );
    }

    #[tokio::test]
    async fn an_error_is_the_last_event() {
        let error = Error::new(Kind::NotReady, "provider 'x' broke off");
        let parts = stream::iter([part("a"), Err(error), part("b")]).boxed();
        let text = written(parts, Duration::from_secs(60)).await;
        let last = text.trim_end().rsplit("data: ").next().unwrap();
        let last: Value = serde_json::from_str(last).unwrap();
        assert_eq!(last["error"]["message"], "provider 'x' broke off");
        assert!(!text.contains("[DONE]"));
    }

    #[tokio::test]
    async fn a_source_that_hangs_ends_at_the_deadline() {
        let parts = stream::iter([part("a")]).chain(stream::pending()).boxed();
        let text = written(parts, Duration::ZERO).await;
        assert!(text.starts_with("data: \"first\"\n\ndata: \"a\""), "{text}");
        assert!(text.contains("the deadline passed"), "{text}");
        assert!(!text.contains("[DONE]"));
    }
}
