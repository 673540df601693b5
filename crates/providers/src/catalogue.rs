//! The models of outside services, and the chains.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use platform::files::{FileError, FileSource};
use platform::grpc::MessageLimits;
use platform::tasks::OwnedTask;
use protocol::Error;

use crate::metrics::ProviderMetrics;
use crate::provider::{Provider, check_version};
use crate::settings::ProvidersFile;

/// The providers file has less.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Where the providers file is.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ProviderSettings {
    /// Models of outside services, their prices, and fallback chains, in TOML
    #[arg(long, value_name = "FILE")]
    pub providers: Option<PathBuf>,
}

/// The models of outside services, and the chains.
#[derive(Debug, Default)]
pub struct Catalogue {
    /// Models by the names that callers use.
    pub providers: BTreeMap<String, Arc<Provider>>,
    /// Chains by their names.
    pub chains: BTreeMap<String, Arc<Chain>>,
    /// The metrics of all of them.
    pub metrics: ProviderMetrics,
}

/// A fallback chain: models that stand in for one another, the preferred
/// first.
#[derive(Debug)]
pub struct Chain {
    /// The name that callers use.
    pub name: String,
    /// Models of workers or of providers.
    pub models: Vec<String>,
}

impl Catalogue {
    /// Reads the providers file, if one is named, and the API keys. Responses
    /// count against `limits`.
    pub fn new(settings: &ProviderSettings, limits: &MessageLimits) -> Result<Self, FileError> {
        let Some(path) = &settings.providers else {
            return Ok(Self::default());
        };
        let source = FileSource::new(path, "providers file", FILE_BYTES_MAX);
        let file = ProvidersFile::parse(&source.read_text()?);
        let file = file.map_err(|error| source.invalid(error))?;
        let mut catalogue = Self::default();
        for (name, model) in file.models {
            let provider = Provider::new(&name, model, limits, &catalogue.metrics)
                .map_err(|error| source.invalid(error.of_model(&name)))?;
            // A series from the start: its circuit breaker is closed.
            catalogue.metrics.breaker(&name, false);
            catalogue.providers.insert(name, Arc::new(provider));
        }
        for (name, chain) in file.chains {
            let models = chain.models;
            let chain = Chain {
                name: name.clone(),
                models,
            };
            catalogue.chains.insert(name, Arc::new(chain));
        }
        Ok(catalogue)
    }

    /// Whether a name is a provider's model or a chain.
    pub fn has(&self, name: &str) -> bool {
        self.providers.contains_key(name) || self.chains.contains_key(name)
    }

    /// Every name, and whether it is a `provider` or a `chain`.
    pub fn names(&self) -> impl Iterator<Item = (&str, &'static str)> {
        let providers = self
            .providers
            .keys()
            .map(|name| (name.as_str(), "provider"));
        providers.chain(self.chains.keys().map(|name| (name.as_str(), "chain")))
    }

    /// Refuses to load or unload a name of the catalogue: only workers do.
    pub fn must_be_workers(&self, name: &str) -> Result<(), Error> {
        if !self.has(name) {
            return Ok(());
        }
        let reason = "models of outside providers cannot be loaded or unloaded";
        Err(Error::invalid("model_name", reason))
    }

    /// Reloads API keys when their files change, until the tasks are dropped.
    pub fn follow(&self) -> Vec<OwnedTask> {
        let providers = self.providers.values();
        providers.filter_map(|provider| provider.follow()).collect()
    }
}

impl Chain {
    /// Checks the version of a request: there is only one.
    pub fn check_version(&self, version: &str) -> Result<(), Error> {
        check_version(&self.name, version)
    }
}
