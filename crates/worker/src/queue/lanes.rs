//! The order of the parts that wait: lanes take turns, and priority decides
//! within a lane.
//!
//! Turns are start-time fair queueing (Goyal, Vin and Cheng, 1996): the lane
//! that was served the fewest tokens is next, and a lane that comes back begins
//! where the others are. So a flood of one lane delays another by about one
//! part, whatever its priority.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use platform::pot::{Held, Holder};

use super::Part;

/// Priorities above this one count as it.
const CLASS_MAX: u64 = 9;
/// A part gains a class each time it has waited so long, so that no priority
/// starves another.
const CLASS_AGE: Duration = Duration::from_secs(1);
/// Lanes without parts are looked through when there are more than so many.
const LANES_KEPT: usize = 64;

/// Whose call it is, and what its priority may do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lane {
    /// Calls of one holder wait in one lane.
    pub holder: Holder,
    /// Whether the priority holds among the calls of other lanes too.
    pub crosses: bool,
    /// Whether the call waits until no other call does.
    pub deferred: bool,
}

/// A part that waits, and what it takes.
#[derive(Debug)]
pub struct Waiting {
    /// The part.
    pub part: Part,
    /// Its rows.
    pub rows: usize,
    /// Its tokens.
    pub tokens: usize,
    /// Holds the rows of its request, until the last part has left.
    _held: Arc<Held>,
}

impl Waiting {
    /// A part of a request whose rows are held.
    pub fn new(part: Part, held: Arc<Held>) -> Self {
        Self {
            rows: part.rows.count(),
            tokens: part.rows.tokens(),
            part,
            _held: held,
        }
    }
}

/// The place of a part among others. All parts age alike, so that the order of
/// two never changes: by class and arrival together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    due: Instant,
    number: u64,
}

/// The place of a lane among others: tokens served, then who came first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    served: u64,
    number: u64,
}

#[derive(Debug, Default)]
struct OwnParts {
    parts: BTreeMap<Place, Waiting>,
    tokens: usize,
    turn: Turn,
}

/// Parts that wait, in lanes.
#[derive(Debug, Default)]
pub struct Lanes {
    lanes: HashMap<Holder, OwnParts>,
    /// The lanes that have parts.
    turns: BTreeMap<Turn, Holder>,
    /// The parts whose priority holds among all lanes; they stand in their own
    /// lanes too.
    crossing: BTreeMap<Place, Holder>,
    /// Where a lane begins: the tokens of the lane whose turn was last.
    served: u64,
    number: u64,
    /// The number of lanes at which those without parts are looked through.
    look_at: usize,
    /// Rows of all parts.
    pub rows: usize,
    /// Tokens of all parts.
    pub tokens: usize,
}

impl Lanes {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Adds a part to its lane.
    pub fn push(&mut self, lane: &Lane, waiting: Waiting) {
        self.number += 1;
        let number = self.number;
        let place = Place {
            due: waiting.part.queued_at + CLASS_AGE * class(waiting.part.priority),
            number,
        };
        self.rows += waiting.rows;
        self.tokens += waiting.tokens;
        let own = self.lanes.entry(lane.holder.clone()).or_default();
        if own.parts.is_empty() {
            let served = own.turn.served.max(self.served);
            own.turn = Turn { served, number };
            self.turns.insert(own.turn, lane.holder.clone());
        }
        own.tokens += waiting.tokens;
        own.parts.insert(place, waiting);
        if lane.crosses {
            self.crossing.insert(place, lane.holder.clone());
        }
    }

    /// Rows and tokens of the next part.
    pub fn peek(&self) -> Option<(usize, usize)> {
        let (holder, place) = self.next()?;
        let waiting = self.lanes.get(&holder)?.parts.get(&place)?;
        Some((waiting.rows, waiting.tokens))
    }

    /// Takes the next part.
    pub fn pop(&mut self) -> Option<Waiting> {
        let (holder, place) = self.next()?;
        let in_turn = self.turns.first_key_value().map(|(turn, _)| turn.served);
        let waiting = self.remove(&holder, place)?;
        self.served = self.served.max(in_turn.unwrap_or_default());
        if let Some(own) = self.lanes.get_mut(&holder) {
            self.turns.remove(&own.turn);
            own.turn.served += waiting.tokens.max(1) as u64;
            if !own.parts.is_empty() {
                self.turns.insert(own.turn, holder);
            }
        }
        self.forget();
        Some(waiting)
    }

