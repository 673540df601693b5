//! Length-prefixed messages: read within limits, encoded in one buffer.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body_util::BodyExt;
use tonic::Status;

use super::invalid;
use crate::body::RequestBody;
use crate::inflate::{Compressed, Compression, InflateError, inflate};
use crate::limits::{ByteBudget, BytesHeld, MessageLimits};
use crate::pace::Progress;
use crate::tls::Peer;

/// The prefix of a message: compression flag and length.
const PREFIX_BYTES: usize = 5;
/// The buffer of a message that arrives in several chunks has room for so many
/// times what has arrived: whoever claims more has to send it.
const GROWTH: usize = 4;
/// The smallest buffer.
const GATHERED_BYTES_MIN: usize = 1 << 10;
/// Shorter messages are copied out of the buffer of their connection, which may
/// be many times larger.
const COPIED_BYTES_MAX: usize = 4 << 10;

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
    /// The messages of a body. Their bytes are held for the holder of the limits,
    /// or for the peer where they have none.
    pub(super) fn new(
        body: RequestBody,
        encoding: Option<&str>,
        limits: &MessageLimits,
        peer: &Peer,
    ) -> Self {
        Self {
            body,
            gzip: encoding.is_some_and(|name| Compression::is_gzip(name.trim().as_bytes())),
            limits: limits.or_held_by(peer),
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
        let mut progress = None;
        while self.rest.len() < PREFIX_BYTES {
            // A part of a prefix is copied, so that the buffer of its connection
            // is not kept for it.
            if !self.rest.is_empty() {
                self.rest = Bytes::copy_from_slice(&self.rest);
                progress.get_or_insert_with(|| self.limits.pace.begin());
            }
            match next_chunk(&mut self.body, &self.limits, progress.as_ref()).await? {
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
        drop(prefix);
        if length > self.limits.message_bytes_max {
            return Err(too_large(length, self.limits.message_bytes_max));
        }
        let message = self.read(PREFIX_BYTES + length, progress).await;
        let message = match message {
            Ok(message) if compressed => inflated(message, &self.limits).await,
            message => message,
        };
        message.map(Some)
    }

    /// A message of exactly `length` bytes: a slice of one chunk if they are
    /// within it, else joined. Bytes are charged to the budget and given memory
    /// as they arrive: a declared length alone takes nothing from others.
    async fn read(&mut self, length: usize, begun: Option<Progress>) -> Result<Message, Status> {
        if self.rest.len() >= length {
            let held = self.limits.budget.hold(length)?;
            let mut framed = self.rest.split_to(length);
            if length <= COPIED_BYTES_MAX {
                framed = Bytes::copy_from_slice(&framed);
            }
            return Ok(Message {
                framed,
                held: Some(held),
            });
        }
        let mut progress = begun.unwrap_or_else(|| self.limits.pace.begin());
        let Self {
            body, limits, rest, ..
        } = self;
        let mut gathered = Gathered::new(length, &limits.budget)?;
        let mut chunk = std::mem::take(rest);
        loop {
            *rest = chunk.split_off(gathered.missing().min(chunk.len()));
            gathered.push(&chunk)?;
            progress.moved(chunk.len());
            if gathered.missing() == 0 {
                return Ok(gathered.into_message());
            }
            let next = next_chunk(body, limits, Some(&progress)).await?;
            chunk = next.ok_or_else(truncated)?;
        }
    }
}

/// Decompresses within the same limits: a small message may expand to a large
/// one.
async fn inflated(message: Message, limits: &MessageLimits) -> Result<Message, Status> {
    let compressed = Compressed {
        chunks: vec![message.bytes()],
        held: message.held,
        compression: Compression::Gzip,
        prefix_bytes: PREFIX_BYTES,
    };
    let inflated = inflate(compressed, limits).await;
    let mut inflated = inflated.map_err(|error| match error {
        InflateError::Invalid(error) => invalid("message", &format!("is not gzip: {error}")),
        InflateError::TooLarge(length) => too_large(length, limits.message_bytes_max),
        InflateError::Refused(status) => status,
    })?;
    let length = inflated.bytes.len() - PREFIX_BYTES;
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    inflated.bytes[1..PREFIX_BYTES].copy_from_slice(&length.to_be_bytes());
    Ok(Message {
        framed: inflated.bytes.into(),
        held: Some(inflated.held),
    })
}

/// The next chunk, as fast as a message that has begun must arrive.
async fn next_chunk(
    body: &mut RequestBody,
    limits: &MessageLimits,
    progress: Option<&Progress>,
) -> Result<Option<Bytes>, Status> {
    let next = any_chunk(body);
    let Some(progress) = progress else {
        return next.await;
    };
    progress.within(next).await.unwrap_or_else(|_| {
        limits.too_slow();
        Err(Status::deadline_exceeded(
            "the rest of a message was not received in time",
        ))
    })
}

async fn any_chunk(body: &mut RequestBody) -> Result<Option<Bytes>, Status> {
    loop {
        match body.frame().await {
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

/// A message that arrives in several chunks. It has memory for a few times what
/// has arrived, never for what was claimed, and all of that memory is counted.
struct Gathered<'b> {
    framed: Vec<u8>,
    length: usize,
    held: BytesHeld,
    budget: &'b ByteBudget,
}

impl<'b> Gathered<'b> {
    fn new(length: usize, budget: &'b ByteBudget) -> Result<Self, Status> {
        Ok(Self {
            framed: Vec::new(),
            length,
            held: budget.hold(0)?,
            budget,
        })
    }

    fn missing(&self) -> usize {
        self.length - self.framed.len()
    }

    /// Adds a chunk of at most the bytes that are missing.
    fn push(&mut self, chunk: &[u8]) -> Result<(), Status> {
        let arrived = self.framed.len() + chunk.len();
        if arrived > self.framed.capacity() {
            let capacity = (arrived * GROWTH).max(GATHERED_BYTES_MIN).min(self.length);
            let more = capacity - self.framed.capacity();
            self.budget.grow(&mut self.held, more)?;
            self.framed.reserve_exact(capacity - self.framed.len());
        }
        self.framed.extend_from_slice(chunk);
        Ok(())
    }

    fn into_message(self) -> Message {
        Message {
            framed: self.framed.into(),
            held: Some(self.held),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_gets_memory_for_what_arrived_and_not_for_what_was_claimed() {
        let budget = ByteBudget::new(64 << 20);
        let length = 60 << 20;
        let mut gathered = Gathered::new(length, &budget).unwrap();
        let mut arrived = 0;
        for bytes in [5, 25, 4000, 100_000, 1 << 20, 20 << 20] {
            gathered.push(&vec![1; bytes]).unwrap();
            arrived += bytes;
            let capacity = gathered.framed.capacity();
            let most = (arrived * GROWTH).max(GATHERED_BYTES_MIN);
            assert!(capacity <= most, "{capacity} bytes for {arrived}");
            assert_eq!(budget.used(), capacity);
        }
        gathered.push(&vec![1; gathered.missing()]).unwrap();
        let message = gathered.into_message();
        assert_eq!((message.framed().len(), budget.used()), (length, length));
        drop(message);
        assert_eq!(budget.used(), 0);
    }
}
