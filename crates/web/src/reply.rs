//! Responses in JSON. Large ones are written on a thread for work, and their
//! memory is counted before it is made.

use std::io;

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue};
use platform::grpc::{ByteBudget, BytesHeld};
use platform::pool::Cancelled;
use protocol::{Error, Kind};
use serde::Serialize;

use super::context::{Counted, RequestContext, hold_until_sent};

/// The first buffer of a response.
const BUFFER_BYTES_MIN: usize = 1 << 10;
/// The longest number in JSON, with a comma: a double has 24 characters.
const NUMBER_BYTES_MAX: usize = 32;

/// A JSON response of about so many bytes. What `make` takes with it is dropped
/// when the JSON has been written.
pub async fn json<T: Serialize>(
    context: &RequestContext,
    headers: HeaderMap,
    bytes: usize,
    make: impl FnOnce() -> T + Send + 'static,
) -> Result<Response, Error> {
    let budget = context.limits.budget.clone();
    let write = move |cancelled: &Cancelled| {
        let mut written = Written::new(&budget, cancelled)?;
        written.json(&make())?;
        Ok(written.into_parts())
    };
    let (bytes, held) = context.work(bytes, write).await?;
    let kind = HeaderValue::from_static("application/json");
    let response = (headers, [(CONTENT_TYPE, kind)], bytes).into_response();
    Ok(counted(response, held))
}

/// A response whose bytes count as in flight until it has been sent.
pub fn counted(mut response: Response, held: impl Send + 'static) -> Response {
    response.extensions_mut().insert(Counted);
    hold_until_sent(response, held)
}

/// What is written of a response. Its memory is taken from the budget before it
/// is made.
#[derive(Debug)]
pub struct Written<'w> {
    bytes: Vec<u8>,
    held: BytesHeld,
    budget: &'w ByteBudget,
    cancelled: &'w Cancelled,
    refused: Option<Error>,
}

impl<'w> Written<'w> {
    /// Nothing yet.
    pub fn new(budget: &'w ByteBudget, cancelled: &'w Cancelled) -> Result<Self, Error> {
        let held = budget.hold(BUFFER_BYTES_MIN);
        Ok(Self {
            bytes: Vec::with_capacity(BUFFER_BYTES_MIN),
            held: held.map_err(|status| Error::from_status(&status))?,
            budget,
            cancelled,
            refused: None,
        })
    }

    /// Adds a value.
    pub fn json(&mut self, value: &(impl Serialize + ?Sized)) -> Result<(), Error> {
        let written = serde_json::to_writer(&mut *self, value);
        written.map_err(|_| self.failed())
    }

    /// Adds text that is JSON.
    pub fn text(&mut self, text: &str) -> Result<(), Error> {
        let written = io::Write::write_all(self, text.as_bytes());
        written.map_err(|_| self.failed())
    }

    /// Adds an array of numbers or booleans. Floats have the fewest digits that
    /// are read back as the same bits.
    pub fn numbers<T: Serialize>(
        &mut self,
        values: impl ExactSizeIterator<Item = T>,
    ) -> Result<(), Error> {
        self.text("[")?;
        // About as long as they become, so that little is moved.
        let likely_bytes = values.len() * 3 * size_of::<T>();
        self.reserve(likely_bytes).map_err(|_| self.failed())?;
        for (index, value) in values.enumerate() {
            self.reserve(NUMBER_BYTES_MAX).map_err(|_| self.failed())?;
            if index > 0 {
                self.bytes.push(b',');
            }
            let written = serde_json::to_writer(&mut self.bytes, &value);
            written.map_err(|_| self.failed())?;
        }
        self.text("]")
    }

    /// Takes back the last byte.
    pub fn pop(&mut self) {
        self.bytes.pop();
    }

    /// The bytes, and what they hold of the bytes in flight.
    pub fn into_parts(mut self) -> (Bytes, BytesHeld) {
        self.bytes.shrink_to_fit();
        self.held.shrink(self.bytes.capacity());
        (self.bytes.into(), self.held)
    }

    /// Memory for so many more bytes, as long as the caller waits.
    #[inline]
    fn reserve(&mut self, more: usize) -> io::Result<()> {
        if more <= self.bytes.capacity() - self.bytes.len() {
            return Ok(());
        }
        self.grow(self.bytes.len() + more)
    }

    #[cold]
    fn grow(&mut self, length: usize) -> io::Result<()> {
        if self.cancelled.is_set() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let capacity = length.max(self.bytes.capacity() * 2);
        let more = capacity - self.bytes.capacity();
        if let Err(status) = self.budget.grow(&mut self.held, more) {
            self.refused = Some(Error::from_status(&status));
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.bytes.reserve_exact(capacity - self.bytes.len());
        Ok(())
    }

    /// Why a write failed.
    fn failed(&mut self) -> Error {
        let unwritten = || Error::new(Kind::Internal, "the response cannot be written");
        self.refused.take().unwrap_or_else(unwritten)
    }
}

impl io::Write for Written<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.reserve(bytes.len())?;
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use platform::grpc::MessageLimits;

    use super::*;

    #[test]
    fn what_is_written_is_counted_before_it_is_made() {
        let limits = MessageLimits::new(1000, 100_000);
        let never = Cancelled::never();
        let mut written = Written::new(&limits.budget, &never).unwrap();
        for text in ["a", "b"].into_iter().cycle().take(9000) {
            written.json(text).unwrap();
            assert_eq!(limits.budget.used(), written.bytes.capacity());
        }
        let refused = written.json(&"c".repeat(90_000)).unwrap_err();
        assert_eq!(refused.kind(), Kind::Overloaded);
        let (bytes, held) = written.into_parts();
        assert!(bytes.starts_with(b"\"a\"\"b\"\"a\""));
        assert!((27_000..27_010).contains(&bytes.len()), "{}", bytes.len());
        assert_eq!(limits.budget.used(), held.amount());
        assert!(held.amount() <= 28_000, "{}", held.amount());
        drop(held);
        assert_eq!(limits.budget.used(), 0);
    }
}
