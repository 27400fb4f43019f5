//! Decode steps of a few layers on an Apple GPU: the fused path against candle's operations, on the same weights.
//!
//! `cargo bench --features metal --bench decode_layer_bench`

#[cfg(not(all(feature = "metal", target_os = "macos")))]
#[allow(dead_code)] // a part is used
#[path = "../examples/common/output.rs"]
mod output;

#[cfg(not(all(feature = "metal", target_os = "macos")))]
fn main() -> std::process::ExitCode {
    let skipped = "decode_layer_bench: skipped, it measures Apple GPUs; run it on macOS with --features metal";
    output::exit(output::print_line(skipped).map_err(Into::into))
}

#[cfg(all(feature = "metal", target_os = "macos"))]
fn main() {
    gpu::benches();
}

#[cfg(all(feature = "metal", target_os = "macos"))]
mod gpu {
    use std::collections::HashMap;
    use std::path::Path;
    use std::sync::Arc;

    use candle_core::{DType, Device, Tensor};
    use candle_pipeline::backend::{
        MicroBatch, SequenceId, SequenceSlice, StageOptions, StageOutput, StageSource, Wanted,
    };
    use candle_pipeline::instrument::Watch;
    use candle_pipeline::model::config::DecoderConfig;
    use candle_pipeline::weights::{StoredTensor, TensorBytes, TensorMeta, WeightSource, WeightType};
    use candle_pipeline::{DEMO_MODEL, DeviceSpec, HeterogeneousPipeline, Result};
    use criterion::{Criterion, Throughput};
    use metal_ext::MetalExtOptions;

    const LAYERS: usize = 8;

    /// Steps between two waits, as a stage without a head makes them.
    const STEPS: usize = 16;

    const POSITION: usize = 256;

    /// Layers in the middle of TinyLlama-1.1B.
    fn config(demo: &DecoderConfig) -> DecoderConfig {
        let mut config = DecoderConfig {
            hidden_size: 2048,
            intermediate_size: 5632,
            num_attention_heads: 32,
            num_key_value_heads: 4,
            head_dim: 64,
            attention_scale: 0.125,
            num_hidden_layers: LAYERS + 2,
            layers: vec![demo.layers[0]; LAYERS + 2],
            max_position_embeddings: 2048,
            ..demo.clone()
        };
        config.rope.rotary_dim = 64;
        config
    }

    /// Weights of one value, whatever the layer: time does not depend on them.
    struct Made {
        dtype: WeightType,
        shapes: HashMap<&'static str, Vec<usize>>,
        bytes: Vec<u8>,
        ones: Vec<u8>,
    }

    impl Made {
        fn new(config: &DecoderConfig, dtype: WeightType) -> Made {
            let (hidden, inner) = (config.hidden_size, config.intermediate_size);
            let q = config.num_attention_heads * config.head_dim;
            let kv = config.num_key_value_heads * config.head_dim;
            let shapes = HashMap::from([
                ("attn_norm.weight", vec![hidden]),
                ("mlp_norm.weight", vec![hidden]),
                ("q_proj.weight", vec![q, hidden]),
                ("k_proj.weight", vec![kv, hidden]),
                ("v_proj.weight", vec![kv, hidden]),
                ("o_proj.weight", vec![hidden, q]),
                ("gate_proj.weight", vec![inner, hidden]),
                ("up_proj.weight", vec![inner, hidden]),
                ("down_proj.weight", vec![hidden, inner]),
            ]);
            let bytes = vec![1; dtype.bytes_for(inner * hidden).expect("whole blocks")];
            let ones = std::iter::repeat_n(1f32.to_le_bytes(), hidden).flatten().collect();
            Made { dtype, shapes, bytes, ones }
        }

        fn found(&self, name: &str) -> Option<TensorMeta> {
            let (_, part) = name.strip_prefix("layers.")?.split_once('.')?;
            let shape = self.shapes.get(part)?.clone();
            let dtype = if shape.len() == 1 { WeightType::F32 } else { self.dtype };
            Some(TensorMeta { dtype, shape })
        }
    }

    impl WeightSource for Made {
        fn meta(&self, name: &str) -> Result<Option<TensorMeta>> {
            Ok(self.found(name))
        }

        fn tensor(&self, name: &str) -> Result<StoredTensor<'_>> {
            let meta = self.found(name).expect("a tensor of a layer");
            let all = if meta.shape.len() == 1 { &self.ones } else { &self.bytes };
            let bytes = TensorBytes::Memory(all[..meta.bytes() as usize].into());
            Ok(StoredTensor { meta, bytes })
        }

        fn names(&self) -> Vec<String> {
            Vec::new()
        }

        fn stored_name(&self, name: &str) -> String {
            name.to_string()
        }

        fn path_of(&self, _: &str) -> &Path {
            Path::new("made up")
        }
    }

    pub fn benches() {
        let pipeline = HeterogeneousPipeline::new(&[DeviceSpec::Metal(0)], DEMO_MODEL).expect("an Apple GPU");
        let demo = pipeline.stage_source(0);
        let device: Device = demo.device.device.clone();
        let config = Arc::new(config(&demo.config));
        let mut criterion = Criterion::default().configure_from_args();
        for dtype in [WeightType::F16, WeightType::Q8_0, WeightType::Q4_0, WeightType::Q4_K] {
            let weights = Arc::new(Made::new(&config, dtype));
            let mut group = criterion.benchmark_group(format!("{LAYERS} layers of TinyLlama, {dtype}"));
            group.throughput(Throughput::Elements(STEPS as u64));
            for (name, fused) in [("fused", true), ("candle", false)] {
                let stage = StageSource {
                    weights: weights.clone(),
                    config: config.clone(),
                    layers: 1..LAYERS + 1,
                    options: StageOptions {
                        metal: MetalExtOptions { fused, ..MetalExtOptions::default() },
                        ..demo.options
                    },
                    ..demo.clone()
                };
                let mut backend = stage.load(&|_| {}).expect("memory");
                let id = SequenceId(0);
                backend.open(id, POSITION + STEPS).expect("memory");
                group.bench_function(name, |bencher| {
                    bencher.iter(|| {
                        let mut x = Tensor::ones((1, config.hidden_size), DType::F32, &device).expect("memory");
                        for position in POSITION..POSITION + STEPS {
                            let slice = SequenceSlice {
                                id,
                                position,
                                len: 1,
                                length: position + 1,
                                decode: true,
                                wanted: Wanted::Nothing,
                            };
                            let batch = MicroBatch { slices: vec![slice], tokens: vec![0] };
                            match backend.forward(&batch, Some(x.clone()), &mut Watch::off()).expect("a step") {
                                StageOutput::Activations(out) => x = out,
                                _ => unreachable!("the stage has no head"),
                            }
                        }
                        device.synchronize().expect("the GPU");
                    });
                });
            }
            group.finish();
        }
        criterion.final_summary();
    }
}
