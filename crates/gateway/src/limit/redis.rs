//! What several gateways count together. A gateway takes a small lease of a
//! limit from Redis ahead and serves calls out of it, so that most calls wait
//! for nothing. See docs/decisions/shared_quotas.md.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::redis::Script;
use platform::tasks::{OwnedTask, spawn_owned};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::memory::{AMOUNT_MAX, Denied, Needs, Now, Rule, Scope, What, seconds};
use crate::redis::{COMMAND, NoAnswer, Redis};

/// Seconds after which what is left of a lease of a rate is not used any more.
const RATE_LEASE: f64 = 1.0;
/// Leases that are used up within these seconds grow, others shrink.
const LEASE_WANTED: f64 = 0.2;
/// Seconds for which a rate that is spent is not asked for again.
const RATE_PAUSE: f64 = 0.005;
/// Seconds after which what others spent is asked for again, beside the calls.
const SPENT_KNOWN: f64 = 0.1;
/// Seconds after which it is asked for before a call goes on.
const SPENT_STALE: f64 = 1.0;
/// Scopes that may wait to be brought in step; each waits once at most.
const QUEUED_MAX: usize = 1024;
/// How long a call waits for its turn to ask: whoever asks before it learns in
/// half of that whether Redis is lost.
pub const CROWD: Duration = COMMAND.saturating_mul(2);
/// How often a call asks before it gives up: a window may end meanwhile.
pub const ASKS_MAX: usize = 3;
/// Between two rounds of that.
const ROUND: Duration = Duration::from_millis(2);

/// The part of a shared limit that this gateway has.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lease {
    window: u64,
    /// Granted and not used yet.
    held: u64,
    /// How much is asked for at once.
    size: u64,
    /// When Redis was asked last.
    asked: Option<f64>,
    /// Nothing is granted to calls that need this much or more, until then.
    none_over: u64,
    none_until: f64,
    /// Used without asking, and not told yet.
    owed: u64,
    /// What all have used, as far as that is known.
    spent: Option<u64>,
}

/// Why a call that Redis counts may not go on.
#[derive(Debug, Clone, Copy)]
pub enum Refusal {
    /// There is not enough left.
    Denied(Denied),
    /// Too many calls wait to ask a Redis that answers.
    Crowded,
}

enum Verdict {
    Enough,
    Short,
    Denied(Duration),
}

impl Lease {
    /// Leaves what was of another window, or is too old.
    fn roll(&mut self, rule: &Rule, now: Now) {
        let window = rule.window(now);
        if self.window != window {
            *self = Self {
                window,
                size: self.size,
                ..Self::default()
            };
        }
        let old = self.asked.is_some_and(|at| now.seconds - at > RATE_LEASE);
        if rule.what == What::RequestsPerSecond && old {
            self.held = 0;
        }
    }

    /// The largest lease: a gateway that stops calling, or dies, leaves no more
    /// than this unused.
    fn size_max(rule: &Rule) -> u64 {
        let most = match rule.what {
            What::RequestsPerSecond => (rule.written / 50.0).min(rule.burst / 5.0) as u64,
            _ => rule.limit / 100,
        };
        most.max(1)
    }

    fn check(&self, rule: &Rule, need: u64, now: Now) -> Verdict {
        let denied = || match rule.what {
            What::RequestsPerSecond => seconds(self.none_until - now.seconds),
            _ => rule.rest(now),
        };
        if rule.what.is_post_paid() {
            let fresh = self.asked.is_some_and(|at| now.seconds - at < SPENT_STALE);
            return match self.spent {
                Some(spent) if spent.saturating_add(self.owed) >= rule.limit => {
                    Verdict::Denied(denied())
                }
                Some(_) if fresh => Verdict::Enough,
                _ => Verdict::Short,
            };
        }
        match need <= self.held {
            true => Verdict::Enough,
            false if need >= self.none_over && now.seconds < self.none_until => {
                Verdict::Denied(denied())
            }
            false => Verdict::Short,
        }
    }

    /// Whether it is time to ask, though no call waits for it.
    fn is_low(&self, rule: &Rule, now: Now) -> bool {
        match rule.what.is_post_paid() {
            true => self.asked.is_none_or(|at| now.seconds - at > SPENT_KNOWN),
            false => self.size > 1 && self.held * 2 < self.size && now.seconds >= self.none_until,
        }
    }

