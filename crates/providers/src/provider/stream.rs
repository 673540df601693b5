//! Responses to conversations that come as a stream of events.

use std::sync::Arc;

use futures::{StreamExt, stream};
use platform::pot::Holder;
use platform::tasks::spawn_owned;
use protocol::Error;
use reqwest::Response;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::{Permit, Provider};
use crate::chat::{ChatDelta, ChatStream, FinishReason, StreamProgress, TokenUsage};
use crate::error::ProviderError;
use crate::sse::EventParser;
use crate::usage::UsageMeter;

/// Bytes of one streamed response.
const STREAM_BYTES_MAX: usize = 64 << 20;
/// Parts that a service may be ahead of a slow reader.
const PARTS_AHEAD_MAX: usize = 16;

/// A response that has begun.
pub(crate) struct OpenStream {
    pub provider: Arc<Provider>,
    pub response: Response,
    /// The call is in flight until the response has ended.
    pub _permit: Permit,
    pub started: Instant,
    /// When the caller stops waiting.
    pub deadline: Instant,
    /// The estimated tokens of the messages, should the service report none.
    pub prompt_tokens: u64,
    /// Where what has come is recorded: a caller may leave at any time.
    pub usage: UsageMeter,
    /// Whose call it is.
    pub caller: Holder,
}

struct StreamReader {
    open: OpenStream,
    events: EventParser,
    progress: StreamProgress,
    /// The error after the texts received so far.
    error: Option<ProviderError>,
    /// Texts, and their bytes.
    texts: u64,
    text_bytes: usize,
    bytes: usize,
}

/// The parts of a response as they come. They are read whether anybody takes
/// them or not: a slow caller must not hold a permit for longer than it has
/// time. Dropping the stream ends the reading.
pub(crate) fn read(open: OpenStream) -> ChatStream {
    let reader = StreamReader {
        open,
        events: EventParser::default(),
        progress: StreamProgress::default(),
        error: None,
        texts: 0,
        text_bytes: 0,
        bytes: 0,
    };
    let (sender, receiver) = mpsc::channel(PARTS_AHEAD_MAX);
    let reading = spawn_owned(reader.run(sender));
    stream::unfold(Some((receiver, reading)), |state| async move {
        let (mut receiver, reading) = state?;
        match receiver.recv().await {
            Some(Ok(delta)) if delta.end.is_none() => Some((Ok(delta), Some((receiver, reading)))),
            Some(last) => Some((last, None)),
            // The caller did not take the parts in time.
            None => Some((Err(Error::deadline_passed()), None)),
        }
    })
    .boxed()
}

impl StreamReader {
    /// Sends the parts, until the last or until the receiver is dropped.
    async fn run(mut self, sender: mpsc::Sender<Result<ChatDelta, Error>>) {
        let deadline = self.open.deadline;
        loop {
            let item = match self.next().await {
                Ok(delta) => {
                    if let Some((_, usage)) = delta.end {
                        self.open.usage.succeeded(usage.into());
                        self.end(None);
                    }
                    Ok(delta)
                }
                Err(error) => Err(self.end(Some(&error))),
            };
            let last = !matches!(&item, Ok(delta) if delta.end.is_none());
            let sent = timeout_at(deadline, sender.send(item)).await;
            if last || !matches!(sent, Ok(Ok(()))) {
                return;
            }
        }
    }

    async fn next(&mut self) -> Result<ChatDelta, ProviderError> {
        loop {
            if let Some(text) = self.progress.texts.pop_front() {
                return Ok(ChatDelta { text, end: None });
            }
            if let Some(error) = self.error.take() {
                return Err(error);
            }
            if self.progress.done {
                return Ok(self.last());
            }
            let silent = Instant::now() + self.open.provider.settings.timeout;
            let until = self.open.deadline.min(silent);
            let chunk = timeout_at(until, self.open.response.chunk()).await;
            let chunk = chunk.map_err(|_| ProviderError::Timeout)?;
            match chunk.map_err(|_| ProviderError::ConnectionLost)? {
                Some(chunk) => self.error = self.take(&chunk).err(),
                // Some services close without marking the end; a response with
                // a finish reason is whole.
                None if self.progress.finish_reason.is_some() => self.progress.done = true,
                None => return Err(ProviderError::ConnectionLost),
            }
        }
    }

    fn take(&mut self, chunk: &[u8]) -> Result<(), ProviderError> {
        self.bytes += chunk.len();
        if self.bytes > STREAM_BYTES_MAX {
            return Err(ProviderError::ResponseTooLarge);
        }
        let dialect = self.open.provider.settings.kind;
        let events = self.events.push(chunk);
        for event in events.map_err(ProviderError::InvalidResponse)? {
            let before = self.progress.texts.len();
            let parsed = dialect.parse_chat_event(&event, &mut self.progress);
            for text in self.progress.texts.iter().skip(before) {
                self.texts += 1;
                self.text_bytes += text.len();
            }
            // What came before an error is charged too.
            self.open.usage.correct(self.received().into());
            parsed?;
        }
        Ok(())
    }

    /// The tokens until now: what the service has reported, and at least those
    /// that the text probably has. An event may have one token, or many.
    fn received(&self) -> TokenUsage {
        let reported = self.progress.usage.unwrap_or_default();
        let estimated = self.texts.max((self.text_bytes as u64).div_ceil(4));
        TokenUsage {
            prompt_tokens: match reported.prompt_tokens {
                0 => self.open.prompt_tokens,
                tokens => tokens,
            },
            completion_tokens: reported.completion_tokens.max(estimated),
        }
    }

    fn last(&self) -> ChatDelta {
        let reported = self.progress.usage.unwrap_or_default();
        let usage = reported.or_estimate(TokenUsage {
            prompt_tokens: self.open.prompt_tokens,
            completion_tokens: self.received().completion_tokens,
        });
        let reason = self.progress.finish_reason.unwrap_or(FinishReason::Other);
        ChatDelta {
            text: String::new(),
            end: Some((reason, usage)),
        }
    }

    /// Counts the outcome.
    fn end(&self, error: Option<&ProviderError>) -> Error {
        let open = &self.open;
        let provider = &open.provider;
        match error {
            // It is the caller's deadline that passed, which proves nothing.
            Some(ProviderError::Timeout) if Instant::now() >= open.deadline => {}
            error => provider.record_outcome(error, &self.open.caller),
        }
        let outcome = error.map_or("ok", ProviderError::outcome);
        provider
            .metrics
            .ended(&provider.name, outcome, open.started.elapsed());
        error
            .unwrap_or(&ProviderError::ConnectionLost)
            .to_error(&provider.name, "messages")
    }
}
