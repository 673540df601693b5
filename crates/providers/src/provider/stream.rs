//! Responses to conversations that come as a stream of events.

use std::sync::Arc;

use futures::{StreamExt, future, stream};
use platform::pot::Holder;
use platform::tasks::spawn_owned;
use protocol::Error;
use reqwest::Response;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::{Permit, Provider};
use crate::chat::{ChatDelta, ChatStream, StreamProgress};
use crate::error::ProviderError;
use crate::reported::{ReportedUsage, TokenUsage, reported_usage};
use crate::sse::{Event, EventParser};
use crate::usage::UsageMeter;

/// Bytes of one streamed response.
pub(super) const STREAM_BYTES_MAX: usize = 64 << 20;
/// Bytes of a response that came in one piece, as of one event.
const WHOLE_BYTES_MAX: usize = 1 << 20;
/// Parts that a service may be ahead of a slow reader.
const PARTS_AHEAD_MAX: usize = 16;

/// A response that has been opened: its headers have come.
pub(crate) struct OpenStream {
    pub provider: Arc<Provider>,
    pub response: Response,
    /// The call is in flight until the response has ended.
    pub _permit: Permit,
    pub started: Instant,
    /// When the first text must have come.
    pub begins_by: Instant,
    /// When the caller stops waiting.
    pub deadline: Instant,
    /// The estimated tokens of the messages, should the service report none.
    pub prompt_tokens: u64,
    /// Where what has come is recorded: a caller may leave at any time.
    pub usage: UsageMeter,
    /// Whose call it is.
    pub caller: Holder,
}

impl OpenStream {
    /// When the caller stops waiting, for the beginning of the response or its
    /// end.
    pub fn ends(&self, begun: bool) -> Instant {
        if begun { self.deadline } else { self.begins_by }
    }

    /// A response that failed before it began costs what the service reports, and
    /// nothing where it reports an error alone.
    pub fn charge_failure(&self, error: &ProviderError, reported: ReportedUsage) {
        self.usage.failed(error);
        if reported.is_known() {
            let used = reported.or_estimate(TokenUsage::default());
            self.usage.correct(used.into());
        }
    }

    /// Counts the outcome. The error is that of the caller, whose `field` was sent.
    pub fn end(&self, begun: bool, error: Option<&ProviderError>, field: &str) -> Error {
        let provider = &self.provider;
        // A deadline of the caller that passed proves nothing, unless the service
        // had long enough to begin.
        let passed = error == Some(&ProviderError::Timeout) && Instant::now() >= self.ends(begun);
        if !passed || (!begun && provider.is_late(self.started)) {
            provider.record_outcome(error, &self.caller);
        }
        let outcome = error.map_or("ok", ProviderError::outcome);
        let took = self.started.elapsed();
        provider.metrics.ended(&provider.name, outcome, took);
        let error = error.unwrap_or(&ProviderError::ConnectionLost);
        error.to_error(&provider.name, field)
    }
}

struct StreamReader {
    open: OpenStream,
    body: Body,
    progress: StreamProgress,
    /// The error after the parts received so far.
    error: Option<ProviderError>,
    /// Whether a part has been passed on.
    begun: bool,
    /// When the last event came, or the last part was taken: comments, which
    /// keep a connection alive, are no sign of a response.
    heard: Instant,
    /// Parts, and the bytes of what the model wrote.
    parts: u64,
    written: usize,
    bytes: usize,
}

/// What the service sends. Its first byte tells, where content types are often
/// wrong: no line of an event stream begins with a bracket.
enum Body {
    /// Nothing has come but white space.
    Unknown,
    Events(EventParser),
    /// JSON: an error, or a whole response of a service that has no streams.
    Whole(Vec<u8>),
    /// A page for people, as of a proxy.
    Page,
}

impl Body {
    fn beginning_with(first: u8) -> Self {
        match first {
            b'{' | b'[' => Self::Whole(Vec::new()),
            b'<' => Self::Page,
            _ => Self::Events(EventParser::default()),
        }
    }
}

