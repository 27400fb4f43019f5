//! Products of quantised matrices with many inputs on AMX: a tile of sixteen inputs times a tile of sixteen rows, 32
//! columns at a time. Unpacked vectors are what the second tile wants, and an input's 8-bit block is a row of the first.
//!
//! The dot products are whole numbers, and what is made of them is the same chain of operations as everywhere, so the
//! results have the same bits as without tiles. BF16 and F16 have tiles of their own in [`rounded`].
//!
//! Instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2.

use std::arch::asm;
use std::arch::x86_64::_mm512_sub_epi8;
use std::arch::x86_64::{__cpuid, __cpuid_count, __m512i, _mm512_load_si512, _mm512_set1_epi8, _mm512_store_si512};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

use super::formats::{Format, Offset, SUB, Scales, VECTOR};
use super::input::{BEHIND, InputBlock, TILE};
use super::matrix::{INPUT_TILE, Quantised, add_sub, put};
use super::simd::avx512::Avx512;
use super::simd::{LANES, Simd};

pub(super) mod rounded;
#[cfg(all(test, target_os = "linux"))]
mod emulator;

/// Inputs from which tiles are used. With fewer, loading tiles of weights takes longer than multiplying without.
pub const FROM: usize = 64;

/// Whether the CPU has tiles of bytes and BF16 and the system lets this process use them. Asks for them the first time.
pub fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const ALL: u32 = 1 << 22 | 1 << 24 | 1 << 25;
        let has = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & ALL == ALL;
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

/// Times 32 columns that inputs take turns with: with their sums they fit a core's first cache.
const PART: usize = 32;

/// Tiles of inputs that are multiplied with a tile of weights once that is loaded.
const CHUNKS: usize = 4;

/// Times 32 columns whose products are made while something is made of the products before them.
const AHEAD: usize = 2;

const _: () = assert!(BEHIND >= CHUNKS * TILE);

/// A group's columns of a part as the tiles want them, and what has been made of them so far.
struct Room {
    /// Weights, lowered by the format's offset.
    weights: [Columns; PART],
    scales: [Scales<S>; PART],
    /// Results of sixteen inputs each.
    results: [[[f32; LANES]; TILE]; INPUT_TILE / TILE],
    products: [Products; 2],
}

/// 32 columns of a group.
#[repr(C, align(64))]
struct Columns([[u8; VECTOR]; 8]);

/// Of sixteen inputs and sixteen matrix rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Dots([[i32; LANES]; TILE]);

/// Products of some times 32 columns with some tiles of inputs, of each half.
type Products = [[[Dots; CHUNKS]; 2]; AHEAD];

type S = Avx512<false>;

/// `dots[chunk][i][row] = dot(inputs[chunk][i], columns of the row)`.
macro_rules! dot {
    ($inputs:expr, $columns:expr, $dots:expr, [$($zero:literal)*], [$($multiply:literal)*], [$($store:literal)*]) => {
        asm!(
            $($zero,)*
            "tileloadd tmm6, [{columns} + {line}*1]",
            $($multiply,)*
            $($store,)*
            inputs = in(reg) $inputs,
            columns = in(reg) $columns,
            dots = in(reg) $dots,
            line = in(reg) VECTOR,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _,
            options(nostack, preserves_flags)
        )
    };
}

