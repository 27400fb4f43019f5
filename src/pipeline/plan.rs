//! Which layers go where: pure functions of bytes and seconds, with nothing of open devices or files in them.
//!
//! With measured costs a [`Problem`] has an exact answer. For each choice of devices, in their order, the contiguous cut
//! with the least sum of stage times is found by dynamic programming over (stages, layers), as in chains-on-chains
//! partitioning (Pinar and Aykanat, J. Parallel Distrib. Comput. 64, 2004; the pipeline planner of PipeDream, arXiv
//! 1806.03377, is of this kind). For throughput the same search runs under a bound on the busiest stage, which is
//! tightened below the best answer so far until nothing is left under it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use super::cost::{DeviceCost, LinkCost, prefill_rows};
use super::human_bytes;
use crate::device::DeviceSpec;
use crate::error::{Error, Result};
use crate::model::decoder::WeightBytes;
use crate::weights::WeightType;

/// Devices that a measured plan chooses among at most: each choice of them is tried.
pub const MAX_DEVICES: usize = 12;

/// What a plan is to be best at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Objective {
    /// The shortest time from one token of a single sequence to the next: least sum over stages and links.
    #[default]
    Latency,
    /// The most tokens a second of all sequences together: least maximum over stages and links, as long as the sequences
    /// keep them busy.
    Throughput,
}

impl std::str::FromStr for Objective {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "latency" => Ok(Objective::Latency),
            "throughput" => Ok(Objective::Throughput),
            _ => Err(Error::option("objective", format!("`{name}` is none; write latency or throughput"))),
        }
    }
}

/// What is to be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Positions of a sequence, prompt and generated tokens together.
    pub context: usize,
    /// Sequences at once.
    pub sequences: usize,
}

/// A device as a plan sees it. Those that the host's memory serves share its bytes; those named alike, other than CPUs
/// with threads of their own, are one processor, and a plan uses that for one stage.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanDevice {
    /// Its name.
    pub spec: DeviceSpec,
    /// Seconds of layers and head.
    pub cost: DeviceCost,
    /// Bytes that may be filled.
    pub free_bytes: u64,
    /// Bytes of KV that a position takes in one layer.
    pub kv_bytes_per_layer: u64,
    /// Bytes of activations, attention scores and transfer staging that a stage needs.
    pub working_bytes: u64,
    /// Bytes of one sequence's logits, on the last stage.
    pub logits_bytes: u64,
}

/// All that a plan depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// Bytes of the model's parts.
    pub weights: WeightBytes,
    /// Type of most weights.
    pub weight_type: WeightType,
    /// Devices in the order in which tokens may pass them. A plan may leave some out.
    pub devices: Vec<PlanDevice>,
    /// `links[from][to]`: handing activations over.
    pub links: Vec<Vec<LinkCost>>,
    /// Seconds from the last stage to the first by way of the scheduler.
    pub scheduler: f64,
    /// What is to be served.
    pub workload: Workload,
}

/// Layers on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Index of the device.
    pub device: usize,
    /// Layers of it, at least one.
    pub layers: Range<usize>,
}

/// Bytes that a stage needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlannedBytes {
    /// Weights.
    pub weights: u64,
    /// KV of all sequences at the whole context.
    pub kv: u64,
    /// Activations, attention scores, transfer staging and logits.
    pub working: u64,
}

impl PlannedBytes {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv).saturating_add(self.working)
    }
}

/// How long it takes to give each of a number of sequences its next token.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    /// Sequences.
    pub sequences: usize,
    /// Micro-batches in flight: one a stage, or one a sequence where there are fewer of those.
    pub micro_batches: usize,
    /// Rows of a micro-batch.
    pub rows: usize,
    /// Seconds that each stage is busy with a micro-batch: computing, and copying to the next stage.
    pub stages: Vec<f64>,
    /// Seconds that a micro-batch occupies the link behind each stage but the last.
    pub links: Vec<f64>,
    /// Seconds of a micro-batch through all stages and links and back to the first stage.
    pub trip: f64,
}

impl Round {
    /// Seconds of the round: all micro-batches through the busiest stage or link, but at least the way of one.
    pub fn seconds(&self) -> f64 {
        let busiest = self.stages.iter().chain(&self.links).copied().fold(0.0, f64::max);
        self.trip.max(busiest * self.micro_batches as f64)
    }

    /// Tokens a second of all sequences together.
    pub fn tokens_per_second(&self) -> f64 {
        self.sequences as f64 / self.seconds()
    }

    /// Part of the time that something is busy which takes `seconds` for a micro-batch.
    fn busy_share(&self, seconds: f64) -> f64 {
        seconds * self.micro_batches as f64 / self.seconds()
    }
}

/// What a cut is expected to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// One sequence alone.
    pub one: Round,
    /// All sequences of the workload.
    pub all: Round,
    /// Prompt tokens a second, of a long prompt whose chunks follow each other through the stages.
    pub prompt_tokens_per_second: f64,
}

/// One stage of a [`Plan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedStage {
    /// Where it is.
    pub placement: Placement,
    /// The device's name.
    pub spec: DeviceSpec,
    /// What it needs.
    pub bytes: PlannedBytes,
    /// What the device has.
    pub free_bytes: u64,
}

/// The best cut for a workload. `Display` prints the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What it is best at.
    pub objective: Objective,
    /// What it is for.
    pub workload: Workload,
    /// Its stages, in order.
    pub stages: Vec<PlannedStage>,
    /// What it is expected to do.
    pub prediction: Prediction,
    /// Names of the devices that it leaves out.
    pub left_out: Vec<DeviceSpec>,
    /// What the best cut over all devices is expected to do, where the plan leaves some out and there is such a cut.
    pub with_all_devices: Option<Prediction>,
}

/// A change that makes a problem fit that does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    /// The largest context with as many sequences.
    Context(usize),
    /// The most sequences with as large a context.
    Sequences(usize),
    /// The largest type for the weights.
    Type(WeightType),
    /// Another cut.
    Split(Vec<DeviceSpec>, Vec<usize>),
}

