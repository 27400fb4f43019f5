//! Runs a language model that is too big or too slow for one device across all the devices a person has.
//!
//! A [`HeterogeneousPipeline`] cuts the decoder's layers into stages on CUDA, Metal and CPU devices. A
//! [`HeterogeneousPipelineExecutor`] loads each stage's weights to its device, gives it a thread, and serves
//! [`infer`](HeterogeneousPipelineExecutor::infer), [`infer_batch`](HeterogeneousPipelineExecutor::infer_batch) and
//! [`infer_stream`](HeterogeneousPipelineExecutor::infer_stream) to any number of async tasks. However a model is cut,
//! on devices of one kind its logits are the same to the last bit.
//!
//! ```
//! use candle_pipeline::{DEMO_MODEL, DeviceSpec, HeterogeneousPipeline, HeterogeneousPipelineExecutor};
//! use futures::StreamExt;
//!
//! #[tokio::main]
//! async fn main() -> candle_pipeline::Result<()> {
//!     let devices = DeviceSpec::parse_list("cpu,cpu")?; // or "cuda:0,cpu", "metal:0", ...
//!     let model = DEMO_MODEL; // or a folder, a .gguf file, a Hugging Face id
//!     let pipeline = HeterogeneousPipeline::new(&devices, model)?;
//!     let executor = HeterogeneousPipelineExecutor::new(pipeline, model).await?;
//!     let mut stream = executor.infer_text_stream("Once upon a time", &Default::default());
//!     while let Some(text) = stream.next().await {
//!         print!("{}", text?);
//!     }
//!     Ok(())
//! }
//! ```
//!
//! # Reading order
//!
//! The modules stand here in the order in which to read them; each uses only those above it.

pub mod error;
mod files;
pub mod weights;
pub(crate) mod kernels;
pub mod instrument;
pub mod device;
pub mod model;
pub mod backend;
pub mod pipeline;
pub mod executor;

pub use device::{DeviceSpec, present_devices};
pub use error::{Error, Result};
pub use executor::options::{FinishReason, GenerationOptions, TokenLogprob};
pub use executor::scheduler::{Finish, GeneratedToken, GenerationEvent};
pub use executor::stream::{GenerationStream, TextStream, TokenStream};
pub use executor::tokenizer::{ChatMessage, ChatOptions, Tokenizer};
pub use executor::{
    ExecutorOptions, Generation, HeterogeneousPipelineExecutor, PrefixStats, StageMemory, StageStats, WarmupReport,
};
pub use kernels::kv::KvType;
pub use kernels::simd::Isa;
pub use metal_ext::{ColumnsPerThreadgroup, MetalExtOptions, SoftmaxBackend};
pub use pipeline::link::{LinkOptions, SimulatedLink, WireType};
pub use pipeline::plan::{Objective, Plan};
pub use pipeline::{HeterogeneousPipeline, MeasuredSplit, PipelineOptions, Split, StagePlan};

/// Kernels, for this project's own benches, tests and tools. Not part of the API: any of it may change at any time.
#[doc(hidden)]
pub mod internals {
    pub use crate::kernels::attention::{AttentionRows, AttentionShape, attend};
    pub use crate::kernels::dequantise;
    pub use crate::kernels::input::Input;
    pub use crate::kernels::kv::{LayerKv, Strided};
    pub use crate::kernels::matrix::{Matrix, Product, multiply};
    pub use crate::kernels::pool::Pool;
    pub use crate::kernels::tile_rate;
}

/// The small trained model that comes with the sources, so that everything runs without a download: stories in simple
/// English, Llama architecture, 8 layers.
pub const DEMO_MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo");

/// The README's program, run as a test.
#[doc = include_str!("../README.md")]
#[cfg(doctest)]
pub struct Readme;
