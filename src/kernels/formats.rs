//! How quantised matrices are packed. Sixteen rows lie side by side: the four values of columns `4j..4j + 4` of all
//! sixteen are one vector of 64 bytes, so that one instruction multiplies them with four values of an input, and the
//! sixteen lanes are sixteen results that never have to be added across. The bytes are those of the file in another order.
//!
//! A [`Format`] says what a GGML type is made of: columns that share a header, bits of a value in up to two planes, and
//! how scales are stored. The vectors of 32 columns are called `j = 0..8` here.

use half::f16;

use super::simd::{LANES, Simd};

/// Bytes of a vector.
pub const VECTOR: usize = 64;

/// Columns that one set of vectors covers.
pub const SUB: usize = 32;

/// What a stored value must be lowered by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Offset {
    /// By this: values are unsigned and below 128.
    Fixed(i32),
    /// By nothing: values are signed bytes.
    Signed,
}

/// One block of one row, taken apart.
pub struct Parts {
    /// Values, unsigned as stored.
    pub values: [u8; 256],
    /// Scale of the whole block.
    pub d: f16,
    /// Scale of the minima, or the minimum where there is one.
    pub m: f16,
    /// Pairs of small integers for each 32 columns: scale and minimum, or the scales of two halves.
    pub pairs: [[u8; 2]; 8],
    /// Minima of two halves.
    pub min_pairs: [[u8; 2]; 8],
}

/// Scales and minima of 32 columns of sixteen rows; two of each where the halves differ.
#[derive(Clone, Copy)]
pub struct Scales<S: Simd> {
    /// Worth of a unit.
    pub scale: [S::F; 2],
    /// What a row's values are lowered by, in the weights' own unit.
    pub min: [S::F; 2],
}

