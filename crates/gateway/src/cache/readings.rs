//! The size of the cache, in the metrics of the process.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::lookup::RowCache;
use super::memory::MemoryCache;

/// The size of the cache, read when the metrics are scraped.
#[derive(Debug)]
pub struct CacheCollector(pub Arc<RowCache>);

impl Collector for CacheCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let cache = &self.0;
        let (entries, bytes) = cache.memory.as_ref().map_or((0, 0), MemoryCache::size);
        let unwritten = cache.redis.as_ref().map_or(0, |redis| redis.unwritten());
        for (name, help, count) in [
            (
                "andon_gateway_cache_entries",
                "Rows cached in memory",
                entries,
            ),
            (
                "andon_gateway_cache_bytes",
                "Bytes of the rows cached in memory",
                bytes,
            ),
            (
                "andon_gateway_cache_in_flight",
                "Rows that one call computes for all that need them (single-flight)",
                cache.flights.count() as u64,
            ),
            (
                "andon_gateway_cache_unwritten",
                "Rows that were not written to Redis: it is too slow or unavailable, or they are too large",
                unwritten,
            ),
        ] {
            let gauge = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}
