//! The ledger: the one place where a call takes from its tenant's quotas, where
//! what it took is given back, and where its usage is charged. Every door and
//! every message of a stream enters here.
//!
//! A call takes a request, before its message is read, and then the rows of its
//! model. What a limit takes is given back when a later one refuses the call.
//! Once the call has been sent, its rows are used. Its tokens and its cost are
//! charged once: what the response reports, or an estimate when its caller left
//! before.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use protocol::Error;

use super::counters::{CountedBy, QuotaScope};
use super::rules::{AMOUNT_MAX, Demand};
use super::slots::InFlightSlot;
use super::{Limit, QuotaRequest};
use crate::policy::{CallProgress, Caller, Tenant};
use crate::request::{QuotaUnit, Usage};

/// Tokens of a byte of a message, before a model has responded: those of English.
const TOKENS_PER_BYTE: f64 = 0.25;
/// The weight of the last response in the average.
const LEARNED: f64 = 0.2;
/// Models whose tokens are remembered.
const MODELS_MAX: usize = 4096;

/// What was taken of a scope, and where it was counted.
#[derive(Debug)]
struct Taken {
    scope: Arc<QuotaScope>,
    demand: Demand,
    counted_by: CountedBy,
}

/// The amounts that a call took, until they are kept or given back.
#[derive(Debug)]
struct Entries {
    limit: Limit,
    taken: Vec<Taken>,
    /// Given back when they are dropped.
    slots: Vec<InFlightSlot>,
}

impl Entries {
    fn new(limit: &Limit) -> Self {
        Self {
            limit: limit.clone(),
            taken: Vec::new(),
            slots: Vec::new(),
        }
    }

    /// Takes a slot of a scope, where requests are counted, and an amount.
    async fn take(&mut self, scope: &Arc<QuotaScope>, demand: Demand) -> Result<(), Error> {
        let limit = &self.limit.0;
        if demand.requests.is_some() {
            self.slots.push(limit.slot(scope).await?);
        }
        let counted_by = limit.count(scope, demand).await?;
        let scope = scope.clone();
        self.taken.push(Taken {
            scope,
            demand,
            counted_by,
        });
        Ok(())
    }

    fn give_back(&mut self) {
        let now = self.limit.0.now();
        for Taken {
            scope,
            demand,
            counted_by,
        } in self.taken.drain(..)
        {
            scope.refund(demand, now, counted_by);
        }
    }
}

/// What a call took before its message was read: an in-flight slot, until this is
/// dropped, and a request of the tenant's rate, which is given back when a later
/// limit refused the call.
#[derive(Debug, Default)]
pub struct Admission(Option<(Entries, CallProgress)>);

impl Drop for Admission {
    fn drop(&mut self) {
        if let Some((entries, progress)) = &mut self.0
            && progress.nothing_sent()
        {
            entries.give_back();
        }
    }
}

/// A part of a tenant's quotas for one call, which is charged with the usage of
/// the response. It holds its in-flight slots until it is dropped, and gives its
/// rows back when a later limit refused the call.
#[derive(Debug)]
pub struct Reservation {
    tenant: Arc<Tenant>,
    /// Whether the reservation of its chain counts in the metrics.
    in_chain: bool,
    scopes: Vec<Arc<QuotaScope>>,
    entries: Entries,
    progress: Option<CallProgress>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self
            .progress
            .as_ref()
            .is_some_and(CallProgress::nothing_sent)
        {
            self.entries.give_back();
        }
    }
}

/// Notes that a limit refused a call.
pub(super) fn note_refusal(caller: &Caller) {
    if let Some(progress) = &caller.progress {
        progress.refused();
    }
}

impl Limit {
    /// Admits a call before its message is read: takes one of the tenant's
    /// in-flight slots and one request of its rate limit.
    pub async fn enter(&self, caller: &mut Caller) -> Result<Admission, Error> {
        let Some(quotas) = self.0.quotas(&caller.tenant) else {
            return Ok(Admission::default());
        };
        let demand = Demand {
            requests: Some(1),
            items: None,
        };
        let mut entries = Entries::new(self);
        entries.take(&quotas.all, demand).await?;
        // A number of its own: a caller's calls share all the rest.
        let progress = CallProgress::default();
        caller.progress = Some(progress.clone());
        Ok(Admission(Some((entries, progress))))
    }

