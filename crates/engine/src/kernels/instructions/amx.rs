//! Whether the processor has AMX, and the system lets this process use it.

use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::sync::OnceLock;

/// Of CPUID's leaf 7, in EDX: products of bfloat16, tiles, products of 8-bit integers.
const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// Of XCR0: the system keeps the tiles' configuration and the tiles when threads take turns.
const KEPT: u64 = 1 << 17 | 1 << 18;
/// Asks for a part of the processor's state that not every process has memory for, here the
/// tiles (Linux, "Using XSTATE features in user space applications").
const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
const XFEATURE_XTILEDATA: libc::c_long = 18;

#[cfg(test)]
thread_local! {
    /// Whether tiles are emulated for what this thread tests.
    pub(in super::super) static EMULATED: std::cell::Cell<bool> =
        const { std::cell::Cell::new(false) };
}

/// Whether there are tiles. The caller has asked for AVX-512.
pub(super) fn supported() -> bool {
    #[cfg(test)]
    if EMULATED.get() {
        return true;
    }
    here()
}

/// Whether they are there without emulation. Asked once: the permission is the whole process', for
/// threads that run and threads to come.
pub(in super::super) fn here() -> bool {
    static HERE: OnceLock<bool> = OnceLock::new();
    *HERE.get_or_init(|| features() && kept() && permitted())
}

fn features() -> bool {
    __cpuid_count(7, 0).edx & FEATURES == FEATURES
}

fn kept() -> bool {
    #[target_feature(enable = "xsave")]
    fn xcr0() -> u64 {
        // SAFETY: register 0 is there where XSAVE is.
        unsafe { _xgetbv(0) }
    }
    // SAFETY: a processor whose system uses AVX-512 has XSAVE.
    is_x86_feature_detected!("xsave") && unsafe { xcr0() } & KEPT == KEPT
}

/// A refusal, be it of an old kernel or of a sandbox, means that there are no tiles.
fn permitted() -> bool {
    // SAFETY: two numbers go in, and a status comes out.
    let status = unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        )
    };
    status == 0
}
