//! `andon models show`

use std::collections::BTreeMap;
use std::fmt::Write as _;

use protocol::inference::model_metadata_response::TensorMetadata;
use protocol::inference::{
    ModelConfig, ModelConfigRequest, ModelMetadataResponse, ModelStatistics,
    ModelStatisticsRequest, StatisticDuration,
};
use serde::Serialize;
use tonic::Code;

use super::super::connection::Client;
use super::super::options::Format;
use super::super::print;

/// Everything that the server says about a model.
#[derive(Debug, Serialize)]
struct Shown {
    name: String,
    versions: Vec<String>,
    platform: String,
    inputs: Vec<TensorShown>,
    outputs: Vec<TensorShown>,
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<ConfigShown>,
    statistics: Vec<StatisticsShown>,
}

#[derive(Debug, Serialize)]
struct TensorShown {
    name: String,
    datatype: String,
    shape: Vec<i64>,
}

#[derive(Debug, Serialize)]
struct ConfigShown {
    backend: String,
    max_batch_size: i32,
    parameters: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct StatisticsShown {
    version: String,
    rows: u64,
    batches: u64,
    /// Milliseconds since 1970; 0 when the model was never called.
    last_inference_ms: u64,
    durations: BTreeMap<&'static str, DurationShown>,
}

#[derive(Debug, Serialize)]
struct DurationShown {
    count: u64,
    mean_us: f64,
}

/// Shows one model.
pub async fn show(
    client: &mut Client,
    name: &str,
    version: &str,
    format: Format,
) -> anyhow::Result<()> {
    let metadata = client.metadata(name, version).await?;
    let config = config(client, name, version).await?;
    let statistics = statistics(client, name, version).await?;
    let shown = gathered(metadata, config, &statistics);
    match format {
        Format::Json => print::json(&shown),
        Format::Table => print::out(&text(&shown)),
    }
}

/// The configuration; none where a server of the protocol does not give one.
async fn config(
    client: &mut Client,
    name: &str,
    version: &str,
) -> anyhow::Result<Option<ModelConfig>> {
    let request = client.request(ModelConfigRequest {
        name: name.to_owned(),
        version: version.to_owned(),
    });
    match client.stub().model_config(request).await {
        Ok(answer) => Ok(answer.into_inner().config),
        Err(status) if status.code() == Code::Unimplemented => Ok(None),
        Err(status) => Err(client.explain(status).await),
    }
}

/// The statistics; none where a server of the protocol does not keep them.
async fn statistics(
    client: &mut Client,
    name: &str,
    version: &str,
) -> anyhow::Result<Vec<ModelStatistics>> {
    let request = client.request(ModelStatisticsRequest {
        name: name.to_owned(),
        version: version.to_owned(),
    });
    match client.stub().model_statistics(request).await {
        Ok(answer) => Ok(answer.into_inner().model_stats),
        Err(status) if status.code() == Code::Unimplemented => Ok(Vec::new()),
        Err(status) => Err(client.explain(status).await),
    }
}

fn gathered(
    metadata: ModelMetadataResponse,
    config: Option<ModelConfig>,
    statistics: &[ModelStatistics],
) -> Shown {
    let tensors = |tensors: Vec<TensorMetadata>| {
        tensors
            .into_iter()
            .map(|tensor| TensorShown {
                name: tensor.name,
                datatype: tensor.datatype,
                shape: tensor.shape,
            })
            .collect()
    };
    Shown {
        name: metadata.name,
        versions: metadata.versions,
        platform: metadata.platform,
        inputs: tensors(metadata.inputs),
        outputs: tensors(metadata.outputs),
        config: config.map(|config| ConfigShown {
            backend: config.backend,
            max_batch_size: config.max_batch_size,
            parameters: config
                .parameters
                .into_iter()
                .map(|(key, parameter)| (key, parameter.string_value))
                .collect(),
        }),
        statistics: statistics.iter().map(counted).collect(),
    }
}

fn counted(statistics: &ModelStatistics) -> StatisticsShown {
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
    StatisticsShown {
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

fn mean(duration: StatisticDuration) -> DurationShown {
    let mean_ns = if duration.count == 0 {
        0.0
    } else {
        duration.ns as f64 / duration.count as f64
    };
    DurationShown {
        count: duration.count,
        mean_us: (mean_ns / 100.0).round() / 10.0,
    }
}

fn text(shown: &Shown) -> String {
    let mut text = format!(
        "{}, {}\nversions  {}\n",
        print::visible(&shown.name),
        print::visible(&shown.platform),
        print::visible(&shown.versions.join(", ")),
    );
    let tensors = [("input", &shown.inputs), ("output", &shown.outputs)];
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
    if let Some(config) = &shown.config {
        let mut rows = vec![vec![
            "max_batch_size".to_owned(),
            config.max_batch_size.to_string(),
        ]];
        let parameters = config.parameters.iter();
        rows.extend(parameters.map(|(key, value)| vec![key.clone(), value.clone()]));
        text.push('\n');
        text.push_str(&print::table(&["PARAMETER", "VALUE"], &rows));
    }
    for statistics in &shown.statistics {
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