    /// Reserves requests and rows of a model's quotas, once the model is known,
    /// and checks the tokens and costs that earlier calls have used. A call
    /// without rows takes requests alone. A model of a fallback chain counts in
    /// the quotas in which its chain does not count, and returns nothing when it
    /// fails: it may have computed.
    pub async fn reserve(
        &self,
        caller: &Caller,
        request: QuotaRequest<'_>,
    ) -> Result<Reservation, Error> {
        let mut reservation = self.reservation(caller, request.chain.is_some());
        let Some(quotas) = self.0.quotas(&caller.tenant) else {
            return Ok(reservation);
        };
        let requests = (request.unit == QuotaUnit::Request).then_some(1);
        let own = quotas.of_model(request.model);
        let own = own.filter(|scope| !request.chain.is_some_and(|chain| scope.matches(chain)));
        let all = request.chain.is_none().then_some((&quotas.all, None));
        let items = (request.rows > 0).then_some(request.rows);
        for (scope, requests) in all.into_iter().chain(own.map(|scope| (scope, requests))) {
            let demand = Demand { requests, items };
            if let Err(error) = reservation.entries.take(scope, demand).await {
                reservation.entries.give_back();
                note_refusal(caller);
                return Err(error);
            }
            reservation.scopes.push(scope.clone());
        }
        Ok(reservation)
    }

    /// Charges usage that belongs to no response.
    pub fn charge(&self, caller: &Caller, model: &str, usage: Usage) {
        if usage == Usage::default() {
            return;
        }
        let mut reservation = self.reservation(caller, false);
        if let Some(quotas) = self.0.quotas(&caller.tenant) {
            let scopes = std::iter::once(&quotas.all).chain(quotas.of_model(model));
            reservation.scopes = scopes.cloned().collect();
        }
        reservation.charge(usage);
    }

    fn reservation(&self, caller: &Caller, in_chain: bool) -> Reservation {
        Reservation {
            tenant: caller.tenant.clone(),
            in_chain,
            scopes: Vec::new(),
            entries: Entries::new(self),
            progress: caller.progress.clone(),
        }
    }

    /// Notes that a call is sent to a model: what it took is used.
    pub fn sent(&self, caller: &Caller) {
        if let Some(progress) = &caller.progress {
            progress.sent();
        }
    }

    /// The tokens that a model of workers probably has for a message of so many
    /// bytes, by its last responses.
    pub fn estimate(&self, model: &str, bytes: usize) -> u64 {
        self.0.estimates.tokens(model, bytes)
    }

    /// Learns from the usage of a response to a message of so many bytes.
    pub fn learn(&self, model: &str, bytes: usize, usage: Usage) {
        self.0.estimates.learn(model, bytes, usage.tokens);
    }
}

impl Reservation {
    /// Charges the usage of a response.
    pub fn charge(&self, usage: Usage) {
        if usage == Usage::default() {
            return;
        }
        let usage = Usage {
            tokens: usage.tokens.min(AMOUNT_MAX),
            cost: usage.cost,
        };
        let limit = &self.entries.limit.0;
        if !self.in_chain {
            limit
                .metrics
                .used(&self.tenant.name, usage.tokens, usage.cost);
        }
        for scope in &self.scopes {
            let unreported = scope.charge(usage, limit.now());
            if let Some(shared) = &limit.shared_quotas
                && unreported
            {
                shared.queue_sync(scope);
            }
        }
    }
}

/// The tokens of a byte of a message, by model.
#[derive(Debug, Default)]
pub(super) struct Estimates(Mutex<HashMap<String, f64>>);

impl Estimates {
    fn tokens(&self, model: &str, bytes: usize) -> u64 {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ratio = known.get(model).copied().unwrap_or(TOKENS_PER_BYTE);
        ((bytes as f64 * ratio).ceil() as u64).min(AMOUNT_MAX)
    }

    fn learn(&self, model: &str, bytes: usize, tokens: u64) {
        let ratio = tokens as f64 / bytes.max(1) as f64;
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(average) = known.get_mut(model) {
            *average += LEARNED * (ratio - *average);
        } else if known.len() < MODELS_MAX {
            known.insert(model.to_owned(), ratio);
        }
    }
}

#[cfg(test)]
mod tests;
