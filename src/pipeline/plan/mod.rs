//! Which layers go where: pure functions of bytes and seconds, with nothing of open devices or files in them.
//!
//! With measured costs a [`Problem`] has an exact answer. For each choice of devices, in their order, the contiguous cut
//! with the least sum of stage times is found by dynamic programming over (stages, layers), as in chains-on-chains
//! partitioning (Pinar and Aykanat, J. Parallel Distrib. Comput. 64, 2004; the pipeline planner of PipeDream, arXiv
//! 1806.03377, is of this kind). For throughput the same search runs under a bound on the busiest stage, which is
//! tightened below the best answer so far until nothing is left under it.

mod report;
mod split;
#[cfg(test)]
mod tests;
mod times;

use std::collections::BTreeMap;
use std::ops::Range;

pub use report::in_words;
pub use split::{given_split, split_by_bytes};
use times::Times;

use super::cost::{DeviceCost, LinkCost, prefill_rows};
use super::human_bytes;
use crate::device::DeviceSpec;
use crate::error::{Error, Result};
use crate::model::stage_weights::WeightBytes;
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

/// Micro-batches in flight and rows of each, when `sequences` decode over `stages`: none idle, none with more than its
/// share.
pub fn micro_batches(sequences: usize, stages: usize) -> (usize, usize) {
    let count = sequences.clamp(1, stages.max(1));
    (count, sequences.max(1).div_ceil(count))
}

impl Problem {
    /// The best cut, over all choices of devices, that every device has the bytes for.
    ///
    /// Exact while each memory holds one stage. Where CPU devices make each other slower, the cut over each choice of
    /// devices is the best as if they did not, and the choices are compared as they do. Stages that share the host's memory may first fill all of it each; if
    /// the best cut then exceeds it together, they are planned again with equal shares.
    pub fn plan(&self, objective: Objective) -> Result<Plan> {
        self.check()?;
        let mut best: Option<(f64, Vec<Placement>)> = None;
        for devices in self.device_choices() {
            let bound = best.as_ref().map_or(f64::INFINITY, |(seconds, _)| *seconds);
            let Some((_, cut)) = self.best_cut(&devices, objective, bound) else { continue };
            let seconds = self.round(&cut, self.sequences(objective)).seconds();
            if seconds < bound {
                best = Some((seconds, cut));
            }
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
    pub(super) fn distinct_processors(&self) -> Vec<usize> {
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

    /// Sequences in the rounds that count.
    fn sequences(&self, objective: Objective) -> usize {
        match objective {
            Objective::Latency => 1,
            Objective::Throughput => self.workload.sequences,
        }
    }

    fn best_cut_within(
        &self,
        devices: &[usize],
        budgets: &[u64],
        objective: Objective,
        bound: f64,
    ) -> Option<(f64, Vec<Placement>)> {
        let sequences = self.sequences(objective);
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
        let mut round = self.round_with(cut, sequences, &Times::new(self, &devices, rows));
        self.crowd(cut, &mut round);
        round
    }

    /// Makes stages slower by what they take from each other of the host's memory, as far as they compute at the same time.
    fn crowd(&self, cut: &[Placement], round: &mut Round) {
        const TURNS: usize = 8;
        // What was measured for a processor counts for each device that is the same one.
        let processor = |placement: &Placement| {
            let same = (0..placement.device).find(|&device| self.same_processor(device, placement.device));
            same.unwrap_or(placement.device)
        };
        let cost = |placement: &Placement| &self.devices[processor(placement)].cost;
        let crowd = |&device: &usize| !self.devices[device].cost.crowded.is_empty();
        let others = self.distinct_processors().into_iter().filter(crowd).count().saturating_sub(1);
        if others == 0 || round.micro_batches < 2 {
            return;
        }
        let alone = round.stages.clone();
        let under_way = round.trip - alone.iter().sum::<f64>();
        // Slower stages are beside each other for longer: a few turns settle that.
        for _ in 0..TURNS {
            let uses: Vec<f64> = cut
                .iter()
                .zip(&round.stages)
                .map(|(placement, &seconds)| match cost(placement) {
                    cost if cost.crowded.is_empty() => 0.0,
                    cost => seconds * cost.uses_memory,
                })
                .collect();
            for (stage, placement) in cut.iter().enumerate() {
                // Stages of a full pipeline begin together: when the busiest one has ended.
                let mut beside = uses.clone();
                beside.remove(stage);
                let together: f64 = beside.into_iter().map(|other| other.min(uses[stage])).sum();
                // The factor was measured with all others busy all the time.
                let company = if uses[stage] > 0.0 { (together / (uses[stage] * others as f64)).min(1.0) } else { 0.0 };
                let factor = cost(placement).crowded(round.rows);
                round.stages[stage] = alone[stage] * (1.0 + (factor - 1.0) * company);
            }
            round.trip = under_way + round.stages.iter().sum::<f64>();
        }
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
