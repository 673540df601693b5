//! Memory aligned to cache lines: an arena for the matrices of a forward pass, and zeroed lines
//! for weights.

use std::cell::RefCell;

/// Words of 32 bits in a cache line.
const WORDS: usize = 16;
/// Bytes that the arena of a thread holds for its next matrices; more is freed.
const ARENA_BYTES_MAX: usize = 64 << 20;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct CacheLine([u32; WORDS]);

const ZEROS: CacheLine = CacheLine([0; WORDS]);

thread_local! {
    /// The arena: buffers that are free, smallest first.
    static FREE: RefCell<Vec<Vec<CacheLine>>> = const { RefCell::new(Vec::new()) };
}

/// Words of 32 bits, aligned to 64 bytes. Always initialized, though with arbitrary values.
pub(super) struct Buffer {
    lines: Vec<CacheLine>,
}

impl Buffer {
    /// At least this many words from the arena, with the values of their last use.
    pub(super) fn from_arena(words: usize) -> Self {
        let needed = words.div_ceil(WORDS);
        if cfg!(debug_assertions) {
            // A new allocation of the exact size, so that a sanitizer sees an access beyond it.
            let lines = vec![ZEROS; needed];
            return Self { lines };
        }
        let reused = FREE.with_borrow_mut(|free| {
            let index = free.partition_point(|lines| lines.len() < needed);
            (index < free.len()).then(|| free.remove(index))
        });
        // A power of two, so that matrices of nearly equal size reuse the same memory.
        let lines = reused.unwrap_or_else(|| vec![ZEROS; needed.next_power_of_two()]);
        Self { lines }
    }

    /// Zeroed lines for this many words, not from the arena.
    pub(super) fn zeros(words: usize) -> Vec<ZeroedLine> {
        vec![ZeroedLine(ZEROS); words.div_ceil(WORDS)]
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
        // A thread that is ending has no arena any more: then the memory is freed.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            let held: usize = free
                .iter()
                .map(|lines| lines.len() * size_of::<CacheLine>())
                .sum();
            if held + lines.len() * size_of::<CacheLine>() <= ARENA_BYTES_MAX {
                let index = free.partition_point(|other| other.len() < lines.len());
                free.insert(index, lines);
            }
        });
    }
}

/// A line of a model's weights.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct ZeroedLine(CacheLine);

impl ZeroedLine {
    pub(super) const WORDS: usize = WORDS;

    pub(super) fn set(&mut self, index: usize, word: u32) {
        self.0.0[index] = word;
    }
}