impl fmt::Display for Fit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fit::Context(context) => write!(f, "a context of {context} positions"),
            Fit::Sequences(sequences) => write!(f, "{sequences} sequences at once"),
            Fit::Type(dtype) => write!(f, "the model in {dtype}"),
            Fit::Split(devices, counts) => write!(f, "layers {} on {}", comma(counts), comma(devices)),
        }
    }
}

fn comma<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}

/// Micro-batches in flight and rows of each, when `sequences` decode over `stages`: none idle, none with more than its
/// share.
pub fn micro_batches(sequences: usize, stages: usize) -> (usize, usize) {
    let count = sequences.clamp(1, stages.max(1));
    (count, sequences.max(1).div_ceil(count))
}

impl Problem {
    /// The best cut, over all choices of devices, that every device has the bytes for.
    ///
    /// Exact while each memory holds one stage. Stages that share the host's memory may first fill all of it each; if
    /// the best cut then exceeds it together, they are planned again with equal shares.
    pub fn plan(&self, objective: Objective) -> Result<Plan> {
        self.check()?;
        let mut best: Option<(f64, Vec<Placement>)> = None;
        for devices in self.device_choices() {
            let bound = best.as_ref().map_or(f64::INFINITY, |(seconds, _)| *seconds);
            best = self.best_cut(&devices, objective, bound).or(best);
        }
        let Some((_, cut)) = best else { return Err(Error::DoesNotFit(self.refusal())) };
        let used: Vec<usize> = cut.iter().map(|placement| placement.device).collect();
        let all = self.distinct_processors();
        let with_all_devices = match all == used {
            true => None,
            false => self.best_cut(&all, objective, f64::INFINITY).map(|(_, cut)| self.predict(&cut)),
        };
        let left_out = (0..self.devices.len()).filter(|device| !used.contains(device));
        Ok(Plan {
            objective,
            workload: self.workload,
            prediction: self.predict(&cut),
            left_out: left_out.map(|device| self.devices[device].spec).collect(),
            with_all_devices,
            stages: cut
                .into_iter()
                .map(|placement| PlannedStage {
                    spec: self.devices[placement.device].spec,
                    bytes: self.bytes(&placement),
                    free_bytes: self.devices[placement.device].free_bytes,
                    placement,
                })
                .collect(),
        })
    }

    /// What a cut is expected to do, whether or not it fits.
    pub fn predict(&self, cut: &[Placement]) -> Prediction {
        let rows = prefill_rows(self.workload.context);
        let slowest = cut.iter().enumerate().map(|(index, Placement { device, layers })| {
            let cost = &self.devices[*device].cost;
            let compute = cost.step + cost.layers[layers.clone()].iter().map(|layer| layer.prefill).sum::<f64>();
            let link = cut.get(index + 1).map_or(LinkCost::default(), |next| self.links[*device][next.device]);
            link.wire(rows).max(compute + link.copy(rows))
        });
        Prediction {
            one: self.round(cut, 1),
            all: self.round(cut, self.workload.sequences),
            prompt_tokens_per_second: rows as f64 / slowest.fold(0.0, f64::max),
        }
    }

    /// Bytes that a stage needs.
    pub fn bytes(&self, placement: &Placement) -> PlannedBytes {
        self.bytes_with(placement, self.weights.stage(&placement.layers))
    }

    fn bytes_with(&self, placement: &Placement, weights: u64) -> PlannedBytes {
        let device = &self.devices[placement.device];
        let positions = (self.workload.context as u64).saturating_mul(self.workload.sequences as u64);
        let logits = match placement.layers.end == self.weights.layers.len() {
            true => device.logits_bytes.saturating_mul(self.workload.sequences as u64),
            false => 0,
        };
        PlannedBytes {
            weights,
            kv: device.kv_bytes_per_layer.saturating_mul(placement.layers.len() as u64).saturating_mul(positions),
            working: device.working_bytes.saturating_add(logits),
        }
    }

    /// Changes that make the problem fit, each by itself. None when not even the smallest would.
    pub fn nearest_fits(&self) -> Vec<Fit> {
        let Workload { context, sequences } = self.workload;
        let with = |context, sequences| Problem { workload: Workload { context, sequences }, ..self.clone() };
        let smaller_context = largest(context, |context| with(context, sequences).fits()).map(Fit::Context);
        let fewer_sequences = largest(sequences, |sequences| with(context, sequences).fits()).map(Fit::Sequences);
        let types = [WeightType::F16, WeightType::Q8_0, WeightType::Q6_K, WeightType::Q4_K];
        let smaller_type = types.into_iter().find(|&dtype| {
            bits_per_weight(dtype) < bits_per_weight(self.weight_type) && self.with_weight_type(dtype).fits()
        });
        smaller_context.into_iter().chain(fewer_sequences).chain(smaller_type.map(Fit::Type)).collect()
    }

    /// Some cut that fits, as a [`Fit`].
    pub fn any_cut(&self) -> Option<Fit> {
        let mut choices = self.device_choices().into_iter();
        let (_, cut) = choices.find_map(|devices| self.best_cut(&devices, Objective::Latency, f64::INFINITY))?;
        let (devices, counts) = cut.iter().map(|p| (self.devices[p.device].spec, p.layers.len())).unzip();
        Some(Fit::Split(devices, counts))
    }

    fn fits(&self) -> bool {
        self.any_cut().is_some()
    }

    /// About what the model would be in another type: all of its bytes shrink as one weight's bits do.
    fn with_weight_type(&self, dtype: WeightType) -> Problem {
        let ratio = bits_per_weight(dtype) / bits_per_weight(self.weight_type);
        let scaled = |bytes: u64| (bytes as f64 * ratio).ceil() as u64;
        let WeightBytes { embeddings, ref layers, head, tied } = self.weights;
        let layers = layers.iter().map(|&bytes| scaled(bytes)).collect();
        let weights = WeightBytes { embeddings: scaled(embeddings), layers, head: scaled(head), tied };
        Problem { weights, weight_type: dtype, ..self.clone() }
    }

