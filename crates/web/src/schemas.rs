//! The schemas of REST v2: its responses are written from the messages of the
//! protocol, in the format of Triton.

#![allow(dead_code, reason = "they are schemas only")]

use std::collections::BTreeMap;

use serde_json::Value;
use utoipa::PartialSchema;
use utoipa::ToSchema;
use utoipa::openapi::schema::{ObjectBuilder, SchemaType, Type};
use utoipa::openapi::{RefOr, Schema};

/// Server liveness.
#[derive(ToSchema)]
pub struct ServerLive {
    /// Always true.
    live: bool,
}

/// Server readiness.
#[derive(ToSchema)]
pub struct ServerReady {
    /// Always true: an error says why the server is not ready.
    ready: bool,
}

/// Model readiness.
#[derive(ToSchema)]
pub struct ModelReady {
    /// The model.
    name: String,
    /// Always true: an error says why the model is not ready.
    ready: bool,
}

/// Server metadata.
#[derive(ToSchema)]
pub struct ServerMetadata {
    /// The server's name.
    #[schema(example = "andon")]
    name: String,
    /// The server's version.
    version: String,
    /// The supported extensions of the protocol.
    extensions: Vec<String>,
}

/// Model metadata.
#[derive(ToSchema)]
pub struct ModelMetadata {
    /// The model.
    name: String,
    /// The versions that are ready.
    versions: Vec<String>,
    /// The framework of the model.
    platform: String,
    /// The inputs.
    inputs: Vec<TensorMetadata>,
    /// The outputs.
    outputs: Vec<TensorMetadata>,
}

/// The metadata of a tensor.
#[derive(ToSchema)]
pub struct TensorMetadata {
    /// Its name.
    name: String,
    /// The datatype of its elements.
    #[schema(example = "FP32")]
    datatype: String,
    /// Its shape; -1 for dimensions of any size.
    shape: Vec<i64>,
}

/// Model configuration, in the format of Triton.
#[derive(ToSchema)]
pub struct ModelConfiguration {
    /// The model.
    name: String,
    /// The framework of the model.
    platform: String,
    /// The backend of the model.
    backend: String,
    /// The maximum rows of a request.
    max_batch_size: i32,
    /// The inputs.
    input: Vec<BTreeMap<String, Value>>,
    /// The outputs.
    output: Vec<BTreeMap<String, Value>>,
    /// The devices of the model.
    instance_group: Vec<BTreeMap<String, Value>>,
    /// Parameters of the model.
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
    /// Its state: `READY`, `LOADING`, `UNLOADING` or `UNAVAILABLE`.
    #[schema(example = "READY")]
    state: String,
    /// The reason if it is not ready.
    reason: String,
}

/// Model statistics.
#[derive(ToSchema)]
pub struct Statistics {
    /// The statistics of each version.
    model_stats: Vec<ModelStatistics>,
}

/// The statistics of a model version.
#[derive(ToSchema)]
pub struct ModelStatistics {
    /// The model.
    name: String,
    /// Its version.
    version: String,
    /// The time of the last request, in milliseconds since 1970.
    last_inference: u64,
    /// The number of rows.
    inference_count: u64,
    /// The number of batches.
    execution_count: u64,
    /// Count and duration of each stage.
    inference_stats: BTreeMap<String, StageStatistics>,
    /// Statistics of streamed responses.
    response_stats: BTreeMap<String, Value>,
    /// Statistics by batch size.
    batch_stats: Vec<BTreeMap<String, Value>>,
    /// The memory that the model holds.
    memory_usage: Vec<BTreeMap<String, Value>>,
}

/// Count and duration of a stage.
#[derive(ToSchema)]
pub struct StageStatistics {
    /// The count.
    count: u64,
    /// The total duration in nanoseconds.
    ns: u64,
}

/// An inference response.
#[derive(ToSchema)]
pub struct InferResponse {
    /// The model.
    model_name: String,
    /// Its version.
    model_version: String,
    /// The caller's id for the request.
    #[schema(required = false, nullable = false)]
    id: Option<String>,
    /// Parameters of the response.
    #[schema(required = false, nullable = false)]
    parameters: Option<BTreeMap<String, Value>>,
    /// The output tensors.
    outputs: Vec<InferOutput>,
}

/// An output tensor.
#[derive(ToSchema)]
pub struct InferOutput {
    /// Its name.
    name: String,
    /// The datatype of its elements.
    datatype: String,
    /// Its shape.
    shape: Vec<i64>,
    /// `binary_data_size`, if its data is behind the JSON.
    #[schema(required = false, nullable = false)]
    parameters: Option<BTreeMap<String, Value>>,
    /// Its elements in row-major order, flat.
    #[schema(required = false, nullable = false)]
    data: Option<Vec<Value>>,
}

/// The datatype of a tensor.
#[derive(ToSchema)]
#[schema(as = Datatype, rename_all = "UPPERCASE")]
pub enum DatatypeSchema {
    /// Boolean, one byte each.
    Bool,
    /// Unsigned integer of 8 bits.
    Uint8,
    /// Unsigned integer of 16 bits.
    Uint16,
    /// Unsigned integer of 32 bits.
    Uint32,
    /// Unsigned integer of 64 bits.
    Uint64,
    /// Signed integer of 8 bits.
    Int8,
    /// Signed integer of 16 bits.
    Int16,
    /// Signed integer of 32 bits.
    Int32,
    /// Signed integer of 64 bits.
    Int64,
    /// Float of 16 bits: as binary data only.
    Fp16,
    /// bfloat16: as binary data only.
    Bf16,
    /// Float of 32 bits.
    Fp32,
    /// Float of 64 bits.
    Fp64,
    /// Strings.
    Bytes,
}

/// The value of a parameter.
pub struct ParameterSchema;

impl PartialSchema for ParameterSchema {
    fn schema() -> RefOr<Schema> {
        let types = [Type::Boolean, Type::Number, Type::String, Type::Null];
        let value = ObjectBuilder::new().schema_type(SchemaType::from_iter(types));
        RefOr::T(value.into())
    }
}

impl ToSchema for ParameterSchema {
    fn name() -> std::borrow::Cow<'static, str> {
        "ParameterValue".into()
    }
}

/// A dimension of a shape.
pub struct DimensionSchema;

impl PartialSchema for DimensionSchema {
    fn schema() -> RefOr<Schema> {
        let size = ObjectBuilder::new()
            .schema_type(Type::Integer)
            .minimum(Some(0));
        RefOr::T(size.into())
    }
}

impl ToSchema for DimensionSchema {
    fn name() -> std::borrow::Cow<'static, str> {
        "Dimension".into()
    }
}
