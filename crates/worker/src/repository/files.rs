//! The files of a model repository: `<root>/<model>/<version>/`, and an
//! optional `<model>/andon.toml`. Nothing outside the root is opened.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use engine::{
    Description, DeviceChoice, Dtype, Kernels, LoadOptions, ModelFolder, Overrides, PoolingMode,
    ScoreActivation, Side, Task,
};
use platform::files::from_toml;
use protocol::{ModelName, ModelVersion};
use serde::Deserialize;

use crate::model::ModelLimits;
use crate::queue::QueueLimits;

/// The name of a model's settings.
const SETTINGS: &str = "andon.toml";
/// The most bytes of that file.
const SETTINGS_BYTES_MAX: u64 = 64 << 10;

/// A model's settings as its file has them.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    task: Option<String>,
    dtype: Option<String>,
    versions: Option<Versions>,
    tokens_max: Option<usize>,
    batch_tokens_max: Option<usize>,
    batch_rows_max: Option<usize>,
    request_rows_max: Option<usize>,
    queue_rows_max: Option<usize>,
    #[serde(default, with = "humantime_serde::option")]
    queue_delay: Option<Duration>,
    #[serde(default)]
    deterministic: bool,
    pooling: Option<String>,
    prompt: Option<String>,
    normalize: Option<bool>,
    truncate: Option<Truncate>,
    activation: Option<String>,
}

/// Whether texts that are too long are truncated for callers who do not say, and at which side.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged, expecting = "true, false, \"left\" or \"right\"")]
enum Truncate {
    /// At the side that the model's files name, or not at all.
    Switch(bool),
    Side(TruncateSide),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum TruncateSide {
    Left,
    Right,
}

/// The versions to serve.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Versions {
    Named(String),
    Listed(Vec<u64>),
}

impl Settings {
    /// What the model's own files do not say.
    fn overrides(&self) -> Result<Overrides, String> {
        let wrong = |error: engine::EngineError| format!("{SETTINGS}: {error}");
        let (truncate, truncation_side) = match self.truncate {
            None => (None, None),
            Some(Truncate::Switch(truncate)) => (Some(truncate), None),
            Some(Truncate::Side(TruncateSide::Left)) => (Some(true), Some(Side::Left)),
            Some(Truncate::Side(TruncateSide::Right)) => (Some(true), Some(Side::Right)),
        };
        let pooling = self.pooling.as_deref().map(str::parse::<PoolingMode>);
        let activation = self.activation.as_deref();
        let activation = activation.map(str::parse::<ScoreActivation>);
        Ok(Overrides {
            pooling: pooling.transpose().map_err(wrong)?,
            prompt: self.prompt.clone(),
            normalize: self.normalize,
            truncate,
            truncation_side,
            activation: activation.transpose().map_err(wrong)?,
        })
    }
}

/// The versions of a model to serve, and how.
#[derive(Debug)]
pub struct Plan {
    /// The folders of the versions to serve.
    pub versions: BTreeMap<ModelVersion, PathBuf>,
    /// The repository, out of which no link may lead; none of a bare folder.
    pub boundary: Option<PathBuf>,
    /// How to load them.
    pub options: LoadOptions,
    /// Their limits.
    pub limits: ModelLimits,
}

/// The settings of the worker that hold for every model.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    /// Where models run.
    pub device: DeviceChoice,
    /// The dtype of a model whose settings name none.
    pub dtype: Dtype,
    /// The kernels on the CPU.
    pub kernels: Kernels,
    /// Bytes of one text.
    pub text_bytes_max: usize,
}

/// The models of a repository, by the names of their folders.
pub fn names(root: &Path) -> Result<Vec<ModelName>, String> {
    let entries = std::fs::read_dir(root).map_err(|error| format!("cannot be read: {error}"))?;
    let mut names: Vec<ModelName> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| ModelName::checked(entry.file_name().to_str()?, "folder").ok())
        .collect();
    names.sort();
    Ok(names)
}

/// Every version of a model, newest last.
pub fn versions(root: &Path, name: &ModelName) -> BTreeMap<ModelVersion, PathBuf> {
    let folder = root.join(name.as_str());
    let Ok(entries) = std::fs::read_dir(&folder) else {
        return BTreeMap::new();
    };
    entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| {
            let version = ModelVersion::checked(entry.file_name().to_str()?, "folder").ok()?;
            Some((version, entry.path()))
        })
        .collect()
}

