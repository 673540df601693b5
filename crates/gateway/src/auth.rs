//! Authentication: the caller behind an API key, a token or a client certificate. See docs/decisions/identity.md.

mod jwks;
mod jwt;
mod keys;
mod metrics;

pub use keys::{KeyError, KeyFile, NewKey, StoredKey};
pub use metrics::AuthMetrics;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue};
use platform::files::{Change, FileError, Followed, POLL_INTERVAL};
use platform::tasks::{OwnedTask, spawn_owned};
use platform::tls::Peer;
use protocol::{Error, Kind};

use crate::policy::{Caller, Openness, Policy, PolicyCell, Tenant};
use jwt::Tokens;
use keys::Keys;

/// The settings of authentication.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct AuthSettings {
    /// Policy file in TOML: tenants, their models, quotas and tokens. Reloaded when
    /// it changes
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// File with the API keys of `andon keys`. Reloaded when it changes
    #[arg(long, value_name = "FILE", requires = "policy")]
    pub keys: Option<PathBuf>,
    /// Serve a public address without authentication: callers infer and read, and
    /// those on loopback are administrators
    #[arg(long)]
    pub insecure: bool,
    /// Without a policy, every caller may load, unload and change settings, not
    /// those on loopback alone
    #[arg(long)]
    pub insecure_admin: bool,
    /// Accept no key and no token over clear text, unless the ports are on
    /// loopback addresses
    #[arg(long)]
    pub require_tls: bool,
}

/// Why a credential is rejected: the reason for the metric, and a message that
/// repeats nothing that the caller sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rejection {
    reason: &'static str,
    message: &'static str,
    kind: Kind,
}

impl Rejection {
    const fn new(reason: &'static str, message: &'static str) -> Self {
        Self {
            reason,
            message,
            kind: Kind::Unauthenticated,
        }
    }
}

const MISSING: Rejection = Rejection::new(
    "missing",
    "an API key or a token is required: set authorization: Bearer, or x-api-key",
);
const MALFORMED: Rejection = Rejection::new(
    "malformed",
    "the credential is malformed: authorization takes Bearer and a key or token, x-api-key takes a key",
);
const CONTRADICTORY: Rejection = Rejection::new(
    "contradictory",
    "the call has several credentials that differ",
);
const UNKNOWN_CERTIFICATE: Rejection = Rejection::new(
    "certificate_unknown",
    "the client certificate belongs to no tenant",
);
const CLEAR_TEXT: Rejection = Rejection::new(
    "clear_text",
    "keys and tokens are not accepted over clear text: use TLS",
);
const TOKENS_DISABLED: Rejection = Rejection::new(
    "token_not_taken",
    "the bearer is no API key of this server, and the server accepts no tokens",
);

/// Authenticates callers.
#[derive(Debug)]
pub struct Auth {
    settings: AuthSettings,
    /// Where nobody authenticates, an administrator.
    anyone: Caller,
    /// The same, but no administrator: it calls from another machine.
    stranger: Caller,
    files: Option<Files>,
    state: ArcSwap<State>,
    /// The policy of the state, for the layers that need nothing else of it.
    policy: PolicyCell,
    /// Whether keys and tokens are refused: they come over clear text.
    clear_text_refused: AtomicBool,
    metrics: AuthMetrics,
}

/// The files that make the state.
#[derive(Debug, Clone)]
struct Files {
    policy: Followed<Policy>,
    keys: Option<Followed<Vec<StoredKey>>>,
    /// A valid policy whose JWKS file does not exist yet.
    waiting: Option<Arc<Policy>>,
}

/// Everything that callers are recognized by, at one moment.
#[derive(Debug, Default)]
struct State {
    policy: Arc<Policy>,
    stored: Arc<Vec<StoredKey>>,
    keys: Keys,
    tokens: Option<Tokens>,
    certificates: HashMap<String, Caller>,
    anonymous: Option<Caller>,
}

impl Auth {
    /// Reads the files; without a policy all callers are one tenant, which may
    /// do everything, but for administration from other machines.
    pub fn new(settings: &AuthSettings) -> Result<Self, FileError> {
        let (mut files, mut state) = (None, State::default());
        if let Some(path) = &settings.policy {
            let folder = path.clone();
            let parse = move |text: &str| Policy::parse(text, &folder);
            let policy = Followed::open_text(Policy::source(path), parse)?;
            let keys = match &settings.keys {
                Some(path) => Some(Followed::open_text(keys::source(path), keys::parse)?),
                None => None,
            };
            let stored = keys.as_ref().map(|keys| keys.value().clone());
            state = State::new(policy.value().clone(), stored.unwrap_or_default(), None)?;
            files = Some(Files {
                policy,
                keys,
                waiting: None,
            });
        }
        Ok(Self {
            settings: settings.clone(),
            anyone: Caller::gateway(),
            stranger: Caller::new(Arc::new(Tenant::stranger()), ""),
            files,
            policy: Arc::new(ArcSwap::new(state.policy.clone())),
            state: ArcSwap::from_pointee(state),
            clear_text_refused: AtomicBool::new(false),
            metrics: AuthMetrics::default(),
        })
    }

