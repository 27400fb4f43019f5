//! What a model is, the same for every family: [`config::DecoderConfig`] describes it, [`stage_weights`] reads the weights of
//! a run of its layers. What computes with them is in [`backend`](crate::backend); nothing here knows threads, stages or
//! requests.

pub mod config;
pub mod family;
pub mod stage_weights;
pub mod rope;
pub mod quantisation;
pub(crate) mod vocabulary;
