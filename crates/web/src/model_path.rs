//! The model that the path of a request names.

use axum::extract::{FromRequestParts, Path};
use gateway::request::ModelSelector;
use http::request::Parts;
use protocol::Error;

use super::error::ApiError;

/// The model in the path of a request. The stack checks its name, as for a gRPC
/// call. An extractor.
#[derive(Debug, Clone, Default)]
pub struct PathModel {
    /// Its name; empty where the path has none.
    pub name: String,
    /// Its version; empty for the newest.
    pub version: String,
}

impl PathModel {
    /// The selector of the model.
    pub fn selector(&self) -> ModelSelector {
        ModelSelector::Named {
            name: self.name.clone(),
            version: self.version.clone(),
            field: "model_name",
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for PathModel {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let found = Path::<Vec<(String, String)>>::from_request_parts(parts, state).await;
        let Path(found) = found.map_err(|_| Error::invalid("path", "must be UTF-8"))?;
        let mut model = Self::default();
        for (name, value) in found {
            match name.as_str() {
                "model" => model.name = value,
                "version" => model.version = value,
                _ => {}
            }
        }
        Ok(model)
    }
}

/// The model in a path, as the document describes it.
#[derive(Debug, utoipa::IntoParams)]
#[into_params(parameter_in = Path)]
#[allow(dead_code, reason = "it is a description: `PathModel` reads it")]
pub struct ModelPath {
    /// The model's name.
    #[param(
        min_length = 1,
        max_length = 128,
        pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        example = "minilm"
    )]
    pub model: String,
}
