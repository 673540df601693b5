//! `andon infer`

mod elements;
mod inputs;
mod json;
mod npy;
mod outputs;

use protocol::Method;
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::{ModelInferRequest, ModelInferResponse, ModelMetadataResponse};

use super::connection::{Client, Connection};
use super::options::{OutputFormat, pair, parameter, parameters};
use inputs::InputTensor;
use outputs::InferResponse;

/// `andon infer`
#[derive(Debug, clap::Args)]
#[command(
    disable_version_flag = true,
    after_help = "TEXTS are the values of the model's text input. Give other inputs by name with\n\
                  --input, as JSON, from a file or from standard input:\n  \
                  --input NAME=@FILE.json  a nested array; its nesting is the shape\n  \
                  --input NAME=@FILE.npy   a NumPy array\n  \
                  --input NAME=@FILE.txt   one string per line\n  \
                  --input NAME=-           standard input: one string per line, or JSON\n  \
                  --input NAME=VALUE       a string (repeatable), or JSON for numbers\n\n\
                  Examples:\n  \
                  andon infer minilm \"A lantern around a candle\" \"A stopped line\"\n  \
                  andon infer minilm - --param normalize=false --output json < texts.txt\n  \
                  andon infer digits --input pixels=@digits.npy\n  \
                  andon infer reranker --input query=\"who makes light\" \"a candle\" \"a door\""
)]
pub struct Infer {
    /// Name of the model
    model: String,
    /// Values of the text input; - reads one per line from standard input
    texts: Vec<String>,
    /// Value of an input tensor, by name; repeatable
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    input: Vec<(String, String)>,
    /// Request parameter; repeatable. Booleans and numbers are recognized;
    /// quote a value with "" to send it as a string
    #[arg(long, value_name = "KEY=VALUE", value_parser = parameter)]
    param: Vec<(String, ParameterChoice)>,
    /// Version of the model; defaults to the newest ready version
    #[arg(long, value_name = "N", default_value = "", hide_default_value = true)]
    version: String,
    #[command(flatten)]
    connection: Connection,
    /// Output format
    #[arg(long, value_enum, default_value_t = OutputFormat::Table)]
    output: OutputFormat,
}

/// Runs `andon infer`.
pub async fn infer(arguments: Infer) -> anyhow::Result<()> {
    let mut client = Client::connect(&arguments.connection).await?;
    let metadata = client
        .metadata(&arguments.model, &arguments.version)
        .await?;
    let inputs = inputs::tensors(&metadata.inputs, &arguments.input, &arguments.texts)?;
    let label = label(&metadata, &inputs);
    let mut message = ModelInferRequest {
        model_name: arguments.model,
        model_version: arguments.version,
        parameters: parameters(&arguments.param),
        ..Default::default()
    };
    for input in inputs {
        let (input, raw) = input.into_wire();
        message.inputs.push(input);
        message.raw_input_contents.push(raw);
    }
    let response: ModelInferResponse = client.call(Method::ModelInfer, &message).await?;
    let response = InferResponse::checked(response)?;
    match arguments.output {
        OutputFormat::Json => super::print::json_line(&response),
        OutputFormat::Table => super::print::out(&response.table(label)),
    }
}

/// The name and texts of the last text input, which is the one that differs
/// from row to row: they label the rows of the response.
fn label(
    metadata: &ModelMetadataResponse,
    inputs: &[InputTensor],
) -> Option<(String, Vec<String>)> {
    let last = metadata
        .inputs
        .iter()
        .rfind(|input| input.datatype == "BYTES")?;
    let input = inputs.iter().find(|input| input.name == last.name)?;
    let texts = input.tensor.to_elements().ok()?;
    let texts = texts
        .into_iter()
        .map(|text| String::from_utf8_lossy(text).into_owned());
    Some((last.name.clone(), texts.collect()))
}
