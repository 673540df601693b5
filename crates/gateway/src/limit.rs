//! How much a tenant may call, and whose turn it is when there is not enough
//! for all. See docs/decisions/shared_quotas.md and docs/decisions/fair_turns.md.

mod fair;
mod memory;
mod places;
mod redis;
#[cfg(test)]
mod tests;

pub use fair::{Turn, Wanted};

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use platform::tasks::Owned;
use protocol::{Error, Kind};
use serde::Deserialize;

use crate::auth::{Auth, Caller, RedisLost, Tenant};
use crate::metrics::LimitMetrics;
use crate::redis::{Redis, RedisError};
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

/// How much may be called, of all models together or of some. What is not
/// named has no limit.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quota {
    /// Requests per second on average.
    pub requests_per_second: Option<f64>,
    /// Requests that may come at once; as many as in a second if not given.
    pub burst: Option<u32>,
    /// Rows per minute.
    pub items_per_minute: Option<u64>,
    /// Rows per day.
    pub items_per_day: Option<u64>,
    /// Computed tokens per minute.
    pub tokens_per_minute: Option<u64>,
    /// Computed tokens per day.
    pub tokens_per_day: Option<u64>,
    /// Requests that may be under way at once.
    pub in_flight: Option<u32>,
    /// What outside providers may cost per day, in the currency of the price
    /// table.
    pub cost_per_day: Option<f64>,
    /// What outside providers may cost per month of 30 days.
    pub cost_per_month: Option<f64>,
}

/// What an answer took, once that is known.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Tokens that were computed, not those of answers that were known.
    pub tokens: u64,
    /// What an outside provider takes for it, in the currency of the price
    /// table.
    pub cost: f64,
}

/// How the gateway counts and shares.
#[derive(Debug, Clone, clap::Args)]
pub struct LimitSettings {
    /// Redis, where several gateways count quotas together and keep answers:
    /// redis://HOST:PORT/DB
    #[arg(long, value_name = "URL")]
    pub redis: Option<String>,
    /// The file with Redis' password
    #[arg(long, value_name = "FILE", requires = "redis")]
    pub redis_password_file: Option<std::path::PathBuf>,
    /// Rows of one model that may be under way at each of its workers before
    /// further ones wait for their tenant's turn
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub fair_rows: u32,
    /// Calls of one tenant that may wait for its turn; more are refused at once
    #[arg(long, value_name = "COUNT", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub fair_queue: u32,
}

impl LimitSettings {
    /// Redis, if there is one; not connected yet.
    pub fn redis(&self) -> Result<Option<Arc<Redis>>, RedisError> {
        let password = self.redis_password_file.as_deref();
        let url = self.redis.as_deref();
        url.map(|url| Redis::open(url, password)).transpose()
    }
}

/// Counts what each tenant calls. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Limit(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    auth: Arc<Auth>,
    /// What is counted, by the names of tenants: those of the policy alone.
    meters: ArcSwap<HashMap<String, Arc<Meters>>>,
    adding: Mutex<()>,
    shared: Option<Arc<Shared>>,
    places: Option<Arc<SharedPlaces>>,
    fair: Fair,
    metrics: LimitMetrics,
    started: Instant,
}

/// A place among a tenant's calls under way, until it is dropped.
#[derive(Debug, Default)]
pub struct Entered {
    _place: Option<InFlight>,
}

/// What one call may take of its quotas. It keeps its places among the calls
/// under way until it is dropped.
#[derive(Debug)]
pub struct Ticket {
    limit: Limit,
    tenant: Arc<Tenant>,
    /// Whether another ticket has it in the metrics.
    again: bool,
    scopes: Vec<Arc<Scope>>,
    _places: Vec<InFlight>,
}

/// What a call counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// A request of its own.
    Request,
    /// One of several calls that answer one request, which has been counted:
    /// its rows alone.
    Part,
}

/// A model that answers for a chain, which has been counted.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    /// The chain.
    pub chain: &'a str,
    /// The model.
    pub model: &'a str,
}

