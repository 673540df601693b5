//! `andon models`

mod check;
mod show;

use std::path::PathBuf;

use protocol::Method;
use protocol::inference::{
    RepositoryIndexRequest, RepositoryIndexResponse, RepositoryModelLoadRequest,
    RepositoryModelLoadResponse, RepositoryModelUnloadRequest, RepositoryModelUnloadResponse,
    repository_index_response::ModelIndex,
};

use super::connection::{Client, Connection};
use super::options::OutputFormat;
use super::print;

/// `andon models`
#[derive(Debug, clap::Args)]
#[command(
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Examples:\n  \
                  andon models list\n  \
                  andon models list --output json --address gateway:8001\n  \
                  andon models show minilm\n  \
                  andon models unload digits\n  \
                  andon models check ./all-MiniLM-L6-v2"
)]
pub struct Models {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    connection: Connection,
    /// Output format
    #[arg(long, global = true, value_enum, default_value_t = OutputFormat::Table)]
    output: OutputFormat,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    #[command(flatten)]
    OfServer(ServerAction),
    /// Check what a model folder would be served as, without a server: its settings, the file that each is from, and what is missing
    ///
    /// Exits with 1 for a folder that would be refused.
    #[command(after_help = "Examples:\n  andon models check ./all-MiniLM-L6-v2\n  \
                            andon models check models/minilm/1 --output json")]
    Check(Folder),
}

/// What a server does.
#[derive(Debug, clap::Subcommand)]
enum ServerAction {
    /// List models: every version with its state
    #[command(after_help = "Example:\n  andon models list --output json")]
    List,
    /// Show a model's metadata, configuration and statistics
    #[command(
        disable_version_flag = true,
        after_help = "Examples:\n  andon models show minilm\n  andon models show minilm --version 1 --output json"
    )]
    Show(ModelVersion),
    /// Load or reload a model and wait until it is ready
    #[command(after_help = "Example:\n  andon models load digits")]
    Load(Model),
    /// Unload a model and free its memory
    #[command(after_help = "Example:\n  andon models unload digits")]
    Unload(Model),
}

#[derive(Debug, clap::Args)]
struct ModelVersion {
    /// Name of the model
    name: String,
    /// Version of the model; defaults to the newest ready version
    #[arg(long, value_name = "N", default_value = "", hide_default_value = true)]
    version: String,
}

#[derive(Debug, clap::Args)]
struct Model {
    /// Name of the model
    name: String,
}

#[derive(Debug, clap::Args)]
struct Folder {
    /// Folder of a model, as Hugging Face publishes it or as a version of a model repository
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Runs `andon models`.
pub async fn models(arguments: Models) -> anyhow::Result<()> {
    let format = arguments.output;
    let action = match arguments.action {
        Action::Check(folder) => return check::check(&folder.folder, format),
        Action::OfServer(action) => action,
    };
    let mut client = Client::connect(&arguments.connection).await?;
    match action {
        ServerAction::List => list(&mut client, format).await,
        ServerAction::Show(model) => {
            show::show(&mut client, &model.name, &model.version, format).await
        }
        ServerAction::Load(model) => load(&mut client, model.name, format).await,
        ServerAction::Unload(model) => unload(&mut client, model.name, format).await,
    }
}

/// The state of a model version, as JSON has it.
#[derive(Debug, serde::Serialize)]
struct VersionState {
    name: String,
    version: String,
    state: String,
    reason: String,
}

impl From<ModelIndex> for VersionState {
    fn from(model: ModelIndex) -> Self {
        Self {
            name: model.name,
            version: model.version,
            state: model.state,
            reason: model.reason,
        }
    }
}

async fn list(client: &mut Client, format: OutputFormat) -> anyhow::Result<()> {
    let models = index(client).await?;
    if format == OutputFormat::Json {
        return print::json(&models);
    }
    if models.is_empty() {
        return print::out(
            "The model repository is empty: add a model as <repository>/<name>/<version>/\n",
        );
    }
    let rows: Vec<Vec<String>> = models
        .into_iter()
        .map(|model| vec![model.name, model.version, model.state, model.reason])
        .collect();
    print::out(&print::table(
        &["NAME", "VERSION", "STATE", "REASON"],
        &rows,
    ))
}

async fn index(client: &mut Client) -> anyhow::Result<Vec<VersionState>> {
    let request = RepositoryIndexRequest::default();
    let index: RepositoryIndexResponse = client.call(Method::RepositoryIndex, &request).await?;
    let mut models: Vec<VersionState> = index.models.into_iter().map(Into::into).collect();
    models.sort_by(|one, other| {
        one.name
            .cmp(&other.name)
            .then(version_number(one).cmp(&version_number(other)))
    });
    Ok(models)
}

/// Versions are integers: 10 comes after 9.
fn version_number(model: &VersionState) -> u64 {
    model.version.parse().unwrap_or(u64::MAX)
}

async fn load(client: &mut Client, name: String, format: OutputFormat) -> anyhow::Result<()> {
    let request = RepositoryModelLoadRequest {
        model_name: name.clone(),
        ..Default::default()
    };
    let _: RepositoryModelLoadResponse = client.call(Method::RepositoryModelLoad, &request).await?;
    print_done(&name, "loaded", format)
}

async fn unload(client: &mut Client, name: String, format: OutputFormat) -> anyhow::Result<()> {
    let request = RepositoryModelUnloadRequest {
        model_name: name.clone(),
        ..Default::default()
    };
    let _: RepositoryModelUnloadResponse =
        client.call(Method::RepositoryModelUnload, &request).await?;
    print_done(&name, "unloaded", format)
}

fn print_done(name: &str, done: &str, format: OutputFormat) -> anyhow::Result<()> {
    match format {
        OutputFormat::Json => print::json(&serde_json::json!({ "name": name, "done": done })),
        OutputFormat::Table => print::out(&format!("{} is {done}\n", print::visible(name))),
    }
}
