//! Products of quantised matrices with many inputs on AMX: a tile of sixteen inputs times a tile of sixteen rows, 32
//! columns at a time. The packed vectors are what the second tile wants as they lie there, and an input's 8-bit block is
//! a row of the first.
//!
//! The dot products are whole numbers, and what is made of them is the same chain of operations as everywhere, so the
//! results have the same bits as without tiles. That is also why dense types do not come here: the tiles multiply BF16,
//! which would round F16 and F32.
//!
//! Instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, __m512i, _mm512_add_epi32, _mm512_load_si512, _mm512_set1_epi32};
use std::arch::x86_64::{_mm512_setzero_si512, _mm512_store_si512};
use std::sync::OnceLock;

use super::formats::{Format, Offset, SUB, VECTOR};
use super::matrix::{AHEAD, INPUT_TILE, Quantised, add_sub, put, start};
use super::simd::avx512::Avx512;
use super::simd::{LANES, Simd};

#[cfg(all(test, target_os = "linux"))]
mod emulator;

/// Inputs from which tiles are used. For fewer, filling a tile costs more than it saves.
pub const FROM: usize = 8;

/// Inputs in a tile.
const TILE: usize = 16;

/// Whether the CPU has tiles of bytes and the system lets this process use them. Asks for them the first time.
pub fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const TILES_AND_BYTES: u32 = 1 << 24 | 1 << 25;
        let has = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & TILES_AND_BYTES == TILES_AND_BYTES;
        has && permitted()
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

/// Sums of sixteen inputs (rows) and sixteen matrix rows, twice for halves.
#[repr(C, align(64))]
struct Sums([[[i32; LANES]; TILE]; 2]);

/// Vectors of 32 columns.
#[repr(C, align(64))]
struct Columns([[u8; VECTOR]; 8]);

impl Config {
    /// Tiles 0 (sums), 2 (inputs) and 4 (columns) for sixteen inputs, 1 and 3 for the `rest` at the end.
    fn new<F: Format>(rest: usize) -> Config {
        let columns = if F::HALVES { SUB / 2 } else { SUB };
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        let mut shape = |tile: usize, rows: usize, row_bytes: usize| {
            if rows > 0 {
                config.rows[tile] = rows as u8;
                config.row_bytes[tile] = row_bytes as u16;
            }
        };
        shape(0, TILE, VECTOR);
        shape(1, rest, VECTOR);
        shape(2, TILE, columns);
        shape(3, rest, columns);
        shape(4, columns / 4, VECTOR);
        config
    }
}

/// `sums[i][row] = dot(inputs[i], columns of the row)` with the tiles of these numbers.
macro_rules! dot {
    ($multiply:literal, $sums_tile:literal, $inputs_tile:literal, $inputs:expr, $columns:expr, $sums:expr) => {
        asm!(
            concat!("tilezero tmm", $sums_tile),
            concat!("tileloadd tmm", $inputs_tile, ", [{inputs} + {line}*1]"),
            "tileloadd tmm4, [{columns} + {line}*1]",
            concat!($multiply, " tmm", $sums_tile, ", tmm", $inputs_tile, ", tmm4"),
            concat!("tilestored [{sums} + {line}*1], tmm", $sums_tile),
            inputs = in(reg) $inputs,
            columns = in(reg) $columns,
            sums = in(reg) $sums,
            line = in(reg) VECTOR,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _,
            options(nostack, preserves_flags)
        )
    };
}

/// Inputs lie a cache line apart, as do vectors and sums.
///
/// # Safety
/// The CPU has tiles and they are configured; there are `count` inputs, as many vectors as the configuration says, and
/// room for the sums.
#[inline(always)]
unsafe fn dot<F: Format>(inputs: *const i8, count: usize, columns: *const u8, sums: *mut i32) {
    // SAFETY: this function's conditions.
    unsafe {
        match (F::OFFSET, count == TILE) {
            (Offset::Signed, true) => dot!("tdpbssd", 0, 2, inputs, columns, sums),
            (Offset::Signed, false) => dot!("tdpbssd", 1, 3, inputs, columns, sums),
            (Offset::Fixed(_), true) => dot!("tdpbsud", 0, 2, inputs, columns, sums),
            (Offset::Fixed(_), false) => dot!("tdpbsud", 1, 3, inputs, columns, sums),
        }
    }
}

