//! The reference: what each operation means, in plain Rust.

use half::{bf16, f16};

use super::{LANES, Simd};

/// Arrays for vectors.
#[derive(Clone, Copy)]
pub struct Scalar;

#[inline(always)]
fn each<T, U: Copy>(a: [U; LANES], f: impl Fn(U) -> T) -> [T; LANES] {
    a.map(f)
}

#[inline(always)]
fn pairs<T>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> T) -> [T; LANES]
where
    T: Copy,
{
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// The dot product of four weights with the four bytes at `x`.
#[inline(always)]
unsafe fn dot_4(w: [i32; 4], x: *const i8) -> i32 {
    // SAFETY: this function's condition.
    let x: [i8; 4] = unsafe { x.cast::<[i8; 4]>().read_unaligned() };
    (0..4).map(|i| w[i] * x[i] as i32).sum()
}

#[inline(always)]
fn shift(a: [u8; 64], f: impl Fn(u16) -> u16) -> [u8; 64] {
    let mut out = [0; 64];
    for (pair, out) in a.chunks_exact(2).zip(out.chunks_exact_mut(2)) {
        out.copy_from_slice(&f(u16::from_le_bytes([pair[0], pair[1]])).to_le_bytes());
    }
    out
}

// SAFETY of all blocks: the trait's conditions.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Scalar {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type B = [u8; 64];

    const REGISTERS: usize = 16;
    const I8_OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        unsafe { from.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F) {
        unsafe { to.cast::<Self::F>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn abs(a: Self::F) -> Self::F {
        each(a, f32::abs)
    }
    #[inline(always)]
    unsafe fn sum(mut a: Self::F) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                a[i] += a[i + half];
            }
        }
        a[0]
    }
    #[inline(always)]
    unsafe fn greatest(a: Self::F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn greatest_abs(a: Self::F, b: Self::F) -> f32 {
        let bits = a.into_iter().chain(b).map(|v| v.to_bits() & 0x7fff_ffff);
        f32::from_bits(bits.fold(0, |a, b| if a > b { a } else { b }))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::F {
        each(unsafe { from.cast::<[f16; LANES]>().read_unaligned() }, f16::to_f32)
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut f16, value: Self::F) {
        unsafe { to.cast::<[f16; LANES]>().write_unaligned(each(value, f16::from_f32)) }
    }
    #[inline(always)]
    unsafe fn splat_i(value: i32) -> Self::I {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::I {
        each(unsafe { from.cast::<[i8; LANES]>().read_unaligned() }, i32::from)
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::I {
        each(unsafe { from.cast::<[u8; LANES]>().read_unaligned() }, i32::from)
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, value: Self::I) {
        unsafe { to.cast::<[i8; LANES]>().write_unaligned(each(value, |v| v as i8)) }
    }
    #[inline(always)]
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I {
        pairs(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn and_i(a: Self::I, mask: i32) -> Self::I {
        each(a, |v| v & mask)
    }
    #[inline(always)]
    unsafe fn shl_i<const N: u32>(a: Self::I) -> Self::I {
        each(a, |v| v << N)
    }
    #[inline(always)]
    unsafe fn shr_i(a: Self::I, count: usize) -> Self::I {
        each(a, |v| (v as u32 >> count) as i32)
    }
    #[inline(always)]
    unsafe fn sum_i(a: Self::I) -> i32 {
        a.into_iter().fold(0, i32::wrapping_add)
    }
    #[inline(always)]
    unsafe fn to_f32(a: Self::I) -> Self::F {
        each(a, |v| v as f32)
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::I {
        each(a, |v| v.round_ties_even() as i32)
    }
    #[inline(always)]
    unsafe fn power_of_two(a: Self::I) -> Self::F {
        each(a, |v| f32::from_bits(((v + 127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        unsafe { from.cast::<Self::B>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat_four(x: *const u8) -> Self::B {
        let four = unsafe { x.cast::<[u8; 4]>().read_unaligned() };
        std::array::from_fn(|i| four[i % 4])
    }
    #[inline(always)]
    unsafe fn splat_bytes(value: u8) -> Self::B {
        [value; 64]
    }
    #[inline(always)]
    unsafe fn and(a: Self::B, b: Self::B) -> Self::B {
        std::array::from_fn(|i| a[i] & b[i])
    }
    #[inline(always)]
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn shl<const N: u32>(a: Self::B) -> Self::B {
        shift(a, |v| v << N)
    }
    #[inline(always)]
    unsafe fn shr<const N: u32>(a: Self::B) -> Self::B {
        shift(a, |v| v >> N)
    }
    #[inline(always)]
    unsafe fn dot_u7(acc: Self::I, w: Self::B, x: *const i8) -> Self::I {
        std::array::from_fn(|i| acc[i].wrapping_add(unsafe { dot_4(std::array::from_fn(|t| w[4 * i + t] as i32), x) }))
    }
    #[inline(always)]
    unsafe fn dot_i8(acc: Self::I, w: Self::B, x: *const i8) -> Self::I {
        std::array::from_fn(|i| {
            acc[i].wrapping_add(unsafe { dot_4(std::array::from_fn(|t| w[4 * i + t] as i8 as i32), x) })
        })
    }
    #[inline(always)]
    unsafe fn widen_bf16(pairs: Self::B) -> [Self::F; 2] {
        [0, 2]
            .map(|at| std::array::from_fn(|i| bf16::from_le_bytes([pairs[4 * i + at], pairs[4 * i + at + 1]]).to_f32()))
    }
}
