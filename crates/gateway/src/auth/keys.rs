//! API keys: shown once, stored as hashes, identified by their prefix.
//! See docs/decisions/identity.md.

mod file;

use std::collections::HashMap;
use std::time::SystemTime;

use aws_lc_rs::constant_time::verify_slices_are_equal;

use super::{Rejection, sha256};
use crate::policy::{Caller, Policy};

pub use file::{KeyError, KeyFile, NewKey, StoredKey, parse, source};

/// The prefix of every API key: a bearer with it is no token.
pub const KEY_PREFIX: &str = "andon_";
/// The length of the part that identifies a key.
pub const PREFIX_BYTES: usize = 8;
/// 256 random bits in base64.
const SECRET_BYTES: usize = 43;

/// The hash that an unknown key is compared with, so that it takes as long.
const DUMMY_HASH: [u8; 32] = [0; 32];

const MALFORMED: Rejection = Rejection::new("key_malformed", "the API key is malformed");
const UNKNOWN: Rejection = Rejection::new("key_unknown", "the API key is unknown");
const REVOKED: Rejection = Rejection::new("key_revoked", "the API key has been revoked");
const EXPIRED: Rejection = Rejection::new("key_expired", "the API key has expired");
const NO_TENANT: Rejection = Rejection::new(
    "tenant_unknown",
    "the tenant of the API key does not exist any more",
);

/// The keys by their prefixes.
#[derive(Debug, Default)]
pub struct Keys(HashMap<String, KeyEntry>);

#[derive(Debug)]
struct KeyEntry {
    sha256: [u8; 32],
    expires: Option<SystemTime>,
    revoked: bool,
    /// None when the policy does not have its tenant.
    caller: Option<Caller>,
}

impl Keys {
    /// The stored keys with their tenants in the policy.
    pub fn new(stored: &[StoredKey], policy: &Policy) -> Self {
        let known = |key: &StoredKey| KeyEntry {
            sha256: key.sha256,
            expires: key.expires,
            revoked: key.revoked.is_some(),
            caller: policy
                .tenants
                .get(&key.tenant)
                .map(|tenant| Caller::new(tenant.clone(), format!("key:{}", key.prefix))),
        };
        let keys = stored.iter().map(|key| (key.prefix.clone(), known(key)));
        let keys = Self(keys.collect());
        // No error: the file may revoke other keys, which must take effect.
        let without_tenant = keys.0.values().filter(|key| key.caller.is_none()).count();
        if without_tenant > 0 {
            tracing::warn!(
                keys = without_tenant,
                "some keys belong to tenants that the policy does not have"
            );
        }
        keys
    }

    /// The caller of a key. Only the holder of the whole key learns that it has
    /// expired or was revoked.
    pub fn caller(&self, key: &str, now: SystemTime) -> Result<Caller, Rejection> {
        let prefix = prefix(key).ok_or(MALFORMED)?;
        let known = self.0.get(prefix);
        let expected = known.map_or(&DUMMY_HASH, |known| &known.sha256);
        let same = verify_slices_are_equal(&sha256(key.as_bytes()), expected).is_ok();
        let Some(known) = known.filter(|_| same) else {
            return Err(UNKNOWN);
        };
        if known.revoked {
            return Err(REVOKED);
        }
        if known.expires.is_some_and(|expires| expires <= now) {
            return Err(EXPIRED);
        }
        known.caller.clone().ok_or(NO_TENANT)
    }
}

/// The identifying part of a text in the format of a key.
fn prefix(key: &str) -> Option<&str> {
    let (prefix, secret) = key
        .strip_prefix(KEY_PREFIX)?
        .split_at_checked(PREFIX_BYTES)?;
    let secret = secret.strip_prefix('_')?;
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    (secret.len() == SECRET_BYTES && key.bytes().all(fits)).then_some(prefix)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;

    fn stored(key: &str) -> StoredKey {
        StoredKey {
            prefix: prefix(key).unwrap().to_owned(),
            sha256: sha256(key.as_bytes()),
            tenant: "a".to_owned(),
            name: None,
            created: SystemTime::UNIX_EPOCH,
            expires: None,
            revoked: None,
        }
    }

    #[test]
    fn a_key_is_known_expired_or_revoked() {
        let key = format!("andon_abcd2345_{}", "A-_z".repeat(11)[..43].to_owned());
        let policy = Policy::parse("[tenants.a]", Path::new("p")).unwrap();
        let of = |key: StoredKey| Keys::new(&[key], &policy);
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        let reason = |keys: &Keys, key: &str| keys.caller(key, now).unwrap_err().reason;
        let keys = of(stored(&key));
        let caller = keys.caller(&key, now).unwrap();
        assert_eq!(caller.tenant.name, "a");
        assert_eq!(&*caller.credential, "key:abcd2345");
        let other = key.replace("A-_zA-_z", "A-_zB-_z");
        assert_eq!(reason(&keys, &other), "key_unknown");
        assert_eq!(reason(&keys, &key.replace("abcd", "abce")), "key_unknown");
        assert_eq!(reason(&Keys::default(), &key), "key_unknown");
        for wrong in [
            "andon_",
            "andon_é",
            &key[..57],
            &format!("{key}A"),
            &key.replace('z', " "),
        ] {
            assert_eq!(reason(&keys, wrong), "key_malformed", "{wrong}");
        }
        let mut expired = stored(&key);
        expired.expires = Some(now);
        assert_eq!(reason(&of(expired.clone()), &key), "key_expired");
        assert_eq!(reason(&of(expired.clone()), &other), "key_unknown");
        expired.revoked = Some(now);
        assert_eq!(reason(&of(expired), &key), "key_revoked");
        let mut without_tenant = stored(&key);
        without_tenant.tenant = "b".to_owned();
        assert_eq!(reason(&of(without_tenant), &key), "tenant_unknown");
    }
}
