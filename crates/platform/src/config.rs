//! Flags, environment variables and one TOML file, in this order of precedence.
//! All three go through the same parser, so that a value is checked in the same
//! way wherever it was set.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Command};
use toml::Spanned;

use crate::files::{ContentError, FileError, FileSource, from_toml};

/// Every setting of a role takes some hundred bytes.
const BYTES_MAX: u64 = 1 << 20;

/// Sets the values of the configuration file as defaults of the subcommand that
/// `arguments` name: a flag or an environment variable overrides them. Without a
/// file the command is returned unchanged.
pub fn with_file(command: Command, arguments: &[OsString]) -> Result<Command, FileError> {
    let Some(path) = file_of(arguments) else {
        return Ok(command);
    };
    let role = arguments
        .iter()
        .skip(1)
        .filter_map(|argument| argument.to_str())
        .find_map(|argument| command.find_subcommand(argument))
        // A client command takes no file, even where the variable of a role
        // names one.
        .filter(|subcommand| subcommand.get_arguments().any(|a| a.get_id() == "config"))
        .map(|subcommand| subcommand.get_name().to_owned());
    let Some(role) = role else {
        return Ok(command);
    };
    let source = FileSource::new(&path, "configuration file", BYTES_MAX);
    let text = source.read_text()?;
    let mut outcome = Ok(());
    let command = command.mut_subcommand(role, |subcommand| {
        let unchanged = subcommand.clone();
        apply(subcommand, &text).unwrap_or_else(|error| {
            outcome = Err(source.invalid(error));
            unchanged
        })
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

/// Sets the values of a TOML text as defaults of a command.
fn apply(mut command: Command, text: &str) -> Result<Command, ContentError> {
    let values: BTreeMap<Spanned<String>, toml::Value> = from_toml(text)?;
    let is_setting =
        |argument: &&clap::Arg| argument.get_long().is_some() && argument.get_id() != "config";
    for (key, value) in values {
        let offset = key.span().start;
        let key = key.into_inner();
        let settings = command.get_arguments().filter(is_setting);
        let keys: Vec<_> = settings.map(|setting| setting.get_id().as_str()).collect();
        if !keys.contains(&key.as_str()) {
            let reason = format!("unknown key; the keys are: {}", keys.join(", "));
            let error = ContentError::new(reason);
            return Err(error.at_offset(text, offset).in_field(key));
        }
        let Some(texts) = to_texts(&value) else {
            let error =
                ContentError::new("must be a string, a number, a boolean or a list of these");
            return Err(error.at_offset(text, offset).in_field(key));
        };
        command = command.mut_arg(key.as_str(), |argument| {
            let count = match argument.get_action() {
                ArgAction::Append => texts.len(),
                _ => 1,
            };
            let defaults = texts.into_iter().take(count);
            argument
                .required(false)
                .default_values(defaults.map(clap::builder::OsStr::from))
        });
    }
    Ok(command)
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

/// Sets the environment variable of each flag: `--grpc-addr` is `ANDON_GRPC_ADDR`.
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

/// Parses a duration such as `50ms`, `5s` or `1h`.
pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; write 50ms, 5s or 1h"))
}

/// Parses a duration greater than zero.
pub fn positive_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("must be greater than zero".to_owned()),
        duration => Ok(duration),
    }
}

/// Parses a size in bytes, such as `64MiB`.
pub fn bytes(text: &str) -> Result<usize, String> {
    text.parse::<bytesize::ByteSize>()
        .map_err(|error| format!("{error}; write 1048576, 64KiB or 1GiB"))
        .and_then(|size| {
            usize::try_from(size.as_u64())
                .ok()
                .filter(|&bytes| bytes > 0)
                .ok_or_else(|| "must be greater than zero".to_owned())
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Arg;

    #[test]
    fn a_file_sets_defaults_and_errors_name_the_line_and_the_key() {
        let command = || {
            Command::new("role")
                .arg(Arg::new("config").long("config"))
                .arg(Arg::new("rate").long("rate").required(true))
                .arg(Arg::new("peer").long("peer").action(ArgAction::Append))
        };
        let set = apply(command(), "rate = 3\npeer = [\"a\", \"b\"]").unwrap();
        let matches = set.try_get_matches_from(["role"]).unwrap();
        assert_eq!(matches.get_one::<String>("rate").unwrap(), "3");
        assert_eq!(matches.get_many::<String>("peer").unwrap().count(), 2);
        for (text, expected) in [
            (
                "\nrates = 3",
                "line 2, rates: unknown key; the keys are: rate, peer",
            ),
            ("config = \"a\"", "line 1, config: unknown key"),
            ("[rate]\na = 1", "line 1, rate: must be a string"),
            ("rate = ", "line 1: not TOML"),
        ] {
            let error = apply(command(), text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }
}
