//! The lookup of rows: a hit in memory, a row that another call computes
//! (single-flight), or a hit in Redis. Each miss is computed once.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use super::key::RowKey;
use super::memory::{CachedRow, MemoryCache};
use super::metrics::CacheMetrics;
use super::redis::RedisCache;
use super::single_flight::{Flight, Follower, Leader, SingleFlight};

/// How often a call follows a leader that leaves or fails, before it computes
/// the row itself: callers must not wait for a series of failures of others.
const LEADER_FAILURES_MAX: usize = 2;

/// Computes the misses of one request.
pub trait Compute: Sync {
    /// The result for the caller when the rows cannot be computed.
    type Failure: Send;

    /// Computes the rows of a request at some indices, one for each index.
    fn compute(
        &self,
        indices: &[usize],
    ) -> impl Future<Output = Result<Vec<CachedRow>, Self::Failure>> + Send;
}

/// The layers of the cache.
#[derive(Debug)]
pub struct RowCache {
    /// None when nothing is cached in memory.
    pub memory: Option<MemoryCache>,
    /// Rows that some call computes now.
    pub flights: SingleFlight,
    /// None without Redis.
    pub redis: Option<Arc<RedisCache>>,
    /// Counts hits and misses.
    pub metrics: CacheMetrics,
}

/// All rows of a request.
#[derive(Debug)]
pub struct LookupResult {
    /// One for each row of the request.
    pub rows: Vec<CachedRow>,
    /// How many of them this call computed.
    pub computed: usize,
}

/// The lookup of the rows of one request.
struct Lookup<'s> {
    cache: &'s RowCache,
    keys: &'s [RowKey],
    rows: Vec<Option<CachedRow>>,
    computed: usize,
}

impl RowCache {
    /// The rows of some keys: hits, and misses that `compute` computes. None when
    /// `compute` returns too few.
    pub async fn get_or_compute<C: Compute>(
        &self,
        keys: &[RowKey],
        compute: &C,
    ) -> Result<Option<LookupResult>, C::Failure> {
        let mut lookup = Lookup {
            cache: self,
            keys,
            rows: keys.iter().map(|key| self.hit_in_memory(key)).collect(),
            computed: 0,
        };
        let missing = lookup.rows.iter().filter(|row| row.is_none()).count();
        self.metrics.memory.inc_by((keys.len() - missing) as u64);
        if missing > 0 {
            lookup.fill_misses(compute).await?;
        }
        let rows: Option<Vec<CachedRow>> = lookup.rows.into_iter().collect();
        Ok(rows.map(|rows| LookupResult {
            rows,
            computed: lookup.computed,
        }))
    }

    /// Computes all rows without a lookup, and caches them.
    pub async fn refresh<C: Compute>(
        &self,
        keys: &[RowKey],
        compute: &C,
    ) -> Result<Option<LookupResult>, C::Failure> {
        let indices: Vec<usize> = (0..keys.len()).collect();
        let rows = compute.compute(&indices).await?;
        self.metrics.computed.inc_by(rows.len() as u64);
        self.insert(keys.iter().copied().zip(rows.iter().cloned()));
        Ok((rows.len() == keys.len()).then_some(LookupResult {
            rows,
            computed: keys.len(),
        }))
    }

    fn hit_in_memory(&self, key: &RowKey) -> Option<CachedRow> {
        self.memory.as_ref()?.get(key)
    }

    /// Caches rows in memory, and soon in Redis.
    fn insert(&self, rows: impl Iterator<Item = (RowKey, CachedRow)>) {
        let rows: Vec<(RowKey, CachedRow)> = rows.collect();
        if let Some(memory) = &self.memory {
            for (key, row) in &rows {
                memory.insert(*key, row.clone(), std::time::Duration::MAX);
            }
        }
        if let Some(redis) = &self.redis {
            redis.write_back(rows);
        }
    }
}

