//! Rows that are being computed: whoever else needs one waits for it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::key::Key;
use super::memory::Row;

/// Tables of rows under way, so that calls seldom meet at one lock.
const SHARDS: usize = 16;

type Shard = HashMap<Key, watch::Receiver<Option<Row>>>;

/// The rows under way. There are never more than the calls under way ask for.
#[derive(Debug, Default)]
pub struct Flights {
    shards: [Mutex<Shard>; SHARDS],
}

/// What a call does about a row.
#[derive(Debug)]
pub enum Joined<'f> {
    /// It computes the row, and others wait for it.
    Leads(Leader<'f>),
    /// Another call computes it.
    Follows(Follower),
}

/// Owes a row to all who wait for it. When it is dropped without one, they
/// learn that nobody computes it any more.
#[derive(Debug)]
pub struct Leader<'f> {
    flights: &'f Flights,
    key: Key,
    tell: watch::Sender<Option<Row>>,
}

/// Waits for a row.
#[derive(Debug)]
pub struct Follower(watch::Receiver<Option<Row>>);

impl Flights {
    /// Leads a row that nobody computes, or follows who does.
    pub fn join(&self, key: Key) -> Joined<'_> {
        match self.shard(&key).entry(key) {
            Entry::Occupied(flight) => Joined::Follows(Follower(flight.get().clone())),
            Entry::Vacant(place) => {
                let (tell, told) = watch::channel(None);
                place.insert(told);
                Joined::Leads(Leader {
                    flights: self,
                    key,
                    tell,
                })
            }
        }
    }

    /// Rows under way.
    pub fn count(&self) -> usize {
        let lengths = self.shards.iter().map(|shard| locked(shard).len());
        lengths.sum()
    }

    fn shard(&self, key: &Key) -> MutexGuard<'_, Shard> {
        locked(&self.shards[usize::from(key.0[0]) % SHARDS])
    }
}

fn locked(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Leader<'_> {
    /// Gives the row to all who wait.
    pub fn publish(self, row: Row) {
        self.tell.send_replace(Some(row));
    }
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        // Before the followers learn of it: the first of them is to lead.
        self.flights.shard(&self.key).remove(&self.key);
    }
}

impl Follower {
    /// The row; none when its leader left or failed.
    pub async fn row(mut self) -> Option<Row> {
        let row = self.0.wait_for(Option::is_some).await.ok()?;
        row.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::tests::row;
    use super::*;

    fn lead(flights: &Flights) -> Leader<'_> {
        match flights.join(Key([1; 32])) {
            Joined::Leads(leader) => leader,
            Joined::Follows(_) => panic!("somebody leads"),
        }
    }

    fn follow(flights: &Flights) -> Follower {
        match flights.join(Key([1; 32])) {
            Joined::Leads(_) => panic!("nobody leads"),
            Joined::Follows(follower) => follower,
        }
    }

    #[tokio::test]
    async fn followers_get_the_row_and_the_place_is_free_again() {
        let flights = Flights::default();
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
        let flights = Flights::default();
        let leader = lead(&flights);
        let follower = follow(&flights);
        drop(leader);
        assert_eq!(follower.row().await, None);
        lead(&flights).publish(row("b"));
        assert_eq!(flights.count(), 0);
    }
}
