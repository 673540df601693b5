//! REST v2: the Open Inference Protocol in JSON, with Triton's extensions.

use axum::Router;
use axum::routing::get;
use protocol::{Error, Kind};

use super::gate::{Routes, Visit};
use super::problem::{Refused, Shape};
use crate::stack::Stack;

/// Every route.
pub fn routes(stack: &Stack) -> Router<Stack> {
    Routes::new(stack, Shape::Problem)
        .open("/v2/health/live", get(live))
        .open("/v2/health/ready", get(ready))
        .into_router()
}

async fn live() {}

async fn ready(visit: Visit) -> Result<(), Refused> {
    match visit.stack.ready() {
        true => Ok(()),
        false => Err(Error::new(Kind::NotReady, "no model is ready").into()),
    }
}
