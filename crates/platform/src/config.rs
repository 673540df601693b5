//! Flags, environment variables and one TOML file, in that order of strength.
//! All three go through the same parser, so that a value is checked in the same
//! way wherever it stands.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgAction, Command};

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{path} is not TOML: {source}")]
    NotToml {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<toml::de::Error>,
    },
    /// A key that the role does not have.
    #[error("{path}: unknown key '{key}'; the keys are: {known}")]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The keys that the role has.
        known: String,
    },
    /// A value of a kind that no flag takes.
    #[error("{path}: '{key}' must be a text, a number, a boolean or a list of these")]
    WrongKind {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
}

/// Gives the subcommand that `arguments` name the values of its configuration
/// file as defaults: a flag or a variable overrides them. Without a file the
/// command comes back as it was.
pub fn with_file(command: Command, arguments: &[OsString]) -> Result<Command, ConfigError> {
    let Some(path) = file_of(arguments) else {
        return Ok(command);
    };
    let role = arguments
        .iter()
        .skip(1)
        .filter_map(|argument| argument.to_str())
        .find_map(|argument| command.find_subcommand(argument))
        // A tool takes no file, even where a role's variable names one.
        .filter(|subcommand| subcommand.get_arguments().any(|a| a.get_id() == "config"))
        .map(|subcommand| subcommand.get_name().to_owned());
    let Some(role) = role else {
        return Ok(command);
    };
    let values = read(&path)?;
    let mut outcome = Ok(());
    let command = command.mut_subcommand(role, |subcommand| {
        let (subcommand, applied) = apply(subcommand, values, &path);
        outcome = applied;
        subcommand
    });
    outcome.map(|()| command)
}

/// The file that `--config` or `ANDON_CONFIG` names.
fn file_of(arguments: &[OsString]) -> Option<PathBuf> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "--config" {
            return arguments.next().map(PathBuf::from);
        }
        if let Some(path) = argument
            .to_str()
            .and_then(|text| text.strip_prefix("--config="))
        {
            return Some(PathBuf::from(path));
        }
    }
    std::env::var_os("ANDON_CONFIG").map(PathBuf::from)
}

fn read(path: &Path) -> Result<toml::Table, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    text.parse().map_err(|source| ConfigError::NotToml {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

fn apply(
    mut command: Command,
    values: toml::Table,
    path: &Path,
) -> (Command, Result<(), ConfigError>) {
    for (key, value) in values {
        let known = |argument: &&clap::Arg| {
            argument.get_id() == key.as_str() && argument.get_long().is_some() && key != "config"
        };
        if !command.get_arguments().any(|argument| known(&argument)) {
            let known = command
                .get_arguments()
                .filter(|argument| argument.get_long().is_some() && argument.get_id() != "config")
                .map(|argument| argument.get_id().as_str())
                .collect::<Vec<_>>()
                .join(", ");
            let path = path.to_owned();
            return (command, Err(ConfigError::UnknownKey { path, key, known }));
        }
        let Some(texts) = to_texts(&value) else {
            let path = path.to_owned();
            return (command, Err(ConfigError::WrongKind { path, key }));
        };
        command = command.mut_arg(key.as_str(), |argument| {
            let one = !matches!(argument.get_action(), ArgAction::Append);
            let count = if one { 1 } else { texts.len() };
            argument.required(false).default_values(
                texts
                    .into_iter()
                    .take(count)
                    .map(clap::builder::OsStr::from),
            )
        });
    }
    (command, Ok(()))
}

fn to_texts(value: &toml::Value) -> Option<Vec<OsString>> {
    let one = |value: &toml::Value| match value {
        toml::Value::String(text) => Some(text.into()),
        toml::Value::Integer(number) => Some(number.to_string().into()),
        toml::Value::Float(number) => Some(number.to_string().into()),
        toml::Value::Boolean(flag) => Some(flag.to_string().into()),
        _ => None,
    };
    match value {
        toml::Value::Array(values) => values.iter().map(one).collect(),
        value => one(value).map(|text| vec![text]),
    }
}

/// Names the variable of each flag: `--grpc-addr` is `ANDON_GRPC_ADDR`.
#[must_use]
pub fn with_variables(command: Command) -> Command {
    command.mut_subcommands(|subcommand| {
        subcommand.mut_args(|argument| match argument.get_long() {
            Some(long) if long != "help" && long != "version" => {
                let variable = format!("ANDON_{}", long.replace('-', "_").to_uppercase());
                argument.env(clap::builder::OsStr::from(OsString::from(variable)))
            }
            _ => argument,
        })
    })
}

/// Reads a duration such as `50ms`, `5s` or `1h`.
pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; write 50ms, 5s or 1h"))
}

/// Reads a duration that is more than nothing.
pub fn positive_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("must be more than nothing".to_owned()),
        duration => Ok(duration),
    }
}

/// Reads a size such as `64MiB`.
pub fn bytes(text: &str) -> Result<usize, String> {
    text.parse::<bytesize::ByteSize>()
        .map_err(|error| format!("{error}; write 1048576, 64KiB or 1GiB"))
        .and_then(|size| {
            usize::try_from(size.as_u64())
                .ok()
                .filter(|&bytes| bytes > 0)
                .ok_or_else(|| "must be more than nothing".to_owned())
        })
}
