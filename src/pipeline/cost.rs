//! What layers, the head and links cost on this machine: seconds, measured through [`StageBackend`] with layers of the
//! model itself, and kept in a file. Layers of the same tensors are measured once, so that measuring takes seconds and the
//! memory of a few layers and the head.
//!
//! Looking up embeddings is a copy of one row a token and counts as nothing.
//!
//! CPU devices share the machine's memory, and each is slower while others compute. How much is measured too, by letting
//! all of them do the same at once: [`DeviceCost::crowded`].

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::link::{Link, LinkOptions, WireType};
use crate::backend::candle::activation_dtype;
use crate::backend::{
    MicroBatch, SequenceId, SequenceSlice, StageBackend, StageOptions, StageOutput, StageSource, Wanted,
};
use crate::device::{DeviceSpec, OpenDevice, hardware_name};
use crate::error::{Error, Result};
use crate::instrument::{Watch, WriteFailures};
use crate::model::config::DecoderConfig;
use crate::model::rope::Ropes;
use crate::weights::WeightSource;

/// Rows of the prefill chunk that is measured: what an executor sends by default, or half of a short context.
pub fn prefill_rows(context: usize) -> usize {
    (context / 2 + 1).min(256)
}

/// Most rows of a decode step that is measured; KV for more takes much memory.
const MOST_DECODE_ROWS: usize = 64;

/// Layers that are loaded together to find what a step costs besides its layers.
const MOST_LAYERS_AT_ONCE: usize = 4;

/// Part of a measured layer that can be the step's at most.
const MOST_OF_A_LAYER: f64 = 0.9;

/// Models of more bytes do not stay in a desktop's last-level cache from step to step.
const CACHED_MODEL_BYTES: u64 = 32 << 20;

/// More than the last-level caches of most processors hold. A layer alone would stay in them from one repetition to the
/// next, which it does not when all layers of a larger model take turns.
const CACHE_BYTES: u64 = 256 << 20;

/// Seconds that a layer or the head takes for a micro-batch.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct StepSeconds {
    /// (rows, seconds) of decode steps, one row a sequence, by rising rows.
    pub decode: Vec<(usize, f64)>,
    /// A prefill chunk of [`prefill_rows`] rows.
    pub prefill: f64,
}

impl StepSeconds {
    /// Seconds of a decode step with `rows` rows: measured, or on the line between the neighbours. Beyond the last
    /// measurement the seconds grow as the rows do.
    pub fn decode(&self, rows: usize) -> f64 {
        let above = self.decode.partition_point(|&(measured, _)| measured < rows);
        match (above.checked_sub(1).map(|below| self.decode[below]), self.decode.get(above)) {
            (_, Some(&(measured, seconds))) if measured == rows => seconds,
            (Some((r0, s0)), Some(&(r1, s1))) => s0 + (s1 - s0) * (rows - r0) as f64 / (r1 - r0) as f64,
            (Some((last, seconds)), None) => seconds * rows as f64 / last as f64,
            (None, Some(&(_, seconds))) => seconds,
            (None, None) => 0.0,
        }
    }

    fn is_sound(&self) -> bool {
        let seconds = self.decode.iter().map(|&(_, seconds)| seconds).chain([self.prefill]);
        let rises = self.decode.windows(2).all(|pair| pair[0].0 < pair[1].0);
        rises && self.decode.first().is_some_and(|&(rows, _)| rows == 1) && seconds.into_iter().all(is_sound)
    }

    fn least(&self) -> f64 {
        self.decode.iter().map(|&(_, seconds)| seconds).fold(self.prefill, f64::min)
    }

    fn less(mut self, seconds: f64) -> Self {
        self.decode.iter_mut().for_each(|(_, step)| *step = (*step - seconds).max(0.0));
        self.prefill = (self.prefill - seconds).max(0.0);
        self
    }

    fn slowed(&mut self, factor: f64) {
        self.decode.iter_mut().for_each(|(_, seconds)| *seconds *= factor);
        self.prefill *= factor;
    }
}

fn always() -> f64 {
    1.0
}

fn is_sound(seconds: f64) -> bool {
    seconds.is_finite() && seconds >= 0.0
}

/// (rows, factor) by rising rows: how many times as long a decode step takes while the other CPU devices do the same.
pub type Crowded = Vec<(usize, f64)>;

