//! A generated text in parts, as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt, stream};
use http::header::CONTENT_TYPE;
use http::{HeaderName, StatusCode};
use protocol::Error;
use serde::Serialize;
use tokio::time::{Instant, timeout_at};

use super::context::RequestContext;
use super::error::ErrorFormat;
use super::request_id::RequestId;
use gateway::stack::{ChatDelta, ChatStream};

/// How the parts of a text become events.
pub trait EventFormat: Send + Sync + 'static {
    /// The JSON of an event.
    type Data: Serialize;

    /// The event before the first part.
    fn first(&self) -> Option<Self::Data>;
    /// The events of one part.
    fn part(&self, part: ChatDelta) -> Vec<Self::Data>;
    /// The data of the event after the last part, unless the stream failed.
    fn last(&self) -> Option<&'static str>;
}

/// A response of events. Dropping it cancels the provider's stream.
pub fn response(
    parts: ChatStream,
    format: impl EventFormat,
    errors: ErrorFormat,
    context: &RequestContext,
) -> Response {
    let events = Events {
        parts,
        pending: format.first().iter().map(json).collect(),
        format,
        ended: false,
        errors,
        id: context.id.clone(),
        deadline: context.stream_deadline,
    };
    (headers(), Sse::new(events.into_stream())).into_response()
}

/// The headers of a response of events.
pub fn headers() -> [(HeaderName, &'static str); 2] {
    [
        (CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        // A proxy must not buffer the events.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ]
}

/// The data of an event that is an error: the status is sent already.
pub fn error(error: &Error, format: ErrorFormat, id: &RequestId) -> serde_json::Value {
    let status = StatusCode::from_u16(error.kind().http_status());
    let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    format.body(error, status, id)
}

struct Events<F> {
    parts: ChatStream,
    format: F,
    /// Those of one part at most, so that there are few.
    pending: VecDeque<Event>,
    ended: bool,
    errors: ErrorFormat,
    id: RequestId,
    deadline: Instant,
}

impl<F: EventFormat> Events<F> {
    fn into_stream(self) -> impl Stream<Item = Result<Event, Infallible>> + Send {
        stream::unfold(self, |mut events| async move {
            let next = events.next().await?;
            Some((Ok(next), events))
        })
    }

    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match timeout_at(self.deadline, self.parts.next()).await {
                Ok(Some(Ok(part))) => {
                    let events = self.format.part(part);
                    self.pending.extend(events.iter().map(json));
                }
                Ok(Some(Err(error))) => self.fail(&error),
                Ok(None) => {
                    self.ended = true;
                    let last = self.format.last();
                    self.pending
                        .extend(last.map(|last| Event::default().data(last)));
                }
                Err(_) => self.fail(&Error::deadline_passed()),
            }
        }
    }

    /// The error is the last event.
    fn fail(&mut self, failure: &Error) {
        self.ended = true;
        let body = error(failure, self.errors, &self.id);
        self.pending.push_back(json(&body));
    }
}

fn json(data: &impl Serialize) -> Event {
    // No map here has keys that are no strings, which is all that could fail.
    Event::default().json_data(data).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use http_body_util::BodyExt;
    use protocol::Kind;
    use serde_json::{Value, json};
    use std::time::Duration;

    use super::*;

    struct Plain;

    impl EventFormat for Plain {
        type Data = Value;

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

    async fn written(parts: ChatStream, timeout: Duration) -> String {
        let events = Events {
            parts,
            pending: Plain.first().iter().map(super::json).collect(),
            format: Plain,
            ended: false,
            errors: ErrorFormat::OpenAi,
            id: RequestId(HeaderValue::from_static("1")),
            deadline: Instant::now() + timeout,
        };
        let body = Sse::new(events.into_stream()).into_response().into_body();
        let bytes = body.collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    fn part(text: &str) -> Result<ChatDelta, Error> {
        Ok(ChatDelta::from_text(text))
    }

    #[tokio::test]
    async fn parts_are_events_and_so_is_the_end() {
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
    async fn a_provider_that_hangs_is_cut_at_the_deadline() {
        let parts = stream::iter([part("a")]).chain(stream::pending()).boxed();
        let text = written(parts, Duration::ZERO).await;
        assert!(text.starts_with("data: \"first\"\n\ndata: \"a\""), "{text}");
        assert!(
            text.contains(&Error::deadline_passed().to_string()),
            "{text}"
        );
        assert!(!text.contains("[DONE]"));
    }
}