    /// What Redis is asked for: what is owed, the least and the most.
    fn ask(&mut self, rule: &Rule, need: u64, now: Now) -> [u64; 3] {
        self.roll(rule, now);
        // What is over is told the next time.
        let owed = self.owed.min(AMOUNT_MAX);
        self.owed -= owed;
        self.spent = self.spent.map(|spent| spent.saturating_add(owed));
        if rule.what.is_post_paid() {
            self.asked = Some(now.seconds);
            return [owed, 0, 0];
        }
        let least = need.saturating_sub(self.held);
        if least == 0 && !self.is_low(rule, now) {
            return [owed, 0, 0];
        }
        let wanted = self.asked.is_some_and(|at| now.seconds - at < LEASE_WANTED);
        self.size = match wanted {
            true => self.size.saturating_mul(2),
            false => self.size / 2,
        }
        .clamp(1, Self::size_max(rule));
        self.asked = Some(now.seconds);
        [owed, least, least.max(self.size)]
    }

    /// What Redis said.
    fn told(&mut self, rule: &Rule, asked: Asked, answer: (u64, u64), now: Now) {
        let (granted, said) = answer;
        if rule.window(now) != self.window || asked.window != self.window {
            return;
        }
        self.held = self.held.saturating_add(granted);
        if rule.what != What::RequestsPerSecond {
            self.spent = Some(said);
        }
        if asked.least == 0 || granted >= asked.least {
            return;
        }
        (self.none_over, self.none_until) = match rule.what {
            // The bucket fills meanwhile: who asks a little later is granted
            // more at once.
            What::RequestsPerSecond => {
                let pause = (rule.burst / rule.written / 4.0).min(RATE_PAUSE);
                (1, now.seconds + pause.max(said as f64 / 1e6))
            }
            // Others may have what it takes no longer, or the policy changes.
            _ => {
                let over = asked.least.saturating_add(self.held);
                (over, now.seconds + SPENT_KNOWN)
            }
        };
    }

    /// Redis did not do it: what was owed is owed.
    fn untold(&mut self, asked: Asked) {
        if asked.window == self.window {
            self.owed = self.owed.saturating_add(asked.owed);
            self.spent = self.spent.map(|spent| spent.saturating_sub(asked.owed));
        }
    }

    /// Counts what was used without asking. A rate is not owed: it would be
    /// waited for when Redis is back.
    pub fn owe(&mut self, rule: &Rule, amount: u64, now: Now) {
        if rule.what == What::RequestsPerSecond {
            return;
        }
        self.roll(rule, now);
        self.owed = self.owed.saturating_add(amount);
    }

    /// A call did not use what it took without asking.
    pub fn forgive(&mut self, rule: &Rule, amount: u64, now: Now) {
        self.roll(rule, now);
        self.owed = self.owed.saturating_sub(amount);
    }

    /// A call did not use what it took.
    pub fn give_back(&mut self, rule: &Rule, amount: u64, now: Now) {
        self.roll(rule, now);
        self.held = self.held.saturating_add(amount);
    }
}

/// What was asked for one limit.
#[derive(Debug, Clone, Copy)]
struct Asked {
    rule: Rule,
    window: u64,
    owed: u64,
    least: u64,
}

/// The outcome of looking at leases.
enum Looked {
    /// Taken; whether some lease is low.
    Taken(bool),
    Short,
    Denied(Denied),
}

/// Takes out of leases, all or nothing.
fn look(scope: &Scope, needs: Needs, now: Now) -> Looked {
    let mut counts = scope.counts();
    let mut short = false;
    for (rule, need) in scope.needed(needs) {
        let lease = &mut counts[rule.what as usize].lease;
        lease.roll(rule, now);
        match lease.check(rule, need, now) {
            Verdict::Enough => {}
            Verdict::Short => short = true,
            Verdict::Denied(retry_after) => {
                return Looked::Denied(Denied {
                    rule: *rule,
                    retry_after,
                });
            }
        }
    }
    if short {
        return Looked::Short;
    }
    let mut low = false;
    for (rule, need) in scope.needed(needs) {
        let lease = &mut counts[rule.what as usize].lease;
        lease.held = lease.held.saturating_sub(need);
        low |= lease.is_low(rule, now);
    }
    // Its own part is known here too, for when Redis is lost.
    scope.note(&mut counts, needs, now, 1);
    Looked::Taken(low)
}

/// The limits that gateways share.
#[derive(Debug)]
pub struct Shared {
    redis: Arc<Redis>,
    script: Script,
    queue: mpsc::Sender<Arc<Scope>>,
    queued: Mutex<Option<mpsc::Receiver<Arc<Scope>>>>,
}

impl Shared {
    /// Nothing is asked yet.
    pub fn new(redis: Arc<Redis>) -> Arc<Self> {
        let (queue, queued) = mpsc::channel(QUEUED_MAX);
        Arc::new(Self {
            redis,
            script: Script::new(include_str!("take.lua")),
            queue,
            queued: Mutex::new(Some(queued)),
        })
    }

