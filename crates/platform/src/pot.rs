//! A capacity that several holders share: bytes, streams, connections, work.
//!
//! A holder alone may take all of it. Once half of it is taken, and while two
//! or more holders have been seen within the last seconds, a holder has at most
//! its share: the capacity divided by the holders. So a flood of one leaves room
//! for the others, and what is free is never kept from a holder that is alone.

use std::collections::VecDeque;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ahash::AHashMap;
use tokio::time::Instant;

/// A holder that holds nothing counts for so long after its last attempt to
/// take: between two calls of a tenant its share is not given away.
const REMEMBERED: Duration = Duration::from_secs(10);
/// More holders than these share one account.
const HOLDERS_MAX: usize = 16_384;

/// Who holds a part of a pot. Cheap to clone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum Holder {
    /// The process itself, as for calls between its own roles.
    #[default]
    Own,
    /// A tenant, by its name.
    Tenant(Arc<str>),
    /// A tenant of a gateway, by the number that the gateway gives its calls.
    Lane(u32),
    /// A peer of whom nobody asks who it is: an IPv4 address, or the network of
    /// an IPv6 address.
    Peer(IpAddr),
    /// All those that come when too many others are known.
    Others,
}

impl Holder {
    /// A peer by its address. The owner of an IPv6 network has all of its
    /// addresses (2^64), so that they are one holder.
    pub fn peer(address: IpAddr) -> Self {
        Self::Peer(match address.to_canonical() {
            IpAddr::V6(address) => {
                let network = u128::from(address) >> 64 << 64;
                Ipv6Addr::from(network).into()
            }
            address => address,
        })
    }
}

/// Why nothing more can be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PotFull {
    /// All of it is taken.
    #[error("all of it is taken")]
    Whole,
    /// The holder has its share, and others need theirs.
    #[error("the caller has its share of it, and others need theirs")]
    Share,
}

/// A capacity that holders share. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Pot(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    capacity: usize,
    accounts: Mutex<Accounts>,
    /// As in the accounts, to be read without them.
    used: AtomicUsize,
}

#[derive(Debug, Default)]
struct Accounts {
    used: usize,
    /// Every call takes and gives back several times: holders are hashed fast,
    /// with a key that callers do not know.
    holders: AHashMap<Holder, Account>,
    idle: VecDeque<Idle>,
}

/// A holder that held nothing when it was put here.
#[derive(Debug)]
struct Idle {
    holder: Holder,
    since: Instant,
}

#[derive(Debug, Default)]
struct Account {
    held: usize,
    /// The last attempt to take.
    seen: Option<Instant>,
    /// Whether it stands in `idle`.
    idle: bool,
}

impl Pot {
    /// A pot with nothing taken.
    pub fn new(capacity: usize) -> Self {
        Self(Arc::new(Inner {
            capacity,
            accounts: Mutex::default(),
            used: AtomicUsize::new(0),
        }))
    }

    /// What it holds in all.
    pub fn capacity(&self) -> usize {
        self.0.capacity
    }

    /// What is taken.
    pub fn used(&self) -> usize {
        self.0.used.load(Ordering::Relaxed)
    }

    /// What a holder has.
    pub fn held_by(&self, holder: &Holder) -> usize {
        let accounts = self.0.lock();
        accounts.holders.get(holder).map_or(0, |own| own.held)
    }

    /// Nothing of it.
    pub fn nothing(&self) -> Held {
        Held {
            pot: self.clone(),
            holder: Holder::Own,
            amount: 0,
            others: Vec::new(),
        }
    }

