//! The labels of a model's scores, by its configuration.

use std::sync::Arc;

use platform::grpc::Message;
use protocol::inference::model_version_policy::PolicyChoice;
use protocol::inference::{
    DataType, ModelConfig, ModelConfigRequest, ModelConfigResponse, ModelInferResponse,
};
use protocol::{Error, Method, TEI_ACTIVATION};

use super::super::context::{CallResponse, RequestContext};
use super::super::model_cache::ModelCache;
use super::super::texts::call_model;
use super::Prediction;
use gateway::Plan;

/// The settings of the scores in a model's configuration.
#[derive(Debug, Default)]
pub struct Classifier {
    /// The model that responded: one of the chain, where the request names one.
    name: String,
    /// Its version; empty where the configuration does not have one.
    version: String,
    /// The labels in the order of the scores; none where its server does not say.
    pub labels: Vec<String>,
    /// The maximum rows of a `ModelInfer` call, if its input is a column of texts
    /// and its output one probability for each label.
    pub rows_max: Option<usize>,
}

impl Classifier {
    fn of(config: ModelConfig) -> Self {
        let labels = config.parameters.get("labels");
        let labels = labels.and_then(|labels| serde_json::from_str(&labels.string_value).ok());
        let labels: Vec<String> = labels.unwrap_or_default();
        let version = match config
            .version_policy
            .and_then(|policy| policy.policy_choice)
        {
            Some(PolicyChoice::Specific(specific)) => match specific.versions[..] {
                [version] => version.to_string(),
                _ => String::new(),
            },
            _ => String::new(),
        };
        let texts = matches!(&config.input[..], [input, others @ ..]
            if input.name == "text"
                && input.data_type == DataType::TypeString as i32
                && others.iter().all(|other| other.optional));
        let scores = matches!(&config.output[..], [output]
            if output.data_type == DataType::TypeFp32 as i32);
        // Where scores of `ModelInfer` are not the probabilities of this API.
        let differ = config.parameters.contains_key(TEI_ACTIVATION);
        let infers = texts && scores && !differ && !labels.is_empty() && !version.is_empty();
        let rows_max = usize::try_from(config.max_batch_size).ok();
        Self {
            name: config.name,
            version,
            labels,
            rows_max: rows_max.filter(|rows| infers && *rows > 0),
        }
    }

    /// The scores of a response, a row for each text; none if they are not those
    /// of this model's labels.
    pub fn scores(&self, response: &ModelInferResponse, texts: usize) -> Option<Vec<f32>> {
        let ([output], [raw]) = (&response.outputs[..], &response.raw_output_contents[..]) else {
            return None;
        };
        let shape = [texts, self.labels.len()].map(|size| i64::try_from(size).ok());
        let right = response.model_name == self.name
            && response.model_version == self.version
            && output.datatype == "FP32"
            && output.shape.iter().copied().map(Some).eq(shape)
            && raw.len() == 4 * texts * self.labels.len();
        let (scores, _) = raw.as_chunks::<4>();
        right.then(|| {
            scores
                .iter()
                .map(|score| f32::from_le_bytes(*score))
                .collect()
        })
    }

    /// The labels with their scores, the highest score first.
    pub fn predictions(&self, scores: &[f32]) -> Vec<Prediction> {
        let pairs = scores.iter().zip(&self.labels);
        let mut predictions: Vec<Prediction> = pairs
            .map(|(score, label)| Prediction {
                label: label.clone(),
                score: *score,
            })
            .collect();
        predictions.sort_by(|a, b| b.score.total_cmp(&a.score));
        predictions
    }
}

/// The classifiers of models.
pub type Classifiers = ModelCache<Classifier>;

/// The classifier of a model, from the cache or by its configuration.
pub async fn find(
    classifiers: &Classifiers,
    context: &RequestContext,
    plan: &Plan,
) -> Result<Arc<Classifier>, Error> {
    let table = Arc::downgrade(&context.stack.routing_table());
    if let Some(classifier) = classifiers.get(&table, plan.name()) {
        return Ok(classifier);
    }
    let message = ModelConfigRequest {
        name: plan.name().to_owned(),
        ..Default::default()
    };
    let message = Message::encode(&message);
    let response: CallResponse<ModelConfigResponse> =
        call_model(context, Method::ModelConfig, plan, message).await?;
    let classifier = Classifier::of(response.message.config.unwrap_or_default());
    let classifier = Arc::new(classifier);
    // Of a chain another model may respond next time.
    if classifier.name == plan.name() {
        let name = classifier.name.clone();
        classifiers.insert(table, name, classifier.clone());
    }
    Ok(classifier)
}

