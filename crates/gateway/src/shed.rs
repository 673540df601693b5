//! Load shedding: calls are refused at once when the gateway, or one tenant, has
//! as many in flight as it may.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use platform::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use protocol::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::policy::Tenant;

/// When a call in flight will probably have ended.
const RETRY: Duration = Duration::from_millis(100);

/// Calls in flight by tenant, of the tenants that have some.
type Held = Mutex<HashMap<String, usize>>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// Load shedding: a bound on the calls in flight.
#[derive(Debug)]
pub struct Shed {
    permits: Arc<Semaphore>,
    calls_max: usize,
    held: Arc<Held>,
    shed: Counter,
}

/// A permit for a call or a stream of a tenant, until it is dropped.
#[derive(Debug)]
pub struct TenantPermit {
    held: Arc<Held>,
    tenant: Arc<Tenant>,
}

impl Shed {
    /// At most so many calls; those that are shed are counted.
    pub fn new(calls_max: usize, metrics: &Metrics) -> Self {
        let shed = Family::<ReasonLabel, Counter>::default();
        metrics.register(|registry| {
            registry.register("andon_gateway_shed", "Calls refused at once", shed.clone());
        });
        let reason = "calls_max";
        Self {
            shed: shed.get_or_create_owned(&ReasonLabel { reason }),
            permits: Arc::new(Semaphore::new(calls_max)),
            calls_max,
            held: Arc::default(),
        }
    }

    /// Calls in flight.
    pub fn in_flight(&self) -> usize {
        self.calls_max - self.permits.available_permits()
    }

    /// A permit that is held until the response has been sent.
    pub fn admit(&self) -> Result<OwnedSemaphorePermit, Error> {
        self.permits.clone().try_acquire_owned().map_err(|_| {
            self.shed.inc();
            Error::overloaded(
                format!(
                    "the gateway has {} calls in flight, its maximum",
                    self.calls_max
                ),
                RETRY,
            )
        })
    }

    /// A permit of one tenant, which may hold half of all permits, or as many as
    /// its quota has if that is more: otherwise one tenant could hold all of
    /// them with idle streams.
    pub fn admit_tenant(&self, tenant: &Arc<Tenant>) -> Result<TenantPermit, Error> {
        let own = tenant.quota.in_flight.map_or(0, |count| count as usize);
        let count_max = self.calls_max.div_ceil(2).max(own);
        let mut held = lock(&self.held);
        match held.get_mut(&tenant.name) {
            Some(count) if *count >= count_max => {
                self.shed.inc();
                let message =
                    format!("the tenant has {count_max} calls and streams in flight, its maximum");
                return Err(Error::quota_spent(message, RETRY));
            }
            Some(count) => *count += 1,
            None => {
                held.insert(tenant.name.clone(), 1);
            }
        }
        Ok(TenantPermit {
            held: self.held.clone(),
            tenant: tenant.clone(),
        })
    }
}

impl Drop for TenantPermit {
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
    use crate::policy::Policy;

    fn tenant(name: &str, quota: &str) -> Arc<Tenant> {
        let text = format!("[tenants.{name}]\nmodels = [\"*\"]\n{quota}");
        let policy = Policy::parse(&text, std::path::Path::new("policy.toml"));
        policy.unwrap().tenants[name].clone()
    }

    #[test]
    fn no_tenant_takes_every_slot() {
        let shed = Shed::new(5, &Metrics::default());
        let (a, b) = (tenant("a", "quota = { in_flight = 1 }"), tenant("b", ""));
        let mut held: Vec<TenantPermit> = (0..3).map(|_| shed.admit_tenant(&a).unwrap()).collect();
        let error = shed.admit_tenant(&a).unwrap_err();
        assert_eq!(error.kind(), protocol::Kind::QuotaSpent);
        let other = shed.admit_tenant(&b).unwrap();
        held.pop();
        held.push(shed.admit_tenant(&a).unwrap());
        // Another reading of the policy has the same tenant.
        assert!(shed.admit_tenant(&tenant("a", "")).is_err());
        let more = tenant("a", "quota = { in_flight = 4 }");
        assert!(shed.admit_tenant(&more).is_ok());
        drop((held, other));
        assert!(lock(&shed.held).is_empty());
    }
}
