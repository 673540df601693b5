//! Answers that come in parts.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use platform::tasks::owned;
use protocol::Error;
use reqwest::Response;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::catalogue::Shape;
use super::chat::{ChatDelta, ChatStream, ChatUsage, Finish};
use super::sse::Events;
use super::trouble::Trouble;
use super::{Place, Provider, anthropic, openai};

/// Bytes of one answer that comes in parts.
const STREAM_BYTES_MAX: usize = 64 << 20;
/// Parts that a service may be ahead of a slow reader.
const AHEAD_MAX: usize = 16;

/// What has come of an answer.
#[derive(Debug, Default)]
pub struct Progress {
    /// Texts that have not been passed on.
    pub texts: VecDeque<String>,
    /// Why the answer ended.
    pub finish: Option<Finish>,
    /// What it took, as far as it is known.
    pub usage: Option<ChatUsage>,
    /// Whether the service said that this is all.
    pub done: bool,
}

impl Progress {
    /// A text comes next.
    pub fn say(&mut self, text: String) {
        if !text.is_empty() {
            self.texts.push_back(text);
        }
    }
}

/// An answer that has begun.
pub struct Begun {
    pub(super) provider: Arc<Provider>,
    pub(super) response: Response,
    /// Among the calls under way until the answer has ended.
    pub(super) _place: Place,
    pub(super) started: Instant,
    /// When the caller stops waiting.
    pub(super) ends: Instant,
    /// Tokens of the conversation, should the service not say.
    pub(super) prompt_tokens: u64,
}

struct Reader {
    begun: Begun,
    events: Events,
    progress: Progress,
    /// What went wrong after the texts that have come.
    trouble: Option<Trouble>,
    parts: u64,
    bytes: usize,
}

/// The parts of an answer as they come. They are read whether anybody takes
/// them or not: who does not must not hold a place among the provider's calls
/// for longer than it has time. Dropping the stream ends the reading.
pub fn deltas(begun: Begun) -> ChatStream {
    let reader = Reader {
        begun,
        events: Events::default(),
        progress: Progress::default(),
        trouble: None,
        parts: 0,
        bytes: 0,
    };
    let (give, parts) = mpsc::channel(AHEAD_MAX);
    let reading = owned(reader.run(give));
    stream::unfold(Some((parts, reading)), |taking| async move {
        let (mut parts, reading) = taking?;
        match parts.recv().await {
            Some(Ok(delta)) if delta.end.is_none() => Some((Ok(delta), Some((parts, reading)))),
            Some(last) => Some((last, None)),
            // They were not taken in time.
            None => Some((Err(Error::deadline_passed()), None)),
        }
    })
    .boxed()
}

impl Reader {
    /// Gives the parts, until the last or until nobody takes them.
    async fn run(mut self, give: mpsc::Sender<Result<ChatDelta, Error>>) {
        let ends = self.begun.ends;
        loop {
            let item = match self.next().await {
                Ok(delta) => {
                    if delta.end.is_some() {
                        self.end(None);
                    }
                    Ok(delta)
                }
                Err(trouble) => Err(self.end(Some(&trouble))),
            };
            let last = !matches!(&item, Ok(delta) if delta.end.is_none());
            let given = timeout_at(ends, give.send(item)).await;
            if last || !matches!(given, Ok(Ok(()))) {
                return;
            }
        }
    }

    async fn next(&mut self) -> Result<ChatDelta, Trouble> {
        loop {
            if let Some(text) = self.progress.texts.pop_front() {
                self.parts += 1;
                return Ok(ChatDelta { text, end: None });
            }
            if let Some(trouble) = self.trouble.take() {
                return Err(trouble);
            }
            if self.progress.done {
                return Ok(self.last());
            }
            let silent = Instant::now() + self.begun.provider.model.timeout;
            let ends = self.begun.ends.min(silent);
            let chunk = timeout_at(ends, self.begun.response.chunk()).await;
            let chunk = chunk.map_err(|_| Trouble::Late)?;
            match chunk.map_err(|_| Trouble::Broken)? {
                Some(chunk) => self.trouble = self.take(&chunk).err(),
                // Some services end without saying so; an answer with a reason
                // to end is whole.
                None if self.progress.finish.is_some() => self.progress.done = true,
                None => return Err(Trouble::Broken),
            }
        }
    }

    fn take(&mut self, chunk: &[u8]) -> Result<(), Trouble> {
        self.bytes += chunk.len();
        if self.bytes > STREAM_BYTES_MAX {
            return Err(Trouble::TooLong);
        }
        for event in self.events.take(chunk).map_err(Trouble::Garbage)? {
            match self.begun.provider.model.kind {
                Shape::Anthropic => anthropic::step(&event, &mut self.progress)?,
                Shape::Openai | Shape::Cohere => openai::step(&event, &mut self.progress)?,
            }
        }
        Ok(())
    }

    fn last(&self) -> ChatDelta {
        let usage = self.progress.usage.unwrap_or_default().or(ChatUsage {
            prompt_tokens: self.begun.prompt_tokens,
            completion_tokens: self.parts,
        });
        let finish = self.progress.finish.unwrap_or(Finish::Other);
        ChatDelta {
            text: String::new(),
            end: Some((finish, usage)),
        }
    }

    /// Counts what it came to.
    fn end(&self, trouble: Option<&Trouble>) -> Error {
        let begun = &self.begun;
        let provider = &begun.provider;
        match trouble {
            // It is the caller's time that is over, which proves nothing.
            Some(Trouble::Late) if Instant::now() >= begun.ends => {}
            trouble => provider.settle(trouble),
        }
        let outcome = trouble.map_or("ok", Trouble::outcome);
        let took: Duration = begun.started.elapsed();
        provider.metrics.ended(&provider.name, outcome, took);
        trouble
            .unwrap_or(&Trouble::Broken)
            .to_error(&provider.name, "messages")
    }
}
