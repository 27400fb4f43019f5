//! AMX: whether it is there, and how its tiles are set up. [`rounded`] multiplies with them what
//! [`unpack`] makes of weights.
//!
//! Instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use super::simd::avx512::has_bf16;

pub(super) mod rounded;
pub(super) mod unpack;
#[cfg(all(test, target_os = "linux"))]
mod emulator;

/// Whether the CPU has tiles of BF16, and AVX-512 with BF16 beside them as all that have tiles do, and the system lets this
/// process use them. Asks for them the first time.
pub fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const ALL: u32 = 1 << 22 | 1 << 24;
        let has = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & ALL == ALL;
        has && has_bf16() && permitted()
    })
}

/// Linux keeps tiles, which are large, from processes that have not asked for them.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and changes nothing but what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Whether tests can run what is here.
#[cfg(all(test, target_os = "linux"))]
pub fn is_there_or_emulated() -> bool {
    is_available() || emulator::install()
}

/// The shapes of the tiles.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const _: () = assert!(size_of::<Config>() == 64);

impl Config {
    /// Tiles 0 to 7 of so many rows of so many bytes; none where there are no rows.
    fn new(shapes: [(usize, usize); 8]) -> Config {
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (tile, (rows, row_bytes)) in shapes.into_iter().enumerate().filter(|(_, (rows, _))| *rows > 0) {
            (config.rows[tile], config.row_bytes[tile]) = (rows as u8, row_bytes as u16);
        }
        config
    }

    /// Takes effect for this thread.
    ///
    /// # Safety
    /// [`is_available`], and the shapes are valid.
    unsafe fn load(&self) {
        // SAFETY: this function's conditions.
        unsafe { asm!("ldtilecfg [{}]", in(reg) self, options(nostack, preserves_flags)) }
    }
}

