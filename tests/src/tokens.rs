//! Tokens that tests sign, also in ways that must be refused.

use std::time::SystemTime;

use anyhow::{Context, Result, anyhow};
use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RsaKeyPair,
};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};

/// Who issues the tokens of tests.
pub const ISSUER: &str = "https://login.example";
/// Whom they are for.
pub const AUDIENCE: &str = "andon";

/// A key that signs tokens.
#[derive(Debug)]
pub struct Signer {
    kid: String,
    algorithm: Algorithm,
    key: EncodingKey,
    public_pem: String,
}

impl Signer {
    /// Signs with RS256.
    pub fn rsa(kid: &str) -> Result<Self> {
        let pair = aws_lc_rs::rsa::KeyPair::generate(KeySize::Rsa2048)?;
        let der = AsDer::<Pkcs8V1Der>::as_der(&pair)?;
        // PKCS #8 holds the key of PKCS #1 behind a head of 26 bytes.
        let der = der.as_ref().get(26..).context("no key")?;
        let pair = RsaKeyPair::from_der(der)?;
        let public = AsDer::<PublicKeyX509Der>::as_der(pair.public_key())?;
        let lines = STANDARD.encode(public.as_ref());
        let lines: Vec<_> = lines
            .as_bytes()
            .chunks(64)
            .map(String::from_utf8_lossy)
            .collect();
        Ok(Self {
            public_pem: format!(
                "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
                lines.join("\n")
            ),
            ..Self::new(kid, Algorithm::RS256, EncodingKey::from_rsa_der(der))
        })
    }

    /// Signs with ES256.
    pub fn p256(kid: &str) -> Result<Self> {
        let random = SystemRandom::new();
        let der = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random)?;
        let key = EncodingKey::from_ec_der(der.as_ref());
        Ok(Self::new(kid, Algorithm::ES256, key))
    }

    /// Signs with EdDSA.
    pub fn ed25519(kid: &str) -> Result<Self> {
        let der = Ed25519KeyPair::generate_pkcs8v1(&SystemRandom::new())?;
        let key = EncodingKey::from_ed_der(der.as_ref());
        Ok(Self::new(kid, Algorithm::EdDSA, key))
    }

    fn new(kid: &str, algorithm: Algorithm, key: EncodingKey) -> Self {
        Self {
            kid: kid.to_owned(),
            algorithm,
            key,
            public_pem: String::new(),
        }
    }

    /// The name of its key.
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// The public key as a JWK.
    pub fn jwk(&self) -> Result<Value> {
        let mut jwk = Jwk::from_encoding_key(&self.key, self.algorithm)?;
        jwk.common.key_id = Some(self.kid.clone());
        Ok(serde_json::to_value(jwk)?)
    }

    /// A token of these claims.
    pub fn sign(&self, claims: &Value) -> Result<String> {
        self.sign_as(&self.kid, claims)
    }

    /// A token that says that another key signed it.
    pub fn sign_as(&self, kid: &str, claims: &Value) -> Result<String> {
        let mut head = Header::new(self.algorithm);
        head.kid = Some(kid.to_owned());
        Ok(encode(&head, claims, &self.key)?)
    }

    /// Tokens that nobody signed, and those whose shared secret is the public
    /// key, in each form that a careless reader may have it in.
    pub fn forgeries(&self, claims: &Value) -> Result<Vec<String>> {
        let mut all = Vec::new();
        let body = URL_SAFE_NO_PAD.encode(claims.to_string());
        for algorithm in ["none", "None", "NONE", "nOnE"] {
            let head = json!({ "alg": algorithm, "typ": "JWT", "kid": self.kid });
            let head = URL_SAFE_NO_PAD.encode(head.to_string());
            all.push(format!("{head}.{body}."));
        }
        let jwk = self.jwk()?;
        let modulus = jwk["n"].as_str().ok_or_else(|| anyhow!("no RSA key"))?;
        let bytes = URL_SAFE_NO_PAD.decode(modulus)?;
        let pem = self.public_pem.as_bytes();
        for secret in [pem, pem.trim_ascii(), modulus.as_bytes(), &bytes] {
            for algorithm in [Algorithm::HS256, Algorithm::HS384, Algorithm::HS512] {
                let mut head = Header::new(algorithm);
                head.kid = Some(self.kid.clone());
                all.push(encode(&head, claims, &EncodingKey::from_secret(secret))?);
            }
        }
        Ok(all)
    }
}

/// A set of public keys.
pub fn key_set(signers: &[&Signer]) -> Result<String> {
    let keys: Vec<Value> = signers
        .iter()
        .map(|signer| signer.jwk())
        .collect::<Result<_>>()?;
    Ok(json!({ "keys": keys }).to_string())
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// Claims that are right, for a tenant.
pub fn claims(tenant: &str) -> Value {
    json!({
        "iss": ISSUER, "aud": AUDIENCE, "exp": now() + 3600, "sub": "someone", "tenant": tenant,
    })
}