/// Runs a product as `isa.run(kernel)` does.
///
/// # Safety
/// [`is_available`], the CPU has AVX-512, and the kernel's own conditions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn run<F: Format>(kernel: &Quantised<F>) {
    type S = Avx512<false>;
    let Quantised { m, start: first_input, tile, k, n, .. } = *kernel;
    let config = Config::new::<F>(tile % TILE);
    let group_bytes = k / F::COLUMNS * F::PACKED;
    let mut results = [[0f32; LANES]; INPUT_TILE];
    let mut sums = Sums([[[0; LANES]; TILE]; 2]);
    let mut columns = Columns([[0; VECTOR]; 8]);
    // SAFETY: the CPU has tiles, and what is configured is a valid palette.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, preserves_flags)) };
    for group in 0..kernel.count {
        // SAFETY: as in the kernel without tiles: the group lies within the weights, block `b` of input `i` at
        // `b * m + i`.
        unsafe {
            let weights = kernel.weights.add(group * group_bytes);
            results[..tile].fill([0.0; LANES]);
            for column_block in 0..k / SUB {
                let block = weights.add(column_block / (F::COLUMNS / SUB) * F::PACKED);
                let sub = column_block % (F::COLUMNS / SUB);
                let planes = block.add(F::HEADER * LANES + sub * F::SUB_BYTES);
                for line in (0..F::SUB_BYTES).step_by(VECTOR) {
                    S::prefetch(planes.wrapping_add(AHEAD + line));
                }
                let scales = F::scales::<S>(block, sub);
                let vectors = match F::LOW {
                    8 => planes, // as they lie there
                    _ => {
                        for (to, vector) in columns.0.iter_mut().zip(F::weights::<S>(block, sub)) {
                            _mm512_store_si512(to.as_mut_ptr().cast(), vector);
                        }
                        columns.0.as_ptr().cast()
                    }
                };
                let inputs = kernel.input.as_ptr().add(column_block * m + first_input);
                for (chunk, results) in results[..tile].chunks_mut(TILE).enumerate() {
                    let inputs = inputs.add(chunk * TILE);
                    let values = (&raw const (*inputs).values).cast::<i8>();
                    dot::<F>(values, results.len(), vectors, sums.0[0].as_mut_ptr().cast());
                    if F::HALVES {
                        let (values, vectors) = (values.add(SUB / 2), vectors.add(4 * VECTOR));
                        dot::<F>(values, results.len(), vectors, sums.0[1].as_mut_ptr().cast());
                    }
                    for (i, result) in results.iter_mut().enumerate() {
                        let x = &*inputs.add(i);
                        let lowered = |half: usize| -> __m512i {
                            let dots = _mm512_load_si512(sums.0[half][i].as_ptr().cast());
                            _mm512_add_epi32(dots, _mm512_set1_epi32(start::<F>(x, half, 0)))
                        };
                        let dots = [lowered(0), if F::HALVES { lowered(1) } else { _mm512_setzero_si512() }];
                        let acc = add_sub::<S, F>(S::load(result.as_ptr()), dots, x, &scales);
                        S::store(result.as_mut_ptr(), acc);
                    }
                }
            }
            for (i, result) in results[..tile].iter().enumerate() {
                let out = kernel.out.add((first_input + i) * n);
                put::<S>(S::load(result.as_ptr()), out, (kernel.first + group) * LANES, n);
            }
        }
    }
    // SAFETY: gives the tiles back, so that the system need not keep them for this thread.
    unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::super::input::Input;
    use super::super::matrix::{Matrix, Product, multiply};
    use super::super::pool::Pool;
    use super::super::simd::Isa;
    use crate::weights::WeightType;

    #[test]
    fn tiles_give_the_bits_of_plain_rust() {
        let Some(tiles) = Isa::with_tiles() else {
            println!("skipped: neither AMX nor AVX-512 to emulate it beside");
            return;
        };
        let pool = Pool::new(2).unwrap();
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        for dtype in WeightType::ALL.into_iter().filter(|dtype| !dtype.is_dense()) {
            let (n, k) = (19, 512);
            let values: Vec<f32> = (0..n * k).map(|_| random()).collect();
            let tensor = candle_core::Tensor::from_vec(values, (n, k), &candle_core::Device::Cpu).unwrap();
            let stored = candle_core::quantized::QTensor::quantize(&tensor, dtype.ggml()).unwrap();
            let matrix = Matrix::pack(&pool, dtype, &stored.data().unwrap(), n, k).unwrap();
            // Below and at the threshold, whole tiles, a rest of one and of fifteen, and more than one run of inputs.
            for m in [7, 8, 16, 17, 31, 48, 130, 150] {
                let mut input = Input::default();
                input.reset(m, k).iter_mut().for_each(|x| *x = 100.0 * random());
                input.quantise(&pool, Isa::SCALAR);
                let product = |isa| {
                    let mut out = vec![f32::NAN; m * n];
                    multiply(&pool, isa, &input, &mut [Product { matrix: &matrix, out: &mut out }]);
                    out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                };
                assert!(product(tiles) == product(Isa::SCALAR), "{dtype} with {m} inputs");
            }
        }
    }
}