/// Gives the tiles back, so that the system need not keep them for this thread.
///
/// # Safety
/// [`is_available`].
unsafe fn release() {
    // SAFETY: this function's condition.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use half::bf16;

    use super::super::input::{Input, halves};
    use super::super::matrix::{Matrix, Product, multiply};
    use super::super::pool::Pool;
    use super::super::simd::Isa;
    use crate::weights::WeightType;

    /// Seeded numbers in -0.5..0.5.
    fn random() -> impl FnMut() -> f32 {
        let mut state = 1u64;
        move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        }
    }

    fn product(pool: &Pool, isa: Isa, input: &Input, matrix: &Matrix) -> Vec<u32> {
        let mut out = vec![f32::NAN; input.rows() * matrix.rows()];
        multiply(pool, isa, input, &mut [Product { matrix, out: &mut out }]);
        out.into_iter().map(f32::to_bits).collect()
    }

    /// What an instruction gives for 32 columns: a chain of those that come first in a pair and one of those that come
    /// second, and then their sum.
    fn step(sum: f32, x: &[f32], w: &[f32]) -> f32 {
        let chain = |first: usize| {
            let pairs = x.iter().zip(w).skip(first).step_by(2);
            pairs.fold(0f32, |chain, (x, w)| x.mul_add(*w, chain))
        };
        sum + (chain(0) + chain(1))
    }

    #[test]
    fn tiles_give_the_bits_that_the_manual_says() {
        let Some(tiles) = Isa::with_tiles() else {
            println!("skipped: neither AMX nor AVX-512 with BF16 to emulate it beside");
            return;
        };
        let pool = Pool::new(2).unwrap();
        let mut random = random();
        // Of each type, and whether rows ask for BF16.
        let kinds = WeightType::ALL.into_iter().filter(|dtype| *dtype != WeightType::F32).flat_map(|dtype| {
            let asks: &[bool] = match dtype {
                WeightType::F16 => &[false, true],
                _ => &[true],
            };
            asks.iter().map(move |&asks| (dtype, asks))
        });
        for (dtype, asks) in kinds {
            let halved = dtype == WeightType::F16 && !asks;
            // Odd groups, odd rows, odd columns, fewer than a step has, parts, and more columns than stay in a cache.
            let sizes = match dtype.is_dense() {
                true => [(1, 1), (19, 33), (40, 64), (83, 543), (16, 2080)],
                false => [(1, 256), (19, 256), (40, 512), (83, 768), (16, 2304)],
            };
            for (n, k) in sizes {
                let values = (0..n * k).map(|i| if i % 7 == 0 { random() * 1e-5 } else { random() }).collect();
                // Subnormal ones of F16 among them.
                let values =
                    candle_core::Tensor::from_vec::<_, f32>(values, (n, k), &candle_core::Device::Cpu).unwrap();
                let stored = candle_core::quantized::QTensor::quantize(&values, dtype.ggml()).unwrap();
                let matrix = Matrix::pack(&pool, dtype, &stored.data().unwrap(), n, k).unwrap();
                let mut row = vec![0f32; k];
                let widened = if dtype.is_dense() { Vec::new() } else { widened(&pool, tiles, &matrix) };
                for m in [1, 2, 3, 15, 16, 17, 32, 33, 270] {
                    if m * k > 100_000 && !super::is_available() {
                        continue; // too slow in emulation
                    }
                    let mut input = Input::default();
                    let rows = if asks { m } else { 0 };
                    input.reset(m, rows, k).iter_mut().for_each(|x| *x = 100.0 * random());
                    if halved {
                        // Tiles take subnormal numbers for zeros; there are none in what they are given.
                        input.values_mut().iter_mut().step_by(5).for_each(|x| *x *= 1e-31);
                        input.values_mut().iter_mut().step_by(11).for_each(|x| *x *= 1e-9);
                    }
                    input.prepare(&pool, tiles, std::iter::once(dtype));
                    let found = product(&pool, tiles, &input, &matrix);
                    for j in 0..n {
                        matrix.widen_row(j, &mut row);
                        if !dtype.is_dense() {
                            row.copy_from_slice(&widened[j * k..][..k]);
                        }
                        for i in 0..m {
                            let sum = expected(halved, &input.values()[i * k..][..k], &row);
                            assert_eq!(
                                f32::from_bits(found[i * n + j]),
                                sum,
                                "{dtype} {n} x {k}, {m} inputs, {rows} in BF16: [{i},{j}]"
                            );
                        }
                    }
                }
            }
        }
    }

    /// A matrix as widened rows are multiplied with it: what it gives for rows that are one and zeros.
    fn widened(pool: &Pool, tiles: Isa, matrix: &Matrix) -> Vec<f32> {
        let (n, k) = (matrix.rows(), matrix.columns());
        let mut input = Input::default();
        input.reset(k, k, k).iter_mut().enumerate().for_each(|(i, x)| *x = f32::from(i % (k + 1) == 0));
        input.prepare(pool, tiles, std::iter::once(matrix.dtype()));
        let columns = product(pool, tiles, &input, matrix);
        (0..n * k).map(|i| f32::from_bits(columns[i % k * n + i / k])).collect()
    }

    #[test]
    fn weights_are_widened_to_within_a_unit_and_on_average_to_what_they_were() {
        let Some(tiles) = Isa::with_tiles() else {
            println!("skipped: neither AMX nor AVX-512 with BF16 to emulate it beside");
            return;
        };
        let pool = Pool::new(2).unwrap();
        let mut random = random();
        for dtype in WeightType::ALL.into_iter().filter(|dtype| !dtype.is_dense()) {
            let (n, k) = (48, 256);
            let values = (0..n * k).map(|_| random()).collect();
            let values = candle_core::Tensor::from_vec::<_, f32>(values, (n, k), &candle_core::Device::Cpu).unwrap();
            let stored = candle_core::quantized::QTensor::quantize(&values, dtype.ggml()).unwrap();
            let matrix = Matrix::pack(&pool, dtype, &stored.data().unwrap(), n, k).unwrap();
            let (mut row, mut total, mut size) = (vec![0f32; k], 0f64, 0f64);
            for (j, widened) in widened(&pool, tiles, &matrix).chunks(k).enumerate() {
                matrix.widen_row(j, &mut row);
                let greatest = row.iter().fold(0f32, |greatest, w| greatest.max(w.abs()));
                for (found, w) in widened.iter().zip(&row) {
                    // A unit of the last of eight bits, of less than twice the number; and what scaling leaves.
                    assert!((found - w).abs() <= w.abs() / 128.0 + greatest * 2e-5, "{dtype}: {found} for {w}");
                    total += f64::from((found - w) * w.signum());
                    size += f64::from(w.abs());
                }
            }
            // Cutting bits off alone would be ten times that.
            assert!((total / size).abs() < 4e-4, "{dtype}: {} too large on average", total / size);
        }
    }

    /// A product of numbers rounded to BF16, or of each as a sum of two.
    fn expected(halved: bool, x: &[f32], w: &[f32]) -> f32 {
        let parts = |value: f32| match halved {
            true => halves(value),
            false => [bf16::from_f32(value).to_f32(), 0.0],
        };
        let order = if halved { &[(0, 1), (0, 0), (1, 0)][..] } else { &[(0, 0)] };
        let mut sum = 0f32;
        for (x, w) in x.chunks(32).zip(w.chunks(32)) {
            let [x, w] = [x, w].map(|values| values.iter().map(|value| parts(*value)).collect::<Vec<_>>());
            for &(of_x, of_w) in order {
                let [x, w] =
                    [(&x, of_x), (&w, of_w)].map(|(parts, part)| parts.iter().map(|of| of[part]).collect::<Vec<_>>());
                sum = step(sum, &x, &w);
            }
        }
        sum
    }
}
