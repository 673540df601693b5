//! Memory of 64-byte lines: an arena for what a forward pass needs, and zeros for weights.

use std::cell::RefCell;

/// Words of 32 bits in a line.
const WORDS: usize = 16;
/// What a thread keeps for its next matrices; more is given back.
const KEPT_BYTES_MAX: usize = 64 << 20;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; WORDS]);

const EMPTY: Line = Line([0; WORDS]);

thread_local! {
    /// Memory that was used and is free, smallest first.
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Words of 32 bits, aligned to 64 bytes. Always initialized, though with anything.
pub(super) struct Buffer {
    lines: Vec<Line>,
}

impl Buffer {
    /// At least this many words from the arena, with what was in them before.
    pub(super) fn take(words: usize) -> Self {
        let needed = words.div_ceil(WORDS);
        if cfg!(debug_assertions) {
            // Its own and no longer than asked for, so that a sanitizer sees a step beyond it.
            let lines = vec![EMPTY; needed];
            return Self { lines };
        }
        let kept = FREE.with_borrow_mut(|free| {
            let place = free.partition_point(|lines| lines.len() < needed);
            (place < free.len()).then(|| free.remove(place))
        });
        // A power of two, so that nearly equal matrices share memory.
        let lines = kept.unwrap_or_else(|| vec![EMPTY; needed.next_power_of_two()]);
        Self { lines }
    }

    /// Exactly enough zeros for this many words, not of the arena.
    pub(super) fn zeros(words: usize) -> Vec<Zeroed> {
        vec![Zeroed(EMPTY); words.div_ceil(WORDS)]
    }

    pub(super) fn words(&self) -> usize {
        self.lines.len() * WORDS
    }

    pub(super) fn pointer(&self) -> *const u32 {
        self.lines.as_ptr().cast()
    }

    pub(super) fn pointer_mut(&mut self) -> *mut u32 {
        self.lines.as_mut_ptr().cast()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if cfg!(debug_assertions) {
            return;
        }
        let lines = std::mem::take(&mut self.lines);
        // A thread that ends has no arena any more: then the memory is simply freed.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            let kept: usize = free
                .iter()
                .map(|lines| lines.len() * size_of::<Line>())
                .sum();
            if kept + lines.len() * size_of::<Line>() <= KEPT_BYTES_MAX {
                let place = free.partition_point(|other| other.len() < lines.len());
                free.insert(place, lines);
            }
        });
    }
}

/// A line of memory that lives as long as a model.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Zeroed(Line);

impl Zeroed {
    pub(super) const WORDS: usize = WORDS;

    pub(super) fn set(&mut self, place: usize, word: u32) {
        self.0.0[place] = word;
    }
}
