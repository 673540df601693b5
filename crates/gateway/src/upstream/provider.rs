//! A provider's model in place of a worker: what callers ask by the Open
//! Inference Protocol or `tei.v1` becomes calls of an outside service.

mod generation;
mod oip;
mod tei;

pub use generation::{last_part, part};
pub use oip::conversation;

use std::sync::Arc;

use providers::{Provider, UsageMeter};
use tonic::Status;

use super::Response;
use crate::request::Request;

/// Responds to one message of the Open Inference Protocol or of `tei.v1`. The
/// response has its cost; what the call consumed before it failed, or was
/// dropped, is in `usage`.
pub async fn respond(
    provider: &Arc<Provider>,
    request: &Request,
    usage: &UsageMeter,
) -> Result<Response, Status> {
    let path = request.method.path();
    let (answer, consumed) = match path.strip_prefix("/inference.GRPCInferenceService/") {
        Some(method) => oip::respond(provider, method, request, usage).await?,
        None => {
            let method = path.strip_prefix("/tei.v1.").unwrap_or(path);
            tei::respond(provider, method, request, usage).await?
        }
    };
    let cost = provider.charge(&request.caller.tenant.name, consumed);
    Ok(answer.costing(cost))
}
