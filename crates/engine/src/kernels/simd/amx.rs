//! Detection of AMX, and the operating system's permission to use it.

use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::sync::OnceLock;

/// CPUID leaf 7, EDX: AMX-BF16, AMX-TILE, AMX-INT8.
const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// XCR0: the operating system saves the tile configuration and the tiles on a context switch.
const TILE_STATE: u64 = 1 << 17 | 1 << 18;
/// Requests permission for a part of the CPU's state that a process has no memory for by default,
/// here the tiles (Linux, "Using XSTATE features in user space applications").
const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
const XFEATURE_XTILEDATA: libc::c_long = 18;

#[cfg(test)]
thread_local! {
    /// Whether AMX is emulated for the tests on this thread.
    pub(in super::super) static EMULATED: std::cell::Cell<bool> =
        const { std::cell::Cell::new(false) };
}

/// Whether AMX is supported. The caller has checked AVX-512.
pub(super) fn supported() -> bool {
    #[cfg(test)]
    if EMULATED.get() {
        return true;
    }
    is_native()
}

/// Whether the CPU supports AMX without emulation. Checked once: the permission is for the whole
/// process, for current and future threads.
pub(in super::super) fn is_native() -> bool {
    static NATIVE: OnceLock<bool> = OnceLock::new();
    *NATIVE.get_or_init(|| has_features() && saves_tile_state() && request_permission())
}

fn has_features() -> bool {
    __cpuid_count(7, 0).edx & FEATURES == FEATURES
}

fn saves_tile_state() -> bool {
    #[target_feature(enable = "xsave")]
    fn xcr0() -> u64 {
        // SAFETY: register 0 exists where XSAVE is supported.
        unsafe { _xgetbv(0) }
    }
    // SAFETY: called only where XSAVE is supported.
    is_x86_feature_detected!("xsave") && unsafe { xcr0() } & TILE_STATE == TILE_STATE
}

/// A refusal, be it of an old Linux kernel or of a sandbox, means that AMX is not supported.
fn request_permission() -> bool {
    // SAFETY: the call takes two integers and returns a status.
    let status = unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        )
    };
    status == 0
}