/// What a model costs on one device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceCost {
    /// Each layer.
    pub layers: Vec<StepSeconds>,
    /// Final norm and head. Its `prefill` is 0: of a whole prompt one row goes through it.
    pub head: StepSeconds,
    /// Seconds of each micro-batch that do not depend on the number of layers: waking threads, launching, waiting.
    pub step: f64,
    /// What sharing the host's memory with the other CPU devices costs; empty where it is not shared.
    #[serde(skip)]
    pub crowded: Crowded,
    /// Part of the time that it is busy in which it uses the memory: less than 1 where waiting makes it slower.
    #[serde(skip, default = "always")]
    pub uses_memory: f64,
}

impl Default for DeviceCost {
    fn default() -> Self {
        let (layers, head, crowded) = Default::default();
        DeviceCost { layers, head, step: 0.0, crowded, uses_memory: always() }
    }
}

impl DeviceCost {
    /// The same device if it were `factor` times slower.
    pub fn slowed(mut self, factor: f64) -> Self {
        self.layers.iter_mut().chain([&mut self.head]).for_each(|step| step.slowed(factor));
        self.step *= factor;
        self.uses_memory /= factor;
        self
    }

    /// The factor for `rows` rows: measured, or that of the nearest measurement that is not above.
    pub fn crowded(&self, rows: usize) -> f64 {
        let above = self.crowded.partition_point(|&(measured, _)| measured <= rows);
        self.crowded.get(above.saturating_sub(1)).map_or(1.0, |&(_, factor)| factor)
    }

    fn is_sound(&self) -> bool {
        self.layers.iter().chain([&self.head]).all(StepSeconds::is_sound) && is_sound(self.step)
    }
}

/// What it costs to hand activations from one stage to the next, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct LinkCost {
    /// Time under way in which neither the sending stage nor the link is busy.
    pub latency: f64,
    /// Time that the sending stage copies, whatever it sends.
    pub copy: f64,
    /// Time that the sending stage copies each row.
    pub copy_per_row: f64,
    /// Time that each row occupies the link, while both stages go on.
    pub wire_per_row: f64,
}

impl LinkCost {
    /// Seconds that the sending stage copies `rows` rows.
    pub fn copy(&self, rows: usize) -> f64 {
        self.copy + self.copy_per_row * rows as f64
    }

    /// Seconds that `rows` rows occupy the link.
    pub fn wire(&self, rows: usize) -> f64 {
        self.wire_per_row * rows as f64
    }

    fn is_sound(&self) -> bool {
        [self.latency, self.copy, self.copy_per_row, self.wire_per_row].into_iter().all(is_sound)
    }
}

/// A model as it would be loaded, and the steps whose time is wanted.
pub struct Subject<'a> {
    /// Its tensors.
    pub source: &'a Arc<dyn WeightSource>,
    /// What it is.
    pub config: &'a Arc<DecoderConfig>,
    /// How a stage would hold and compute it.
    pub options: StageOptions,
    /// Positions of a sequence. Decode steps are measured in the middle, where a sequence that fills its context is on
    /// average.
    pub context: usize,
    /// Decode steps of up to this many sequences are measured, or 64.
    pub sequences: usize,
    /// How activations travel.
    pub link: LinkOptions,
}