    fn check(&self) -> Result<()> {
        if self.devices.is_empty() {
            return Err(Error::option("devices", "at least one device is needed"));
        }
        if self.devices.len() > MAX_DEVICES {
            let count = self.devices.len();
            let reason = format!(
                "a measured plan tries each choice of up to {MAX_DEVICES}, {count} are too many; leave some out, or give \
                 the layers of each"
            );
            return Err(Error::option("devices", reason));
        }
        if self.workload.sequences == 0 {
            return Err(Error::option("sequences", "is 0, at least 1 is needed"));
        }
        Ok(())
    }

    /// What a refusal says: the bytes, and what would fit.
    fn refusal(&self) -> String {
        let Workload { context, sequences } = self.workload;
        let positions = (context as u64).saturating_mul(sequences as u64);
        let largest_layer = self.weights.layers.iter().max().copied().unwrap_or(0);
        let mut text = format!("no cut has the bytes for {sequences} sequences of {context} positions\n");
        text += &format!(
            "{:<15}  {:>10}  {:>10}  {:>16}  {:>6}\n",
            "device", "free", "working", "a layer with KV", "layers"
        );
        for device in &self.devices {
            let layer = largest_layer.saturating_add(device.kv_bytes_per_layer.saturating_mul(positions));
            let room = device.free_bytes.saturating_sub(device.working_bytes);
            text += &format!(
                "{:<15}  {:>10}  {:>10}  {:>16}  {:>6}\n",
                device.spec.to_string(),
                human_bytes(device.free_bytes),
                human_bytes(device.working_bytes),
                human_bytes(layer),
                room.checked_div(layer).map_or("all".to_string(), |layers| layers.to_string()),
            );
        }
        text += &format!(
            "all {} layers are needed, on the first stage {} of embeddings, on the last {} of norm and head\n",
            self.weights.layers.len(),
            human_bytes(self.weights.embeddings),
            human_bytes(self.weights.head)
        );
        text + &in_words(&self.nearest_fits())
    }

    /// Every choice of devices, in their order, that uses no processor twice.
    fn device_choices(&self) -> Vec<Vec<usize>> {
        let chosen = |set: usize| (0..self.devices.len()).filter(move |device| set >> device & 1 == 1);
        (1..1usize << self.devices.len().min(MAX_DEVICES))
            .map(|set| chosen(set).collect::<Vec<_>>())
            .filter(|devices| !self.repeats_a_processor(devices))
            .collect()
    }

    fn repeats_a_processor(&self, devices: &[usize]) -> bool {
        devices.iter().enumerate().any(|(i, &a)| devices[..i].iter().any(|&b| self.same_processor(a, b)))
    }

    fn same_processor(&self, a: usize, b: usize) -> bool {
        let spec = self.devices[a].spec;
        spec == self.devices[b].spec && !matches!(spec, DeviceSpec::Cpu { threads: Some(_) })
    }

    /// All devices, without those whose processor came before.
    fn distinct_processors(&self) -> Vec<usize> {
        let first = |&device: &usize| (0..device).all(|before| !self.same_processor(before, device));
        (0..self.devices.len()).filter(first).collect()
    }

    /// The best cut over exactly these devices, and the seconds of its round, if those are fewer than `bound`.
    fn best_cut(&self, devices: &[usize], objective: Objective, bound: f64) -> Option<(f64, Vec<Placement>)> {
        let mut budgets: Vec<u64> = devices.iter().map(|&device| self.devices[device].free_bytes).collect();
        let found = self.best_cut_within(devices, &budgets, objective, bound)?;
        let mut memories: BTreeMap<DeviceSpec, (u64, u64)> = BTreeMap::new();
        for placement in &found.1 {
            let (bytes, stages) = memories.entry(self.devices[placement.device].spec.physical()).or_default();
            *bytes = bytes.saturating_add(self.bytes(placement).total());
            *stages += 1;
        }
        let memory = |device: usize| memories[&self.devices[device].spec.physical()];
        if devices.iter().all(|&device| memory(device).0 <= self.devices[device].free_bytes) {
            return Some(found);
        }
        for (budget, &device) in budgets.iter_mut().zip(devices) {
            *budget /= memory(device).1;
        }
        self.best_cut_within(devices, &budgets, objective, bound)
    }

    fn best_cut_within(
        &self,
        devices: &[usize],
        budgets: &[u64],
        objective: Objective,
        bound: f64,
    ) -> Option<(f64, Vec<Placement>)> {
        let sequences = match objective {
            Objective::Latency => 1,
            Objective::Throughput => self.workload.sequences,
        };
        let (micro_batches, rows) = micro_batches(sequences, devices.len());
        let times = Times::new(self, devices, rows);
        let mut best = None;
        let mut bound = bound;
        // Whatever beats the best so far has every stage below its share of it. Among those the one with the least sum
        // is next; when that one is no better, nothing is.
        while let Some(cut) = self.least_sum(devices, budgets, &times, |busy| busy * (micro_batches as f64) < bound) {
            let seconds = self.round_with(&cut, sequences, &times).seconds();
            if seconds >= bound {
                break;
            }
            bound = seconds;
            best = Some((seconds, cut));
        }
        best
    }

    /// The cut over these devices with the least sum of times, whose stages and links are all `allowed` to be as busy as
    /// they are, within the budgets. `best[stage][end]` is the least sum of the stages before `stage` with the layers
    /// before `end`.
    fn least_sum(
        &self,
        devices: &[usize],
        budgets: &[u64],
        times: &Times,
        allowed: impl Fn(f64) -> bool,
    ) -> Option<Vec<Placement>> {
        let (layers, stages) = (self.weights.layers.len(), devices.len());
        if stages > layers || !times.links.iter().all(|link| allowed(link.wire(times.rows))) {
            return None;
        }
        let mut best = vec![vec![f64::INFINITY; layers + 1]; stages + 1];
        let mut cut = vec![vec![0; layers + 1]; stages + 1];
        best[0][0] = 0.0;
        for stage in 0..stages {
            let device = devices[stage];
            let behind = stages - 1 - stage; // stages behind this one, with a layer each
            let nearest_end = if behind == 0 { layers } else { stage + 1 };
            for end in nearest_end..=layers - behind {
                // A stage with more layers takes more bytes and time, so the first that is too much ends the search.
                for start in (stage..end).rev() {
                    let placement = Placement { device, layers: start..end };
                    let busy = times.busy(stage, &placement.layers);
                    let weights = times.weights(&self.weights, &placement.layers);
                    if !allowed(busy) || self.bytes_with(&placement, weights).total() > budgets[stage] {
                        break;
                    }
                    let sum = best[stage][start] + busy;
                    if sum < best[stage + 1][end] {
                        best[stage + 1][end] = sum;
                        cut[stage + 1][end] = start;
                    }
                }
            }
        }
        if best[stages][layers].is_infinite() {
            return None;
        }
        let mut placements = Vec::with_capacity(stages);
        let mut end = layers;
        for stage in (0..stages).rev() {
            let start = cut[stage + 1][end];
            placements.push(Placement { device: devices[stage], layers: start..end });
            end = start;
        }
        placements.reverse();
        Some(placements)
    }