    /// Takes an amount for a holder, or fails at once.
    pub fn take(&self, holder: &Holder, amount: usize) -> Result<Held, PotFull> {
        let holder = match amount {
            0 => holder.clone(),
            _ => self.0.take(holder, amount)?,
        };
        Ok(Held {
            pot: self.clone(),
            holder,
            amount,
            others: Vec::new(),
        })
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Accounts> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The holder on whose account the amount was taken.
    fn take(&self, holder: &Holder, amount: usize) -> Result<Holder, PotFull> {
        let now = Instant::now();
        let mut guard = self.lock();
        let accounts = &mut *guard;
        accounts.forget(now);
        let many = accounts.holders.len() >= HOLDERS_MAX;
        let holder = if many && !accounts.holders.contains_key(holder) {
            &Holder::Others
        } else {
            holder
        };
        let used = accounts.used.saturating_add(amount);
        let count = accounts.holders.len();
        // Who is refused counts as well: others leave it its share.
        let (account, count) = match accounts.holders.entry(holder.clone()) {
            Entry::Occupied(known) => (known.into_mut(), count),
            Entry::Vacant(new) => (new.insert(Account::default()), count + 1),
        };
        account.seen = Some(now);
        let held = account.held.saturating_add(amount);
        let full = if used > self.capacity {
            Some(PotFull::Whole)
        } else if count > 1 && used > self.capacity / 2 && held > self.capacity / count {
            Some(PotFull::Share)
        } else {
            None
        };
        if full.is_none() {
            accounts.used = used;
            self.used.store(used, Ordering::Relaxed);
            account.held = held;
        }
        account.rest(holder, &mut accounts.idle);
        full.map_or_else(|| Ok(holder.clone()), Err)
    }

    fn give_back(&self, holder: &Holder, amount: usize) {
        let mut guard = self.lock();
        let accounts = &mut *guard;
        accounts.used = accounts.used.saturating_sub(amount);
        self.used.store(accounts.used, Ordering::Relaxed);
        if let Some(account) = accounts.holders.get_mut(holder) {
            account.held = account.held.saturating_sub(amount);
            account.rest(holder, &mut accounts.idle);
        }
    }
}

impl Account {
    /// Notes that its holder holds nothing, if so.
    fn rest(&mut self, holder: &Holder, idle: &mut VecDeque<Idle>) {
        if self.held == 0 && !self.idle {
            self.idle = true;
            // It has tried to take before.
            let since = self.seen.unwrap_or_else(Instant::now);
            let holder = holder.clone();
            idle.push_back(Idle { holder, since });
        }
    }
}

impl Accounts {
    /// Removes the holders that have held nothing for long. Each stands in the
    /// queue once, so that an attempt to take needs constant time on average.
    fn forget(&mut self, now: Instant) {
        let recent = |since: Instant| now.duration_since(since) < REMEMBERED;
        while self.idle.front().is_some_and(|idle| !recent(idle.since)) {
            let Some(Idle { holder, .. }) = self.idle.pop_front() else {
                return;
            };
            let Some(account) = self.holders.get_mut(&holder) else {
                continue;
            };
            if account.held > 0 {
                account.idle = false;
            } else if let Some(since) = account.seen.filter(|seen| recent(*seen)) {
                // It has been seen since it was put here.
                self.idle.push_back(Idle { holder, since });
            } else {
                self.holders.remove(&holder);
            }
        }
    }
}

/// A part of a pot, until it is dropped.
#[derive(Debug)]
#[must_use = "it is given back when it is dropped"]
pub struct Held {
    pot: Pot,
    holder: Holder,
    amount: usize,
    /// Parts of other pots or holders that were merged.
    others: Vec<Self>,
}

impl Held {
    /// How much is held.
    pub fn amount(&self) -> usize {
        self.amount + self.others.iter().map(Self::amount).sum::<usize>()
    }

    /// Takes more for the same holder.
    pub fn grow(&mut self, amount: usize) -> Result<(), PotFull> {
        let holder = self.pot.0.take(&self.holder, amount)?;
        if holder == self.holder {
            self.amount += amount;
        } else {
            self.others.push(Self {
                pot: self.pot.clone(),
                holder,
                amount,
                others: Vec::new(),
            });
        }
        Ok(())
    }

    /// Gives back all but `amount`.
    pub fn shrink(&mut self, amount: usize) {
        let mut less = self.amount().saturating_sub(amount);
        while less > 0
            && let Some(mut last) = self.others.pop()
        {
            let part = last.amount().min(less);
            last.shrink(last.amount() - part);
            less -= part;
            if last.amount() > 0 {
                self.others.push(last);
            }
        }
        if less > 0 {
            self.amount -= less;
            self.pot.0.give_back(&self.holder, less);
        }
    }

