//! The metrics of authentication.

use platform::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

/// Why a call is refused: the series are there from the start, so that the first
/// refusals are an increase.
const REASONS: [&str; 22] = [
    "certificate_unknown",
    "clear_text",
    "contradictory",
    "key_expired",
    "key_malformed",
    "key_revoked",
    "key_unknown",
    "malformed",
    "missing",
    "signers_busy",
    "signers_unreachable",
    "tenant_unknown",
    "token_algorithm",
    "token_audience",
    "token_claims",
    "token_early",
    "token_expired",
    "token_issuer",
    "token_key",
    "token_malformed",
    "token_not_taken",
    "token_signature",
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// The metrics of authentication.
#[derive(Debug, Clone, Default)]
pub struct AuthMetrics {
    refused: Family<ReasonLabel, Counter>,
}

impl AuthMetrics {
    /// Registers the metrics.
    pub fn register(&self, metrics: &Metrics) {
        for reason in REASONS {
            drop(self.refused.get_or_create(&ReasonLabel { reason }));
        }
        metrics.register(|registry| {
            registry.register(
                "andon_gateway_auth_refused",
                "Calls refused by authentication",
                self.refused.clone(),
            );
        });
    }

    /// Counts a call that is refused.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }
}