    /// The metrics of authentication.
    pub(crate) fn metrics(&self) -> &AuthMetrics {
        &self.metrics
    }

    /// Reads the files again when they change, until the tasks are dropped. A
    /// bad file changes nothing.
    pub fn follow(self: &Arc<Self>) -> Vec<OwnedTask> {
        let Some(files) = self.files.clone() else {
            return Vec::new();
        };
        let auth = self.clone();
        vec![spawn_owned(async move { auth.keep_up(files).await })]
    }

    async fn keep_up(&self, mut files: Files) {
        let fetching = |state: &State| state.tokens.as_ref().and_then(Tokens::fetching);
        let mut _fetching = fetching(&self.state.load());
        loop {
            tokio::time::sleep(POLL_INTERVAL).await;
            let before = self.state.load_full();
            if let Some(after) = self.renewed(&mut files) {
                let after = Arc::new(after);
                if !after.same_signers(&before) {
                    _fetching = fetching(&after);
                }
                self.replace(after);
            }
            if let Some(tokens) = &self.state.load().tokens {
                tokens.poll_file();
            }
        }
    }

    /// Makes a state the current one, and its policy that of the other layers.
    fn replace(&self, state: Arc<State>) {
        self.policy.store(state.policy.clone());
        self.state.store(state);
    }

    /// The state after a poll of the files, if they have changed. A policy whose
    /// JWKS file cannot be used keeps no key from being revoked, and is tried
    /// again at the next poll.
    fn renewed(&self, files: &mut Files) -> Option<State> {
        let before = self.state.load_full();
        let policy = files.policy.poll();
        if !matches!(policy, Change::Unchanged) {
            // The file no longer holds the policy that waits.
            files.waiting = None;
        }
        let policy = policy.accepted();
        let stored = files.keys.as_mut().and_then(|keys| keys.poll().accepted());
        let is_new = policy.is_some();
        if let Some(policy) = policy.or_else(|| files.waiting.take()) {
            match before.next(Some(policy.clone()), stored.clone()) {
                Ok(after) => {
                    if !is_new {
                        tracing::info!("the policy that waited for its JWKS file is in use");
                    }
                    return Some(after);
                }
                Err(error) => {
                    if is_new {
                        tracing::error!(%error, "the changed policy waits for its JWKS file: the previous one stays in use");
                    }
                    files.waiting = Some(policy);
                }
            }
        }
        // The signers of the previous policy are at hand.
        stored.map(|stored| before.next(None, Some(stored)).unwrap_or_default())
    }

    /// Whether callers must authenticate.
    pub fn is_required(&self) -> bool {
        self.settings.policy.is_some()
    }

    /// Accepts no key and no token from now on, since they come over clear text.
    pub fn refuse_clear_text(&self) {
        self.clear_text_refused.store(true, Ordering::Relaxed);
    }

    /// Whether reflection needs no authentication.
    pub fn reflection_is_open(&self) -> bool {
        !self.is_required() || self.state.load().policy.reflection == Openness::Open
    }

    /// The current policy.
    pub fn policy(&self) -> &PolicyCell {
        &self.policy
    }

    /// Authenticates a caller by a key or a token in the metadata, or by a client
    /// certificate. The error says why the credential is rejected.
    pub async fn caller(&self, headers: &HeaderMap, peer: &Peer) -> Result<Caller, Error> {
        if !self.is_required() {
            return Ok(self.anyone(peer));
        }
        let state = self.state.load_full();
        let clear_text = self.clear_text_refused.load(Ordering::Relaxed);
        let caller = if clear_text && !matches!(credential(headers), Ok(None)) {
            Err(CLEAR_TEXT)
        } else {
            state.authenticate(headers, peer).await
        };
        caller.map_err(|rejection| {
            self.metrics.refused(rejection.reason);
            Error::new(rejection.kind, rejection.message)
        })
    }

    /// The caller of a call that needs no authentication. Nobody is an
    /// administrator because a network lets its calls pass: without an identity
    /// only callers on loopback are, and the gateway's own process.
    pub fn anyone(&self, peer: &Peer) -> Caller {
        let address = peer.address.map(|address| address.ip());
        let is_near = address.is_none_or(|address| address.to_canonical().is_loopback());
        let caller = if is_near || self.settings.insecure_admin {
            &self.anyone
        } else {
            &self.stranger
        };
        Caller {
            address,
            ..caller.clone()
        }
    }
}

