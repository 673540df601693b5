//! Every form of the AMX instructions, on tiles of many shapes; on a CPU without AMX these test the
//! emulation. GEMM itself is tested with that of the other instruction sets.

use std::arch::asm;

use half::bf16;

use super::super::super::{
    Activation, InstructionSet, Matrix, MatrixDtype, PackedWeights, WeightDtype, matmul,
};
use super::super::{GemmJob, GemmOutput, WordRows};
use super::emulated::{self, EmulatedTiles};
use super::{TileConfig, repeat, run_gemm};

/// Whether AMX is supported or emulated; emulation requires AVX-512.
fn is_supported() -> bool {
    emulated::install_where_missing();
    InstructionSet::Amx.supported()
}

fn tile_config(of: impl Fn(usize) -> (usize, usize)) -> TileConfig {
    let mut config = TileConfig {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        bytes: [0; 16],
        rows: [0; 16],
    };
    for tile in 0..8 {
        let (rows, bytes) = of(tile);
        config.rows[tile] = rows as u8;
        config.bytes[tile] = bytes as u16;
    }
    config
}

fn load_config(config: &TileConfig) {
    // SAFETY: 64 bytes are there; the caller has checked that AMX is supported.
    unsafe { asm!("ldtilecfg [{}]", in(reg) config, options(nostack)) }
}

fn release() {
    // SAFETY: no tile is in use.
    unsafe { super::release() }
}

/// Bytes from one row of memory to the next, where an instruction has no other stride.
const LINE: usize = 256;

#[repr(C, align(64))]
struct Memory([u8; 16 * LINE]);

impl Memory {
    fn counted() -> Self {
        let mut memory = Self([0; 16 * LINE]);
        for (index, byte) in memory.0.iter_mut().enumerate() {
            *byte = (index * 7 + index / LINE * 3 + 1) as u8;
        }
        memory
    }
}

/// A shape for each tile, different from all others: rows, and bytes of each.
fn shape_of(tile: usize) -> (usize, usize) {
    (2 * tile + 2, 64 - 4 * tile)
}

/// Checks that the loaded tile is in `to`, and that nothing else changed.
fn check_copy(tile: usize, from: &Memory, stride: usize, to: &Memory) {
    let (rows, bytes) = shape_of(tile);
    for (index, byte) in to.0.iter().enumerate() {
        let (row, column) = (index / LINE, index % LINE);
        let inside = row < rows && column < bytes;
        let due = if inside {
            from.0[row * stride + column]
        } else {
            0xee
        };
        assert_eq!(*byte, due, "tile {tile}, row {row}, byte {column}");
    }
}

/// Loads a tile from one address and stores it to another. An address is the operand of the
/// instruction, the register of its base and the offset, the register of its index and the index.
macro_rules! copy {
    ($tile:literal, $load:literal,
     [$from:literal, $base:tt $offset:literal, $index:tt $count:literal], $stride:literal,
     [$to:literal, $to_base:tt $to_offset:literal, $to_index:tt $to_count:literal]) => {{
        let (from, mut to) = (Memory::counted(), Memory([0xee; 16 * LINE]));
        // SAFETY: all of a tile's rows are inside of the memory.
        unsafe {
            asm!(
                concat!($load, " tmm", $tile, ", [", $from, "]"),
                concat!("tilestored [", $to, "], tmm", $tile),
                in($base) from.0.as_ptr().wrapping_offset(-$offset),
                in($index) $count,
                in($to_base) to.0.as_mut_ptr().wrapping_offset(-$to_offset),
                in($to_index) $to_count,
                options(nostack),
            );
        }
        check_copy($tile, &from, $stride, &to);
    }};
}

