//! JSON Web Tokens (RFC 7519) of an outside issuer.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Validation, decode, decode_header};
use moka::sync::Cache;
use platform::files::FileError;
use serde_json::{Map, Value};

use super::jwks::Signers;
use super::{Rejection, sha256, shortened};
use crate::policy::{Caller, JwtPolicy, Policy};

/// Verified tokens that are cached: to verify a signature takes longer than the rest
/// of a call.
const CACHED_TOKENS_MAX: u64 = 10_000;
/// The largest token: one with some dozens of claims.
const TOKEN_BYTES_MAX: usize = 8 << 10;

const MALFORMED: Rejection = Rejection::new(
    "token_malformed",
    "the bearer is neither an API key of this server nor a token signed with RS256, ES256 or EdDSA",
);
const ALGORITHM: Rejection = Rejection::new(
    "token_algorithm",
    "the token is not signed with the algorithm of its key",
);
const SIGNATURE: Rejection =
    Rejection::new("token_signature", "the token's signature does not match");
const EXPIRED: Rejection = Rejection::new("token_expired", "the token has expired");
const EARLY: Rejection = Rejection::new("token_early", "the token is not valid yet");
const ISSUER: Rejection = Rejection::new("token_issuer", "the issuer of the token is not accepted");
const AUDIENCE: Rejection = Rejection::new(
    "token_audience",
    "the audience of the token does not include this server",
);
const CLAIMS: Rejection = Rejection::new(
    "token_claims",
    "a claim of the token is missing or malformed: exp, iss and aud are required",
);
const NO_TENANT: Rejection =
    Rejection::new("tenant_unknown", "the token names no tenant of this server");

/// Authenticates callers by their tokens, under one policy.
#[derive(Debug)]
pub struct Tokens {
    policy: Arc<Policy>,
    rules: JwtPolicy,
    signers: Arc<Signers>,
    /// Verified tokens by their hashes.
    verified: Cache<[u8; 32], VerifiedToken>,
}

/// A token that has been verified.
#[derive(Debug, Clone)]
struct VerifiedToken {
    caller: Caller,
    /// The number of the key set that it was verified with.
    set: u64,
    /// In seconds since 1970, with the leeway.
    expires: u64,
}

impl Tokens {
    /// Accepts tokens by the policy. Signers that are unchanged since `before`
    /// are kept, and not fetched again.
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
            verified: Cache::new(CACHED_TOKENS_MAX),
        })
    }

    /// Whether both have the same signers.
    pub fn same_signers(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.signers, &other.signers)
    }

    /// A task that fetches the signers' keys while it is held, when they have a URL.
    pub fn fetching(&self) -> Option<platform::tasks::OwnedTask> {
        self.signers.fetching()
    }

    /// Reloads the JWKS file if it has changed.
    pub fn poll_file(&self) {
        self.signers.poll_file();
    }

    /// The caller of a token.
    pub async fn caller(&self, token: &str) -> Result<Caller, Rejection> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(MALFORMED);
        }
        let hash = sha256(token.as_bytes());
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(u64::MAX, |now| now.as_secs());
        if let Some(verified) = self.verified.get(&hash)
            && Some(verified.set) == self.signers.number()
            && now < verified.expires
        {
            return Ok(verified.caller);
        }
        let verified = self.check(token).await?;
        let caller = verified.caller.clone();
        self.verified.insert(hash, verified);
        Ok(caller)
    }

    async fn check(&self, token: &str) -> Result<VerifiedToken, Rejection> {
        let head = decode_header(token).map_err(|_| MALFORMED)?;
        // No critical extension (RFC 7515, section 4.1.11) is supported.
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
            .map_err(|error| rejection(error.kind()))?
            .claims;
        let text = |name: &str| claims.get(name).and_then(Value::as_str);
        // A list of issuers that includes ours proves nothing.
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
        Ok(VerifiedToken {
            caller: Caller::new(tenant.clone(), format!("jwt:{subject}")),
            set,
            // The cast saturates: a number that is no time becomes the nearest.
            expires: (expires as u64).saturating_add(self.rules.leeway.as_secs()),
        })
    }
}

/// The rejection for an error. Claims are not checked before the signature is.
fn rejection(kind: &ErrorKind) -> Rejection {
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
