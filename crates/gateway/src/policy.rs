//! The policy: tenants, the models they may call, their quotas, and the callers
//! of each tenant.

mod file;
mod pattern;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::HeaderValue;
use platform::files::{ContentError, FileError, FileSource};
use platform::pot::Holder;
use protocol::{Error, Kind};
use serde::Deserialize;

pub use pattern::Pattern;

/// Some thousands of tenants.
const BYTES_MAX: u64 = 4 << 20;

/// The current policy: replaced when its file changes.
pub type PolicyCell = Arc<ArcSwap<Policy>>;

/// The policy file.
#[derive(Debug, Default)]
pub struct Policy {
    /// The tenants by their names.
    pub tenants: BTreeMap<String, Arc<Tenant>>,
    /// The tenant of calls without a credential; without it they are refused.
    pub anonymous: Option<Arc<Tenant>>,
    /// Whether reflection needs no credential.
    pub reflection: Openness,
    /// The tenants by the names in their certificates.
    pub certificates: BTreeMap<String, Arc<Tenant>>,
    /// The tokens that are accepted; without it none are.
    pub jwt: Option<JwtPolicy>,
    /// How quotas are counted.
    pub limits: LimitPolicy,
}

/// Whether a service is open to all callers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Openness {
    /// To all callers.
    Open,
    /// To callers with a credential.
    #[default]
    Closed,
}

/// How quotas are counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LimitPolicy {
    /// How calls are treated while Redis is lost.
    pub redis_lost: RedisLost,
    /// Gateways that count together: each holds its share, limit ÷ replicas,
    /// while Redis is lost.
    pub replicas: u32,
}

impl Default for LimitPolicy {
    fn default() -> Self {
        Self {
            redis_lost: RedisLost::default(),
            replicas: 1,
        }
    }
}

/// How calls are treated while Redis is lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RedisLost {
    /// Each gateway counts its own share.
    #[default]
    Open,
    /// Calls that have a quota are refused.
    Closed,
}

/// The tokens that are accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtPolicy {
    /// Where the signers' keys are.
    pub jwks: JwksSource,
    /// The required issuer (`iss`).
    pub issuer: String,
    /// The required audience (`aud`).
    pub audience: String,
    /// The tolerated clock skew.
    pub leeway: Duration,
    /// The claim that names the tenant.
    pub tenant_claim: String,
}

/// Where a set of signers' keys is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JwksSource {
    /// A file, read again when it changes.
    File(PathBuf),
    /// A page, fetched again from time to time.
    Url(reqwest::Url),
}

/// A team or a customer that shares the fleet with others.
#[derive(Debug, Clone, PartialEq)]
pub struct Tenant {
    /// Its name.
    pub name: String,
    /// Whether it may load, unload and change settings.
    pub administrator: bool,
    /// The models and aliases that it may call.
    pub models: Vec<Pattern>,
    /// Its share under overload, relative to those of other tenants.
    pub weight: u32,
    /// Whether the priorities of its requests hold among those of other tenants:
    /// otherwise they order its own requests alone.
    pub priority: bool,
    /// The value of [`protocol::LANE_KEY`]: the same in every gateway.
    pub lane: HeaderValue,
    /// Whose share of what all callers share its calls take.
    pub holder: Holder,
    /// Whether the policy has other tenants, which need their shares.
    pub has_others: bool,
    /// Tenants of one scope share cached responses; the tenant's own name unless
    /// the policy sets another.
    pub cache_scope: String,
    /// How much it may call altogether.
    pub quota: Quota,
    /// How much it may call of some models.
    pub model_quotas: Vec<(Pattern, Quota)>,
}

