//! NEON: four registers a vector. Products of bytes take one instruction where the CPU has it, four where it does not.
//!
//! That instruction and the conversions from and to f16 are written as assembly: the intrinsic of the first is not in
//! stable Rust, those of the others not in every version that this crate is built with.

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use half::f16;

use super::{Kernel, Simd};

/// NEON, and the dot product instructions if `DOT`.
#[derive(Clone, Copy)]
pub struct Neon<const DOT: bool>;

/// Whether this CPU has NEON.
pub fn is_available() -> bool {
    is_aarch64_feature_detected!("neon")
}

/// Whether it has the dot product instructions too.
pub fn has_dot() -> bool {
    is_available() && is_aarch64_feature_detected!("dotprod")
}

/// Runs a kernel compiled for NEON.
///
/// # Safety
/// [`is_available`], and the kernel's own conditions.
#[target_feature(enable = "neon")]
pub unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function's conditions.
    unsafe { kernel.run::<Neon<false>>() }
}

/// Runs a kernel compiled for NEON with the dot product instructions.
///
/// # Safety
/// [`has_dot`], and the kernel's own conditions.
#[target_feature(enable = "neon,dotprod")]
pub unsafe fn enter_dot<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function's conditions.
    unsafe { kernel.run::<Neon<true>>() }
}

#[inline(always)]
fn each<T: Copy, U>(a: [T; 4], f: impl Fn(T) -> U) -> [U; 4] {
    [f(a[0]), f(a[1]), f(a[2]), f(a[3])]
}