    /// The first part of the lane whose turn it is, or one that crosses lanes
    /// and would stand before it.
    fn next(&self) -> Option<(Holder, Place)> {
        let (_, holder) = self.turns.first_key_value()?;
        let (first, _) = self.lanes.get(holder)?.parts.first_key_value()?;
        let (place, holder) = match self.crossing.first_key_value() {
            Some((place, crossing)) if place < first => (place, crossing),
            _ => (first, holder),
        };
        Some((holder.clone(), *place))
    }

    /// Removes a part; its lane keeps its turn while it has others.
    fn remove(&mut self, holder: &Holder, place: Place) -> Option<Waiting> {
        let own = self.lanes.get_mut(holder)?;
        let waiting = own.parts.remove(&place)?;
        own.tokens -= waiting.tokens;
        if own.parts.is_empty() {
            self.turns.remove(&own.turn);
        }
        self.crossing.remove(&place);
        self.rows -= waiting.rows;
        self.tokens -= waiting.tokens;
        Some(waiting)
    }

    /// Takes out the parts that nobody waits for.
    pub fn remove_unawaited(&mut self, now: Instant) -> Vec<Waiting> {
        let mut unawaited = Vec::new();
        for (holder, own) in &self.lanes {
            for (place, waiting) in &own.parts {
                if !waiting.part.awaited(now) {
                    unawaited.push((holder.clone(), *place));
                }
            }
        }
        let mut removed = Vec::with_capacity(unawaited.len());
        for (holder, place) in unawaited {
            removed.extend(self.remove(&holder, place));
        }
        self.forget();
        removed
    }

    /// When the first of all parts was queued, and the earliest deadline.
    pub fn earliest(&self) -> Option<(Instant, Instant)> {
        let parts = self.lanes.values().flat_map(|own| own.parts.values());
        let times = parts.map(|waiting| (waiting.part.queued_at, waiting.part.deadline));
        times.reduce(|a, b| (a.0.min(b.0), a.1.min(b.1)))
    }

    /// About how many tokens are computed before so many further ones of a lane:
    /// its own, and as many of each other lane that has parts.
    pub fn tokens_ahead(&self, holder: &Holder, tokens: usize) -> usize {
        let own = self.lanes.get(holder);
        let others = self.turns.len() - own.map_or(0, |own| usize::from(!own.parts.is_empty()));
        let own = own.map_or(0, |own| own.tokens);
        let share = own.saturating_add(tokens).saturating_mul(others);
        own + share.min(self.tokens - own)
    }

    /// Forgets lanes that have no parts and are not ahead of the others. What
    /// they were served counts until then, so that leaving and coming back
    /// brings no turn.
    fn forget(&mut self) {
        if self.is_empty() {
            self.lanes.clear();
        } else if self.lanes.len() > self.look_at.max(LANES_KEPT) {
            let served = self.served;
            self.lanes
                .retain(|_, own| !own.parts.is_empty() || own.turn.served > served);
            self.look_at = self.lanes.len() * 2;
        }
    }
}