/// Whether a byte tells nothing about a body: white space, or a part of a byte
/// order mark.
pub(super) fn is_blank(byte: u8) -> bool {
    byte.is_ascii_whitespace() || matches!(byte, 0xef | 0xbb | 0xbf)
}

/// The parts of a response as they come, once the first has. They are read
/// whether anybody takes them or not: a slow caller must not hold a permit for
/// longer than it has time. Dropping the stream ends the reading.
pub(crate) async fn begin(open: OpenStream) -> Result<ChatStream, Error> {
    let mut reader = StreamReader {
        open,
        body: Body::Unknown,
        progress: StreamProgress::default(),
        error: None,
        begun: false,
        heard: Instant::now(),
        parts: 0,
        written: 0,
        bytes: 0,
    };
    let first = reader.item().await?;
    if first.usage.is_some() {
        return Ok(stream::once(future::ready(Ok(first))).boxed());
    }
    let (sender, receiver) = mpsc::channel(PARTS_AHEAD_MAX);
    let reading = spawn_owned(reader.run(sender));
    let others = stream::unfold(Some((receiver, reading)), |state| async move {
        let (mut receiver, reading) = state?;
        match receiver.recv().await {
            Some(Ok(delta)) if delta.usage.is_none() => {
                Some((Ok(delta), Some((receiver, reading))))
            }
            Some(last) => Some((last, None)),
            // The caller did not take the parts in time.
            None => Some((Err(Error::deadline_passed()), None)),
        }
    });
    Ok(stream::once(future::ready(Ok(first))).chain(others).boxed())
}

impl StreamReader {
    /// Sends the parts, until the last or until the receiver is dropped.
    async fn run(mut self, sender: mpsc::Sender<Result<ChatDelta, Error>>) {
        let deadline = self.open.deadline;
        loop {
            let item = self.item().await;
            let last = !matches!(&item, Ok(delta) if delta.usage.is_none());
            let sent = timeout_at(deadline, sender.send(item)).await;
            if last || !matches!(sent, Ok(Ok(()))) {
                return;
            }
        }
    }

    /// The next part. The last, or an error, is recorded.
    async fn item(&mut self) -> Result<ChatDelta, Error> {
        match self.next().await {
            Ok(delta) => {
                self.begun = true;
                if let Some(usage) = delta.usage {
                    self.open.usage.succeeded(usage.into());
                    self.end(None);
                }
                Ok(delta)
            }
            Err(error) => {
                if !self.begun {
                    // What has come of one that fails later is recorded already.
                    self.open.charge_failure(&error, self.progress.usage);
                }
                Err(self.end(Some(&error)))
            }
        }
    }

    async fn next(&mut self) -> Result<ChatDelta, ProviderError> {
        // The time of a slow reader is not the service's.
        self.heard = Instant::now();
        loop {
            if let Some(part) = self.progress.parts.pop_front() {
                return Ok(part);
            }
            if let Some(error) = self.error.take() {
                return Err(error);
            }
            if self.progress.done {
                self.finish()?;
                continue;
            }
            let silent = self.heard + self.open.provider.settings.timeout;
            let until = self.open.ends(self.begun).min(silent);
            let chunk = timeout_at(until, self.open.response.chunk()).await;
            let chunk = chunk.map_err(|_| ProviderError::Timeout)?;
            match chunk.map_err(|_| ProviderError::ConnectionLost)? {
                Some(chunk) => self.error = self.take(&chunk).err(),
                None => {
                    self.error = self.take_end().err();
                    // Some services close without marking the end; a response
                    // with a finish reason is whole.
                    self.progress.done = true;
                }
            }
        }
    }