impl Limit {
    /// Counts by the policy that `auth` has: alone, or with others in Redis.
    pub fn new(
        settings: &LimitSettings,
        auth: Arc<Auth>,
        redis: Option<Arc<Redis>>,
        metrics: &LimitMetrics,
    ) -> Self {
        Self(Arc::new(Inner {
            auth,
            meters: ArcSwap::default(),
            adding: Mutex::new(()),
            places: redis.clone().map(SharedPlaces::new),
            shared: redis.map(Shared::new),
            fair: Fair::new(settings, metrics),
            metrics: metrics.clone(),
            started: Instant::now(),
        }))
    }

    /// Keeps what is counted with Redis in step with it, until the tasks are
    /// dropped.
    pub fn follow(&self) -> Vec<Owned> {
        let started = self.0.started;
        let quotas = self.0.shared.as_ref();
        let quotas = quotas.and_then(|shared| shared.follow(move || moment(started)));
        let places = self.0.places.as_ref();
        let places = places.map(|places| places.follow(move || moment(started).seconds));
        quotas.into_iter().chain(places).collect()
    }

    /// Before a call is read: the tenant's rate, and its calls under way.
    pub async fn enter(&self, caller: &Caller) -> Result<Entered, Error> {
        let limit = &self.0;
        let Some(meters) = limit.meters(&caller.tenant) else {
            return Ok(Entered::default());
        };
        let place = limit.place(&meters.all).await?;
        let needs = Needs {
            requests: Some(1),
            items: None,
        };
        limit.count(&meters.all, needs).await?;
        Ok(Entered {
            _place: Some(place),
        })
    }

    /// When the model is known: its own limits, rows, and what earlier calls
    /// have spent of tokens and costs. A call without rows takes requests
    /// alone.
    pub async fn take(
        &self,
        caller: &Caller,
        model: &str,
        items: u64,
        counted: Counted,
    ) -> Result<Ticket, Error> {
        let mut ticket = self.ticket(caller, false);
        if let Some(meters) = self.0.meters(&caller.tenant) {
            let request = (counted == Counted::Request).then_some(1);
            let own = meters.of_model(model).map(|scope| (scope, request));
            let all = std::iter::once((&meters.all, None));
            ticket.take(all.chain(own).collect(), items).await?;
        }
        Ok(ticket)
    }

    /// The same for a model that answers for a chain: what it is limited to
    /// beside the chain. One that then does not answer gives nothing back,
    /// since it may have computed.
    pub async fn take_member(
        &self,
        caller: &Caller,
        member: Member<'_>,
        items: u64,
        counted: Counted,
    ) -> Result<Ticket, Error> {
        let mut ticket = self.ticket(caller, true);
        if let Some(meters) = self.0.meters(&caller.tenant) {
            let request = (counted == Counted::Request).then_some(1);
            let own = meters.of_model(member.model);
            let own = own.filter(|scope| !scope.is_of(member.chain));
            let own = own.map(|scope| (scope, request));
            ticket.take(own.collect(), items).await?;
        }
        Ok(ticket)
    }

    /// Counts what a call spent whose answer nobody got.
    pub fn charge(&self, caller: &Caller, model: &str, usage: Usage) {
        if usage == Usage::default() {
            return;
        }
        let mut ticket = self.ticket(caller, false);
        if let Some(meters) = self.0.meters(&caller.tenant) {
            let scopes = std::iter::once(&meters.all).chain(meters.of_model(model));
            ticket.scopes = scopes.cloned().collect();
        }
        ticket.charge(usage);
    }

    fn ticket(&self, caller: &Caller, again: bool) -> Ticket {
        Ticket {
            limit: self.clone(),
            tenant: caller.tenant.clone(),
            again,
            scopes: Vec::new(),
            _places: Vec::new(),
        }
    }

    /// Before a worker is chosen: waits for the tenant's turn when there is
    /// more to do than the workers have at hand.
    pub async fn turn(&self, caller: &Caller, wanted: Wanted<'_>) -> Result<Turn, Error> {
        let limit = &self.0;
        // With one tenant there is nobody to be fair to.
        if wanted.items == 0 || !limit.auth.asks() || limit.auth.policy().tenants.len() < 2 {
            return Ok(Turn::default());
        }
        limit.fair.turn(&caller.tenant, wanted).await
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
        let policy = self.auth.policy();
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
        let policy = self.auth.policy();
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

impl Ticket {
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
        if !self.again {
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