/// 1 is the first class; 0, the default, the last.
fn class(priority: u64) -> u32 {
    let class = if priority == 0 {
        CLASS_MAX + 1
    } else {
        priority.min(CLASS_MAX)
    };
    u32::try_from(class).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use engine::{TextOutput, TokenRow};
    use platform::pot::Pot;
    use tokio::sync::oneshot;

    use super::super::{Computed, Rows};
    use super::*;
    use crate::error::ModelError;

    /// Parts in lanes, each told from others by its tokens.
    struct Parts {
        lanes: Lanes,
        start: Instant,
        replies: Vec<oneshot::Receiver<Result<Computed, ModelError>>>,
    }

    impl Parts {
        fn new() -> Self {
            Self {
                lanes: Lanes::default(),
                start: Instant::now(),
                replies: Vec::new(),
            }
        }

        /// Adds a part of a priority that came so many milliseconds after the start.
        fn push(&mut self, lane: &Lane, tokens: usize, priority: u64, after: u64) {
            let (reply, wait) = oneshot::channel();
            self.replies.push(wait);
            let row = TokenRow {
                ids: vec![1; tokens],
                type_ids: vec![0; tokens],
                skipped: 0,
            };
            let part = Part {
                rows: Rows::Text(vec![(row, TextOutput::Embedding)]),
                priority,
                deadline: self.start + Duration::from_secs(600),
                queued_at: self.start + Duration::from_millis(after),
                reply,
            };
            let held = Pot::new(1).nothing();
            self.lanes.push(lane, Waiting::new(part, held.into()));
        }

        fn order(&mut self) -> Vec<usize> {
            std::iter::from_fn(|| self.lanes.pop())
                .map(|waiting| waiting.tokens)
                .collect()
        }
    }

    fn lane(name: &str) -> Lane {
        Lane {
            holder: Holder::Tenant(name.into()),
            ..Lane::default()
        }
    }

    #[test]
    fn lanes_take_turns_whatever_their_priorities() {
        let mut parts = Parts::new();
        let (flood, other) = (lane("flood"), lane("other"));
        for _ in 0..4 {
            parts.push(&flood, 100, 1, 0);
        }
        parts.push(&other, 101, 0, 500);
        parts.push(&other, 102, 0, 501);
        assert_eq!(parts.order(), [100, 101, 100, 102, 100, 100]);
    }

    #[test]
    fn turns_are_counted_in_tokens() {
        let mut parts = Parts::new();
        for _ in 0..3 {
            parts.push(&lane("long"), 40, 0, 0);
        }
        for _ in 0..6 {
            parts.push(&lane("short"), 10, 0, 1);
        }
        assert_eq!(parts.order(), [40, 10, 10, 10, 10, 40, 10, 10, 40]);
    }

    #[test]
    fn a_lane_that_leaves_and_comes_back_gains_no_turn() {
        let mut parts = Parts::new();
        for _ in 0..3 {
            parts.push(&lane("steady"), 10, 0, 0);
        }
        let mut order = Vec::new();
        // The other lane has one part at a time, and the next one at once.
        for _ in 0..3 {
            parts.push(&lane("returning"), 11, 1, 1);
            order.extend(parts.lanes.pop().map(|waiting| waiting.tokens));
            order.extend(parts.lanes.pop().map(|waiting| waiting.tokens));
        }
        assert_eq!(order, [10, 11, 10, 11, 10, 11]);
        assert!(parts.lanes.is_empty() && parts.lanes.lanes.is_empty());
    }

    #[test]
    fn priority_decides_within_a_lane_and_ages_by_a_class_a_second() {
        let mut parts = Parts::new();
        let own = lane("own");
        for (tokens, priority, after) in [
            (1, 0, 0),
            (2, 2, 0),
            (3, 1, 999),
            (4, 1, 1001),
            (5, 1, 8999),
            (6, 1, 9001),
        ] {
            parts.push(&own, tokens, priority, after);
        }
        // A class is a second: the second class waits for one, the last for nine.
        assert_eq!(parts.order(), [3, 2, 4, 5, 1, 6]);
    }

    #[test]
    fn a_call_that_may_cross_lanes_goes_by_its_priority_among_all() {
        let mut parts = Parts::new();
        let crossing = Lane {
            crosses: true,
            ..lane("own")
        };
        for _ in 0..3 {
            parts.push(&lane("first"), 10, 0, 0);
            parts.push(&lane("second"), 20, 0, 0);
        }
        for _ in 0..3 {
            parts.push(&crossing, 1, 1, 10);
        }
        // Of the same priority it has at least the turn of its lane.
        parts.push(&crossing, 2, 0, 11);
        let order = parts.order();
        assert_eq!(order[..3], [1, 1, 1]);
        assert!(
            order.iter().position(|tokens| *tokens == 2) < Some(7),
            "{order:?}"
        );
    }

    #[test]
    fn a_lane_waits_for_its_share_of_the_others_only() {
        let mut parts = Parts::new();
        for _ in 0..10 {
            parts.push(&lane("flood"), 100, 1, 0);
        }
        let ahead = |parts: &Parts, name: &str, tokens| {
            parts.lanes.tokens_ahead(&lane(name).holder, tokens)
        };
        assert_eq!(ahead(&parts, "flood", 50), 1000);
        assert_eq!(ahead(&parts, "other", 50), 50);
        parts.push(&lane("other"), 30, 0, 0);
        assert_eq!(ahead(&parts, "other", 50), 30 + 80);
        assert_eq!(ahead(&parts, "flood", 50), 1030);
    }

    #[test]
    fn parts_that_nobody_waits_for_leave_their_lanes() {
        let mut parts = Parts::new();
        for number in 0..200 {
            parts.push(&lane(&number.to_string()), 3, 0, 0);
        }
        parts.push(&lane("kept"), 7, 0, 0);
        parts.replies.drain(..200);
        let removed = parts.lanes.remove_unawaited(parts.start);
        assert_eq!(removed.len(), 200);
        assert_eq!((parts.lanes.rows, parts.lanes.tokens), (1, 7));
        assert_eq!(parts.lanes.lanes.len(), 1);
        assert_eq!(parts.order(), [7]);
    }
}
