//! How much a tenant may call, and whose turn it is when there is not enough
//! for all. See docs/decisions/shared_quotas.md and docs/decisions/fair_turns.md.

mod fair;
mod memory;
mod metrics;
mod places;
mod redis;
#[cfg(test)]
mod tests;

pub use fair::{Turn, TurnRequest};
pub use metrics::LimitMetrics;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use platform::tasks::OwnedTask;
use protocol::{Error, Kind};

use crate::policy::{Caller, PolicyCell, Quota, RedisLost, Tenant};
use crate::redis::Redis;
use crate::request::{QuotaUnit, Usage};
use fair::Fair;
use memory::{AMOUNT_MAX, Denied, Meters, Needs, Now, Scope, Taken};
use places::{Full, InFlight, SharedPlaces};
use redis::{Refusal, Shared};

/// When a call under way will probably have ended.
const IN_FLIGHT_RETRY: Duration = Duration::from_millis(100);
/// When the calls that wait for a Redis that answers will have been counted.
const CROWD_RETRY: Duration = Duration::from_millis(20);
/// When a lost Redis is looked for again.
const REDIS_RETRY: Duration = Duration::from_secs(1);

/// How the gateway counts and shares.
#[derive(Debug, Clone, clap::Args)]
pub struct LimitSettings {
    /// Rows of one model that may be under way at each of its workers before
    /// further ones wait for their tenant's turn
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub fair_rows: u32,
    /// Calls of one tenant that may wait for its turn; more are refused at once
    #[arg(long, value_name = "COUNT", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub fair_queue: u32,
}

/// Counts what each tenant calls. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Limit(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    policy: PolicyCell,
    /// What is counted, by the names of tenants: those of the policy alone.
    meters: ArcSwap<HashMap<String, Arc<Meters>>>,
    adding: Mutex<()>,
    shared: Option<Arc<Shared>>,
    places: Option<Arc<SharedPlaces>>,
    fair: Fair,
    metrics: LimitMetrics,
    started: Instant,
}

/// A slot among a tenant's calls in flight, until it is dropped.
#[derive(Debug, Default)]
pub struct TenantSlot(#[allow(dead_code, reason = "it is released when dropped")] Option<InFlight>);

/// A part of a tenant's quotas for one call, which is charged with the usage of
/// the response. It holds its in-flight slots until it is dropped.
#[derive(Debug)]
pub struct Reservation {
    limit: Limit,
    tenant: Arc<Tenant>,
    /// Whether the reservation of its chain counts in the metrics.
    in_chain: bool,
    scopes: Vec<Arc<Scope>>,
    _places: Vec<InFlight>,
}

/// What a call needs of its tenant's quotas.
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
    /// Counts by the policy as it stands now: alone, or with other gateways in
    /// Redis.
    pub fn new(
        settings: &LimitSettings,
        policy: PolicyCell,
        redis: Option<Arc<Redis>>,
        metrics: &LimitMetrics,
    ) -> Self {
        Self(Arc::new(Inner {
            policy,
            meters: ArcSwap::default(),
            adding: Mutex::new(()),
            places: redis.clone().map(SharedPlaces::new),
            shared: redis.map(Shared::new),
            fair: Fair::new(settings, metrics),
            metrics: metrics.clone(),
            started: Instant::now(),
        }))
    }

    /// The metrics of quotas.
    pub fn metrics(&self) -> &LimitMetrics {
        &self.0.metrics
    }

    /// Keeps what is counted with Redis in step with it, until the tasks are
    /// dropped.
    pub fn follow(&self) -> Vec<OwnedTask> {
        let started = self.0.started;
        let quotas = self.0.shared.as_ref();
        let quotas = quotas.and_then(|shared| shared.follow(move || moment(started)));
        let places = self.0.places.as_ref();
        let places = places.map(|places| places.follow(move || moment(started).seconds));
        quotas.into_iter().chain(places).collect()
    }

    /// Before a call is read: the tenant's rate, and its calls under way.
    pub async fn enter(&self, caller: &Caller) -> Result<TenantSlot, Error> {
        let limit = &self.0;
        let Some(meters) = limit.meters(&caller.tenant) else {
            return Ok(TenantSlot::default());
        };
        let place = limit.place(&meters.all).await?;
        let needs = Needs {
            requests: Some(1),
            items: None,
        };
        limit.count(&meters.all, needs).await?;
        Ok(TenantSlot(Some(place)))
    }

    /// Reserves requests and rows of a model's quotas, once the model is known,
    /// and checks what earlier calls have used of tokens and costs. A call
    /// without rows takes requests alone. A model of a fallback chain has the
    /// quotas that the chain has not, and returns nothing when it fails: it may
    /// have computed.
    pub async fn reserve(
        &self,
        caller: &Caller,
        request: QuotaRequest<'_>,
    ) -> Result<Reservation, Error> {
        let mut reservation = self.reservation(caller, request.chain.is_some());
        if let Some(meters) = self.0.meters(&caller.tenant) {
            let requests = (request.unit == QuotaUnit::Request).then_some(1);
            let own = meters.of_model(request.model);
            let own = own.filter(|scope| !request.chain.is_some_and(|chain| scope.is_of(chain)));
            let all = request.chain.is_none().then_some((&meters.all, None));
            let scopes = all.into_iter().chain(own.map(|scope| (scope, requests)));
            reservation.take(scopes.collect(), request.rows).await?;
        }
        Ok(reservation)
    }

    /// Charges usage that belongs to no response.
    pub fn charge(&self, caller: &Caller, model: &str, usage: Usage) {
        if usage == Usage::default() {
            return;
        }
        let mut reservation = self.reservation(caller, false);
        if let Some(meters) = self.0.meters(&caller.tenant) {
            let scopes = std::iter::once(&meters.all).chain(meters.of_model(model));
            reservation.scopes = scopes.cloned().collect();
        }
        reservation.charge(usage);
    }

    fn reservation(&self, caller: &Caller, in_chain: bool) -> Reservation {
        Reservation {
            limit: self.clone(),
            tenant: caller.tenant.clone(),
            in_chain,
            scopes: Vec::new(),
            _places: Vec::new(),
        }
    }

    /// Before a worker is chosen: waits for the tenant's turn when there is
    /// more to do than the workers have at hand.
    pub async fn turn(&self, caller: &Caller, request: TurnRequest<'_>) -> Result<Turn, Error> {
        let limit = &self.0;
        // With one tenant there is nobody to be fair to.
        if request.items == 0 || limit.policy.load().tenants.len() < 2 {
            return Ok(Turn::default());
        }
        limit.fair.turn(&caller.tenant, request).await
    }
}

