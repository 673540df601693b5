//! `andon models`

mod show;

use protocol::inference::{
    RepositoryIndexRequest, RepositoryModelLoadRequest, RepositoryModelUnloadRequest,
    repository_index_response::ModelIndex,
};

use super::connection::{Client, Connection};
use super::options::Format;
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
                  andon models unload digits"
)]
pub struct Models {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    connection: Connection,
    /// A table for people, JSON for programs
    #[arg(long, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Lists every model version with its state
    #[command(after_help = "Example:\n  andon models list --output json")]
    List,
    /// Shows a model's inputs, outputs, configuration and statistics
    #[command(
        disable_version_flag = true,
        after_help = "Examples:\n  andon models show minilm\n  andon models show minilm --version 1 --output json"
    )]
    Show(Show),
    /// Loads a model, or loads it again, and waits until it is ready
    #[command(after_help = "Example:\n  andon models load digits")]
    Load(Named),
    /// Unloads a model and gives its memory back
    #[command(after_help = "Example:\n  andon models unload digits")]
    Unload(Named),
}

#[derive(Debug, clap::Args)]
struct Show {
    /// The model's name
    name: String,
    /// The version; the newest ready one if not given
    #[arg(long, value_name = "N", default_value = "", hide_default_value = true)]
    version: String,
}

#[derive(Debug, clap::Args)]
struct Named {
    /// The model's name
    name: String,
}

/// Runs `andon models`.
pub async fn models(arguments: Models) -> anyhow::Result<()> {
    let mut client = Client::connect(&arguments.connection).await?;
    let format = arguments.output;
    match arguments.action {
        Action::List => list(&mut client, format).await,
        Action::Show(asked) => show::show(&mut client, &asked.name, &asked.version, format).await,
        Action::Load(asked) => load(&mut client, asked.name, format).await,
        Action::Unload(asked) => unload(&mut client, asked.name, format).await,
    }
}

/// One model version, as JSON has it.
#[derive(Debug, serde::Serialize)]
struct Entry {
    name: String,
    version: String,
    state: String,
    reason: String,
}

impl From<ModelIndex> for Entry {
    fn from(model: ModelIndex) -> Self {
        Self {
            name: model.name,
            version: model.version,
            state: model.state,
            reason: model.reason,
        }
    }
}

async fn list(client: &mut Client, format: Format) -> anyhow::Result<()> {
    let models = index(client).await?;
    if format == Format::Json {
        return print::json(&models);
    }
    if models.is_empty() {
        return print::out(
            "The model repository is empty: put a model at <repository>/<name>/1/\n",
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

async fn index(client: &mut Client) -> anyhow::Result<Vec<Entry>> {
    let request = client.request(RepositoryIndexRequest::default());
    let answered = client.stub().repository_index(request).await;
    let index = match answered {
        Ok(index) => index.into_inner(),
        Err(status) => return Err(client.explain(status).await),
    };
    let mut models: Vec<Entry> = index.models.into_iter().map(Entry::from).collect();
    models.sort_by(|one, other| {
        one.name
            .cmp(&other.name)
            .then(order(one).cmp(&order(other)))
    });
    Ok(models)
}

/// Versions are integers: 10 comes after 9.
fn order(model: &Entry) -> u64 {
    model.version.parse().unwrap_or(u64::MAX)
}

async fn load(client: &mut Client, name: String, format: Format) -> anyhow::Result<()> {
    let request = client.request(RepositoryModelLoadRequest {
        model_name: name.clone(),
        ..Default::default()
    });
    match client.stub().repository_model_load(request).await {
        Ok(_) => changed(&name, "loaded", format),
        Err(status) => Err(client.explain(status).await),
    }
}

async fn unload(client: &mut Client, name: String, format: Format) -> anyhow::Result<()> {
    let request = client.request(RepositoryModelUnloadRequest {
        model_name: name.clone(),
        ..Default::default()
    });
    match client.stub().repository_model_unload(request).await {
        Ok(_) => changed(&name, "unloaded", format),
        Err(status) => Err(client.explain(status).await),
    }
}

fn changed(name: &str, done: &str, format: Format) -> anyhow::Result<()> {
    match format {
        Format::Json => print::json(&serde_json::json!({ "name": name, "done": done })),
        Format::Table => print::out(&format!("{} is {done}\n", print::visible(name))),
    }
}
