//! Memory for weights, keys and values: zeroed, aligned to a cache line, paged in where it is touched.

use memmap2::MmapMut;

use super::simd::LANES;
use super::size;

/// Alignment of every buffer: a cache line, and the widest vector.
pub const ALIGNMENT: usize = 64;

/// A vector of f32 that is one cache line: what begins elsewhere crosses into the next line, or page, with every access.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line(pub [f32; LANES]);

impl Line {
    /// Zeros.
    pub const ZERO: Line = Line([0.0; LANES]);
}

const _: () = assert!(align_of::<Line>() == ALIGNMENT);

/// Buffers from this size on are mappings of their own, in huge pages where the system gives them.
const MAPPED_FROM: usize = 1 << 21;

/// Bytes that start at a multiple of [`ALIGNMENT`].
pub struct Buffer {
    memory: Memory,
    len: usize,
}

enum Memory {
    Heap { bytes: Vec<u8>, start: usize },
    Mapped(MmapMut),
}

impl Buffer {
    /// `len` zero bytes. Pages that are never touched take no memory.
    pub fn zeroed(len: usize) -> Buffer {
        if len >= MAPPED_FROM
            && let Ok(map) = MmapMut::map_anon(len)
        {
            // Fewer misses of the address cache while weights stream by. A system without huge pages says no.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            return Buffer { memory: Memory::Mapped(map), len };
        }
        let bytes = vec![0u8; size::end("a buffer's bytes", len, ALIGNMENT)];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Buffer { memory: Memory::Heap { bytes, start }, len }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        match &self.memory {
            Memory::Heap { bytes, start } => &bytes[*start..*start + self.len],
            Memory::Mapped(map) => &map[..self.len],
        }
    }

    /// The bytes, to write.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Heap { bytes, start } => &mut bytes[*start..*start + self.len],
            Memory::Mapped(map) => &mut map[..self.len],
        }
    }
}

/// Room for a step's values: it grows to what is asked of it and stays.
pub struct Values(Buffer);

impl Default for Values {
    fn default() -> Self {
        Values(Buffer::zeroed(0))
    }
}

impl Values {
    /// `len` values, whatever is in them, from a multiple of [`ALIGNMENT`] on.
    pub fn room(&mut self, len: usize) -> &mut [f32] {
        let bytes = size::bytes_of::<f32>("values", len);
        if self.0.len < bytes {
            self.0 = Buffer::zeroed(bytes);
        }
        let start = self.0.as_mut_slice().as_mut_ptr();
        // SAFETY: there is room for them, any bytes are numbers, and the memory is borrowed as the result is.
        unsafe { std::slice::from_raw_parts_mut(start.cast(), len) }
    }

    /// Bytes that it keeps.
    pub fn bytes(&self) -> u64 {
        self.0.len as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_every_size_are_aligned_zero_and_writable() {
        for len in [0, 1, 63, 64, 4096, MAPPED_FROM - 1, MAPPED_FROM, MAPPED_FROM + 1] {
            let mut buffer = Buffer::zeroed(len);
            assert_eq!(buffer.as_slice().len(), len);
            assert_eq!(buffer.as_slice().as_ptr().align_offset(ALIGNMENT), 0);
            assert!(buffer.as_slice().iter().all(|&b| b == 0));
            buffer.as_mut_slice().fill(7);
            assert!(buffer.as_slice().iter().all(|&b| b == 7));
        }
    }

    #[test]
    #[should_panic(expected = "values: [4611686018427387904, 4] multiplied is more than memory can have")]
    fn room_for_more_values_than_memory_has_is_refused() {
        let _ = Values::default().room(1 << 62);
    }

    #[test]
    #[should_panic(expected = "a buffer's bytes: 64 from 18446744073709551615 on end beyond any number")]
    fn a_buffer_that_no_memory_has_is_refused() {
        Buffer::zeroed(usize::MAX);
    }

    #[test]
    fn room_for_values_grows_and_stays() {
        let mut values = Values::default();
        for (len, bytes) in [(0, 0), (3, 12), (1, 12), (1 << 20, 4 << 20), (5, 4 << 20)] {
            let room = values.room(len);
            assert_eq!((room.len(), room.as_ptr().align_offset(ALIGNMENT)), (len, 0));
            room.fill(7.0);
            assert_eq!(values.bytes(), bytes);
        }
    }
}