#[test]
fn tiles_are_copied_by_any_address() {
    if !is_supported() {
        return;
    }
    load_config(&tile_config(shape_of));
    copy!(0, "tileloadd", ["rax + rcx", "rax" 0, "rcx" 256u64], 256,
        ["rdx + rsi", "rdx" 0, "rsi" 256u64]);
    copy!(1, "tileloaddt1", ["r8 + 2*r9 + 64", "r8" 64, "r9" 32u64], 64,
        ["r12 + 4*r13 - 64", "r12" -64, "r13" 64u64]);
    copy!(2, "tileloadd", ["r13 + r12", "r13" 0, "r12" 128u64], 128,
        ["r10 + 8*r11 + 4096", "r10" 4096, "r11" 32u64]);
    copy!(3, "tileloadd", ["rdi", "rdi" 0, "rcx" 99u64], 0,
        ["r14 + r15", "r14" 0, "r15" 256u64]);
    copy!(4, "tileloaddt1", ["rsi + 8*rdi - 4096", "rsi" -4096, "rdi" 8u64], 64,
        ["rax + 2*r12 + 127", "rax" 127, "r12" 128u64]);
    copy!(5, "tileloadd", ["r15 + rax - 128", "r15" -128, "rax" 192u64], 192,
        ["r13 + r14", "r13" 0, "r14" 256u64]);
    copy!(6, "tileloadd", ["r12 + 4*rdx + 128", "r12" 128, "rdx" 64u64], 256,
        ["rdi + r8", "rdi" 0, "r8" 256u64]);
    copy!(7, "tileloadd", ["r11 + r10", "r11" 0, "r10" 60u64], 60,
        ["rcx + rdx", "rcx" 0, "rdx" 256u64]);
    release();
}

