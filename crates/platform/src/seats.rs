//! Places that are held for long: connections, and streams that wait. A holder
//! alone may have all of them. When they run short, a new one is refused, or the
//! idlest of the holder that has the most has to go.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::pot::Holder;

/// So many that were told to go may still be there, as a part of all places.
const LEAVING_PART: usize = 8;

/// Places that holders share. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Seats(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    max: usize,
    table: Mutex<Table>,
    started: Instant,
}

#[derive(Debug, Default)]
struct Table {
    /// Seats that are taken, without those that were told to go.
    count: usize,
    /// Seats that were told to go and have not gone yet.
    leaving: usize,
    next: u64,
    holders: HashMap<Holder, HashMap<u64, Arc<State>>>,
}

/// What who sits tells the seats, and is told by them. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Occupant {
    /// Cancelled when the seat must be left.
    pub end: CancellationToken,
    /// Of what keeps the seat busy, so much only waits, and does not count.
    pub waiting: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct State {
    /// What keeps the seat from being idle.
    busy: AtomicUsize,
    /// Milliseconds from the start to when it was last used.
    used: AtomicU64,
    started: Instant,
    occupant: Occupant,
}

/// How a seat is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Use {
    Idle,
    /// What keeps it busy only waits.
    Waiting,
    Busy,
}

impl State {
    fn touch(&self) {
        let elapsed = self.started.elapsed().as_millis();
        let now = u64::try_from(elapsed).unwrap_or(u64::MAX);
        self.used.store(now, Ordering::Relaxed);
    }

    fn use_now(&self) -> Use {
        let waiting = self.occupant.waiting.load(Ordering::Relaxed);
        match self.busy.load(Ordering::Relaxed) {
            0 => Use::Idle,
            busy if busy > waiting => Use::Busy,
            _ => Use::Waiting,
        }
    }
}

/// A place, until it is dropped.
#[derive(Debug)]
#[must_use = "it is given back when it is dropped"]
pub struct Seat {
    seats: Seats,
    holder: Holder,
    number: u64,
    state: Arc<State>,
}

/// No place is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no place is free")]
pub struct NoSeat;

impl Seats {
    /// So many free places.
    pub fn new(max: usize) -> Self {
        Self(Arc::new(Inner {
            max,
            table: Mutex::default(),
            started: Instant::now(),
        }))
    }

    /// Places that are taken.
    pub fn count(&self) -> usize {
        let table = self.0.lock();
        table.count + table.leaving
    }

    /// Takes a place. When all are taken, the idlest seat of the holder that has the most goes
    /// instead. A holder that has the most itself must have an idle one.
    pub fn take_or_evict(&self, holder: &Holder, occupant: Occupant) -> Result<Seat, NoSeat> {
        let mut table = self.0.lock();
        if table.count >= self.0.max {
            let greatest = table.greatest().ok_or(NoSeat)?;
            let most = table.count_of(&greatest);
            if table.leaving > self.0.max / LEAVING_PART {
                return Err(NoSeat);
            }
            if table.count_of(holder) >= most {
                table.evict(holder, false)?;
            } else {
                table.evict(&greatest, true)?;
            }
        }
        Ok(self.seat(&mut table, holder, occupant))
    }

    /// Takes a place, or is refused when all are taken, or when the holder has
    /// its share while others have some too. When few are left, the idlest seat
    /// of the holder that has the most goes, so that those who come next find
    /// one.
    pub fn take(&self, holder: &Holder, occupant: Occupant) -> Result<Seat, NoSeat> {
        let mut table = self.0.lock();
        if table.count + table.leaving >= self.0.max || self.0.has_share(&table, holder) {
            return Err(NoSeat);
        }
        if table.count >= self.0.max - self.0.max / LEAVING_PART
            && let Some(greatest) = table.greatest()
        {
            // With none idle, the new one still has its place.
            let _ = table.evict(&greatest, false);
        }
        Ok(self.seat(&mut table, holder, occupant))
    }

