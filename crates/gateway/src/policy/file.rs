//! The format of the policy file, and the checks between its fields.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use platform::files::{ContentError, from_toml};
use platform::pot::Holder;
use protocol::ModelName;
use serde::{Deserialize, Deserializer, de};
use toml::Spanned;

use super::{
    JwksSource, JwtPolicy, LimitPolicy, Openness, Pattern, Policy, Quota, RedisLost, Tenant, lane,
};

/// Clocks that are further apart than this are broken.
const LEEWAY_MAX: Duration = Duration::from_secs(300);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    #[serde(default)]
    tenants: BTreeMap<Name, TenantEntry>,
    anonymous: Option<Spanned<Name>>,
    #[serde(default)]
    reflection: Openness,
    jwt: Option<Spanned<JwtEntry>>,
    #[serde(default)]
    limits: LimitEntry,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TenantEntry {
    #[serde(default)]
    models: Vec<Pattern>,
    #[serde(default)]
    administrator: bool,
    #[serde(default = "one", deserialize_with = "up_to_1000")]
    weight: u32,
    #[serde(default)]
    priority: bool,
    cache_scope: Option<Spanned<Name>>,
    #[serde(default)]
    certificates: Vec<Spanned<String>>,
    quota: Option<Spanned<Quota>>,
    #[serde(default)]
    model_quotas: BTreeMap<Pattern, Spanned<Quota>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JwtEntry {
    jwks_file: Option<std::path::PathBuf>,
    jwks_url: Option<String>,
    issuer: String,
    audience: String,
    #[serde(default = "leeway", deserialize_with = "duration")]
    leeway: Duration,
    #[serde(default = "tenant_claim")]
    tenant_claim: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitEntry {
    #[serde(default)]
    redis_lost: RedisLost,
    #[serde(default = "one", deserialize_with = "up_to_1000")]
    replicas: u32,
}

impl Default for LimitEntry {
    fn default() -> Self {
        Self {
            redis_lost: RedisLost::default(),
            replicas: one(),
        }
    }
}

/// A name of the same form as a model's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
struct Name(String);

impl TryFrom<String> for Name {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        match ModelName::checked(&text, "name") {
            Ok(_) => Ok(Self(text)),
            Err(_) => Err(
                "a name is 1 to 128 letters, digits, '.', '_' or '-' and begins with a letter or digit",
            ),
        }
    }
}

fn one() -> u32 {
    1
}

fn leeway() -> Duration {
    Duration::from_secs(30)
}

fn tenant_claim() -> String {
    "tenant".to_owned()
}

fn up_to_1000<'de, D: Deserializer<'de>>(reader: D) -> Result<u32, D::Error> {
    match i64::deserialize(reader)? {
        number @ 1..=1000 => u32::try_from(number).map_err(de::Error::custom),
        _ => Err(de::Error::custom("must be 1 to 1000")),
    }
}

fn duration<'de, D: Deserializer<'de>>(reader: D) -> Result<Duration, D::Error> {
    platform::config::duration(&String::deserialize(reader)?).map_err(de::Error::custom)
}

/// The text, for the positions of errors.
struct Source<'a>(&'a str);

impl Source<'_> {
    fn wrong<T>(&self, at: &Spanned<T>, field: &str, reason: &str) -> ContentError {
        ContentError::new(reason)
            .at_offset(self.0, at.span().start)
            .in_field(field)
    }
}

/// Checks a policy file of the folder `folder`.
pub fn parse(text: &str, folder: &Path) -> Result<Policy, ContentError> {
    let file: PolicyFile = from_toml(text)?;
    let source = Source(text);
    check_scopes(&file.tenants, &source)?;
    let mut policy = Policy {
        reflection: file.reflection,
        limits: LimitPolicy {
            redis_lost: file.limits.redis_lost,
            replicas: file.limits.replicas,
        },
        jwt: file
            .jwt
            .map(|entry| jwt(entry, folder, &source))
            .transpose()?,
        ..Policy::default()
    };
    let has_others = file.tenants.len() > 1;
    for (Name(name), entry) in file.tenants {
        let certificates = entry.certificates.clone();
        let mut tenant = tenant(name, entry, &source)?;
        tenant.has_others = has_others;
        let tenant = Arc::new(tenant);
        for certificate in certificates {
            let field = format!("tenants.{}.certificates", tenant.name);
            if certificate.get_ref().is_empty() {
                return Err(source.wrong(&certificate, &field, "a name is needed"));
            }
            let known = policy.certificates.get(certificate.get_ref());
            if known.is_some_and(|known| known.name != tenant.name) {
                let reason = "a certificate cannot authenticate two tenants";
                return Err(source.wrong(&certificate, &field, reason));
            }
            let name = certificate.into_inner();
            policy.certificates.insert(name, tenant.clone());
        }
        policy.tenants.insert(tenant.name.clone(), tenant);
    }
    if let Some(name) = file.anonymous {
        policy.anonymous = Some(anonymous(&name, &policy, &source)?);
    }
    Ok(policy)
}

fn anonymous(
    name: &Spanned<Name>,
    policy: &Policy,
    source: &Source<'_>,
) -> Result<Arc<Tenant>, ContentError> {
    match policy.tenants.get(&name.get_ref().0) {
        None => Err(source.wrong(name, "anonymous", "there is no tenant of this name")),
        Some(tenant) if tenant.administrator => {
            let reason = "callers without a credential cannot be an administrator";
            Err(source.wrong(name, "anonymous", reason))
        }
        Some(tenant) => Ok(tenant.clone()),
    }
}