impl Subject<'_> {
    /// Measures layers and head on a device whose rotary tables are `ropes`, or takes what `cache` has.
    pub fn device_cost(&self, device: &OpenDevice, ropes: &Arc<Ropes>, cache: &mut CostCache) -> Result<DeviceCost> {
        let layers = self.config.num_hidden_layers;
        let key = format!("{}; {}", self.names(&[device]), self.steps()?);
        if let Some(cost) = cache.devices.get(&key).filter(|cost| cost.layers.len() == layers) {
            return Ok(cost.clone());
        }
        tracing::info!("measuring {key}");
        let cost = self.measure_device(device, ropes)?;
        cache.devices.insert(key, cost.clone());
        Ok(cost)
    }

    /// What sharing the host's memory costs each of these CPU devices while all of them decode, or what `cache` has.
    pub fn crowded(&self, devices: &[(&OpenDevice, &Arc<Ropes>)], cache: &mut CostCache) -> Result<Vec<Crowded>> {
        let names: Vec<&OpenDevice> = devices.iter().map(|(device, _)| *device).collect();
        let key = format!("{}; {}", self.names(&names), self.steps()?);
        if let Some(crowds) = cache.crowds.get(&key).filter(|crowds| crowds.len() == devices.len()) {
            return Ok(crowds.clone());
        }
        tracing::info!("measuring {key}");
        let crowds = self.measure_crowd(devices)?;
        cache.crowds.insert(key, crowds.clone());
        Ok(crowds)
    }

    fn names(&self, devices: &[&OpenDevice]) -> String {
        let name = |device: &&OpenDevice| format!("{}{}", hardware_name(device.spec), self.computes_with(device));
        devices.iter().map(name).collect::<Vec<_>>().join(" beside ")
    }

    /// What is computed, in a key of the cache.
    fn steps(&self) -> Result<String> {
        let DecoderConfig { num_hidden_layers, hidden_size, intermediate_size, .. } = **self.config;
        let (fingerprint, depth) = (self.fingerprint()?, self.depth());
        let rows = self.decode_rows().last().copied().unwrap_or(1);
        Ok(format!(
            "{num_hidden_layers} layers of {hidden_size}x{intermediate_size}, {fingerprint:016x}; up to {rows} rows at \
             position {depth}"
        ))
    }

    /// What makes a difference on one and the same device.
    fn computes_with(&self, device: &OpenDevice) -> String {
        match (&device.cpu, device.spec) {
            (Some(cpu), _) => {
                let prompts = if self.options.bf16_prompts { ", prompts in BF16" } else { "" };
                format!(", {}, KV {}{prompts}", cpu.isa, self.options.kv_type)
            }
            (None, DeviceSpec::Metal(_)) => format!(", {:?}", self.options.metal),
            (None, _) => String::new(),
        }
    }

    /// Measures the link between two devices, or takes what `cache` has. What a simulated link adds is computed.
    pub fn link_cost(&self, source: &OpenDevice, target: &OpenDevice, cache: &mut CostCache) -> Result<LinkCost> {
        let dtype = activation_dtype(&**self.source, &source.device, self.options.dense_type)?;
        let hidden = self.config.hidden_size;
        let mut cost = match source.device.same_device(&target.device) {
            true => LinkCost { latency: hand_over(cache)?, ..LinkCost::default() },
            false => {
                let (from, to) = (hardware_name(source.spec), hardware_name(target.spec));
                let wire = self.link.wire_type.map_or(dtype, WireType::dtype).as_str();
                let key = format!("{from} to {to}; rows of {hidden} values, {} as {wire}", dtype.as_str());
                match cache.links.get(&key) {
                    Some(cost) => *cost,
                    None => {
                        let measured = self.measure_link(source, target, dtype, hand_over(cache)?)?;
                        cache.links.insert(key, measured);
                        measured
                    }
                }
            }
        };
        if let Some(simulated) = self.link.simulated {
            let row = hidden * self.link.wire_type.map_or(dtype, WireType::dtype).size_in_bytes();
            cost.latency += simulated.latency.as_secs_f64();
            cost.wire_per_row += simulated.occupied(row).as_secs_f64();
        }
        Ok(cost)
    }

    /// Positions before that of a measured decode step.
    fn depth(&self) -> usize {
        self.context / 2
    }

    /// Numbers of rows whose decode steps are measured: powers of two up to the first that covers all sequences.
    fn decode_rows(&self) -> Vec<usize> {
        let last = self.sequences.clamp(1, MOST_DECODE_ROWS).next_power_of_two();
        (0..).map(|power| 1usize << power).take_while(|&rows| rows <= last).collect()
    }

    /// FNV-1a over what decides the time of a step besides the device: the config, and type and shape of each tensor.
    fn fingerprint(&self) -> Result<u64> {
        let mut names = self.source.names();
        names.sort();
        let mut text = format!("{:?} {:?}", self.config, self.options.dense_type);
        for name in names {
            if let Some(meta) = self.source.meta(&name)? {
                text.push_str(&format!(" {name} {} {:?}", meta.dtype, meta.shape));
            }
        }
        let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        Ok(text.bytes().fold(0xcbf2_9ce4_8422_2325, mix))
    }

    /// For each layer the last one that has the same tensors and attention.
    fn representatives(&self) -> Result<Vec<usize>> {
        let mut tensors: Vec<Vec<String>> = vec![Vec::new(); self.config.num_hidden_layers];
        let mut names = self.source.names();
        names.sort();
        for name in names {
            let Some((layer, part)) = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) else {
                continue;
            };
            let (Ok(layer), Some(meta)) = (layer.parse::<usize>(), self.source.meta(&name)?) else { continue };
            if let Some(tensors) = tensors.get_mut(layer) {
                tensors.push(format!("{part} {} {:?}", meta.dtype, meta.shape));
            }
        }
        let kinds: Vec<_> = tensors.iter().zip(&self.config.layers).collect();
        let last_of_kind = |kind| kinds.iter().rposition(|other| other == kind);
        Ok(kinds.iter().filter_map(last_of_kind).collect())
    }

    fn measure_device(&self, device: &OpenDevice, ropes: &Arc<Ropes>) -> Result<DeviceCost> {
        let layers = self.config.num_hidden_layers;
        let representatives = self.representatives()?;
        let weights: u64 = {
            let metas = self.source.names().into_iter().map(|name| self.source.meta(&name));
            metas.filter_map(|meta| meta.transpose()).map(|meta| Ok(meta?.bytes())).sum::<Result<u64>>()?
        };
        // Reading this between repetitions takes the layer out of the caches.
        let eviction = match weights > CACHED_MODEL_BYTES {
            true => Some(Tensor::ones(CACHE_BYTES as usize / 4, DType::F32, &device.device)?),
            false => None,
        };
        let mut measured: HashMap<usize, StepSeconds> = HashMap::new();
        let mut head = StepSeconds::default();
        for &layer in &representatives {
            if measured.contains_key(&layer) {
                continue;
            }
            let mut bench = self.bench(layer..layer + 1, device, ropes, eviction.as_ref())?;
            let mut step = StepSeconds { decode: Vec::new(), prefill: bench.prefill()? };
            for rows in self.decode_rows() {
                let seconds = bench.decode(rows, Wanted::Nothing)?;
                step.decode.push((rows, seconds));
                // Every model's last layer represents its kind, and the head is behind it.
                if layer + 1 == layers {
                    head.decode.push((rows, (bench.decode(rows, Wanted::Logits { rows: 1 })? - seconds).max(0.0)));
                }
            }
            measured.insert(layer, step);
        }
        let mut costs: Vec<StepSeconds> = representatives.iter().map(|layer| measured[layer].clone()).collect();
        // Of a small model all layers, since one again and again stays nearer to the processor than all of them in turn.
        let run = if eviction.is_some() { layers.saturating_sub(MOST_LAYERS_AT_ONCE) } else { 0 }..layers;
        let mut step = 0.0;
        if run.len() > 1 {
            let mut several = self.bench(run.clone(), device, ropes, eviction.as_ref())?;
            // One by one the layers take as many steps as there are layers, together one.
            let one_by_one: f64 = costs[run.clone()].iter().map(|layer| layer.decode(1)).sum();
            let between = (run.len() - 1) as f64;
            let least = costs.iter().map(StepSeconds::least).fold(f64::INFINITY, f64::min);
            // Whatever else ran meanwhile, a layer is left something.
            step = ((one_by_one - several.decode(1, Wanted::Nothing)?) / between).clamp(0.0, least * MOST_OF_A_LAYER);
            costs = costs.into_iter().map(|layer| layer.less(step)).collect();
            // Layers behind one another begin with what the ones before have left in the caches.
            for (index, rows) in self.decode_rows().into_iter().enumerate() {
                scale(&mut costs, &run, several.decode(rows, Wanted::Nothing)? - step, |layer| {
                    &mut layer.decode[index].1
                });
            }
            scale(&mut costs, &run, several.prefill()? - step, |layer| &mut layer.prefill);
        }
        Ok(DeviceCost { layers: costs, head, step, ..DeviceCost::default() })
    }

    fn measure_crowd(&self, devices: &[(&OpenDevice, &Arc<Ropes>)]) -> Result<Vec<Crowded>> {
        let layers = self.config.num_hidden_layers;
        let run = layers.saturating_sub(MOST_LAYERS_AT_ONCE)..layers;
        let benches = devices.iter().map(|(device, ropes)| self.bench(run.clone(), device, ropes, None));
        let mut benches = benches.collect::<Result<Vec<_>>>()?;
        let mut crowds = vec![Crowded::new(); devices.len()];
        for rows in self.decode_rows() {
            let alone =
                benches.iter_mut().map(|bench| bench.decode(rows, Wanted::Nothing)).collect::<Result<Vec<_>>>()?;
            for ((crowd, alone), together) in crowds.iter_mut().zip(alone).zip(all_at_once(&mut benches, rows)?) {
                let factor = together / alone;
                crowd.push((rows, if factor.is_finite() { factor.max(1.0) } else { 1.0 }));
            }
        }
        Ok(crowds)
    }

    /// Loads layers and opens sequences in them.
    fn bench<'a>(
        &self,
        layers: Range<usize>,
        device: &OpenDevice,
        ropes: &Arc<Ropes>,
        eviction: Option<&'a Tensor>,
    ) -> Result<Bench<'a>> {
        let prefill_rows = prefill_rows(self.context);
        let sequences = self.decode_rows().last().copied().unwrap_or(1);
        let with_embeddings = layers.start == 0;
        let stage = StageSource {
            weights: self.source.clone(),
            config: self.config.clone(),
            layers,
            device: device.clone(),
            ropes: ropes.clone(),
            options: self.options,
        };
        let mut backend = stage.load(&|_| {})?;
        for id in 0..sequences {
            backend.open(SequenceId(id as u64), self.depth() + 1)?;
        }
        let activations = match with_embeddings {
            true => None,
            false => {
                let dtype = activation_dtype(&**self.source, &device.device, self.options.dense_type)?;
                let rows = prefill_rows.max(sequences);
                // Of the size that activations have; zeros could be faster than what there is in earnest.
                let values = (0..rows * self.config.hidden_size).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0);
                let values = Tensor::from_iter(values, &Device::Cpu)?.reshape((rows, self.config.hidden_size))?;
                Some(values.to_dtype(dtype)?.to_device(&device.device)?)
            }
        };
        let (device, depth) = (device.device.clone(), self.depth());
        Ok(Bench { backend, device, activations, depth, prefill_rows, eviction })
    }

    fn measure_link(&self, source: &OpenDevice, target: &OpenDevice, dtype: DType, hand_over: f64) -> Result<LinkCost> {
        let link = Link::new(source, target, LinkOptions { simulated: None, ..self.link })?;
        let seconds = |rows: usize| {
            let x = Tensor::ones((rows, self.config.hidden_size), dtype, &source.device)?;
            typical(|| {
                source.device.synchronize()?;
                let began = Instant::now();
                link.depart(x.clone())?.0.into_tensor(&target.device)?;
                target.device.synchronize()?;
                Ok(began.elapsed().as_secs_f64())
            })
        };
        const MANY: usize = 256;
        let (one, many) = (seconds(1)?, seconds(MANY)?);
        let copy_per_row = ((many - one) / (MANY - 1) as f64).max(0.0);
        Ok(LinkCost { latency: hand_over, copy: (one - copy_per_row).max(0.0), copy_per_row, wire_per_row: 0.0 })
    }
}

