//! AVX2 with FMA and F16C: two registers a vector.

use std::arch::x86_64::*;

use half::f16;

use super::{Kernel, Simd};

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub struct Avx2;

/// Whether this CPU has them all.
pub fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// Runs a kernel compiled for it.
///
/// # Safety
/// [`is_available`], and the kernel's own conditions.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function's conditions.
    unsafe { kernel.run::<Avx2>() }
}

/// Sum of eight lanes, halves added to each other.
///
/// # Safety
/// The CPU has AVX.
#[inline(always)]
pub unsafe fn sum_8(a: __m256) -> f32 {
    // SAFETY: this function's condition.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

#[inline(always)]
unsafe fn dot(acc: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    // SAFETY: called with AVX2 only.
    unsafe { add_pairs(acc, _mm256_maddubs_epi16(unsigned, signed)) }
}

/// Adds to each lane its two sums of 16 bits.
#[inline(always)]
unsafe fn add_pairs(acc: __m256i, pairs: __m256i) -> __m256i {
    // SAFETY: called with AVX2 only.
    unsafe { _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))) }
}

// SAFETY of all blocks: the trait's conditions.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    type B = [__m256i; 2];

    const REGISTERS: usize = 8;
    const I8_OFFSET: i32 = 0;
    const HAS_DOTS_U5: bool = true;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Self::F) {
        unsafe {
            _mm256_storeu_ps(to, value[0]);
            _mm256_storeu_ps(to.add(8), value[1]);
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn abs(a: Self::F) -> Self::F {
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])]
        }
    }
    #[inline(always)]
    unsafe fn sum(a: Self::F) -> f32 {
        unsafe { sum_8(_mm256_add_ps(a[0], a[1])) }
    }
    #[inline(always)]
    unsafe fn greatest(a: Self::F) -> f32 {
        unsafe {
            let eight = _mm256_max_ps(a[0], a[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn greatest_abs(a: Self::F, b: Self::F) -> f32 {
        unsafe {
            let bits = _mm256_set1_epi32(0x7fff_ffff);
            let [a, b, c, d] = [a[0], a[1], b[0], b[1]].map(|v| _mm256_and_si256(_mm256_castps_si256(v), bits));
            let eight = _mm256_max_epi32(_mm256_max_epi32(a, b), _mm256_max_epi32(c, d));
            let four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
            let two = _mm_max_epi32(four, _mm_shuffle_epi32::<0b1110>(four));
            f32::from_bits(_mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32::<1>(two))) as u32)
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::F {
        unsafe {
            let from = from.cast::<__m128i>();
            [_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from.add(1)))]
        }
    }
    #[inline(always)]
    unsafe fn store_f16(to: *mut f16, value: Self::F) {
        unsafe {
            let to = to.cast::<__m128i>();
            _mm_storeu_si128(to, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value[0]));
            _mm_storeu_si128(to.add(1), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value[1]));
        }
    }
    #[inline(always)]
    unsafe fn splat_i(value: i32) -> Self::I {
        unsafe { [_mm256_set1_epi32(value); 2] }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::I {
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            [_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))]
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::I {
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))]
        }
    }
    #[inline(always)]
    unsafe fn store_i8(to: *mut i8, value: Self::I) {
        unsafe {
            // The low byte of each lane, gathered in each half of 128 bits, then the four groups of four put together.
            let low = _mm256_setr_epi8(
                0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1,
                -1, -1, -1, -1, -1,
            );
            for (half, lanes) in value.into_iter().enumerate() {
                let packed = _mm256_shuffle_epi8(lanes, low);
                let first = _mm256_castsi256_si128(packed);
                let second = _mm256_extracti128_si256::<1>(packed);
                _mm_storel_epi64(to.add(8 * half).cast(), _mm_unpacklo_epi32(first, second));
            }
        }
    }
    #[inline(always)]
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I {
        unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn and_i(a: Self::I, mask: i32) -> Self::I {
        unsafe {
            let mask = _mm256_set1_epi32(mask);
            [_mm256_and_si256(a[0], mask), _mm256_and_si256(a[1], mask)]
        }
    }
    #[inline(always)]
    unsafe fn shl_i<const N: u32>(a: Self::I) -> Self::I {
        unsafe {
            let count = _mm_cvtsi32_si128(N as i32);
            [_mm256_sll_epi32(a[0], count), _mm256_sll_epi32(a[1], count)]
        }
    }
    #[inline(always)]
    unsafe fn shr_i(a: Self::I, count: usize) -> Self::I {
        unsafe {
            let count = _mm_cvtsi32_si128(count as i32);
            [_mm256_srl_epi32(a[0], count), _mm256_srl_epi32(a[1], count)]
        }
    }
    #[inline(always)]
    unsafe fn sum_i(a: Self::I) -> i32 {
        unsafe {
            let eight = _mm256_add_epi32(a[0], a[1]);
            let four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
            let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b1110>(four));
            _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
        }
    }
    #[inline(always)]
    unsafe fn to_f32(a: Self::I) -> Self::F {
        unsafe { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::I {
        unsafe { [_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1])] }
    }
    #[inline(always)]
    unsafe fn power_of_two(a: Self::I) -> Self::F {
        unsafe {
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_slli_epi32::<23>(_mm256_add_epi32(a[0], bias));
            let high = _mm256_slli_epi32::<23>(_mm256_add_epi32(a[1], bias));
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
        }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        unsafe {
            let from = from.cast::<__m256i>();
            [_mm256_loadu_si256(from), _mm256_loadu_si256(from.add(1))]
        }
    }
    #[inline(always)]
    unsafe fn splat_four(x: *const u8) -> Self::B {
        unsafe { [_mm256_set1_epi32(x.cast::<i32>().read_unaligned()); 2] }
    }
    #[inline(always)]
    unsafe fn splat_bytes(value: u8) -> Self::B {
        unsafe { [_mm256_set1_epi8(value as i8); 2] }
    }
    #[inline(always)]
    unsafe fn and(a: Self::B, b: Self::B) -> Self::B {
        unsafe { [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B {
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn shl<const N: u32>(a: Self::B) -> Self::B {
        unsafe {
            let count = _mm_cvtsi32_si128(N as i32);
            [_mm256_sll_epi16(a[0], count), _mm256_sll_epi16(a[1], count)]
        }
    }
    #[inline(always)]
    unsafe fn shr<const N: u32>(a: Self::B) -> Self::B {
        unsafe {
            let count = _mm_cvtsi32_si128(N as i32);
            [_mm256_srl_epi16(a[0], count), _mm256_srl_epi16(a[1], count)]
        }
    }
    #[inline(always)]
    unsafe fn dot_u7(acc: Self::I, w: Self::B, x: *const i8) -> Self::I {
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            [dot(acc[0], w[0], x), dot(acc[1], w[1], x)]
        }
    }
    #[inline(always)]
    unsafe fn dot_i8(acc: Self::I, w: Self::B, x: *const i8) -> Self::I {
        unsafe {
            // The instruction wants one side unsigned: the weight's sign goes over to x. Products of pairs stay within 16
            // bits since x is at least -127.
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            let low = dot(acc[0], _mm256_abs_epi8(w[0]), _mm256_sign_epi8(x, w[0]));
            let high = dot(acc[1], _mm256_abs_epi8(w[1]), _mm256_sign_epi8(x, w[1]));
            [low, high]
        }
    }
    #[inline(always)]
    unsafe fn dots_u5<const I: usize>(mut dots: [Self::I; I], w: &[Self::B; 4], x: [*const i8; I]) -> [Self::I; I] {
        unsafe {
            // Eight products of a byte below 32 with one of at most 127 fit 16 bits together: they are widened once.
            let mut pairs = [[_mm256_setzero_si256(); 2]; I];
            for j in 0..4 {
                for i in 0..I {
                    let x = _mm256_set1_epi32(x[i].cast::<i32>().add(j).read_unaligned());
                    for half in 0..2 {
                        pairs[i][half] = _mm256_add_epi16(pairs[i][half], _mm256_maddubs_epi16(w[j][half], x));
                    }
                }
            }
            for i in 0..I {
                for half in 0..2 {
                    dots[i][half] = add_pairs(dots[i][half], pairs[i][half]);
                }
            }
            dots
        }
    }
    #[inline(always)]
    unsafe fn widen_bf16(pairs: Self::B) -> [Self::F; 2] {
        unsafe {
            let second = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            [
                [_mm256_slli_epi32::<16>(pairs[0]), _mm256_slli_epi32::<16>(pairs[1])],
                [_mm256_and_si256(pairs[0], second), _mm256_and_si256(pairs[1], second)],
            ]
            .map(|halves| [_mm256_castsi256_ps(halves[0]), _mm256_castsi256_ps(halves[1])])
        }
    }
}
