//! Buffers over the pages of a mapped file: the GPU reads the weights where the system has them, and nothing is copied.
//! The page arithmetic is in [`window`](crate::window).

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use block2::RcBlock;
use candle_metal_kernels::metal::{Buffer, Device};
use memmap2::Mmap;
use objc2_metal::{MTLDevice, MTLResourceOptions};

use crate::pack::MatrixLayout;
use crate::window::{BufferRules, NotMapped, Window};

/// A buffer that is part of a mapped file.
pub struct MappedBuffer {
    /// The pages around the matrix. Only to be read: the mapping is.
    pub buffer: Buffer,
    /// Where the matrix begins in them, in bytes.
    pub offset: usize,
}

/// A buffer over the pages of `file` that hold the matrix in its bytes `stored`. The file stays mapped until Metal has
/// given up the buffer, which commands that use it keep.
///
/// The outer error is why the bytes have to be copied. `None`: the GPU has memory of its own, or Metal declined.
pub fn buffer_over(
    device: &Device,
    layout: &MatrixLayout,
    file: &Arc<Mmap>,
    stored: Range<usize>,
) -> Result<Option<MappedBuffer>, NotMapped> {
    let rules = BufferRules { page: page_size::get(), longest: device.as_ref().maxBufferLength() };
    let window = Window::around(layout, stored, file.as_ptr().addr(), file.len(), rules)?;
    // Over a bus every token would fetch the weights anew.
    if !device.as_ref().hasUnifiedMemory() {
        return Ok(None);
    }
    let pages = NonNull::from(&file[window.start]).cast();
    let kept = file.clone();
    let release = RcBlock::new(move |_: NonNull<c_void>, _: usize| {
        let _ = &kept;
    });
    // As candle has its buffers; weights are not written, so nothing need be tracked.
    let options = MTLResourceOptions::StorageModeShared | MTLResourceOptions::HazardTrackingModeUntracked;
    #[allow(unsafe_code)]
    // SAFETY: The window is whole pages of the mapping (it begins at a page, and its last page is the one of the file's
    // last byte at the furthest), which stays until the block is gone, and Metal keeps the block as long as the buffer.
    // The block may be called and dropped on any thread: it only holds an `Arc` of a mapping, which is `Send` and `Sync`.
    let raw = unsafe {
        device.as_ref().newBufferWithBytesNoCopy_length_options_deallocator(pages, window.len, options, Some(&*release))
    };
    Ok(raw.map(|raw| MappedBuffer { buffer: Buffer::new(raw), offset: window.offset }))
}
