//! What Metal says about the GPUs of this machine.

use candle_metal_kernels::metal::Device;
use objc2_metal::MTLDevice;

/// GPUs present.
pub fn count() -> usize {
    Device::all().len()
}

/// Bytes that the GPU can take on without slowing down, less what this process has allocated on it. `None` when there
/// is no such GPU.
pub fn free_memory(ordinal: usize) -> Option<u64> {
    let device = Device::all().into_iter().nth(ordinal)?;
    let raw = device.as_ref();
    Some(raw.recommendedMaxWorkingSetSize().saturating_sub(raw.currentAllocatedSize() as u64))
}

/// The GPU's name, such as `Apple M3 Pro`. `None` when there is no such GPU.
pub fn name(ordinal: usize) -> Option<String> {
    let device = Device::all().into_iter().nth(ordinal)?;
    Some(device.as_ref().name().to_string())
}