/// Reads a model's settings and chooses its versions. Errors name files, not
/// paths.
pub fn plan(root: &Path, name: &ModelName, defaults: Defaults) -> Result<Plan, String> {
    let settings = settings(root, &root.join(name.as_str()))?;
    let found = versions(root, name);
    let newest = || found.last_key_value().map(|(version, _)| *version);
    let chosen: Vec<ModelVersion> = match &settings.versions {
        None => newest().into_iter().collect(),
        Some(Versions::Named(named)) if named == "latest" => newest().into_iter().collect(),
        Some(Versions::Named(named)) if named == "all" => found.keys().copied().collect(),
        Some(Versions::Named(_)) => {
            return Err(format!(
                "{SETTINGS}: versions must be \"latest\", \"all\" or a list of numbers"
            ));
        }
        Some(Versions::Listed(numbers)) => numbers
            .iter()
            .map(|number| {
                ModelVersion::checked(&number.to_string(), "versions")
                    .ok()
                    .filter(|version| found.contains_key(version))
                    .ok_or_else(|| format!("{SETTINGS}: there is no folder of version {number}"))
            })
            .collect::<Result<_, _>>()?,
    };
    if chosen.is_empty() {
        return Err("no version: a version is a folder named by a positive number".to_owned());
    }
    let versions = chosen
        .into_iter()
        .filter_map(|version| Some((version, found.get(&version)?.clone())))
        .map(|(version, folder)| {
            let folder = within(root, &folder);
            folder
                .map(|folder| (version, folder))
                .map_err(|error| format!("the folder of version {version} {error}"))
        })
        .collect::<Result<_, String>>()?;
    let plan = checked_plan(versions, &settings, defaults)?;
    Ok(Plan {
        boundary: Some(root.to_owned()),
        ..plan
    })
}

/// The plan of a bare folder, which is version 1 of its model.
pub fn bare_plan(folder: &Path, defaults: Defaults) -> Result<Plan, String> {
    let version = ModelVersion::checked("1", "version").map_err(|error| error.to_string())?;
    let versions = [(version, folder.to_owned())].into();
    checked_plan(versions, &settings(folder, folder)?, defaults)
}

/// What a folder would be served as, with its own settings or, of a version in a
/// repository, those of its model.
pub fn described(folder: &Path) -> Result<Description, String> {
    let folder = folder.canonicalize();
    let folder =
        folder.map_err(|error| format!("the folder cannot be opened: {}", error.kind()))?;
    let folder = folder.as_path();
    let model = folder.parent().filter(|model| {
        let name = folder.file_name().and_then(|name| name.to_str());
        let is_version = name.is_some_and(|name| ModelVersion::checked(name, "folder").is_ok());
        is_version && !folder.join(SETTINGS).exists() && model.join(SETTINGS).exists()
    });
    let home = model.unwrap_or(folder);
    let defaults = Defaults {
        device: DeviceChoice::Cpu,
        dtype: Dtype::Auto,
        kernels: Kernels::Auto,
        text_bytes_max: 0,
    };
    let plan = checked_plan(BTreeMap::new(), &settings(home, home)?, defaults)?;
    let source = ModelFolder {
        boundary: model.and_then(Path::parent).map(Path::to_path_buf),
        ..ModelFolder::bare(folder)
    };
    Ok(engine::describe(&source, &plan.options))
}

/// The real path of a folder or file, if it is in the root: a link may not
/// lead out.
fn within(root: &Path, folder: &Path) -> Result<PathBuf, String> {
    let unreadable = |error: std::io::Error| format!("cannot be read: {}", error.kind());
    let root = root.canonicalize().map_err(unreadable)?;
    let real = folder.canonicalize().map_err(unreadable)?;
    if real.starts_with(&root) {
        return Ok(real);
    }
    Err("is a link out of the repository".to_owned())
}

fn settings(root: &Path, folder: &Path) -> Result<Settings, String> {
    let path = folder.join(SETTINGS);
    match std::fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Settings::default());
        }
        Err(error) => return Err(format!("{SETTINGS}: {}", error.kind())),
        Ok(metadata) if !metadata.is_file() => return Err(format!("{SETTINGS}: is not a file")),
        Ok(metadata) if metadata.len() > SETTINGS_BYTES_MAX => {
            return Err(format!(
                "{SETTINGS}: longer than {SETTINGS_BYTES_MAX} bytes"
            ));
        }
        Ok(_) => {}
    }
    let path = within(root, &path).map_err(|error| format!("{SETTINGS}: {error}"))?;
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{SETTINGS}: {}", e.kind()))?;
    from_toml(&text).map_err(|error| format!("{SETTINGS}: {error}"))
}

