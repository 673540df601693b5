//! A message and its response: the exchange of every method but conversations.

use tokio::time::Instant;
use tonic::Status;

use super::fallback::another_may_respond;
use super::{Attempt, Exchange, Reservations, Stack};
use crate::cache::Backend;
use crate::limit::Reservation;
use crate::policy::Caller;
use crate::request::{QuotaUnit, Request, Usage};
use crate::route::Route;
use crate::upstream::Response;

impl Exchange for Request {
    type Output = Response;

    fn caller(&self) -> &Caller {
        &self.caller
    }

    fn deadline(&self) -> Instant {
        self.deadline
    }

    fn rows(&self) -> u64 {
        Request::rows(self)
    }

    fn unit(&self) -> QuotaUnit {
        self.unit
    }

    async fn attempt(&self, stack: &Stack, attempt: Attempt<'_>) -> Result<Response, Status> {
        let route = attempt.route;
        let backend = BelowCache {
            stack,
            route,
            caller: &self.caller,
        };
        let cache = &stack.0.cache;
        let Some(chain) = attempt.fallback else {
            return cache.respond(&backend, route, self).await;
        };
        let request = self.for_model(route.name(), attempt.deadline);
        let mut response = cache.respond(&backend, route, &request).await?;
        chain.mark(route.name(), response.metadata_mut());
        Ok(response)
    }

    fn accept(&self, response: Response, reservation: &Reservation) -> Result<Response, Status> {
        if another_may_respond(response.code()) {
            reservation.charge(response.usage());
            return Err(response.into_status());
        }
        Ok(response)
    }

    fn charge(&self, response: Response, reservations: Reservations) -> Response {
        for reservation in reservations.into_iter().flatten() {
            reservation.charge(response.usage());
        }
        response
    }
}

/// The layers below the cache, for one request and its model.
struct BelowCache<'a> {
    stack: &'a Stack,
    route: &'a Route,
    caller: &'a Caller,
}

impl Backend for BelowCache<'_> {
    async fn send(&self, request: &Request) -> Result<Response, Status> {
        self.stack.send(self.route, request).await
    }

    fn charge(&self, usage: Usage) {
        let limit = &self.stack.0.limit;
        limit.charge(self.caller, self.route.name(), usage);
    }
}
