//! The file of providers, read and checked.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use protocol::ModelName;
use serde::Deserialize;

use super::CatalogueError;

/// Models of a chain: each costs a caller a part of its deadline.
const CHAIN_MAX: usize = 8;

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct File {
    /// Models of outside services by the names that callers know them by.
    pub models: BTreeMap<String, Model>,
    /// Chains by the names that callers know them by.
    pub chains: BTreeMap<String, ChainOf>,
}

/// A chain as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChainOf {
    /// The preferred first.
    pub models: Vec<String>,
}

/// What an outside service speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// `/embeddings`, `/rerank`, `/chat/completions`.
    Openai,
    /// `/messages`.
    Anthropic,
    /// `/embed`, `/rerank`.
    Cohere,
}

/// What a model does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// Vectors from texts.
    Embedding,
    /// Scores of texts for a query.
    Rerank,
    /// Text that continues a conversation.
    Generation,
}

impl Task {
    /// The task in the words of a worker's report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Rerank => "rerank",
            Self::Generation => "generation",
        }
    }
}

/// One model of an outside service as it is written.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// What the service speaks.
    pub kind: Shape,
    /// Where it is, with the part of the path that all its calls share.
    pub base_url: String,
    /// The name that the service has for the model.
    pub model: String,
    /// What it does.
    pub task: Task,
    /// The file with the key; without a key none is sent.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
    /// The environment variable with the key.
    #[serde(default)]
    pub key_variable: Option<String>,
    /// Authorities that vouch for the service, in PEM, in place of the
    /// system's.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// A proxy on the way there. The environment names none.
    #[serde(default)]
    pub proxy: Option<String>,
    /// Dimensions of its embeddings.
    #[serde(default)]
    pub width: Option<usize>,
    /// How long a call may take, what is sent again included; of a stream, how
    /// long it may be silent.
    #[serde(default = "timeout", deserialize_with = "duration")]
    pub timeout: Duration,
    /// Calls that may be under way; more are refused at once.
    #[serde(default = "concurrency_max")]
    pub concurrency_max: usize,
    /// How often a call may be sent again.
    #[serde(default = "retries_max")]
    pub retries_max: u32,
    /// Rows that one request may have.
    #[serde(default)]
    pub rows_max: Option<usize>,
    /// Whether equal texts get equal answers, which may then be kept.
    #[serde(default)]
    pub deterministic: bool,
    /// Tokens of an answer where the caller does not say.
    #[serde(default = "max_tokens")]
    pub max_tokens: u32,
    /// The field that bounds an answer of an OpenAI-shaped service.
    #[serde(default)]
    pub max_tokens_field: MaxTokensField,
    /// What the texts of a Cohere-shaped embedding are.
    #[serde(default = "input_type")]
    pub input_type: String,
    /// What it takes.
    #[serde(default)]
    pub price: Price,
}

/// How an OpenAI-shaped service names the bound of an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaxTokensField {
    /// As most do.
    #[default]
    MaxTokens,
    /// As reasoning models do.
    MaxCompletionTokens,
}

/// What a model takes, in a currency that is the same in all of the file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Price {
    /// For a million tokens that it reads.
    pub input_per_million: f64,
    /// For a million tokens that it writes.
    pub output_per_million: f64,
    /// For each call.
    pub per_request: f64,
    /// For each search of a reranker.
    pub per_search: f64,
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

fn duration<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    platform::config::positive_duration(&text).map_err(serde::de::Error::custom)
}

impl File {
    /// Reads a file's text; what is wrong is said with its line, and without
    /// the text, which may hold what it should not.
    pub fn read(text: &str) -> Result<Self, CatalogueError> {
        let file: Self = toml::from_str(text).map_err(|error| {
            let place = error.span().map(|span| {
                let before = text.get(..span.start).unwrap_or_default();
                format!("line {}: ", before.matches('\n').count() + 1)
            });
            let place = place.unwrap_or_default();
            CatalogueError(format!("{place}{}", error.message()))
        })?;
        for (name, model) in &file.models {
            checked_name("models", name)?;
            model
                .check()
                .map_err(|(field, reason)| wrong(&format!("models.{name}.{field}"), reason))?;
        }
        for (name, chain) in &file.chains {
            checked_name("chains", name)?;
            file.check_chain(name, chain)
                .map_err(|reason| wrong(&format!("chains.{name}.models"), reason))?;
        }
        Ok(file)
    }

    fn check_chain(&self, name: &str, chain: &ChainOf) -> Result<(), String> {
        if self.models.contains_key(name) {
            return Err("a model has the same name".to_owned());
        }
        if chain.models.is_empty() || chain.models.len() > CHAIN_MAX {
            return Err(format!("must be 1 to {CHAIN_MAX} models"));
        }
        for (index, member) in chain.models.iter().enumerate() {
            ModelName::checked(member, "model").map_err(|error| error.to_string())?;
            if self.chains.contains_key(member) {
                return Err(format!("'{member}' is a chain: name models"));
            }
            if chain.models[..index].contains(member) {
                return Err(format!("'{member}' is there twice"));
            }
        }
        let tasks = chain.models.iter().filter_map(|name| self.models.get(name));
        let mut tasks = tasks.map(|model| model.task);
        if let Some(first) = tasks.next()
            && tasks.any(|task| task != first)
        {
            return Err("its models must do the same task".to_owned());
        }
        Ok(())
    }
}

fn wrong(field: &str, reason: impl std::fmt::Display) -> CatalogueError {
    CatalogueError(format!("{field}: {reason}"))
}

fn checked_name(table: &str, name: &str) -> Result<(), CatalogueError> {
    let checked = ModelName::checked(name, table);
    checked
        .map(drop)
        .map_err(|error| CatalogueError(error.to_string()))
}

