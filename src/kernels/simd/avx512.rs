//! AVX-512 with VNNI: one register a vector.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, Simd};

/// AVX-512 F, BW, VL, DQ and VNNI, and the instruction for [`Simd::dot_bf16`] if `BF16`.
#[derive(Clone, Copy)]
pub struct Avx512<const BF16: bool>;

/// Whether this CPU has them all.
pub fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Runs a kernel compiled for it.
///
/// # Safety
/// [`is_available`], and the kernel's own conditions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function's conditions.
    unsafe { kernel.run::<Avx512<false>>() }
}

/// Whether this CPU has the instruction for bf16 too.
pub fn has_bf16() -> bool {
    is_available() && is_x86_feature_detected!("avx512bf16")
}

/// Whether it also is the faster way. An Intel CPU with AMX does one in the time of four multiply-adds (1.0 and 4.0 G a
/// second on a core), which multiply twice as much; a Zen 5 does not.
pub fn has_fast_bf16() -> bool {
    static FAST: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *FAST.get_or_init(|| {
        let maker = std::arch::x86_64::__cpuid(0);
        has_bf16() && [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes).as_flattened() != b"GenuineIntel"
    })
}

/// Runs a kernel compiled for AVX-512 with the instruction for bf16.
///
/// # Safety
/// [`has_bf16`], and the kernel's own conditions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")]
pub unsafe fn enter_bf16<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function's conditions.
    unsafe { kernel.run::<Avx512<true>>() }
}

// SAFETY of all blocks: the trait's conditions.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<const BF16: bool> Simd for Avx512<BF16> {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;

    const REGISTERS: usize = 32;
    // The instruction wants one side unsigned: 128 is added to the signed weights.
    const I8_OFFSET: i32 = 128;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: __m512) {
        unsafe { _mm512_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn abs(a: __m512) -> __m512 {
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            super::avx2::sum_8(eight)
        }
    }
    #[inline(always)]
    unsafe fn greatest(a: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    unsafe fn greatest_abs(a: __m512, b: __m512) -> f32 {
        unsafe {
            let bits = _mm512_set1_epi32(0x7fff_ffff);
            let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
            let greatest = _mm512_max_epi32(_mm512_and_si512(a, bits), _mm512_and_si512(b, bits));
            f32::from_bits(_mm512_reduce_max_epi32(greatest) as u32)
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut f16, value: __m512) {
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)) }
    }
    #[inline(always)]
    unsafe fn splat_i(value: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> __m512i {
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> __m512i {
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, value: __m512i) {
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(value)) }
    }
    #[inline(always)]
    unsafe fn add_i(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn and_i(a: __m512i, mask: i32) -> __m512i {
        unsafe { _mm512_and_si512(a, _mm512_set1_epi32(mask)) }
    }
    #[inline(always)]
    unsafe fn shl_i<const N: u32>(a: __m512i) -> __m512i {
        unsafe { _mm512_slli_epi32::<N>(a) }
    }
    #[inline(always)]
    unsafe fn shr_i(a: __m512i, count: usize) -> __m512i {
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(count as i32)) }
    }
    #[inline(always)]
    unsafe fn sum_i(a: __m512i) -> i32 {
        unsafe { _mm512_reduce_add_epi32(a) }
    }
    #[inline(always)]
    unsafe fn to_f32(a: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512i {
        unsafe { _mm512_cvtps_epi32(a) }
    }
    #[inline(always)]
    unsafe fn power_of_two(a: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(a, _mm512_set1_epi32(127)))) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat_four(x: *const u8) -> __m512i {
        unsafe { _mm512_set1_epi32(x.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn splat_bytes(value: u8) -> __m512i {
        unsafe { _mm512_set1_epi8(value as i8) }
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn shl<const N: u32>(a: __m512i) -> __m512i {
        unsafe { _mm512_slli_epi16::<N>(a) }
    }
    #[inline(always)]
    unsafe fn shr<const N: u32>(a: __m512i) -> __m512i {
        unsafe { _mm512_srli_epi16::<N>(a) }
    }
    #[inline(always)]
    unsafe fn dot_u7(acc: __m512i, w: __m512i, x: *const i8) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn dot_i8(acc: __m512i, w: __m512i, x: *const i8) -> __m512i {
        unsafe { Self::dot_u7(acc, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), x) }
    }
    #[inline(always)]
    unsafe fn widen_bf16(pairs: __m512i) -> [__m512; 2] {
        unsafe {
            let second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(second)]
        }
    }
    #[inline(always)]
    unsafe fn dot_bf16(acc: __m512, w: __m512i, x: *const [bf16; 2]) -> __m512 {
        unsafe {
            if BF16 {
                let x = Self::splat_four(x.cast());
                // The type of the instruction's operands has no other use, and no conversion.
                _mm512_dpbf16_ps(
                    acc,
                    std::mem::transmute::<__m512i, __m512bh>(w),
                    std::mem::transmute::<__m512i, __m512bh>(x),
                )
            } else {
                super::fma_bf16::<Self>(acc, w, x)
            }
        }
    }
}
