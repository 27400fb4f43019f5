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
#[cfg(target_arch = "aarch64")]
pub mod neon;
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
    /// The same, and AMX's tiles.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// NEON with the dot product instructions.
    #[cfg(target_arch = "aarch64")]
    NeonDot,
    /// NEON without them.
    #[cfg(target_arch = "aarch64")]
    Neon,
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
                if crate::kernels::tiles::is_available() {
                    found.push(Isa(Set::Amx));
                }
                found.push(Isa(Set::Avx512));
            }
            if avx2::is_available() {
                found.push(Isa(Set::Avx2));
            }
        }
        #[cfg(target_arch = "aarch64")]
        if neon::has_dot() {
            found.push(Isa(Set::NeonDot));
        } else if neon::is_available() {
            found.push(Isa(Set::Neon));
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
            Set::Amx => "amx",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            #[cfg(target_arch = "aarch64")]
            Set::NeonDot | Set::Neon => "neon",
            Set::Scalar => "scalar",
        }
    }

    /// Whether products use tiles.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn has_tiles(self) -> bool {
        self.0 == Set::Amx
    }

    /// Only x86-64 has tiles.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn has_tiles(self) -> bool {
        false
    }

    /// AMX, where it is there or can be emulated.
    #[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn with_tiles() -> Option<Isa> {
        (avx512::has_bf16() && crate::kernels::tiles::is_there_or_emulated()).then_some(Isa(Set::Amx))
    }

    /// Runs a kernel compiled for this instruction set.
    ///
    /// # Safety
    /// The kernel's own conditions hold.
    #[inline]
    pub(crate) unsafe fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: an `Isa` is one that this CPU has; the kernel's conditions are the caller's.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 | Set::Amx => unsafe { avx512::enter(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2::enter(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Set::NeonDot => unsafe { neon::enter_dot(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Set::Neon => unsafe { neon::enter(kernel) },
            // SAFETY: as above.
            Set::Scalar => unsafe { kernel.run::<scalar::Scalar>() },
        }
    }

    /// Runs a kernel compiled for this instruction set and, where the CPU has it and is faster with it, the instruction for
    /// [`dot_bf16`](Simd::dot_bf16). For kernels that use it: every kernel more takes its time to compile.
    ///
    /// # Safety
    /// The kernel's own conditions hold.
    pub(super) unsafe fn run_bf16<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: as of `run`.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 | Set::Amx if avx512::has_fast_bf16() => unsafe { avx512::enter_bf16(kernel) },
            // SAFETY: as above.
            _ => unsafe { self.run(kernel) },
        }
    }

    /// Runs ordinary code that the compiler may use this instruction set's vectors for. A closure that is too long for it to
    /// inline gets none, see `Ordinary`.
    #[inline]
    pub(crate) fn compile<R>(self, code: impl FnOnce() -> R) -> R {
        self.run_ordinary(Short(code))
    }

    /// The same, however long the code is.
    #[inline]
    pub(crate) fn run_ordinary<C: Ordinary>(self, code: C) -> C::Output {
        // SAFETY: ordinary code has no conditions.
        unsafe { self.run(Every(code)) }
    }
}

/// Code without vectors of its own, for every instruction set. `run` must be `#[inline(always)]`, and so must what it calls.
pub trait Ordinary {
    /// What it returns.
    type Output;

    /// Runs.
    fn run(self) -> Self::Output;
}

struct Short<F>(F);

impl<R, F: FnOnce() -> R> Ordinary for Short<F> {
    type Output = R;

    #[inline(always)]
    fn run(self) -> R {
        (self.0)()
    }
}

struct Every<C>(C);

