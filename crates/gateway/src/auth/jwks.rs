//! The keys that verify tokens (JSON Web Key Set, RFC 7517): from a file or a URL,
//! never from a token.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use jsonwebtoken::jwk::{
    AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse,
};
use jsonwebtoken::{Algorithm, DecodingKey};
use platform::files::{ContentError, FileError, FileSource, Followed};
use platform::tasks::{OwnedTask, spawn_owned};
use serde::Deserialize;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};

use super::Rejection;
use crate::policy::JwksSource;

const WHAT: &str = "the signers' keys";
/// The largest key set: some hundreds of keys.
const BYTES_MAX: u64 = 1 << 20;
const KEYS_MAX: usize = 1000;
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the keys are fetched in any case: a key that its signer has withdrawn
/// must not be accepted any longer.
const FETCH_INTERVAL: Duration = Duration::from_secs(600);
/// The first backoff after a failed fetch, and the longest.
const BACKOFF: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// How often unknown keys may cause a fetch: anyone can send tokens with invented key
/// ids.
const FETCH_ON_DEMAND_INTERVAL: Duration = Duration::from_secs(60);
/// Calls that may wait for a fetch.
const WAITING_MAX: usize = 64;

const UNKNOWN: Rejection = Rejection::new("token_key", "the token is signed with an unknown key");
const UNNAMED: Rejection = Rejection::new(
    "token_key",
    "the token has no key id (kid), and the server has several keys",
);
const NOT_FETCHED: Rejection = Rejection {
    reason: "signers_unreachable",
    message: "tokens cannot be verified now: the keys of their issuer are unavailable",
    kind: protocol::Kind::NotReady,
};

const BUSY: Rejection = Rejection {
    reason: "signers_busy",
    message: "the token cannot be verified now: too many calls wait for the keys of its issuer",
    kind: protocol::Kind::NotReady,
};

/// One key of a signer, and the only algorithm for which it is accepted.
#[derive(Debug)]
pub struct Signer {
    pub algorithm: Algorithm,
    pub key: DecodingKey,
    material: AlgorithmParameters,
}

/// A snapshot of the keys of all signers.
#[derive(Debug)]
pub struct KeySet {
    /// Unique among the sets of a process.
    pub number: u64,
    text: String,
    named: HashMap<String, Arc<Signer>>,
    unnamed: Vec<Arc<Signer>>,
}

#[derive(Deserialize)]
struct JwkSet {
    keys: Vec<serde_json::Value>,
}

impl KeySet {
    /// Parses a set (RFC 7517). Keys of other types, for other uses and with values
    /// that are wrong are skipped, and so are different keys with one id, since a
    /// token does not say which of them it means. A set without a usable key is an
    /// error.
    pub fn parse(text: String) -> Result<Self, ContentError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let wrong = |reason: &str| ContentError::new(reason);
        let document: JwkSet =
            serde_json::from_str(&text).map_err(|error| wrong(&error.to_string()))?;
        if document.keys.len() > KEYS_MAX {
            return Err(wrong("there are more than 1000 keys"));
        }
        let mut set = Self {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            text,
            named: HashMap::new(),
            unnamed: Vec::new(),
        };
        let mut doubled = HashSet::new();
        let read = document.keys.into_iter();
        for jwk in read.filter_map(|key| serde_json::from_value::<Jwk>(key).ok()) {
            let Some(signer) = signer(&jwk).map(Arc::new) else {
                continue;
            };
            let Some(name) = jwk.common.key_id else {
                set.unnamed.push(signer);
                continue;
            };
            match set.named.get(&name) {
                Some(other) if other.material != signer.material => {
                    doubled.insert(name);
                }
                _ => {
                    set.named.insert(name, signer);
                }
            }
        }
        if !doubled.is_empty() {
            set.named.retain(|name, _| !doubled.contains(name));
            tracing::warn!(
                ids = doubled.len(),
                "several of {WHAT} have one kid: none of these is used"
            );
        }
        if set.named.is_empty() && set.unnamed.is_empty() {
            return Err(wrong(
                "there is no key for RS256, ES256 or EdDSA with a kid of its own",
            ));
        }
        Ok(set)
    }

    /// The key of an id; without an id, the only key.
    fn choose(&self, kid: Option<&str>) -> Result<Arc<Signer>, Rejection> {
        if let Some(kid) = kid {
            return self.named.get(kid).cloned().ok_or(UNKNOWN);
        }
        let mut all = self.named.values().chain(&self.unnamed);
        match (all.next(), all.next()) {
            (Some(only), None) => Ok(only.clone()),
            _ => Err(UNNAMED),
        }
    }
}