/// The products of 32 columns, or half of them, with `C` tiles of inputs. Inputs lie a cache line apart, as do vectors and
/// products.
///
/// # Safety
/// The tiles are configured; the inputs are there, as many vectors as is configured, and room for the products.
#[inline(always)]
unsafe fn dot<const C: usize>(inputs: *const i8, columns: *const u8, dots: *mut [Dots; CHUNKS]) {
    // SAFETY: this function's conditions.
    unsafe {
        match C {
            1 => dot!(
                inputs, columns, dots,
                ["tilezero tmm0"],
                ["tileloadd tmm4, [{inputs} + {line}*1]" "tdpbssd tmm0, tmm4, tmm6"],
                ["tilestored [{dots} + {line}*1], tmm0"]
            ),
            2 => dot!(
                inputs, columns, dots,
                ["tilezero tmm0" "tilezero tmm1"],
                [
                    "tileloadd tmm4, [{inputs} + {line}*1]" "tdpbssd tmm0, tmm4, tmm6"
                    "tileloadd tmm5, [{inputs} + {line}*1 + 1024]" "tdpbssd tmm1, tmm5, tmm6"
                ],
                ["tilestored [{dots} + {line}*1], tmm0" "tilestored [{dots} + {line}*1 + 1024], tmm1"]
            ),
            _ => dot!(
                inputs, columns, dots,
                ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"],
                [
                    "tileloadd tmm4, [{inputs} + {line}*1]" "tdpbssd tmm0, tmm4, tmm6"
                    "tileloadd tmm5, [{inputs} + {line}*1 + 1024]" "tdpbssd tmm1, tmm5, tmm6"
                    "tileloadd tmm4, [{inputs} + {line}*1 + 2048]" "tdpbssd tmm2, tmm4, tmm6"
                    "tileloadd tmm5, [{inputs} + {line}*1 + 3072]" "tdpbssd tmm3, tmm5, tmm6"
                ],
                [
                    "tilestored [{dots} + {line}*1], tmm0" "tilestored [{dots} + {line}*1 + 1024], tmm1"
                    "tilestored [{dots} + {line}*1 + 2048], tmm2" "tilestored [{dots} + {line}*1 + 3072], tmm3"
                ]
            ),
        }
    }
}

/// Runs a product as `isa.run(kernel)` does.
///
/// # Safety
/// [`is_available`], the CPU has AVX-512, and the kernel's own conditions; behind its inputs lie [`BEHIND`] more.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn run<F: Format>(kernel: &Quantised<F>) {
    let Quantised { m, start, tile, n, k, .. } = *kernel;
    let columns = if F::HALVES { SUB / 2 } else { SUB };
    let (sums, inputs, weights) = ((TILE, VECTOR), (TILE, columns), (columns / 4, VECTOR));
    let config = Config::new([sums, sums, sums, sums, inputs, inputs, weights, (0, 0)]);
    let mut room = MaybeUninit::<Room>::uninit();
    let room = room.as_mut_ptr();
    let group_bytes = k / F::COLUMNS * F::PACKED;
    let chunks = tile.div_ceil(TILE);
    // SAFETY: as in the kernel without tiles: groups lie within the weights, and block `b` of input `i` at `b * m + i`.
    unsafe {
        config.load();
        for group in 0..kernel.count {
            let weights = kernel.weights.add(group * group_bytes);
            for from in (0..k / SUB).step_by(PART) {
                let blocks = from..(k / SUB).min(from + PART);
                unpack::<F>(weights, blocks.clone(), room);
                // What comes next is asked for in the meantime.
                let turns = chunks.div_ceil(CHUNKS);
                let lines = (F::PACKED * SUB / F::COLUMNS).div_ceil(turns * VECTOR);
                let mut ahead = weights.wrapping_add(blocks.end * SUB / F::COLUMNS * F::PACKED);
                for chunk in (0..chunks).step_by(CHUNKS) {
                    let turn = Turn {
                        inputs: kernel.input.as_ptr().add(start + chunk * TILE),
                        m,
                        blocks: blocks.clone(),
                        results: (&raw mut (*room).results[chunk]).cast(),
                        ahead,
                        lines,
                    };
                    match chunks - chunk {
                        1 => multiply::<F, 1>(turn, room),
                        2 => multiply::<F, 2>(turn, room),
                        3 => multiply::<F, 3>(turn, room),
                        _ => multiply::<F, 4>(turn, room),
                    }
                    ahead = ahead.wrapping_add(lines * blocks.len() * VECTOR);
                }
            }
            for i in 0..tile {
                let out = kernel.out.add((start + i) * n);
                let result = (&raw const (*room).results[i / TILE][i % TILE]).cast();
                put::<S>(S::load(result), out, (kernel.first + group) * LANES, n);
            }
        }
        release();
    }
}

