//! Length-prefixed messages: read within limits, encoded in one buffer.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::invalid;
use crate::body::RequestBody;

/// The prefix of a message: compression flag and length.
const PREFIX_BYTES: usize = 5;

/// The initial buffer of a message that arrives in several chunks.
const INITIAL_BYTES_MAX: usize = 1 << 20;
/// The longest pause between two chunks of a message.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(10);

/// A permit for bytes in flight, released when it is dropped.
pub type BytesHeld = OwnedSemaphorePermit;

/// Limits the bytes of all messages in flight together.
#[derive(Debug, Clone)]
pub struct ByteBudget {
    permits: Arc<Semaphore>,
    bytes_max: usize,
}

impl ByteBudget {
    /// A budget of `bytes_max` bytes.
    pub fn new(bytes_max: usize) -> Self {
        let bytes_max = bytes_max.min(Semaphore::MAX_PERMITS);
        Self {
            permits: Arc::new(Semaphore::new(bytes_max)),
            bytes_max,
        }
    }

    /// Bytes in flight now.
    pub fn used(&self) -> usize {
        self.bytes_max - self.permits.available_permits()
    }

    /// Takes bytes from the budget, or fails at once: to wait would hold the
    /// connection's flow-control window with the message half read.
    pub fn take(&self, bytes: usize) -> Result<Option<BytesHeld>, Status> {
        if bytes == 0 {
            return Ok(None);
        }
        let permits = u32::try_from(bytes).map_err(|_| too_large(bytes, self.bytes_max))?;
        self.permits
            .clone()
            .try_acquire_many_owned(permits)
            .map(Some)
            .map_err(|_| {
                Status::with_error_details(
                    Code::Unavailable,
                    "overloaded: too many message bytes in flight",
                    ErrorDetails::with_retry_info(Some(Duration::from_millis(100))),
                )
            })
    }
}

/// The limits of messages.
#[derive(Debug, Clone)]
pub struct MessageLimits {
    /// The maximum size of one message, decompressed, in bytes.
    pub message_bytes_max: usize,
    /// The bytes of all messages in flight together.
    pub budget: ByteBudget,
    /// Messages rejected for their size or by the budget.
    pub refused: Arc<AtomicU64>,
}

impl MessageLimits {
    /// Limits with nothing in flight.
    pub fn new(message_bytes_max: usize, bytes_in_flight_max: usize) -> Self {
        Self {
            message_bytes_max,
            budget: ByteBudget::new(bytes_in_flight_max.max(message_bytes_max)),
            refused: Arc::default(),
        }
    }
}

/// A received message. Its bytes count as in flight until it is dropped.
#[derive(Debug)]
pub struct Message {
    /// The message with its prefix, uncompressed, as it is forwarded.
    framed: Bytes,
    /// Releases its bytes when it is dropped.
    held: Option<BytesHeld>,
}

impl Message {
    /// Encodes a message, which does not count as in flight.
    pub fn encode(message: &impl prost::Message) -> Self {
        Self {
            framed: frame(message),
            held: None,
        }
    }

    /// An encoded message with its prefix, which does not count as in flight.
    pub fn from_framed(framed: Bytes) -> Self {
        Self { framed, held: None }
    }

    /// Counts its bytes as in flight until it is dropped.
    #[must_use]
    pub fn with_held(mut self, held: Option<BytesHeld>) -> Self {
        self.held = held;
        self
    }

    /// The message without its prefix.
    pub fn bytes(&self) -> Bytes {
        self.framed.slice(PREFIX_BYTES..)
    }

    /// The message with its prefix.
    pub fn framed(&self) -> &Bytes {
        &self.framed
    }
}

/// The messages of a call as they arrive.
#[derive(Debug)]
pub struct Messages {
    body: RequestBody,
    gzip: bool,
    limits: MessageLimits,
    /// Bytes received after the last complete message.
    rest: Bytes,
}

impl Messages {
    pub(super) fn new(body: RequestBody, encoding: Option<&str>, limits: &MessageLimits) -> Self {
        Self {
            body,
            gzip: encoding == Some("gzip"),
            limits: limits.clone(),
            rest: Bytes::new(),
        }
    }

    /// The only message of a call; none or several are the caller's fault.
    pub async fn only(mut self) -> Result<Message, Status> {
        let message = self
            .next()
            .await?
            .ok_or_else(|| invalid("message", "is missing: the method takes one"))?;
        if self.next().await?.is_some() {
            return Err(invalid(
                "message",
                "was sent more than once: the method takes one",
            ));
        }
        Ok(message)
    }

