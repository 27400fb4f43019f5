//! From a model and a list of devices to stages: which layers each device gets, and the threads that run them. Knows
//! layers and activations, not what a token means.

pub mod plan;
pub mod transfer;
pub mod worker;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::backend::StageSource;
use crate::device::{DeviceSpec, OpenDevice, free_memory};
use crate::error::{Error, Result};
use crate::kernels::kv::KvType;
use crate::kernels::simd::Isa;
use crate::model::config::DecoderConfig;
use crate::model::decoder::{WeightBytes, activation_dtype};
use crate::model::rope::Ropes;
use crate::weights::gguf::GgufFile;
use crate::weights::hub::{self, ModelFiles};
use crate::weights::safetensors::SafetensorsDir;
use crate::weights::{WeightSource, WeightType};

/// Positions that KV is planned for when nobody says otherwise and the model could take more.
const DEFAULT_PLANNED_CONTEXT: usize = 4096;

/// How to cut a model. `Default` cuts by free memory.
#[derive(Debug, Clone, Default)]
pub struct PipelineOptions {
    /// Layers of each stage, in the order of the devices. `None` lets the planner choose.
    pub split: Option<Vec<usize>>,
    /// Positions that a sequence may have, prompt and generated tokens together. `None` takes the model's own limit.
    pub context_length: Option<usize>,
    /// Positions of KV that all open sequences may take together. `None` takes what the devices have free.
    pub kv_positions: Option<u64>,
    /// Type that F32, F16 and BF16 weights are held in. `None` leaves them as stored; quantised ones always stay.
    pub dtype: Option<WeightType>,
    /// Type that CPU stages hold keys and values in; GPU stages hold them in their activations' type.
    pub kv_type: KvType,
    /// Instructions that CPU stages use, one of [`Isa::available`]. `None` takes the best.
    pub isa: Option<Isa>,
}

/// One stage of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagePlan {
    /// Where it runs.
    pub device: DeviceSpec,
    /// Its layers, of `0..num_hidden_layers`.
    pub layers: Range<usize>,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Bytes of KV that one position takes.
    pub kv_bytes_per_token: u64,
    /// Bytes that KV may take beside the weights.
    pub kv_budget: u64,
    /// Bytes that were free on the device when the plan was made, before anything was loaded.
    pub free_bytes: u64,
}

/// A model cut into stages over opened devices. Nothing but headers has been read yet.
///
/// ```
/// use candle_pipeline::{DEMO_MODEL, DeviceSpec, HeterogeneousPipeline};
/// let devices = DeviceSpec::parse_list("cpu,cpu").unwrap();
/// let pipeline = HeterogeneousPipeline::new(&devices, DEMO_MODEL).unwrap();
/// assert_eq!(pipeline.stages().len(), 2);
/// println!("{pipeline}");
/// ```
#[derive(Clone)]
pub struct HeterogeneousPipeline {
    model: ModelFiles,
    source: Arc<dyn WeightSource>,
    config: Arc<DecoderConfig>,
    options: PipelineOptions,
    devices: Vec<OpenDevice>,
    /// Rotary tables of each stage; stages on one device have the same.
    ropes: Vec<Arc<Ropes>>,
    stages: Vec<StagePlan>,
    context_length: usize,
    planned_context: usize,
}

impl HeterogeneousPipeline {
    /// Cuts `model` (a folder, a GGUF file or a hub id) over `devices` by their free memory.
    ///
    /// Reads headers, and blocks while it does; a hub id may be downloaded, so on an async runtime use a blocking task
    /// for those.
    pub fn new(devices: &[DeviceSpec], model: &str) -> Result<Self> {
        Self::with_options(devices, model, PipelineOptions::default())
    }

