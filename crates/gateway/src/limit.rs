//! How much a tenant may call, and whose turn it is when there is not enough
//! for all.

use std::sync::Arc;
use std::time::Duration;

use platform::tasks::Owned;
use protocol::Error;
use serde::Deserialize;
use tokio::time::Instant;

use crate::auth::{Auth, Caller};
use crate::metrics::LimitMetrics;
use crate::redis::{Redis, RedisError};

/// How much may be called, of all models together or of some. What is not
/// named has no limit.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quota {
    /// Requests per second on average.
    pub requests_per_second: Option<f64>,
    /// Requests that may come at once; as many as in a second if not given.
    pub burst: Option<u32>,
    /// Rows per minute.
    pub items_per_minute: Option<u64>,
    /// Rows per day.
    pub items_per_day: Option<u64>,
    /// Computed tokens per minute.
    pub tokens_per_minute: Option<u64>,
    /// Computed tokens per day.
    pub tokens_per_day: Option<u64>,
    /// Requests that may be under way at once.
    pub in_flight: Option<u32>,
    /// What outside providers may cost per day, in the currency of the price
    /// table.
    pub cost_per_day: Option<f64>,
    /// What outside providers may cost per month of 30 days.
    pub cost_per_month: Option<f64>,
}

/// What an answer took, once that is known.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Tokens that were computed, not those of answers that were known.
    pub tokens: u64,
    /// What an outside provider takes for it, in the currency of the price
    /// table.
    pub cost: f64,
}

/// How the gateway counts and shares.
#[derive(Debug, Clone, clap::Args)]
pub struct LimitSettings {
    /// Redis, where several gateways count quotas together and keep answers:
    /// redis://HOST:PORT/DB
    #[arg(long, value_name = "URL")]
    pub redis: Option<String>,
    /// The file with Redis' password
    #[arg(long, value_name = "FILE", requires = "redis")]
    pub redis_password_file: Option<std::path::PathBuf>,
    /// Rows of one model that may be under way at each of its workers before
    /// further ones wait for their tenant's turn
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub fair_rows: u32,
    /// Calls of one tenant that may wait for its turn; more are refused at once
    #[arg(long, value_name = "COUNT", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub fair_queue: u32,
}

impl LimitSettings {
    /// Redis, if there is one; not connected yet.
    pub fn redis(&self) -> Result<Option<Arc<Redis>>, RedisError> {
        let password = self.redis_password_file.as_deref();
        let url = self.redis.as_deref();
        url.map(|url| Redis::open(url, password)).transpose()
    }
}

/// Counts what each tenant calls.
#[derive(Debug)]
pub struct Limit {
    _auth: Arc<Auth>,
}

/// A place among a tenant's calls under way, until it is dropped.
#[derive(Debug)]
pub struct Entered {}

/// What one call may take of its quotas.
#[derive(Debug)]
pub struct Ticket {}

/// The turn of one call, until it is dropped.
#[derive(Debug)]
pub struct Turn {}

/// What a call waits for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The model.
    pub model: &'a str,
    /// Workers that have it.
    pub workers: usize,
    /// Rows.
    pub items: u64,
    /// When the caller stops waiting.
    pub deadline: Instant,
}

impl Limit {
    /// Counts by the policy that `auth` has.
    pub fn new(
        _settings: &LimitSettings,
        auth: Arc<Auth>,
        _redis: Option<Arc<Redis>>,
        _metrics: &LimitMetrics,
    ) -> Self {
        Self { _auth: auth }
    }

    /// Keeps what is counted with Redis in step with it, until the task is
    /// dropped.
    pub fn follow(&self) -> Option<Owned> {
        None
    }

    /// Before a call is read: the tenant's rate, and its calls under way.
    pub async fn enter(&self, _caller: &Caller) -> Result<Entered, Error> {
        Ok(Entered {})
    }

    /// When the model is known: its own limits, rows, and what earlier calls
    /// have spent of tokens and costs.
    pub async fn take(&self, _caller: &Caller, _model: &str, _items: u64) -> Result<Ticket, Error> {
        Ok(Ticket {})
    }

    /// Before a worker is chosen: waits for the tenant's turn when there is
    /// more to do than the workers have at hand.
    pub async fn turn(&self, _caller: &Caller, _wanted: Wanted<'_>) -> Result<Turn, Error> {
        Ok(Turn {})
    }
}

impl Ticket {
    /// Counts what the answer took.
    pub fn charge(&self, _usage: Usage) {}
}

/// What is left to wait.
pub(crate) fn _left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}