    fn round(&self, cut: &[Placement], sequences: usize) -> Round {
        let devices: Vec<usize> = cut.iter().map(|placement| placement.device).collect();
        let (_, rows) = micro_batches(sequences, cut.len());
        self.round_with(cut, sequences, &Times::new(self, &devices, rows))
    }

    fn round_with(&self, cut: &[Placement], sequences: usize, times: &Times) -> Round {
        let stages: Vec<f64> =
            cut.iter().enumerate().map(|(stage, placement)| times.busy(stage, &placement.layers)).collect();
        let links: Vec<f64> = times.links.iter().map(|link| link.wire(times.rows)).collect();
        let latencies: f64 = times.links.iter().map(|link| link.latency).sum();
        let trip = stages.iter().sum::<f64>() + links.iter().sum::<f64>() + latencies + self.scheduler;
        let (micro_batches, rows) = micro_batches(sequences, cut.len());
        Round { sequences, micro_batches, rows, stages, links, trip }
    }
}

/// Seconds and bytes of all possible stages on some devices, for micro-batches of `rows` rows.
struct Times {
    rows: usize,
    /// For each stage, seconds of the layers before each.
    before: Vec<Vec<f64>>,
    /// For each stage, seconds besides layers and head.
    step: Vec<f64>,
    /// Seconds of the head behind the last stage's layers.
    head: f64,
    /// Behind each stage but the last.
    links: Vec<LinkCost>,
    /// Bytes of the weights of the layers before each.
    weights_before: Vec<u64>,
}

impl Times {
    fn new(problem: &Problem, devices: &[usize], rows: usize) -> Times {
        let before = |&device: &usize| {
            let mut sum = 0.0;
            let layers = problem.devices[device].cost.layers.iter().map(|layer| {
                sum += layer.decode(rows);
                sum
            });
            [0.0].into_iter().chain(layers).collect()
        };
        let mut bytes = 0u64;
        let weights = problem.weights.layers.iter().map(|&layer| {
            bytes = bytes.saturating_add(layer);
            bytes
        });
        Times {
            rows,
            before: devices.iter().map(before).collect(),
            step: devices.iter().map(|&device| problem.devices[device].cost.step).collect(),
            head: devices.last().map_or(0.0, |&device| problem.devices[device].cost.head.decode(rows)),
            links: devices.windows(2).map(|pair| problem.links[pair[0]][pair[1]]).collect(),
            weights_before: [0].into_iter().chain(weights).collect(),
        }
    }

    /// Seconds that a stage with these layers is busy with a micro-batch.
    fn busy(&self, stage: usize, layers: &Range<usize>) -> f64 {
        let compute = self.step[stage] + (self.before[stage][layers.end] - self.before[stage][layers.start]);
        match self.links.get(stage) {
            Some(link) => compute + link.copy(self.rows),
            None => compute + self.head,
        }
    }

    /// Bytes of the weights of a stage with these layers: [`WeightBytes::stage`] without adding up the layers.
    fn weights(&self, weights: &WeightBytes, layers: &Range<usize>) -> u64 {
        let ends = match (layers.start == 0, layers.end + 1 == self.weights_before.len()) {
            (true, true) if weights.tied => weights.head,
            (true, true) => weights.embeddings.saturating_add(weights.head),
            (true, false) => weights.embeddings,
            (false, true) => weights.head,
            (false, false) => 0,
        };
        (self.weights_before[layers.end] - self.weights_before[layers.start]).saturating_add(ends)
    }
}

/// The largest number below `limit` that fits, where every smaller one does too.
fn largest(limit: usize, fits: impl Fn(usize) -> bool) -> Option<usize> {
    let (mut good, mut bad) = (0, limit);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        match fits(middle) {
            true => good = middle,
            false => bad = middle,
        }
    }
    (good > 0).then_some(good)
}

fn bits_per_weight(dtype: WeightType) -> f64 {
    8.0 * dtype.type_size() as f64 / dtype.block_size() as f64
}

