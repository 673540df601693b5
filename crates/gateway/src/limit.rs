//! Quotas and fairness: rate limits, quotas and in-flight slots of each tenant,
//! and fair queueing between tenants when the workers are saturated. See
//! docs/decisions/shared_quotas.md and docs/decisions/fair_turns.md.

mod counters;
mod fair;
mod lease;
mod ledger;
mod metrics;
mod rules;
mod shared_quotas;
mod slots;
#[cfg(test)]
mod tests;

pub use fair::{Turn, TurnRequest};
pub use ledger::{Admission, Reservation};
pub use metrics::LimitMetrics;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use platform::tasks::OwnedTask;
use protocol::{Error, Kind};

use crate::policy::{Caller, PolicyCell, Quota, RedisLost, Tenant};
use crate::redis::Redis;
use crate::request::QuotaUnit;
use counters::{CountedBy, QuotaScope, TenantQuotas};
use fair::FairQueues;
use rules::{Demand, LimitExceeded, Moment};
use shared_quotas::{QuotaRefusal, SharedQuotas};
use slots::{InFlightSlot, SharedSlots, SlotRefusal};

/// When a call in flight will probably have ended.
const IN_FLIGHT_RETRY: Duration = Duration::from_millis(100);
/// When the calls that wait for a response of Redis will have been counted.
const REDIS_BUSY_RETRY: Duration = Duration::from_millis(20);
/// When a lost Redis is probed again.
const REDIS_LOST_RETRY: Duration = Duration::from_secs(1);

/// The settings of fair queueing.
#[derive(Debug, Clone, clap::Args)]
pub struct LimitSettings {
    /// Rows of one model that may be in flight at each of its workers; further
    /// rows wait for their tenant's turn (fair queueing)
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub fair_rows: u32,
    /// Calls of one tenant that may wait for its turn; more are refused at once
    /// (load shedding)
    #[arg(long, value_name = "COUNT", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub fair_queue: u32,
}

/// The quotas of all tenants. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Limit(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    policy: PolicyCell,
    /// The limits and counters by the names of tenants: no more than the policy
    /// has.
    quotas: ArcSwap<HashMap<String, Arc<TenantQuotas>>>,
    add_lock: Mutex<()>,
    shared_quotas: Option<Arc<SharedQuotas>>,
    shared_slots: Option<Arc<SharedSlots>>,
    fair: FairQueues,
    estimates: ledger::Estimates,
    metrics: LimitMetrics,
    started: Instant,
}

/// The amounts that a call reserves of its tenant's quotas.
#[derive(Debug, Clone, Copy)]
pub struct QuotaRequest<'a> {
    /// The model or chain that responds.
    pub model: &'a str,
    /// The chain that the model responds for, whose quotas are reserved.
    pub chain: Option<&'a str>,
    /// Rows.
    pub rows: u64,
    /// Whether it counts as a request.
    pub unit: QuotaUnit,
}

impl Limit {
    /// Counts by the current policy: in this gateway alone, or together with
    /// other gateways in Redis.
    pub fn new(
        settings: &LimitSettings,
        policy: PolicyCell,
        redis: Option<Arc<Redis>>,
        metrics: &LimitMetrics,
    ) -> Self {
        Self(Arc::new(Inner {
            policy,
            quotas: ArcSwap::default(),
            add_lock: Mutex::new(()),
            shared_slots: redis.clone().map(SharedSlots::new),
            shared_quotas: redis.map(SharedQuotas::new),
            fair: FairQueues::new(settings, metrics),
            estimates: ledger::Estimates::default(),
            metrics: metrics.clone(),
            started: Instant::now(),
        }))
    }

    /// The metrics of quotas.
    pub fn metrics(&self) -> &LimitMetrics {
        &self.0.metrics
    }

    /// Synchronizes the shared counters with Redis, until the tasks are dropped.
    pub fn follow(&self) -> Vec<OwnedTask> {
        let started = self.0.started;
        let quotas = self.0.shared_quotas.as_ref();
        let quotas = quotas.and_then(|quotas| quotas.follow(move || moment(started)));
        let slots = self.0.shared_slots.as_ref();
        let slots = slots.map(|slots| slots.follow(move || moment(started).seconds));
        quotas.into_iter().chain(slots).collect()
    }

    /// Waits for the tenant's turn in the fair queue of the model, before a
    /// worker is chosen.
    pub async fn turn(&self, caller: &Caller, request: TurnRequest<'_>) -> Result<Turn, Error> {
        let limit = &self.0;
        // Fairness needs a second tenant.
        if request.items == 0 || limit.policy.load().tenants.len() < 2 {
            return Ok(Turn::default());
        }
        let turn = limit.fair.turn(&caller.tenant, request).await;
        turn.inspect_err(|_| ledger::note_refusal(caller))
    }
}

impl Inner {
    fn now(&self) -> Moment {
        moment(self.started)
    }

    /// The quotas of a tenant; None when it has none.
    fn quotas(&self, tenant: &Arc<Tenant>) -> Option<Arc<TenantQuotas>> {
        if tenant.model_quotas.is_empty() && tenant.quota == Quota::default() {
            return None;
        }
        let quotas = self.quotas.load();
        match quotas.get(&tenant.name) {
            Some(existing) if Arc::ptr_eq(&existing.tenant, tenant) => Some(existing.clone()),
            existing => self.add_quotas(tenant, existing),
        }
    }