/// The limits on calls, for all models together or for some. A limit that is not
/// set does not apply.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quota {
    /// Requests per second on average.
    pub requests_per_second: Option<f64>,
    /// Requests that may come at once; as many as in a second if not given.
    pub burst: Option<u32>,
    /// Rows per minute.
    pub items_per_minute: Option<u64>,
    /// Rows per day.
    pub items_per_day: Option<u64>,
    /// Computed tokens per minute.
    pub tokens_per_minute: Option<u64>,
    /// Computed tokens per day.
    pub tokens_per_day: Option<u64>,
    /// Requests that may be in flight at once.
    pub in_flight: Option<u32>,
    /// The cost of outside providers per day, in the currency of the price table.
    pub cost_per_day: Option<f64>,
    /// The cost of outside providers per month of 30 days.
    pub cost_per_month: Option<f64>,
}

/// The caller of a request. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The tenant that is charged.
    pub tenant: Arc<Tenant>,
    /// The credential, for the trace: a key's prefix, a token's subject or a
    /// certificate's name. Never a secret.
    pub credential: Arc<str>,
    /// The address of the peer where nobody authenticates: without tenants,
    /// shares are held by address.
    pub address: Option<IpAddr>,
    /// How far the call came, for what it took first.
    pub progress: Option<CallProgress>,
}

/// How far a call came: what it took of a quota before its model was known is
/// given back when a later limit refuses it. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct CallProgress(Arc<AtomicU8>);

const REFUSED: u8 = 1;
const SENT: u8 = 2;

impl CallProgress {
    /// A limit refused the call.
    pub fn refused(&self) {
        self.0.fetch_or(REFUSED, Ordering::Relaxed);
    }

    /// The call, or one of several for a request, is sent to a model.
    pub fn sent(&self) {
        self.0.fetch_or(SENT, Ordering::Relaxed);
    }

    /// Whether a limit refused all that there was of the call.
    pub fn nothing_sent(&self) -> bool {
        self.0.load(Ordering::Relaxed) == REFUSED
    }
}

impl Policy {
    /// Reads and checks a policy file. A key set that it names is looked for
    /// beside it, and is not read yet.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let source = Self::source(path);
        let text = source.read_text()?;
        Self::parse(&text, path).map_err(|error| source.invalid(error))
    }

    /// The policy file of this path.
    pub fn source(path: &Path) -> FileSource {
        FileSource::new(path, "policy file", BYTES_MAX)
    }

    /// Parses and checks the text of a policy file; the error names the line and
    /// the field. `path` is where relative paths in it begin.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ContentError> {
        file::parse(text, path.parent().unwrap_or_else(|| Path::new("")))
    }
}

impl Tenant {
    /// The tenant of all callers, when authentication is off.
    pub fn anyone() -> Self {
        Self {
            name: "anyone".to_owned(),
            administrator: true,
            models: vec![Pattern::any()],
            weight: 1,
            priority: false,
            lane: lane(b"anyone"),
            holder: Holder::Tenant("anyone".into()),
            has_others: false,
            cache_scope: "anyone".to_owned(),
            quota: Quota::default(),
            model_quotas: Vec::new(),
        }
    }

    /// The same for a caller on another machine, who may not administrate.
    pub fn stranger() -> Self {
        Self {
            administrator: false,
            ..Self::anyone()
        }
    }

    /// Whether it may call a model or alias.
    pub fn may_call(&self, model: &str) -> bool {
        self.models.iter().any(|pattern| pattern.matches(model))
    }
}

/// A lane: a stable number of a name or an address (FNV-1a, 32 bits). Two that
/// collide take turns as one.
pub fn lane(bytes: &[u8]) -> HeaderValue {
    let hash = bytes.iter().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    });
    hash.into()
}

impl Caller {
    /// A caller of a tenant.
    pub fn new(tenant: Arc<Tenant>, credential: impl Into<Arc<str>>) -> Self {
        Self {
            tenant,
            credential: credential.into(),
            address: None,
            progress: None,
        }
    }

    /// The gateway itself.
    pub fn gateway() -> Self {
        Self::new(Arc::new(Tenant::anyone()), "")
    }