    /// Holds another part too.
    pub fn merge(&mut self, mut other: Self) {
        if Arc::ptr_eq(&self.pot.0, &other.pot.0) && self.holder == other.holder {
            self.amount += std::mem::take(&mut other.amount);
        } else {
            self.others.push(other);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.amount > 0 {
            self.pot.0.give_back(&self.holder, self.amount);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> Holder {
        Holder::Tenant(name.into())
    }

    #[tokio::test(start_paused = true)]
    async fn a_holder_alone_takes_all_and_two_have_their_shares() {
        let pot = Pot::new(100);
        let (a, b) = (tenant("a"), tenant("b"));
        let mut all = pot.take(&a, 100).unwrap();
        assert_eq!(pot.take(&a, 1).unwrap_err(), PotFull::Whole);
        assert_eq!(pot.take(&b, 1).unwrap_err(), PotFull::Whole);
        // B was refused: what A gives back is kept for B.
        all.shrink(90);
        assert_eq!(pot.take(&a, 1).unwrap_err(), PotFull::Share);
        let few = pot.take(&b, 10).unwrap();
        assert_eq!((pot.used(), pot.held_by(&b)), (100, 10));
        all.shrink(50);
        let mut half = pot.take(&b, 40).unwrap();
        assert_eq!(half.grow(1).unwrap_err(), PotFull::Whole);
        drop((few, half));
        // B is remembered for a while after its last attempt.
        assert_eq!(pot.take(&a, 1).unwrap_err(), PotFull::Share);
        tokio::time::advance(REMEMBERED).await;
        all.grow(50).unwrap();
        drop(all);
        assert_eq!(pot.used(), 0);
        tokio::time::advance(REMEMBERED).await;
        drop(pot.take(&a, 1));
        assert_eq!(pot.0.lock().holders.len(), 1);
    }

    #[test]
    fn what_is_free_is_not_kept_from_many_holders() {
        let pot = Pot::new(100);
        let _others: Vec<_> = (0..19)
            .map(|number| pot.take(&tenant(&number.to_string()), 1).unwrap())
            .collect();
        let large = pot.take(&tenant("large"), 30).unwrap();
        assert_eq!(pot.take(&tenant("large"), 2).unwrap_err(), PotFull::Share);
        let fair = pot.take(&tenant("0"), 4).unwrap();
        drop((large, fair));
    }

    #[test]
    fn merged_parts_are_given_back_to_their_pots() {
        let (pot, other) = (Pot::new(10), Pot::new(10));
        let mut held = pot.take(&tenant("a"), 1).unwrap();
        held.merge(pot.take(&tenant("a"), 2).unwrap());
        held.merge(other.take(&tenant("b"), 4).unwrap());
        assert_eq!((held.amount(), pot.used(), other.used()), (7, 3, 4));
        drop(held);
        assert_eq!((pot.used(), other.used()), (0, 0));
    }

    #[test]
    fn the_addresses_of_one_network_are_one_holder() {
        let peer = |address: &str| Holder::peer(address.parse().unwrap());
        assert_eq!(peer("2001:db8::1"), peer("2001:db8::ffff:0:0:2"));
        assert_ne!(peer("2001:db8::1"), peer("2001:db8:0:1::1"));
        assert_eq!(peer("::ffff:10.0.0.1"), peer("10.0.0.1"));
        assert_ne!(peer("10.0.0.1"), peer("10.0.0.2"));
    }

    #[tokio::test(start_paused = true)]
    async fn the_holders_that_are_known_are_bounded() {
        let pot = Pot::new(10);
        for number in 0..HOLDERS_MAX as u32 + 10 {
            let peer = Holder::peer(IpAddr::from(number.to_be_bytes()));
            drop(pot.take(&peer, 11));
            drop(pot.take(&peer, 1));
        }
        assert!(pot.0.lock().holders.len() <= HOLDERS_MAX + 1);
        tokio::time::advance(REMEMBERED).await;
        drop(pot.take(&Holder::Own, 1));
        assert_eq!(pot.0.lock().holders.len(), 1);
        assert_eq!(pot.0.lock().idle.len(), 1);
    }

    #[test]
    fn what_was_merged_is_given_back_as_well() {
        let pot = Pot::new(100);
        let mut held = pot.take(&tenant("a"), 10).unwrap();
        held.merge(pot.take(&tenant("b"), 20).unwrap());
        held.shrink(15);
        assert_eq!((held.amount(), pot.used()), (15, 15));
        assert_eq!(pot.held_by(&tenant("b")), 5);
        held.shrink(0);
        assert_eq!(pot.used(), 0);
    }
}
