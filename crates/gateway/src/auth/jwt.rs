//! Tokens that another party signed.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Validation, decode, decode_header};
use moka::sync::Cache;
use platform::files::FileError;
use serde_json::{Map, Value};

use super::jwks::Signers;
use super::{Refusal, sha256, shortened};
use crate::policy::{Caller, JwtPolicy, Policy};

/// Tokens that are remembered as good: a signature takes longer to check than
/// the rest of a call together.
const KNOWN_MAX: u64 = 10_000;
/// A token with some dozens of claims.
const TOKEN_BYTES_MAX: usize = 8 << 10;

const MALFORMED: Refusal = Refusal::new(
    "token_malformed",
    "the bearer is neither a key of this server nor a token signed with RS256, ES256 or EdDSA",
);
const ALGORITHM: Refusal = Refusal::new(
    "token_algorithm",
    "the token is not signed in the way that its key is for",
);
const SIGNATURE: Refusal = Refusal::new("token_signature", "the token's signature does not match");
const EXPIRED: Refusal = Refusal::new("token_expired", "the token has expired");
const EARLY: Refusal = Refusal::new("token_early", "the token is not valid yet");
const ISSUER: Refusal = Refusal::new("token_issuer", "the token was issued by somebody else");
const AUDIENCE: Refusal = Refusal::new("token_audience", "the token is meant for somebody else");
const CLAIMS: Refusal = Refusal::new(
    "token_claims",
    "the token lacks a claim, or has one that cannot be read: it needs exp, iss and aud",
);
const NO_TENANT: Refusal = Refusal::new(
    "tenant_unknown",
    "the token does not name a tenant that may call",
);

/// Recognizes callers by their tokens, under one policy.
#[derive(Debug)]
pub struct Tokens {
    policy: Arc<Policy>,
    rules: JwtPolicy,
    signers: Arc<Signers>,
    /// By the tokens' hashes.
    known: Cache<[u8; 32], Known>,
}

/// A token that was found good.
#[derive(Debug, Clone)]
struct Known {
    caller: Caller,
    /// The set whose key it is signed with.
    set: u64,
    /// In seconds since 1970, with the leeway.
    until: u64,
}

impl Tokens {
    /// Takes tokens by a policy that says whose. Signers that `before` has
    /// already, and that are still the same, are not asked again.
    pub fn new(
        policy: Arc<Policy>,
        rules: JwtPolicy,
        before: Option<&Self>,
    ) -> Result<Self, FileError> {
        let signers = before.map(|before| &before.signers);
        let signers = match signers.filter(|signers| signers.source == rules.jwks) {
            Some(signers) => signers.clone(),
            None => Arc::new(Signers::new(&rules.jwks)?),
        };
        Ok(Self {
            policy,
            rules,
            signers,
            known: Cache::new(KNOWN_MAX),
        })
    }

    /// Whether both have their keys from the same place.
    pub fn same_signers(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.signers, &other.signers)
    }

    /// Fetches the signers' keys while it is held, where they are a page.
    pub fn fetching(&self) -> Option<platform::tasks::OwnedTask> {
        self.signers.fetching()
    }

    /// Reloads the JWKS file if it has changed.
    pub fn poll_file(&self) {
        self.signers.poll_file();
    }

    /// Who shows this token.
    pub async fn caller(&self, token: &str) -> Result<Caller, Refusal> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(MALFORMED);
        }
        let hash = sha256(token.as_bytes());
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(u64::MAX, |now| now.as_secs());
        if let Some(known) = self.known.get(&hash)
            && Some(known.set) == self.signers.number()
            && now < known.until
        {
            return Ok(known.caller);
        }
        let known = self.check(token).await?;
        let caller = known.caller.clone();
        self.known.insert(hash, known);
        Ok(caller)
    }

    async fn check(&self, token: &str) -> Result<Known, Refusal> {
        let head = decode_header(token).map_err(|_| MALFORMED)?;
        // What must be understood (RFC 7515, 4.1.11) is not.
        if head.crit.is_some() {
            return Err(MALFORMED);
        }
        let (signer, set) = self.signers.choose(head.kid.as_deref()).await?;
        let mut rules = Validation::new(signer.algorithm);
        rules.leeway = self.rules.leeway.as_secs();
        rules.validate_nbf = true;
        rules.set_issuer(&[&self.rules.issuer]);
        rules.set_audience(&[&self.rules.audience]);
        rules.set_required_spec_claims(&["exp", "iss", "aud"]);
        let claims = decode::<Map<String, Value>>(token, &signer.key, &rules)
            .map_err(|error| refusal(error.kind()))?
            .claims;
        let text = |name: &str| claims.get(name).and_then(Value::as_str);
        // A list of issuers, of which ours is one, says nothing.
        if text("iss") != Some(&self.rules.issuer) {
            return Err(ISSUER);
        }
        let tenant = text(&self.rules.tenant_claim).ok_or(NO_TENANT)?;
        let tenant = self.policy.tenants.get(tenant).ok_or(NO_TENANT)?;
        let subject = shortened(text("sub").unwrap_or_default());
        let expires = claims
            .get("exp")
            .and_then(Value::as_f64)
            .unwrap_or_default();
        Ok(Known {
            caller: Caller {
                tenant: tenant.clone(),
                credential: format!("jwt:{subject}").into(),
            },
            set,
            // A number that is no time becomes the nearest one that is.
            until: (expires as u64).saturating_add(self.rules.leeway.as_secs()),
        })
    }
}

/// What a caller is told. What the claims say is not looked at before the
/// signature is.
fn refusal(kind: &ErrorKind) -> Refusal {
    match kind {
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidKeyFormat => ALGORITHM,
        ErrorKind::InvalidSignature | ErrorKind::Provider(_) => SIGNATURE,
        ErrorKind::ExpiredSignature => EXPIRED,
        ErrorKind::ImmatureSignature => EARLY,
        ErrorKind::InvalidIssuer => ISSUER,
        ErrorKind::InvalidAudience => AUDIENCE,
        ErrorKind::MissingRequiredClaim(_) | ErrorKind::InvalidClaimFormat(_) => CLAIMS,
        ErrorKind::Json(_) => CLAIMS,
        _ => MALFORMED,
    }
}
