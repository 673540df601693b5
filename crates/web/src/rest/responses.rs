//! Responses in the JSON of Triton: the protocol's field names, and 64-bit
//! integers as numbers.

use protocol::inference::model_config::SchedulingChoice;
use protocol::inference::model_instance_group::Kind as DeviceKind;
use protocol::inference::model_metadata_response::TensorMetadata;
use protocol::inference::model_version_policy::PolicyChoice;
use protocol::inference::{
    DataType, InferBatchStatistics, InferStatistics, ModelConfig, ModelMetadataResponse,
    ModelStatistics, ModelStatisticsResponse, ModelVersionPolicy, RepositoryIndexResponse,
    StatisticDuration,
};
use serde_json::{Map, Value, json};

/// The versions, inputs and outputs of a model.
pub fn metadata(response: &ModelMetadataResponse) -> Value {
    let tensors = |tensors: &[TensorMetadata]| {
        let tensor = |tensor: &TensorMetadata| {
            json!({
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": tensor.shape,
            })
        };
        tensors.iter().map(tensor).collect::<Vec<_>>()
    };
    json!({
        "name": response.name,
        "versions": response.versions,
        "platform": response.platform,
        "inputs": tensors(&response.inputs),
        "outputs": tensors(&response.outputs),
    })
}

/// A model's configuration.
pub fn config(config: &ModelConfig) -> Value {
    let data_type = |number: i32| DataType::try_from(number).unwrap_or_default().as_str_name();
    let inputs = config.input.iter().map(|input| {
        json!({
            "name": input.name,
            "data_type": data_type(input.data_type),
            "dims": input.dims,
            "optional": input.optional,
        })
    });
    let outputs = config.output.iter().map(|output| {
        json!({
            "name": output.name,
            "data_type": data_type(output.data_type),
            "dims": output.dims,
        })
    });
    let groups = config.instance_group.iter().map(|group| {
        let kind = DeviceKind::try_from(group.kind).unwrap_or_default();
        json!({
            "name": group.name,
            "kind": kind.as_str_name(),
            "count": group.count,
            "gpus": group.gpus,
        })
    });
    let parameters = config
        .parameters
        .iter()
        .map(|(name, value)| (name.clone(), json!({ "string_value": value.string_value })));
    let mut written = json!({
        "name": config.name,
        "platform": config.platform,
        "backend": config.backend,
        "max_batch_size": config.max_batch_size,
        "input": inputs.collect::<Vec<_>>(),
        "output": outputs.collect::<Vec<_>>(),
        "instance_group": groups.collect::<Vec<_>>(),
        "parameters": parameters.collect::<Map<_, _>>(),
    });
    let policy = config.version_policy.as_ref().and_then(version_policy);
    if let Some(policy) = policy {
        written["version_policy"] = policy;
    }
    if let Some(SchedulingChoice::DynamicBatching(batching)) = &config.scheduling_choice {
        written["dynamic_batching"] = json!({
            "preferred_batch_size": batching.preferred_batch_size,
            "max_queue_delay_microseconds": batching.max_queue_delay_microseconds,
        });
    }
    if let Some(policy) = &config.model_transaction_policy {
        written["model_transaction_policy"] = json!({ "decoupled": policy.decoupled });
    }
    written
}

fn version_policy(policy: &ModelVersionPolicy) -> Option<Value> {
    Some(match policy.policy_choice.as_ref()? {
        PolicyChoice::Latest(latest) => {
            json!({ "latest": { "num_versions": latest.num_versions } })
        }
        PolicyChoice::All(_) => json!({ "all": {} }),
        PolicyChoice::Specific(specific) => {
            json!({ "specific": { "versions": specific.versions } })
        }
    })
}

/// Every model version of a repository.
pub fn index(response: &RepositoryIndexResponse) -> Value {
    let models = response.models.iter().map(|model| {
        json!({
            "name": model.name,
            "version": model.version,
            "state": model.state,
            "reason": model.reason,
        })
    });
    models.collect()
}