/// A configuration at a fixed address.
static FIXED: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [3, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Loads the configuration from an address and stores one tile right after that, and after it was
/// filled and cleared: both times three rows of zeros.
macro_rules! zeros {
    ($address:literal, $($operand:tt)*) => {{
        let from = Memory::counted();
        let (mut fresh, mut cleared) = (Memory([0xee; 16 * LINE]), Memory([0xee; 16 * LINE]));
        // SAFETY: a configuration is at the address, and three rows are in each memory.
        unsafe {
            asm!(
                concat!("ldtilecfg [", $address, "]"),
                "tilestored [{fresh} + {line}], tmm0",
                "tileloadd tmm0, [{from} + {line}]",
                "tilezero tmm0",
                "tilestored [{cleared} + {line}], tmm0",
                "tilerelease",
                from = in(reg) &from,
                fresh = in(reg) &raw mut fresh,
                cleared = in(reg) &raw mut cleared,
                line = in(reg) LINE,
                $($operand)*,
                options(nostack),
            );
        }
        for memory in [&fresh, &cleared] {
            for (index, byte) in memory.0.iter().enumerate() {
                let inside = index / LINE < 3 && index % LINE < 64;
                assert_eq!(*byte, if inside { 0 } else { 0xee }, "{} at {index}", $address);
            }
        }
    }};
}

#[test]
fn new_and_cleared_tiles_are_zeros() {
    if !is_supported() {
        return;
    }
    let fixed = &raw const FIXED;
    zeros!("rip + {config}", config = sym FIXED);
    zeros!("rax", in("rax") fixed);
    zeros!("r12 - 64", in("r12") fixed.wrapping_byte_add(64));
    zeros!("r13", in("r13") fixed);
    zeros!("rsi + 4*rdi + 256", in("rsi") fixed.wrapping_byte_sub(356), in("rdi") 25u64);
}

/// BlockSums, inputs and weights: 16 rows of 16 words each.
#[derive(Clone)]
struct Factors {
    sums: [[u32; 16]; 16],
    a: [[u32; 16]; 16],
    b: [[u32; 16]; 16],
}

/// Loads three tiles, multiplies, and stores the sums.
macro_rules! multiply {
    ($multiply:literal, $sums:literal, $a:literal, $b:literal, $factors:expr) => {{
        let factors: &mut Factors = $factors;
        // SAFETY: each has 16 rows of 16 words.
        unsafe {
            asm!(
                concat!("tileloadd tmm", $sums, ", [{sums} + {line}]"),
                concat!("tileloadd tmm", $a, ", [{a} + {line}]"),
                concat!("tileloadd tmm", $b, ", [{b} + {line}]"),
                concat!($multiply, " tmm", $sums, ", tmm", $a, ", tmm", $b),
                concat!("tilestored [{sums} + {line}], tmm", $sums),
                sums = in(reg) factors.sums.as_mut_ptr(),
                a = in(reg) factors.a.as_ptr(),
                b = in(reg) factors.b.as_ptr(),
                line = in(reg) 64u64,
                options(nostack),
            );
        }
    }};
}

/// Both multiplications of tiles of this shape: rows, columns and steps. The numbers have so few
/// bits that every order of addition has the same result.
macro_rules! check_products {
    ($sums:literal, $a:literal, $b:literal, $rows:literal, $columns:literal, $steps:literal) => {{
        let mut number = 0u32;
        let mut next = || {
            number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            number >> 8
        };
        let mut words = |of: &mut dyn FnMut(u32) -> u32| {
            [[0; 16]; 16].map(|row: [u32; 16]| row.map(|_| of(next())))
        };
        let small = |bits: u32| bf16::from_f32(bits as f32 % 32.0 - 16.0).to_bits();
        let mut pair = |bits: u32| u32::from(small(bits)) | u32::from(small(bits >> 8)) << 16;
        let numbers = Factors {
            sums: words(&mut |bits| (bits as f32 % 64.0).to_bits()),
            a: words(&mut pair),
            b: words(&mut pair),
        };
        let bytes = Factors {
            sums: words(&mut |bits| bits),
            a: words(&mut |bits| bits.rotate_left(bits % 32)),
            b: words(&mut |bits| bits.rotate_left(bits % 31)),
        };
        load_config(&tile_config(|tile| match tile {
            $sums => ($rows, 4 * $columns),
            $a => ($rows, 4 * $steps),
            $b => ($steps, 4 * $columns),
            _ => (1, 4),
        }));
        let (mut number_sums, mut byte_sums) = (numbers.clone(), bytes.clone());
        multiply!("tdpbf16ps", $sums, $a, $b, &mut number_sums);
        multiply!("tdpbusd", $sums, $a, $b, &mut byte_sums);
        release();
        for (row, column) in (0..16).flat_map(|row| (0..16).map(move |column| (row, column))) {
            let (mut number, mut byte) = (numbers.sums[row][column], bytes.sums[row][column]);
            if row < $rows && column < $columns {
                let steps = (0..$steps).map(|step| [step, row, column]);
                let added: f32 = steps.clone().map(|at| number_products(&numbers, at)).sum();
                number = (f32::from_bits(number) + added).to_bits();
                let added: i32 = steps.map(|at| byte_products(&bytes, at)).sum();
                byte = byte.wrapping_add_signed(added);
            }
            assert_eq!(
                number_sums.sums[row][column], number,
                "numbers at {row}, {column}"
            );
            assert_eq!(
                byte_sums.sums[row][column], byte,
                "bytes at {row}, {column}"
            );
        }
    }};
}

fn number_products(factors: &Factors, [step, row, column]: [usize; 3]) -> f32 {
    let halves = |word: u32| [word << 16, word & 0xffff_0000].map(f32::from_bits);
    let (a, b) = (
        halves(factors.a[row][step]),
        halves(factors.b[step][column]),
    );
    a[0] * b[0] + a[1] * b[1]
}

fn byte_products(factors: &Factors, [step, row, column]: [usize; 3]) -> i32 {
    let a = factors.a[row][step].to_le_bytes();
    let b = factors.b[step][column].to_le_bytes();
    let products = a.into_iter().zip(b);
    products
        .map(|(a, b)| i32::from(a) * i32::from(b as i8))
        .sum()
}

#[test]
fn tile_multiplications_add_to_the_sums() {
    if !is_supported() {
        return;
    }
    check_products!(0, 4, 6, 16, 16, 16);
    check_products!(7, 1, 2, 1, 16, 3);
    check_products!(3, 5, 0, 5, 7, 16);
    check_products!(2, 7, 3, 16, 1, 9);
    check_products!(6, 0, 7, 11, 13, 1);
    check_products!(1, 2, 5, 15, 16, 2);
}

#[test]
fn bfloat16_is_accumulated_in_the_order_of_the_manual() {
    if !is_supported() {
        return;
    }
    let zeros = [[0; 16]; 16];
    let both = |low: f32, high: f32| {
        let bits = |value| u32::from(bf16::from_f32(value).to_bits());
        bits(low) | bits(high) << 16
    };
    let mut factors = Factors {
        sums: zeros,
        a: zeros,
        b: zeros,
    };
    let least = 2f32.powi(-24);
    factors.b[0].fill(both(1.0, 1.0));
    // Each half alone would be lost in one; their sum is not.
    factors.sums[0][0] = 1f32.to_bits();
    factors.a[0][0] = both(least, least);
    // The smallest number is subnormal: zero.
    factors.a[1][0] = 1;
    // One whose product would be subnormal: zero.
    factors.a[2][0] = both(2f32.powi(-126), 0.0);
    factors.b[0][2] = both(0.5, 0.5);
    load_config(&tile_config(|_| (16, 64)));
    multiply!("tdpbf16ps", 0, 1, 2, &mut factors);
    release();
    assert_eq!(f32::from_bits(factors.sums[0][0]), 1.0 + 2.0 * least);
    assert_eq!(factors.sums[1][0], 0);
    assert_eq!(f32::from_bits(factors.sums[2][1]), 2f32.powi(-126));
    assert_eq!(factors.sums[2][2], 0);
}

/// Words in front of a page without access.
struct Guarded {
    start: *mut libc::c_void,
    end: *mut u32,
}

const PAGES: usize = 1 << 16;

impl Guarded {
    fn new() -> Self {
        // SAFETY: new memory, of which the last pages have no access.
        unsafe {
            let (protection, kind) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            let start = libc::mmap(std::ptr::null_mut(), 2 * PAGES, protection, kind, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            let end = start.byte_add(PAGES);
            assert_eq!(libc::mprotect(end, PAGES, libc::PROT_NONE), 0);
            Self {
                start,
                end: end.cast(),
            }
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, which is not used any more.
        unsafe { libc::munmap(self.start, 2 * PAGES) };
    }
}

/// A share of three panels, with rows of 64 elements that end at a page without access.
fn check_share(rows: usize, panels: std::ops::Range<usize>) {
    let (inputs, outputs) = (64, 192);
    let whole = |count: usize, of: usize| -> Vec<f32> {
        (0..count).map(|at| (at * 7 % of) as f32 - 3.0).collect()
    };
    let (input, weights) = (whole(rows * inputs, 11), whole(outputs * inputs, 13));
    let pack = |set| PackedWeights::new(set, WeightDtype::Bf16, &weights, None, inputs);
    let due = matmul(
        &pack(InstructionSet::Avx512Bf16),
        &Matrix::from_floats(&input, inputs),
        Activation::Identity,
        MatrixDtype::F32,
    );
    let guarded = Guarded::new();
    let mut output = Matrix::from_floats(&vec![0.0; rows * outputs], outputs);
    // SAFETY: there is room for the input, and each row has 32 words.
    unsafe {
        let start = guarded.end.sub(rows * inputs / 2);
        for (at, value) in input.iter().enumerate() {
            *start.cast::<u16>().add(at) = bf16::from_f32(*value).to_bits();
        }
        run_gemm(&GemmJob {
            weights: &pack(InstructionSet::Amx),
            panels: panels.clone(),
            input: WordRows {
                start,
                stride: inputs / 2,
            },
            rows,
            row_scales: std::ptr::null(),
            output: GemmOutput {
                start: output.pointer_mut(),
                width: outputs,
                stride: outputs,
                dtype: MatrixDtype::F32,
            },
            activation: Activation::Identity,
        });
    }
    for (at, (value, due)) in output.floats().iter().zip(due.floats()).enumerate() {
        let inside = panels.contains(&(at % outputs / 64));
        assert_eq!(
            *value,
            if inside { *due } else { 0.0 },
            "{rows} rows, {panels:?}, at {at}"
        );
    }
}

#[test]
fn no_row_beyond_the_last_is_read() {
    if !is_supported() {
        return;
    }
    for rows in [1, 15, 16, 17, 31, 32, 33, 48, 60, 64, 65, 95] {
        check_share(rows, 0..3);
        check_share(rows, 1..3);
    }
}

#[test]
fn the_peak_benchmark_runs() {
    if !is_supported() {
        return;
    }
    for dtype in [WeightDtype::Bf16, WeightDtype::Int8] {
        // SAFETY: AMX is supported.
        unsafe { repeat(dtype, &[0; 4096], 2) };
    }
}

#[test]
fn the_emulation_refuses_invalid_configurations() {
    let refuses = |config: &[u8; 64]| EmulatedTiles::new().configure(config).is_none();
    let mut good = [0; 64];
    good[0] = 1;
    for tile in 0..8 {
        good[16 + 2 * tile] = 64;
        good[48 + tile] = 16;
    }
    assert!(!refuses(&good));
    // Another palette, a reserved byte, a ninth tile, 17 rows, 65 bytes, and rows of no bytes.
    for (index, byte) in [(0, 2), (5, 1), (32, 4), (50, 17), (20, 65), (20, 0)] {
        let mut bad = good;
        bad[index] = byte;
        assert!(refuses(&bad), "byte {index} is {byte}");
    }
    let mut tiles = EmulatedTiles::new();
    assert!(tiles.factors(0, 1, 2).is_none(), "no configuration");
    good[48] = 3;
    good[49] = 3;
    tiles.configure(&good);
    assert!(tiles.factors(0, 1, 2).is_some());
    assert!(
        tiles.factors(0, 1, 1).is_none(),
        "a tile multiplied by itself"
    );
    assert!(tiles.factors(3, 1, 2).is_none(), "more sums than rows");
    assert!(tiles.factors(8, 1, 2).is_none(), "there are eight tiles");
}