/// What would fit, as a sentence.
pub fn in_words(fits: &[Fit]) -> String {
    match fits {
        [] => "add a device or take a smaller model".to_string(),
        fits => {
            let fits: Vec<String> = fits.iter().map(Fit::to_string).collect();
            format!("what would fit: {}; or add a device", fits.join("; or "))
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Prediction { one, all, prompt_tokens_per_second } = &self.prediction;
        let Workload { context, sequences } = self.workload;
        let several = sequences > 1;
        let ms = |seconds: f64| format!("{:.3} ms", seconds * 1e3);
        let times = |one: f64, all: f64| match several {
            true => format!("{:>11}  {:>11}", ms(one), ms(all)),
            false => format!("{:>11}", ms(one)),
        };
        let rows = if several { format!("  {:>11}", format!("{} rows", all.rows)) } else { String::new() };
        writeln!(
            f,
            "{:<5}  {:<15}  {:<7}  {:>10}  {:>14}  {:>10}  {:>10}  {:>10}  {:>11}{rows}",
            "stage",
            "device",
            "layers",
            "weights",
            format!("KV@{sequences}x{context}"),
            "working",
            "total",
            "free",
            "1 row",
        )?;
        for (index, stage) in self.stages.iter().enumerate() {
            writeln!(
                f,
                "{index:<5}  {:<15}  {:<7}  {:>10}  {:>14}  {:>10}  {:>10}  {:>10}  {}",
                stage.spec.to_string(),
                format!("{}-{}", stage.placement.layers.start, stage.placement.layers.end - 1),
                human_bytes(stage.bytes.weights),
                human_bytes(stage.bytes.kv),
                human_bytes(stage.bytes.working),
                human_bytes(stage.bytes.total()),
                human_bytes(stage.free_bytes),
                times(one.stages[index], all.stages[index]),
            )?;
        }
        writeln!(f, "1 sequence: {:.1} tokens/s, {} a token", one.tokens_per_second(), ms(one.seconds()))?;
        if several {
            writeln!(
                f,
                "{sequences} sequences: {:.1} tokens/s, {} a token of each, {} in flight of {} rows",
                all.tokens_per_second(),
                ms(all.seconds()),
                all.micro_batches,
                all.rows
            )?;
        }
        writeln!(f, "long prompts: {prompt_tokens_per_second:.0} tokens/s")?;
        let round = match self.objective {
            Objective::Latency => one,
            Objective::Throughput => all,
        };
        writeln!(f, "bottleneck: {}", self.bottleneck(round))?;
        if !self.left_out.is_empty() {
            write!(f, "left out: {}", comma(&self.left_out))?;
            let round = |prediction: &Prediction| match self.objective {
                Objective::Latency => prediction.one.tokens_per_second(),
                Objective::Throughput => prediction.all.tokens_per_second(),
            };
            match &self.with_all_devices {
                Some(with_all) => {
                    let (fewer, all) = (round(&self.prediction), round(with_all));
                    writeln!(f, "; fewer devices are faster here: {fewer:.1} tokens/s, with all {all:.1}")?;
                }
                None if self.left_out.iter().all(|spec| self.stages.iter().any(|stage| stage.spec == *spec)) => {
                    writeln!(f, "; two stages on one processor take turns")?;
                }
                None => writeln!(f, "; no cut over all devices fits")?,
            }
        }
        Ok(())
    }
}

impl Plan {
    /// The stage or link that is busiest in a round, and for how much of it; the rest is waiting.
    fn bottleneck(&self, round: &Round) -> String {
        let busiest = |seconds: &[f64]| {
            let indexed = seconds.iter().copied().enumerate();
            indexed.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 0.0))
        };
        let (stage, seconds) = busiest(&round.stages);
        let (link, wire) = busiest(&round.links);
        let latency = round.trip - round.stages.iter().chain(&round.links).sum::<f64>();
        let percent = |seconds: f64| format!("busy {:.0} % of the time", round.busy_share(seconds) * 100.0);
        if latency > seconds.max(wire) {
            format!("the links' latency, {:.3} ms a micro-batch", latency * 1e3)
        } else if wire > seconds {
            format!("the link from stage {link} to {}, {}", link + 1, percent(wire))
        } else {
            format!("stage {stage} ({}), {}", self.stages[stage].spec, percent(seconds))
        }
    }
}

/// Layers `0..layers` cut into runs of the given lengths, one for each device.
pub fn given_split(layers: usize, counts: &[usize], devices: usize) -> Result<Vec<Range<usize>>> {
    let written = counts.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    if counts.len() != devices {
        let parts = counts.len();
        return Err(Error::option("split", format!("{written} has {parts} parts for {devices} devices")));
    }
    if counts.contains(&0) {
        return Err(Error::option("split", format!("{written} leaves a stage without layers; leave out its device")));
    }
    // Checked, since the numbers come from a command line.
    let total = counts.iter().try_fold(0usize, |sum, &count| sum.checked_add(count));
    if total != Some(layers) {
        return Err(Error::option("split", format!("{written} does not add up to the model's {layers} layers")));
    }
    let mut start = 0;
    Ok(counts
        .iter()
        .map(|&count| {
            let range = start..start + count;
            start = range.end;
            range
        })
        .collect())
}