/// The statistics of models.
pub fn statistics(response: &ModelStatisticsResponse) -> Value {
    let models: Vec<Value> = response.model_stats.iter().map(model_statistics).collect();
    json!({ "model_stats": models })
}

fn model_statistics(model: &ModelStatistics) -> Value {
    let memory = model.memory_usage.iter().map(|usage| {
        json!({
            "type": usage.r#type,
            "id": usage.id,
            "byte_size": usage.byte_size,
        })
    });
    let responses = model.response_stats.iter().map(|(number, stages)| {
        let stages = json!({
            "compute_infer": duration(stages.compute_infer),
            "compute_output": duration(stages.compute_output),
            "success": duration(stages.success),
            "fail": duration(stages.fail),
            "empty_response": duration(stages.empty_response),
            "cancel": duration(stages.cancel),
        });
        (number.clone(), stages)
    });
    json!({
        "name": model.name,
        "version": model.version,
        "last_inference": model.last_inference,
        "inference_count": model.inference_count,
        "execution_count": model.execution_count,
        "inference_stats": stages(&model.inference_stats.unwrap_or_default()),
        "response_stats": responses.collect::<Map<_, _>>(),
        "batch_stats": model.batch_stats.iter().map(batch).collect::<Vec<_>>(),
        "memory_usage": memory.collect::<Vec<_>>(),
    })
}

fn stages(stages: &InferStatistics) -> Value {
    json!({
        "success": duration(stages.success),
        "fail": duration(stages.fail),
        "queue": duration(stages.queue),
        "compute_input": duration(stages.compute_input),
        "compute_infer": duration(stages.compute_infer),
        "compute_output": duration(stages.compute_output),
        "cache_hit": duration(stages.cache_hit),
        "cache_miss": duration(stages.cache_miss),
    })
}

fn batch(batch: &InferBatchStatistics) -> Value {
    json!({
        "batch_size": batch.batch_size,
        "compute_input": duration(batch.compute_input),
        "compute_infer": duration(batch.compute_infer),
        "compute_output": duration(batch.compute_output),
    })
}

fn duration(duration: Option<StatisticDuration>) -> Value {
    let duration = duration.unwrap_or_default();
    json!({ "count": duration.count, "ns": duration.ns })
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::inference::model_version_policy::Specific;
    use protocol::inference::{ModelInput, ModelParameter};

    #[test]
    fn numbers_are_numbers_and_names_the_protocols() {
        let response = ModelStatisticsResponse {
            model_stats: vec![ModelStatistics {
                name: "m".into(),
                inference_count: 1 << 60,
                ..Default::default()
            }],
        };
        let written = statistics(&response);
        let model = &written["model_stats"][0];
        assert_eq!(model["inference_count"], 1_u64 << 60);
        assert_eq!(model["inference_stats"]["queue"]["ns"], 0);
    }

    #[test]
    fn a_configuration_has_tritons_form() {
        let written = config(&ModelConfig {
            name: "m".into(),
            input: vec![ModelInput {
                name: "x".into(),
                data_type: DataType::TypeFp32.into(),
                dims: vec![64],
                optional: false,
            }],
            version_policy: Some(ModelVersionPolicy {
                policy_choice: Some(PolicyChoice::Specific(Specific { versions: vec![3] })),
            }),
            parameters: [(
                "task".to_owned(),
                ModelParameter {
                    string_value: "tabular".into(),
                },
            )]
            .into(),
            ..Default::default()
        });
        assert_eq!(written["input"][0]["data_type"], "TYPE_FP32");
        assert_eq!(written["input"][0]["dims"], json!([64]));
        assert_eq!(
            written["version_policy"]["specific"]["versions"],
            json!([3])
        );
        assert_eq!(written["parameters"]["task"]["string_value"], "tabular");
        assert!(written.get("dynamic_batching").is_none());
    }
}
