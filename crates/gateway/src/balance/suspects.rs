//! Requests on which workers break. A request that made a worker crash, freeze or
//! drop its connection would make the next one do the same, and so on through the
//! fleet. It is sent to at most one more worker, apart from those of other
//! callers that were in flight with it, and then refused for a while.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use platform::pot::Holder;
use protocol::Method;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::less_loaded;
use crate::request::Request;
use crate::route::Route;
use crate::upstream::Upstream;

/// How long a request is refused.
const REFUSED_FOR: Duration = Duration::from_secs(60);
/// The most requests that are refused at once; the oldest is forgotten.
const REFUSED_MAX: usize = 1024;
/// How long a call waits for a worker without suspect calls of other callers.
const APART_MAX: Duration = Duration::from_millis(500);

/// The requests on which workers broke, and the calls that may be such.
#[derive(Debug, Default)]
pub struct Suspects {
    refused: Mutex<VecDeque<Poison>>,
    /// The length of the list: most of the time nothing is looked for in it.
    count: AtomicUsize,
    /// By address: the caller of the suspect calls that a worker has.
    held: Mutex<HashMap<usize, Suspected>>,
    freed: Notify,
}

/// A request on which two workers broke.
#[derive(Debug)]
struct Poison {
    holder: Holder,
    method: Method,
    bytes: usize,
    digest: [u8; 32],
    until: Instant,
}

/// The suspect calls that a worker has now.
#[derive(Debug)]
struct Suspected {
    holder: Holder,
    calls: usize,
}

/// A worker that has no suspect calls but those of one caller, until it is
/// dropped.
#[derive(Debug)]
pub struct Apart<'s> {
    /// The worker.
    pub upstream: Arc<Upstream>,
    suspects: &'s Suspects,
    address: usize,
}

impl Drop for Apart<'_> {
    fn drop(&mut self) {
        let mut held = self.suspects.held();
        if let Some(suspected) = held.get_mut(&self.address) {
            suspected.calls -= 1;
            if suspected.calls == 0 {
                held.remove(&self.address);
                self.suspects.freed.notify_waiters();
            }
        }
    }
}

impl Suspects {
    /// Whether a request is refused: workers broke on the same bytes of the same
    /// caller.
    pub fn refuses(&self, request: &Request) -> bool {
        if self.count.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let holder = request.caller.holder();
        let bytes = request.bytes();
        // The bytes are hashed only for a caller who sent as many before.
        let similar = |poison: &&Poison| {
            let shape = (poison.method, poison.bytes);
            shape == (request.method, bytes.len()) && poison.holder == holder
        };
        let now = Instant::now();
        if !self.refused(now).iter().any(|poison| similar(&poison)) {
            return false;
        }
        let hash = hash(bytes);
        let refused = self.refused(now);
        refused
            .iter()
            .filter(similar)
            .any(|poison| poison.digest == hash)
    }

    /// Refuses a request for a while from now.
    pub fn refuse(&self, request: &Request) {
        let now = Instant::now();
        let poison = Poison {
            holder: request.caller.holder(),
            method: request.method,
            bytes: request.bytes().len(),
            digest: hash(request.bytes()),
            until: now + REFUSED_FOR,
        };
        let mut refused = self.refused(now);
        if refused.len() >= REFUSED_MAX {
            refused.pop_front();
        }
        refused.push_back(poison);
        self.count.store(refused.len(), Ordering::Relaxed);
    }

    /// The requests that are refused now.
    fn refused(&self, now: Instant) -> MutexGuard<'_, VecDeque<Poison>> {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        while refused.front().is_some_and(|poison| poison.until <= now) {
            refused.pop_front();
        }
        self.count.store(refused.len(), Ordering::Relaxed);
        refused
    }

    fn held(&self) -> MutexGuard<'_, HashMap<usize, Suspected>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker that was not tried for a suspect call of a caller, and that has no
    /// suspect calls of others: if it breaks, they were not with it. None when there
    /// is none within half a second.
    pub async fn pick(&self, route: &Route, tried: &[usize], holder: &Holder) -> Option<Apart<'_>> {
        let untried = || {
            let upstreams = route.upstreams().iter();
            upstreams.filter(move |upstream| {
                let address = Arc::as_ptr(upstream).addr();
                let healthy = upstream.reachable() && !upstream.ejected();
                healthy && !upstream.broke_lately() && !tried.contains(&address)
            })
        };
        let picked = async {
            loop {
                let mut freed = std::pin::pin!(self.freed.notified());
                freed.as_mut().enable();
                untried().next()?;
                let free = || untried().filter(move |upstream| self.is_free(upstream, holder));
                if let Some(upstream) = less_loaded(route.name(), free)
                    && let Some(apart) = self.hold(upstream, holder)
                {
                    return Some(apart);
                }
                freed.await;
            }
        };
        timeout(APART_MAX, picked).await.ok().flatten()
    }

    fn is_free(&self, upstream: &Arc<Upstream>, holder: &Holder) -> bool {
        let held = self.held();
        let suspected = held.get(&Arc::as_ptr(upstream).addr());
        suspected.is_none_or(|suspected| suspected.holder == *holder)
    }

    fn hold(&self, upstream: &Arc<Upstream>, holder: &Holder) -> Option<Apart<'_>> {
        let address = Arc::as_ptr(upstream).addr();
        let mut held = self.held();
        let suspected = held.entry(address).or_insert_with(|| Suspected {
            holder: holder.clone(),
            calls: 0,
        });
        // Another took it between the look and the hold.
        if suspected.holder != *holder {
            return None;
        }
        suspected.calls += 1;
        Some(Apart {
            upstream: upstream.clone(),
            suspects: self,
            address,
        })
    }
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    // SHA-256 has 32 bytes.
    digest(&SHA256, bytes)
        .as_ref()
        .try_into()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use platform::grpc::Message;
    use protocol::inference::ModelInferRequest;

    use super::*;
    use crate::policy::{Caller, Tenant};
    use crate::request::default_headers;

    fn request(tenant: &str, id: usize) -> Request {
        let tenant = Tenant {
            holder: Holder::Tenant(tenant.into()),
            ..Tenant::anyone()
        };
        let message = ModelInferRequest {
            id: format!("{id:04}"),
            ..Default::default()
        };
        let caller = Caller::new(Arc::new(tenant), "key");
        let (headers, message) = (default_headers(), Message::encode(&message));
        let deadline = Instant::now() + Duration::from_secs(60);
        Request::new(Method::ModelInfer, headers, message, deadline, caller).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_bytes_of_the_same_caller_are_refused_for_a_minute() {
        let suspects = Suspects::default();
        let poison = request("a", 1);
        assert!(!suspects.refuses(&poison));
        suspects.refuse(&poison);
        assert!(suspects.refuses(&request("a", 1)));
        assert!(!suspects.refuses(&request("b", 1)), "another caller");
        assert!(!suspects.refuses(&request("a", 2)), "other bytes");
        tokio::time::advance(REFUSED_FOR).await;
        assert!(!suspects.refuses(&request("a", 1)));
        assert_eq!(suspects.count.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn so_many_are_refused_and_the_oldest_is_forgotten() {
        let suspects = Suspects::default();
        for id in 0..=REFUSED_MAX {
            suspects.refuse(&request("a", id));
        }
        assert_eq!(suspects.count.load(Ordering::Relaxed), REFUSED_MAX);
        assert!(!suspects.refuses(&request("a", 0)));
        assert!(suspects.refuses(&request("a", 1)));
        assert!(suspects.refuses(&request("a", REFUSED_MAX)));
    }
}
