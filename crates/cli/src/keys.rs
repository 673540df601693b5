//! `andon keys`: it changes a file that gateways read again by themselves.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use gateway::auth::{KeyFile, NewKey, StoredKey};
use gateway::policy::Policy;

use crate::client::{Format, print};

/// `andon keys`
#[derive(Debug, clap::Args)]
#[command(
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Examples:\n  \
                  andon keys create --keys keys.toml --tenant search --expires 90d\n  \
                  andon keys list --keys keys.toml\n  \
                  andon keys revoke ab12cd34 --keys keys.toml\n\n\
                  Gateways read the file again within a second of its change."
)]
pub struct Keys {
    #[command(subcommand)]
    action: Action,
    /// The file of the keys, the same as a gateway's --keys
    #[arg(long, global = true, value_name = "FILE")]
    keys: Option<PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Makes a key and prints it: it is shown this once, and stored as a hash
    #[command(
        disable_version_flag = true,
        after_help = "Example:\n  andon keys create --keys keys.toml --tenant search --name \"nightly job\" --expires 90d"
    )]
    Create(Create),
    /// Lists the keys by their prefixes
    #[command(after_help = "Example:\n  andon keys list --keys keys.toml --output json")]
    List(List),
    /// Ends a key: gateways refuse it within a second
    #[command(after_help = "Example:\n  andon keys revoke ab12cd34 --keys keys.toml")]
    Revoke(Revoke),
}

#[derive(Debug, clap::Args)]
struct Create {
    /// The tenant of the policy that it stands for
    #[arg(long, value_name = "NAME")]
    tenant: String,
    /// What it is for, for people
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// How long it is good for; for ever if not given
    #[arg(long, value_name = "DURATION", value_parser = platform::config::positive_duration)]
    expires: Option<Duration>,
    /// A gateway's policy, to check that it names the tenant
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct List {
    /// A table for people, JSON for programs
    #[arg(long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, clap::Args)]
struct Revoke {
    /// The eight characters between andon_ and the next underscore
    prefix: String,
}

/// Runs `andon keys`.
pub fn keys(arguments: Keys) -> anyhow::Result<()> {
    let path = arguments
        .keys
        .context("which keys? name their file with --keys FILE")?;
    let file = KeyFile::at(&path);
    match arguments.action {
        Action::Create(asked) => create(&file, asked),
        Action::List(asked) => list(&file.list()?, asked.output),
        Action::Revoke(asked) => {
            let key = file.revoke(&asked.prefix)?;
            print::out(&format!("revoked {} of {}\n", key.prefix, key.tenant))
        }
    }
}

fn create(file: &KeyFile, asked: Create) -> anyhow::Result<()> {
    if let Some(path) = &asked.policy
        && !Policy::read(path)?.tenants.contains_key(&asked.tenant)
    {
        bail!("the policy names no tenant '{}'", asked.tenant);
    }
    let key = file.create(NewKey {
        tenant: asked.tenant,
        name: asked.name,
        life: asked.expires,
    })?;
    eprintln!("Keep this key: it is not stored and cannot be shown again.");
    print::out(&format!("{key}\n"))
}

fn list(keys: &[StoredKey], format: Format) -> anyhow::Result<()> {
    let now = SystemTime::now();
    if format == Format::Json {
        let keys: Vec<_> = keys.iter().map(|key| json(key, now)).collect();
        return print::json(&keys);
    }
    let rows: Vec<_> = keys
        .iter()
        .map(|key| {
            vec![
                key.prefix.clone(),
                key.tenant.clone(),
                key.name.clone().unwrap_or_default(),
                time(key.created),
                key.expires.map(time).unwrap_or_default(),
                state(key, now).to_owned(),
            ]
        })
        .collect();
    let heading = ["PREFIX", "TENANT", "NAME", "CREATED", "EXPIRES", "STATE"];
    print::out(&print::table(&heading, &rows))
}

fn json(key: &StoredKey, now: SystemTime) -> serde_json::Value {
    serde_json::json!({
        "prefix": key.prefix,
        "tenant": key.tenant,
        "name": key.name,
        "created": time(key.created),
        "expires": key.expires.map(time),
        "revoked": key.revoked.map(time),
        "state": state(key, now),
    })
}

fn state(key: &StoredKey, now: SystemTime) -> &'static str {
    match (key.revoked, key.expires) {
        (Some(_), _) => "revoked",
        (None, Some(expires)) if expires <= now => "expired",
        _ => "good",
    }
}

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}
