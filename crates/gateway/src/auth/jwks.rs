//! The keys of those who sign tokens: from a file or a page, never from a
//! token.

use std::collections::HashMap;
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

use super::Refusal;
use crate::policy::JwksSource;

const WHAT: &str = "the signers' keys";
/// A set of some hundreds of keys.
const BYTES_MAX: u64 = 1 << 20;
const KEYS_MAX: usize = 1000;
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the page is fetched in any case: a key that its signer has
/// withdrawn is good no longer.
const FETCH_INTERVAL: Duration = Duration::from_secs(600);
/// How soon a fetch that failed is tried again, at first and at last.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How often a key that is not known may make the gateway fetch: whoever can
/// send tokens can make up names of keys.
const ASK_INTERVAL: Duration = Duration::from_secs(60);
/// Calls that may wait for a fetch.
const WAITING_MAX: usize = 64;

const UNKNOWN: Refusal = Refusal::new(
    "token_key",
    "the token is signed with a key that is not known",
);
const UNNAMED: Refusal = Refusal::new(
    "token_key",
    "the token does not say which key it is signed with",
);
const NOT_FETCHED: Refusal = Refusal {
    reason: "signers_unreachable",
    message: "tokens cannot be checked yet: the signers' keys cannot be fetched",
    kind: protocol::Kind::NotReady,
};

const BUSY: Refusal = Refusal {
    reason: "signers_busy",
    message: "the token cannot be checked yet: many wait for the signers' keys",
    kind: protocol::Kind::NotReady,
};

/// One key of a signer, and the only algorithm that it is good for.
#[derive(Debug)]
pub struct Signer {
    pub algorithm: Algorithm,
    pub key: DecodingKey,
    material: AlgorithmParameters,
}

/// The keys of all signers, at one moment.
#[derive(Debug)]
pub struct KeySet {
    /// No two sets that a process reads have the same.
    pub number: u64,
    text: String,
    named: HashMap<String, Arc<Signer>>,
    unnamed: Vec<Arc<Signer>>,
}

#[derive(Deserialize)]
struct Page {
    keys: Vec<serde_json::Value>,
}