impl<C: Ordinary> Kernel for Every<C> {
    type Output = C::Output;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> C::Output {
        self.0.run()
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

    /// Whether [`dots_u5`](Simd::dots_u5) is less work than [`dot_u7`](Simd::dot_u7) for each.
    const HAS_DOTS_U5: bool = false;

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
    /// Greatest absolute value of both vectors' lanes; NaN if any lane is NaN. As integers, the bits of numbers without
    /// sign are ordered as the numbers are, with NaN behind infinity.
    unsafe fn greatest_abs(a: Self::F, b: Self::F) -> f32;

    unsafe fn load_f16(from: *const f16) -> Self::F;
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
    /// The four bytes at `x` in each lane.
    unsafe fn splat_four(x: *const u8) -> Self::B;
    unsafe fn and(a: Self::B, b: Self::B) -> Self::B;
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B;
    /// Shifts left by `N`; bits of neighbouring bytes come in, mask them off.
    unsafe fn shl<const N: u32>(a: Self::B) -> Self::B;
    /// Shifts right by `N`; bits of neighbouring bytes come in, mask them off.
    unsafe fn shr<const N: u32>(a: Self::B) -> Self::B;
    /// Adds to each lane the dot product of its four bytes, which must be below 128, with the four at `x`.
    unsafe fn dot_u7(acc: Self::I, w: Self::B, x: *const i8) -> Self::I;
    /// Adds to each lane the dot product of its four signed bytes with the four at `x`, plus `I8_OFFSET` times their sum.
    /// None of the four may be -128.
    unsafe fn dot_i8(acc: Self::I, w: Self::B, x: *const i8) -> Self::I;
    /// Adds to each input's lanes the dot products of their bytes in four vectors, which must be below 32, with the input's
    /// sixteen at `x`.
    #[inline(always)]
    unsafe fn dots_u5<const I: usize>(mut dots: [Self::I; I], w: &[Self::B; 4], x: [*const i8; I]) -> [Self::I; I] {
        for j in 0..4 {
            for i in 0..I {
                // SAFETY: the trait's conditions.
                dots[i] = unsafe { Self::dot_u7(dots[i], w[j], x[i].add(4 * j)) };
            }
        }
        dots
    }
    /// The two bf16 of each lane: all first ones, and all second ones.
    unsafe fn widen_bf16(pairs: Self::B) -> [Self::F; 2];
    /// Adds to each lane the products of its two bf16 with the two at `x`, the second first, each sum rounded once. Where
    /// there is an instruction for it, subnormal numbers count as zeros.
    #[inline(always)]
    unsafe fn dot_bf16(acc: Self::F, w: Self::B, x: *const [bf16; 2]) -> Self::F {
        // SAFETY: the trait's conditions.
        unsafe { fma_bf16::<Self>(acc, w, x) }
    }
}

/// [`Simd::dot_bf16`] of widened numbers.
#[inline(always)]
unsafe fn fma_bf16<S: Simd>(acc: S::F, w: S::B, x: *const [bf16; 2]) -> S::F {
    // SAFETY: the trait's conditions.
    unsafe {
        let ([w0, w1], [x0, x1]) = (S::widen_bf16(w), S::widen_bf16(S::splat_four(x.cast())));
        S::fma(w0, x0, S::fma(w1, x1, acc))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an operation gave: its name, the number of its inputs in the list, its results' bits.
    type Found = Vec<(&'static str, usize, Vec<u32>)>;

    /// Every operation on every input, each of which lies one byte behind an aligned address.
    struct Everything<'a>(&'a Inputs);

    struct Inputs {
        floats: Vec<[[f32; LANES]; 3]>,
        /// Without NaN.
        numbers: Vec<[f32; LANES]>,
        /// Within i32.
        small: Vec<[f32; LANES]>,
        halves: Vec<[u16; LANES]>,
        integers: Vec<[[i32; LANES]; 2]>,
        exponents: Vec<[i32; LANES]>,
        bytes: Vec<[[u8; 64]; 2]>,
        fours: Vec<[i8; 4]>,
    }

    /// A copy one byte behind an aligned address, to read from.
    #[repr(C, align(64))]
    struct Shifted<T, const N: usize>(u8, Bytes<T, N>);

    #[derive(Clone, Copy)]
    #[repr(C, packed)]
    struct Bytes<T, const N: usize>([T; N]);

    impl<T: Copy, const N: usize> Shifted<T, N> {
        #[inline(always)]
        fn new(values: [T; N]) -> Self {
            Shifted(0, Bytes(values))
        }

        #[inline(always)]
        fn from(&self) -> *const T {
            (&raw const self.1).cast()
        }

        #[inline(always)]
        fn to(&mut self) -> *mut T {
            (&raw mut self.1).cast()
        }

        #[inline(always)]
        fn values(&self) -> [T; N] {
            self.1.0
        }
    }

    #[inline(always)]
    unsafe fn floats<S: Simd>(value: S::F) -> Vec<u32> {
        let mut out = Shifted::new([0f32; LANES]);
        // SAFETY: this function's conditions are those of `S`.
        unsafe { S::store(out.to(), value) }
        out.values().map(f32::to_bits).into()
    }

    /// All NaN are one: which of them an operation gives is nobody's promise.
    #[inline(always)]
    unsafe fn computed<S: Simd>(value: S::F) -> Vec<u32> {
        // SAFETY: as above.
        let bits = unsafe { floats::<S>(value) };
        bits.into_iter().map(|bits| if f32::from_bits(bits).is_nan() { f32::NAN.to_bits() } else { bits }).collect()
    }

    /// There is no way to store 32 bits of a lane: its bytes, one after the other.
    #[inline(always)]
    unsafe fn integers<S: Simd>(value: S::I) -> Vec<u32> {
        let mut all = vec![0; LANES];
        for byte in 0..4 {
            let mut out = Shifted::new([0i8; LANES]);
            // SAFETY: as above.
            unsafe { S::store_i8(out.to(), S::shr_i(value, 8 * byte)) }
            for (all, out) in all.iter_mut().zip(out.values()) {
                *all |= (out as u8 as u32) << (8 * byte);
            }
        }
        all
    }

    /// Nor to load them.
    #[inline(always)]
    unsafe fn integer<S: Simd>(values: &[i32; LANES]) -> S::I {
        // SAFETY: as above.
        unsafe {
            let byte = |byte: usize| Shifted::new(values.map(|value| value.to_le_bytes()[byte]));
            let [a, b, c, d] = [byte(0), byte(1), byte(2), byte(3)];
            let (a, b) = (S::load_u8(a.from()), S::shl_i::<8>(S::load_u8(b.from())));
            let (c, d) = (S::shl_i::<16>(S::load_u8(c.from())), S::shl_i::<24>(S::load_u8(d.from())));
            S::add_i(S::add_i(a, b), S::add_i(c, d))
        }
    }

    /// Nor to store bytes: the product with one of four ones gives back one of a lane's four.
    #[inline(always)]
    unsafe fn bytes<S: Simd>(value: S::B) -> Vec<u32> {
        let mut all = vec![0; LANES];
        // SAFETY: as above.
        unsafe {
            let (low, high) = (S::and(value, S::splat_bytes(0x7f)), S::and(value, S::splat_bytes(0x80)));
            let high = S::and(S::shr::<7>(high), S::splat_bytes(1));
            for byte in 0..4 {
                let mut one = [0i8; 4];
                one[byte] = 1;
                let low = integers::<S>(S::dot_u7(S::splat_i(0), low, one.as_ptr()));
                let high = integers::<S>(S::dot_u7(S::splat_i(0), high, one.as_ptr()));
                for (all, (low, high)) in all.iter_mut().zip(low.into_iter().zip(high)) {
                    *all |= (low | high << 7) << (8 * byte);
                }
            }
        }
        all
    }

    impl Kernel for Everything<'_> {
        type Output = Found;

        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> Found {
            let mut found = Found::new();
            // SAFETY: this function's conditions; all inputs have as many elements as are loaded.
            unsafe {
                for (i, values) in self.0.floats.iter().enumerate() {
                    let shifted = values.map(Shifted::new);
                    let (a, b, c) =
                        (S::load(shifted[0].from()), S::load(shifted[1].from()), S::load(shifted[2].from()));
                    found.push(("load, store", i, floats::<S>(a)));
                    found.push(("splat", i, floats::<S>(S::splat(values[0][0]))));
                    found.push(("add", i, computed::<S>(S::add(a, b))));
                    found.push(("sub", i, computed::<S>(S::sub(a, b))));
                    found.push(("mul", i, computed::<S>(S::mul(a, b))));
                    found.push(("div", i, computed::<S>(S::div(a, b))));
                    found.push(("fma", i, computed::<S>(S::fma(a, b, c))));
                    found.push(("fma by one", i, computed::<S>(S::fma(a, S::splat(values[1][0]), c))));
                    found.push(("max", i, floats::<S>(S::max(a, b))));
                    found.push(("min", i, floats::<S>(S::min(a, b))));
                    found.push(("abs", i, floats::<S>(S::abs(a))));
                    found.push(("sum", i, computed::<S>(S::splat(S::sum(a)))));
                    found.push(("greatest_abs", i, vec![S::greatest_abs(a, b).to_bits()]));
                    let mut narrow = Shifted::new([f16::ZERO; LANES]);
                    S::store_f16(narrow.to(), a);
                    let narrow = narrow.values().map(|value| if value.is_nan() { f16::NAN } else { value });
                    found.push(("store_f16", i, narrow.map(|value| value.to_bits() as u32).into()));
                }
                for (i, &values) in self.0.numbers.iter().enumerate() {
                    // Which of two zeros is the greater is nobody's promise either.
                    let greatest = S::greatest(S::load(Shifted::new(values).from())) + 0.0;
                    found.push(("greatest", i, vec![greatest.to_bits()]));
                }
                for (i, &values) in self.0.small.iter().enumerate() {
                    found.push(("round", i, integers::<S>(S::round(S::load(Shifted::new(values).from())))));
                }
                for (i, &values) in self.0.halves.iter().enumerate() {
                    let wide = S::load_f16(Shifted::new(values.map(f16::from_bits)).from());
                    found.push(("load_f16", i, computed::<S>(wide)));
                    let pairs: [[u16; 2]; LANES] =
                        std::array::from_fn(|lane| [values[lane], values[(lane + 5) % LANES]]);
                    let pairs = S::load_bytes(Shifted::new(pairs).from().cast());
                    let [first, second] = S::widen_bf16(pairs);
                    found.push(("widen_bf16, first", i, computed::<S>(first)));
                    found.push(("widen_bf16, second", i, computed::<S>(second)));
                    let x = Shifted::new([bf16::from_bits(values[3]), bf16::from_bits(values[9])]);
                    found.push(("dot_bf16", i, computed::<S>(S::dot_bf16(second, pairs, x.from().cast()))));
                }
                for (i, values) in self.0.integers.iter().enumerate() {
                    let (a, b) = (integer::<S>(&values[0]), integer::<S>(&values[1]));
                    found.push(("load_u8, shl_i, shr_i, store_i8", i, integers::<S>(a)));
                    found.push(("splat_i", i, integers::<S>(S::splat_i(values[0][0]))));
                    let narrow = Shifted::new(values[0].map(|value| value as i8));
                    found.push(("load_i8", i, integers::<S>(S::load_i8(narrow.from()))));
                    found.push(("add_i", i, integers::<S>(S::add_i(a, b))));
                    found.push(("and_i", i, integers::<S>(S::and_i(a, values[1][0]))));
                    found.push(("shl_i 1", i, integers::<S>(S::shl_i::<1>(a))));
                    found.push(("shl_i 31", i, integers::<S>(S::shl_i::<31>(a))));
                    for count in 0..32 {
                        found.push(("shr_i", i, integers::<S>(S::shr_i(a, count))));
                    }
                    found.push(("sum_i", i, vec![S::sum_i(a) as u32]));
                    found.push(("to_f32", i, floats::<S>(S::to_f32(a))));
                }
                for (i, values) in self.0.exponents.iter().enumerate() {
                    found.push(("power_of_two", i, floats::<S>(S::power_of_two(integer::<S>(values)))));
                }
                for (i, values) in self.0.bytes.iter().enumerate() {
                    let shifted = values.map(Shifted::new);
                    let (a, b) = (S::load_bytes(shifted[0].from()), S::load_bytes(shifted[1].from()));
                    found.push(("load_bytes", i, bytes::<S>(a)));
                    found.push(("splat_bytes", i, bytes::<S>(S::splat_bytes(values[0][0]))));
                    found.push(("and", i, bytes::<S>(S::and(a, b))));
                    found.push(("or", i, bytes::<S>(S::or(a, b))));
                    found.push(("shl 1", i, bytes::<S>(S::shl::<1>(a))));
                    found.push(("shl 2", i, bytes::<S>(S::shl::<2>(a))));
                    found.push(("shl 4", i, bytes::<S>(S::shl::<4>(a))));
                    found.push(("shl 15", i, bytes::<S>(S::shl::<15>(a))));
                    found.push(("shr 1", i, bytes::<S>(S::shr::<1>(a))));
                    found.push(("shr 2", i, bytes::<S>(S::shr::<2>(a))));
                    found.push(("shr 5", i, bytes::<S>(S::shr::<5>(a))));
                    found.push(("shr 15", i, bytes::<S>(S::shr::<15>(a))));
                    let acc = S::splat_i(i32::from_le_bytes([values[1][0], values[1][1], values[1][2], values[1][3]]));
                    let u7 = S::and(a, S::splat_bytes(0x7f));
                    for x in &self.0.fours {
                        // One byte behind an aligned address, too.
                        let x = Shifted::new(*x);
                        found.push(("dot_u7", i, integers::<S>(S::dot_u7(acc, u7, x.from()))));
                        let added = S::I8_OFFSET * x.values().iter().map(|&x| x as i32).sum::<i32>();
                        let acc = S::add_i(acc, S::splat_i(-added));
                        found.push(("dot_i8", i, integers::<S>(S::dot_i8(acc, a, x.from()))));
                    }
                    let low = S::splat_bytes(0x1f);
                    let w = [S::and(a, low), S::and(b, low), low, S::and(S::shr::<2>(a), low)];
                    for k in 0..self.0.fours.len() {
                        let x: [[_; 4]; 2] = std::array::from_fn(|step| {
                            std::array::from_fn(|j| self.0.fours[(k + step * j) % self.0.fours.len()])
                        });
                        let x = x.map(Shifted::new);
                        let dots = S::dots_u5([acc, S::splat_i(0)], &w, [x[0].from().cast(), x[1].from().cast()]);
                        for dot in dots {
                            found.push(("dots_u5", i, integers::<S>(dot)));
                        }
                    }
                }
            }
            found
        }
    }

    /// A sequence of seeded numbers.
    struct Random(u64);

    impl Random {
        fn bits(&mut self) -> u32 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((self.0 >> 33) ^ (self.0 >> 13)) as u32
        }

        fn vector<T, const N: usize>(&mut self, mut value: impl FnMut(u32) -> T) -> [T; N] {
            std::array::from_fn(|_| value(self.bits()))
        }
    }

