//! Calls whose bodies are passed through, whole and as a stream of events.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, future, stream};
use platform::tasks::spawn_owned;
use protocol::{Error, Kind};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::stream::{OpenStream, STREAM_BYTES_MAX, is_blank};
use super::{Provider, client};
use crate::error::ProviderError;
use crate::pass_through::{
    PassThrough, PassThroughApi, PassedStream, Told, read_whole, refused_usage,
};
use crate::reported::{TokenUsage, reported_usage};
use crate::sse::EventParser;
use crate::usage::{CallContext, ProviderUsage};

/// Bytes before the first event ends, and of JSON in place of events.
const BEGINNING_BYTES_MAX: usize = 1 << 20;
/// Chunks that a service may be ahead of a slow reader.
const CHUNKS_AHEAD_MAX: usize = 16;
/// What follows the event that ends a response must come within this time.
const END_WAIT: Duration = Duration::from_secs(1);

impl Provider {
    /// Passes a request through; the body of the response as it came.
    pub async fn pass_through(
        self: &Arc<Self>,
        request: &PassThrough,
        context: CallContext<'_>,
    ) -> Result<Bytes, Error> {
        self.must_pass_through(request.api)?;
        let passed = self.pass_whole(request, context).await;
        passed.map_err(|error| error.to_error(&self.name, request.api.content_field()))
    }

    /// Passes a request through whose response is a stream. Its first event must
    /// have come by the deadline of `context`: until then, whatever fails is an
    /// error of this call. Then it may go on until `deadline`.
    pub async fn pass_through_stream(
        self: &Arc<Self>,
        request: &PassThrough,
        context: CallContext<'_>,
        deadline: Instant,
    ) -> Result<PassedStream, Error> {
        self.must_pass_through(request.api)?;
        let started = Instant::now();
        let field = request.api.content_field();
        let failed = |error: ProviderError| error.to_error(&self.name, field);
        let permit = self.permit(&context).map_err(failed)?;
        let outgoing = request.outgoing(&self.settings.model);
        let prompt_tokens = request.prompt_tokens;
        context.usage.begin(ProviderUsage::of_input(prompt_tokens));
        let opened = self.open(&outgoing, self.within_timeout(context)).await;
        let opened = opened.inspect_err(|error| context.usage.failed(error));
        let open = OpenStream {
            provider: self.clone(),
            response: opened.map_err(failed)?,
            _permit: permit,
            started,
            begins_by: client::report_by(context.deadline),
            deadline,
            prompt_tokens,
            usage: context.usage.clone(),
            caller: context.holder.clone(),
        };
        begin(open, request.api).await
    }

    fn must_pass_through(&self, api: PassThroughApi) -> Result<(), Error> {
        self.must_generate()?;
        let dialect = self.settings.kind;
        if dialect.passes_through() {
            return Ok(());
        }
        let (name, kind, path) = (&self.name, dialect.kind(), api.path());
        let message = format!(
            "model '{name}' is of a provider of kind '{kind}', and /v1{path} is passed through \
             to providers of kind 'openai' alone: use /v1/chat/completions, or a model of such a \
             provider"
        );
        Err(Error::new(Kind::Unsupported, message))
    }

    async fn pass_whole(
        self: &Arc<Self>,
        request: &PassThrough,
        context: CallContext<'_>,
    ) -> Result<Bytes, ProviderError> {
        let _permit = self.permit(&context)?;
        let outgoing = request.outgoing(&self.settings.model);
        let max_tokens = u64::from(self.settings.max_tokens);
        // A service computes to the end, whether anybody waits or not.
        let most = TokenUsage {
            prompt_tokens: request.prompt_tokens,
            completion_tokens: request.max_tokens.unwrap_or(max_tokens),
        };
        let context = self.within_timeout(context);
        // What a body used that is no response, such as a refusal.
        let refused = Arc::new(Mutex::new(None));
        let refusal = refused.clone();
        let parse = move |body: &[u8]| {
            let read = read_whole(body);
            let used = read.as_ref().err();
            let used = used.and_then(|error| refused_usage(body, error, most));
            *refusal.lock().unwrap_or_else(PoisonError::into_inner) = used;
            read.map(|usage| (Bytes::copy_from_slice(body), usage))
        };
        let result = self.metered(&outgoing, context, most.into(), parse).await;
        let used = refused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(used) = used {
            context.usage.correct(used.into());
        }
        let (body, usage) = result?;
        let length = (body.len() as u64).div_ceil(4);
        let usage = usage.or_estimate(TokenUsage {
            completion_tokens: length.min(most.completion_tokens),
            ..most
        });
        context.usage.succeeded(usage.into());
        Ok(body)
    }
}

