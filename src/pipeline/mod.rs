//! From a model and a list of devices to stages: which layers each device gets, and the threads that run them. Knows
//! layers and activations, not what a token means.

pub mod link;
pub mod message;
pub mod inbox;
pub mod cost;
mod facts;
pub mod plan;
pub mod worker;
pub mod stages;

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use metal_ext::MetalExtOptions;

use self::cost::{CostCache, DeviceCost, LinkCost, StepSeconds, Subject};
use self::link::LinkOptions;
use self::plan::{Objective, Placement, Plan, PlanDevice, Problem, Workload};
use crate::backend::candle::{activation_dtype, kv_dtype};
use crate::backend::{StageOptions, StageSource};
use crate::device::{DeviceSpec, OpenDevice, available_threads, free_memory};
use crate::error::{Error, Result};
use crate::instrument::WriteFailures;
use crate::kernels::kv::KvType;
use crate::kernels::matrix;
use crate::kernels::simd::Isa;
use crate::model::config::DecoderConfig;
use crate::model::rope::Ropes;
use crate::model::stage_weights::WeightBytes;
use crate::weights::gguf::GgufFile;
use crate::weights::hub::{self, ModelFiles};
use crate::weights::safetensors::SafetensorsDir;
use crate::weights::{TensorMeta, WeightSource, WeightType};

/// Positions that KV is planned for when nobody says otherwise and the model could take more.
const DEFAULT_PLANNED_CONTEXT: usize = 4096;

/// What decides which layers a device gets.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Split {
    /// Free memory: the fullest device is filled as little as can be. Uses every device and needs no measurement.
    #[default]
    Bytes,
    /// Layers of each stage, in the order of the devices.
    Layers(Vec<usize>),
    /// Measured time, within the memory. May leave devices out.
    Measured(MeasuredSplit),
}

/// What a measured split is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeasuredSplit {
    /// What it is to be best at.
    pub objective: Objective,
    /// Sequences at once: KV is planned for the whole context of each, and throughput for all of them.
    pub sequences: usize,
    /// File that keeps measurements for the next time. `None` measures every time.
    pub cache: Option<PathBuf>,
    /// Measure again what the file has.
    pub remeasure: bool,
    /// Counts the times that the file could not be written. Keep a clone to look at.
    pub cache_failures: WriteFailures,
}

impl Default for MeasuredSplit {
    fn default() -> Self {
        MeasuredSplit {
            objective: Objective::Latency,
            sequences: 1,
            cache: None,
            remeasure: false,
            cache_failures: WriteFailures::default(),
        }
    }
}

/// How to cut a model. `Default` cuts by free memory.
#[derive(Debug, Clone, Default)]
pub struct PipelineOptions {
    /// What decides which layers a device gets.
    pub split: Split,
    /// How activations travel between the stages.
    pub link: LinkOptions,
    /// Positions that a sequence may have, prompt and generated tokens together. `None` takes the model's own limit.
    pub context_length: Option<usize>,
    /// Positions of KV that all open sequences may take together. `None` takes what the devices have free.
    pub kv_positions: Option<u64>,
    /// Type that F32, F16 and BF16 weights are held in. `None` leaves them as stored; quantised ones always stay.
    pub dtype: Option<WeightType>,
    /// Type that CPU stages hold keys and values in; Metal stages hold them in F16, CUDA stages in their activations' type.
    pub kv_type: KvType,
    /// How metal-ext's kernels are used on Apple GPUs.
    pub metal: MetalExtOptions,
    /// Instructions that CPU stages use, one of [`Isa::available`]. `None` takes the best.
    pub isa: Option<Isa>,
    /// Whether CPU stages with AMX compute prompts in BF16, whatever their weights are stored in but F32: about twice as fast
    /// from some 64 tokens on. Quantised weights then give results nearer to F32, since inputs lose less than in 8 bits, and
    /// F16 ones less near, as BF16 weights do; bits are others than on other CPUs. For one sequence at a time: decode steps
    /// do without, so a step with both goes through the weights twice, which makes prompts slower and running streams
    /// stutter. Generated tokens' KV is not reused then, see [`prefix_cache`](crate::ExecutorOptions::prefix_cache).
    pub bf16_prompts: bool,
}

impl PipelineOptions {
    /// The part that concerns each stage by itself.
    fn stage(&self) -> StageOptions {
        let PipelineOptions { dtype: dense_type, kv_type, bf16_prompts, metal, .. } = *self;
        StageOptions { dense_type, kv_type, bf16_prompts, metal }
    }
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
    /// Bytes free on each stage's device when it was opened; the same for stages on one device.
    free: Vec<u64>,
    stages: Vec<StagePlan>,
    plan: Option<Plan>,
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

