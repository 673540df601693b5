//! Length-prefixed messages: read within limits, encoded in one buffer.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::buf::Reader;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::bufread::GzDecoder;
use http_body_util::BodyExt;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::invalid;
use crate::body::RequestBody;
use crate::metrics::{Bound, Metrics};
use crate::pace::{Pace, Progress};
use crate::pool::{Cancelled, PoolError, WorkPool};
use crate::pot::{Held, Holder, Pot, PotFull};
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
/// So much is decompressed where the message arrives, and the rest on a thread
/// for work.
const INFLATED_INLINE_BYTES: usize = 64 << 10;
/// When bytes in flight will probably have been released.
const RETRY: Duration = Duration::from_millis(100);

/// Bytes in flight, released when this is dropped.
pub type BytesHeld = Held;

/// Limits the bytes of all messages in flight together, with a share for each
/// holder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ByteBudget {
    pot: Pot,
    holder: Holder,
    full: Option<Bound>,
}

impl ByteBudget {
    /// A budget of `bytes_max` bytes.
    pub fn new(bytes_max: usize) -> Self {
        Self {
            pot: Pot::new(bytes_max),
            holder: Holder::Own,
            full: None,
        }
    }

    /// Bytes in flight now.
    pub fn used(&self) -> usize {
        self.pot.used()
    }

    /// Takes bytes from the budget for its holder, or fails at once: to wait would
    /// hold the connection's flow-control window with the message half read.
    pub fn take(&self, bytes: usize) -> Result<Option<BytesHeld>, Status> {
        if bytes == 0 {
            return Ok(None);
        }
        self.hold(bytes).map(Some)
    }

    fn hold(&self, bytes: usize) -> Result<BytesHeld, Status> {
        let held = self.pot.take(&self.holder, bytes);
        held.map_err(|full| self.refuse(full))
    }

    /// Takes more bytes for what is held.
    fn grow(&self, held: &mut BytesHeld, bytes: usize) -> Result<(), Status> {
        held.grow(bytes).map_err(|full| self.refuse(full))
    }

    fn count_refused(&self) {
        if let Some(bound) = &self.full {
            bound.reached();
        }
    }

    fn refuse(&self, full: PotFull) -> Status {
        self.count_refused();
        overloaded(match full {
            PotFull::Whole => "overloaded: too many message bytes in flight",
            PotFull::Share => "overloaded: the caller has its share of the message bytes in flight",
        })
    }
}

fn overloaded(message: &str) -> Status {
    let details = ErrorDetails::with_retry_info(Some(RETRY));
    Status::with_error_details(Code::Unavailable, message, details)
}

/// The limits of messages. Cheap to clone.
#[derive(Debug, Clone)]
pub struct MessageLimits {
    /// The maximum size of one message, decompressed, in bytes.
    pub message_bytes_max: usize,
    /// The bytes of all messages in flight together.
    pub budget: ByteBudget,
    /// Messages rejected for their size or by the budget.
    pub refused: Arc<AtomicU64>,
    /// How fast a message that has begun must arrive.
    pub pace: Pace,
    /// Where large messages are decompressed; where they arrive without it.
    pub pool: Option<WorkPool>,
    /// Counts messages that arrive too slowly, and answers that are read so.
    pub slow: Option<Bound>,
}

impl MessageLimits {
    /// Limits with nothing in flight.
    pub fn new(message_bytes_max: usize, bytes_in_flight_max: usize) -> Self {
        Self {
            message_bytes_max,
            budget: ByteBudget::new(bytes_in_flight_max.max(message_bytes_max)),
            refused: Arc::default(),
            pace: Pace::default(),
            pool: None,
            slow: None,
        }
    }

    /// The same limits at this pace, counted in the metrics of a process, with
    /// its threads for work.
    #[must_use]
    pub fn with(mut self, pace: Pace, metrics: &Metrics, pool: &WorkPool) -> Self {
        self.budget.full = Some(metrics.bound("--bytes-in-flight-max"));
        self.slow = Some(metrics.bound("--transfer-rate-min"));
        self.pace = pace;
        self.pool = Some(pool.clone());
        self
    }

    /// The same limits; bytes are held for this holder.
    #[must_use]
    pub fn held_by(&self, holder: Holder) -> Self {
        let mut limits = self.clone();
        limits.budget.holder = holder;
        limits
    }

    /// Counts bytes as in flight for a holder, which need not be that of the
    /// limits.
    pub(crate) fn hold_for(&self, holder: &Holder, bytes: usize) -> Result<BytesHeld, PotFull> {
        let held = self.budget.pot.take(holder, bytes);
        held.inspect_err(|_| self.budget.count_refused())
    }

