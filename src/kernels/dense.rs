//! Dot products of F32, F16 and BF16 rows with an f32 input. Candle's own convert F16 in software unless the whole
//! program is compiled for F16C; these look at the CPU at run time. The input is not rounded to the row's type.

use half::{bf16, f16};

/// A stored number that widens to f32.
pub trait Dense: Copy + Send + Sync {
    /// Dots `x` with four rows, all of the same length.
    fn dot_4(x: &[f32], rows: [&[Self]; 4]) -> [f32; 4];

    /// Dots `x` with one row.
    fn dot(x: &[f32], row: &[Self]) -> f32;

    /// Widens.
    fn to_f32(self) -> f32;
}

/// The definition, which the vector code is tested against and which runs where there is none.
pub fn dot_scalar<T: Dense>(x: &[f32], row: &[T]) -> f32 {
    // Eight sums, so that the compiler may use vectors where it knows of them.
    let mut sums = [0f32; 8];
    let (x_blocks, row_blocks) = (x.chunks_exact(8), row.chunks_exact(8));
    let (x_rest, row_rest) = (x_blocks.remainder(), row_blocks.remainder());
    for (x, row) in x_blocks.zip(row_blocks) {
        for ((sum, x), w) in sums.iter_mut().zip(x).zip(row) {
            *sum += x * w.to_f32();
        }
    }
    let rest: f32 = x_rest.iter().zip(row_rest).map(|(x, w)| x * w.to_f32()).sum();
    sums.iter().sum::<f32>() + rest
}

macro_rules! dense {
    ($type:ty, $widen:expr, $avx2:ident) => {
        impl Dense for $type {
            fn dot_4(x: &[f32], rows: [&[Self]; 4]) -> [f32; 4] {
                assert!(rows.iter().all(|row| row.len() == x.len()), "rows and input differ in length");
                #[cfg(target_arch = "x86_64")]
                if x86::available() {
                    // SAFETY: the CPU has the features, and every row is as long as the input.
                    return unsafe { x86::$avx2(x, rows) };
                }
                rows.map(|row| dot_scalar(x, row))
            }

            fn dot(x: &[f32], row: &[Self]) -> f32 {
                Self::dot_4(x, [row; 4])[0]
            }

            #[inline(always)]
            fn to_f32(self) -> f32 {
                $widen(self)
            }
        }
    };
}

dense!(f32, |value| value, dot_4_f32);
dense!(f16, f16::to_f32, dot_4_f16);
dense!(bf16, bf16::to_f32, dot_4_bf16);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::Dense;

    /// Whether this CPU has what the functions below need. The standard library remembers the answer.
    pub fn available() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    }

    /// Four rows at a time, two vectors of eight a row: enough sums in flight to hide the latency of an addition.
    macro_rules! dot_4 {
        ($name:ident, $type:ty, $load:expr) => {
            /// # Safety
            ///
            /// The CPU has AVX2, FMA and F16C, and every row is as long as `x`.
            #[target_feature(enable = "avx2,fma,f16c")]
            pub unsafe fn $name(x: &[f32], rows: [&[$type]; 4]) -> [f32; 4] {
                let blocks = x.len() / 16;
                let mut low = [_mm256_setzero_ps(); 4];
                let mut high = [_mm256_setzero_ps(); 4];
                for block in 0..blocks {
                    let at = block * 16;
                    // SAFETY: at + 16 elements are within `x` and, being as long, within each row.
                    unsafe {
                        let x_low = _mm256_loadu_ps(x.as_ptr().add(at));
                        let x_high = _mm256_loadu_ps(x.as_ptr().add(at + 8));
                        for i in 0..4 {
                            let row = rows[i].as_ptr().add(at);
                            low[i] = _mm256_fmadd_ps($load(row), x_low, low[i]);
                            high[i] = _mm256_fmadd_ps($load(row.add(8)), x_high, high[i]);
                        }
                    }
                }
                let mut sums = [0f32; 4];
                for i in 0..4 {
                    let mut lanes = [0f32; 8];
                    // SAFETY: `lanes` has room for the eight lanes.
                    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), _mm256_add_ps(low[i], high[i])) };
                    let rest = blocks * 16..x.len();
                    let rest: f32 = x[rest.clone()].iter().zip(&rows[i][rest]).map(|(x, w)| x * w.to_f32()).sum();
                    sums[i] = lanes.iter().sum::<f32>() + rest;
                }
                sums
            }
        };
    }

    dot_4!(dot_4_f32, f32, |row| _mm256_loadu_ps(row));
    dot_4!(dot_4_f16, f16, |row: *const f16| _mm256_cvtph_ps(_mm_loadu_si128(row.cast())));
    // A BF16 number is the upper half of an f32.
    dot_4!(dot_4_bf16, bf16, |row: *const bf16| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
        _mm_loadu_si128(row.cast())
    ))));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Dense>(name: &str, narrow: fn(f32) -> T) {
        for k in (0..70).chain([255, 256, 1000]) {
            // One element off at the front, so that nothing can rely on alignment.
            let x: Vec<f32> = (0..k + 1).map(|i| ((i * 37 + 5) % 101) as f32 / 50.0 - 1.0).collect();
            let rows: Vec<Vec<T>> = (0..4)
                .map(|r| (0..k + 1).map(|i| narrow(((i * 53 + r * 17) % 89) as f32 / 44.0 - 1.0)).collect())
                .collect();
            let rows: [&[T]; 4] = std::array::from_fn(|r| &rows[r][1..]);
            let x = &x[1..];
            let found = T::dot_4(x, rows);
            for (r, row) in rows.iter().enumerate() {
                let want: f64 = x.iter().zip(*row).map(|(x, w)| *x as f64 * w.to_f32() as f64).sum();
                let scalar = dot_scalar(x, row);
                assert!((found[r] as f64 - want).abs() <= 1e-5 * (k as f64 + 1.0), "{name} k={k}: {} {want}", found[r]);
                assert!((scalar as f64 - want).abs() <= 1e-5 * (k as f64 + 1.0), "{name} k={k} scalar");
                assert_eq!(T::dot(x, row).to_bits(), found[r].to_bits(), "{name} k={k}: alone and among four");
            }
        }
        for value in [f32::INFINITY, f32::NAN, 1e-8, -65504.0, 0.0] {
            let row = vec![narrow(value); 19];
            let (found, want) = (T::dot(&[1.0; 19], &row), dot_scalar(&[1.0; 19], &row));
            assert!(found == want || found.is_nan() && want.is_nan(), "{name} {value}: {found} {want}");
        }
    }

    #[test]
    fn vector_code_equals_the_definition_for_every_remainder_and_extreme_values() {
        check::<f32>("f32", |value| value);
        check::<f16>("f16", f16::from_f32);
        check::<bf16>("bf16", bf16::from_f32);
    }
}
