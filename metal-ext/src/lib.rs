//! Metal for candle-pipeline. The portable part builds everywhere; with the feature `metal` on macOS it talks to the
//! GPU.

#[cfg(all(feature = "metal", target_os = "macos"))]
pub mod device;