/// A quantised GGML type, packed by sixteen rows.
pub trait Format: 'static {
    /// Columns of a block.
    const COLUMNS: usize;
    /// Bytes of a block of one row.
    const BLOCK_BYTES: usize;
    /// Bits of a value in the low plane: 8, 4 or 2.
    const LOW: usize;
    /// Bits in the high plane: 0, 1 or 2.
    const HIGH: usize;
    /// What values are lowered by.
    const OFFSET: Offset;
    /// Whether there are minima.
    const MINIMA: bool;
    /// Whether each half of 32 columns has a scale of its own.
    const HALVES: bool;
    /// Bytes of the header of one row.
    const HEADER: usize;

    /// Takes a block of one row apart.
    fn parse(block: &[u8], parts: &mut Parts);

    /// Puts what is not a value into the header of row `row`; the header's bytes are in the order `[byte][row]`, two-byte
    /// numbers first.
    fn pack_header(parts: &Parts, row: usize, header: &mut [u8]);

    /// Scales of columns `32 * sub..` of the block.
    ///
    /// # Safety
    /// As [`Simd`]; `block` points to a packed block.
    unsafe fn scales<S: Simd>(block: *const u8, sub: usize) -> Scales<S>;

    /// Bytes of a packed block: sixteen rows.
    const PACKED: usize = Self::BLOCK_BYTES * LANES;
    /// Bytes of the planes of 32 columns.
    const SUB_BYTES: usize = VECTOR * (Self::LOW + Self::HIGH);

    /// Packs the same block of sixteen rows; `None` is a row of zeros behind the last.
    fn pack(rows: [Option<&[u8]>; LANES], out: &mut [u8]) {
        const { assert!(Self::PACKED == Self::HEADER * LANES + Self::COLUMNS / SUB * Self::SUB_BYTES) };
        out.fill(0);
        let (header, planes) = out.split_at_mut(Self::HEADER * LANES);
        let mut parts =
            Parts { values: [0; 256], d: f16::ZERO, m: f16::ZERO, pairs: [[0; 2]; 8], min_pairs: [[0; 2]; 8] };
        for (row, block) in rows.into_iter().enumerate() {
            let Some(block) = block else { continue };
            Self::parse(block, &mut parts);
            Self::pack_header(&parts, row, header);
            for (sub, planes) in planes.chunks_exact_mut(Self::SUB_BYTES).enumerate() {
                let values: &[u8; SUB] = parts.values[sub * SUB..][..SUB].try_into().expect("32 values");
                let (low, high) = planes.split_at_mut(VECTOR * Self::LOW);
                spread(Self::LOW, 0, values, row, low);
                if Self::HIGH > 0 {
                    spread(Self::HIGH, Self::LOW, values, row, high);
                }
            }
        }
    }

    /// The vectors of columns `32 * sub..` of the block.
    ///
    /// # Safety
    /// As [`Simd`]; `block` points to a packed block.
    #[inline(always)]
    unsafe fn weights<S: Simd>(block: *const u8, sub: usize) -> [S::B; 8] {
        // SAFETY: the planes lie within the block.
        unsafe {
            let low = block.add(Self::HEADER * LANES + sub * Self::SUB_BYTES);
            let mut w = match Self::LOW {
                8 => eight_bits::<S>(low),
                4 => four_bits::<S>(low),
                _ => two_bits::<S, 0>(low),
            };
            let high = low.add(VECTOR * Self::LOW);
            match (Self::LOW, Self::HIGH) {
                (4, 1) => {
                    let bits = one_bit::<S, 4>(high);
                    for j in 0..8 {
                        w[j] = S::or(w[j], bits[j]);
                    }
                }
                (2, 1) => {
                    let bits = one_bit::<S, 2>(high);
                    for j in 0..8 {
                        w[j] = S::or(w[j], bits[j]);
                    }
                }
                (4, 2) => {
                    let bits = two_bits::<S, 4>(high);
                    for j in 0..8 {
                        w[j] = S::or(w[j], bits[j]);
                    }
                }
                _ => {}
            }
            w
        }
    }

    /// Widens row `row` of `group`, a packed block, to `out`.
    fn unpack_row(group: &[u8], row: usize, out: &mut [f32]) {
        assert!(group.len() == Self::PACKED && row < LANES && out.len() == Self::COLUMNS, "no row {row} of a block");
        // SAFETY: plain Rust, and the block is whole.
        let scales = |sub| unsafe { Self::scales::<super::simd::scalar::Scalar>(group.as_ptr(), sub) };
        let planes = &group[Self::HEADER * LANES..];
        for (sub, (planes, out)) in planes.chunks_exact(Self::SUB_BYTES).zip(out.chunks_exact_mut(SUB)).enumerate() {
            let scales = scales(sub);
            let (low, high) = planes.split_at(VECTOR * Self::LOW);
            for (column, out) in out.iter_mut().enumerate() {
                let mut value = gather(Self::LOW, low, row, column) as i32;
                if Self::HIGH > 0 {
                    value |= (gather(Self::HIGH, high, row, column) as i32) << Self::LOW;
                }
                value = match Self::OFFSET {
                    Offset::Fixed(offset) => value - offset,
                    Offset::Signed => value as u8 as i8 as i32,
                };
                let half = if Self::HALVES { column / 16 } else { 0 };
                *out = scales.scale[half][row] * value as f32;
                if Self::MINIMA {
                    *out -= scales.min[half][row];
                }
            }
        }
    }
}

/// Where the value of a row's column lies in a plane of `bits` bits a value: byte and shift. Vectors that share a byte are
/// as far apart as possible, so that one shift and one mask give half of them, then the next.
#[inline(always)]
fn place(bits: usize, row: usize, column: usize) -> (usize, usize) {
    let (j, t) = (column / 4, column % 4);
    ((j % bits) * VECTOR + 4 * row + t, (j / bits) * bits)
}

/// Puts bits `from..from + bits` of 32 values of a row into a plane. The four values of a vector's lane are one word.
fn spread(bits: usize, from: usize, values: &[u8; SUB], row: usize, plane: &mut [u8]) {
    let mask = 0x0101_0101 * (0xff >> (8 - bits));
    let (words, _) = values.as_chunks::<4>();
    for vector in 0..bits {
        let mut word = 0;
        for part in 0..8 / bits {
            let four = u32::from_le_bytes(words[vector + part * bits]);
            word |= (four >> from & mask) << (part * bits);
        }
        plane[vector * VECTOR + 4 * row..][..4].copy_from_slice(&word.to_le_bytes());
    }
}

fn gather(bits: usize, plane: &[u8], row: usize, column: usize) -> u8 {
    let (byte, shift) = place(bits, row, column);
    (plane[byte] >> shift) & (0xffu8 >> (8 - bits))
}

#[inline(always)]
unsafe fn eight_bits<S: Simd>(plane: *const u8) -> [S::B; 8] {
    // SAFETY: eight vectors.
    unsafe {
        let mut w = [S::splat_bytes(0); 8];
        for (j, w) in w.iter_mut().enumerate() {
            *w = S::load_bytes(plane.add(VECTOR * j));
        }
        w
    }
}

