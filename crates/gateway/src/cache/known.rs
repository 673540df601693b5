//! What is known of some rows: in memory, under way in another call, or in
//! Redis. What nobody knows is computed, once.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use super::counts::Counts;
use super::flight::{Flights, Follower, Joined, Leader};
use super::key::Key;
use super::memory::{Memory, Row};
use super::remote::Remote;

/// How often a call follows another that then leaves or fails, before it
/// computes alone: callers must not wait for each other's failures in a row.
const LOST_MAX: usize = 2;

/// Computes rows that nobody knows.
pub trait Compute: Sync {
    /// What the caller gets when there are no such rows.
    type Instead: Send;

    /// The rows of some places of a request, one for each place.
    fn compute(
        &self,
        places: &[usize],
    ) -> impl Future<Output = Result<Vec<Row>, Self::Instead>> + Send;
}

/// Where rows may be known.
#[derive(Debug)]
pub struct Known {
    /// None when nothing is kept.
    pub memory: Option<Memory>,
    /// Rows under way.
    pub flights: Flights,
    /// None without Redis.
    pub remote: Option<Arc<Remote>>,
    /// What happened.
    pub counts: Counts,
}

/// The rows of a request.
#[derive(Debug)]
pub struct Found {
    /// One for each place.
    pub rows: Vec<Row>,
    /// Those that this call computed.
    pub computed: usize,
}

/// The search for the rows of one request.
struct Search<'s> {
    known: &'s Known,
    keys: &'s [Key],
    rows: Vec<Option<Row>>,
    computed: usize,
}

impl Known {
    /// The rows that some keys stand for. None when `compute` gave too few.
    pub async fn rows<C: Compute>(
        &self,
        keys: &[Key],
        compute: &C,
    ) -> Result<Option<Found>, C::Instead> {
        let mut search = Search {
            known: self,
            keys,
            rows: keys.iter().map(|key| self.remembered(key)).collect(),
            computed: 0,
        };
        let missing = search.rows.iter().filter(|row| row.is_none()).count();
        self.counts.memory.inc_by((keys.len() - missing) as u64);
        if missing > 0 {
            search.find(compute).await?;
        }
        let rows: Option<Vec<Row>> = search.rows.into_iter().collect();
        Ok(rows.map(|rows| Found {
            rows,
            computed: search.computed,
        }))
    }

    /// The same, computed afresh and kept.
    pub async fn fresh<C: Compute>(
        &self,
        keys: &[Key],
        compute: &C,
    ) -> Result<Option<Found>, C::Instead> {
        let places: Vec<usize> = (0..keys.len()).collect();
        let rows = compute.compute(&places).await?;
        self.counts.computed.inc_by(rows.len() as u64);
        self.keep(keys.iter().copied().zip(rows.iter().cloned()));
        Ok((rows.len() == keys.len()).then_some(Found {
            rows,
            computed: keys.len(),
        }))
    }

    fn remembered(&self, key: &Key) -> Option<Row> {
        self.memory.as_ref()?.get(key)
    }

    /// Keeps rows here, and soon in Redis.
    fn keep(&self, rows: impl Iterator<Item = (Key, Row)>) {
        let rows: Vec<(Key, Row)> = rows.collect();
        if let Some(memory) = &self.memory {
            for (key, row) in &rows {
                memory.insert(*key, row.clone(), std::time::Duration::MAX);
            }
        }
        if let Some(remote) = &self.remote {
            remote.write_back(rows);
        }
    }
}

impl Search<'_> {
    /// Finds the rows that are not in memory.
    async fn find<C: Compute>(&mut self, compute: &C) -> Result<(), C::Instead> {
        // A row that is there twice is needed once.
        let mut first_places: HashMap<Key, usize> = HashMap::new();
        let mut missing = Vec::new();
        let mut repeated = Vec::new();
        for (place, key) in self.keys.iter().enumerate() {
            if self.rows[place].is_none() {
                let first = *first_places.entry(*key).or_insert(place);
                match first == place {
                    true => missing.push(place),
                    false => repeated.push((place, first)),
                }
            }
        }
        for _ in 0..LOST_MAX {
            missing = self.together(missing, compute).await?;
        }
        if !missing.is_empty() {
            let rows = compute.compute(&missing).await?;
            let rows = missing.into_iter().zip(rows).collect();
            self.computed(rows);
        }
        self.known.counts.coalesced.inc_by(repeated.len() as u64);
        for (place, first) in repeated {
            self.rows[place] = self.rows[first].clone();
        }
        Ok(())
    }

    /// Leads what nobody computes and follows the rest. Comes back with the
    /// places whose leaders left or failed.
    async fn together<C: Compute>(
        &mut self,
        missing: Vec<usize>,
        compute: &C,
    ) -> Result<Vec<usize>, C::Instead> {
        let known = self.known;
        let mut led: Vec<(usize, Leader<'_>)> = Vec::new();
        let mut followed: Vec<(usize, Follower)> = Vec::new();
        for place in missing {
            let key = &self.keys[place];
            match known.flights.join(*key) {
                // Its last leader may have finished a moment ago.
                Joined::Leads(leader) => match known.remembered(key) {
                    Some(row) => {
                        known.counts.memory.inc();
                        self.rows[place] = Some(row.clone());
                        leader.publish(row);
                    }
                    None => led.push((place, leader)),
                },
                Joined::Follows(follower) => followed.push((place, follower)),
            }
        }
        let led = self.fetched(led).await;
        if !led.is_empty() {
            let places: Vec<usize> = led.iter().map(|(place, _)| *place).collect();
            // What is led is given up when this fails or is dropped.
            let rows = compute.compute(&places).await?;
            self.computed(places.into_iter().zip(rows.iter().cloned()).collect());
            for ((_, leader), row) in led.into_iter().zip(rows) {
                leader.publish(row);
            }
        }
        // What is led has been given by now: calls never wait in a circle.
        let mut lost = Vec::new();
        for (place, follower) in followed {
            match follower.row().await {
                Some(row) => {
                    known.counts.coalesced.inc();
                    self.rows[place] = Some(row);
                }
                None => lost.push(place),
            }
        }
        Ok(lost)
    }

    /// Asks Redis for what is led, in one round trip; comes back with what is
    /// not there.
    async fn fetched<'l>(&mut self, led: Vec<(usize, Leader<'l>)>) -> Vec<(usize, Leader<'l>)> {
        let known = self.known;
        let (Some(remote), false) = (&known.remote, led.is_empty()) else {
            return led;
        };
        let keys: Vec<Key> = led.iter().map(|(place, _)| self.keys[*place]).collect();
        let mut answers = remote.get(&keys).await.into_iter();
        let mut left = Vec::new();
        for (place, leader) in led {
            let Some((row, ttl)) = answers.next().flatten() else {
                left.push((place, leader));
                continue;
            };
            known.counts.shared.inc();
            if let Some(memory) = &known.memory {
                memory.insert(self.keys[place], row.clone(), ttl);
            }
            self.rows[place] = Some(row.clone());
            leader.publish(row);
        }
        left
    }

    /// Takes what was computed.
    fn computed(&mut self, rows: Vec<(usize, Row)>) {
        self.computed += rows.len();
        self.known.counts.computed.inc_by(rows.len() as u64);
        let keys = self.keys;
        let keyed = rows.iter().map(|(place, row)| (keys[*place], row.clone()));
        self.known.keep(keyed);
        for (place, row) in rows {
            self.rows[place] = Some(row);
        }
    }
}

#[cfg(test)]
mod tests;
