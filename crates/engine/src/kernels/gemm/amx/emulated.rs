//! Emulation of AMX for tests on a CPU without it.
//!
//! Such a CPU raises SIGILL at each AMX instruction. The signal handler here does what the
//! instruction would have done (Intel 64 and IA-32 Architectures Software Developer's Manual,
//! volume 2) and continues behind it. An operation that the manual forbids aborts the process.

mod decoded;

use std::cell::UnsafeCell;
use std::sync::Once;

use super::super::super::InstructionSet;
use super::super::super::simd::amx::{EMULATED, is_native};
use decoded::{Operation, TileAddress, decode};

/// Makes AMX available to the tests of this thread, where the CPU supports AVX-512 but not AMX.
pub(in super::super::super) fn install_where_missing() {
    static INSTALLED: Once = Once::new();
    if !InstructionSet::Avx512Bf16.supported() || is_native() {
        return;
    }
    INSTALLED.call_once(|| {
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = handle;
        // SAFETY: all zeros are a valid action, and the handler has the signature that the flag
        // requires. It allocates nothing and takes no lock.
        let status = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut())
        };
        assert_eq!(status, 0, "the handler is installed");
    });
    EMULATED.set(true);
}

const ROWS: usize = 16;
const WORDS: usize = 16;
const TILES: usize = 8;

/// A tile, of which the configured rows and bytes are in use. The rest is zeros.
#[derive(Clone, Copy)]
pub(super) struct EmulatedTile {
    rows: usize,
    bytes: usize,
    words: [[u32; WORDS]; ROWS],
}

const EMPTY: EmulatedTile = EmulatedTile {
    rows: 0,
    bytes: 0,
    words: [[0; WORDS]; ROWS],
};

/// The tiles of a thread.
pub(super) struct EmulatedTiles {
    configured: bool,
    tiles: [EmulatedTile; TILES],
}

thread_local! {
    static STATE: UnsafeCell<EmulatedTiles> = const { UnsafeCell::new(EmulatedTiles::new()) };
}

extern "C" fn handle(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the operating system passes the state of the interrupted thread, whose instruction
    // pointer is at an instruction that the CPU has refused. Nothing else borrows `STATE`: only
    // this handler uses it, with the signal blocked.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let start = registers[libc::REG_RIP as usize] as usize;
        let Some((operation, end)) = decode(start as *const u8, registers) else {
            // Not an AMX instruction: it is raised again, and then it ends the process.
            libc::signal(libc::SIGILL, libc::SIG_DFL);
            return;
        };
        let done = STATE.with(|state| (*state.get()).run(operation));
        if done.is_none() {
            let message = b"an AMX instruction that a CPU would refuse\n";
            libc::write(2, message.as_ptr().cast(), message.len());
            libc::abort();
        }
        registers[libc::REG_RIP as usize] = end as i64;
    }
}

impl EmulatedTiles {
    pub(super) const fn new() -> Self {
        Self {
            configured: false,
            tiles: [EMPTY; TILES],
        }
    }

    /// None where the CPU would raise an exception.
    ///
    /// # Safety
    /// The memory at the operation's address is there.
    unsafe fn run(&mut self, operation: Operation) -> Option<()> {
        // SAFETY: passed on to the caller.
        unsafe {
            match operation {
                Operation::Configure(address) => self.configure(&*(address as *const [u8; 64])),
                Operation::Release => {
                    *self = Self::new();
                    Some(())
                }
                Operation::Zero(tile) => {
                    self.tile(tile)?.words = EMPTY.words;
                    Some(())
                }
                Operation::Load(tile, address) => self.load(tile, address),
                Operation::Store(tile, address) => self.store(tile, address),
                Operation::AddBf16(sums, a, b) => {
                    let (a, b) = self.factors(sums, a, b)?;
                    // The handler is installed only with AVX-512, which includes AVX2 and FMA.
                    add_bf16_products(self.tile(sums)?, &a, &b);
                    Some(())
                }
                Operation::AddBytes(sums, a, b) => {
                    let (a, b) = self.factors(sums, a, b)?;
                    add_byte_products(self.tile(sums)?, &a, &b);
                    Some(())
                }
            }
        }
    }

    /// A configured tile.
    fn tile(&mut self, number: usize) -> Option<&mut EmulatedTile> {
        let tile = self.tiles.get_mut(number)?;
        (self.configured && tile.rows > 0).then_some(tile)
    }

