//! What REST v2 answers, as schemas: the answers themselves are written from
//! the protocol's messages, in the form that Triton's have.

#![allow(dead_code, reason = "they are schemas only")]

use std::collections::BTreeMap;

use serde_json::Value;
use utoipa::PartialSchema;
use utoipa::ToSchema;
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};

/// What the server is.
#[derive(ToSchema)]
pub struct ServerMetadata {
    /// Its name.
    #[schema(example = "andon")]
    name: String,
    /// Its release.
    version: String,
    /// The extensions of the protocol that it has.
    extensions: Vec<String>,
}

/// What a model takes and gives.
#[derive(ToSchema)]
pub struct ModelMetadata {
    /// The model.
    name: String,
    /// Its versions that are ready.
    versions: Vec<String>,
    /// What computes it.
    platform: String,
    /// What it takes.
    inputs: Vec<TensorMetadata>,
    /// What it gives.
    outputs: Vec<TensorMetadata>,
}

/// What a tensor is.
#[derive(ToSchema)]
pub struct TensorMetadata {
    /// Its name.
    name: String,
    /// What its elements are.
    #[schema(example = "FP32")]
    datatype: String,
    /// Its dimensions; -1 where any size will do.
    shape: Vec<i64>,
}

/// How a model is configured, as Triton writes it.
#[derive(ToSchema)]
pub struct ModelConfiguration {
    /// The model.
    name: String,
    /// What computes it.
    platform: String,
    /// Whose it is.
    backend: String,
    /// The most rows of a request.
    max_batch_size: i32,
    /// What it takes.
    input: Vec<BTreeMap<String, Value>>,
    /// What it gives.
    output: Vec<BTreeMap<String, Value>>,
    /// What it runs on.
    instance_group: Vec<BTreeMap<String, Value>>,
    /// What is worth knowing besides.
    parameters: BTreeMap<String, ConfigurationParameter>,
}

/// A parameter of a configuration.
#[derive(ToSchema)]
pub struct ConfigurationParameter {
    /// Its value.
    string_value: String,
}

/// One version of a model.
#[derive(ToSchema)]
pub struct IndexedModel {
    /// The model.
    name: String,
    /// Its version.
    version: String,
    /// `READY`, `LOADING`, `UNLOADING` or `UNAVAILABLE`.
    #[schema(example = "READY")]
    state: String,
    /// Why it is not ready.
    reason: String,
}

/// What models have done.
#[derive(ToSchema)]
pub struct Statistics {
    /// Each version.
    model_stats: Vec<ModelStatistics>,
}

/// What one version of a model has done.
#[derive(ToSchema)]
pub struct ModelStatistics {
    /// The model.
    name: String,
    /// Its version.
    version: String,
    /// When it was last called, in milliseconds since 1970.
    last_inference: u64,
    /// Rows.
    inference_count: u64,
    /// Batches.
    execution_count: u64,
    /// How often each stage was passed, and how long it took.
    inference_stats: BTreeMap<String, StageStatistics>,
    /// Of answers in parts.
    response_stats: BTreeMap<String, Value>,
    /// By the size of batches.
    batch_stats: Vec<BTreeMap<String, Value>>,
    /// What it holds.
    memory_usage: Vec<BTreeMap<String, Value>>,
}

/// How often something was done, and how long it took.
#[derive(ToSchema)]
pub struct StageStatistics {
    /// How often.
    count: u64,
    /// Nanoseconds altogether.
    ns: u64,
}

/// What comes out.
#[derive(ToSchema)]
#[schema(as = InferResponse)]
pub struct InferAnswer {
    /// The model.
    model_name: String,
    /// Its version.
    model_version: String,
    /// The caller's id for the request.
    #[schema(required = false, nullable = false)]
    id: Option<String>,
    /// What the model says besides.
    #[schema(required = false, nullable = false)]
    parameters: Option<BTreeMap<String, Value>>,
    /// The tensors.
    outputs: Vec<InferOutput>,
}

/// A tensor that comes out.
#[derive(ToSchema)]
pub struct InferOutput {
    /// Its name.
    name: String,
    /// What its elements are.
    datatype: String,
    /// Its dimensions.
    shape: Vec<i64>,
    /// `binary_data_size`, where its data comes behind the JSON.
    #[schema(required = false, nullable = false)]
    parameters: Option<BTreeMap<String, Value>>,
    /// Its elements, flat.
    #[schema(required = false, nullable = false)]
    data: Option<Vec<Value>>,
}

/// What the elements of a tensor are.
#[derive(ToSchema)]
#[schema(as = Datatype, rename_all = "UPPERCASE")]
pub enum DatatypeForm {
    /// One byte, 0 or 1.
    Bool,
    /// Unsigned, of 8 bits.
    Uint8,
    /// Unsigned, of 16 bits.
    Uint16,
    /// Unsigned, of 32 bits.
    Uint32,
    /// Unsigned, of 64 bits.
    Uint64,
    /// Signed, of 8 bits.
    Int8,
    /// Signed, of 16 bits.
    Int16,
    /// Signed, of 32 bits.
    Int32,
    /// Signed, of 64 bits.
    Int64,
    /// Floating, of 16 bits: as bytes only.
    Fp16,
    /// Floating, of 16 bits with the exponent of 32: as bytes only.
    Bf16,
    /// Floating, of 32 bits.
    Fp32,
    /// Floating, of 64 bits.
    Fp64,
    /// Texts.
    Bytes,
}

/// The value of a parameter.
#[derive(ToSchema)]
#[schema(as = ParameterValue)]
#[serde(untagged)]
pub enum ParameterForm {
    /// Yes or no.
    Flag(bool),
    /// A number.
    Number(f64),
    /// A text.
    Text(String),
}

/// A dimension: a schema only.
pub struct DimensionForm;

impl PartialSchema for DimensionForm {
    fn schema() -> RefOr<Schema> {
        let size = ObjectBuilder::new()
            .schema_type(Type::Integer)
            .minimum(Some(0));
        RefOr::T(size.into())
    }
}

impl ToSchema for DimensionForm {
    fn name() -> std::borrow::Cow<'static, str> {
        "Dimension".into()
    }
}
