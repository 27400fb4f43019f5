//! What a kernel may ask of a CPU: [`Simd`], sixteen lanes at a time, with one implementation for each instruction set.
//!
//! A kernel is a [`Kernel`]: one text, generic over [`Simd`], compiled once for each instruction set and entered through
//! [`Isa::run`]. All implementations do the same operations in the same order, fused multiply-adds included, so a kernel
//! gives the same bits on every one of them; [`scalar`] is the reference that says which.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
pub mod scalar;

/// Lanes of a vector, whatever the registers' width.
pub const LANES: usize = 16;

/// An instruction set that kernels are compiled for and that this CPU has: there is no other way to one than
/// [`available`](Isa::available).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Isa(Set);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Set {
    /// AVX-512 F, BW, VL, DQ and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Plain Rust.
    Scalar,
}

impl Isa {
    /// Plain Rust, which every CPU has: the reference.
    pub const SCALAR: Isa = Isa(Set::Scalar);

    /// Every instruction set that this CPU has, best first. Plain Rust is always the last.
    pub fn available() -> Vec<Isa> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if avx512::is_available() {
                found.push(Isa(Set::Avx512));
            }
            if avx2::is_available() {
                found.push(Isa(Set::Avx2));
            }
        }
        found.push(Isa(Set::Scalar));
        found
    }

    /// The best that this CPU has.
    pub fn detect() -> Isa {
        static BEST: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }

    /// Its name as options have it.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            Set::Scalar => "scalar",
        }
    }

    /// Runs a kernel compiled for this instruction set.
    ///
    /// # Safety
    /// The kernel's own conditions hold.
    #[inline]
    pub unsafe fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: an `Isa` is one that this CPU has; the kernel's conditions are the caller's.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512::enter(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2::enter(kernel) },
            // SAFETY: as above.
            Set::Scalar => unsafe { kernel.run::<scalar::Scalar>() },
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Isa {
    type Err = crate::Error;

    fn from_str(name: &str) -> crate::Result<Isa> {
        let available = Isa::available();
        available.iter().copied().find(|isa| isa.name() == name).ok_or_else(|| {
            let names: Vec<&str> = available.iter().map(|isa| isa.name()).collect();
            crate::Error::option("isa", format!("`{name}` is not one that this CPU has: {}", names.join(", ")))
        })
    }
}

/// Something to compute with any instruction set. `run` must be `#[inline(always)]`, and so must all that it calls with
/// `S`, or it is not compiled for the instruction set.
pub trait Kernel {
    /// What it returns.
    type Output;

    /// Computes.
    ///
    /// # Safety
    /// The CPU has the instructions of `S`; the pointers in `self` are as its documentation says.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Sixteen lanes of an instruction set. Loads and stores need no alignment.
///
/// # Safety of all functions
/// The CPU has the instruction set, and pointers point to as many elements as are loaded or stored.
#[allow(clippy::missing_safety_doc, missing_docs)]
pub trait Simd: Copy + 'static {
    /// 16 f32.
    type F: Copy;
    /// 16 i32.
    type I: Copy;
    /// 64 bytes: 16 lanes of 4.
    type B: Copy;

    /// How many vectors of `F` fit the registers.
    const REGISTERS: usize;

    /// `dot_i8` adds this times the sum of x's four bytes to each lane; whoever uses it takes that off.
    const I8_OFFSET: i32;

    unsafe fn splat(value: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn store(to: *mut f32, value: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The greater of each pair; `b` where either is NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// The lesser of each pair; `b` where either is NaN.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// Without sign.
    unsafe fn abs(a: Self::F) -> Self::F;
    /// Sum of all lanes: halves are added to each other until one lane is left.
    unsafe fn sum(a: Self::F) -> f32;
    /// Greatest lane.
    unsafe fn greatest(a: Self::F) -> f32;

    unsafe fn load_f16(from: *const f16) -> Self::F;
    unsafe fn load_bf16(from: *const bf16) -> Self::F;
    /// Rounds to nearest, ties to even.
    unsafe fn store_f16(to: *mut f16, value: Self::F);

    unsafe fn splat_i(value: i32) -> Self::I;
    /// 16 bytes, sign-extended.
    unsafe fn load_i8(from: *const i8) -> Self::I;
    /// 16 bytes, zero-extended.
    unsafe fn load_u8(from: *const u8) -> Self::I;
    /// The low byte of each lane.
    unsafe fn store_i8(to: *mut i8, value: Self::I);
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn and_i(a: Self::I, mask: i32) -> Self::I;
    unsafe fn shl_i<const N: u32>(a: Self::I) -> Self::I;
    /// Zeros come in from the left.
    unsafe fn shr_i(a: Self::I, count: usize) -> Self::I;
    unsafe fn sum_i(a: Self::I) -> i32;
    unsafe fn to_f32(a: Self::I) -> Self::F;
    /// To nearest, ties to even. The values must be within i32.
    unsafe fn round(a: Self::F) -> Self::I;
    /// 2 to the power of each lane, which must be in -126..=127.
    unsafe fn power_of_two(a: Self::I) -> Self::F;

    /// Asks for the cache line at `at`, which need not be memory of ours.
    unsafe fn prefetch(at: *const u8);
    unsafe fn load_bytes(from: *const u8) -> Self::B;
    unsafe fn splat_bytes(value: u8) -> Self::B;
    unsafe fn and(a: Self::B, b: Self::B) -> Self::B;
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B;
    /// Shifts left by `N`; bits of neighbouring bytes come in, mask them off.
    unsafe fn shl<const N: u32>(a: Self::B) -> Self::B;
    /// Shifts right by `N`; bits of neighbouring bytes come in, mask them off.
    unsafe fn shr<const N: u32>(a: Self::B) -> Self::B;
    /// Adds to each lane the dot product of its four bytes, which must be below 128, with the four at `x`.
    unsafe fn dot_u7(acc: Self::I, w: Self::B, x: *const i8) -> Self::I;
    /// Adds to each lane the dot product of its four signed bytes with the four at `x`, plus `I8_OFFSET` times their sum.
    unsafe fn dot_i8(acc: Self::I, w: Self::B, x: *const i8) -> Self::I;
}