    /// The next message; none when the caller has sent them all.
    pub async fn next(&mut self) -> Result<Option<Message>, Status> {
        while self.rest.len() < PREFIX_BYTES {
            match self.chunk().await? {
                Some(chunk) => self.rest = joined(&self.rest, chunk),
                None if self.rest.is_empty() => return Ok(None),
                None => return Err(truncated()),
            }
        }
        let mut prefix = self.rest.slice(..PREFIX_BYTES);
        let compressed = match prefix.get_u8() {
            0 => false,
            1 if self.gzip => true,
            1 => {
                return Err(Status::unimplemented(
                    "message compression: only gzip is supported",
                ));
            }
            _ => return Err(invalid("message", "the compression flag must be 0 or 1")),
        };
        let length = prefix.get_u32() as usize;
        if length > self.limits.message_bytes_max {
            self.limits.refused.fetch_add(1, Ordering::Relaxed);
            return Err(too_large(length, self.limits.message_bytes_max));
        }
        let (framed, permit) = self.read(PREFIX_BYTES + length).await.inspect_err(|_| {
            self.limits.refused.fetch_add(1, Ordering::Relaxed);
        })?;
        if compressed {
            return self.inflate(&framed[PREFIX_BYTES..]).map(Some);
        }
        Ok(Some(Message {
            framed,
            held: permit,
        }))
    }

    /// Exactly `length` bytes: a slice of one chunk if they are within it, else
    /// joined. Bytes are charged to the budget and given memory as they arrive:
    /// a declared length alone takes nothing from others.
    async fn read(&mut self, length: usize) -> Result<(Bytes, Option<BytesHeld>), Status> {
        if self.rest.len() >= length {
            let held = self.limits.budget.take(length)?;
            return Ok((self.rest.split_to(length), held));
        }
        let mut held = self.limits.budget.take(self.rest.len())?;
        let mut gathered = BytesMut::with_capacity(length.min(INITIAL_BYTES_MAX));
        gathered.put_slice(&self.rest);
        self.rest = Bytes::new();
        while gathered.len() < length {
            let mut chunk = tokio::time::timeout(CHUNK_TIMEOUT, self.chunk())
                .await
                .map_err(|_| {
                    Status::deadline_exceeded("timed out while waiting for the rest of a message")
                })??
                .ok_or_else(truncated)?;
            let missing = length - gathered.len();
            if chunk.len() > missing {
                self.rest = chunk.split_off(missing);
            }
            let more = self.limits.budget.take(chunk.len())?;
            match (&mut held, more) {
                (Some(held), Some(more)) => held.merge(more),
                (held, more) => *held = held.take().or(more),
            }
            gathered.put_slice(&chunk);
        }
        Ok((gathered.freeze(), held))
    }

    async fn chunk(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Some(Err(error)) => {
                    return Err(Status::cancelled(format!(
                        "the request was aborted: {error}"
                    )));
                }
            }
        }
    }

    /// Decompresses within the same limits: a small message may expand to a
    /// large one.
    fn inflate(&self, bytes: &[u8]) -> Result<Message, Status> {
        let bytes_max = self.limits.message_bytes_max;
        let mut inflated = Vec::new();
        let mut reader = flate2::read::GzDecoder::new(bytes).take(bytes_max as u64 + 1);
        reader
            .read_to_end(&mut inflated)
            .map_err(|error| invalid("message", &format!("is not gzip: {error}")))?;
        if inflated.len() > bytes_max {
            return Err(too_large(inflated.len(), bytes_max));
        }
        let permit = self.limits.budget.take(inflated.len())?;
        Ok(Message {
            framed: frame_bytes(&inflated),
            held: permit,
        })
    }
}

fn joined(rest: &Bytes, chunk: Bytes) -> Bytes {
    if rest.is_empty() {
        return chunk;
    }
    let mut joined = BytesMut::with_capacity(rest.len() + chunk.len());
    joined.put_slice(rest);
    joined.put_slice(&chunk);
    joined.freeze()
}

fn truncated() -> Status {
    invalid("message", "is truncated: the request ended within it")
}

fn too_large(bytes: usize, bytes_max: usize) -> Status {
    Status::resource_exhausted(format!(
        "the message has {bytes} bytes, over the limit of {bytes_max}"
    ))
}

/// Encodes a message with its prefix, in one buffer.
pub fn frame(message: &impl prost::Message) -> Bytes {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(PREFIX_BYTES + length);
    put_prefix(&mut framed, length);
    // Cannot fail: the buffer has the encoded length.
    let _ = message.encode(&mut framed);
    framed.freeze()
}

/// Adds the prefix to an encoded message, in one buffer.
pub fn frame_bytes(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    put_prefix(&mut framed, message.len());
    framed.put_slice(message);
    framed.freeze()
}

fn put_prefix(framed: &mut BytesMut, length: usize) {
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
}