impl Inner {
    fn now(&self) -> Now {
        moment(self.started)
    }

    /// The limits of a tenant; None when it has none.
    fn meters(&self, tenant: &Arc<Tenant>) -> Option<Arc<Meters>> {
        if tenant.model_quotas.is_empty() && tenant.quota == Quota::default() {
            return None;
        }
        let meters = self.meters.load();
        match meters.get(&tenant.name) {
            Some(known) if Arc::ptr_eq(&known.tenant, tenant) => Some(known.clone()),
            known => self.meters_of(tenant, known),
        }
    }

    /// The same for a tenant that is new here, or that another reading of the
    /// policy made.
    fn meters_of(&self, tenant: &Arc<Tenant>, known: Option<&Arc<Meters>>) -> Option<Arc<Meters>> {
        let policy = self.policy.load();
        // A stream may know its tenant by an earlier policy: the newest holds.
        let tenant = policy.tenants.get(&tenant.name).unwrap_or(tenant);
        if let Some(known) = known
            && Arc::ptr_eq(&known.tenant, tenant)
        {
            return Some(known.clone());
        }
        let _adding = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.meters.load_full();
        let made = Arc::new(Meters::new(
            tenant,
            before.get(&tenant.name).map(Arc::as_ref),
        ));
        let kept = before
            .iter()
            .filter(|(name, _)| policy.tenants.contains_key(*name));
        let mut after: HashMap<_, _> = kept
            .map(|(name, one)| (name.clone(), one.clone()))
            .collect();
        after.insert(tenant.name.clone(), made.clone());
        self.meters.store(Arc::new(after));
        Some(made)
    }

    /// A place among the calls under way.
    async fn place(&self, scope: &Scope) -> Result<InFlight, Error> {
        let Some(limit) = scope.in_flight_max() else {
            return Ok(InFlight::unlimited());
        };
        let entered = match &self.places {
            None => InFlight::of(scope, limit).ok_or(Full::Reached),
            Some(shared) => match shared.enter(scope, limit, || self.now().seconds).await {
                Some(entered) => entered,
                None => {
                    let share = limit.div_ceil(self.without_redis()?.max(1));
                    let entered = shared.enter_share(scope, limit, share);
                    entered.ok_or(Full::Reached)
                }
            },
        };
        entered.map_err(|full| match full {
            Full::Reached => {
                self.metrics.limited("in_flight").inc();
                Error::quota_spent(scope.full(limit), IN_FLIGHT_RETRY)
            }
            Full::Crowded => self.crowded(),
        })
    }