fn checked_plan(
    versions: BTreeMap<ModelVersion, PathBuf>,
    settings: &Settings,
    defaults: Defaults,
) -> Result<Plan, String> {
    let wrong = |error: engine::EngineError| format!("{SETTINGS}: {error}");
    let task = settings.task.as_deref().map(str::parse::<Task>).transpose();
    let dtype = settings
        .dtype
        .as_deref()
        .map(str::parse::<Dtype>)
        .transpose();
    let options = LoadOptions {
        device: defaults.device,
        dtype: dtype.map_err(wrong)?.unwrap_or(defaults.dtype),
        kernels: defaults.kernels,
        task: task.map_err(wrong)?,
        tokens_max: settings.tokens_max,
        overrides: settings.overrides()?,
    };
    let request_rows_max = settings.request_rows_max.unwrap_or(4096);
    let queue = QueueLimits {
        batch_tokens_max: settings.batch_tokens_max.unwrap_or(8192),
        batch_rows_max: settings.batch_rows_max.unwrap_or(4096),
        delay: settings.queue_delay.unwrap_or(Duration::ZERO),
        rows_max: settings
            .queue_rows_max
            .unwrap_or_else(|| request_rows_max.saturating_mul(2)),
    };
    let counts = [
        ("batch_tokens_max", queue.batch_tokens_max),
        ("batch_rows_max", queue.batch_rows_max),
        ("request_rows_max", request_rows_max),
        ("tokens_max", settings.tokens_max.unwrap_or(1)),
    ];
    if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
        return Err(format!("{SETTINGS}: {name} must be more than 0"));
    }
    if queue.rows_max < request_rows_max {
        return Err(format!(
            "{SETTINGS}: queue_rows_max must be at least request_rows_max, or its largest requests never fit"
        ));
    }
    Ok(Plan {
        versions,
        boundary: None,
        options,
        limits: ModelLimits {
            queue,
            request_rows_max,
            text_bytes_max: defaults.text_bytes_max,
            deterministic: settings.deterministic,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overrides(text: &str) -> Result<Overrides, String> {
        let settings: Settings = from_toml(text).map_err(|error| error.to_string())?;
        settings.overrides()
    }

    #[test]
    fn settings_say_what_the_files_of_a_model_do_not() {
        assert_eq!(overrides("").unwrap(), Overrides::default());
        let own = overrides(
            "pooling = \"cls\"\nprompt = \"query: \"\nnormalize = false\n\
             truncate = \"left\"\nactivation = \"identity\"\n",
        );
        let expected = Overrides {
            pooling: Some(PoolingMode::Cls),
            prompt: Some("query: ".to_owned()),
            normalize: Some(false),
            truncate: Some(true),
            truncation_side: Some(Side::Left),
            activation: Some(ScoreActivation::Identity),
        };
        assert_eq!(own.unwrap(), expected);
        assert_eq!(overrides("truncate = true").unwrap().truncate, Some(true));
        assert_eq!(overrides("truncate = false").unwrap().truncate, Some(false));
    }

    #[test]
    fn a_folder_is_described_with_the_settings_beside_it_or_of_its_model() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        let root = std::env::temp_dir().join(format!("andon-described-{}", std::process::id()));
        let folder = root.join("lantern").join("1");
        std::fs::create_dir_all(&folder).unwrap();
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            std::fs::copy(golden.join("bert-embedding").join(name), folder.join(name)).unwrap();
        }
        let pooling = || {
            let description = described(&folder).unwrap();
            assert!(description.is_served(), "{:?}", description.problems);
            let mut settings = description.settings.into_iter();
            settings.find(|one| one.name == "pooling").unwrap()
        };
        let own = pooling();
        assert_eq!(
            (own.value.as_str(), own.source.as_str()),
            ("mean", "default")
        );
        std::fs::write(root.join("lantern/andon.toml"), "pooling = \"cls\"\n").unwrap();
        let of_model = pooling();
        let found = (of_model.value.as_str(), of_model.source.as_str());
        assert_eq!(found, ("cls", "andon.toml"));
        std::fs::write(folder.join("andon.toml"), "pooling = \"max\"\n").unwrap();
        assert_eq!(pooling().value, "max");
        std::fs::write(folder.join("andon.toml"), "nonsense = 1\n").unwrap();
        assert!(described(&folder).unwrap_err().contains("nonsense"));
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn settings_that_are_not_known_are_named() {
        for (text, named) in [
            ("pooling = \"first\"", "pooling 'first'"),
            ("activation = \"tanh\"", "activation 'tanh'"),
            ("truncate = \"middle\"", "truncate"),
            ("poolings = \"cls\"", "poolings"),
        ] {
            let error = overrides(text).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