type Wrong = (&'static str, String);

impl Model {
    fn check(&self) -> Result<(), Wrong> {
        self.check_task()?;
        self.url().map_err(|reason| ("base_url", reason))?;
        if self.model.is_empty() || self.model.len() > 256 {
            return Err(("model", "must be 1 to 256 bytes".to_owned()));
        }
        if self.key_file.is_some() && self.key_variable.is_some() {
            let reason = "give key_file or key_variable, not both";
            return Err(("key_variable", reason.to_owned()));
        }
        let ranges = [
            ("width", self.width.unwrap_or(1), 65_536),
            ("concurrency_max", self.concurrency_max, 4096),
            ("rows_max", self.rows_max(), 100_000),
            ("max_tokens", self.max_tokens as usize, 10_000_000),
        ];
        for (field, value, most) in ranges {
            if !(1..=most).contains(&value) {
                return Err((field, format!("must be from 1 to {most}")));
            }
        }
        if self.retries_max > 10 {
            return Err(("retries_max", "must be from 0 to 10".to_owned()));
        }
        let price = self.price;
        let prices = [
            price.input_per_million,
            price.output_per_million,
            price.per_request,
            price.per_search,
        ];
        if prices
            .iter()
            .any(|price| !price.is_finite() || *price < 0.0)
        {
            return Err(("price", "must be numbers from 0".to_owned()));
        }
        Ok(())
    }

    fn check_task(&self) -> Result<(), Wrong> {
        let able = match self.kind {
            Shape::Openai => true,
            Shape::Anthropic => self.task == Task::Generation,
            Shape::Cohere => self.task != Task::Generation,
        };
        if !able {
            let reason = match self.kind {
                Shape::Anthropic => "this kind does generation alone",
                _ => "this kind does embedding and rerank alone",
            };
            return Err(("task", reason.to_owned()));
        }
        if self.width.is_some() && self.task != Task::Embedding {
            return Err(("width", "only embeddings have one".to_owned()));
        }
        if self.deterministic && self.task == Task::Generation {
            let reason = "what is generated is not the same each time";
            return Err(("deterministic", reason.to_owned()));
        }
        Ok(())
    }

    /// Where the service is. Nothing of an address may be secret: it stands in
    /// errors of others.
    pub fn url(&self) -> Result<reqwest::Url, String> {
        let url: reqwest::Url = self
            .base_url
            .parse()
            .map_err(|_| "must be an address such as https://host/v1".to_owned())?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err("must begin with https:// or http://".to_owned());
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("holds a credential: it belongs in key_file".to_owned());
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err("must end with a path".to_owned());
        }
        Ok(url)
    }

    /// Rows that one request may have: what the services take that gave the
    /// shapes their names.
    pub fn rows_max(&self) -> usize {
        self.rows_max.unwrap_or(match (self.kind, self.task) {
            (_, Task::Generation) => 1,
            (Shape::Cohere, Task::Embedding) => 96,
            (Shape::Cohere, _) => 1000,
            _ => 2048,
        })
    }

    /// What stands for the model's answers: where they come from, and what
    /// changes them.
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

/// What a call took of a service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// Tokens that it read.
    pub input_tokens: u64,
    /// Tokens that it wrote.
    pub output_tokens: u64,
    /// Searches of a reranker.
    pub searches: u64,
    /// Calls.
    pub requests: u64,
}

impl Price {
    /// What so much takes.
    pub fn of(&self, used: Used) -> f64 {
        let million = 1e6;
        used.input_tokens as f64 * self.input_per_million / million
            + used.output_tokens as f64 * self.output_per_million / million
            + used.searches as f64 * self.per_search
            + used.requests as f64 * self.per_request
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[models.small]\nkind = \"openai\"\nbase_url = \"https://host.example/v1\"\n\
                        model = \"text-small\"\ntask = \"embedding\"\n";

    fn said(text: &str) -> String {
        File::read(text).unwrap_err().to_string()
    }

    #[test]
    fn a_file_says_what_stands_in_it() {
        let text = format!(
            "{GOOD}timeout = \"5s\"\nwidth = 3\nprice = {{ input_per_million = 2.0, per_request = 0.5 }}\n\
             [chains.any]\nmodels = [\"local\", \"small\"]\n"
        );
        let file = File::read(&text).unwrap();
        let model = &file.models["small"];
        assert_eq!(model.timeout, Duration::from_secs(5));
        assert_eq!((model.rows_max(), model.retries_max), (2048, 2));
        let used = Used {
            input_tokens: 1_000_000,
            output_tokens: 7,
            searches: 3,
            requests: 1,
        };
        assert!((model.price.of(used) - 2.5).abs() < 1e-12);
        assert_eq!(file.chains["any"].models, ["local", "small"]);
        let other = File::read(&text.replace("text-small", "text-large")).unwrap();
        assert_ne!(model.digest(), other.models["small"].digest());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place_and_never_repeated() {
        let unknown = said(&format!("{GOOD}key = \"sk-secret\"\n"));
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
            let said = said(&GOOD.replace(from, to));
            assert!(said.contains(field), "{to}: {said}");
            assert!(!said.contains("sk-secret"), "{said}");
        }
        for chain in ["[]", "[\"a\", \"a\"]", "[\"other\"]", "[\"a b\"]"] {
            let text = format!(
                "{GOOD}[chains.any]\nmodels = {chain}\n[chains.other]\nmodels = [\"small\"]\n"
            );
            let said = said(&text);
            assert!(said.contains("chains.any.models"), "{chain}: {said}");
        }
        let text = format!("{GOOD}[chains.small]\nmodels = [\"a\"]\n");
        assert!(said(&text).contains("the same name"));
    }
}
