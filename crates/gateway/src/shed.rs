//! Refuses calls at once when the gateway holds as many as it may, all together
//! or of one tenant.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use protocol::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::auth::Tenant;

/// When a call under way will probably have ended.
const RETRY: Duration = Duration::from_millis(100);

/// Calls under way by the names of tenants: of those that have some.
type Held = Mutex<HashMap<String, usize>>;

/// How many calls may be under way.
#[derive(Debug)]
pub struct Shed {
    places: Arc<Semaphore>,
    calls_max: usize,
    held: Arc<Held>,
    shed: Counter,
}

/// A call or a stream of a tenant's, until it is dropped.
#[derive(Debug)]
pub struct Share {
    held: Arc<Held>,
    tenant: Arc<Tenant>,
}

impl Shed {
    /// At most so many calls; those refused are counted.
    pub fn new(calls_max: usize, shed: Counter) -> Self {
        Self {
            places: Arc::new(Semaphore::new(calls_max)),
            calls_max,
            held: Arc::default(),
            shed,
        }
    }

    /// Calls under way.
    pub fn in_flight(&self) -> usize {
        self.calls_max - self.places.available_permits()
    }

    /// A place that is held until the reply has been sent.
    pub fn admit(&self) -> Result<OwnedSemaphorePermit, Error> {
        self.places.clone().try_acquire_owned().map_err(|_| {
            self.shed.inc();
            Error::overloaded(
                format!("the gateway holds {} calls already", self.calls_max),
                RETRY,
            )
        })
    }

    /// A tenant's place among its own: it may hold half of all places, or as
    /// many as its quota says if that is more. One tenant alone would take
    /// them all else, with streams that say nothing.
    pub fn share(&self, tenant: &Arc<Tenant>) -> Result<Share, Error> {
        let own = tenant.quota.in_flight.map_or(0, |count| count as usize);
        let count_max = self.calls_max.div_ceil(2).max(own);
        let mut held = lock(&self.held);
        match held.get_mut(&tenant.name) {
            Some(count) if *count >= count_max => {
                self.shed.inc();
                let message =
                    format!("the tenant has {count_max} calls and streams under way, its part");
                return Err(Error::quota_spent(message, RETRY));
            }
            Some(count) => *count += 1,
            None => {
                held.insert(tenant.name.clone(), 1);
            }
        }
        Ok(Share {
            held: self.held.clone(),
            tenant: tenant.clone(),
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut held = lock(&self.held);
        match held.get_mut(&self.tenant.name) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                held.remove(&self.tenant.name);
            }
        }
    }
}

fn lock(held: &Held) -> MutexGuard<'_, HashMap<String, usize>> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Policy;

    fn tenant(name: &str, quota: &str) -> Arc<Tenant> {
        let text = format!("[tenants.{name}]\nmodels = [\"*\"]\n{quota}");
        let policy = Policy::parse(&text, std::path::Path::new("policy.toml"));
        policy.unwrap().tenants[name].clone()
    }

    #[test]
    fn no_tenant_takes_every_place() {
        let shed = Shed::new(5, Counter::default());
        let (a, b) = (tenant("a", "quota = { in_flight = 1 }"), tenant("b", ""));
        let mut held: Vec<Share> = (0..3).map(|_| shed.share(&a).unwrap()).collect();
        let error = shed.share(&a).unwrap_err();
        assert_eq!(error.kind(), protocol::Kind::QuotaSpent);
        let other = shed.share(&b).unwrap();
        held.pop();
        held.push(shed.share(&a).unwrap());
        // Another reading of the policy has the same tenant.
        assert!(shed.share(&tenant("a", "")).is_err());
        let more = tenant("a", "quota = { in_flight = 4 }");
        assert!(shed.share(&more).is_ok());
        drop((held, other));
        assert!(lock(&shed.held).is_empty());
    }
}