impl State {
    fn new(
        policy: Arc<Policy>,
        stored: Arc<Vec<StoredKey>>,
        before: Option<&Self>,
    ) -> Result<Self, FileError> {
        let signers = before.and_then(|before| before.tokens.as_ref());
        let tokens = match &policy.jwt {
            Some(rules) => Some(Tokens::new(policy.clone(), rules.clone(), signers)?),
            None => None,
        };
        let certified = |(name, tenant): (&String, &Arc<Tenant>)| {
            let credential = format!("cert:{}", shortened(name));
            (name.clone(), Caller::new(tenant.clone(), credential))
        };
        Ok(Self {
            keys: Keys::new(&stored, &policy),
            tokens,
            certificates: policy.certificates.iter().map(certified).collect(),
            anonymous: policy
                .anonymous
                .clone()
                .map(|tenant| Caller::new(tenant, "anonymous")),
            policy,
            stored,
        })
    }

    /// The same state with a new policy or new keys.
    fn next(
        &self,
        policy: Option<Arc<Policy>>,
        stored: Option<Arc<Vec<StoredKey>>>,
    ) -> Result<Self, FileError> {
        let policy = policy.unwrap_or_else(|| self.policy.clone());
        let stored = stored.unwrap_or_else(|| self.stored.clone());
        Self::new(policy, stored, Some(self))
    }

    fn same_signers(&self, other: &Self) -> bool {
        match (&self.tokens, &other.tokens) {
            (Some(tokens), Some(others)) => tokens.same_signers(others),
            (None, None) => true,
            _ => false,
        }
    }

    async fn authenticate(&self, headers: &HeaderMap, peer: &Peer) -> Result<Caller, Rejection> {
        let by_credential = match credential(headers)? {
            Some(key) if key.starts_with(keys::KEY_PREFIX) => {
                Some(self.keys.caller(key, SystemTime::now())?)
            }
            Some(token) => match &self.tokens {
                Some(tokens) => Some(tokens.caller(token).await?),
                None => return Err(TOKENS_DISABLED),
            },
            None => None,
        };
        match (by_credential, self.caller_by_certificate(peer)?) {
            (Some(one), Some(other)) if one.tenant.name != other.tenant.name => Err(CONTRADICTORY),
            (Some(caller), _) | (None, Some(caller)) => Ok(caller),
            (None, None) if self.has_unknown_certificate(peer) => Err(UNKNOWN_CERTIFICATE),
            (None, None) => self.anonymous.clone().ok_or(MISSING),
        }
    }

    /// The caller of the client certificate.
    fn caller_by_certificate(&self, peer: &Peer) -> Result<Option<Caller>, Rejection> {
        let mut found: Option<&Caller> = None;
        for caller in peer
            .certificate_names
            .iter()
            .filter_map(|name| self.certificates.get(name))
        {
            match found {
                Some(other) if other.tenant.name != caller.tenant.name => {
                    return Err(CONTRADICTORY);
                }
                Some(_) => {}
                None => found = Some(caller),
            }
        }
        Ok(found.cloned())
    }

    /// Whether the certificate belongs to no tenant, where others do.
    fn has_unknown_certificate(&self, peer: &Peer) -> bool {
        !self.certificates.is_empty() && !peer.certificate_names.is_empty()
    }
}

/// The credential in the metadata. The same one may be there twice, under two
/// names.
fn credential(headers: &HeaderMap) -> Result<Option<&str>, Rejection> {
    let mut found: Option<&str> = None;
    let bearers = headers.get_all(AUTHORIZATION).iter().map(bearer);
    let keys = ["x-api-key", "api-key"];
    let keys = keys.iter().flat_map(|name| headers.get_all(*name)).map(key);
    for credential in bearers.chain(keys) {
        let credential = credential.ok_or(MALFORMED)?;
        match found {
            Some(other) if other != credential => return Err(CONTRADICTORY),
            _ => found = Some(credential),
        }
    }
    Ok(found)
}

fn bearer(value: &HeaderValue) -> Option<&str> {
    let (scheme, token) = value.to_str().ok()?.trim().split_once(' ')?;
    let token = token.trim_start();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

fn key(value: &HeaderValue) -> Option<&str> {
    let key = value.to_str().ok()?.trim();
    key.starts_with(keys::KEY_PREFIX).then_some(key)
}

/// A name for the trace, of at most 64 characters without control characters.
fn shortened(name: &str) -> String {
    name.chars()
        .filter(|character| !character.is_control())
        .take(64)
        .collect()
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes).as_ref());
    hash
}

#[cfg(test)]
mod tests;