    fn inputs() -> Inputs {
        let mut random = Random(1);
        // Every class of value, the limits of the classes, and what lies between two values of f16 or on its limits.
        let mut special: Vec<f32> = vec![0.0, 1.0, f32::MAX, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE, f32::EPSILON];
        special.extend([1u32, 0x7f_ffff, 0x7fff_ffff, 0x7f80_0001, 0x7fc1_2345].map(f32::from_bits));
        special.extend([65_503.996, 65_504.0, 65_519.996, 65_520.0, 65_536.0]);
        special.extend([16_777_216.0, 2e-8, 2.980_232_2e-8, 2.980_232_5e-8]);
        for bits in (0..0x7c00u16).step_by(97) {
            let (low, high) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
            let tie = (low + high) / 2.0;
            special.extend([low, tie.next_down(), tie, tie.next_up()]);
        }
        let negative: Vec<f32> = special.iter().map(|x| -x).collect();
        special.extend(negative);
        let mut all: Vec<[f32; LANES]> =
            special.chunks(LANES).map(|chunk| std::array::from_fn(|i| *chunk.get(i).unwrap_or(&1.0))).collect();
        all.extend((0..100).map(|_| random.vector(f32::from_bits)));
        // Of similar size, so that sums are rounded.
        all.extend((0..100).map(|_| random.vector(|bits| f32::from_bits(bits & 0x83ff_ffff | 0x3c00_0000))));
        // Each special value with each of a few.
        let first: [f32; LANES] = std::array::from_fn(|i| special[i]);
        all.extend((0..LANES).map(|i| std::array::from_fn(|lane| first[(lane + i) % LANES])));
        let three = |i: usize| [all[i], all[(i + 1) % all.len()], all[(i * 7 + 3) % all.len()]];
        let mut floats: Vec<_> = (0..all.len()).map(three).collect();
        floats.extend((0..LANES).map(|i| [first, all[all.len() - LANES + i], all[i]]));
        let numbers = all.iter().map(|values| values.map(|value| if value.is_nan() { -1.0 } else { value })).collect();

        let limit = (1u32 << 31) as f32;
        let mut small: Vec<[f32; LANES]> = vec![
            [0.0, 0.5, 1.5, 2.5, 0.499_999_97, 0.500_000_06, 8_388_607.5, 4_194_304.5, 1.0, 1e9, 1e-40, 126.5, 127.5]
                .into_iter()
                .chain([limit.next_down(), 16_777_215.0, 3.5])
                .collect::<Vec<_>>()
                .try_into()
                .expect("sixteen"),
        ];
        small.push(small[0].map(|x| -x));
        small.push([-limit; LANES]);
        small.extend((0..100).map(|_| random.vector(|bits| bits as i32 as f32 / (1 << (bits % 31)) as f32)));
        small.iter_mut().flatten().for_each(|x| *x = x.clamp(-limit, limit.next_down()));

        let halves = (0..=u16::MAX).step_by(LANES).map(|bits| std::array::from_fn(|i| bits + i as u16)).collect();
        let mut integers: Vec<[[i32; LANES]; 2]> =
            (0..50).map(|_| [random.vector(|bits| bits as i32), random.vector(|bits| bits as i32)]).collect();
        integers.extend((0..20).map(|_| [random.vector(|bits| (bits >> 5) as i32 - (1 << 26)), [255; LANES]]));
        integers.push([[i32::MIN; LANES], [-1; LANES]]);
        integers.push([[i32::MAX; LANES], [1; LANES]]);
        integers.push([[0x100_0001; LANES], [0x100_0003; LANES]]);
        let exponents = (-127..=113).map(|first| std::array::from_fn(|i| first + i as i32)).collect();

        let mut bytes: Vec<[[u8; 64]; 2]> = (0..50)
            .map(|_| [random.vector(|bits| (bits >> 7) as u8), random.vector(|bits| (bits >> 7) as u8)])
            .collect();
        bytes.extend([0, 1, 0x7f, 0x80, 0x81, 0xff].map(|byte| [[byte; 64], [0xff; 64]]));
        let mut fours: Vec<[i8; 4]> = vec![[127; 4], [-127; 4], [127, -127, 127, -127], [0, 0, 1, 0], [1, 0, 0, -1]];
        // As a float, this is a NaN that has its highest bit changed whenever somebody computes with it.
        fours.push([1, 0, -96, 127]);
        fours.extend((0..20).map(|_| random.vector(|bits| ((bits >> 9) as i8).max(-127))));
        Inputs { floats, numbers, small, halves, integers, exponents, bytes, fours }
    }