/// A tenant's cached rows are its own unless it shares them explicitly: another
/// tenant can only join a scope whose owner names it too.
fn check_scopes(
    tenants: &BTreeMap<Name, TenantEntry>,
    source: &Source<'_>,
) -> Result<(), ContentError> {
    for (name, entry) in tenants {
        let Some(scope) = &entry.cache_scope else {
            continue;
        };
        let owner = tenants.get(scope.get_ref());
        if scope.get_ref() != name && owner.is_some_and(|owner| owner.cache_scope.is_none()) {
            let field = format!("tenants.{}.cache_scope", name.0);
            let reason = "it is another tenant's own scope: to share it, name it there too";
            return Err(source.wrong(scope, &field, reason));
        }
    }
    Ok(())
}

fn tenant(name: String, entry: TenantEntry, source: &Source<'_>) -> Result<Tenant, ContentError> {
    let quota = match entry.quota {
        Some(quota) => checked(quota, &format!("tenants.{name}.quota"), source)?,
        None => Quota::default(),
    };
    let mut model_quotas = Vec::new();
    for (pattern, quota) in entry.model_quotas {
        let field = format!("tenants.{name}.model_quotas.\"{}\"", pattern.as_str());
        model_quotas.push((pattern, checked(quota, &field, source)?));
    }
    Ok(Tenant {
        administrator: entry.administrator,
        models: entry.models,
        weight: entry.weight,
        priority: entry.priority,
        lane: lane(name.as_bytes()),
        holder: Holder::Tenant(name.as_str().into()),
        has_others: false,
        cache_scope: match entry.cache_scope {
            Some(scope) => scope.into_inner().0,
            None => name.clone(),
        },
        quota,
        model_quotas,
        name,
    })
}

/// A caller with a quota of 0 would retry forever: a model that may not
/// be called is not among the tenant's models.
fn checked(quota: Spanned<Quota>, field: &str, source: &Source<'_>) -> Result<Quota, ContentError> {
    let given = quota.get_ref();
    let count = |count: Option<u32>| count.map(f64::from);
    // Exact up to 2⁵³, and only compared with nothing.
    let many = |count: Option<u64>| count.map(|count| count as f64);
    for (name, value) in [
        ("requests_per_second", given.requests_per_second),
        ("burst", count(given.burst)),
        ("items_per_minute", many(given.items_per_minute)),
        ("items_per_day", many(given.items_per_day)),
        ("tokens_per_minute", many(given.tokens_per_minute)),
        ("tokens_per_day", many(given.tokens_per_day)),
        ("in_flight", count(given.in_flight)),
        ("cost_per_day", given.cost_per_day),
        ("cost_per_month", given.cost_per_month),
    ] {
        if value.is_some_and(|value| !value.is_finite() || value <= 0.0) {
            let field = format!("{field}.{name}");
            return Err(source.wrong(&quota, &field, "must be a number greater than 0"));
        }
    }
    if given.burst.is_some() && given.requests_per_second.is_none() {
        let field = format!("{field}.burst");
        return Err(source.wrong(&quota, &field, "requests_per_second is needed too"));
    }
    Ok(quota.into_inner())
}

fn jwt(
    entry: Spanned<JwtEntry>,
    folder: &Path,
    source: &Source<'_>,
) -> Result<JwtPolicy, ContentError> {
    let wrong =
        |field: &str, reason: &str| Err(source.wrong(&entry, &format!("jwt{field}"), reason));
    let given = entry.get_ref();
    let jwks = match (&given.jwks_file, &given.jwks_url) {
        (Some(file), None) => JwksSource::File(folder.join(file)),
        (None, Some(url)) => match trustworthy(url) {
            Ok(url) => JwksSource::Url(url),
            Err(reason) => return wrong(".jwks_url", reason),
        },
        _ => return wrong("", "either jwks_file or jwks_url is needed"),
    };
    if given.leeway > LEEWAY_MAX {
        return wrong(".leeway", "must be at most 5m: tokens would not expire");
    }
    for (field, value) in [
        (".issuer", &given.issuer),
        (".audience", &given.audience),
        (".tenant_claim", &given.tenant_claim),
    ] {
        if value.is_empty() {
            return wrong(field, "a text is needed");
        }
    }
    Ok(JwtPolicy {
        jwks,
        issuer: given.issuer.clone(),
        audience: given.audience.clone(),
        leeway: given.leeway,
        tenant_claim: given.tenant_claim.clone(),
    })
}

/// An attacker who can change the signers' keys in transit can sign any token:
/// they come over TLS, or from the same machine.
fn trustworthy(url: &str) -> Result<reqwest::Url, &'static str> {
    let url: reqwest::Url = url.parse().map_err(|_| "must be a whole URL")?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must hold no user and no password");
    }
    match (url.scheme(), url.host_str()) {
        ("https", Some(_)) => Ok(url),
        ("http", Some(host)) if is_loopback(host) => Ok(url),
        _ => Err("must be https; http is for 127.0.0.1, ::1 and localhost alone"),
    }
}

/// Whether a URL's host is the same machine.
fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    let address = address.parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}