/// Loaded layers with open sequences.
struct Bench<'a> {
    backend: Box<dyn StageBackend>,
    device: Device,
    /// Input rows, (rows, hidden_size); `None` for the first layer, which starts from tokens.
    activations: Option<Tensor>,
    depth: usize,
    prefill_rows: usize,
    eviction: Option<&'a Tensor>,
}

impl Bench<'_> {
    /// Seconds of a decode step of `rows` sequences, whose earlier positions hold zeros.
    fn decode(&mut self, rows: usize, wanted: Wanted) -> Result<f64> {
        let (position, length) = (self.depth, self.depth + 1);
        let slice = |id| SequenceSlice { id: SequenceId(id as u64), position, len: 1, length, decode: true, wanted };
        self.seconds((0..rows).map(slice).collect())
    }

    /// Seconds of a prompt's first chunk.
    fn prefill(&mut self) -> Result<f64> {
        let len = self.prefill_rows;
        let wanted = Wanted::Nothing;
        self.seconds(vec![SequenceSlice { id: SequenceId(0), position: 0, len, length: len, decode: false, wanted }])
    }

    fn seconds(&mut self, slices: Vec<SequenceSlice>) -> Result<f64> {
        let rows = slices.iter().map(|slice| slice.len).sum();
        let batch = MicroBatch { slices, tokens: vec![0; rows] };
        let input = self.activations.as_ref().map(|x| x.narrow(0, 0, rows)?.force_contiguous()).transpose()?;
        typical(|| {
            if let Some(eviction) = self.eviction {
                eviction.sum_all()?.to_scalar::<f32>()?;
            }
            self.device.synchronize()?;
            let began = Instant::now();
            let output = self.backend.forward(&batch, input.clone(), &mut Watch::off())?;
            if let StageOutput::Activations(x) = &output {
                x.device().synchronize()?;
            }
            Ok(began.elapsed().as_secs_f64())
        })
    }
}