    /// Cuts `model` as `options` say. A measured split loads and runs some layers, which takes a few seconds where its
    /// file does not have them yet.
    pub fn with_options(devices: &[DeviceSpec], model: &str, options: PipelineOptions) -> Result<Self> {
        let mut pipeline = Self::open(devices, model, options)?;
        pipeline.stages = pipeline.cut()?;
        pipeline.check_fit()?;
        Ok(pipeline)
    }

    /// Measures what a [`Split::Measured`] plan is made from, for plans of what one does not have: change the costs and
    /// bytes, and [`plan`](Problem::plan).
    pub fn measure(
        devices: &[DeviceSpec],
        model: &str,
        options: PipelineOptions,
        measured: &MeasuredSplit,
    ) -> Result<Problem> {
        Self::open(devices, model, options)?.measured_problem(measured)
    }

    /// Everything but the cut.
    fn open(devices: &[DeviceSpec], model: &str, options: PipelineOptions) -> Result<Self> {
        if devices.is_empty() {
            return Err(Error::option("devices", "at least one device is needed"));
        }
        if let Some(dtype) = options.dtype.filter(|dtype| !dtype.is_dense()) {
            return Err(Error::option("dtype", format!("{dtype} is not one of F32, F16, BF16")));
        }
        if let Some(simulated) = options.link.simulated {
            simulated.validate()?;
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
        let mut free: Vec<u64> = Vec::with_capacity(devices.len());
        for (index, device) in devices.iter().enumerate() {
            let mate = devices[..index].iter().position(|mate| mate.spec.physical() == device.spec.physical());
            free.push(match mate {
                Some(mate) => free[mate],
                None => free_memory(device.spec)?,
            });
            let mate = devices[..index].iter().position(|mate| mate.device.same_device(&device.device));
            ropes.push(match mate {
                Some(mate) => ropes[mate].clone(),
                None => Arc::new(Ropes::new(&config, &device.device)),
            });
        }
        Ok(HeterogeneousPipeline {
            model: files,
            source,
            config: Arc::new(config),
            options,
            devices,
            ropes,
            free,
            stages: Vec::new(),
            plan: None,
            context_length,
            planned_context,
        })
    }

    /// Bytes that a position takes in one layer's KV on the device.
    fn kv_bytes_per_layer(&self, device: &OpenDevice) -> Result<u64> {
        if device.cpu.is_some() {
            let (kv_heads, head_dim) = (self.config.num_key_value_heads, self.config.head_dim);
            return Ok(self.options.kv_type.bytes_per_position(kv_heads, head_dim));
        }
        let dtype = kv_dtype(&*self.source, &device.device, self.options.dtype)?;
        Ok((self.config.kv_elements_per_token() * dtype.size_in_bytes()) as u64)
    }

    /// Whether a decode step leaves the keys and values, to the bit, that a prompt's rows would. It does not where these
    /// are computed in BF16 and it is not.
    pub(crate) fn decodes_like_prompts(&self) -> Result<bool> {
        if !self.options.bf16_prompts || !self.isas().any(Isa::has_tiles) {
            return Ok(true);
        }
        Ok(self.matrix_types()?.iter().all(|dtype| matches!(dtype, WeightType::F32 | WeightType::BF16)))
    }

    /// Rows of a step that take as long together as one more would: those of a tile where steps are computed in tiles.
    pub(crate) fn rows_at_a_time(&self) -> Result<usize> {
        let mut types = self.matrix_types()?;
        // With the option a prompt's rows in F16 are in other tiles than decode steps.
        types.retain(|dtype| *dtype != WeightType::F16 || !self.options.bf16_prompts);
        let rows = self.isas().flat_map(|isa| types.iter().map(move |dtype| matrix::rows_at_a_time(*dtype, isa)));
        Ok(rows.max().unwrap_or(1))
    }

    /// Instructions that CPU stages use.
    fn isas(&self) -> impl Iterator<Item = Isa> {
        self.devices.iter().filter_map(|device| Some(device.cpu.as_ref()?.isa))
    }

    /// Types that layers' matrices are held in.
    fn matrix_types(&self) -> Result<Vec<WeightType>> {
        let becomes = |dtype: WeightType| if dtype.is_dense() { self.options.dtype.unwrap_or(dtype) } else { dtype };
        let mut types = Vec::new();
        for name in self.source.names().iter().filter(|name| name.starts_with("layers.")) {
            let Some(TensorMeta { dtype, shape }) = self.source.meta(name)? else { continue };
            if shape.len() > 1 && !types.contains(&becomes(dtype)) {
                types.push(becomes(dtype));
            }
        }
        Ok(types)
    }

    /// What a plan is made from, with costs of nothing.
    fn problem(&self, workload: Workload) -> Result<Problem> {
        let layers = self.config.num_hidden_layers;
        let mut devices = Vec::with_capacity(self.devices.len());
        for (device, &free) in self.devices.iter().zip(&self.free) {
            let dtype = activation_dtype(&*self.source, &device.device, self.options.dtype)?;
            devices.push(PlanDevice {
                spec: device.spec,
                cost: DeviceCost { layers: vec![StepSeconds::default(); layers], ..DeviceCost::default() },
                free_bytes: usable(free),
                kv_bytes_per_layer: self.kv_bytes_per_layer(device)?,
                working_bytes: working_bytes(&self.config, workload, device.spec, dtype.size_in_bytes()),
                logits_bytes: self.config.vocab_size as u64 * size_of::<f32>() as u64,
            });
        }
        let stored = self.source.meta("layers.0.down_proj.weight")?.map_or(WeightType::F16, |meta| meta.dtype);
        Ok(Problem {
            weights: WeightBytes::of(&*self.source, &self.config, self.options.dtype)?,
            weight_type: self.options.dtype.filter(|_| stored.is_dense()).unwrap_or(stored),
            links: vec![vec![LinkCost::default(); devices.len()]; devices.len()],
            devices,
            scheduler: 0.0,
            workload,
        })
    }

    fn measured_problem(&self, measured: &MeasuredSplit) -> Result<Problem> {
        let workload = Workload { context: self.planned_context, sequences: measured.sequences };
        let mut problem = self.problem(workload)?;
        let mut cache = CostCache::open(measured.cache.as_deref(), measured.remeasure);
        let subject = Subject {
            source: &self.source,
            config: &self.config,
            options: self.options.stage(),
            context: workload.context,
            sequences: workload.sequences,
            link: self.options.link,
        };
        for (index, device) in self.devices.iter().enumerate() {
            problem.devices[index].cost = subject.device_cost(device, &self.ropes[index], &mut cache)?;
            for (later, target) in self.devices.iter().enumerate().skip(index + 1) {
                problem.links[index][later] = subject.link_cost(device, target, &mut cache)?;
            }
        }
        let sharing = problem.distinct_processors();
        let sharing: Vec<usize> = sharing.into_iter().filter(|&index| self.devices[index].cpu.is_some()).collect();
        if sharing.len() > 1 {
            let devices: Vec<_> = sharing.iter().map(|&index| (&self.devices[index], &self.ropes[index])).collect();
            for (index, crowded) in sharing.into_iter().zip(subject.crowded(&devices, &mut cache)?) {
                problem.devices[index].cost.crowded = crowded;
            }
        }
        // The last stage's answer, the caller's wake-up, the way to the first stage.
        problem.scheduler = 3.0 * cost::hand_over(&mut cache)?;
        cache.save(&measured.cache_failures);
        Ok(problem)
    }

    /// The stages. A measured split drops the devices that it leaves out.
    fn cut(&mut self) -> Result<Vec<StagePlan>> {
        let weights = WeightBytes::of(&*self.source, &self.config, self.options.dtype)?;
        let layers = self.config.num_hidden_layers;
        let ranges = match &self.options.split {
            Split::Layers(counts) => plan::given_split(layers, counts, self.devices.len())?,
            Split::Bytes => {
                // Stages on one device share its memory evenly until the cut is known.
                let mates = |device: &OpenDevice| {
                    let physical = device.spec.physical();
                    self.devices.iter().filter(|mate| mate.spec.physical() == physical).count() as u64
                };
                let budgets: Vec<u64> = self.devices.iter().zip(&self.free).map(|(d, free)| free / mates(d)).collect();
                let kv = self.kv_bytes_per_layer(&self.devices[0])?.saturating_mul(self.planned_context as u64);
                plan::split_by_bytes(&weights, kv, &budgets)?
            }
            Split::Measured(measured) => {
                // What cannot fit at any cost is refused before anything is loaded.
                let workload = Workload { context: self.planned_context, sequences: measured.sequences };
                self.problem(workload)?.plan(measured.objective)?;
                let plan = self.measured_problem(measured)?.plan(measured.objective)?;
                warn_of_shared_cores(&plan);
                let placements: Vec<Placement> = plan.stages.iter().map(|stage| stage.placement.clone()).collect();
                self.devices = placements.iter().map(|stage| self.devices[stage.device].clone()).collect();
                self.ropes = placements.iter().map(|stage| self.ropes[stage.device].clone()).collect();
                self.free = placements.iter().map(|stage| self.free[stage.device]).collect();
                self.plan = Some(plan);
                placements.into_iter().map(|stage| stage.layers).collect()
            }
        };
        let mut stages = Vec::with_capacity(ranges.len());
        for ((device, &free_bytes), range) in self.devices.iter().zip(&self.free).zip(ranges) {
            stages.push(StagePlan {
                device: device.spec,
                weight_bytes: weights.stage(&range),
                kv_bytes_per_token: self.kv_bytes_per_layer(device)? * range.len() as u64,
                kv_budget: 0,
                free_bytes,
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
            let left = usable(stage.free_bytes).saturating_sub(weights);
            let most = self.options.kv_positions.map_or(u64::MAX, |n| n.saturating_mul(stage.kv_bytes_per_token));
            let share = left as u128 * stage.kv_bytes_per_token as u128 / kv.max(1) as u128;
            stage.kv_budget = most.min(share as u64);
        }
        Ok(stages)
    }

    /// Every stage must have room for KV beside its weights: for a sequence of the whole context where the caller gave one,
    /// for a single position otherwise, since requests are admitted by the KV that they need. `kv_positions` may be the
    /// smaller limit.
    fn check_fit(&self) -> Result<()> {
        let context = self.options.context_length.unwrap_or(1);
        let most = self.options.kv_positions.unwrap_or(u64::MAX).max(1);
        let positions = (context as u64).min(most);
        let room = |stage: &StagePlan| stage.kv_budget / stage.kv_bytes_per_token.max(1);
        let Some(stage) = self.stages.iter().position(|stage| room(stage) < positions) else { return Ok(()) };
        let problem = self.problem(Workload { context: positions as usize, sequences: 1 })?;
        let fits: Vec<_> = problem.any_cut().into_iter().chain(problem.nearest_fits()).collect();
        let advice = plan::in_words(&fits);
        let reason = match room(&self.stages[stage]) {
            0 => "has no room for KV beside its weights".to_string(),
            room => {
                format!("has room for KV of {room} positions beside its weights, and `context_length` is {context}")
            }
        };
        Err(Error::DoesNotFit(format!("stage {stage} {reason}; {advice}\n{self}")))
    }

    /// The stages, in the order in which tokens pass them.
    pub fn stages(&self) -> &[StagePlan] {
        &self.stages
    }

    /// What a measured split expects of the stages.
    pub fn plan(&self) -> Option<&Plan> {
        self.plan.as_ref()
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
            options: self.options.stage(),
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

/// Devices are measured one after the other. Stages that then share cores are slower than that.
fn warn_of_shared_cores(plan: &Plan) {
    let cores = available_threads();
    let threads = plan.stages.iter().map(|stage| match stage.spec {
        DeviceSpec::Cpu { threads } => threads.unwrap_or(cores),
        DeviceSpec::Cuda(_) | DeviceSpec::Metal(_) => 0,
    });
    let threads: usize = threads.sum();
    if threads > cores {
        tracing::warn!(
            "the CPU stages have {threads} threads for {cores} cores: together they are slower than planned"
        );
    }
}

/// Bytes of those free that a plan fills: a twentieth stays for what else runs on the device.
fn usable(free: u64) -> u64 {
    free - free / 20
}

/// About what a stage needs beside weights and KV, in its widest moment: residual, normed and projected rows, the MLP's
/// three, attention scores, of which the decoder holds a few at a time, and rotary tables.
fn working_bytes(config: &DecoderConfig, workload: Workload, device: DeviceSpec, element: usize) -> u64 {
    let attention = config.num_attention_heads * config.head_dim;
    let row = 6 * config.hidden_size + 3 * attention + 3 * config.intermediate_size;
    let rows = cost::prefill_rows(workload.context).max(workload.sequences);
    let scores = match device {
        DeviceSpec::Cpu { .. } => 3 * (8 << 20),
        DeviceSpec::Cuda(_) | DeviceSpec::Metal(_) => 3 * (128 << 20),
    };
    let rows = (row as u64).saturating_mul(rows as u64).saturating_mul(element as u64);
    rows.saturating_add(scores).saturating_add(Ropes::most_bytes(config, workload.context))
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
        if let Some(plan) = &self.plan {
            return plan.fmt(f);
        }
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
