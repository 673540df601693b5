//! Single-flight (request coalescing): a row that several calls need at once is
//! computed by one of them, its leader, and the others wait for it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::key::RowKey;
use super::memory::CachedRow;

/// Tables of rows in flight: more of them make lock contention rare.
const SHARDS: usize = 16;

type Shard = HashMap<RowKey, watch::Receiver<Option<CachedRow>>>;

/// The rows in flight: no more than the calls in flight request.
#[derive(Debug, Default)]
pub struct SingleFlight {
    shards: [Mutex<Shard>; SHARDS],
}

/// The role of a call for a row.
#[derive(Debug)]
pub enum Flight<'f> {
    /// It computes the row, and others wait for it.
    Lead(Leader<'f>),
    /// Another call computes it.
    Follow(Follower),
}

/// The duty to compute a row for all that wait for it. When it is dropped
/// without a row, the followers learn that it is not computed any more.
#[derive(Debug)]
pub struct Leader<'f> {
    flights: &'f SingleFlight,
    key: RowKey,
    sender: watch::Sender<Option<CachedRow>>,
}

/// Waits for a row.
#[derive(Debug)]
pub struct Follower(watch::Receiver<Option<CachedRow>>);

impl SingleFlight {
    /// Leads a row that no call computes, or follows its leader.
    pub fn join(&self, key: RowKey) -> Flight<'_> {
        match self.shard(&key).entry(key) {
            Entry::Occupied(flight) => Flight::Follow(Follower(flight.get().clone())),
            Entry::Vacant(vacant) => {
                let (sender, receiver) = watch::channel(None);
                vacant.insert(receiver);
                Flight::Lead(Leader {
                    flights: self,
                    key,
                    sender,
                })
            }
        }
    }

    /// The number of rows in flight.
    pub fn count(&self) -> usize {
        let lengths = self.shards.iter().map(|shard| locked(shard).len());
        lengths.sum()
    }

    fn shard(&self, key: &RowKey) -> MutexGuard<'_, Shard> {
        locked(&self.shards[usize::from(key.0[0]) % SHARDS])
    }
}

fn locked(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Leader<'_> {
    /// Gives the row to all that wait for it.
    pub fn publish(self, row: CachedRow) {
        self.sender.send_replace(Some(row));
    }
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        // Before the followers learn of it, so that the first of them leads.
        self.flights.shard(&self.key).remove(&self.key);
    }
}

impl Follower {
    /// The row; None when its leader left or failed.
    pub async fn row(mut self) -> Option<CachedRow> {
        let row = self.0.wait_for(Option::is_some).await.ok()?;
        row.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::tests::row;
    use super::*;

    fn lead(flights: &SingleFlight) -> Leader<'_> {
        match flights.join(RowKey([1; 32])) {
            Flight::Lead(leader) => leader,
            Flight::Follow(_) => panic!("another call leads"),
        }
    }

    fn follow(flights: &SingleFlight) -> Follower {
        match flights.join(RowKey([1; 32])) {
            Flight::Lead(_) => panic!("no call leads"),
            Flight::Follow(follower) => follower,
        }
    }

    #[tokio::test]
    async fn followers_get_the_row_and_the_flight_ends() {
        let flights = SingleFlight::default();
        let leader = lead(&flights);
        let (early, late) = (follow(&flights), follow(&flights));
        assert_eq!(flights.count(), 1);
        leader.publish(row("a"));
        assert_eq!(early.row().await, Some(row("a")));
        assert_eq!(late.row().await, Some(row("a")));
        assert_eq!(flights.count(), 0);
        drop(lead(&flights));
    }

    #[tokio::test]
    async fn a_leader_that_leaves_makes_room_for_the_next() {
        let flights = SingleFlight::default();
        let leader = lead(&flights);
        let follower = follow(&flights);
        drop(leader);
        assert_eq!(follower.row().await, None);
        lead(&flights).publish(row("b"));
        assert_eq!(flights.count(), 0);
    }
}