    /// Cuts `model` as `options` say.
    pub fn with_options(devices: &[DeviceSpec], model: &str, options: PipelineOptions) -> Result<Self> {
        if devices.is_empty() {
            return Err(Error::option("devices", "at least one device is needed"));
        }
        if let Some(dtype) = options.dtype.filter(|dtype| !dtype.is_dense()) {
            return Err(Error::option("dtype", format!("{dtype} is not one of F32, F16, BF16")));
        }
        let files = hub::locate(model)?;
        let (source, config) = open_model(&files)?;
        let limit = config.max_position_embeddings;
        let context_length = match options.context_length {
            Some(0) => return Err(Error::option("context_length", "is 0, at least 1 is needed")),
            Some(length) if length > limit => {
                let reason = format!("{length} is more than the model's {limit} positions");
                return Err(Error::option("context_length", reason));
            }
            Some(length) => length,
            None => limit,
        };
        let devices = OpenDevice::open_all(devices, options.isa.unwrap_or_else(Isa::detect))?;
        let planned_context = match options.context_length {
            Some(length) => length,
            None => limit.min(DEFAULT_PLANNED_CONTEXT),
        };
        let mut ropes: Vec<Arc<Ropes>> = Vec::with_capacity(devices.len());
        for (index, device) in devices.iter().enumerate() {
            let mate = devices[..index].iter().position(|mate| mate.device.same_device(&device.device));
            ropes.push(match mate {
                Some(mate) => ropes[mate].clone(),
                None => Arc::new(Ropes::new(&config, &device.device)),
            });
        }
        let mut pipeline = HeterogeneousPipeline {
            model: files,
            source,
            config: Arc::new(config),
            options,
            devices,
            ropes,
            stages: Vec::new(),
            context_length,
            planned_context,
        };
        pipeline.stages = pipeline.plan()?;
        pipeline.check_fit()?;
        Ok(pipeline)
    }

    fn plan(&self) -> Result<Vec<StagePlan>> {
        let weights = WeightBytes::of(&*self.source, &self.config, self.options.dtype)?;
        let layers = self.config.num_hidden_layers;
        // Stages on one device share its memory evenly until the cut is known.
        let mut free: BTreeMap<DeviceSpec, (u64, u64)> = BTreeMap::new();
        for device in &self.devices {
            let physical = device.spec.physical();
            match free.get_mut(&physical) {
                Some((_, stages)) => *stages += 1,
                None => {
                    free.insert(physical, (free_memory(physical)?, 1));
                }
            }
        }
        let share = |device: &OpenDevice| free[&device.spec.physical()];
        let kv_per_token = |device: &OpenDevice| -> Result<u64> {
            if device.cpu.is_some() {
                let (kv_heads, head_dim) = (self.config.num_key_value_heads, self.config.head_dim);
                return Ok(self.options.kv_type.bytes_per_position(kv_heads, head_dim));
            }
            let dtype = activation_dtype(&*self.source, &device.device, self.options.dtype)?;
            Ok((self.config.kv_elements_per_token() * dtype.size_in_bytes()) as u64)
        };
        let ranges = match &self.options.split {
            Some(counts) => plan::given_split(layers, counts, self.devices.len())?,
            None => {
                let budgets: Vec<u64> = self.devices.iter().map(share).map(|(bytes, stages)| bytes / stages).collect();
                let kv = kv_per_token(&self.devices[0])?.saturating_mul(self.planned_context as u64);
                plan::split_by_bytes(&weights, kv, &budgets)?
            }
        };
        let mut stages = Vec::with_capacity(ranges.len());
        for (device, range) in self.devices.iter().zip(ranges) {
            stages.push(StagePlan {
                device: device.spec,
                weight_bytes: weights.stage(&range),
                kv_bytes_per_token: kv_per_token(device)? * range.len() as u64,
                kv_budget: 0,
                free_bytes: share(device).0,
                layers: range,
            });
        }
        // What a device has left after all its stages' weights is shared by their KV in proportion to their layers, so
        // that every stage of a device can hold the same number of positions.
        let totals: Vec<(u64, u64)> = stages
            .iter()
            .map(|stage| {
                let mates = stages.iter().filter(|mate| mate.device.physical() == stage.device.physical());
                mates.fold((0, 0), |(weights, kv), mate| (weights + mate.weight_bytes, kv + mate.kv_bytes_per_token))
            })
            .collect();
        for (stage, (weights, kv)) in stages.iter_mut().zip(totals) {
            // A twentieth stays free for activations and for what else runs on the device.
            let usable = stage.free_bytes - stage.free_bytes / 20;
            let left = usable.saturating_sub(weights);
            let most = self.options.kv_positions.map_or(u64::MAX, |n| n.saturating_mul(stage.kv_bytes_per_token));
            let share = left as u128 * stage.kv_bytes_per_token as u128 / kv.max(1) as u128;
            stage.kv_budget = most.min(share as u64);
        }
        Ok(stages)
    }

