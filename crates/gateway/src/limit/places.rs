//! Calls under way. One gateway counts its own; several hold places that Redis
//! grants, as many as their calls have lately had. See
//! docs/decisions/shared_quotas.md.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::redis::Script;
use futures::StreamExt;
use platform::tasks::{OwnedTask, spawn_owned};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::memory::{Scope, State};
use super::redis::{ASKS_MAX, CROWD};
use crate::redis::Redis;

/// Seconds for which places are held without being asked for again: so long
/// those of a gateway that died are missing.
const HELD: f64 = 3.0;
/// Between two looks at what is held and not used.
const ROUND: Duration = Duration::from_millis(100);
/// Scopes that a round asks for at once.
const AT_ONCE: usize = 32;
/// Seconds for which Redis is not asked again when there was no place.
const PAUSE: f64 = 0.005;

/// The calls under way of one scope.
#[derive(Debug)]
pub struct Places {
    /// Whose they are among those that hold places of the same limit.
    holder: u128,
    counts: Mutex<Counts>,
}

#[derive(Debug, Clone, Copy)]
struct Counts {
    under_way: u32,
    /// The most under way since the last round.
    peak: u32,
    /// What Redis granted, and until when.
    granted: u32,
    until: f64,
    /// None is to be had before.
    none_until: f64,
    limit: u32,
    /// Calls that wait for a place.
    waiting: u32,
    /// When Redis was asked last, and the most that it has noted since.
    asked: f64,
    noted: u32,
    /// Whether the rounds look at it.
    followed: bool,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            holder: rand::random(),
            counts: Mutex::new(Counts {
                under_way: 0,
                peak: 0,
                granted: 0,
                until: f64::NEG_INFINITY,
                none_until: f64::NEG_INFINITY,
                limit: 0,
                waiting: 0,
                asked: f64::NEG_INFINITY,
                noted: 0,
                followed: false,
            }),
        }
    }
}

impl Counts {
    fn enter(&mut self, most: u32) -> bool {
        if self.under_way >= most {
            return false;
        }
        self.under_way += 1;
        self.peak = self.peak.max(self.under_way);
        true
    }
}

/// What a round has to do.
enum Due {
    /// Nothing any more.
    Over,
    Nothing,
    /// Redis has to be told what is used.
    Told,
}

impl Counts {
    /// Looks at what was used since the last round.
    fn due(&mut self, now: f64) -> Due {
        let noted = self.noted > 0 && now < self.asked + HELD;
        if self.under_way == 0 && self.waiting == 0 && !noted {
            self.followed = false;
            return Due::Over;
        }
        // Asked in half of the time, it is held without a gap.
        if self.noted > self.peak || now > self.until - HELD / 2.0 {
            return Due::Told;
        }
        self.peak = self.under_way;
        Due::Nothing
    }
}

impl Places {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place among the calls under way, until it is dropped.
#[derive(Debug)]
pub struct InFlight(Option<Arc<State>>);

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(state) = &self.0 {
            state.places.counts().under_way -= 1;
        }
    }
}

impl InFlight {
    /// Where there is no limit.
    pub fn unlimited() -> Self {
        Self(None)
    }

    /// One of so many places of this gateway's own.
    pub fn of(scope: &Scope, most: u32) -> Option<Self> {
        let entered = scope.state.places.counts().enter(most);
        entered.then(|| Self(Some(scope.state.clone())))
    }
}

/// A call that waits for a place, until it is dropped.
struct Waiting<'p>(&'p Places);

impl<'p> Waiting<'p> {
    fn begin(places: &'p Places) -> Self {
        places.counts().waiting += 1;
        Self(places)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.counts().waiting -= 1;
    }
}

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// All are taken.
    Reached,
    /// Too many calls wait to ask a Redis that answers.
    Crowded,
}

/// The places that gateways share.
#[derive(Debug)]
pub struct SharedPlaces {
    redis: Arc<Redis>,
    script: Script,
    /// What the rounds look at: keys and what is counted under them.
    followed: Mutex<Vec<(String, Arc<State>)>>,
    begun: Notify,
}

impl SharedPlaces {
    /// Nothing is held yet.
    pub fn new(redis: Arc<Redis>) -> Arc<Self> {
        Arc::new(Self {
            redis,
            script: Script::new(include_str!("places.lua")),
            followed: Mutex::default(),
            begun: Notify::new(),
        })
    }

