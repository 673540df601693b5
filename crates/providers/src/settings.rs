//! The providers file: models of outside services and chains, read and checked.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use platform::files::{ContentError, from_toml};
use protocol::{ModelName, Task};
use serde::{Deserialize, Deserializer, de};

use crate::dialect::{self, DIALECTS, Dialect, MaxTokensField, ModelOptions};
use crate::embedding::WIDTH_MAX;
use crate::usage::Price;

/// Models of a chain: each takes a part of the caller's deadline.
const CHAIN_MODELS_MAX: usize = 8;

/// A setting of a model is wrong.
#[derive(Debug)]
pub struct InvalidSetting {
    field: &'static str,
    reason: String,
}

impl InvalidSetting {
    /// An error of a field, with its reason.
    pub fn new(field: &'static str, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Self { field, reason }
    }

    /// The error in the file, for a model of this name.
    pub fn of_model(self, name: &str) -> ContentError {
        ContentError::new(self.reason).in_field(format!("models.{name}.{}", self.field))
    }
}

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProvidersFile {
    /// Models of outside services by the names that callers use.
    pub models: BTreeMap<String, ModelSettings>,
    /// Chains by the names that callers use.
    pub chains: BTreeMap<String, ChainSettings>,
}

/// A chain as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChainSettings {
    /// Names of models, the preferred first.
    pub models: Vec<String>,
}

/// One model of an outside service as it is written.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSettings {
    /// The dialect that the service speaks.
    #[serde(deserialize_with = "kind")]
    pub kind: &'static dyn Dialect,
    /// Where the service is, with the part of the path that its calls share.
    pub base_url: String,
    /// The service's name for the model.
    pub model: String,
    /// The model's task.
    #[serde(deserialize_with = "task")]
    pub task: Task,
    /// The file with the API key; without a key none is sent.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
    /// The environment variable with the API key.
    #[serde(default)]
    pub key_variable: Option<String>,
    /// Certificate authorities of the service, in PEM, in place of the
    /// system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// A proxy on the way there. The environment names none.
    #[serde(default)]
    pub proxy: Option<String>,
    /// Dimensions of its embeddings.
    #[serde(default)]
    pub width: Option<usize>,
    /// How long a call may take, its retries included; of a stream, how long
    /// it may be without an event.
    #[serde(default = "timeout", deserialize_with = "duration")]
    pub timeout: Duration,
    /// Calls that may be in flight; more are refused at once.
    #[serde(default = "concurrency_max")]
    pub concurrency_max: usize,
    /// How often a call may be retried.
    #[serde(default = "retries_max")]
    pub retries_max: u32,
    /// Rows of one request.
    #[serde(default)]
    pub rows_max: Option<usize>,
    /// Whether equal texts get equal responses, which may then be cached.
    #[serde(default)]
    pub deterministic: bool,
    /// Tokens of a response where the caller gives no limit.
    #[serde(default = "max_tokens")]
    pub max_tokens: u32,
    /// The field that limits the tokens of a response, of OpenAI's dialect.
    #[serde(default)]
    pub max_tokens_field: MaxTokensField,
    /// The `input_type` of Cohere's dialect.
    #[serde(default = "input_type")]
    pub input_type: String,
    /// Its prices.
    #[serde(default)]
    pub price: Price,
}

fn timeout() -> Duration {
    Duration::from_secs(30)
}

fn concurrency_max() -> usize {
    64
}

fn retries_max() -> u32 {
    2
}

fn max_tokens() -> u32 {
    1024
}

fn input_type() -> String {
    "search_document".to_owned()
}

fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    platform::config::positive_duration(&text).map_err(de::Error::custom)
}

fn kind<'de, D: Deserializer<'de>>(from: D) -> Result<&'static dyn Dialect, D::Error> {
    let kind = String::deserialize(from)?;
    dialect::find(&kind).ok_or_else(|| {
        let kinds: Vec<&str> = DIALECTS.iter().map(|dialect| dialect.kind()).collect();
        de::Error::custom(format!("unknown kind; the kinds are: {}", kinds.join(", ")))
    })
}

fn task<'de, D: Deserializer<'de>>(from: D) -> Result<Task, D::Error> {
    let name = String::deserialize(from)?;
    name.parse().map_err(de::Error::custom)
}

