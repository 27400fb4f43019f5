//! Which pages of a mapped file a buffer over a tensor covers. Metal takes memory of the process as a buffer without a
//! copy when it begins at a page and is whole pages long; a tensor begins anywhere, so its buffer is the pages around it,
//! and the tensor begins at an offset.
//!
//! A buffer for each tensor, and not one for the file: Metal counts and keeps resident whole buffers, and a stage has some
//! of the layers. Neighbours then share the page between them, which both read.

use std::ops::Range;

use crate::pack::{Format, MatrixLayout};

/// Where kernels' loads must begin: they take 16 bytes each.
pub const ALIGNMENT: usize = 16;

/// What a device and its system take as a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BufferRules {
    /// Bytes of a page, a power of two.
    pub page: usize,
    /// Bytes of the longest buffer.
    pub longest: usize,
}

/// Whole pages of a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Where they begin, in bytes from the start of the mapping.
    pub start: usize,
    /// Their bytes. The last page of a file reaches past the file's end; a mapping has it whole.
    pub len: usize,
    /// Where the tensor begins in them, in bytes.
    pub offset: usize,
}

/// Why a tensor's bytes are copied instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotMapped {
    /// The kernels read another order of the bytes.
    #[error("the kernels read {} weights of {columns} columns in another order than the file's", format.name())]
    Reordered {
        /// The format.
        format: Format,
        /// Values of a row.
        columns: usize,
    },
    /// The bytes are not as many as the matrix has.
    #[error("{given} bytes are given for a matrix of {wanted}")]
    Length {
        /// Bytes given.
        given: usize,
        /// Bytes of the matrix.
        wanted: usize,
    },
    /// The bytes are not in the mapping.
    #[error("it ends at byte {end} of a file of {file}")]
    Outside {
        /// The end of the bytes.
        end: usize,
        /// Bytes of the file.
        file: usize,
    },
    /// A load would not begin at a multiple of [`ALIGNMENT`].
    #[error("it begins at byte {start} of the file, no multiple of {ALIGNMENT}")]
    Misaligned {
        /// Where the bytes begin.
        start: usize,
    },
    /// The mapping itself begins within a page, so that the page is not its own.
    #[error("the file is mapped {into} bytes into a page")]
    WithinPage {
        /// Bytes from the page's start.
        into: usize,
    },
    /// The pages are more than a buffer holds.
    #[error("its pages are {bytes} bytes, and a buffer of this device holds {longest}")]
    TooLong {
        /// Bytes of the pages.
        bytes: usize,
        /// Bytes of the longest buffer.
        longest: usize,
    },
}