    /// A place of those that all gateways have together. None when Redis is
    /// lost: at once, or after 20 ms for calls that find it out.
    pub async fn enter(
        &self,
        scope: &Scope,
        limit: u32,
        now: impl Fn() -> f64,
    ) -> Option<Result<InFlight, Full>> {
        let look = || look(&scope.state, limit, now());
        if !self.redis.available() {
            return None;
        }
        if let Some(known) = look() {
            return Some(known);
        }
        let _waiting = Waiting::begin(&scope.state.places);
        // One call asks, and the others find what it was granted.
        let Ok(_asking) = timeout(CROWD, scope.state.asking.lock()).await else {
            return self.redis.available().then_some(Err(Full::Crowded));
        };
        for _ in 0..ASKS_MAX {
            if let Some(known) = look() {
                return Some(known);
            }
            let key = scope.places_key();
            self.ask(&key, &scope.state, true, &now).await?;
        }
        // Others were always quicker.
        Some(look().unwrap_or(Err(Full::Crowded)))
    }

    /// A place of this gateway's share, while Redis is lost: it is told when it
    /// is back.
    pub fn enter_share(&self, scope: &Scope, limit: u32, share: u32) -> Option<InFlight> {
        let place = InFlight::of(scope, share)?;
        scope.state.places.counts().limit = limit;
        self.look_after(&scope.places_key(), &scope.state);
        Some(place)
    }

    /// Asks for the places of calls that are under way and that wait, and some
    /// ahead; or, without `calls`, for those that were lately had.
    async fn ask(
        &self,
        key: &str,
        state: &Arc<State>,
        calls: bool,
        now: impl Fn() -> f64,
    ) -> Option<()> {
        let asked = now();
        let (under_way, most, limit) = {
            let mut counts = state.places.counts();
            let most = match calls {
                true => {
                    let wanted = counts.under_way + counts.waiting.max(1);
                    wanted + wanted / 4
                }
                false => counts.peak,
            };
            let most = most.min(counts.limit);
            // What is given back is not used while Redis learns of it.
            counts.granted = counts.granted.min(most);
            counts.asked = asked;
            // Until it answers, what it notes may be either.
            counts.noted = counts.noted.max(most).max(counts.under_way);
            if !calls {
                counts.peak = counts.under_way;
            }
            (counts.under_way, most, counts.limit)
        };
        // Whoever asked may be gone when the answer comes.
        self.look_after(key, state);
        let mut call = self.script.prepare_invoke();
        call.key(key).arg(format!("{:032x}", state.places.holder));
        call.arg(limit).arg(under_way).arg(most);
        call.arg((HELD * 1000.0) as u64);
        let granted: u32 = self.redis.run_script(&call).await.ok()?;
        let mut counts = state.places.counts();
        (counts.granted, counts.until) = (granted, asked + HELD);
        counts.noted = granted.max(under_way);
        if calls && granted <= under_way {
            counts.none_until = now() + PAUSE;
        }
        Some(())
    }

    /// Has the rounds look at a scope.
    fn look_after(&self, key: &str, state: &Arc<State>) {
        if std::mem::replace(&mut state.places.counts().followed, true) {
            return;
        }
        self.followed().push((key.to_owned(), state.clone()));
        self.begun.notify_one();
    }

    fn followed(&self) -> MutexGuard<'_, Vec<(String, Arc<State>)>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back what is not used and keeps what is, until the task is
    /// dropped.
    pub fn follow(self: &Arc<Self>, now: impl Fn() -> f64 + Send + Sync + 'static) -> OwnedTask {
        let shared = self.clone();
        spawn_owned(async move {
            loop {
                if shared.followed().is_empty() {
                    shared.begun.notified().await;
                }
                tokio::time::sleep(ROUND).await;
                // Others may begin meanwhile.
                let round = std::mem::take(&mut *shared.followed());
                let round = futures::stream::iter(round);
                round
                    .for_each_concurrent(AT_ONCE, |(key, state)| shared.keep(key, state, &now))
                    .await;
            }
        })
    }

    /// One round's look at a scope.
    async fn keep(&self, key: String, state: Arc<State>, now: impl Fn() -> f64) {
        let due = match state.places.counts().due(now()) {
            Due::Over => return,
            Due::Nothing => false,
            Due::Told => true,
        };
        if due {
            let _asking = state.asking.lock().await;
            // Without an answer the next round asks again.
            let _ = self.ask(&key, &state, false, &now).await;
        }
        self.followed().push((key, state));
    }
}

/// Takes a place of those that are held. None when Redis has to be asked.
fn look(state: &Arc<State>, limit: u32, now: f64) -> Option<Result<InFlight, Full>> {
    let mut counts = state.places.counts();
    counts.limit = limit;
    let held = match now < counts.until {
        true => counts.granted.min(limit),
        false => 0,
    };
    if counts.enter(held) {
        return Some(Ok(InFlight(Some(state.clone()))));
    }
    let full = counts.under_way >= limit || now < counts.none_until;
    full.then_some(Err(Full::Reached))
}