    fn seat(&self, table: &mut Table, holder: &Holder, occupant: Occupant) -> Seat {
        let state = Arc::new(State {
            busy: AtomicUsize::new(0),
            used: AtomicU64::new(0),
            started: self.0.started,
            occupant,
        });
        state.touch();
        let number = table.next;
        table.next += 1;
        table.count += 1;
        let own = table.holders.entry(holder.clone()).or_default();
        own.insert(number, state.clone());
        Seat {
            seats: self.clone(),
            holder: holder.clone(),
            number,
            state,
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a holder has its share, while others have seats too and half of
    /// all are taken.
    fn has_share(&self, table: &Table, holder: &Holder) -> bool {
        let own = table.count_of(holder);
        let holders = table.holders.len() + usize::from(own == 0);
        holders > 1 && table.count >= self.max / 2 && own >= (self.max / holders).max(1)
    }
}

impl Table {
    fn count_of(&self, holder: &Holder) -> usize {
        self.holders.get(holder).map_or(0, HashMap::len)
    }

    /// The holder that has the most seats.
    fn greatest(&self) -> Option<Holder> {
        let holders = self.holders.iter();
        let greatest = holders.max_by_key(|(_, own)| own.len());
        greatest.map(|(holder, _)| holder.clone())
    }

    /// Tells the idlest seat of a holder to go; a busy one if it may be.
    fn evict(&mut self, holder: &Holder, or_busy: bool) -> Result<(), NoSeat> {
        let own = self.holders.get(holder).ok_or(NoSeat)?;
        let seats = own
            .iter()
            .map(|(number, state)| (state.use_now(), state.used.load(Ordering::Relaxed), *number));
        let (now, _, number) = seats.min().ok_or(NoSeat)?;
        if now == Use::Busy && !or_busy {
            return Err(NoSeat);
        }
        if let Some(state) = self.remove(holder, number) {
            self.leaving += 1;
            state.occupant.end.cancel();
        }
        Ok(())
    }

    fn remove(&mut self, holder: &Holder, number: u64) -> Option<Arc<State>> {
        let own = self.holders.get_mut(holder)?;
        let state = own.remove(&number)?;
        if own.is_empty() {
            self.holders.remove(holder);
        }
        self.count -= 1;
        Some(state)
    }
}

impl Seat {
    /// Notes that the seat is used now.
    pub fn touch(&self) {
        self.state.touch();
    }

    /// Keeps the seat from being idle until the guard is dropped.
    pub fn busy(&self) -> Busy {
        self.state.touch();
        self.state.busy.fetch_add(1, Ordering::Relaxed);
        Busy(self.state.clone())
    }

    /// For how long the seat has been idle; none while something keeps it busy.
    pub fn idle_for(&self) -> Option<Duration> {
        let state = &self.state;
        let used = Duration::from_millis(state.used.load(Ordering::Relaxed));
        let is_idle = state.busy.load(Ordering::Relaxed) == 0;
        is_idle.then(|| state.started.elapsed().saturating_sub(used))
    }

    /// Cancelled when the seat must be left.
    pub fn end(&self) -> &CancellationToken {
        &self.state.occupant.end
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut table = self.seats.0.lock();
        if table.remove(&self.holder, self.number).is_none() {
            table.leaving = table.leaving.saturating_sub(1);
        }
    }
}

/// Keeps a seat from being idle.
#[derive(Debug)]
pub struct Busy(Arc<State>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.touch();
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(name: &str) -> Holder {
        Holder::Tenant(name.into())
    }

    fn end() -> Occupant {
        Occupant::default()
    }

    fn gone(seats: &[Seat]) -> Vec<bool> {
        let ended = seats.iter().map(|seat| seat.end().is_cancelled());
        ended.collect()
    }

    #[tokio::test(start_paused = true)]
    async fn the_idlest_of_the_greatest_holder_goes() {
        let seats = Seats::new(4);
        let (a, b) = (holder("a"), holder("b"));
        let mut taken = Vec::new();
        for owner in [&b, &a, &a, &a] {
            taken.push(seats.take_or_evict(owner, end()).unwrap());
            tokio::time::advance(Duration::from_millis(10)).await;
        }
        // The second is older, but used.
        taken[1].touch();
        let busy = taken[2].busy();
        let new = seats.take_or_evict(&b, end()).unwrap();
        assert_eq!(gone(&taken), [false, false, false, true]);
        drop(taken.pop());
        // Another that has few finds a place, if a busy one must go for it.
        let more_busy = taken[1].busy();
        let c = seats.take_or_evict(&holder("c"), end()).unwrap();
        assert_eq!(gone(&taken).iter().filter(|gone| **gone).count(), 1);
        drop((taken, new, c, busy, more_busy));
        assert_eq!(seats.count(), 0);
        assert!(seats.0.lock().holders.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_is_refused_and_the_idlest_goes_when_few_are_left() {
        let seats = Seats::new(16);
        let (a, b) = (holder("a"), holder("b"));
        let alone: Vec<_> = (0..14).map(|_| seats.take(&a, end()).unwrap()).collect();
        assert!(alone.iter().all(|seat| !seat.end().is_cancelled()));
        let other = seats.take(&b, end()).unwrap();
        let gone = gone(&alone);
        assert!(gone[0] && !gone[1..].contains(&true) && !other.end().is_cancelled());
        assert_eq!(seats.take(&a, end()).unwrap_err(), NoSeat, "its share");
        drop(alone);
        assert_eq!(seats.count(), 1);
    }

    #[test]
    fn places_are_bounded_when_none_is_idle() {
        let seats = Seats::new(8);
        let a = holder("a");
        let mut taken: Vec<_> = (0..8)
            .map(|_| seats.take_or_evict(&a, end()).unwrap())
            .collect();
        let _busy: Vec<_> = taken.iter().map(Seat::busy).collect();
        assert_eq!(seats.take_or_evict(&a, end()).unwrap_err(), NoSeat);
        assert_eq!(seats.take(&holder("b"), end()).unwrap_err(), NoSeat);
        // Those that were told to go are counted until they have gone.
        let others: Vec<_> = ["b", "c", "d"]
            .iter()
            .filter_map(|name| seats.take_or_evict(&holder(name), end()).ok())
            .collect();
        assert_eq!((others.len(), seats.count()), (2, 10));
        taken.clear();
        assert_eq!(seats.count(), 2);
        assert!(seats.take_or_evict(&a, end()).is_ok());
    }
}
