//! From a tensor's bytes in the file to the layout that `kernels/formats.metal` reads.
//!
//! Every load of a kernel takes 16 bytes, so each must begin at a multiple of 16. What a file holds decides what that
//! costs:
//!
//! | format | in the file | here |
//! |---|---|---|
//! | F16, BF16 | rows of `2 * k` bytes | as they are when `k` is a multiple of 8; else rows are padded with zeros |
//! | F16 blocked | | `[k / 32][n][32]`, columns of a block side by side, `k` padded with zeros |
//! | Q4_K | blocks of 144 = 9 * 16 bytes | as they are |
//! | Q8_0 | blocks of 34: half, 32 int8 | all int8, then all halves |
//! | Q4_0 | blocks of 18: half, 16 bytes | all nibbles, then all halves |
//! | Q6_K | blocks of 210: 128, 64, 16 bytes, half | blocks of 208 = 13 * 16 without the half, then all halves |
//!
//! What stays as it is can be read from the mapped file without a copy, see [`window`](crate::window). For the
//! others the choice was between narrow loads (2 bytes for Q8_0, Q4_0 and Q6_K: eight times as many load instructions) and
//! one copy while loading; the bytes are the same in another order, so nothing grows and no value changes.

use crate::error::{Error, Result};

/// How a matrix's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum Format {
    /// Half floats, row by row.
    F16,
    /// Half floats in the blocked layout `[k / 32][n][32]`.
    F16Blocked,
    /// bfloat16, row by row.
    BF16,
    /// GGML's Q8_0.
    Q8_0,
    /// GGML's Q4_0.
    Q4_0,
    /// GGML's Q4_K.
    Q4_K,
    /// GGML's Q6_K.
    Q6_K,
}

impl Format {
    /// Every format.
    pub const ALL: [Format; 7] =
        [Format::F16, Format::F16Blocked, Format::BF16, Format::Q8_0, Format::Q4_0, Format::Q4_K, Format::Q6_K];

    /// The name that kernels have it under.
    pub fn name(self) -> &'static str {
        match self {
            Format::F16 => "f16",
            Format::F16Blocked => "f16_blocked",
            Format::BF16 => "bf16",
            Format::Q8_0 => "q8_0",
            Format::Q4_0 => "q4_0",
            Format::Q4_K => "q4_k",
            Format::Q6_K => "q6_k",
        }
    }

    /// Columns of the output that a simdgroup computes: `COLUMNS` of `kernels/formats.metal`.
    pub(crate) fn columns(self) -> usize {
        match self {
            Format::Q4_0 => 4,
            _ => 2,
        }
    }

    /// Values of a stored block, and its bytes.
    fn block(self) -> (usize, usize) {
        match self {
            Format::F16 | Format::F16Blocked | Format::BF16 => (1, 2),
            Format::Q8_0 => (32, 34),
            Format::Q4_0 => (32, 18),
            Format::Q4_K => (256, 144),
            Format::Q6_K => (256, 210),
        }
    }
}

/// Where the parts of a packed matrix of `n` rows and `k` columns lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixLayout {
    /// The format.
    pub format: Format,
    /// Rows: columns of the output.
    pub n: usize,
    /// Columns: values of an input row.
    pub k: usize,
    /// Bytes from row to row; of the blocked layout, from block to block of a row.
    pub stride: usize,
    /// Bytes from the start to the scales that are kept apart.
    pub scales: usize,
    /// Bytes from one row's scales to the next.
    pub stride_scales: usize,
    /// Bytes of all of it.
    pub bytes: usize,
}

impl MatrixLayout {
    /// The layout of an `n` by `k` matrix.
    pub fn new(format: Format, n: usize, k: usize) -> Result<MatrixLayout> {
        let wrong = |reason: String| Err(Error::unsupported(format!("{n} by {k} {} matrix", format.name()), reason));
        let (values, _) = format.block();
        if n == 0 || k == 0 {
            return wrong("has no values".into());
        }
        if !k.is_multiple_of(values) {
            return wrong(format!("rows are no whole number of blocks of {values} values"));
        }
        let blocks = k / values;
        let (stride, stride_scales) = match format {
            Format::F16 | Format::BF16 => (k.next_multiple_of(8) * 2, 0),
            Format::F16Blocked => (n * 64, 0),
            Format::Q8_0 => (k, blocks * 2),
            Format::Q4_0 => (k / 2, blocks * 2),
            Format::Q4_K => (blocks * 144, 0),
            Format::Q6_K => (blocks * 208, blocks * 2),
        };
        let scales = match format {
            Format::F16Blocked => k.div_ceil(32) * stride,
            _ => n * stride,
        };
        let bytes = scales + n * stride_scales;
        if u32::try_from(scales).is_err() || u32::try_from(k).is_err() {
            return wrong("is larger than 4 GiB".into());
        }
        Ok(MatrixLayout { format, n, k, stride, scales, stride_scales, bytes })
    }

    /// Bytes of the matrix in the file.
    pub fn stored_bytes(&self) -> usize {
        let (values, bytes) = self.format.block();
        self.n * (self.k / values) * bytes
    }

    /// Whether the file's bytes are the packed ones, so that they can be read where they are, given that they begin at a
    /// multiple of 16.
    pub fn is_stored_order(&self) -> bool {
        match self.format {
            Format::Q4_K => true,
            Format::F16 | Format::BF16 => self.k.is_multiple_of(8),
            _ => false,
        }
    }