impl KeySet {
    /// Reads a set (RFC 7517). Keys of other kinds and for other uses are
    /// left out; a set without a usable key is an error.
    pub fn parse(text: String) -> Result<Self, ContentError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let wrong = |reason: &str| ContentError::new(reason);
        let page: Page = serde_json::from_str(&text).map_err(|error| wrong(&error.to_string()))?;
        if page.keys.len() > KEYS_MAX {
            return Err(wrong("there are more than 1000 keys"));
        }
        let mut set = Self {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            text,
            named: HashMap::new(),
            unnamed: Vec::new(),
        };
        let read = page.keys.into_iter();
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
                    return Err(wrong("two keys have the same kid"));
                }
                _ => set.named.insert(name, signer),
            };
        }
        if set.named.is_empty() && set.unnamed.is_empty() {
            return Err(wrong("there is no key for RS256, ES256 or EdDSA"));
        }
        Ok(set)
    }

    /// The key of a name; without a name, the only key.
    fn choose(&self, kid: Option<&str>) -> Result<Arc<Signer>, Refusal> {
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

/// What a key is good for, by its own kind: what a token's head says does not
/// enter.
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

/// The signers' keys, as they are now.
#[derive(Debug)]
pub struct Signers {
    pub source: JwksSource,
    current: ArcSwapOption<KeySet>,
    /// Its file, where it has one.
    file: Mutex<Option<Followed<KeySet>>>,
    asking: Mutex<Asking>,
    asked: Notify,
    fetched: watch::Sender<()>,
    waiting: Semaphore,
}

/// Whether somebody has asked for a fetch.
#[derive(Debug, Default)]
struct Asking {
    last: Option<Instant>,
    under_way: bool,
}

impl Signers {
    /// Reads a file now; a page is fetched when it is followed.
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
            asking: Mutex::default(),
            asked: Notify::new(),
            fetched: watch::Sender::new(()),
            waiting: Semaphore::new(WAITING_MAX),
        })
    }

    /// The number of the present set.
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

    /// The key that a token names, and the number of its set. One that is not
    /// known may have been made since the last fetch.
    pub async fn choose(&self, kid: Option<&str>) -> Result<(Arc<Signer>, u64), Refusal> {
        let chosen = self.known(kid);
        let may_be_new = matches!(chosen, Err(refusal) if refusal != UNNAMED);
        if may_be_new && self.ask().await? {
            return self.known(kid);
        }
        chosen
    }

    fn known(&self, kid: Option<&str>) -> Result<(Arc<Signer>, u64), Refusal> {
        let set = self.current.load();
        let set = set.as_ref().ok_or(NOT_FETCHED)?;
        Ok((set.choose(kid)?, set.number))
    }

    /// Has the page fetched once for all who ask meanwhile, and waits for it;
    /// false when that was done a moment ago, or nobody fetches. When many wait
    /// already, a further one is refused at once.
    async fn ask(&self) -> Result<bool, Refusal> {
        let (mut fetched, _place) = {
            let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
            let lately = asking
                .last
                .is_some_and(|last| last.elapsed() < ASK_INTERVAL);
            if !asking.under_way && (lately || matches!(self.source, JwksSource::File(_))) {
                return Ok(false);
            }
            let place = self.waiting.try_acquire().map_err(|_| BUSY)?;
            if !asking.under_way {
                (asking.under_way, asking.last) = (true, Some(Instant::now()));
                self.asked.notify_one();
            }
            (self.fetched.subscribe(), place)
        };
        let patience = FETCH_TIMEOUT + Duration::from_secs(1);
        Ok(matches!(
            timeout(patience, fetched.changed()).await,
            Ok(Ok(()))
        ))
    }

    /// Fetches the page now, from time to time, and when somebody asks; none
    /// where there is none to fetch.
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
            let (retry_min, retry_max) = RETRY;
            let mut retry = retry_min;
            loop {
                let outcome = fetch(&client, &url)
                    .await
                    .and_then(|text| signers.take(text));
                let wait = match outcome {
                    Ok(()) => {
                        retry = retry_min;
                        FETCH_INTERVAL
                    }
                    Err(reason) => {
                        // Once for each time that the page is lost.
                        if retry == retry_min {
                            tracing::warn!(
                                reason,
                                "{WHAT} cannot be fetched: those that are known stay"
                            );
                        }
                        let wait = retry;
                        retry = (retry * 2).min(retry_max);
                        wait
                    }
                };
                signers.answer();
                tokio::select! {
                    () = sleep(wait) => {}
                    () = signers.asked.notified() => {}
                }
            }
        }))
    }

    fn take(&self, text: String) -> Result<(), String> {
        // Known tokens stay known when nothing has changed.
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

    /// Wakes who waits for a fetch.
    fn answer(&self) {
        let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        asking.under_way = false;
        self.fetched.send_replace(());
    }
}

fn client(url: &reqwest::Url) -> Result<reqwest::Client, reqwest::Error> {
    let builder = reqwest::Client::builder()
        .timeout(FETCH_TIMEOUT)
        // A page that sends elsewhere could send to where it is not safe.
        .redirect(reqwest::redirect::Policy::none());
    match url.scheme() {
        // The same machine is reached by no proxy.
        "http" => builder.no_proxy().build(),
        _ => builder.build(),
    }
}

async fn fetch(client: &reqwest::Client, url: &reqwest::Url) -> Result<String, String> {
    let said = |error: reqwest::Error| error.without_url().to_string();
    let answered = client.get(url.clone()).send().await.map_err(said)?;
    if answered.status() != reqwest::StatusCode::OK {
        return Err(format!("the answer is {}", answered.status()));
    }
    let (mut answered, mut page) = (answered, Vec::new());
    while let Some(part) = answered.chunk().await.map_err(said)? {
        if (page.len() + part.len()) as u64 > BYTES_MAX {
            return Err(format!("the answer has more than {BYTES_MAX} bytes"));
        }
        page.extend_from_slice(&part);
    }
    String::from_utf8(page).map_err(|_| "the answer is not text".to_owned())
}

#[cfg(test)]
mod tests;