impl ProvidersFile {
    /// Reads a file's text. An error says the line or the field, and never
    /// repeats the text, which may hold a secret.
    pub fn parse(text: &str) -> Result<Self, ContentError> {
        let file: Self = from_toml(text)?;
        for (name, model) in &file.models {
            check_name("models", name)?;
            model.check().map_err(|error| error.of_model(name))?;
        }
        for (name, chain) in &file.chains {
            check_name("chains", name)?;
            file.check_chain(name, chain).map_err(|reason| {
                ContentError::new(reason).in_field(format!("chains.{name}.models"))
            })?;
        }
        Ok(file)
    }

    fn check_chain(&self, name: &str, chain: &ChainSettings) -> Result<(), String> {
        if self.models.contains_key(name) {
            return Err("a model has the same name".to_owned());
        }
        if chain.models.is_empty() || chain.models.len() > CHAIN_MODELS_MAX {
            return Err(format!("must name 1 to {CHAIN_MODELS_MAX} models"));
        }
        for (index, member) in chain.models.iter().enumerate() {
            ModelName::checked(member, "model").map_err(|error| error.to_string())?;
            if self.chains.contains_key(member) {
                return Err(format!("'{member}' is a chain, not a model"));
            }
            if chain.models[..index].contains(member) {
                return Err(format!("'{member}' appears twice"));
            }
        }
        let models = chain.models.iter().filter_map(|name| self.models.get(name));
        let mut tasks = models.map(|model| model.task);
        if let Some(first) = tasks.next()
            && tasks.any(|task| task != first)
        {
            return Err("all models must have the same task".to_owned());
        }
        Ok(())
    }
}

fn check_name(table: &str, name: &str) -> Result<(), ContentError> {
    let checked = ModelName::checked(name, table);
    checked.map(drop).map_err(ContentError::new)
}

impl ModelSettings {
    fn check(&self) -> Result<(), InvalidSetting> {
        self.check_task()?;
        self.url()?;
        if self.model.is_empty() || self.model.len() > 256 {
            return Err(InvalidSetting::new("model", "must have 1 to 256 bytes"));
        }
        if self.key_file.is_some() && self.key_variable.is_some() {
            let reason = "give key_file or key_variable, not both";
            return Err(InvalidSetting::new("key_variable", reason));
        }
        let ranges = [
            ("width", self.width.unwrap_or(1), WIDTH_MAX),
            ("concurrency_max", self.concurrency_max, 4096),
            ("rows_max", self.rows_max(), 100_000),
            ("max_tokens", self.max_tokens as usize, 10_000_000),
        ];
        for (field, value, most) in ranges {
            if !(1..=most).contains(&value) {
                return Err(InvalidSetting::new(
                    field,
                    format!("must be from 1 to {most}"),
                ));
            }
        }
        if self.retries_max > 10 {
            return Err(InvalidSetting::new("retries_max", "must be from 0 to 10"));
        }
        if !self.price.is_valid() {
            return Err(InvalidSetting::new(
                "price",
                "prices must be finite and not negative",
            ));
        }
        Ok(())
    }

    fn check_task(&self) -> Result<(), InvalidSetting> {
        let tasks = self.kind.tasks();
        if !tasks.contains(&self.task) {
            let names: Vec<&str> = tasks.iter().map(|task| task.as_str()).collect();
            let (kind, names) = (self.kind.kind(), names.join(", "));
            return Err(InvalidSetting::new(
                "task",
                format!("the tasks of kind {kind} are: {names}"),
            ));
        }
        if self.width.is_some() && self.task != Task::Embedding {
            return Err(InvalidSetting::new("width", "only embeddings have a width"));
        }
        if self.deterministic && self.task == Task::Generation {
            let reason = "generated text is not deterministic";
            return Err(InvalidSetting::new("deterministic", reason));
        }
        Ok(())
    }