    /// Takes what a call needs. None when Redis is lost: at once, or after 20
    /// ms for calls that find it out.
    pub async fn take(
        &self,
        scope: &Arc<Scope>,
        needs: Needs,
        now: impl Fn() -> Now,
    ) -> Option<Result<(), Refusal>> {
        if !self.redis.available() {
            return None;
        }
        match look(scope, needs, now()) {
            Looked::Taken(low) => {
                if low {
                    self.queue(scope);
                }
                return Some(Ok(()));
            }
            Looked::Denied(denied) => return Some(Err(Refusal::Denied(denied))),
            Looked::Short => {}
        }
        // One call asks, and the others find what it was granted. Waiting here
        // says nothing of Redis: only what asks is held to 20 ms.
        let Ok(_asking) = timeout(CROWD, scope.state.asking.lock()).await else {
            return self.redis.available().then_some(Err(Refusal::Crowded));
        };
        for _ in 0..ASKS_MAX {
            match look(scope, needs, now()) {
                Looked::Taken(_) => return Some(Ok(())),
                Looked::Denied(denied) => return Some(Err(Refusal::Denied(denied))),
                Looked::Short => self.ask(scope, needs, &now).await?,
            }
        }
        match look(scope, needs, now()) {
            Looked::Taken(_) => Some(Ok(())),
            Looked::Denied(denied) => Some(Err(Refusal::Denied(denied))),
            Looked::Short => Some(Err(Refusal::Crowded)),
        }
    }

    /// Has a scope brought in step, beside the calls.
    pub fn queue(&self, scope: &Arc<Scope>) {
        if scope.state.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        if self.queue.try_send(scope.clone()).is_err() {
            // The next call that it concerns tries again.
            scope.state.queued.store(false, Ordering::Release);
        }
    }

    /// Brings scopes in step with Redis, until the task is dropped.
    pub fn follow(
        self: &Arc<Self>,
        now: impl Fn() -> Now + Send + Sync + 'static,
    ) -> Option<OwnedTask> {
        let mut queued = self
            .queued
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()?;
        let shared = self.clone();
        Some(spawn_owned(async move {
            let mut round = Vec::with_capacity(64);
            while queued.recv_many(&mut round, 64).await > 0 {
                for scope in round.drain(..) {
                    scope.state.queued.store(false, Ordering::Release);
                    let _asking = scope.state.asking.lock().await;
                    let nobody = Needs {
                        requests: Some(0),
                        items: Some(0),
                    };
                    let _ = shared.ask(&scope, nobody, &now).await;
                }
                tokio::time::sleep(ROUND).await;
            }
        }))
    }

    /// One round trip for all limits of a scope that a call needs. Who does
    /// not wait for the answer, or gets none, has told what was owed all the
    /// same: Redis most probably took it, and must not take it twice.
    async fn ask(&self, scope: &Scope, needs: Needs, now: impl Fn() -> Now) -> Option<()> {
        if !self.redis.available() {
            return None;
        }
        let mut call = self.script.prepare_invoke();
        let mut all = Vec::new();
        {
            let at = now();
            let mut counts = scope.counts();
            for (rule, need) in scope.needed(needs) {
                let lease = &mut counts[rule.what as usize].lease;
                let [owed, least, most] = lease.ask(rule, need, at);
                let window = lease.window;
                all.push(Asked {
                    rule: *rule,
                    window,
                    owed,
                    least,
                });
                let name = rule.what.name();
                match rule.what {
                    What::RequestsPerSecond => call
                        .key(format!("{}{name}", scope.key))
                        .arg("rate")
                        .arg(rule.written)
                        .arg(rule.burst),
                    _ => call
                        .key(format!("{}{name}:{window}", scope.key))
                        .arg("window")
                        .arg(rule.limit)
                        .arg(u64::try_from(rule.rest(at).as_millis()).unwrap_or(0) + 60_000),
                };
                call.arg(owed).arg(least).arg(most);
            }
        }
        let answered = self.redis.run_script::<Vec<i64>>(&call).await;
        let at = now();
        let mut counts = scope.counts();
        let mut lease = |asked: Asked, answer: Option<(u64, u64)>| {
            let lease = &mut counts[asked.rule.what as usize].lease;
            match answer {
                Some(answer) => lease.told(&asked.rule, asked, answer, at),
                None => lease.untold(asked),
            }
        };
        match answered {
            Ok(answers) => {
                for (asked, answer) in all.into_iter().zip(answers.chunks_exact(2)) {
                    let said = [answer[0], answer[1]].map(|n| u64::try_from(n).unwrap_or(0));
                    lease(asked, Some((said[0], said[1])));
                }
                Some(())
            }
            Err(NoAnswer::Undone) => {
                all.into_iter().for_each(|asked| lease(asked, None));
                None
            }
            Err(NoAnswer::Unknown) => None,
        }
    }
}
