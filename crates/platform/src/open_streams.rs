//! The open streams of a connection, among those of all connections of its port.
//!
//! A connection takes places of the port, and keeps a few when streams end as
//! long as the port has many: most streams then change nothing that other
//! connections share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::pot::{Held, Holder, Pot};

/// One spare place is kept, and one more for so many open streams.
const OPEN_PER_SPARE: usize = 8;

/// The open streams of one connection.
#[derive(Debug)]
pub struct OpenStreams {
    port: Pot,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    open: usize,
    /// The places, open or spare; none after the port refused the first.
    held: Option<Held>,
}

/// A stream, open until this is dropped.
#[derive(Debug)]
#[must_use = "it is given back when it is dropped"]
pub struct OpenStream(Arc<OpenStreams>);

impl OpenStreams {
    /// None yet, of the streams of a port that this holder may open.
    pub fn of(port: &Pot, holder: &Holder) -> Arc<Self> {
        Arc::new(Self {
            port: port.clone(),
            state: Mutex::new(State {
                open: 0,
                held: port.take(holder, 0).ok(),
            }),
        })
    }

    /// Opens a stream; none when too many are open, or when the holder has its
    /// share.
    pub fn open(self: &Arc<Self>) -> Option<OpenStream> {
        let mut state = self.lock();
        let open = state.open;
        let held = state.held.as_mut()?;
        if open >= held.amount() && held.grow(1 + open / OPEN_PER_SPARE).is_err() {
            held.grow(1).ok()?;
        }
        state.open += 1;
        Some(OpenStream(self.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.open -= 1;
        let port = &self.0.port;
        let spare = if port.used() > port.capacity() / 2 {
            0
        } else {
            state.open / OPEN_PER_SPARE + 1
        };
        let most = state.open + spare;
        if let Some(held) = state.held.as_mut() {
            held.shrink(most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_keeps_few_places_more_than_it_has_streams() {
        let port = Pot::new(64);
        let streams = OpenStreams::of(&port, &Holder::Own);
        let mut open: Vec<OpenStream> = Vec::new();
        while let Some(stream) = streams.open() {
            open.push(stream);
            let most = open.len() + open.len() / OPEN_PER_SPARE + 1;
            assert!((open.len()..=most).contains(&port.used()));
        }
        assert_eq!((open.len(), port.used()), (64, 64));
        while open.pop().is_some() {
            let spare = port.used() - open.len();
            assert!(spare <= open.len() / OPEN_PER_SPARE + 1, "{spare}");
            assert!(spare == 0 || port.used() <= 32, "others need them");
        }
        assert_eq!(port.used(), 1);
        drop(streams);
        assert_eq!(port.used(), 0);
    }
}