#[inline(always)]
unsafe fn four_bits<S: Simd>(plane: *const u8) -> [S::B; 8] {
    // SAFETY: four vectors.
    unsafe {
        let mask = S::splat_bytes(0x0f);
        let mut w = [mask; 8];
        for j in 0..4 {
            let both = S::load_bytes(plane.add(VECTOR * j));
            w[j] = S::and(both, mask);
            w[j + 4] = S::and(S::shr::<4>(both), mask);
        }
        w
    }
}

/// Two bits a value, moved left by `UP`.
#[inline(always)]
unsafe fn two_bits<S: Simd, const UP: u32>(plane: *const u8) -> [S::B; 8] {
    // SAFETY: two vectors.
    unsafe {
        let mask = S::splat_bytes(3 << UP);
        let mut w = [mask; 8];
        for j in 0..2 {
            let all = S::load_bytes(plane.add(VECTOR * j));
            if UP == 0 {
                w[j] = S::and(all, mask);
                w[j + 2] = S::and(S::shr::<2>(all), mask);
                w[j + 4] = S::and(S::shr::<4>(all), mask);
                w[j + 6] = S::and(S::shr::<6>(all), mask);
            } else {
                w[j] = S::and(S::shl::<4>(all), mask);
                w[j + 2] = S::and(S::shl::<2>(all), mask);
                w[j + 4] = S::and(all, mask);
                w[j + 6] = S::and(S::shr::<2>(all), mask);
            }
        }
        w
    }
}

/// One bit a value, moved left by `UP`, which is 2 or 4.
#[inline(always)]
unsafe fn one_bit<S: Simd, const UP: u32>(plane: *const u8) -> [S::B; 8] {
    // SAFETY: one vector.
    unsafe {
        let all = S::load_bytes(plane);
        let mask = S::splat_bytes(1 << UP);
        let w = if UP == 4 {
            [
                S::shl::<4>(all),
                S::shl::<3>(all),
                S::shl::<2>(all),
                S::shl::<1>(all),
                all,
                S::shr::<1>(all),
                S::shr::<2>(all),
                S::shr::<3>(all),
            ]
        } else {
            [
                S::shl::<2>(all),
                S::shl::<1>(all),
                all,
                S::shr::<1>(all),
                S::shr::<2>(all),
                S::shr::<3>(all),
                S::shr::<4>(all),
                S::shr::<5>(all),
            ]
        };
        let mut masked = w;
        for j in 0..8 {
            masked[j] = S::and(w[j], mask);
        }
        masked
    }
}

/// Reads a two-byte float.
fn float(bytes: &[u8]) -> f16 {
    f16::from_le_bytes([bytes[0], bytes[1]])
}

/// Puts the header's `number`th two-byte float of row `row`.
fn put_float(header: &mut [u8], number: usize, row: usize, value: f16) {
    header[2 * LANES * number + 2 * row..][..2].copy_from_slice(&value.to_le_bytes());
}

/// The header's `number`th two-byte floats.
#[inline(always)]
unsafe fn floats<S: Simd>(block: *const u8, number: usize) -> S::F {
    // SAFETY: they lie within the header.
    unsafe { S::load_f16(block.add(2 * LANES * number).cast()) }
}

/// Eight pairs of six-bit integers in twelve bytes: a byte of low halves for each pair, then the high bits of two pairs
/// in a byte.
fn put_pairs(pairs: &[[u8; 2]; 8], row: usize, bytes: &mut [u8]) {
    for (i, [a, b]) in pairs.iter().enumerate() {
        bytes[LANES * i + row] = (a & 15) | (b << 4);
        bytes[LANES * (8 + i / 2) + row] |= ((a >> 4) | (b >> 4) << 2) << (4 * (i % 2));
    }
}

/// The pair `i` of sixteen rows.
#[inline(always)]
unsafe fn pair<S: Simd>(bytes: *const u8, i: usize) -> [S::I; 2] {
    // SAFETY: twelve times sixteen bytes.
    unsafe {
        let low = S::load_u8(bytes.add(LANES * i));
        let high = S::shr_i(S::load_u8(bytes.add(LANES * (8 + i / 2))), 4 * (i % 2));
        let a = S::add_i(S::and_i(low, 15), S::shl_i::<4>(S::and_i(high, 3)));
        let b = S::add_i(S::shr_i(low, 4), S::shl_i::<2>(S::and_i(high, 12)));
        [a, b]
    }
}