    /// The lane of its calls in the queues of workers.
    pub fn lane(&self) -> HeaderValue {
        match self.address {
            None => self.tenant.lane.clone(),
            Some(IpAddr::V4(address)) => lane(&address.octets()),
            Some(IpAddr::V6(address)) => lane(&address.octets()),
        }
    }

    /// Whose share of what all callers share its calls take: the tenant's, or
    /// that of the address where nobody authenticates.
    pub fn holder(&self) -> Holder {
        match self.address {
            None => self.tenant.holder.clone(),
            Some(address) => Holder::peer(address),
        }
    }

    /// An error unless the caller is an administrator.
    pub fn must_administrate(&self) -> Result<(), Error> {
        if self.tenant.administrator {
            return Ok(());
        }
        // An address stands where nobody authenticates.
        Err(Error::new(
            Kind::Forbidden,
            if self.address.is_some() {
                "without a policy, only callers on loopback may load, unload and change settings: \
                 start the gateway with --policy FILE or --insecure-admin"
            } else {
                "only an administrator may do this"
            },
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Policy, String> {
        let path = Path::new("/etc/andon/policy.toml");
        let invalid = |error| Policy::source(path).invalid(error).to_string();
        Policy::parse(text, path).map_err(invalid)
    }

    #[test]
    fn a_whole_policy_is_read() {
        let policy = parse(
            r#"
            anonymous = "guest"
            reflection = "open"

            [tenants.search]
            models = ["minilm", "rerank-*"]
            weight = 3
            priority = true
            cache_scope = "texts"
            certificates = ["spiffe://cluster/search", "search.internal"]
            [tenants.search.quota]
            requests_per_second = 100
            burst = 200
            [tenants.search.model_quotas."rerank-*"]
            in_flight = 4

            [tenants.guest]
            models = ["digits"]
            cache_scope = "texts"

            [tenants.operations]
            administrator = true

            [jwt]
            jwks_file = "jwks.json"
            issuer = "https://login.example"
            audience = "andon"
            leeway = "10s"
            tenant_claim = "team"

            [limits]
            redis_lost = "closed"
            replicas = 3
            "#,
        )
        .unwrap();
        let search = &policy.tenants["search"];
        assert!(search.may_call("rerank-large") && search.may_call("minilm"));
        assert!(!search.may_call("digits") && !search.administrator);
        assert_eq!((search.weight, search.cache_scope.as_str()), (3, "texts"));
        assert!(search.priority && !policy.tenants["guest"].priority);
        // The same number wherever the tenant's name is read.
        assert_eq!(search.lane, lane(b"search"));
        assert_ne!(search.lane, policy.tenants["guest"].lane);
        assert_eq!(search.quota.requests_per_second, Some(100.0));
        assert_eq!(search.model_quotas[0].1.in_flight, Some(4));
        assert!(search.model_quotas[0].0.matches("rerank-x"));
        assert_eq!(policy.tenants["operations"].cache_scope, "operations");
        assert!(policy.tenants["operations"].administrator);
        assert_eq!(policy.anonymous.unwrap().name, "guest");
        assert_eq!(policy.reflection, Openness::Open);
        assert_eq!(policy.certificates["search.internal"].name, "search");
        let jwt = policy.jwt.unwrap();
        let file = PathBuf::from("/etc/andon/jwks.json");
        assert_eq!(jwt.jwks, JwksSource::File(file));
        assert_eq!(jwt.leeway, Duration::from_secs(10));
        assert_eq!(jwt.tenant_claim, "team");
        assert_eq!(policy.limits.redis_lost, RedisLost::Closed);
        assert_eq!(policy.limits.replicas, 3);
        assert_eq!(parse("[tenants.a]").unwrap().limits, LimitPolicy::default());
    }

    #[test]
    fn errors_name_the_line_and_the_field() {
        let jwt = "[jwt]\nissuer = \"i\"\naudience = \"a\"\n";
        for (text, parts) in [
            ("[tenants.a]\nmodel = []", ["line 2", "tenants.a", "model"]),
            (
                "[tenants.a]\n\nweight = 0",
                ["line 3", "tenants.a.weight", "1 to 1000"],
            ),
            (
                "[tenants.a]\nweight = 1001",
                ["line 2", "tenants.a.weight", "1 to 1000"],
            ),
            (
                "[tenants.a]\nmodels = [\"b\", \"c d\"]",
                ["line 2", "tenants.a.models[1]", "letters"],
            ),
            ("[tenants.\"a b\"]", ["line 1", "tenants", "letters"]),
            (
                "anonymous = \"b\"\n[tenants.a]",
                ["line 1", "anonymous", "no tenant"],
            ),
            (
                "anonymous = \"a\"\n[tenants.a]\nadministrator = true",
                ["line 1", "anonymous", "administrator"],
            ),
            ("reflection = \"ajar\"", ["line 1", "reflection", "open"]),
            (
                "[tenants.a]\ncache_scope = \"b\"\n[tenants.b]",
                ["line 2", "tenants.a.cache_scope", "name it there too"],
            ),
            (
                "[tenants.a]\ncertificates = [\"x\"]\n[tenants.b]\ncertificates = [\"x\"]",
                ["line 4", "tenants.b.certificates", "two tenants"],
            ),
            (
                "[tenants.a.quota]\nin_flight = 0",
                ["line 1", "tenants.a.quota.in_flight", "greater than 0"],
            ),
            (
                "[tenants.a.quota]\nrequests_per_second = inf",
                ["tenants.a.quota.requests_per_second", "number", "line 1"],
            ),
            (
                "[tenants.a.quota]\nburst = 5",
                ["tenants.a.quota.burst", "requests_per_second", "line 1"],
            ),
            (
                "[tenants.a.model_quotas.\"b c\"]",
                ["line 1", "tenants.a.model_quotas", "letters"],
            ),
            (
                "[limits]\nreplicas = 0",
                ["line 2", "limits.replicas", "1 to"],
            ),
            (jwt, ["line 1", "jwt", "jwks_file or jwks_url"]),
            ("a = ", ["line 1", "policy", ""]),
        ] {
            let error = parse(text).unwrap_err();
            for part in parts {
                assert!(error.contains(part), "{text}\n{error}\nlacks {part}");
            }
        }
    }

    #[test]
    fn key_sets_come_over_tls_or_loopback() {
        let with = |line: &str| {
            let rest = "issuer = \"i\"\naudience = \"a\"\n";
            parse(&format!("[tenants.a]\n[jwt]\n{rest}{line}")).map(|policy| policy.jwt.unwrap())
        };
        for right in [
            "https://login.example/keys",
            "http://127.0.0.1:80/keys",
            "http://[::1]/keys",
            "http://localhost:1/keys",
        ] {
            let jwt = with(&format!("jwks_url = \"{right}\"")).unwrap();
            assert!(matches!(jwt.jwks, JwksSource::Url(_)));
            assert_eq!(jwt.leeway, Duration::from_secs(30));
        }
        for wrong in [
            "jwks_url = \"http://login.example/keys\"",
            "jwks_url = \"http://127.0.0.1.example/keys\"",
            "jwks_url = \"https://user:word@login.example/keys\"",
            "jwks_url = \"ftp://127.0.0.1/keys\"",
            "jwks_url = \"keys\"",
            "jwks_url = \"https://a/\"\njwks_file = \"b\"",
            "jwks_file = \"b\"\nleeway = \"1h\"",
            "jwks_file = \"b\"\ntenant_claim = \"\"",
        ] {
            let error = with(wrong).unwrap_err();
            assert!(error.contains("line") && error.contains("jwt"), "{error}");
        }
    }

    #[test]
    fn access_is_closed_by_default() {
        let policy = parse("[tenants.a]").unwrap();
        assert!(policy.anonymous.is_none() && policy.jwt.is_none());
        assert_eq!(policy.reflection, Openness::Closed);
        let tenant = &policy.tenants["a"];
        assert!(!tenant.administrator && !tenant.may_call("minilm"));
    }
}