/// # Safety
/// As [`run`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn unpack<F: Format>(weights: *const u8, blocks: Range<usize>, room: *mut Room) {
    // SAFETY: this function's conditions.
    unsafe {
        for (at, column_block) in blocks.enumerate() {
            let block = weights.add(column_block / (F::COLUMNS / SUB) * F::PACKED);
            let sub = column_block % (F::COLUMNS / SUB);
            (&raw mut (*room).scales[at]).write(F::scales::<S>(block, sub));
            let to = (&raw mut (*room).weights[at]).cast::<__m512i>();
            let w = F::weights::<S>(block, sub);
            for j in 0..8 {
                let lowered = match F::OFFSET {
                    Offset::Fixed(offset) => _mm512_sub_epi8(w[j], _mm512_set1_epi8(offset as i8)),
                    Offset::Signed => w[j],
                };
                _mm512_store_si512(to.add(j), lowered);
            }
        }
    }
}

/// Some tiles of inputs with the columns of a part.
struct Turn {
    /// Those of the first of all columns.
    inputs: *const InputBlock,
    m: usize,
    blocks: Range<usize>,
    results: *mut f32,
    /// What is asked for ahead, so many lines for each 32 columns.
    ahead: *const u8,
    lines: usize,
}

/// # Safety
/// As [`run`]; the room has been filled.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn multiply<F: Format, const C: usize>(turn: Turn, room: *mut Room) {
    let Turn { inputs, m, blocks, results, mut ahead, lines } = turn;
    // SAFETY: this function's conditions; what is asked for ahead need not be there.
    unsafe {
        if blocks.start == 0 {
            results.write_bytes(0, C * TILE * LANES);
        }
        let inputs = inputs.add(blocks.start * m);
        let count = blocks.len();
        // The products of block `at`, and requests for its share of lines.
        let mut dots = |at: usize| {
            let values = (&raw const (*inputs.add(at * m)).values).cast::<i8>();
            let vectors = (&raw const (*room).weights[at]).cast::<u8>();
            let products = &raw mut (*room).products[at / AHEAD % 2][at % AHEAD];
            dot::<C>(values, vectors, &raw mut (*products)[0]);
            if F::HALVES {
                dot::<C>(values.add(SUB / 2), vectors.add(4 * VECTOR), &raw mut (*products)[1]);
            }
            for _ in 0..lines {
                S::prefetch(ahead);
                ahead = ahead.wrapping_add(VECTOR);
            }
        };
        for at in 0..AHEAD.min(count) {
            dots(at);
        }
        for from in (0..count).step_by(AHEAD) {
            // What tiles and vectors do has nothing to do with each other until the next round, so it goes on at once.
            for chunk in 0..C {
                if chunk < AHEAD && from + AHEAD + chunk < count {
                    dots(from + AHEAD + chunk);
                }
                if C < AHEAD && from + AHEAD + 1 < count {
                    dots(from + AHEAD + 1);
                }
                let results = results.add(chunk * TILE * LANES);
                let mut sums = [S::splat(0.0); TILE];
                for i in 0..TILE {
                    sums[i] = S::load(results.add(i * LANES));
                }
                for at in from..count.min(from + AHEAD) {
                    let scales = &(*room).scales[at];
                    let x = inputs.add(at * m + chunk * TILE);
                    let products = &raw const (*room).products[at / AHEAD % 2][at % AHEAD];
                    let [first, second] = [0, 1].map(|half| (&raw const (*products)[half][chunk]).cast::<__m512i>());
                    for i in 0..TILE {
                        let dots = _mm512_load_si512(first.add(i));
                        let dots = [dots, if F::HALVES { _mm512_load_si512(second.add(i)) } else { dots }];
                        sums[i] = add_sub::<S, F>(sums[i], dots, &*x.add(i), scales);
                    }
                }
                for i in 0..TILE {
                    S::store(results.add(i * LANES), sums[i]);
                }
            }
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use half::{bf16, f16};

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

    fn input(pool: &Pool, isa: Isa, dtype: WeightType, m: usize, k: usize, mut random: impl FnMut() -> f32) -> Input {
        let mut input = Input::default();
        input.reset(m, k).iter_mut().for_each(|x| *x = 100.0 * random());
        input.prepare(pool, isa, std::iter::once(dtype));
        input
    }

    fn product(pool: &Pool, isa: Isa, input: &Input, matrix: &Matrix) -> Vec<u32> {
        let mut out = vec![f32::NAN; input.rows() * matrix.rows()];
        multiply(pool, isa, input, &mut [Product { matrix, out: &mut out }]);
        out.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn tiles_give_the_bits_of_plain_rust() {
        let Some(tiles) = Isa::with_tiles() else {
            println!("skipped: neither AMX nor AVX-512 to emulate it beside");
            return;
        };
        let pool = Pool::new(2).unwrap();
        let mut random = random();
        for dtype in WeightType::ALL.into_iter().filter(|dtype| !dtype.is_dense()) {
            let (n, k) = (19, 512);
            let values: Vec<f32> = (0..n * k).map(|_| random()).collect();
            let tensor = candle_core::Tensor::from_vec(values, (n, k), &candle_core::Device::Cpu).unwrap();
            let stored = candle_core::quantized::QTensor::quantize(&tensor, dtype.ggml()).unwrap();
            let matrix = Matrix::pack(&pool, dtype, &stored.data().unwrap(), n, k).unwrap();
            // Below and at the threshold, whole tiles, a rest of one and of fifteen, and more than one run of inputs.
            for m in [63, 64, 80, 81, 95, 112, 129, 150, 200] {
                let input = input(&pool, Isa::SCALAR, dtype, m, k, &mut random);
                let expected = product(&pool, Isa::SCALAR, &input, &matrix);
                assert!(product(&pool, tiles, &input, &matrix) == expected, "{dtype} with {m} inputs");
            }
        }
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
    fn tiles_of_bf16_and_f16_give_the_bits_that_the_manual_says() {
        let Some(tiles) = Isa::with_tiles() else {
            println!("skipped: neither AMX nor AVX-512 to emulate it beside");
            return;
        };
        let pool = Pool::new(2).unwrap();
        let mut random = random();
        for dtype in [WeightType::BF16, WeightType::F16] {
            // Odd groups, odd rows, odd columns, fewer than a step has, parts, and more columns than stay in a cache.
            for (n, k) in [(1, 1), (19, 33), (40, 64), (83, 543), (16, 2080)] {
                let mut bytes: Vec<u8> = Vec::with_capacity(n * k * 2);
                for i in 0..n * k {
                    // Subnormal ones of F16 among them.
                    let value = if i % 7 == 0 { random() * 1e-5 } else { random() };
                    match dtype {
                        WeightType::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                        _ => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                    }
                }
                let matrix = Matrix::pack(&pool, dtype, &bytes, n, k).unwrap();
                let mut row = vec![0f32; k];
                for m in [1, 2, 3, 15, 16, 17, 32, 33, 270] {
                    if m * k > 100_000 && !super::is_available() {
                        continue; // too slow in emulation
                    }
                    let mut input = input(&pool, tiles, dtype, m, k, &mut random);
                    if dtype == WeightType::F16 {
                        // Tiles take subnormal numbers for zeros; there are none in what they are given.
                        input.values_mut().iter_mut().step_by(5).for_each(|x| *x *= 1e-31);
                        input.values_mut().iter_mut().step_by(11).for_each(|x| *x *= 1e-9);
                    }
                    input.prepare(&pool, tiles, std::iter::once(dtype));
                    let found = product(&pool, tiles, &input, &matrix);
                    for j in 0..n {
                        matrix.widen_row(j, &mut row);
                        for i in 0..m {
                            let sum = expected(dtype, &input.values()[i * k..][..k], &row);
                            assert_eq!(
                                f32::from_bits(found[i * n + j]),
                                sum,
                                "{dtype} {n} x {k}, {m} inputs: [{i},{j}]"
                            );
                        }
                    }
                }
            }
        }
    }

    /// A product of BF16, or of each a sum of two BF16.
    fn expected(dtype: WeightType, x: &[f32], w: &[f32]) -> f32 {
        let parts = |value: &f32| match dtype {
            WeightType::F16 => halves(*value),
            _ => [bf16::from_f32(*value).to_f32(), 0.0],
        };
        let mut sum = 0f32;
        for (x, w) in x.chunks(32).zip(w.chunks(32)) {
            let part = |values: &[f32], part: usize| values.iter().map(|value| parts(value)[part]).collect::<Vec<_>>();
            let order = if dtype == WeightType::F16 { &[(0, 1), (0, 0), (1, 0)][..] } else { &[(0, 0)] };
            for &(of_x, of_w) in order {
                sum = step(sum, &part(x, of_x), &part(w, of_w));
            }
        }
        sum
    }
}
