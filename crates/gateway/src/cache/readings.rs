//! The size of the cache, in the metrics of the process.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::known::Known;
use super::memory::Memory;

/// The size of the cache, read when metrics are scraped.
#[derive(Debug)]
pub struct Readings(pub Arc<Known>);

impl Collector for Readings {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let known = &self.0;
        let (entries, bytes) = known.memory.as_ref().map_or((0, 0), Memory::size);
        let unwritten = known.remote.as_ref().map_or(0, |remote| remote.unwritten());
        for (name, help, count) in [
            ("andon_gateway_cache_entries", "Rows in memory", entries),
            (
                "andon_gateway_cache_bytes",
                "Bytes that the rows in memory take",
                bytes,
            ),
            (
                "andon_gateway_cache_in_flight",
                "Rows that are being computed for all who ask",
                known.flights.count() as u64,
            ),
            (
                "andon_gateway_cache_unwritten",
                "Rows that were not written to Redis: it is too slow or out of reach, or they are too large",
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
