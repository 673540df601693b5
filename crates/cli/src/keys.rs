//! `andon keys`: changes the key file, which gateways reload by themselves.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use gateway::auth::{KeyFile, NewKey, StoredKey};
use gateway::policy::Policy;

use crate::client::{OutputFormat, print};

/// `andon keys`
#[derive(Debug, clap::Args)]
#[command(
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Examples:\n  \
                  andon keys create --keys keys.toml --tenant search --expires 90d\n  \
                  andon keys list --keys keys.toml\n  \
                  andon keys revoke ab12cd34 --keys keys.toml\n\n\
                  Gateways reload the file within a second of a change."
)]
pub struct Keys {
    #[command(subcommand)]
    action: Action,
    /// Key file: the same file as a gateway's --keys
    #[arg(long, global = true, value_name = "FILE")]
    keys: Option<PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Create an API key and print it; only its hash is stored
    #[command(
        disable_version_flag = true,
        after_help = "Example:\n  andon keys create --keys keys.toml --tenant search --name \"nightly job\" --expires 90d"
    )]
    Create(CreateOptions),
    /// List API keys by prefix
    #[command(after_help = "Example:\n  andon keys list --keys keys.toml --output json")]
    List(ListOptions),
    /// Revoke an API key: gateways reject it within a second
    #[command(after_help = "Example:\n  andon keys revoke ab12cd34 --keys keys.toml")]
    Revoke(RevokeOptions),
}

#[derive(Debug, clap::Args)]
struct CreateOptions {
    /// Tenant that the key authenticates, as named in the policy
    #[arg(long, value_name = "NAME")]
    tenant: String,
    /// Description of the key
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Lifetime of the key; without it, the key does not expire
    #[arg(long, value_name = "DURATION", value_parser = platform::config::positive_duration)]
    expires: Option<Duration>,
    /// Policy file, to check that it has the tenant
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct ListOptions {
    /// Output format
    #[arg(long, value_enum, default_value_t = OutputFormat::Table)]
    output: OutputFormat,
}

#[derive(Debug, clap::Args)]
struct RevokeOptions {
    /// Prefix of the key: the eight characters after andon_
    prefix: String,
}

/// Runs `andon keys`.
pub fn keys(arguments: Keys) -> anyhow::Result<()> {
    let path = arguments
        .keys
        .context("the key file is missing: add --keys FILE")?;
    let file = KeyFile::at(&path);
    match arguments.action {
        Action::Create(options) => create(&file, options),
        Action::List(options) => list(&file.list()?, options.output),
        Action::Revoke(options) => {
            let key = file.revoke(&options.prefix)?;
            print::out(&format!("revoked {} of {}\n", key.prefix, key.tenant))
        }
    }
}

fn create(file: &KeyFile, options: CreateOptions) -> anyhow::Result<()> {
    if let Some(path) = &options.policy
        && !Policy::read(path)?.tenants.contains_key(&options.tenant)
    {
        bail!("the policy has no tenant '{}'", options.tenant);
    }
    let key = file.create(NewKey {
        tenant: options.tenant,
        name: options.name,
        life: options.expires,
    })?;
    eprintln!("Store this key now: it cannot be shown again.");
    print::out(&format!("{key}\n"))
}

fn list(keys: &[StoredKey], format: OutputFormat) -> anyhow::Result<()> {
    let now = SystemTime::now();
    if format == OutputFormat::Json {
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