    fn check_fit(&self) -> Result<()> {
        let fits = |stage: &StagePlan| stage.kv_budget >= stage.kv_bytes_per_token;
        match self.stages.iter().position(|stage| !fits(stage)) {
            None => Ok(()),
            Some(stage) => Err(Error::DoesNotFit(format!(
                "stage {stage} has no room for KV beside its weights; give it fewer layers, add a device or use a smaller type\n{self}"
            ))),
        }
    }

    /// The stages, in the order in which tokens pass them.
    pub fn stages(&self) -> &[StagePlan] {
        &self.stages
    }

    /// What the model is.
    pub fn config(&self) -> &Arc<DecoderConfig> {
        &self.config
    }

    /// Where its tensors come from.
    pub fn weights(&self) -> &Arc<dyn WeightSource> {
        &self.source
    }

    /// The files it was found in.
    pub fn model(&self) -> &ModelFiles {
        &self.model
    }

    /// The opened device of each stage.
    pub fn devices(&self) -> &[OpenDevice] {
        &self.devices
    }

    /// The rotary tables of each stage's device.
    pub fn ropes(&self) -> &[Arc<Ropes>] {
        &self.ropes
    }

    /// What stage `stage` is loaded from.
    pub fn stage_source(&self, stage: usize) -> StageSource {
        StageSource {
            weights: self.source.clone(),
            config: self.config.clone(),
            layers: self.stages[stage].layers.clone(),
            device: self.devices[stage].clone(),
            ropes: self.ropes[stage].clone(),
            dense_type: self.options.dtype,
            kv_type: self.options.kv_type,
        }
    }

    /// The options it was made with.
    pub fn options(&self) -> &PipelineOptions {
        &self.options
    }

    /// Positions that a sequence may have, prompt and generated tokens together.
    pub fn context_length(&self) -> usize {
        self.context_length
    }
}

/// Opens a model's headers.
fn open_model(files: &ModelFiles) -> Result<(Arc<dyn WeightSource>, DecoderConfig)> {
    match files {
        ModelFiles::HuggingFace { dir } => {
            let (config, family) = DecoderConfig::from_hf_dir(dir)?;
            Ok((Arc::new(SafetensorsDir::open(dir, &family.names)?), config))
        }
        ModelFiles::Gguf { file } => {
            let gguf = GgufFile::open(file)?;
            let (config, _) = DecoderConfig::from_gguf(&gguf)?;
            Ok((Arc::new(gguf), config))
        }
    }
}

/// Bytes for people: `1.23 GB`.
pub fn human_bytes(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..10_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

impl fmt::Display for HeterogeneousPipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let context = self.planned_context;
        writeln!(
            f,
            "{:<5}  {:<15}  {:<7}  {:>10}  {:>14}  {:>10}  {:>10}",
            "stage",
            "device",
            "layers",
            "weights",
            format!("KV@{context}"),
            "total",
            "free"
        )?;
        for (index, stage) in self.stages.iter().enumerate() {
            let kv = stage.kv_bytes_per_token.saturating_mul(context as u64);
            writeln!(
                f,
                "{index:<5}  {:<15}  {:<7}  {:>10}  {:>14}  {:>10}  {:>10}",
                stage.device.to_string(),
                format!("{}-{}", stage.layers.start, stage.layers.end - 1),
                human_bytes(stage.weight_bytes),
                human_bytes(kv),
                human_bytes(stage.weight_bytes.saturating_add(kv)),
                human_bytes(stage.free_bytes),
            )?;
        }
        Ok(())
    }
}

impl fmt::Debug for HeterogeneousPipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeterogeneousPipeline").field("model", &self.model).field("stages", &self.stages).finish()
    }
}