/// A stream whose events are read on the way, for the charge and for its end.
struct Reader {
    open: OpenStream,
    api: PassThroughApi,
    /// None once something came that it cannot read: it is the caller's to read.
    parser: Option<EventParser>,
    told: Told,
    /// Whether anything has been passed on.
    begun: bool,
    /// When the last event came: comments, which keep a connection alive, are no
    /// sign of a response.
    heard: Instant,
    bytes: usize,
}

/// The bytes of a response as they come, once its first event has. They are
/// read whether anybody takes them or not, within a bound: a slow caller must not
/// hold a permit for longer than it has time. Dropping the stream ends the reading.
async fn begin(open: OpenStream, api: PassThroughApi) -> Result<PassedStream, Error> {
    let mut reader = Reader {
        open,
        api,
        parser: Some(EventParser::default()),
        told: Told::default(),
        begun: false,
        heard: Instant::now(),
        bytes: 0,
    };
    let first = match reader.first().await {
        Ok(first) => first,
        Err(error) => {
            reader.open.charge_failure(&error, reader.told.usage);
            return Err(reader.end(Some(&error)));
        }
    };
    let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD_MAX);
    let reading = spawn_owned(reader.run(sender));
    let others = stream::unfold(Some((receiver, reading)), |state| async move {
        let (mut receiver, reading) = state?;
        match receiver.recv().await {
            Some(Some(Ok(chunk))) => Some((Ok(chunk), Some((receiver, reading)))),
            Some(Some(Err(error))) => Some((Err(error), None)),
            Some(None) => None,
            // The caller did not take the bytes in time.
            None => Some((Err(Error::deadline_passed()), None)),
        }
    });
    Ok(stream::once(future::ready(Ok(first))).chain(others).boxed())
}

impl Reader {
    /// The bytes up to the first event, with those that came with it.
    async fn first(&mut self) -> Result<Bytes, ProviderError> {
        let mut beginning = BytesMut::new();
        while self.told.events == 0 {
            let chunk = self.chunk().await?;
            let Some(chunk) = chunk.filter(|_| !self.told.ended) else {
                self.read_end();
                if self.told.events == 0 {
                    return Err(ProviderError::Incomplete);
                }
                break;
            };
            beginning.extend_from_slice(&chunk);
            if beginning.len() > BEGINNING_BYTES_MAX {
                return Err(ProviderError::ResponseTooLarge);
            }
            // No line of an event stream begins with a bracket.
            let byte = beginning.iter().copied().find(|byte| !is_blank(*byte));
            match byte {
                Some(b'<') => return Err(ProviderError::InvalidResponse("a page in HTML")),
                Some(b'{' | b'[') => return Err(self.no_stream(beginning).await),
                _ => self.read(&chunk)?,
            }
        }
        if self.told.failed {
            return Err(ProviderError::ReportedError);
        }
        self.begun = true;
        Ok(beginning.freeze())
    }

    /// Why JSON came in place of events; what it reports is charged.
    async fn no_stream(&mut self, mut body: BytesMut) -> ProviderError {
        loop {
            match self.chunk().await {
                Ok(Some(chunk)) if body.len() + chunk.len() <= BEGINNING_BYTES_MAX => {
                    self.heard = Instant::now();
                    body.extend_from_slice(&chunk);
                }
                Ok(Some(_)) => return ProviderError::ResponseTooLarge,
                Ok(None) => break,
                Err(error) => return error,
            }
        }
        self.told.usage = reported_usage(&body);
        match read_whole(&body) {
            Ok(_) => ProviderError::InvalidResponse("a stream was requested, and it is none"),
            Err(error) => error,
        }
    }

