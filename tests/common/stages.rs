//! Stages driven by hand, and what they are compared with.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_pipeline::backend::{MicroBatch, SequenceId, SequenceSlice, StageBackend, StageOutput, StageSource, Wanted};
use candle_pipeline::instrument::Watch;
use candle_pipeline::internals::dequantise;
use candle_pipeline::weights::{StoredTensor, TensorBytes, TensorMeta, WeightSource, WeightType};
use candle_pipeline::{DEMO_MODEL, DeviceSpec, HeterogeneousPipeline, Result};

/// A model's tensors, every one widened to F32: the CPU backend then multiplies unrounded inputs, as the kernels do,
/// instead of inputs rounded to 8 bits.
pub struct Widened {
    source: Arc<dyn WeightSource>,
    tensors: HashMap<String, Vec<u8>>,
}

impl Widened {
    /// Widens all of them.
    pub fn new(source: Arc<dyn WeightSource>) -> Widened {
        let widen = |name: String| {
            let stored = source.tensor(&name).unwrap();
            let values = dequantise(stored.meta.dtype, &stored.bytes.read().unwrap()).unwrap();
            (name, values.into_iter().flat_map(f32::to_le_bytes).collect())
        };
        let tensors = source.names().into_iter().map(widen).collect();
        Widened { source, tensors }
    }
}

impl WeightSource for Widened {
    fn meta(&self, name: &str) -> Result<Option<TensorMeta>> {
        Ok(self.source.meta(name)?.map(|meta| TensorMeta { dtype: WeightType::F32, ..meta }))
    }

    fn tensor(&self, name: &str) -> Result<StoredTensor<'_>> {
        let StoredTensor { meta, .. } = self.source.tensor(name)?;
        let bytes = TensorBytes::Memory(self.tensors[name].as_slice().into());
        Ok(StoredTensor { meta: TensorMeta { dtype: WeightType::F32, ..meta }, bytes })
    }

    fn names(&self) -> Vec<String> {
        self.source.names()
    }

    fn stored_name(&self, name: &str) -> String {
        self.source.stored_name(name)
    }

    fn path_of(&self, name: &str) -> &Path {
        self.source.path_of(name)
    }
}

/// What a stage with all of the demo model, or of a file in its folder, is loaded from.
pub fn source_of(device: DeviceSpec, file: &str) -> StageSource {
    let model = Path::new(DEMO_MODEL).join(file);
    HeterogeneousPipeline::new(&[device], model.to_str().unwrap()).unwrap().stage_source(0)
}

/// The stage's decode step of one sequence; its logits.
pub fn step(backend: &mut dyn StageBackend, id: SequenceId, token: u32, position: usize) -> Vec<f32> {
    let slice =
        SequenceSlice { id, position, len: 1, length: position + 1, decode: true, wanted: Wanted::Logits { rows: 1 } };
    match backend.forward(&MicroBatch { slices: vec![slice], tokens: vec![token] }, None, &mut Watch::off()).unwrap() {
        StageOutput::Logits(mut logits) => logits.remove(0),
        _ => unreachable!("a whole model returns logits"),
    }
}

/// The likeliest token.
pub fn best(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(token, _)| token as u32)
}

/// The `k` likeliest tokens with their logits, the lowest id first among equals.
pub fn most_likely(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    all.sort_by(|(_, a), (_, b)| b.partial_cmp(a).unwrap());
    all.truncate(k);
    all
}

/// The largest difference between two rows of logits.
pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Writes the demo model with its matrices in another type.
pub fn write_demo(dtype: GgmlDType, path: &Path) {
    let mut file = File::open(format!("{DEMO_MODEL}/demo-q8_0.gguf")).unwrap();
    let content = Content::read(&mut file).unwrap();
    let mut stored: HashMap<&str, QTensor> = HashMap::new();
    for name in content.tensor_infos.keys() {
        let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
        let values = tensor.dequantize(&Device::Cpu).unwrap();
        let dtype = if values.rank() == 1 { GgmlDType::F32 } else { dtype };
        stored.insert(name, QTensor::quantize(&values, dtype).unwrap());
    }
    let metadata: Vec<(&str, &Value)> = content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = stored.iter().map(|(name, tensor)| (*name, tensor)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}
