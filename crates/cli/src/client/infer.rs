//! `andon infer`

mod inputs;
mod json;
mod npy;
mod outputs;
mod scalar;

use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::{ModelInferRequest, ModelMetadataResponse};

use super::connection::{Client, Connection};
use super::options::{Format, pair, parameter, parameters};
use inputs::Column;
use outputs::Answer;

/// `andon infer`
#[derive(Debug, clap::Args)]
#[command(
    disable_version_flag = true,
    after_help = "Texts go to the model's text input. Any other input is named, and its value is\n\
                  JSON, a file or standard input:\n  \
                  --input NAME=@FILE.json  a nested array; its nesting is the shape\n  \
                  --input NAME=@FILE.npy   an array that NumPy saved\n  \
                  --input NAME=@FILE.txt   a text per line\n  \
                  --input NAME=-           standard input: a text per line, or JSON\n  \
                  --input NAME=VALUE       a text (repeatable), or JSON for numbers\n\n\
                  Examples:\n  \
                  andon infer minilm \"A lantern around a candle\" \"A stopped line\"\n  \
                  andon infer minilm - --param normalize=false --output json < texts.txt\n  \
                  andon infer digits --input pixels=@digits.npy\n  \
                  andon infer reranker --input query=\"who makes light\" \"a candle\" \"a door\""
)]
pub struct Infer {
    /// The model's name
    model: String,
    /// Texts for the model's text input; - reads a text per line from standard input
    texts: Vec<String>,
    /// An input by its name; repeatable
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    input: Vec<(String, String)>,
    /// A parameter of the request; repeatable. What looks like a boolean or a
    /// number is one; put a text in double quotes to keep it a text
    #[arg(long, value_name = "KEY=VALUE", value_parser = parameter)]
    param: Vec<(String, ParameterChoice)>,
    /// The model's version; the newest ready one if not given
    #[arg(long, value_name = "N", default_value = "", hide_default_value = true)]
    version: String,
    #[command(flatten)]
    connection: Connection,
    /// A table abbreviates vectors; JSON is complete
    #[arg(long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// Runs `andon infer`.
pub async fn infer(arguments: Infer) -> anyhow::Result<()> {
    let mut client = Client::connect(&arguments.connection).await?;
    let metadata = client
        .metadata(&arguments.model, &arguments.version)
        .await?;
    let columns = inputs::columns(&metadata.inputs, &arguments.input, &arguments.texts)?;
    let label = label(&metadata, &columns);
    let mut message = ModelInferRequest {
        model_name: arguments.model,
        model_version: arguments.version,
        parameters: parameters(&arguments.param),
        ..Default::default()
    };
    for column in columns {
        let (input, raw) = column.into_wire();
        message.inputs.push(input);
        message.raw_input_contents.push(raw);
    }
    let request = client.request(message);
    let answer = match client.stub().model_infer(request).await {
        Ok(answer) => Answer::checked(answer.into_inner())?,
        Err(status) => return Err(client.explain(status).await),
    };
    match arguments.output {
        Format::Json => super::print::json_line(&answer),
        Format::Table => super::print::out(&answer.table(label)),
    }
}

/// The texts that stand beside the rows of the answer: those of the last text
/// input, which is the one that differs from row to row.
fn label(metadata: &ModelMetadataResponse, columns: &[Column]) -> Option<(String, Vec<String>)> {
    let last = metadata
        .inputs
        .iter()
        .rfind(|input| input.datatype == "BYTES")?;
    let column = columns.iter().find(|column| column.name == last.name)?;
    let texts = column.tensor.to_elements().ok()?;
    let texts = texts
        .into_iter()
        .map(|text| String::from_utf8_lossy(text).into_owned());
    Some((last.name.clone(), texts.collect()))
}