    /// Packs the file's bytes into `packed`, which has [`bytes`](Self::bytes) bytes.
    pub fn pack(&self, stored: &[u8], packed: &mut [u8]) -> Result<()> {
        let (wanted, given) = ((self.stored_bytes(), self.bytes), (stored.len(), packed.len()));
        if wanted != given {
            return Err(Error::unsupported(
                format!("packing a {} by {} {} matrix", self.n, self.k, self.format.name()),
                format!("takes {} bytes into {}, given are {} into {}", wanted.0, wanted.1, given.0, given.1),
            ));
        }
        let (rows, scales) = packed.split_at_mut(self.scales);
        match self.format {
            Format::Q4_K => rows.copy_from_slice(stored),
            Format::F16 | Format::BF16 => {
                for (row, stored) in rows.chunks_exact_mut(self.stride).zip(stored.chunks_exact(self.k * 2)) {
                    let (values, padding) = row.split_at_mut(self.k * 2);
                    values.copy_from_slice(stored);
                    padding.fill(0);
                }
            }
            Format::F16Blocked => {
                rows.fill(0);
                for (n, stored) in stored.chunks_exact(self.k * 2).enumerate() {
                    for (block, values) in stored.chunks(64).enumerate() {
                        rows[(block * self.n + n) * 64..][..values.len()].copy_from_slice(values);
                    }
                }
            }
            Format::Q8_0 => split(stored, rows, scales, 34, 2..34, 0..2),
            Format::Q4_0 => split(stored, rows, scales, 18, 2..18, 0..2),
            Format::Q6_K => split(stored, rows, scales, 210, 0..208, 208..210),
        }
        Ok(())
    }
}

/// Takes each block's values and scale apart.
fn split(
    stored: &[u8],
    rows: &mut [u8],
    scales: &mut [u8],
    block: usize,
    values: std::ops::Range<usize>,
    scale: std::ops::Range<usize>,
) {
    let rows = rows.chunks_exact_mut(values.len());
    for ((stored, row), to) in stored.chunks_exact(block).zip(rows).zip(scales.chunks_exact_mut(2)) {
        row.copy_from_slice(&stored[values.clone()]);
        to.copy_from_slice(&stored[scale.clone()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(format: Format, n: usize, k: usize, stored: &[u8]) -> Vec<u8> {
        let layout = MatrixLayout::new(format, n, k).unwrap();
        let mut packed = vec![0xee; layout.bytes];
        layout.pack(stored, &mut packed).unwrap();
        packed
    }

    fn counted(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i % 251) as u8).collect()
    }

    #[test]
    fn blocks_are_taken_apart_without_losing_a_byte() {
        for (format, k) in [(Format::Q8_0, 64), (Format::Q4_0, 96), (Format::Q6_K, 512)] {
            let layout = MatrixLayout::new(format, 3, k).unwrap();
            let stored = counted(layout.stored_bytes());
            let mut packed = packed(format, 3, k, &stored);
            assert_eq!(packed.len(), stored.len());
            packed.sort_unstable();
            let mut sorted = stored.clone();
            sorted.sort_unstable();
            assert_eq!(packed, sorted, "{format:?}");
        }
        let stored = counted(2 * 34);
        let packed = packed(Format::Q8_0, 1, 64, &stored);
        assert_eq!(packed[..32], stored[2..34]);
        assert_eq!(packed[32..64], stored[36..68]);
        assert_eq!(packed[64..], [0, 1, 34, 35]);
    }

    #[test]
    fn what_stays_as_it_is_is_equal_to_the_file() {
        for (format, k) in [(Format::F16, 24), (Format::BF16, 8), (Format::Q4_K, 512)] {
            let layout = MatrixLayout::new(format, 5, k).unwrap();
            assert!(layout.is_stored_order());
            let stored = counted(layout.stored_bytes());
            assert_eq!(packed(format, 5, k, &stored), stored);
        }
    }

    #[test]
    fn rows_off_the_tile_are_padded_with_zeros() {
        let stored = counted(2 * 5 * 2);
        let rows = packed(Format::F16, 2, 5, &stored);
        assert_eq!(rows[..10], stored[..10]);
        assert_eq!(rows[10..16], [0; 6]);
        assert_eq!(rows[16..26], stored[10..]);
        let stored = counted(3 * 40 * 2);
        let blocked = packed(Format::F16Blocked, 3, 40, &stored);
        assert_eq!(blocked.len(), 2 * 3 * 64);
        assert_eq!(blocked[64..128], stored[80..144]); // row 1, first block
        assert_eq!(blocked[(3 + 2) * 64..][..16], stored[160 + 64..]); // row 2, second block
        assert_eq!(blocked[(3 + 2) * 64 + 16..], [0; 48]);
    }

    #[test]
    fn what_is_no_matrix_is_refused_by_name() {
        let error = MatrixLayout::new(Format::Q4_K, 2, 320).unwrap_err().to_string();
        assert_eq!(error, "2 by 320 q4_k matrix: rows are no whole number of blocks of 256 values");
        let layout = MatrixLayout::new(Format::Q8_0, 2, 32).unwrap();
        let error = layout.pack(&[0; 67], &mut [0; 68]).unwrap_err().to_string();
        assert!(error.contains("takes 68 bytes into 68, given are 67"), "{error}");
    }
}