/// One of those that are counted, until it is dropped: after a panic too, so that the others do not wait for it.
struct Measuring<'a>(&'a AtomicUsize);

impl Drop for Measuring<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Seconds of a decode step of each while all of them compute.
fn all_at_once(benches: &mut [Bench], rows: usize) -> Result<Vec<f64>> {
    let (start, measuring) = (Barrier::new(benches.len()), AtomicUsize::new(benches.len()));
    let decode = |bench: &mut Bench| {
        start.wait();
        let seconds = {
            let _measuring = Measuring(&measuring);
            bench.decode(rows, Wanted::Nothing)
        };
        // The others want company to the end.
        while seconds.is_ok() && measuring.load(Ordering::Relaxed) > 0 {
            bench.decode(rows, Wanted::Nothing)?;
        }
        seconds
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = benches.iter_mut().map(|bench| scope.spawn(|| decode(bench))).collect();
        let ended = threads.into_iter().map(|thread| thread.join());
        ended.map(|ended| ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// Makes the seconds of the layers in `run` add up to `sum`, and changes those of all layers in the same proportion.
fn scale(layers: &mut [StepSeconds], run: &Range<usize>, sum: f64, of: impl Fn(&mut StepSeconds) -> &mut f64) {
    let factor = sum / layers[run.clone()].iter_mut().map(|layer| *of(layer)).sum::<f64>();
    if factor.is_finite() && factor > 0.0 {
        layers.iter_mut().for_each(|layer| *of(layer) *= factor);
    }
}

/// The median of several runs, after one that is not counted, for it compiles kernels and touches memory. Not the fastest
/// ones: a machine that others share is slower for seconds at a time, and so it will be when the plan is used.
fn typical(mut seconds: impl FnMut() -> Result<f64>) -> Result<f64> {
    const FEWEST: usize = 5;
    const MOST: usize = 40;
    const ENOUGH_SECONDS: f64 = 0.3;
    seconds()?;
    let (mut runs, mut total) = (Vec::with_capacity(MOST), 0.0);
    while runs.len() < FEWEST || (runs.len() < MOST && total < ENOUGH_SECONDS) {
        let run = seconds()?;
        runs.push(run);
        total += run;
    }
    runs.sort_by(f64::total_cmp);
    Ok(runs[runs.len() / 2])
}

/// Seconds until a thread that waits for a message has it.
pub fn hand_over(cache: &mut CostCache) -> Result<f64> {
    const KEY: &str = "from thread to thread";
    if let Some(cost) = cache.links.get(KEY) {
        return Ok(cost.latency);
    }
    let ((to_echo, echo_inbox), (to_us, inbox)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    let echo = std::thread::spawn(move || {
        while let Ok(message) = echo_inbox.recv() {
            if to_us.send(message).is_err() {
                return;
            }
        }
    });
    let lost = || Error::Tensors("a thread that measures messages between threads has ended".into());
    let round_trip = typical(|| {
        // A stage has mostly slept for a while when its next message comes.
        std::thread::sleep(Duration::from_millis(1));
        let began = Instant::now();
        to_echo.send(()).map_err(|_| lost())?;
        inbox.recv().map_err(|_| lost())?;
        Ok(began.elapsed().as_secs_f64())
    })?;
    drop(to_echo);
    let _ = echo.join();
    let cost = LinkCost { latency: round_trip / 2.0, ..LinkCost::default() };
    cache.links.insert(KEY.to_string(), cost);
    Ok(cost.latency)
}

/// Measured costs by what was measured, kept in a file.
#[derive(Debug, Default)]
pub struct CostCache {
    path: Option<PathBuf>,
    devices: Entries<DeviceCost>,
    crowds: Entries<Vec<Crowded>>,
    links: Entries<LinkCost>,
}

/// Costs from the file and from this run.
#[derive(Debug)]
struct Entries<T> {
    stored: BTreeMap<String, T>,
    measured: BTreeMap<String, T>,
    /// Costs from the file are kept in it, but not taken.
    remeasure: bool,
}

impl<T> Default for Entries<T> {
    fn default() -> Self {
        Entries { stored: BTreeMap::new(), measured: BTreeMap::new(), remeasure: false }
    }
}

impl<T> Entries<T> {
    fn new(stored: BTreeMap<String, T>, remeasure: bool) -> Self {
        Entries { stored, measured: BTreeMap::new(), remeasure }
    }

    fn get(&self, key: &str) -> Option<&T> {
        self.measured.get(key).or_else(|| self.stored.get(key).filter(|_| !self.remeasure))
    }

    fn insert(&mut self, key: String, cost: T) {
        self.measured.insert(key, cost);
    }

    fn all(self) -> BTreeMap<String, T> {
        let mut all = self.stored;
        all.extend(self.measured);
        all
    }
}

/// The file. Another version of the crate computes in another time, so its costs do not count.
#[derive(Serialize, Deserialize)]
struct CostFile {
    version: String,
    devices: BTreeMap<String, DeviceCost>,
    #[serde(default)]
    crowds: BTreeMap<String, Vec<Crowded>>,
    links: BTreeMap<String, LinkCost>,
}

impl CostCache {
    /// Reads the costs at `path`; without one, costs live as long as the cache. With `remeasure`, what is asked for is
    /// measured again and replaces what the file has. An unusable file of costs is replaced, with a warning; one that holds
    /// anything else is left alone, so nothing is saved.
    pub fn open(path: Option<&Path>, remeasure: bool) -> CostCache {
        let stored = path.and_then(|path| {
            let unusable = |reason: String| {
                tracing::warn!("{}: {reason}; costs are measured and the file is replaced", path.display());
            };
            let text = match existing(path) {
                Ok(text) => text?,
                // The same keeps it from being replaced, which `save` reports.
                Err(_) => return None,
            };
            match serde_json::from_str::<CostFile>(&text) {
                Ok(file) if file.version != env!("CARGO_PKG_VERSION") => {
                    unusable(format!("is of version {}, this is {}", file.version, env!("CARGO_PKG_VERSION")));
                    None
                }
                Ok(file)
                    if !file.devices.values().all(DeviceCost::is_sound)
                        || !file.crowds.values().flatten().flatten().all(|&(_, factor)| is_sound(factor))
                        || !file.links.values().all(LinkCost::is_sound) =>
                {
                    unusable("has times that are none".into());
                    None
                }
                Ok(file) => Some(file),
                Err(error) => {
                    unusable(format!("is no file of costs: {error}"));
                    None
                }
            }
        });
        let (devices, crowds, links) =
            stored.map_or_else(Default::default, |file| (file.devices, file.crowds, file.links));
        CostCache {
            path: path.map(Path::to_path_buf),
            devices: Entries::new(devices, remeasure),
            crowds: Entries::new(crowds, remeasure),
            links: Entries::new(links, remeasure),
        }
    }

    /// Writes the file if anything was measured. A file that cannot be written costs the next plan its time and nothing
    /// else, so it is no error: it is logged as a warning and counted in `failures`.
    pub fn save(self, failures: &WriteFailures) {
        let Some(path) = self.path else { return };
        let Self { devices, crowds, links, .. } = self;
        if devices.measured.is_empty() && crowds.measured.is_empty() && links.measured.is_empty() {
            return;
        }
        let version = env!("CARGO_PKG_VERSION").to_string();
        let file = CostFile { version, devices: devices.all(), crowds: crowds.all(), links: links.all() };
        if let Err(error) = write_atomically(&path, &file) {
            failures.record(1, &error);
            tracing::warn!("{}: costs cannot be kept: {error}", path.display());
        }
    }
}

/// Bytes of a file of costs at most. Thousands of measurements are a megabyte.
const MOST_BYTES: u64 = 64 << 20;

/// The text of a file of costs, whole or damaged; `None` where there is none. An error is a reason not to replace what
/// stands there: it is no regular file, or it holds something else.
fn existing(path: &Path) -> io::Result<Option<String>> {
    let refused = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what));
    let metadata = match path.metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if !metadata.is_file() {
        return refused("is no regular file and is left as it is; give another name");
    }
    let mut text = Vec::new();
    File::open(path)?.take(MOST_BYTES).read_to_end(&mut text)?;
    // Cut off after this or damaged later, it still is a file of costs.
    if !text.is_empty() && !text.starts_with(b"{\n  \"version\": \"") {
        return refused("holds something else and is left as it is; give another name, or remove it");
    }
    Ok(Some(String::from_utf8_lossy(&text).into_owned()))
}

/// Writes beside the file and renames, so that a reader sees the old file or the new one.
fn write_atomically(path: &Path, file: &CostFile) -> io::Result<()> {
    existing(path)?;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}-{:?}.tmp", std::process::id(), std::thread::current().id()));
    let written =
        std::fs::write(&beside, serde_json::to_vec_pretty(file)?).and_then(|()| std::fs::rename(&beside, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(decode: &[(usize, f64)]) -> StepSeconds {
        StepSeconds { decode: decode.to_vec(), prefill: 1.0 }
    }

    fn cost() -> DeviceCost {
        let step = step(&[(1, 0.25), (2, 0.5)]);
        DeviceCost { layers: vec![step.clone(), step.clone()], head: step, step: 0.125, ..DeviceCost::default() }
    }

    /// A cache at `path` that has measured one device and one link, written.
    fn write(path: &Path) -> WriteFailures {
        let mut cache = CostCache::open(Some(path), false);
        cache.devices.insert("device".into(), cost());
        cache.links.insert("link".into(), LinkCost { latency: 0.5, ..LinkCost::default() });
        let failures = WriteFailures::default();
        cache.save(&failures);
        failures
    }

    #[test]
    fn seconds_between_measurements_lie_on_a_line_and_beyond_them_grow_with_the_rows() {
        let step = step(&[(1, 1.0), (4, 4.0), (8, 5.0)]);
        for (rows, seconds) in [(1, 1.0), (2, 2.0), (4, 4.0), (6, 4.5), (8, 5.0), (16, 10.0)] {
            assert_eq!(step.decode(rows), seconds, "{rows} rows");
        }
        assert_eq!(StepSeconds::default().decode(3), 0.0);
        assert_eq!(cost().slowed(2.0).layers[0].decode, [(1, 0.5), (2, 1.0)]);
    }

    #[test]
    fn the_file_gives_back_what_it_was_given_and_nothing_lies_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/costs.json");
        write(&path);
        let cache = CostCache::open(Some(&path), false);
        assert_eq!(cache.devices.get("device"), Some(&cost()));
        assert_eq!(cache.links.get("link").unwrap().latency, 0.5);
        assert_eq!(cache.devices.get("another device"), None);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn measuring_again_replaces_what_was_asked_for_and_keeps_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("costs.json");
        write(&path);
        let again = DeviceCost { step: 0.5, ..cost() };
        let mut cache = CostCache::open(Some(&path), true);
        assert_eq!(cache.devices.get("device"), None);
        cache.devices.insert("device".into(), again.clone());
        assert_eq!(cache.devices.get("device"), Some(&again), "once a run is enough");
        cache.save(&WriteFailures::default());
        let cache = CostCache::open(Some(&path), false);
        assert_eq!(cache.devices.get("device"), Some(&again));
        assert!(cache.links.get("link").is_some());
    }

    #[test]
    fn files_that_are_old_damaged_or_no_files_are_ignored_and_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("costs.json");
        write(&path);
        let good = std::fs::read_to_string(&path).unwrap();
        for (damage, text) in [
            ("cut off", good[..good.len() / 2].to_string()),
            ("another version", good.replace(env!("CARGO_PKG_VERSION"), "0.0.0")),
            ("negative seconds", good.replace("0.25", "-0.25")),
            ("rows that fall", good.replace("2,\n            0.5", "1,\n            0.5")),
            ("no JSON behind the first line", "{\n  \"version\": \"seconds".to_string()),
            ("empty", String::new()),
        ] {
            assert_ne!(text, good, "{damage}");
            std::fs::write(&path, &text).unwrap();
            let cache = CostCache::open(Some(&path), false);
            assert!(cache.devices.get("device").is_none() && cache.links.get("link").is_none(), "{damage}");
            write(&path);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), good, "{damage}");
        }
    }

    #[test]
    fn what_is_no_file_of_costs_is_left_alone_and_counted() {
        let folder = tempfile::tempdir().unwrap();
        let letter = folder.path().join("letter");
        std::fs::write(&letter, "Dear all").unwrap();
        let below_a_file = letter.join("costs.json");
        let mut places = vec![folder.path(), &letter, &below_a_file];
        #[cfg(unix)]
        let pipe = {
            let pipe = folder.path().join("pipe");
            assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
            pipe
        };
        #[cfg(unix)]
        places.push(&pipe);
        for place in places {
            let failures = write(place);
            assert_eq!(failures.count(), 1, "{}", place.display());
            assert!(failures.first().is_some());
        }
        assert_eq!(std::fs::read_to_string(&letter).unwrap(), "Dear all");
        assert_eq!(write(&folder.path().join("costs.json")).count(), 0);
    }

    #[test]
    fn a_thread_has_a_message_soon_and_is_asked_once() {
        let mut cache = CostCache::default();
        let seconds = hand_over(&mut cache).unwrap();
        assert!(seconds > 0.0 && seconds < 0.1, "{seconds}");
        assert_eq!(hand_over(&mut cache).unwrap(), seconds);
    }
}