impl Lookup<'_> {
    /// Fills in the rows that are not in memory.
    async fn fill_misses<C: Compute>(&mut self, compute: &C) -> Result<(), C::Failure> {
        // A row that the request has twice is looked up once.
        let mut first_indices: HashMap<RowKey, usize> = HashMap::new();
        let mut missing = Vec::new();
        let mut repeated = Vec::new();
        for (index, key) in self.keys.iter().enumerate() {
            if self.rows[index].is_none() {
                let first = *first_indices.entry(*key).or_insert(index);
                if first == index {
                    missing.push(index);
                } else {
                    repeated.push((index, first));
                }
            }
        }
        for _ in 0..LEADER_FAILURES_MAX {
            missing = self.single_flight(missing, compute).await?;
        }
        if !missing.is_empty() {
            let rows = compute.compute(&missing).await?;
            let rows = missing.into_iter().zip(rows).collect();
            self.add_computed(rows);
        }
        self.cache.metrics.coalesced.inc_by(repeated.len() as u64);
        for (index, first) in repeated {
            self.rows[index] = self.rows[first].clone();
        }
        Ok(())
    }

    /// Single-flight: leads the rows that no call computes and follows the
    /// others. Returns the rows whose leaders left or failed.
    async fn single_flight<C: Compute>(
        &mut self,
        missing: Vec<usize>,
        compute: &C,
    ) -> Result<Vec<usize>, C::Failure> {
        let cache = self.cache;
        let mut led: Vec<(usize, Leader<'_>)> = Vec::new();
        let mut followed: Vec<(usize, Follower)> = Vec::new();
        for index in missing {
            let key = &self.keys[index];
            match cache.flights.join(*key) {
                // Its leader may have finished a moment ago.
                Flight::Lead(leader) => match cache.hit_in_memory(key) {
                    Some(row) => {
                        cache.metrics.memory.inc();
                        self.rows[index] = Some(row.clone());
                        leader.publish(row);
                    }
                    None => led.push((index, leader)),
                },
                Flight::Follow(follower) => followed.push((index, follower)),
            }
        }
        let led = self.hits_in_redis(led).await;
        if !led.is_empty() {
            let indices: Vec<usize> = led.iter().map(|(index, _)| *index).collect();
            // On failure, or when this is dropped, the leaders give up.
            let rows = compute.compute(&indices).await?;
            self.add_computed(indices.into_iter().zip(rows.iter().cloned()).collect());
            for ((_, leader), row) in led.into_iter().zip(rows) {
                leader.publish(row);
            }
        }
        // The led rows have been published: calls never wait in a circle.
        let mut lost = Vec::new();
        for (index, follower) in followed {
            match follower.row().await {
                Some(row) => {
                    cache.metrics.coalesced.inc();
                    self.rows[index] = Some(row);
                }
                None => lost.push(index),
            }
        }
        Ok(lost)
    }

    /// Looks the led rows up in Redis, in one round trip. Returns the misses.
    async fn hits_in_redis<'l>(
        &mut self,
        led: Vec<(usize, Leader<'l>)>,
    ) -> Vec<(usize, Leader<'l>)> {
        let cache = self.cache;
        let (Some(redis), false) = (&cache.redis, led.is_empty()) else {
            return led;
        };
        let keys: Vec<RowKey> = led.iter().map(|(index, _)| self.keys[*index]).collect();
        let mut results = redis.get(&keys).await.into_iter();
        let mut left = Vec::new();
        for (index, leader) in led {
            let Some((row, ttl)) = results.next().flatten() else {
                left.push((index, leader));
                continue;
            };
            cache.metrics.shared.inc();
            if let Some(memory) = &cache.memory {
                memory.insert(self.keys[index], row.clone(), ttl);
            }
            self.rows[index] = Some(row.clone());
            leader.publish(row);
        }
        left
    }

    /// Adds and caches rows that were computed.
    fn add_computed(&mut self, rows: Vec<(usize, CachedRow)>) {
        self.computed += rows.len();
        self.cache.metrics.computed.inc_by(rows.len() as u64);
        let keys = self.keys;
        let keyed = rows.iter().map(|(index, row)| (keys[*index], row.clone()));
        self.cache.insert(keyed);
        for (index, row) in rows {
            self.rows[index] = Some(row);
        }
    }
}

#[cfg(test)]
mod tests;