#[cfg(test)]
mod tests {
    use protocol::inference::model_infer_response::InferOutputTensor;
    use protocol::inference::model_version_policy::Specific;
    use protocol::inference::{ModelInput, ModelOutput, ModelParameter, ModelVersionPolicy};

    use super::*;
    use gateway::Table;
    use std::collections::HashMap;

    fn predictions(of: &[(&str, f32)]) -> Vec<Prediction> {
        let prediction = |(label, score): &(&str, f32)| Prediction {
            score: *score,
            label: (*label).to_owned(),
        };
        of.iter().map(prediction).collect()
    }

    fn config() -> ModelConfig {
        let specific = Specific { versions: vec![3] };
        let labels = ModelParameter {
            string_value: r#"["bad","good"]"#.to_owned(),
        };
        ModelConfig {
            name: "m".to_owned(),
            max_batch_size: 2,
            input: vec![ModelInput {
                name: "text".to_owned(),
                data_type: DataType::TypeString.into(),
                ..Default::default()
            }],
            output: vec![ModelOutput {
                name: "scores".to_owned(),
                data_type: DataType::TypeFp32.into(),
                ..Default::default()
            }],
            version_policy: Some(ModelVersionPolicy {
                policy_choice: Some(PolicyChoice::Specific(specific)),
            }),
            parameters: [("labels".to_owned(), labels)].into(),
            ..Default::default()
        }
    }

    fn response(shape: &[i64], scores: &[f32]) -> ModelInferResponse {
        let raw: Vec<u8> = scores
            .iter()
            .flat_map(|score| score.to_le_bytes())
            .collect();
        ModelInferResponse {
            model_name: "m".to_owned(),
            model_version: "3".to_owned(),
            outputs: vec![InferOutputTensor {
                datatype: "FP32".to_owned(),
                shape: shape.to_vec(),
                ..Default::default()
            }],
            raw_output_contents: vec![raw.into()],
            ..Default::default()
        }
    }

    #[test]
    fn scores_belong_to_the_labels_of_the_same_version() {
        let classifier = Classifier::of(config());
        assert_eq!(classifier.rows_max, Some(2));
        let right = response(&[1, 2], &[0.25, 0.75]);
        let scores = classifier.scores(&right, 1).unwrap();
        let found = classifier.predictions(&scores);
        assert_eq!(found, predictions(&[("good", 0.75), ("bad", 0.25)]));
        for wrong in [
            response(&[2, 1], &[0.25, 0.75]),
            response(&[1, 2], &[0.25]),
            ModelInferResponse {
                model_version: "4".to_owned(),
                ..right.clone()
            },
            ModelInferResponse {
                model_name: "other".to_owned(),
                ..right
            },
        ] {
            assert_eq!(classifier.scores(&wrong, 1), None);
        }
    }

    #[test]
    fn a_model_without_labels_version_or_probabilities_is_called_for_each_text() {
        let labels = config().parameters.into_iter().next().unwrap();
        let differ = (TEI_ACTIVATION.to_owned(), ModelParameter::default());
        for config in [
            ModelConfig {
                parameters: HashMap::new(),
                ..config()
            },
            ModelConfig {
                version_policy: None,
                ..config()
            },
            ModelConfig {
                input: Vec::new(),
                ..config()
            },
            ModelConfig {
                parameters: [labels, differ].into(),
                ..config()
            },
        ] {
            assert_eq!(Classifier::of(config).rows_max, None);
        }
    }

    #[test]
    fn classifiers_are_cached_for_one_routing_table() {
        let classifiers = Classifiers::default();
        let tables = [Arc::new(Table::default()), Arc::new(Table::default())];
        let [first, second] = [&tables[0], &tables[1]].map(Arc::downgrade);
        let classifier = Arc::new(Classifier::of(config()));
        classifiers.insert(first.clone(), "m".to_owned(), classifier);
        assert!(classifiers.get(&first, "m").is_some());
        assert!(classifiers.get(&first, "n").is_none());
        assert!(classifiers.get(&second, "m").is_none());
    }
}