    /// Sends the bytes and the mark of their end, until an error or until the
    /// receiver is dropped.
    async fn run(mut self, sender: mpsc::Sender<Option<Result<Bytes, Error>>>) {
        let deadline = self.open.deadline;
        loop {
            let item = self.item().await;
            let last = !matches!(&item, Some(Ok(_)));
            let offered = Instant::now();
            let sent = timeout_at(deadline, sender.send(item)).await;
            if last || !matches!(sent, Ok(Ok(()))) {
                return;
            }
            // The time of a slow reader is not the service's.
            self.heard += offered.elapsed();
        }
    }

    /// The bytes that come next; none at the end, which is recorded, as is an
    /// error.
    async fn item(&mut self) -> Option<Result<Bytes, Error>> {
        match self.next().await {
            Ok(Some(chunk)) => Some(Ok(chunk)),
            Ok(None) => {
                let usage = self.told.tokens(self.open.prompt_tokens);
                self.open.usage.succeeded(usage.into());
                // The caller has read of the error in the events.
                let failed = self.told.failed.then_some(ProviderError::ReportedError);
                self.end(failed.as_ref());
                None
            }
            Err(error) => Some(Err(self.end(Some(&error)))),
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, ProviderError> {
        let chunk = self.chunk().await?;
        if let Some(chunk) = chunk {
            // What cannot be read here may be good for the caller.
            let _ = self.read(&chunk);
            return Ok(Some(chunk));
        }
        self.read_end();
        if self.told.finished || self.told.failed || self.parser.is_none() {
            return Ok(None);
        }
        Err(ProviderError::Incomplete)
    }

    /// The chunk that comes next; none at the end of the body.
    async fn chunk(&mut self) -> Result<Option<Bytes>, ProviderError> {
        let ended = self.told.ended;
        let silent = self.heard + self.open.provider.settings.timeout;
        let mut until = self.open.ends(self.begun).min(silent);
        if ended {
            until = until.min(Instant::now() + END_WAIT);
        }
        let chunk = match timeout_at(until, self.open.response.chunk()).await {
            Ok(Ok(chunk)) => chunk,
            // All of the response has come, however its connection ends.
            Ok(Err(_)) | Err(_) if ended => None,
            Ok(Err(_)) => return Err(ProviderError::ConnectionLost),
            Err(_) => return Err(ProviderError::Timeout),
        };
        self.bytes += chunk.as_ref().map_or(0, Bytes::len);
        if self.bytes > STREAM_BYTES_MAX {
            return Err(ProviderError::ResponseTooLarge);
        }
        Ok(chunk)
    }

    /// Reads the events that a chunk completes. What has come is recorded: the
    /// caller may leave at any time.
    fn read(&mut self, chunk: &[u8]) -> Result<(), ProviderError> {
        let Some(parser) = &mut self.parser else {
            self.heard = Instant::now();
            return Ok(());
        };
        let mut events = Vec::new();
        let pushed = parser.push(chunk, &mut events);
        for event in &events {
            self.heard = Instant::now();
            self.told.take(event);
        }
        if !events.is_empty() {
            let received = self.told.tokens_so_far(self.open.prompt_tokens);
            self.open.usage.correct(received.into());
        }
        pushed.map_err(|reason| {
            self.parser = None;
            ProviderError::InvalidResponse(reason)
        })
    }

    /// Some services do not write the empty line after the last event.
    fn read_end(&mut self) {
        let last = self.parser.as_mut().map(EventParser::finish);
        if let Some(Ok(Some(event))) = last {
            self.told.take(&event);
        }
    }

    fn end(&self, error: Option<&ProviderError>) -> Error {
        self.open.end(self.begun, error, self.api.content_field())
    }
}