/// The scales and minima that Q4_K and Q5_K share: `d`, `dmin` and twelve bytes of six-bit pairs.
#[inline(always)]
unsafe fn scale_and_min<S: Simd>(block: *const u8, sub: usize) -> Scales<S> {
    // SAFETY: the header has 16 bytes a row.
    unsafe {
        let [scale, min] = pair::<S>(block.add(4 * LANES), sub);
        let scale = S::mul(floats::<S>(block, 0), S::to_f32(scale));
        let min = S::mul(floats::<S>(block, 1), S::to_f32(min));
        Scales { scale: [scale; 2], min: [min; 2] }
    }
}

/// The twelve bytes of Q4_K and Q5_K: eight scales and eight minima of six bits.
fn parse_scale_and_min(s: &[u8], parts: &mut Parts) {
    for (i, pair) in parts.pairs.iter_mut().enumerate() {
        *pair = match i < 4 {
            true => [s[i] & 63, s[i + 4] & 63],
            false => [(s[i + 4] & 15) | (s[i - 4] >> 6) << 4, (s[i + 4] >> 4) | (s[i] >> 6) << 4],
        };
    }
}

/// Nibbles of 32 values in 16 bytes: the low ones first.
fn parse_nibbles(bytes: &[u8], values: &mut [u8]) {
    let (low, high) = values.split_at_mut(16);
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// A fifth bit for each of 32 values.
fn parse_fifth_bits(bytes: &[u8], values: &mut [u8]) {
    let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    for (i, value) in values[..32].iter_mut().enumerate() {
        *value |= ((bits >> i & 1) as u8) << 4;
    }
}

/// The five types with blocks of 32: a scale, maybe a minimum (stored with the opposite sign of a K-quant's), maybe fifth
/// bits, values.
macro_rules! simple_format {
    ($(#[$doc:meta])* $name:ident, $low:expr, $high:expr, $offset:expr, $minima:expr, $bytes:expr, |$block:ident, $values:ident| $parse:expr) => {
        $(#[$doc])*
        pub struct $name;

        impl Format for $name {
            const COLUMNS: usize = 32;
            const BLOCK_BYTES: usize = $bytes;
            const LOW: usize = $low;
            const HIGH: usize = $high;
            const OFFSET: Offset = $offset;
            const MINIMA: bool = $minima;
            const HALVES: bool = false;
            const HEADER: usize = if $minima { 4 } else { 2 };

            fn parse(block: &[u8], parts: &mut Parts) {
                parts.d = float(block);
                if $minima {
                    parts.m = float(&block[2..]);
                }
                let $block = &block[Self::HEADER..];
                let $values = &mut parts.values;
                $parse;
            }

            fn pack_header(parts: &Parts, row: usize, header: &mut [u8]) {
                put_float(header, 0, row, parts.d);
                if $minima {
                    put_float(header, 1, row, parts.m);
                }
            }

            #[inline(always)]
            unsafe fn scales<S: Simd>(block: *const u8, _sub: usize) -> Scales<S> {
                // SAFETY: the floats lie in the header.
                unsafe {
                    let min = match $minima {
                        true => S::sub(S::splat(0.0), floats::<S>(block, 1)),
                        false => S::splat(0.0),
                    };
                    Scales { scale: [floats::<S>(block, 0); 2], min: [min; 2] }
                }
            }
        }
    };
}

simple_format!(
    /// 4 bits, a scale.
    Q4_0, 4, 0, Offset::Fixed(8), false, 18,
    |block, values| parse_nibbles(block, &mut values[..32])
);
simple_format!(
    /// 4 bits, a scale and a minimum.
    Q4_1, 4, 0, Offset::Fixed(0), true, 20,
    |block, values| parse_nibbles(block, &mut values[..32])
);
simple_format!(
    /// 5 bits, a scale.
    Q5_0, 4, 1, Offset::Fixed(16), false, 22,
    |block, values| {
        parse_nibbles(&block[4..], &mut values[..32]);
        parse_fifth_bits(block, values);
    }
);
simple_format!(
    /// 5 bits, a scale and a minimum.
    Q5_1, 4, 1, Offset::Fixed(0), true, 24,
    |block, values| {
        parse_nibbles(&block[4..], &mut values[..32]);
        parse_fifth_bits(block, values);
    }
);
simple_format!(
    /// Signed bytes, a scale.
    Q8_0, 8, 0, Offset::Signed, false, 34,
    |block, values| values[..32].copy_from_slice(&block[..32])
);

/// 2 bits; for each 16 columns a scale and a minimum of 4 bits.
pub struct Q2K;

impl Format for Q2K {
    const COLUMNS: usize = 256;
    const BLOCK_BYTES: usize = 84;
    const LOW: usize = 2;
    const HIGH: usize = 0;
    const OFFSET: Offset = Offset::Fixed(0);
    const MINIMA: bool = true;
    const HALVES: bool = true;
    const HEADER: usize = 20;

    fn parse(block: &[u8], parts: &mut Parts) {
        let (scales, rest) = block.split_at(16);
        let (bits, floats) = rest.split_at(64);
        (parts.d, parts.m) = (float(floats), float(&floats[2..]));
        for (i, byte) in scales.iter().enumerate() {
            parts.pairs[i / 2][i % 2] = byte & 15;
            parts.min_pairs[i / 2][i % 2] = byte >> 4;
        }
        for (i, value) in parts.values.iter_mut().enumerate() {
            *value = bits[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
        }
    }

    fn pack_header(parts: &Parts, row: usize, header: &mut [u8]) {
        put_float(header, 0, row, parts.d);
        put_float(header, 1, row, parts.m);
        for (i, (scales, mins)) in parts.pairs.iter().zip(&parts.min_pairs).enumerate() {
            for half in 0..2 {
                header[4 * LANES + LANES * (2 * i + half) + row] = scales[half] | mins[half] << 4;
            }
        }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(block: *const u8, sub: usize) -> Scales<S> {
        // SAFETY: the header has 20 bytes a row.
        unsafe {
            let (d, m) = (floats::<S>(block, 0), floats::<S>(block, 1));
            let bytes = block.add(4 * LANES + 2 * LANES * sub);
            let (low, high) = (S::load_u8(bytes), S::load_u8(bytes.add(LANES)));
            Scales {
                scale: [S::mul(d, S::to_f32(S::and_i(low, 15))), S::mul(d, S::to_f32(S::and_i(high, 15)))],
                min: [S::mul(m, S::to_f32(S::shr_i(low, 4))), S::mul(m, S::to_f32(S::shr_i(high, 4)))],
            }
        }
    }
}

/// 3 bits; for each 16 columns a scale of 6 bits.
pub struct Q3K;

impl Format for Q3K {
    const COLUMNS: usize = 256;
    const BLOCK_BYTES: usize = 110;
    const LOW: usize = 2;
    const HIGH: usize = 1;
    const OFFSET: Offset = Offset::Fixed(4);
    const MINIMA: bool = false;
    const HALVES: bool = true;
    const HEADER: usize = 14;

    fn parse(block: &[u8], parts: &mut Parts) {
        let (high, rest) = block.split_at(32);
        let (bits, rest) = rest.split_at(64);
        let (scales, d) = rest.split_at(12);
        parts.d = float(d);
        for i in 0..16 {
            let low = if i < 8 { scales[i] & 15 } else { scales[i - 8] >> 4 };
            parts.pairs[i / 2][i % 2] = low | (scales[8 + i % 4] >> (i / 4 * 2) & 3) << 4;
        }
        for (i, value) in parts.values.iter_mut().enumerate() {
            let low = bits[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
            *value = low | (high[i % 32] >> (i / 32) & 1) << 2;
        }
    }

    fn pack_header(parts: &Parts, row: usize, header: &mut [u8]) {
        put_float(header, 0, row, parts.d);
        put_pairs(&parts.pairs, row, &mut header[2 * LANES..]);
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(block: *const u8, sub: usize) -> Scales<S> {
        // SAFETY: the header has 14 bytes a row.
        unsafe {
            let d = floats::<S>(block, 0);
            let [low, high] = pair::<S>(block.add(2 * LANES), sub);
            let lowered = S::splat_i(-32);
            let scale = [S::mul(d, S::to_f32(S::add_i(low, lowered))), S::mul(d, S::to_f32(S::add_i(high, lowered)))];
            Scales { scale, min: [S::splat(0.0); 2] }
        }
    }
}

/// 4 bits; for each 32 columns a scale and a minimum of 6 bits.
pub struct Q4K;

impl Format for Q4K {
    const COLUMNS: usize = 256;
    const BLOCK_BYTES: usize = 144;
    const LOW: usize = 4;
    const HIGH: usize = 0;
    const OFFSET: Offset = Offset::Fixed(0);
    const MINIMA: bool = true;
    const HALVES: bool = false;
    const HEADER: usize = 16;

    fn parse(block: &[u8], parts: &mut Parts) {
        (parts.d, parts.m) = (float(block), float(&block[2..]));
        parse_scale_and_min(&block[4..16], parts);
        for (bytes, values) in block[16..].chunks_exact(32).zip(parts.values.chunks_exact_mut(64)) {
            let (low, high) = values.split_at_mut(32);
            for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
                (*low, *high) = (byte & 15, byte >> 4);
            }
        }
    }

    fn pack_header(parts: &Parts, row: usize, header: &mut [u8]) {
        put_float(header, 0, row, parts.d);
        put_float(header, 1, row, parts.m);
        put_pairs(&parts.pairs, row, &mut header[4 * LANES..]);
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(block: *const u8, sub: usize) -> Scales<S> {
        // SAFETY: as this function's.
        unsafe { scale_and_min::<S>(block, sub) }
    }
}

/// 5 bits; for each 32 columns a scale and a minimum of 6 bits.
pub struct Q5K;

impl Format for Q5K {
    const COLUMNS: usize = 256;
    const BLOCK_BYTES: usize = 176;
    const LOW: usize = 4;
    const HIGH: usize = 1;
    const OFFSET: Offset = Offset::Fixed(0);
    const MINIMA: bool = true;
    const HALVES: bool = false;
    const HEADER: usize = 16;

    fn parse(block: &[u8], parts: &mut Parts) {
        (parts.d, parts.m) = (float(block), float(&block[2..]));
        parse_scale_and_min(&block[4..16], parts);
        let (high, low) = block[16..].split_at(32);
        for (i, value) in parts.values.iter_mut().enumerate() {
            let nibble = low[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
            *value = nibble | (high[i % 32] >> (i / 32) & 1) << 4;
        }
    }

    fn pack_header(parts: &Parts, row: usize, header: &mut [u8]) {
        Q4K::pack_header(parts, row, header);
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(block: *const u8, sub: usize) -> Scales<S> {
        // SAFETY: as this function's.
        unsafe { scale_and_min::<S>(block, sub) }
    }
}

/// 6 bits; for each 16 columns a scale of a signed byte.
pub struct Q6K;

impl Format for Q6K {
    const COLUMNS: usize = 256;
    const BLOCK_BYTES: usize = 210;
    const LOW: usize = 4;
    const HIGH: usize = 2;
    const OFFSET: Offset = Offset::Fixed(32);
    const MINIMA: bool = false;
    const HALVES: bool = true;
    const HEADER: usize = 18;

    fn parse(block: &[u8], parts: &mut Parts) {
        let (low, rest) = block.split_at(128);
        let (high, rest) = rest.split_at(64);
        let (scales, d) = rest.split_at(16);
        parts.d = float(d);
        for (i, &scale) in scales.iter().enumerate() {
            parts.pairs[i / 2][i % 2] = scale;
        }
        for (i, value) in parts.values.iter_mut().enumerate() {
            let (half, quarter, l) = (i / 128, i / 32 % 4, i % 32);
            let nibble = low[64 * half + 32 * (quarter % 2) + l] >> (quarter / 2 * 4) & 15;
            *value = nibble | (high[32 * half + l] >> (2 * quarter) & 3) << 4;
        }
    }

    fn pack_header(parts: &Parts, row: usize, header: &mut [u8]) {
        put_float(header, 0, row, parts.d);
        for (i, scales) in parts.pairs.iter().enumerate() {
            for half in 0..2 {
                header[2 * LANES + LANES * (2 * i + half) + row] = scales[half];
            }
        }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(block: *const u8, sub: usize) -> Scales<S> {
        // SAFETY: the header has 18 bytes a row.
        unsafe {
            let d = floats::<S>(block, 0);
            let bytes = block.add(2 * LANES + 2 * LANES * sub).cast::<i8>();
            let (low, high) = (S::load_i8(bytes), S::load_i8(bytes.add(LANES)));
            let scale = [S::mul(d, S::to_f32(low)), S::mul(d, S::to_f32(high))];
            Scales { scale, min: [S::splat(0.0); 2] }
        }
    }
}