impl Window {
    /// The pages around a matrix that is stored in bytes `stored` of a file of `file` bytes, which is mapped from
    /// `address` on.
    pub fn around(
        layout: &MatrixLayout,
        stored: Range<usize>,
        address: usize,
        file: usize,
        rules: BufferRules,
    ) -> Result<Window, NotMapped> {
        let BufferRules { page, longest } = rules;
        let (start, end) = (stored.start, stored.end);
        if !layout.is_stored_order() {
            return Err(NotMapped::Reordered { format: layout.format, columns: layout.k });
        }
        if stored.len() != layout.bytes {
            return Err(NotMapped::Length { given: stored.len(), wanted: layout.bytes });
        }
        if end > file {
            return Err(NotMapped::Outside { end, file });
        }
        if !start.is_multiple_of(ALIGNMENT) {
            return Err(NotMapped::Misaligned { start });
        }
        if !address.is_multiple_of(page) {
            return Err(NotMapped::WithinPage { into: address % page });
        }
        let first = start / page * page;
        // A file that ends within the address space's last page is none that a system maps.
        let bytes = end.checked_next_multiple_of(page).map_or(usize::MAX, |last| last - first);
        if bytes > longest {
            return Err(NotMapped::TooLong { bytes, longest });
        }
        Ok(Window { start: first, len: bytes, offset: start - first })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: [usize; 2] = [4 << 10, 16 << 10];
    /// A multiple of both page sizes.
    const ADDRESS: usize = 0x1_2345_8000;

    fn rules(page: usize) -> BufferRules {
        BufferRules { page, longest: 1 << 30 }
    }

    /// `n` rows of 256 values: 144 bytes each.
    fn q4_k(n: usize) -> MatrixLayout {
        MatrixLayout::new(Format::Q4_K, n, 256).unwrap()
    }

    fn around(n: usize, start: usize, file: usize, page: usize) -> Result<Window, NotMapped> {
        Window::around(&q4_k(n), start..start + n * 144, ADDRESS, file, rules(page))
    }

    #[test]
    fn a_window_is_the_fewest_whole_pages_that_hold_the_tensor() {
        for page in PAGES {
            for start in [0, 16, 32, page - 16, page, page + 32, 3 * page - 144, 3 * page - 128, 7 * page + 4080] {
                for n in [1, 2, 28, 29, 113, 114, 500] {
                    let (end, file) = (start + n * 144, start + n * 144 + 5000);
                    let Window { start: first, len, offset } = around(n, start, file, page).unwrap();
                    let at = format!("{n} rows at {start}, pages of {page}");
                    assert_eq!(first + offset, start, "{at}");
                    assert!(first.is_multiple_of(page) && len.is_multiple_of(page) && len > 0, "{at}");
                    assert!(offset < page && first + len >= end, "{at}");
                    assert!(first + len - end < page, "{at}: a page too many");
                    assert!(offset.is_multiple_of(ALIGNMENT), "{at}");
                }
            }
        }
    }

    #[test]
    fn a_tensor_at_the_end_of_the_file_has_the_last_page_whole() {
        for page in PAGES {
            let file = 5 * page + 144;
            let window = around(1, 5 * page, file, page).unwrap();
            assert_eq!(window, Window { start: 5 * page, len: page, offset: 0 });
            // A file that is whole pages long has no page behind its end.
            let window = around(1, 5 * page - 144, 5 * page, page).unwrap();
            assert_eq!(window, Window { start: 4 * page, len: page, offset: page - 144 });
            // One that is shorter than a page.
            let window = around(1, 32, 176, page).unwrap();
            assert_eq!(window, Window { start: 0, len: page, offset: 32 });
        }
    }

    #[test]
    fn neighbours_share_a_page_and_nothing_else() {
        let (page, rows) = (4 << 10, 100);
        let (a, b) = (around(rows, 32, 1 << 20, page).unwrap(), around(rows, 32 + rows * 144, 1 << 20, page).unwrap());
        assert_eq!(a.start + a.len - b.start, page);
    }

    #[test]
    fn what_cannot_be_read_where_it_is_says_why() {
        let page = 16 << 10;
        let refused = |layout: &MatrixLayout, stored, address, file| {
            Window::around(layout, stored, address, file, rules(page)).unwrap_err()
        };
        for start in [1, 2, 8, 24, page + 8] {
            assert_eq!(around(1, start, 1 << 20, page), Err(NotMapped::Misaligned { start }));
        }
        let file = 1000;
        assert_eq!(around(2, 720, file, page), Err(NotMapped::Outside { end: 1008, file }));
        assert_eq!(around(2, 1 << 40, file, page), Err(NotMapped::Outside { end: (1 << 40) + 288, file }));
        let empty = NotMapped::Length { given: 0, wanted: 144 };
        assert_eq!(refused(&q4_k(1), 32..32, ADDRESS, file), empty);
        assert_eq!(refused(&q4_k(1), 32..320, ADDRESS, file), NotMapped::Length { given: 288, wanted: 144 });
        let within = refused(&q4_k(1), 32..176, ADDRESS + 4096, file);
        assert_eq!(within, NotMapped::WithinPage { into: 4096 });
        assert_eq!(within.to_string(), "the file is mapped 4096 bytes into a page");
        for format in [Format::Q8_0, Format::Q4_0, Format::Q6_K, Format::F16Blocked] {
            let layout = MatrixLayout::new(format, 2, 256).unwrap();
            let error = refused(&layout, 0..layout.stored_bytes(), ADDRESS, 1 << 20);
            assert_eq!(error, NotMapped::Reordered { format, columns: 256 });
        }
        // Rows of half floats that are no whole loads are padded.
        let padded = MatrixLayout::new(Format::F16, 4, 12).unwrap();
        let error = refused(&padded, 0..96, ADDRESS, 1 << 20).to_string();
        assert_eq!(error, "the kernels read f16 weights of 12 columns in another order than the file's");
    }

    #[test]
    fn a_window_is_no_longer_than_the_longest_buffer() {
        for page in PAGES {
            let around =
                |longest| Window::around(&q4_k(200), 16..16 + 28_800, ADDRESS, 1 << 20, BufferRules { page, longest });
            let bytes = 32 << 10;
            assert_eq!(around(bytes).unwrap(), Window { start: 0, len: bytes, offset: 16 });
            assert_eq!(around(bytes - 1), Err(NotMapped::TooLong { bytes, longest: bytes - 1 }));
        }
        // Nothing overflows at the end of what can be counted.
        let layout = q4_k(1);
        let end = usize::MAX - 15;
        let error = Window::around(&layout, end - 144..end, 0, usize::MAX, rules(4096)).unwrap_err();
        assert_eq!(error, NotMapped::TooLong { bytes: usize::MAX, longest: 1 << 30 });
    }

    #[test]
    fn dense_weights_are_read_where_they_are_as_well() {
        for format in [Format::F16, Format::BF16] {
            let layout = MatrixLayout::new(format, 10, 64).unwrap();
            let window = Window::around(&layout, 8192..8192 + 1280, ADDRESS, 9472, rules(16 << 10)).unwrap();
            assert_eq!(window, Window { start: 0, len: 16 << 10, offset: 8192 });
        }
    }
}