    /// Counts a message that arrived too slowly, or an answer that was read so.
    pub fn too_slow(&self) {
        if let Some(bound) = &self.slow {
            bound.reached();
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
    /// The messages of a body. Their bytes are held for the holder of the limits,
    /// or for the peer where they have none.
    pub(super) fn new(
        body: RequestBody,
        encoding: Option<&str>,
        limits: &MessageLimits,
        peer: &Peer,
    ) -> Self {
        let mut limits = limits.clone();
        if limits.budget.holder == Holder::Own {
            limits.budget.holder = peer.holder();
        }
        Self {
            body,
            gzip: encoding == Some("gzip"),
            limits,
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
            self.limits.refused.fetch_add(1, Ordering::Relaxed);
            return Err(too_large(length, self.limits.message_bytes_max));
        }
        let message = self.read(PREFIX_BYTES + length, progress).await;
        let message = match message {
            Ok(message) if compressed => inflate(message, &self.limits).await,
            message => message,
        };
        message.map(Some).inspect_err(|_| {
            self.limits.refused.fetch_add(1, Ordering::Relaxed);
        })
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
async fn inflate(message: Message, limits: &MessageLimits) -> Result<Message, Status> {
    let mut inflating = Inflating::new(message, limits)?;
    if inflating.fill(INFLATED_INLINE_BYTES)? {
        return Ok(inflating.finish());
    }
    let rest = move |cancelled: &Cancelled| {
        while !inflating.fill(INFLATED_INLINE_BYTES)? {
            if cancelled.is_set() {
                return Err(Status::cancelled("the caller left"));
            }
        }
        Ok(inflating.finish())
    };
    let Some(pool) = &limits.pool else {
        return rest(&Cancelled::never());
    };
    match pool.run_for(&limits.budget.holder, 1, rest).await {
        Ok(message) => message,
        Err(PoolError::Full(_)) => Err(overloaded("overloaded: too many compressed messages wait")),
        Err(PoolError::Failed) => Err(Status::internal("the message could not be decompressed")),
    }
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

/// A message that is decompressed step by step. Its memory is taken from the
/// budget before it is made.
struct Inflating {
    decoder: GzDecoder<Reader<Bytes>>,
    /// The decompressed message, with its prefix.
    framed: Vec<u8>,
    held: BytesHeld,
    limits: MessageLimits,
    /// The bytes of the compressed message count until the end.
    _compressed: Option<BytesHeld>,
}

impl Inflating {
    fn new(message: Message, limits: &MessageLimits) -> Result<Self, Status> {
        let capacity = GATHERED_BYTES_MIN;
        let held = limits.budget.hold(capacity)?;
        let mut framed = Vec::with_capacity(capacity);
        framed.extend_from_slice(&[0; PREFIX_BYTES]);
        Ok(Self {
            decoder: GzDecoder::new(message.bytes().reader()),
            framed,
            held,
            limits: limits.clone(),
            _compressed: message.held,
        })
    }

    /// Decompresses about `bytes` more; true at the end.
    fn fill(&mut self, bytes: usize) -> Result<bool, Status> {
        let most = self.limits.message_bytes_max + PREFIX_BYTES;
        let until = self.framed.len() + bytes;
        while self.framed.len() < until {
            if self.framed.len() == self.framed.capacity() {
                // One byte more shows that the message is too long.
                let capacity = (self.framed.len() * 2).min(most + 1);
                let more = capacity - self.framed.len();
                self.limits.budget.grow(&mut self.held, more)?;
                self.framed.reserve_exact(more);
            }
            let room = self.framed.capacity().min(until) - self.framed.len();
            let mut part = (&mut self.decoder).take(room as u64);
            let read = part.read_to_end(&mut self.framed);
            let read = read.map_err(|error| not_gzip(&error))?;
            if self.framed.len() > most {
                return Err(too_large(
                    self.framed.len() - PREFIX_BYTES,
                    self.limits.message_bytes_max,
                ));
            }
            if read < room {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn finish(mut self) -> Message {
        let length = self.framed.len() - PREFIX_BYTES;
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        self.framed[1..PREFIX_BYTES].copy_from_slice(&length.to_be_bytes());
        Message {
            framed: self.framed.into(),
            held: Some(self.held),
        }
    }
}

fn not_gzip(error: &io::Error) -> Status {
    invalid("message", &format!("is not gzip: {error}"))
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
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

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

    fn gzip(length: usize) -> Bytes {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&vec![7; length]).unwrap();
        encoder.finish().unwrap().into()
    }

    fn inflating(length: usize, limits: &MessageLimits) -> Inflating {
        let message = Message::from_framed(frame_bytes(&gzip(length)));
        Inflating::new(message, limits).unwrap()
    }

    #[test]
    fn inflating_takes_its_memory_from_the_budget_before_it_is_made() {
        let limits = MessageLimits::new(1 << 20, 4 << 20);
        for length in [0, 1, 1000, 65_536, 1 << 20] {
            let mut inflating = inflating(length, &limits);
            while !inflating.fill(INFLATED_INLINE_BYTES).unwrap() {
                assert_eq!(limits.budget.used(), inflating.framed.capacity());
            }
            let message = inflating.finish();
            assert_eq!(message.bytes(), vec![7; length]);
            assert_eq!(message.framed(), &frame_bytes(&vec![7; length]));
            assert!(limits.budget.used() >= message.framed().len());
        }
        assert_eq!(limits.budget.used(), 0);
        let too_large = inflating((1 << 20) + 1, &limits).fill(usize::MAX >> 1);
        assert_eq!(too_large.unwrap_err().code(), Code::ResourceExhausted);
        let _others = limits.budget.take(3 << 20).unwrap();
        let full = inflating(1 << 20, &limits).fill(usize::MAX >> 1);
        assert_eq!(full.unwrap_err().code(), Code::Unavailable);
    }
}
