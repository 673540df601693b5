//! A provider's model in place of a worker: calls of the Open Inference
//! Protocol or `tei.v1` become calls of an outside service.

mod generation;
mod oip;
mod tei;

pub use generation::{last_part, part};
pub use oip::conversation;

use std::sync::Arc;

use protocol::Service;
use providers::{Provider, UsageMeter};
use tonic::Status;

use super::Response;
use crate::request::Request;

/// Responds to one message of the Open Inference Protocol or of `tei.v1`. The
/// response has its cost; the usage of a call that failed or was dropped is in
/// `usage`.
pub async fn respond(
    provider: &Arc<Provider>,
    request: &Request,
    usage: &UsageMeter,
) -> Result<Response, Status> {
    let (response, consumed) = match request.method.service() {
        Service::Inference => oip::respond(provider, request, usage).await?,
        _ => tei::respond(provider, request, usage).await?,
    };
    let cost = provider.charge(&request.caller.tenant.name, consumed);
    Ok(response.with_cost(cost))
}