    fn take(&mut self, chunk: &[u8]) -> Result<(), ProviderError> {
        self.bytes += chunk.len();
        if self.bytes > STREAM_BYTES_MAX {
            return Err(ProviderError::ResponseTooLarge);
        }
        let mut chunk = chunk;
        if matches!(self.body, Body::Unknown) {
            let begin = chunk.iter().position(|byte| !is_blank(*byte));
            chunk = &chunk[begin.unwrap_or(chunk.len())..];
            let Some(first) = chunk.first() else {
                return Ok(());
            };
            self.body = Body::beginning_with(*first);
        }
        let mut events = Vec::new();
        let pushed = match &mut self.body {
            Body::Unknown => return Ok(()),
            Body::Events(parser) => parser.push(chunk, &mut events),
            Body::Whole(body) if self.bytes <= WHOLE_BYTES_MAX => {
                body.extend_from_slice(chunk);
                self.heard = Instant::now();
                return Ok(());
            }
            Body::Whole(_) => return Err(ProviderError::ResponseTooLarge),
            Body::Page => return Err(ProviderError::InvalidResponse("a page in HTML")),
        };
        for event in events {
            self.take_event(&event)?;
        }
        pushed.map_err(ProviderError::InvalidResponse)
    }

    /// The body has ended.
    fn take_end(&mut self) -> Result<(), ProviderError> {
        match &mut self.body {
            Body::Unknown => Ok(()),
            Body::Events(events) => {
                let last = events.finish().map_err(ProviderError::InvalidResponse)?;
                last.map_or(Ok(()), |event| self.take_event(&event))
            }
            Body::Whole(body) => {
                let body = std::mem::take(body);
                let parsed = self.open.provider.settings.kind.parse_chat(&body);
                if parsed.is_err() {
                    self.progress.usage.update(reported_usage(&body));
                }
                let taken = self.progress.take_whole(parsed?);
                self.count(0);
                taken
            }
            Body::Page => Err(ProviderError::InvalidResponse("a page in HTML")),
        }
    }

    fn take_event(&mut self, event: &Event) -> Result<(), ProviderError> {
        self.heard = Instant::now();
        let dialect = self.open.provider.settings.kind;
        let before = self.progress.parts.len();
        let parsed = dialect.parse_chat_event(event, &mut self.progress);
        self.count(before);
        parsed
    }

    /// Counts the parts from a position of the queue on: what came before an
    /// error is charged too.
    fn count(&mut self, before: usize) {
        for part in self.progress.parts.iter().skip(before) {
            self.parts += 1;
            self.written += part.bytes();
        }
        self.open.usage.correct(self.received().into());
    }

    /// The tokens until now: what the service has reported, and at least those
    /// that the text probably has. An event may have one token, or many.
    fn received(&self) -> TokenUsage {
        let estimate = self.estimate();
        let reported = self.progress.usage.or_estimate(estimate);
        TokenUsage {
            completion_tokens: reported.completion_tokens.max(estimate.completion_tokens),
            ..reported
        }
    }

    fn estimate(&self) -> TokenUsage {
        TokenUsage {
            prompt_tokens: self.open.prompt_tokens,
            completion_tokens: self.parts.max((self.written as u64).div_ceil(4)),
        }
    }

    /// Adds the parts that end the choices. The last of them has the usage.
    fn finish(&mut self) -> Result<(), ProviderError> {
        if !self.progress.is_complete() {
            return Err(ProviderError::Incomplete);
        }
        let usage = self.progress.usage.or_estimate(self.estimate());
        let ends = self.progress.choices.iter();
        let ends = ends.map(|(choice, finish_reason)| ChatDelta {
            choice: *choice,
            finish_reason: *finish_reason,
            ..ChatDelta::default()
        });
        self.progress.parts.extend(ends);
        if let Some(last) = self.progress.parts.back_mut() {
            last.usage = Some(usage);
        }
        Ok(())
    }

    fn end(&self, error: Option<&ProviderError>) -> Error {
        self.open.end(self.begun, error, "messages")
    }
}