/// A key with its algorithm, by the type of the key: the algorithm in the header of a
/// token is not trusted.
fn signer(jwk: &Jwk) -> Option<Signer> {
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => {
            Algorithm::ES256
        }
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
            Algorithm::EdDSA
        }
        _ => return None,
    };
    let common = &jwk.common;
    let stated = common.key_algorithm;
    let verifies = |operations: &Vec<KeyOperations>| operations.contains(&KeyOperations::Verify);
    let fits = stated.is_none_or(|stated| stated == KeyAlgorithm::from(algorithm))
        && matches!(common.public_key_use, None | Some(PublicKeyUse::Signature))
        && common.key_operations.as_ref().is_none_or(verifies);
    let key = DecodingKey::from_jwk(jwk).ok().filter(|_| fits)?;
    Some(Signer {
        algorithm,
        key,
        material: jwk.algorithm.clone(),
    })
}

/// The current keys of the signers, and their source.
#[derive(Debug)]
pub struct Signers {
    pub source: JwksSource,
    current: ArcSwapOption<KeySet>,
    /// Its file, where it has one.
    file: Mutex<Option<Followed<KeySet>>>,
    demand: Mutex<FetchDemand>,
    fetch_demanded: Notify,
    fetched: watch::Sender<()>,
    waiting: Semaphore,
}

/// Fetches that calls have caused.
#[derive(Debug, Default)]
struct FetchDemand {
    last: Option<Instant>,
    in_flight: bool,
}

impl Signers {
    /// Reads a file now; a URL is fetched by the task of `fetching`.
    pub fn new(source: &JwksSource) -> Result<Self, FileError> {
        let file = match source {
            JwksSource::File(path) => Some(Followed::open_text(
                FileSource::new(path, "JWKS file", BYTES_MAX),
                |text| KeySet::parse(text.to_owned()),
            )?),
            JwksSource::Url(_) => None,
        };
        let current = file.as_ref().map(|file| file.value().clone());
        Ok(Self {
            source: source.clone(),
            current: ArcSwapOption::new(current),
            file: Mutex::new(file),
            demand: Mutex::default(),
            fetch_demanded: Notify::new(),
            fetched: watch::Sender::new(()),
            waiting: Semaphore::new(WAITING_MAX),
        })
    }

    /// The number of the current set.
    pub fn number(&self) -> Option<u64> {
        self.current.load().as_ref().map(|set| set.number)
    }