    #[test]
    fn every_operation_gives_the_same_bits_on_every_instruction_set() {
        let inputs = inputs();
        // SAFETY: the kernel has no conditions.
        let want = unsafe { Isa::SCALAR.run(Everything(&inputs)) };
        assert!(want.len() > 10_000);
        for isa in Isa::available() {
            // SAFETY: as above.
            let found = unsafe { isa.run(Everything(&inputs)) };
            assert_eq!(found.len(), want.len());
            for ((name, input, found), (_, _, want)) in found.iter().zip(&want) {
                assert!(found == want, "{isa}: {name} of input {input}: {found:08x?} for {want:08x?}");
            }
        }
    }

    /// One lane's sums with every pair of weights and inputs.
    struct Dots<'a>(&'a [[bf16; 2]]);

    impl Kernel for Dots<'_> {
        type Output = Vec<u32>;

        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> Vec<u32> {
            let mut bits = Vec::new();
            for w in self.0 {
                for x in self.0 {
                    // SAFETY: sixteen lanes of two bf16 are read.
                    let sums = unsafe {
                        let w = [*w; LANES];
                        S::dot_bf16(S::splat(x[1].to_f32() + 0.123), S::load_bytes(w.as_ptr().cast()), x)
                    };
                    // SAFETY: as above.
                    bits.push(unsafe { computed::<S>(sums) }[7]);
                }
            }
            bits
        }
    }

    #[test]
    fn the_instruction_for_bf16_gives_the_bits_of_two_multiply_adds() {
        let mut random = Random(11);
        let mut pairs: Vec<[bf16; 2]> = vec![[0.0, -0.0], [1.0, f32::INFINITY], [3e38, -3e38], [f32::NAN, 2.0]]
            .into_iter()
            .map(|pair| pair.map(bf16::from_f32))
            .collect();
        // Of all signs and many sizes, so that sums are rounded; products and sums are no subnormal numbers.
        pairs.extend((0..400).map(|_| {
            let [a, b]: [u32; 2] = random.vector(|bits| bits);
            [a, b].map(|bits| bf16::from_bits((bits & 0x87ff | 0x3c00) as u16))
        }));
        for isa in Isa::available() {
            // SAFETY: the kernel has no conditions.
            let (with, without) = unsafe { (isa.run_bf16(Dots(&pairs)), Isa::SCALAR.run(Dots(&pairs))) };
            assert!(with == without, "{isa}");
        }
    }

    #[test]
    fn the_reference_does_what_it_says() {
        let inputs = inputs();
        // SAFETY: plain Rust.
        unsafe {
            type S = scalar::Scalar;
            for &[a, b, c] in &inputs.floats {
                for lane in 0..LANES {
                    let (a, b, c) = (a[lane], b[lane], c[lane]);
                    let (max, min) = (S::max([a; LANES], [b; LANES])[0], S::min([a; LANES], [b; LANES])[0]);
                    match a.is_nan() || b.is_nan() {
                        true => assert!(max.to_bits() == b.to_bits() && min.to_bits() == b.to_bits()),
                        false => assert!(max == a.max(b) && min == a.min(b)),
                    }
                    let greatest = S::greatest_abs([a; LANES], std::array::from_fn(|i| if i == 5 { b } else { 0.0 }));
                    match a.is_nan() || b.is_nan() {
                        true => assert!(greatest.is_nan()),
                        false => assert_eq!(greatest, a.abs().max(b.abs())),
                    }
                    // The product of two f32 is exact in f64; where the sum is too, the result is rounded once.
                    let (product, c) = (a as f64 * b as f64, c as f64);
                    let sum = product + c;
                    if sum - product == c && sum - c == product {
                        assert_eq!(S::fma([a; LANES], [b; LANES], [c as f32; LANES])[0], sum as f32);
                    }
                }
            }
            let ones: [f32; LANES] = std::array::from_fn(|i| if i % 8 == 0 { 16_777_216.0 } else { 1.0 });
            // Halves first: the two great ones meet at once, and everything after that is added to 2^25.
            assert_eq!(S::sum(ones), 33_554_432.0 + 12.0);
        }
    }
}
