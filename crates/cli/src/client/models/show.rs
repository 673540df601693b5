//! `andon models show`

use std::collections::BTreeMap;
use std::fmt::Write as _;

use protocol::Method;
use protocol::inference::model_metadata_response::TensorMetadata;
use protocol::inference::{
    ModelConfig, ModelConfigRequest, ModelConfigResponse, ModelMetadataResponse, ModelStatistics,
    ModelStatisticsRequest, ModelStatisticsResponse, StatisticDuration,
};
use serde::Serialize;
use tonic::Code;

use super::super::call::CallError;
use super::super::connection::Client;
use super::super::options::OutputFormat;
use super::super::print;

/// Metadata, configuration and statistics of a model.
#[derive(Debug, Serialize)]
struct ModelDetails {
    name: String,
    versions: Vec<String>,
    platform: String,
    inputs: Vec<TensorDetails>,
    outputs: Vec<TensorDetails>,
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<ConfigDetails>,
    statistics: Vec<VersionStatistics>,
}

#[derive(Debug, Serialize)]
struct TensorDetails {
    name: String,
    datatype: String,
    shape: Vec<i64>,
}

#[derive(Debug, Serialize)]
struct ConfigDetails {
    backend: String,
    max_batch_size: i32,
    parameters: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct VersionStatistics {
    version: String,
    rows: u64,
    batches: u64,
    /// Milliseconds since 1970; 0 when the model was never called.
    last_inference_ms: u64,
    durations: BTreeMap<&'static str, MeanDuration>,
}

#[derive(Debug, Serialize)]
struct MeanDuration {
    count: u64,
    mean_us: f64,
}

/// Shows one model.
pub async fn show(
    client: &mut Client,
    name: &str,
    version: &str,
    format: OutputFormat,
) -> anyhow::Result<()> {
    let metadata = client.metadata(name, version).await?;
    let config = config(client, name, version).await?;
    let statistics = statistics(client, name, version).await?;
    let model = details(metadata, config, &statistics);
    match format {
        OutputFormat::Json => print::json(&model),
        OutputFormat::Table => print::out(&text(&model)),
    }
}

/// The configuration; none where the server does not implement the call.
async fn config(
    client: &mut Client,
    name: &str,
    version: &str,
) -> anyhow::Result<Option<ModelConfig>> {
    let request = ModelConfigRequest {
        name: name.to_owned(),
        version: version.to_owned(),
    };
    let response = client.try_call(Method::ModelConfig, &request).await;
    let response: Option<ModelConfigResponse> = optional(client, response).await?;
    Ok(response.and_then(|response| response.config))
}

/// The statistics; none where the server does not implement the call.
async fn statistics(
    client: &mut Client,
    name: &str,
    version: &str,
) -> anyhow::Result<Vec<ModelStatistics>> {
    let request = ModelStatisticsRequest {
        name: name.to_owned(),
        version: version.to_owned(),
    };
    let response = client.try_call(Method::ModelStatistics, &request).await;
    let response: Option<ModelStatisticsResponse> = optional(client, response).await?;
    Ok(response.unwrap_or_default().model_stats)
}

/// Other servers of the protocol need not implement every call.
async fn optional<R>(
    client: &mut Client,
    response: Result<R, CallError>,
) -> anyhow::Result<Option<R>> {
    match response {
        Ok(response) => Ok(Some(response)),
        Err(CallError::Status(status)) if status.code() == Code::Unimplemented => Ok(None),
        Err(error) => Err(client.explain(error).await),
    }
}

fn details(
    metadata: ModelMetadataResponse,
    config: Option<ModelConfig>,
    statistics: &[ModelStatistics],
) -> ModelDetails {
    let tensors = |tensors: Vec<TensorMetadata>| {
        tensors
            .into_iter()
            .map(|tensor| TensorDetails {
                name: tensor.name,
                datatype: tensor.datatype,
                shape: tensor.shape,
            })
            .collect()
    };
    ModelDetails {
        name: metadata.name,
        versions: metadata.versions,
        platform: metadata.platform,
        inputs: tensors(metadata.inputs),
        outputs: tensors(metadata.outputs),
        config: config.map(|config| ConfigDetails {
            backend: config.backend,
            max_batch_size: config.max_batch_size,
            parameters: config
                .parameters
                .into_iter()
                .map(|(key, parameter)| (key, parameter.string_value))
                .collect(),
        }),
        statistics: statistics.iter().map(version_statistics).collect(),
    }
}

fn version_statistics(statistics: &ModelStatistics) -> VersionStatistics {
    let stats = statistics.inference_stats.unwrap_or_default();
    let durations = [
        ("success", stats.success),
        ("fail", stats.fail),
        ("queue", stats.queue),
        ("compute_input", stats.compute_input),
        ("compute_infer", stats.compute_infer),
        ("compute_output", stats.compute_output),
        ("cache_hit", stats.cache_hit),
        ("cache_miss", stats.cache_miss),
    ];
    VersionStatistics {
        version: statistics.version.clone(),
        rows: statistics.inference_count,
        batches: statistics.execution_count,
        last_inference_ms: statistics.last_inference,
        durations: durations
            .into_iter()
            .map(|(name, duration)| (name, mean(duration.unwrap_or_default())))
            .collect(),
    }
}

fn mean(duration: StatisticDuration) -> MeanDuration {
    let mean_ns = if duration.count == 0 {
        0.0
    } else {
        duration.ns as f64 / duration.count as f64
    };
    MeanDuration {
        count: duration.count,
        mean_us: (mean_ns / 100.0).round() / 10.0,
    }
}

fn text(model: &ModelDetails) -> String {
    let mut text = format!(
        "{}, {}\nversions  {}\n",
        print::visible(&model.name),
        print::visible(&model.platform),
        print::visible(&model.versions.join(", ")),
    );
    let tensors = [("input", &model.inputs), ("output", &model.outputs)];
    let rows: Vec<Vec<String>> = tensors
        .into_iter()
        .flat_map(|(kind, tensors)| tensors.iter().map(move |tensor| (kind, tensor)))
        .map(|(kind, tensor)| {
            vec![
                kind.to_owned(),
                tensor.name.clone(),
                tensor.datatype.clone(),
                print::shape(&tensor.shape),
            ]
        })
        .collect();
    text.push('\n');
    text.push_str(&print::table(
        &["TENSOR", "NAME", "DATATYPE", "SHAPE"],
        &rows,
    ));
    if let Some(config) = &model.config {
        let mut rows = vec![vec![
            "max_batch_size".to_owned(),
            config.max_batch_size.to_string(),
        ]];
        let parameters = config.parameters.iter();
        rows.extend(parameters.map(|(key, value)| vec![key.clone(), value.clone()]));
        text.push('\n');
        text.push_str(&print::table(&["PARAMETER", "VALUE"], &rows));
    }
    for statistics in &model.statistics {
        let _ = write!(
            text,
            "\nversion {}: {} rows in {} batches\n",
            print::visible(&statistics.version),
            statistics.rows,
            statistics.batches
        );
        let rows: Vec<Vec<String>> = statistics
            .durations
            .iter()
            .filter(|(_, duration)| duration.count > 0)
            .map(|(name, duration)| {
                let mean = format!("{:.1} µs", duration.mean_us);
                vec![(*name).to_owned(), duration.count.to_string(), mean]
            })
            .collect();
        if !rows.is_empty() {
            text.push_str(&print::table(&["DURATION", "COUNT", "MEAN"], &rows));
        }
    }
    text
}