    /// Adds the quotas of a tenant that is new here, or that a reload of the
    /// policy replaced.
    fn add_quotas(
        &self,
        tenant: &Arc<Tenant>,
        existing: Option<&Arc<TenantQuotas>>,
    ) -> Option<Arc<TenantQuotas>> {
        let policy = self.policy.load();
        // A stream may hold its tenant from an earlier policy: the newest counts.
        let tenant = policy.tenants.get(&tenant.name).unwrap_or(tenant);
        if let Some(existing) = existing
            && Arc::ptr_eq(&existing.tenant, tenant)
        {
            return Some(existing.clone());
        }
        let _added = self.add_lock.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.quotas.load_full();
        let added = Arc::new(TenantQuotas::new(
            tenant,
            before.get(&tenant.name).map(Arc::as_ref),
        ));
        let current = before
            .iter()
            .filter(|(name, _)| policy.tenants.contains_key(*name));
        let mut after: HashMap<_, _> = current
            .map(|(name, one)| (name.clone(), one.clone()))
            .collect();
        after.insert(tenant.name.clone(), added.clone());
        self.quotas.store(Arc::new(after));
        Some(added)
    }

    /// An in-flight slot of a scope.
    async fn slot(&self, scope: &QuotaScope) -> Result<InFlightSlot, Error> {
        let Some(limit) = scope.in_flight_max() else {
            return Ok(InFlightSlot::unlimited());
        };
        let slots = &scope.state.slots;
        let acquired = match &self.shared_slots {
            None => InFlightSlot::acquire(slots, limit).ok_or(SlotRefusal::LimitReached),
            Some(shared) => match shared.acquire(slots, limit, || self.now().seconds).await {
                Some(acquired) => acquired,
                None => {
                    let share = limit.div_ceil(self.shares_without_redis()?.max(1));
                    let acquired = shared.acquire_from_share(slots, limit, share);
                    acquired.ok_or(SlotRefusal::LimitReached)
                }
            },
        };
        acquired.map_err(|refusal| match refusal {
            SlotRefusal::LimitReached => {
                self.metrics.limited("in_flight").inc();
                Error::quota_spent(scope.slots_message(limit), IN_FLIGHT_RETRY)
            }
            SlotRefusal::Overloaded => self.redis_busy(),
        })
    }

    /// Charges the demand of a call to all limits of a scope, or to none.
    async fn count(&self, scope: &Arc<QuotaScope>, demand: Demand) -> Result<CountedBy, Error> {
        if scope.demanded(demand).next().is_none() {
            return Ok(CountedBy::Gateway);
        }
        let refused = |exceeded| self.refused(scope, exceeded, demand);
        let Some(shared) = &self.shared_quotas else {
            let counted = scope.take(demand, self.now(), CountedBy::Gateway);
            return counted.map(|()| CountedBy::Gateway).map_err(refused);
        };
        if let Some(counted) = shared.take(scope, demand, || self.now()).await {
            return counted
                .map(|()| CountedBy::Lease)
                .map_err(|refusal| match refusal {
                    QuotaRefusal::Exceeded(exceeded) => refused(exceeded),
                    QuotaRefusal::Overloaded => self.redis_busy(),
                });
        }
        let share = CountedBy::Share(self.shares_without_redis()?);
        let counted = scope.take(demand, self.now(), share);
        counted.map(|()| share).map_err(refused)
    }

    /// The number of equal shares of which this gateway has one while Redis is
    /// lost; an error when the policy refuses calls then.
    fn shares_without_redis(&self) -> Result<u32, Error> {
        let policy = self.policy.load();
        if policy.limits.redis_lost == RedisLost::Closed {
            self.metrics.limited("redis_lost").inc();
            let message =
                "the tenant's quotas cannot be checked now: the shared counters are unavailable";
            return Err(Error::overloaded(message, REDIS_LOST_RETRY));
        }
        Ok(policy.limits.replicas)
    }

    fn redis_busy(&self) -> Error {
        self.metrics.limited("redis_busy").inc();
        let message = "too many calls are waiting for a check of the tenant's quotas";
        Error::overloaded(message, REDIS_BUSY_RETRY)
    }

    fn refused(&self, scope: &QuotaScope, exceeded: LimitExceeded, demand: Demand) -> Error {
        let kind = exceeded.rule.kind;
        self.metrics.limited(kind.name()).inc();
        let amount = demand.of(kind).unwrap_or(0);
        if kind.is_post_paid() || amount <= exceeded.rule.limit.max(1) {
            return Error::quota_spent(
                scope.exceeded_message(&exceeded.rule),
                exceeded.retry_after,
            );
        }
        // A retry would never succeed.
        let limit = exceeded.rule.configured;
        let message = format!(
            "the call has {amount} rows, over the tenant's {} of {limit}",
            kind.name()
        );
        Error::new(Kind::TooLarge, message)
    }
}

fn moment(started: Instant) -> Moment {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    Moment {
        seconds: started.elapsed().as_secs_f64(),
        unix_ms: u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(0),
    }
}
