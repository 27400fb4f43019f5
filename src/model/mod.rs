//! One decoder for every family. A family is data: [`config::DecoderConfig`] says what a model is, [`decoder`] computes
//! it. Nothing here knows threads, stages or requests.

pub mod attention;
pub mod config;
pub mod decoder;
pub mod family;
pub mod kv_cache;
pub mod stage_weights;
#[cfg(all(feature = "metal", target_os = "macos"))]
pub mod metal_matrix;
pub mod linear;
pub mod mask;
pub mod rope;
pub mod quantisation;
pub(crate) mod vocabulary;