/// The contiguous cut that fills the fullest device least, as a share of its budget. Each stage has at least a layer.
///
/// Exact, by dynamic programming over (stages, layers): `best[stage][end]` is the smallest share for the first stages
/// up to `stage` with the layers up to `end`.
pub fn split_by_bytes(weights: &WeightBytes, kv_per_layer: u64, budgets: &[u64]) -> Result<Vec<Range<usize>>> {
    let (layers, stages) = (weights.layers.len(), budgets.len());
    if stages == 0 {
        return Err(Error::option("devices", "at least one device is needed"));
    }
    if stages > layers {
        return Err(Error::option(
            "devices",
            format!("{stages} devices for {layers} layers: a stage needs at least one layer, leave out some devices"),
        ));
    }
    let mut before = vec![0u64; layers + 1]; // bytes of the layers before each
    for (layer, bytes) in weights.layers.iter().enumerate() {
        before[layer + 1] = before[layer].saturating_add(bytes.saturating_add(kv_per_layer));
    }
    let share = |stage: usize, range: Range<usize>| {
        let mut bytes = (before[range.end] - before[range.start]) as f64;
        if range.start == 0 {
            bytes += weights.embeddings as f64;
        }
        if range.end == layers {
            bytes += weights.head as f64;
        }
        bytes / budgets[stage].max(1) as f64
    };
    let mut best = vec![vec![f64::INFINITY; layers + 1]; stages];
    let mut cut = vec![vec![0; layers + 1]; stages];
    for (end, best) in best[0].iter_mut().enumerate().skip(1) {
        *best = share(0, 0..end);
    }
    for stage in 1..stages {
        for end in stage + 1..=layers {
            for start in stage..end {
                let fullest = best[stage - 1][start].max(share(stage, start..end));
                if fullest < best[stage][end] {
                    best[stage][end] = fullest;
                    cut[stage][end] = start;
                }
            }
        }
    }
    let mut ranges = Vec::with_capacity(stages);
    let mut end = layers;
    for stage in (0..stages).rev() {
        let start = cut[stage][end];
        ranges.push(start..end);
        end = start;
    }
    ranges.reverse();
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};

    use super::super::cost::StepSeconds;
    use super::*;

    fn even(layers: usize) -> WeightBytes {
        WeightBytes { embeddings: 3, layers: vec![10; layers], head: 5, tied: false }
    }

    fn assert_each_layer_once(ranges: &[Range<usize>], layers: usize) {
        let covered: Vec<usize> = ranges.iter().cloned().flatten().collect();
        assert_eq!(covered, (0..layers).collect::<Vec<_>>(), "{ranges:?}");
        assert!(ranges.iter().all(|range| !range.is_empty()), "{ranges:?}");
    }

    #[test]
    fn every_number_of_layers_and_stages_assigns_each_layer_once() {
        for layers in 1..=100 {
            for stages in 1..=8 {
                let budgets: Vec<u64> = (0..stages).map(|s| 1000 + 700 * s as u64).collect();
                match split_by_bytes(&even(layers), 1, &budgets) {
                    Ok(ranges) => {
                        assert_eq!(ranges.len(), stages);
                        assert_each_layer_once(&ranges, layers);
                    }
                    Err(_) => assert!(stages > layers),
                }
            }
        }
    }

    #[test]
    fn a_device_with_twice_the_memory_gets_about_twice_the_layers() {
        let ranges = split_by_bytes(&even(30), 0, &[2000, 1000]).unwrap();
        assert_eq!(ranges, [0..20, 20..30]);
    }

    #[test]
    fn given_splits_are_taken_or_refused_with_the_reason() {
        assert_eq!(given_split(8, &[5, 3], 2).unwrap(), [0..5, 5..8]);
        assert_eq!(given_split(8, &[1, 7], 2).unwrap(), [0..1, 1..8]);
        for (counts, devices, reason) in [
            (&[8, 0][..], 2, "without layers"),
            (&[5, 4], 2, "8 layers"),
            (&[8], 2, "1 parts for 2 devices"),
            (&[usize::MAX, 9], 2, "8 layers"),
        ] {
            let message = given_split(8, counts, devices).unwrap_err().to_string();
            assert!(message.contains(reason) && message.contains("`split`"), "{message}");
        }
    }

    /// Tries every cut.
    fn brute_force(weights: &WeightBytes, kv: u64, budgets: &[u64], stage: usize, start: usize) -> f64 {
        let layers = weights.layers.len();
        let share = |range: Range<usize>| {
            let mut bytes = weights.layers[range.clone()].iter().sum::<u64>() + kv * range.len() as u64;
            bytes += if range.start == 0 { weights.embeddings } else { 0 };
            bytes += if range.end == layers { weights.head } else { 0 };
            bytes as f64 / budgets[stage] as f64
        };
        if stage + 1 == budgets.len() {
            return if start < layers { share(start..layers) } else { f64::INFINITY };
        }
        (start + 1..layers)
            .map(|end| share(start..end).max(brute_force(weights, kv, budgets, stage + 1, end)))
            .fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

        #[test]
        fn no_cut_fills_the_fullest_device_less(
            layers in prop::collection::vec(1u64..1000, 1..9),
            budgets in prop::collection::vec(1u64..10_000, 1..5),
            embeddings in 0u64..3000,
            head in 0u64..3000,
            kv in 0u64..100,
        ) {
            prop_assume!(budgets.len() <= layers.len());
            let weights = WeightBytes { embeddings, layers, head, tied: false };
            let ranges = split_by_bytes(&weights, kv, &budgets).unwrap();
            assert_each_layer_once(&ranges, weights.layers.len());
            let fullest = ranges.iter().zip(&budgets).map(|(range, &budget)| {
                let bytes = weights.stage(range) + kv * range.len() as u64;
                bytes as f64 / budget as f64
            }).fold(0.0, f64::max);
            let best = brute_force(&weights, kv, &budgets, 0, 0);
            prop_assert!((fullest - best).abs() <= 1e-9 * best, "{ranges:?}: {fullest}, best {best}");
        }
    }

    fn seconds(decode: &[(usize, f64)]) -> StepSeconds {
        StepSeconds { decode: decode.to_vec(), prefill: 0.1 }
    }

    /// Devices whose layers all take the same a row, with memory for everything and links that cost nothing.
    fn problem(layers: usize, devices: &[(&str, f64)], sequences: usize) -> Problem {
        let device = |&(name, layer): &(&str, f64)| PlanDevice {
            spec: name.parse().unwrap(),
            cost: DeviceCost {
                layers: vec![seconds(&[(1, layer), (16, 16.0 * layer)]); layers],
                head: seconds(&[(1, layer), (16, 16.0 * layer)]),
                step: 0.0,
            },
            free_bytes: 1 << 40,
            kv_bytes_per_layer: 1,
            working_bytes: 7,
            logits_bytes: 2,
        };
        Problem {
            weights: even(layers),
            weight_type: WeightType::F32,
            devices: devices.iter().map(device).collect(),
            links: vec![vec![LinkCost::default(); devices.len()]; devices.len()],
            scheduler: 0.0,
            workload: Workload { context: 10, sequences },
        }
    }

    fn cut_of(plan: &Plan) -> Vec<(usize, Range<usize>)> {
        plan.stages.iter().map(|stage| (stage.placement.device, stage.placement.layers.clone())).collect()
    }

    #[test]
    fn throughput_balances_unequal_devices_and_latency_takes_the_fastest() {
        let problem = problem(12, &[("cuda:0", 0.001), ("cuda:1", 0.003)], 8);
        let plan = problem.plan(Objective::Throughput).unwrap();
        // 10 layers at 1 against 2 layers and the head, which counts as one, at 3.
        assert_eq!(cut_of(&plan), [(0, 0..10), (1, 10..12)]);
        assert_eq!((plan.prediction.all.micro_batches, plan.prediction.all.rows), (2, 4));
        let plan = problem.plan(Objective::Latency).unwrap();
        assert_eq!(cut_of(&plan), [(0, 0..12)]);
        assert_eq!(plan.left_out, ["cuda:1".parse().unwrap()]);
        assert!((plan.prediction.one.seconds() - 0.013).abs() < 1e-12);
        let with_all = plan.with_all_devices.as_ref().unwrap();
        assert!(with_all.one.seconds() > plan.prediction.one.seconds());
        assert!(plan.to_string().contains("fewer devices are faster here"), "{plan}");
    }

    #[test]
    fn a_slow_link_is_worth_it_only_for_enough_sequences() {
        let mut problem = problem(12, &[("cuda:0", 0.001), ("cuda:1", 0.001)], 1);
        let link = LinkCost { latency: 0.005, copy: 0.0, copy_per_row: 0.0, wire_per_row: 1e-4 };
        problem.links[0][1] = link;
        assert_eq!(problem.plan(Objective::Throughput).unwrap().stages.len(), 1);
        problem.workload.sequences = 32;
        let plan = problem.plan(Objective::Throughput).unwrap();
        assert_eq!(plan.stages.len(), 2);
        // A link so narrow that it is the bottleneck.
        problem.links[0][1].wire_per_row = 0.02;
        assert_eq!(problem.plan(Objective::Throughput).unwrap().stages.len(), 1);
        let cut = [Placement { device: 0, layers: 0..6 }, Placement { device: 1, layers: 6..12 }];
        let round = problem.predict(&cut).all;
        assert!((round.seconds() - 2.0 * 16.0 * 0.02).abs() < 1e-12, "{round:?}");
    }

    #[test]
    fn one_processor_is_one_stage() {
        for (names, stages) in [("cpu", 1), ("cuda:0", 1), ("cpu@threads=1", 2)] {
            let plan = problem(12, &[(names, 0.01), (names, 0.01)], 8).plan(Objective::Throughput).unwrap();
            assert_eq!(plan.stages.len(), stages, "{plan}");
            assert_eq!(plan.to_string().contains("take turns"), stages == 1, "{plan}");
        }
    }

    #[test]
    fn every_number_of_layers_and_stages_is_planned_with_each_layer_once() {
        for layers in 1..=100 {
            for stages in 1..=8 {
                let mut problem = problem(layers, &vec![("cpu@threads=1", 0.01); stages], 64);
                for (index, device) in problem.devices.iter_mut().enumerate() {
                    device.spec = DeviceSpec::Cuda(index);
                }
                // Exactly these devices, whatever fewer would do.
                let devices: Vec<usize> = (0..stages).collect();
                match problem.best_cut(&devices, Objective::Throughput, f64::INFINITY) {
                    None => assert!(stages > layers),
                    Some((_, cut)) => {
                        assert_eq!(cut.len(), stages);
                        let ranges: Vec<_> = cut.into_iter().map(|placement| placement.layers).collect();
                        assert_each_layer_once(&ranges, layers);
                    }
                }
            }
        }
    }

    /// All cuts over some of the devices, in order.
    fn every_cut(devices: usize, layers: usize) -> Vec<Vec<Placement>> {
        fn extend(cut: &[Placement], from: usize, devices: usize, layers: usize, found: &mut Vec<Vec<Placement>>) {
            let start = cut.last().map_or(0, |placement| placement.layers.end);
            if start == layers {
                found.push(cut.to_vec());
                return;
            }
            for device in from..devices {
                for end in start + 1..=layers {
                    let next = Placement { device, layers: start..end };
                    extend(&[cut, &[next]].concat(), device + 1, devices, layers, found);
                }
            }
        }
        let mut found = Vec::new();
        extend(&[], 0, devices, layers, &mut found);
        found
    }

    fn random_problem(rng: &mut ChaCha8Rng) -> Problem {
        let mut below = |n: u64| rng.next_u64() % n;
        let (layers, devices) = (1 + below(7) as usize, 1 + below(4) as usize);
        let mut ms = |most: u64| below(most) as f64 / 1e3;
        let mut times = |most: u64| {
            let one = ms(most);
            StepSeconds { decode: vec![(1, one), (2, one + ms(most)), (8, 2.0 * one + ms(10 * most))], prefill: one }
        };
        let cost: Vec<DeviceCost> = (0..devices)
            .map(|_| DeviceCost { layers: (0..layers).map(|_| times(50)).collect(), head: times(100), step: 0.0 })
            .collect();
        let mut link = || LinkCost { latency: ms(30), copy: ms(5), copy_per_row: ms(3), wire_per_row: ms(20) };
        let links = (0..devices).map(|_| (0..devices).map(|_| link()).collect()).collect();
        let scheduler = ms(5);
        let weights = WeightBytes {
            embeddings: below(100),
            head: 100 + below(100),
            layers: (0..layers).map(|_| 1 + below(100)).collect(),
            tied: below(2) == 0,
        };
        // From far too little to more than all of it.
        let most = 2 * (300 + layers as u64 * 120);
        let device = |(index, cost)| PlanDevice {
            spec: DeviceSpec::Cuda(index),
            cost,
            free_bytes: below(most),
            kv_bytes_per_layer: below(4),
            working_bytes: below(20),
            logits_bytes: below(10),
        };
        let mut devices: Vec<PlanDevice> = cost.into_iter().enumerate().map(device).collect();
        devices.iter_mut().for_each(|device| device.cost.step = below(8) as f64 / 1e3);
        let workload = Workload { context: 1 + below(10) as usize, sequences: 1 + below(9) as usize };
        Problem { weights, weight_type: WeightType::F32, devices, links, scheduler, workload }
    }

    #[test]
    fn ten_thousand_random_problems_are_planned_as_well_as_by_trying_every_cut() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let (mut planned, mut split) = (0, 0);
        for case in 0..10_000 {
            let problem = random_problem(&mut rng);
            let objective = if case % 2 == 0 { Objective::Latency } else { Objective::Throughput };
            let seconds = |prediction: &Prediction| match objective {
                Objective::Latency => prediction.one.seconds(),
                Objective::Throughput => prediction.all.seconds(),
            };
            let fits = |cut: &Vec<Placement>| {
                cut.iter().all(|stage| problem.bytes(stage).total() <= problem.devices[stage.device].free_bytes)
            };
            let cuts = every_cut(problem.devices.len(), problem.weights.layers.len());
            let best = cuts.iter().filter(|cut| fits(cut)).map(|cut| seconds(&problem.predict(cut)));
            let best = best.fold(f64::INFINITY, f64::min);
            match problem.plan(objective) {
                Ok(plan) => {
                    let found = seconds(&plan.prediction);
                    assert!((found - best).abs() <= 1e-9 * best, "case {case}: {found}, best {best}: {plan}");
                    let cut: Vec<Placement> = plan.stages.iter().map(|stage| stage.placement.clone()).collect();
                    assert!(fits(&cut) && problem.predict(&cut) == plan.prediction, "case {case}: {plan}");
                    planned += 1;
                    split += usize::from(plan.stages.len() > 1);
                }
                Err(Error::DoesNotFit(_)) => assert!(best.is_infinite(), "case {case}: {best} was missed"),
                Err(other) => panic!("case {case}: {other}"),
            }
        }
        // The cases are of all sorts.
        assert!((3000..9500).contains(&planned) && split > 1500, "{planned} planned, {split} of them split");
    }

    /// The seconds and bytes of a round, written anew from their definitions.
    #[test]
    fn predictions_are_what_their_definition_says() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for _ in 0..200 {
            let problem = random_problem(&mut rng);
            for cut in every_cut(problem.devices.len(), problem.weights.layers.len()) {
                let sequences = problem.workload.sequences;
                let micro_batches = sequences.min(cut.len());
                let rows = sequences.div_ceil(micro_batches);
                let mut trip = problem.scheduler;
                let mut busiest: f64 = 0.0;
                for (index, stage) in cut.iter().enumerate() {
                    let cost = &problem.devices[stage.device].cost;
                    let layers = &cost.layers[stage.layers.clone()];
                    let mut busy = cost.step + layers.iter().map(|layer| layer.decode(rows)).sum::<f64>();
                    match cut.get(index + 1) {
                        None => busy += cost.head.decode(rows),
                        Some(next) => {
                            let link = problem.links[stage.device][next.device];
                            busy += link.copy + link.copy_per_row * rows as f64;
                            trip += link.latency + link.wire_per_row * rows as f64;
                            busiest = busiest.max(link.wire_per_row * rows as f64);
                        }
                    }
                    trip += busy;
                    busiest = busiest.max(busy);
                }
                let wanted = trip.max(busiest * micro_batches as f64);
                let found = problem.predict(&cut).all.seconds();
                assert!((found - wanted).abs() <= 1e-9 * wanted, "{found} {wanted}");
            }
        }
    }

    #[test]
    fn a_refusal_shows_bytes_and_fits_that_really_plan_and_are_the_largest() {
        // 10 layers of 10 bytes and 10 x 4 of KV each on two devices of which neither holds more than four of them.
        let mut problem = problem(10, &[("cuda:0", 0.01), ("cuda:1", 0.01)], 4);
        for device in &mut problem.devices {
            device.free_bytes = 200;
        }
        let message = match problem.plan(Objective::Latency).unwrap_err() {
            Error::DoesNotFit(message) => message,
            other => panic!("{other}"),
        };
        for part in ["cuda:0", "200 B", "50 B", "4 sequences of 10 positions", "what would fit"] {
            assert!(message.contains(part), "`{part}` is missing: {message}");
        }
        let fits = problem.nearest_fits();
        let workload = |context, sequences| Problem { workload: Workload { context, sequences }, ..problem.clone() };
        let mut kinds = 0;
        for fit in &fits {
            assert!(message.contains(&fit.to_string()), "{fit}: {message}");
            kinds += match fit {
                Fit::Context(context) => {
                    assert!(workload(*context, 4).plan(Objective::Latency).is_ok());
                    assert!(workload(context + 1, 4).plan(Objective::Latency).is_err());
                    1
                }
                Fit::Sequences(sequences) => {
                    assert!(workload(10, *sequences).plan(Objective::Throughput).is_ok());
                    assert!(workload(10, sequences + 1).plan(Objective::Throughput).is_err());
                    10
                }
                other => panic!("{other}: the weights are not what is too much here"),
            };
        }
        assert_eq!(kinds, 11, "{fits:?}");

        // Without KV to speak of, only a smaller type helps; F16 is still too large.
        problem.workload = Workload { context: 1, sequences: 1 };
        problem.weights = WeightBytes { embeddings: 0, layers: vec![100; 10], head: 0, tied: false };
        assert_eq!(problem.nearest_fits(), [Fit::Type(WeightType::Q8_0)]);
        assert!(problem.with_weight_type(WeightType::Q8_0).plan(Objective::Latency).is_ok());
        for device in &mut problem.devices {
            device.free_bytes = 9;
        }
        assert_eq!(problem.nearest_fits(), []);
        assert!(problem.plan(Objective::Latency).unwrap_err().to_string().contains("add a device"));
    }

    #[test]
    fn stages_in_the_hosts_memory_share_its_bytes() {
        let mut problem = problem(10, &[("cpu@threads=1", 0.01), ("cpu@threads=1", 0.03)], 8);
        let all: u64 = {
            let cut = [Placement { device: 0, layers: 0..5 }, Placement { device: 1, layers: 5..10 }];
            cut.iter().map(|placement| problem.bytes(placement).total()).sum()
        };
        // Room for all of it together: each may take more than half.
        problem.devices.iter_mut().for_each(|device| device.free_bytes = all);
        let plan = problem.plan(Objective::Throughput).unwrap();
        assert_eq!(plan.stages.len(), 2);
        assert!(plan.stages[0].bytes.total() > all / 2, "{plan}");
        // One byte less, and two stages do not fit, though each of them would.
        problem.devices.iter_mut().for_each(|device| device.free_bytes = all - 1);
        assert_eq!(problem.plan(Objective::Throughput).unwrap().stages.len(), 1);
    }

    #[test]
    fn what_cannot_be_planned_names_the_option() {
        let none = Problem { devices: Vec::new(), ..problem(4, &[("cpu", 0.1)], 1) };
        let many = problem(40, &vec![("cpu@threads=1", 0.1); MAX_DEVICES + 1], 1);
        for (problem, option) in
            [(none, "`devices`"), (many, "`devices`"), (problem(4, &[("cpu", 0.1)], 0), "`sequences`")]
        {
            let message = problem.plan(Objective::Latency).unwrap_err().to_string();
            assert!(message.contains(option), "{message}");
        }
    }
}