    /// Counts what a call needs of one scope, all or nothing.
    async fn count(&self, scope: &Arc<Scope>, needs: Needs) -> Result<Taken, Error> {
        if scope.needed(needs).next().is_none() {
            return Ok(Taken::Alone);
        }
        let refused = |denied| self.refused(scope, denied, needs);
        let Some(shared) = &self.shared else {
            let counted = scope.take(needs, self.now(), Taken::Alone);
            return counted.map(|()| Taken::Alone).map_err(refused);
        };
        if let Some(counted) = shared.take(scope, needs, || self.now()).await {
            return counted
                .map(|()| Taken::Leased)
                .map_err(|refusal| match refusal {
                    Refusal::Denied(denied) => refused(denied),
                    Refusal::Crowded => self.crowded(),
                });
        }
        let share = Taken::Share(self.without_redis()?);
        let counted = scope.take(needs, self.now(), share);
        counted.map(|()| share).map_err(refused)
    }

    /// Of how many equal shares this gateway has one while Redis is lost; an
    /// error where the policy would rather refuse.
    fn without_redis(&self) -> Result<u32, Error> {
        let policy = self.policy.load();
        if policy.limits.redis_lost == RedisLost::Closed {
            self.metrics.limited("redis_lost").inc();
            let message = "the tenant's quotas cannot be checked now";
            return Err(Error::overloaded(message, REDIS_RETRY));
        }
        Ok(policy.limits.replicas)
    }

    fn crowded(&self) -> Error {
        self.metrics.limited("redis_busy").inc();
        let message = "too many calls wait for the tenant's quotas to be checked";
        Error::overloaded(message, CROWD_RETRY)
    }

    fn give_back(&self, taken: &[(&Arc<Scope>, Needs, Taken)]) {
        let now = self.now();
        for (scope, needs, how) in taken {
            scope.give_back(*needs, now, *how);
        }
    }

    fn refused(&self, scope: &Scope, denied: Denied, needs: Needs) -> Error {
        let what = denied.rule.what;
        self.metrics.limited(what.name()).inc();
        let need = needs.of(what).unwrap_or(0);
        if what.is_post_paid() || need <= denied.rule.limit.max(1) {
            return Error::quota_spent(scope.spent(&denied.rule), denied.retry_after);
        }
        // It would be refused for ever.
        let limit = denied.rule.written;
        let message = format!(
            "the call has {need} rows, over the tenant's {} of {limit}",
            what.name()
        );
        Error::new(Kind::TooLarge, message)
    }
}

fn moment(started: Instant) -> Now {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    Now {
        seconds: started.elapsed().as_secs_f64(),
        unix_ms: u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(0),
    }
}

impl Reservation {
    /// Takes rows, and requests where those are named: of all limits or none.
    async fn take(
        &mut self,
        wanted: Vec<(&Arc<Scope>, Option<u64>)>,
        items: u64,
    ) -> Result<(), Error> {
        let limit = &self.limit.0;
        let items = (items > 0).then_some(items);
        let mut taken = Vec::with_capacity(wanted.len());
        for (scope, requests) in wanted {
            if requests.is_some() {
                let place = limit.place(scope).await;
                let place = place.inspect_err(|_| limit.give_back(&taken))?;
                self._places.push(place);
            }
            let needs = Needs { requests, items };
            match limit.count(scope, needs).await {
                Ok(how) => taken.push((scope, needs, how)),
                Err(error) => {
                    limit.give_back(&taken);
                    return Err(error);
                }
            }
        }
        let scopes = taken.into_iter().map(|(scope, _, _)| scope.clone());
        self.scopes = scopes.collect();
        Ok(())
    }

    /// Counts what the answer took.
    pub fn charge(&self, usage: Usage) {
        if usage == Usage::default() {
            return;
        }
        let usage = Usage {
            tokens: usage.tokens.min(AMOUNT_MAX),
            cost: usage.cost,
        };
        let limit = &self.limit.0;
        if !self.in_chain {
            limit
                .metrics
                .used(&self.tenant.name, usage.tokens, usage.cost);
        }
        for scope in &self.scopes {
            let owing = scope.charge(usage, limit.now());
            if let Some(shared) = &limit.shared
                && owing
            {
                shared.queue(scope);
            }
        }
    }
}