    /// `ldtilecfg`.
    pub(super) fn configure(&mut self, config: &[u8; 64]) -> Option<()> {
        *self = Self::new();
        if config[0] == 0 {
            return Some(());
        }
        let rows = &config[48..];
        let bytes = |tile: usize| {
            let index = 16 + 2 * tile;
            usize::from(u16::from_le_bytes([config[index], config[index + 1]]))
        };
        let reserved = config[1..16].iter().all(|byte| *byte == 0);
        if config[0] != 1 || !reserved {
            return None;
        }
        for number in 0..16 {
            let (rows, bytes) = (usize::from(rows[number]), bytes(number));
            let used = rows > 0 || bytes > 0;
            if used && (rows == 0 || bytes == 0 || rows > ROWS || bytes > 4 * WORDS) {
                return None;
            }
            match self.tiles.get_mut(number) {
                Some(tile) => (tile.rows, tile.bytes) = (rows, bytes),
                None if used => return None,
                None => {}
            }
        }
        self.configured = true;
        Some(())
    }

    /// # Safety
    /// The memory of the tile's rows is there.
    unsafe fn load(&mut self, number: usize, address: TileAddress) -> Option<()> {
        let tile = self.tile(number)?;
        tile.words = EMPTY.words;
        for (row, words) in tile.words.iter_mut().take(tile.rows).enumerate() {
            // SAFETY: a row has at most 64 bytes, and in memory there are as many.
            unsafe {
                let to = words.as_mut_ptr().cast::<u8>();
                to.copy_from_nonoverlapping(address.row(row) as *const u8, tile.bytes);
            }
        }
        Some(())
    }

    /// # Safety
    /// As above.
    unsafe fn store(&mut self, number: usize, address: TileAddress) -> Option<()> {
        let tile = self.tile(number)?;
        for (row, words) in tile.words.iter().take(tile.rows).enumerate() {
            // SAFETY: as above.
            unsafe {
                let from = words.as_ptr().cast::<u8>();
                from.copy_to_nonoverlapping(address.row(row) as *mut u8, tile.bytes);
            }
        }
        Some(())
    }

    /// The two operands of a multiplication, if their shapes fit each other and the sums.
    pub(super) fn factors(
        &mut self,
        sums: usize,
        a: usize,
        b: usize,
    ) -> Option<(EmulatedTile, EmulatedTile)> {
        let (left, right, sums_tile) = (*self.tile(a)?, *self.tile(b)?, *self.tile(sums)?);
        let fit = sums != a
            && sums != b
            && a != b
            && left.bytes % 4 == 0
            && right.bytes % 4 == 0
            && sums_tile.rows == left.rows
            && sums_tile.bytes == right.bytes
            && left.bytes / 4 == right.rows;
        fit.then_some((left, right))
    }
}

/// `tdpbf16ps`: the even and the odd elements are accumulated separately, then added to each other
/// and then to the sum. Each step rounds to the nearest float; subnormal numbers are zero.
#[target_feature(enable = "avx2,fma")]
fn add_bf16_products(sums: &mut EmulatedTile, a: &EmulatedTile, b: &EmulatedTile) {
    let halves =
        |word: u32| [word << 16, word & 0xffff_0000].map(|bits| flush(f32::from_bits(bits)));
    for (sums, a) in sums.words.iter_mut().zip(&a.words).take(sums.rows) {
        let mut parts = [[0.0f32; 2]; WORDS];
        for (a, b) in a.iter().zip(&b.words).take(b.rows) {
            let a = halves(*a);
            for (parts, b) in parts.iter_mut().zip(b).take(sums.len()) {
                let b = halves(*b);
                for half in 0..2 {
                    parts[half] = flush(a[half].mul_add(b[half], parts[half]));
                }
            }
        }
        for (sum, parts) in sums.iter_mut().zip(parts) {
            let added = flush(parts[0] + parts[1]);
            *sum = flush(flush(f32::from_bits(*sum)) + added).to_bits();
        }
    }
}

/// Zero instead of a subnormal number.
fn flush(value: f32) -> f32 {
    if value.is_subnormal() {
        0f32.copysign(value)
    } else {
        value
    }
}

/// `tdpbusd`: bytes of `a` are unsigned, those of `b` signed.
fn add_byte_products(sums: &mut EmulatedTile, a: &EmulatedTile, b: &EmulatedTile) {
    for (sums, a) in sums.words.iter_mut().zip(&a.words).take(sums.rows) {
        for (a, b) in a.iter().zip(&b.words).take(b.rows) {
            let a = a.to_le_bytes();
            for (sum, b) in sums.iter_mut().zip(b) {
                let bytes = a.iter().zip(b.to_le_bytes());
                let products = bytes.map(|(a, b)| i32::from(*a) * i32::from(b as i8));
                *sum = sum.wrapping_add(products.sum::<i32>() as u32);
            }
        }
    }
}
