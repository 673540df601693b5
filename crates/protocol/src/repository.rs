//! Requests to the model repository, in Triton's dialect or KServe's.

use crate::inference::{RepositoryModelLoadRequest, RepositoryModelUnloadRequest};
use crate::{Error, FieldPath, ModelName};

/// The model that a load names.
pub fn load_target(request: &RepositoryModelLoadRequest) -> Result<ModelName, Error> {
    if let Some(key) = request.parameters.keys().next() {
        return Err(Error::invalid(
            FieldPath::parameter(key),
            "is not supported: a model is configured by the files of its folder",
        ));
    }
    target(&request.repository_name, &request.model_name)
}

/// The model that an unload names.
pub fn unload_target(request: &RepositoryModelUnloadRequest) -> Result<ModelName, Error> {
    let mut keys = request.parameters.keys();
    if let Some(key) = keys.find(|key| *key != "unload_dependents") {
        let field = FieldPath::parameter(key);
        return Err(Error::invalid(field, "is not a known parameter"));
    }
    target(&request.repository_name, &request.model_name)
}

/// KServe's first field is the model's name where Triton's is the repository's.
fn target(repository_name: &str, model_name: &str) -> Result<ModelName, Error> {
    if model_name.is_empty() {
        return ModelName::checked(repository_name, "model_name");
    }
    check_repository_name(repository_name)?;
    ModelName::checked(model_name, "model_name")
}

/// An error when a request names a repository: a server has only one.
pub fn check_repository_name(name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Ok(());
    }
    Err(Error::invalid(
        "repository_name",
        "must be empty: a server has one repository",
    ))
}