#[inline(always)]
fn pairs<T: Copy, U: Copy, V>(a: [T; 4], b: [U; 4], f: impl Fn(T, U) -> V) -> [V; 4] {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

/// What makes four vectors of the four places that are `step` elements apart.
#[inline(always)]
fn places<T, U>(from: *const T, step: usize, f: impl Fn(*const T) -> U) -> [U; 4] {
    [0, 1, 2, 3].map(|i| f(from.wrapping_add(i * step)))
}

/// Adds to each lane the dot product of its four bytes with those of `x`, of which only the first four count.
///
/// # Safety
/// The CPU has NEON's dot product instructions.
#[inline(always)]
unsafe fn dot(mut acc: int32x4_t, w: uint8x16_t, x: f32) -> int32x4_t {
    // SAFETY: this function's condition. The instruction is `vdotq_laneq_s32`.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {w:v}.16b, {x:v}.4b[0]",
            acc = inout(vreg) acc, w = in(vreg) w, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// The same without those instructions; no byte of `x` may be -128. Products of pairs stay within 16 bits then.
#[inline(always)]
unsafe fn dot_by_pairs(acc: int32x4_t, w: uint8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: called with NEON only.
    unsafe {
        let w = vreinterpretq_s8_u8(w);
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        let high = vmull_high_s8(w, x);
        vpadalq_s16(acc, vpaddq_s16(low, high))
    }
}

// SAFETY of all blocks: the trait's conditions.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<const DOT: bool> Simd for Neon<DOT> {
    type F = [float32x4_t; 4];
    type I = [int32x4_t; 4];
    type B = [uint8x16_t; 4];

    const REGISTERS: usize = 8;
    const I8_OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        unsafe { [vdupq_n_f32(value); 4] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        places(from, 4, |from| unsafe { vld1q_f32(from) })
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F) {
        unsafe {
            vst1q_f32(to, value[0]);
            vst1q_f32(to.add(4), value[1]);
            vst1q_f32(to.add(8), value[2]);
            vst1q_f32(to.add(12), value[3]);
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| unsafe { vaddq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| unsafe { vsubq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| unsafe { vmulq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| unsafe { vdivq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        unsafe {
            [
                vfmaq_f32(c[0], a[0], b[0]),
                vfmaq_f32(c[1], a[1], b[1]),
                vfmaq_f32(c[2], a[2], b[2]),
                vfmaq_f32(c[3], a[3], b[3]),
            ]
        }
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        // The instructions `fmax` and `fmaxnm` give something else for NaN.
        pairs(a, b, |a, b| unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| unsafe { vbslq_f32(vcltq_f32(a, b), a, b) })
    }
    #[inline(always)]
    unsafe fn abs(a: Self::F) -> Self::F {
        each(a, |a| unsafe { vabsq_f32(a) })
    }
    #[inline(always)]
    unsafe fn sum(a: Self::F) -> f32 {
        unsafe {
            let four = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
        }
    }
    #[inline(always)]
    unsafe fn greatest(a: Self::F) -> f32 {
        unsafe { vmaxvq_f32(vmaxq_f32(vmaxq_f32(a[0], a[1]), vmaxq_f32(a[2], a[3]))) }
    }
    #[inline(always)]
    unsafe fn greatest_abs(a: Self::F, b: Self::F) -> f32 {
        unsafe {
            let bits = |a: float32x4_t| vandq_s32(vreinterpretq_s32_f32(a), vdupq_n_s32(0x7fff_ffff));
            let mut greatest = vmaxq_s32(bits(a[0]), bits(b[0]));
            for i in 1..4 {
                greatest = vmaxq_s32(greatest, vmaxq_s32(bits(a[i]), bits(b[i])));
            }
            f32::from_bits(vmaxvq_s32(greatest) as u32)
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::F {
        unsafe {
            let mut wide = [vdupq_n_f32(0.0); 4];
            for half in 0..2 {
                let narrow = vld1q_u16(from.cast::<u16>().add(8 * half));
                asm!(
                    "fcvtl {low:v}.4s, {narrow:v}.4h",
                    "fcvtl2 {high:v}.4s, {narrow:v}.8h",
                    low = out(vreg) wide[2 * half], high = lateout(vreg) wide[2 * half + 1], narrow = in(vreg) narrow,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            wide
        }
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut f16, value: Self::F) {
        unsafe {
            for half in 0..2 {
                let narrow: uint16x8_t;
                // Rounds as the rest of the program does: to nearest, ties to even.
                asm!(
                    "fcvtn {narrow:v}.4h, {low:v}.4s",
                    "fcvtn2 {narrow:v}.8h, {high:v}.4s",
                    narrow = out(vreg) narrow, low = in(vreg) value[2 * half], high = in(vreg) value[2 * half + 1],
                    options(pure, nomem, nostack, preserves_flags),
                );
                vst1q_u16(to.cast::<u16>().add(8 * half), narrow);
            }
        }
    }
    #[inline(always)]
    unsafe fn splat_i(value: i32) -> Self::I {
        unsafe { [vdupq_n_s32(value); 4] }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::I {
        unsafe {
            let bytes = vld1q_s8(from);
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)]
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::I {
        unsafe {
            let bytes = vld1q_u8(from);
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
            let (a, b) = (vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low));
            let (c, d) = (vmovl_u16(vget_low_u16(high)), vmovl_high_u16(high));
            each([a, b, c, d], |a| vreinterpretq_s32_u32(a))
        }
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, value: Self::I) {
        unsafe {
            // The low two bytes of each lane, then the low one of each of these.
            let [a, b, c, d] = each(value, |value| vreinterpretq_s16_s32(value));
            let (low, high) = (vuzp1q_s16(a, b), vuzp1q_s16(c, d));
            vst1q_s8(to, vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high)));
        }
    }
    #[inline(always)]
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I {
        pairs(a, b, |a, b| unsafe { vaddq_s32(a, b) })
    }
    #[inline(always)]
    unsafe fn and_i(a: Self::I, mask: i32) -> Self::I {
        each(a, |a| unsafe { vandq_s32(a, vdupq_n_s32(mask)) })
    }
    #[inline(always)]
    unsafe fn shl_i<const N: u32>(a: Self::I) -> Self::I {
        each(a, |a| unsafe { vshlq_s32(a, vdupq_n_s32(N as i32)) })
    }
    #[inline(always)]
    unsafe fn shr_i(a: Self::I, count: usize) -> Self::I {
        // To the left by less than nothing.
        each(a, |a| unsafe { vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-(count as i32)))) })
    }
    #[inline(always)]
    unsafe fn sum_i(a: Self::I) -> i32 {
        unsafe { vaddvq_s32(vaddq_s32(vaddq_s32(a[0], a[1]), vaddq_s32(a[2], a[3]))) }
    }
    #[inline(always)]
    unsafe fn to_f32(a: Self::I) -> Self::F {
        each(a, |a| unsafe { vcvtq_f32_s32(a) })
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::I {
        each(a, |a| unsafe { vcvtnq_s32_f32(a) })
    }
    #[inline(always)]
    unsafe fn power_of_two(a: Self::I) -> Self::F {
        each(a, |a| unsafe { vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(a, vdupq_n_s32(127)))) })
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // A hint: nothing is read as far as the program can tell, and no address faults.
        unsafe { asm!("prfm pldl1keep, [{0}]", in(reg) at, options(nostack, preserves_flags, readonly)) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        places(from, 16, |from| unsafe { vld1q_u8(from) })
    }
    #[inline(always)]
    unsafe fn splat_four(x: *const u8) -> Self::B {
        unsafe { [vreinterpretq_u8_u32(vdupq_n_u32(x.cast::<u32>().read_unaligned())); 4] }
    }
    #[inline(always)]
    unsafe fn splat_bytes(value: u8) -> Self::B {
        unsafe { [vdupq_n_u8(value); 4] }
    }
    #[inline(always)]
    unsafe fn and(a: Self::B, b: Self::B) -> Self::B {
        pairs(a, b, |a, b| unsafe { vandq_u8(a, b) })
    }
    #[inline(always)]
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B {
        pairs(a, b, |a, b| unsafe { vorrq_u8(a, b) })
    }
    #[inline(always)]
    unsafe fn shl<const N: u32>(a: Self::B) -> Self::B {
        each(a, |a| unsafe { vreinterpretq_u8_u16(vshlq_u16(vreinterpretq_u16_u8(a), vdupq_n_s16(N as i16))) })
    }
    #[inline(always)]
    unsafe fn shr<const N: u32>(a: Self::B) -> Self::B {
        each(a, |a| unsafe { vreinterpretq_u8_u16(vshlq_u16(vreinterpretq_u16_u8(a), vdupq_n_s16(-(N as i16)))) })
    }
    #[inline(always)]
    unsafe fn dot_u7(acc: Self::I, w: Self::B, x: *const i8) -> Self::I {
        // Below 128, they are the same bytes with a sign.
        unsafe { Self::dot_i8(acc, w, x) }
    }
    #[inline(always)]
    unsafe fn dot_i8(acc: Self::I, w: Self::B, x: *const i8) -> Self::I {
        unsafe {
            if DOT {
                let x = x.cast::<f32>().read_unaligned();
                [dot(acc[0], w[0], x), dot(acc[1], w[1], x), dot(acc[2], w[2], x), dot(acc[3], w[3], x)]
            } else {
                let x = vreinterpretq_s8_s32(vdupq_n_s32(x.cast::<i32>().read_unaligned()));
                pairs(acc, w, |acc, w| dot_by_pairs(acc, w, x))
            }
        }
    }
    #[inline(always)]
    unsafe fn widen_bf16(pairs: Self::B) -> [Self::F; 2] {
        unsafe {
            [
                each(pairs, |pairs| vreinterpretq_f32_u32(vshlq_n_u32::<16>(vreinterpretq_u32_u8(pairs)))),
                each(pairs, |pairs| {
                    vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(pairs), vdupq_n_u32(0xffff_0000)))
                }),
            ]
        }
    }
}