    /// Reloads the file if it has changed.
    pub fn poll_file(&self) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(set) = file.as_mut().and_then(|file| file.poll().accepted()) {
            self.current.store(Some(set));
        }
    }

    /// The key with an id, and the number of its set. An unknown key may be newer
    /// than the last fetch.
    pub async fn choose(&self, kid: Option<&str>) -> Result<(Arc<Signer>, u64), Rejection> {
        let chosen = self.current_key(kid);
        let may_be_new = matches!(chosen, Err(rejection) if rejection != UNNAMED);
        if may_be_new && self.fetch_now().await? {
            return self.current_key(kid);
        }
        chosen
    }

    fn current_key(&self, kid: Option<&str>) -> Result<(Arc<Signer>, u64), Rejection> {
        let set = self.current.load();
        let set = set.as_ref().ok_or(NOT_FETCHED)?;
        Ok((set.choose(kid)?, set.number))
    }

    /// Causes a fetch and waits for it (single-flight for concurrent calls). False
    /// when the last one was recent, or there is no URL. When too many calls wait
    /// already, a further one is refused at once.
    async fn fetch_now(&self) -> Result<bool, Rejection> {
        let (mut fetched, _permit) = {
            let mut demand = self.demand.lock().unwrap_or_else(PoisonError::into_inner);
            let recent = demand
                .last
                .is_some_and(|last| last.elapsed() < FETCH_ON_DEMAND_INTERVAL);
            if !demand.in_flight && (recent || matches!(self.source, JwksSource::File(_))) {
                return Ok(false);
            }
            let permit = self.waiting.try_acquire().map_err(|_| BUSY)?;
            if !demand.in_flight {
                (demand.in_flight, demand.last) = (true, Some(Instant::now()));
                self.fetch_demanded.notify_one();
            }
            (self.fetched.subscribe(), permit)
        };
        let wait_max = FETCH_TIMEOUT + Duration::from_secs(1);
        Ok(matches!(
            timeout(wait_max, fetched.changed()).await,
            Ok(Ok(()))
        ))
    }

    /// A task that fetches the URL now, periodically, and when a call needs an unknown
    /// key. None without a URL.
    pub fn fetching(self: &Arc<Self>) -> Option<OwnedTask> {
        let JwksSource::Url(url) = &self.source else {
            return None;
        };
        let (signers, url) = (self.clone(), url.clone());
        Some(spawn_owned(async move {
            let client = match client(&url) {
                Ok(client) => client,
                Err(error) => {
                    return tracing::error!(%error, "{WHAT} cannot be fetched");
                }
            };
            let mut backoff = BACKOFF;
            loop {
                let outcome = fetch(&client, &url)
                    .await
                    .and_then(|text| signers.replace(text));
                let wait = match outcome {
                    Ok(()) => {
                        backoff = BACKOFF;
                        FETCH_INTERVAL
                    }
                    Err(reason) => {
                        // Logged once for each outage.
                        if backoff == BACKOFF {
                            tracing::warn!(
                                reason,
                                "{WHAT} cannot be fetched: the last ones stay in use"
                            );
                        }
                        let wait = backoff;
                        backoff = (backoff * 2).min(BACKOFF_MAX);
                        wait
                    }
                };
                signers.fetch_ended();
                tokio::select! {
                    () = sleep(wait) => {}
                    () = signers.fetch_demanded.notified() => {}
                }
            }
        }))
    }

    fn replace(&self, text: String) -> Result<(), String> {
        // Verified tokens stay cached when the keys are unchanged.
        if self
            .current
            .load()
            .as_ref()
            .is_some_and(|set| set.text == text)
        {
            return Ok(());
        }
        let set = KeySet::parse(text).map_err(|error| error.to_string())?;
        tracing::info!(
            keys = set.named.len() + set.unnamed.len(),
            "{WHAT} were fetched"
        );
        self.current.store(Some(Arc::new(set)));
        Ok(())
    }

    /// Wakes the calls that wait for a fetch.
    fn fetch_ended(&self) {
        let mut demand = self.demand.lock().unwrap_or_else(PoisonError::into_inner);
        demand.in_flight = false;
        self.fetched.send_replace(());
    }
}

fn client(url: &reqwest::Url) -> Result<reqwest::Client, reqwest::Error> {
    let builder = reqwest::Client::builder()
        .timeout(FETCH_TIMEOUT)
        // A redirect could lead to an unsafe address.
        .redirect(reqwest::redirect::Policy::none());
    match url.scheme() {
        // Plain HTTP is for the same machine, which needs no proxy.
        "http" => builder.no_proxy().build(),
        _ => builder.build(),
    }
}

async fn fetch(client: &reqwest::Client, url: &reqwest::Url) -> Result<String, String> {
    let reason = |error: reqwest::Error| error.without_url().to_string();
    let mut response = client.get(url.clone()).send().await.map_err(reason)?;
    if response.status() != reqwest::StatusCode::OK {
        return Err(format!("the response has status {}", response.status()));
    }
    let mut document = Vec::new();
    while let Some(part) = response.chunk().await.map_err(reason)? {
        if (document.len() + part.len()) as u64 > BYTES_MAX {
            return Err(format!("the response has more than {BYTES_MAX} bytes"));
        }
        document.extend_from_slice(&part);
    }
    String::from_utf8(document).map_err(|_| "the response is not UTF-8".to_owned())
}

#[cfg(test)]
mod tests;
