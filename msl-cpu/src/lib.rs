//! Runs Metal Shading Language kernels on the CPU, for tests on machines without Metal.
//!
//! A `.metal` file is preprocessed, rewritten to C++ ([`Builder::generate`] shows it), compiled with the system's C++
//! compiler into a shared object (cached by content), loaded, and run by `cpp/msl_rt.cpp`: one threadgroup at a time,
//! every GPU thread a fiber. The API follows Metal's own:
//!
//! ```no_run
//! let lib = msl_cpu::Library::compile("kernels/row_dot.metal")?;
//! let (w, x, mut y) = (vec![0u16; 64 * 256], vec![0f32; 256], vec![0f32; 64]);
//! lib.encode("row_dot")
//!     .buffer(0, &w)
//!     .buffer(1, &x)
//!     .buffer_mut(2, &mut y)
//!     .value(3, 256u32)
//!     .dispatch_threadgroups([64, 1, 1], [32, 1, 1])?;
//! # Ok::<(), msl_cpu::Error>(())
//! ```
//!
//! [`CpuEncoder`] runs what metal-ext's host code dispatches, so that grids, offsets and arguments are tested too.
//!
//! What a run reports: barriers and simdgroup operations that not all threads reach alike, accesses out of bounds,
//! misaligned or to read-only buffers, data races, reads of uninitialised threadgroup memory, endless loops, too much
//! threadgroup memory, arguments that are missing or short; always with file and line of the kernel.
//!
//! What it cannot tell: whether Apple's compiler takes the source (this one is laxer), how a GPU rounds, and how fast
//! anything is. Needs `c++` on the PATH (g++ from 12, clang++ from 15); the variable `MSL_CXX` names another.

// This crate loads code that it has just compiled and hands it raw memory: that is all it is for, and each block says
// why it holds. It is never published and only ever used by tests.
#![allow(unsafe_code)]

mod compile;
mod encoder;
mod half;
mod launch;
mod rewrite;

use std::fmt;

pub use compile::Builder;
pub use encoder::{Check, CpuBuffer, CpuEncoder};
pub use half::{f16, f32_of};
pub use launch::{Encoder, Library};

/// What went wrong, as text: a compiler message, or the report of the failed run.
pub struct Error(pub String);

/// The result of compiling or running.
pub type Result<T> = std::result::Result<T, Error>;

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// Plain data that may be copied into a kernel argument.
///
/// # Safety
/// The type must have no padding and accept any bit pattern the kernel may write.
pub unsafe trait Pod: Copy {}
macro_rules! pod {
    ($($t:ty)*) => {
        // SAFETY: numbers have no padding and accept any bits.
        $(unsafe impl Pod for $t {})*
    };
}
pod!(u8 i8 u16 i16 u32 i32 u64 i64 f32);
// SAFETY: arrays add no padding between elements.
unsafe impl<T: Pod, const N: usize> Pod for [T; N] {}

/// Ways to be laxer than the MSL specification; combine with `|`. For third-party kernels that lean on what Apple GPUs
/// happen to do. metal-ext's own kernels pass without any.
pub mod allow {
    /// A barrier inside divergent code: released once every thread waits there or has returned.
    pub const PARTIAL_BARRIER: u32 = 1;
    /// Lanes of one simdgroup stop at different simd operations.
    pub const DIVERGENT_SIMD: u32 = 2;
    /// `mem_none` barriers order memory too.
    pub const MEM_NONE_FENCES: u32 = 4;
    /// Loads and stores below their natural alignment, for types of up to 8 bytes.
    pub const MISALIGNED: u32 = 8;
    /// Skips race detection on device buffers.
    pub const DEVICE_RACES: u32 = 16;
    /// The kernel works on the host's memory itself instead of a copy between guard pages. For fast builds.
    pub const IN_PLACE: u32 = 32;
}

/// The order in which the threads of a simdgroup, the simdgroups of a threadgroup and the threadgroups of a grid take
/// their turns. A correct kernel gives the same bits for all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    /// By index.
    Forward,
    /// By index, last first.
    Reverse,
    /// In an order that this seed gives.
    Shuffled(u64),
}

/// Counters of one launch.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Threads run.
    pub threads: u64,
    /// Switches between fibers.
    pub switches: u64,
    /// Barriers passed.
    pub barriers: u64,
    /// Simdgroup operations.
    pub simd_ops: u64,
    /// Memory accesses checked (0 in a fast build).
    pub accesses: u64,
    /// Simdgroup operations with some lanes already returned (legal for reductions).
    pub partial_simd_ops: u64,
    /// Shuffles from such lanes (undefined; the result is poison).
    pub inactive_reads: u64,
    /// Unordered writes of identical bytes to one place (benign).
    pub same_value_races: u64,
    /// Threadgroup memory of one threadgroup.
    pub threadgroup_bytes: u32,
}
