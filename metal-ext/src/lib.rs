//! Metal kernels for the decode step of candle-pipeline, and the host code that dispatches them.
//!
//! A decode step at batch 1 waits for two things: every weight is read once, and every kernel launch costs microseconds.
//! So the kernels here load 16 bytes at a time, and each does as much of a layer as can be done between two points where
//! all threads must have finished.
//!
//! # What is where
//!
//! - `kernels/NAME.metal`: one idea a file. `kernels/NAME.sources` lists the files that make up one library; `build.rs`
//!   flattens them. `kernels/NAME_params.metal` holds the struct that host and kernels share; `build.rs` writes its Rust
//!   twin into [`params`].
//! - [`encoder`]: the seam. Host code makes a [`Dispatch`] out of shapes; an [`Encoder`] runs it on a GPU, on a CPU (the
//!   crate `msl-cpu`), or writes it down.
//! - [`attention`]: of a decode step, with norms and RoPE of q and k ([`heads`]) and the append to the KV cache ([`kv`]).
//! - [`sampling`]: the most likely tokens. [`embedding`]: their embeddings.
//! - [`softmax`]: by itself, for prefill.
//! - [`decode`]: a decode step of whole layers out of these.
//! - [`pack`]: weights from the file's bytes. [`window`]: where they can be read without a copy. [`gemv`]: products with all that is fused to them.
//! - `device`, `mapped`, `metal` (feature `metal` on macOS): GPUs, buffers over files, and the encoder over one. The rest
//!   builds everywhere.
//!
//! # Conventions
//!
//! - Activations, norm weights and biases are F32; weights and the KV cache are what they are. Sums are F32.
//! - Sizes and strides are counted in elements, offsets in bytes. Regions that kernels read as vectors begin at multiples
//!   of 16.
//! - A kernel's buffer table: inputs first, then outputs, then one parameter struct. What a function constant switches
//!   off carries `[[function_constant(..)]]` and is not bound.
//! - Function constants are `bool` or `ushort`. Every one that a kernel declares is set in every dispatch.
//! - Kernels are plain MSL 3.0 without bfloat, `simd_sum` and the like only where whole simdgroups arrive, no barrier that
//!   only some threads reach, one reduction at the end.
//! - Host code for a kernel is a struct of plain data with `dispatch(..) -> Result<Dispatch>` and `encode(&mut encoder)`;
//!   it refuses what the kernel does not take, by name and value.
//! - A kernel's test dispatches through the encoder on `msl-cpu` in all thread orders, against f64.

pub mod error;
mod library;
pub mod encoder;
pub mod options;
pub mod pack;
pub mod window;
pub mod gemv;
pub mod norm_add;
pub mod dequantise;
pub mod kv;
pub mod heads;
pub mod attention;
pub mod sampling;
pub mod softmax;
pub mod embedding;
pub mod decode;

/// Parameter structs of the kernels, written by `build.rs` from `kernels/*_params.metal`.
pub mod params {
    include!(concat!(env!("OUT_DIR"), "/params.rs"));
}

#[cfg(all(feature = "metal", target_os = "macos"))]
pub mod device;
#[cfg(all(feature = "metal", target_os = "macos"))]
pub mod mapped;
#[cfg(all(feature = "metal", target_os = "macos"))]
pub mod metal;

pub use encoder::{Dispatch, DryRun, Encoder, Region};
pub use error::{Error, Result};
pub use library::KernelLibrary;
pub use options::{ColumnsPerThreadgroup, MetalExtOptions, SoftmaxBackend};