    /// Where the service is. Nothing of an address may be secret, since the
    /// errors of other programs show it.
    pub fn url(&self) -> Result<reqwest::Url, InvalidSetting> {
        let invalid = |reason| InvalidSetting::new("base_url", reason);
        let url: reqwest::Url = self
            .base_url
            .parse()
            .map_err(|_| invalid("must be a URL such as https://host/v1"))?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(invalid("must begin with https:// or http://"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(invalid("must not hold a credential: use key_file"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(invalid("must end with a path"));
        }
        Ok(url)
    }

    /// The settings that a dialect uses.
    pub fn options(&self) -> ModelOptions<'_> {
        ModelOptions {
            name: &self.model,
            max_tokens: self.max_tokens,
            max_tokens_field: self.max_tokens_field,
            input_type: &self.input_type,
        }
    }

    /// Rows that one request may have.
    pub fn rows_max(&self) -> usize {
        self.rows_max
            .unwrap_or_else(|| self.kind.rows_max(self.task))
    }

    /// A digest of the settings that determine the model's responses. It is part of
    /// the keys of shared caches.
    pub fn digest(&self) -> String {
        let text = format!(
            "{:?}\n{}\n{}\n{:?}\n{:?}\n{}",
            self.kind, self.base_url, self.model, self.task, self.width, self.input_type
        );
        let hash = digest(&SHA256, text.as_bytes());
        let hex: String = hash.as_ref().iter().map(|b| format!("{b:02x}")).collect();
        format!("provider:{hex}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::ProviderUsage;

    const GOOD: &str = "[models.small]\nkind = \"openai\"\nbase_url = \"https://host.example/v1\"\n\
                        model = \"text-small\"\ntask = \"embedding\"\n";

    fn error(text: &str) -> String {
        ProvidersFile::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_file_is_read() {
        let text = format!(
            "{GOOD}timeout = \"5s\"\nwidth = 3\nprice = {{ input_per_million = 2.0, per_request = 0.5 }}\n\
             [chains.any]\nmodels = [\"local\", \"small\"]\n"
        );
        let file = ProvidersFile::parse(&text).unwrap();
        let model = &file.models["small"];
        assert_eq!(model.timeout, Duration::from_secs(5));
        assert_eq!((model.rows_max(), model.retries_max), (2048, 2));
        let usage = ProviderUsage {
            input_tokens: 1_000_000,
            output_tokens: 7,
            searches: 3,
            requests: 1,
        };
        assert!((model.price.cost(usage) - 2.5).abs() < 1e-12);
        assert_eq!(file.chains["any"].models, ["local", "small"]);
        let other = ProvidersFile::parse(&text.replace("text-small", "text-large")).unwrap();
        assert_ne!(model.digest(), other.models["small"].digest());
        // Caches that outlive this process are keyed by it.
        let digest = "provider:8d6ce9ee215bdc45d618a1916f4e5eb852aae3d6852d40e104688cb83d9a80b6";
        assert_eq!(model.digest(), digest);
    }

    #[test]
    fn an_error_names_its_line_or_field_and_never_repeats_a_value() {
        let unknown = error(&format!("{GOOD}key = \"sk-secret\"\n"));
        assert!(
            unknown.contains("line 6") && unknown.contains("`key`"),
            "{unknown}"
        );
        assert!(!unknown.contains("sk-secret"), "{unknown}");
        for (from, to, field) in [
            (
                "https://host.example/v1",
                "https://me:sk-secret@host.example/v1",
                "models.small.base_url",
            ),
            (
                "https://host.example/v1",
                "ftp://host.example",
                "models.small.base_url",
            ),
            (
                "https://host.example/v1",
                "https://host.example/v1?key=sk-secret",
                "models.small.base_url",
            ),
            ("\"openai\"", "\"anthropic\"", "models.small.task"),
            ("\"openai\"", "\"else\"", "line 2"),
            ("models.small", "models.\"a b\"", "models"),
            ("\"embedding\"", "\"embedding\"\ntimeout = \"0s\"", "line 6"),
            (
                "\"embedding\"",
                "\"embedding\"\nconcurrency_max = 0",
                "models.small.concurrency_max",
            ),
            (
                "\"embedding\"",
                "\"embedding\"\nprice = { per_request = -1.0 }",
                "models.small.price",
            ),
            (
                "\"embedding\"",
                "\"generation\"\ndeterministic = true",
                "models.small.deterministic",
            ),
            (
                "\"embedding\"",
                "\"embedding\"\nkey_file = \"a\"\nkey_variable = \"b\"",
                "models.small.key_variable",
            ),
        ] {
            let error = error(&GOOD.replace(from, to));
            assert!(error.contains(field), "{to}: {error}");
            assert!(!error.contains("sk-secret"), "{error}");
        }
        for chain in ["[]", "[\"a\", \"a\"]", "[\"other\"]", "[\"a b\"]"] {
            let text = format!(
                "{GOOD}[chains.any]\nmodels = {chain}\n[chains.other]\nmodels = [\"small\"]\n"
            );
            let error = error(&text);
            assert!(error.contains("chains.any.models"), "{chain}: {error}");
        }
        let text = format!("{GOOD}[chains.small]\nmodels = [\"a\"]\n");
        assert!(error(&text).contains("the same name"));
    }
}
