//! What was measured, as text and as JSON.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write;
use std::time::Duration;

use anyhow::Result;
use candle_pipeline::device::read_bandwidth;
use candle_pipeline::instrument::ModelFacts;
use candle_pipeline::pipeline::human_bytes;
use candle_pipeline::{DeviceSpec, HeterogeneousPipeline, HeterogeneousPipelineExecutor, StageStats, WarmupReport};
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::Arguments;
use crate::baseline::{Identity, Quantities, median};
use crate::common::Flags;
use crate::events::DecodeAccount;
use crate::phases::{Batch, Case, Run, Started, Sustained, WarmupEffect, us};

/// Samples from which on a 99th percentile is more than the maximum under another name.
pub const MEANINGFUL_P99: usize = 100;

/// Cores that others may use before the report says so.
pub const DISTURBED: f64 = 0.1;

/// A distribution of times, in microseconds.
pub struct Latencies(Histogram<u64>);

impl Latencies {
    /// Of these times; what is above an hour counts as an hour.
    pub fn of(times: impl IntoIterator<Item = Duration>) -> Latencies {
        const HOUR: u64 = 3_600_000_000;
        let mut histogram = Histogram::new_with_bounds(1, HOUR, 3).expect("the bounds are constants");
        times.into_iter().for_each(|time| histogram.saturating_record(time.as_micros() as u64));
        Latencies(histogram)
    }

    /// The time that a share `quantile` of the samples does not exceed, if there are samples beyond it.
    pub fn at(&self, quantile: f64) -> Option<u64> {
        let needed = (1.0 / (1.0 - quantile)).round() as u64;
        (self.0.len() >= needed).then(|| self.0.value_at_quantile(quantile))
    }

    /// How often the median fits in a second; 0 without samples.
    fn median_rate(&self) -> f64 {
        if self.0.is_empty() { 0.0 } else { 1e6 / self.0.value_at_quantile(0.50) as f64 }
    }

    /// How often the mean fits in a second.
    fn mean_rate(&self) -> Option<f64> {
        (!self.0.is_empty()).then(|| 1e6 / self.0.mean().max(1.0))
    }

    fn json(&self) -> Value {
        json!({
            "samples": self.0.len(),
            "mean_us": self.0.mean(),
            "p50_us": self.0.value_at_quantile(0.50),
            "p95_us": self.at(0.95),
            "p99_us": self.at(0.99),
            "max_us": self.0.max(),
        })
    }

    fn row(&self) -> String {
        let ms = |us: Option<u64>| us.map_or("-".to_string(), |us| format!("{:.3}", us as f64 / 1e3));
        let some = |us: u64| (!self.0.is_empty()).then_some(us);
        let (mean, p50, max) = (ms(some(self.0.mean() as u64)), ms(self.at(0.50)), ms(some(self.0.max())));
        let samples = self.0.len();
        format!("{samples:>8} {mean:>9} {p50:>9} {:>9} {:>9} {max:>9}", ms(self.at(0.95)), ms(self.at(0.99)))
    }
}

impl Case {
    /// Times to the first token.
    pub fn ttft(&self) -> Latencies {
        Latencies::of(self.runs.iter().map(|run| run.ttft))
    }

    /// Times between tokens, of all runs.
    pub fn itl(&self) -> Latencies {
        Latencies::of(self.runs.iter().flat_map(|run| run.itl.iter().copied()))
    }

    fn of_runs(&self, value: impl Fn(&Run) -> f64) -> Vec<f64> {
        self.runs.iter().map(value).collect()
    }

    /// Tokens a second of each run, from its submission to its last token.
    pub fn rates(&self) -> Vec<f64> {
        self.of_runs(|run| run.tokens() as f64 / run.total.as_secs_f64().max(1e-9))
    }

    /// Prompt tokens a second while the prompt was computed: the median of the runs.
    fn prefill_rate(&self) -> f64 {
        median(&self.of_runs(|run| run.input as f64 / run.first.prefill.as_secs_f64().max(1e-9)))
    }

    /// The run with the median time to the first token.
    pub fn middle(&self) -> Option<&Run> {
        let mut runs: Vec<&Run> = self.runs.iter().collect();
        runs.sort_by_key(|run| run.ttft);
        runs.get(runs.len() / 2).copied()
    }

    fn json(&self) -> Value {
        json!({
            "input_tokens": self.input,
            "output_tokens": self.output,
            "runs": self.runs.len(),
            "total_us": Latencies::of(self.runs.iter().map(|run| run.total)).json(),
            "tokens_per_second": median(&self.rates()),
            "prefill_tokens_per_second": self.prefill_rate(),
            "ttft": self.ttft().json(),
            "queue": Latencies::of(self.runs.iter().map(|run| run.first.queue)).json(),
            "prefill": Latencies::of(self.runs.iter().map(|run| run.first.prefill)).json(),
            "first_sample": Latencies::of(self.runs.iter().map(|run| run.first.sample)).json(),
            "itl": self.itl().json(),
        })
    }

    /// One line of the tables of cases.
    fn row(&self) -> String {
        let ms = |us: f64| format!("{:.3}", us / 1e3);
        format!(
            "{:>5} {:>5} {:>5} {:>10} {:>9} {:>9.1} {}",
            self.input,
            self.output,
            self.runs.len(),
            ms(median(&self.of_runs(|run| us(run.total)))),
            ms(median(&self.of_runs(|run| us(run.ttft)))),
            median(&self.rates()),
            self.itl().row()
        )
    }

    /// The way to the first token, of one run: medians of the parts would not add up.
    fn first_row(&self) -> String {
        let Run { ttft, first, .. } = self.middle().cloned().unwrap_or_default();
        let ms = |time: Duration| us(time) / 1e3;
        format!(
            "{:>5} {:>9.3} {:>9.3} {:>9.3} {:>12.3} {:>14.1}",
            self.input,
            ms(ttft),
            ms(first.queue),
            ms(first.prefill),
            ms(first.sample),
            self.prefill_rate()
        )
    }
}

const ROWS: &str =
    "   in   out  runs   total ms   TTFT ms  tokens/s  ITL:  n mean, ms       P50       P95       P99       max";
const FIRST_ROWS: &str =
    "   in      TTFT     queue   prefill first sample  prefill tok/s   (ms of the run with the median TTFT)";
const LATENCY_ROWS: &str = "          n  mean, ms       P50       P95       P99       max";

/// All that was measured.
pub struct Profile {
    /// What was measured where.
    pub identity: Identity,
    /// Names of the stages' devices.
    pub devices: Vec<DeviceSpec>,
    load: Duration,
    warmed: WarmupReport,
    step_bytes: Vec<u64>,
    /// Bytes a second of a plain read.
    read: Reads,
    /// Cores that something else kept busy meanwhile, where the system tells.
    pub others: Option<f64>,
    pub warmup_effect: Option<WarmupEffect>,
    pub tokens: Vec<Case>,
    pub input: Vec<Case>,
    pub sustained: Option<Sustained>,
    pub batch: Option<Batch>,
}

/// What must be equal for times to be comparable.
pub fn identity(arguments: &Arguments, planned: &HeterogeneousPipeline) -> Identity {
    let flags = &arguments.flags;
    let config = planned.config();
    let stages: Vec<String> =
        planned.stages().iter().map(|stage| format!("{} {:?}", stage.device, stage.layers)).collect();
    let mut machine: Vec<String> =
        planned.stages().iter().map(|stage| candle_pipeline::device::hardware_name(stage.device)).collect();
    machine.dedup();
    let bytes: u64 = planned.stages().iter().map(|stage| stage.weight_bytes).sum();
    // The name that it has wherever it lies.
    let name =
        std::path::Path::new(&flags.model).file_name().map_or(flags.model.clone().into(), |name| name.to_owned());
    let (layers, width) = (config.num_hidden_layers, config.hidden_size);
    let prompt = match (&flags.prompt_file, flags.token_ids.is_empty(), flags.prompt.is_empty()) {
        (Some(file), ..) => file.path.display().to_string(),
        (None, false, _) => flags.token_ids.join("; "),
        (None, true, false) => format!("{:?}", flags.prompt),
        (None, true, true) => "the default prompt".into(),
    };
    let sampling = flags.sampling.describe();
    let chat = if flags.chat { " as a chat" } else { "" };
    let request = format!("{prompt}{chat}, {} tokens, {sampling}", arguments.tokens());
    let optional = |value: Option<String>| value.unwrap_or_else(|| "default".into());
    [
        ("model", name.to_string_lossy().into_owned()),
        ("weights", format!("{} of {layers} layers, {width} wide, {bytes} bytes", config.architecture)),
        ("machine", machine.join(" + ")),
        ("stages", stages.join(", ")),
        ("context", planned.context_length().to_string()),
        ("kv type", flags.kv_type.to_string()),
        ("isa", optional(flags.isa.map(|isa| format!("{isa:?}")))),
        ("link", optional(flags.link.map(|link| format!("{link:?}")))),
        ("wire type", optional(flags.wire_type.map(|wire| format!("{wire:?}")))),
        ("build", if cfg!(debug_assertions) { "debug" } else { "release" }.to_string()),
        ("request", request),
        ("batch", arguments.batch.to_string()),
        ("watched by", watched_by(flags)),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_string(), value))
    .collect()
}

/// What listens beside the profile itself, which takes its time too.
fn watched_by(flags: &Flags) -> String {
    let metrics = std::env::var("METRICS_LOG_ENABLED").ok();
    let listeners = [
        ("session log", flags.logs.session_log.as_ref().map(|_| flags.logs.session_log_level.to_string())),
        ("Chrome trace", flags.logs.chrome_trace.as_ref().map(|_| format!("{} ms", flags.logs.chrome_trace_phases))),
        ("metrics log", metrics.filter(|on| !on.is_empty())),
    ];
    let on: Vec<String> = listeners.into_iter().filter_map(|(name, how)| Some(format!("{name} {}", how?))).collect();
    if on.is_empty() { "nobody else".into() } else { on.join(", ") }
}

/// Bytes a second that devices read.
pub type Reads = BTreeMap<DeviceSpec, f64>;

/// What a plain read reaches on each stage's device.
pub fn read_bandwidths(planned: &HeterogeneousPipeline) -> Result<Reads> {
    let mut reads = Reads::new();
    for device in planned.devices() {
        if let Entry::Vacant(read) = reads.entry(device.spec) {
            read.insert(read_bandwidth(device)?);
        }
    }
    Ok(reads)
}

impl Profile {
    /// Of a model that is loaded and warm.
    pub fn new(
        identity: Identity,
        executor: &HeterogeneousPipelineExecutor,
        warmed: WarmupReport,
        facts: &ModelFacts,
        read: Reads,
    ) -> Profile {
        Profile {
            identity,
            devices: executor.pipeline().stages().iter().map(|stage| stage.device).collect(),
            load: executor.load_time(),
            warmed,
            step_bytes: facts.stages.iter().map(|stage| stage.step_bytes).collect(),
            read,
            others: None,
            warmup_effect: None,
            tokens: Vec::new(),
            input: Vec::new(),
            sustained: None,
            batch: None,
        }
    }

    /// Bytes a second of a plain read on the first stage's device.
    pub fn read_bandwidth(&self) -> Option<f64> {
        self.read_of(*self.devices.first()?)
    }

    fn read_of(&self, device: DeviceSpec) -> Option<f64> {
        self.read.get(&device).copied()
    }

    /// How near the stages' decode steps are to a plain read of what they must read: the time that such a read would
    /// have taken over the time they computed.
    fn bandwidth_share(&self, decode: &[DecodeAccount]) -> Option<f64> {
        let (mut needed, mut taken) = (0.0, 0.0);
        for (device, decode) in self.devices.iter().zip(decode) {
            if let Some(read) = self.read_of(*device) {
                needed += decode.bytes as f64 / read;
                taken += decode.compute.as_secs_f64();
            }
        }
        (taken > 0.0).then(|| needed / taken)
    }

    /// Times of each run by what they are of, for comparisons.
    pub fn quantities(&self) -> Quantities {
        let mut all = Quantities::new();
        if let Some(effect) = &self.warmup_effect {
            let first = |started: &[Started]| started.iter().filter_map(|one| one.ttft_us.first().copied()).collect();
            all.insert("warmup.cold_ttft".into(), first(&effect.cold));
            all.insert("warmup.warm_ttft".into(), first(&effect.warm));
        }
        for case in &self.tokens {
            all.insert(format!("tokens.{}.total", case.output), case.of_runs(|run| us(run.total)));
        }
        for case in &self.input {
            all.insert(format!("input.{}.ttft", case.input), case.of_runs(|run| us(run.ttft)));
        }
        if let Some(Sustained { case, .. }) = &self.sustained {
            all.insert("sustained.ttft".into(), case.of_runs(|run| us(run.ttft)));
            let mean = |run: &Run| us(run.itl.iter().sum()) / run.itl.len().max(1) as f64;
            if case.output > 1 {
                all.insert("sustained.itl".into(), case.of_runs(mean));
            }
        }
        if let Some(batch) = &self.batch {
            let totals = |totals: &[Duration]| totals.iter().copied().map(us).collect();
            all.insert(format!("batch.{}.together", batch.sequences), totals(&batch.together_totals));
            all.insert(format!("batch.{}.alone", batch.sequences), totals(&batch.alone_totals));
        }
        all
    }

    /// One object for machines. What stands at the top level is of the sustained phase, and absent without it.
    pub fn json(&self, arguments: &Arguments, executor: &HeterogeneousPipelineExecutor) -> Value {
        let mut json = json!({
            "model": arguments.flags.model,
            "stages": crate::common::stages_json(executor),
            "identity": self.identity,
            "load_us": self.load.as_micros() as u64,
            "warmup_us": self.warmed.duration.as_micros() as u64,
            "read_bandwidth": self.read_bandwidth(),
            "others_cores": self.others,
            "quantities": self.quantities(),
        });
        if let Some(Sustained { case, total, decode, stats, .. }) = &self.sustained {
            let (ttft, itl) = (case.ttft(), case.itl());
            let output: usize = case.runs.iter().map(Run::tokens).sum();
            let input: usize = case.runs.iter().map(|run| run.input).sum();
            let top = json!({
                "runs": case.runs.len(),
                "input_tokens": input,
                "output_tokens": output,
                "total_us": total.as_micros() as u64,
                "tokens_per_second": output as f64 / total.as_secs_f64(),
                "prefill_tokens_per_second": input as f64 / case.runs.len() as f64 * ttft.median_rate(),
                "decode_tokens_per_second": itl.median_rate(),
                "ttft": ttft.json(),
                "itl": itl.json(),
                "bandwidth_share": self.bandwidth_share(decode),
                "decode_steps": self.stage_rows(decode).map(|row| row.json()).collect::<Vec<_>>(),
                "busy_shares": stats.iter().map(StageStats::busy_share).collect::<Vec<_>>(),
            });
            merge(&mut json, top);
        }
        let mut phases = json!({});
        if let Some(effect) = &self.warmup_effect {
            phases["warmup"] = json!({ "cold": effect.cold, "warm": effect.warm });
        }
        let cases = |cases: &[Case]| cases.iter().map(Case::json).collect::<Vec<_>>();
        for (name, measured) in [("tokens", &self.tokens), ("input", &self.input)] {
            if !measured.is_empty() {
                phases[name] = cases(measured).into();
            }
        }
        if let Some(Sustained { case, .. }) = &self.sustained {
            phases["sustained"] = case.json();
            phases["sustained"]["rates"] = case.rates().into();
        }
        if let Some(batch) = &self.batch {
            phases["batch"] = batch.together.json();
            merge(
                &mut phases["batch"],
                json!({
                    "sequences": batch.sequences,
                    "runs": batch.together_totals.len(),
                    "together_tokens_per_second": batch.rate(&batch.together_totals),
                    "alone_tokens_per_second": batch.rate(&batch.alone_totals),
                    "gain": batch.gain(),
                    "busy_shares": batch.stats.iter().map(StageStats::busy_share).collect::<Vec<_>>(),
                }),
            );
        }
        json["phases"] = phases;
        json
    }

    fn stage_rows<'a>(&'a self, decode: &'a [DecodeAccount]) -> impl Iterator<Item = StageRow<'a>> {
        let stages = self.devices.iter().zip(decode).zip(&self.step_bytes);
        stages.map(|((&device, decode), &step_bytes)| StageRow {
            device,
            decode,
            step_bytes,
            read: self.read_of(device),
        })
    }

    /// Tables of all phases and the summary.
    pub fn text(&self) -> String {
        let mut text = boxed("Pipeline performance profile");
        for (name, value) in &self.identity {
            let _ = writeln!(text, "{name:<10} {value}");
        }
        let _ = writeln!(text, "ready in {:.2?}, warmup {:.1?}", self.load, self.warmed.duration);
        if let Some(effect) = &self.warmup_effect {
            text += "\n=== Warmup effect ===\n";
            text += &effect.text();
        }
        if !self.tokens.is_empty() {
            let _ = writeln!(text, "\n=== Generated tokens ===\n{ROWS}");
            self.tokens.iter().for_each(|case| text += &(case.row() + "\n"));
        }
        if !self.input.is_empty() {
            let _ = writeln!(text, "\n=== Prompt length ===\n{ROWS}");
            self.input.iter().for_each(|case| text += &(case.row() + "\n"));
            text += &format!("{FIRST_ROWS}\n");
            self.input.iter().for_each(|case| text += &(case.first_row() + "\n"));
        }
        if let Some(sustained) = &self.sustained {
            text += &self.sustained_text(sustained);
        }
        if let Some(batch) = &self.batch {
            text += &batch.text();
        }
        text += "\nA dash: too few samples for this percentile (P95 needs 20, P99 100).\n\n";
        text + &self.summary() + &self.disturbed()
    }

    /// What to think of the figures if the machine was not quiet.
    pub fn disturbed(&self) -> String {
        match self.others.filter(|cores| *cores >= DISTURBED) {
            Some(cores) => format!("others kept {cores:.1} cores busy meanwhile: do not trust these times\n"),
            None => String::new(),
        }
    }

    fn sustained_text(&self, sustained: &Sustained) -> String {
        let Sustained { case, total, decode, stats, .. } = sustained;
        let output: usize = case.runs.iter().map(Run::tokens).sum();
        let mut text = String::from("\n=== Sustained ===\n");
        let _ = writeln!(
            text,
            "{} runs of {} tokens in, {} out: {output} tokens in {total:.2?}",
            case.runs.len(),
            case.input,
            case.output
        );
        let _ = writeln!(text, "     {LATENCY_ROWS}\nTTFT  {}\nITL   {}", case.ttft().row(), case.itl().row());
        let _ = writeln!(text, "{FIRST_ROWS}\n{}", case.first_row());
        let rates: Vec<String> = case.rates().iter().map(|rate| format!("{rate:.1}")).collect();
        let _ = writeln!(text, "tokens/s of each run: {}", rates.join(" "));
        let decode_rate = case.itl().mean_rate().map_or("no".into(), |rate| format!("{rate:.1}"));
        let rate = output as f64 / total.as_secs_f64();
        let _ = writeln!(text, "{rate:.1} tokens/s over all, {decode_rate} tokens/s in decode");
        text += "stage  device             busy  per token, us: compute    wait    copy   queue  MB/step    GB/s  of read\n";
        for (index, (row, stats)) in self.stage_rows(decode).zip(stats).enumerate() {
            let _ = writeln!(text, "{index:<5}  {}", row.text(stats.busy_share()));
        }
        text + &self.bandwidth_text(decode)
    }

    fn bandwidth_text(&self, decode: &[DecodeAccount]) -> String {
        let (Some(share), Some(read)) = (self.bandwidth_share(decode), self.read_bandwidth()) else {
            return String::new();
        };
        let read = read / 1e9;
        format!("a plain read reaches {read:.1} GB/s: decode runs at {:.0} % of it{}\n", 100.0 * share, cached(share))
    }

    /// The box and what it all comes to.
    fn summary(&self) -> String {
        let mut text = boxed("Performance summary");
        if let Some(effect) = &self.warmup_effect {
            text += &effect.summary();
        }
        let singles = self.tokens.iter().chain(&self.input).chain(self.sustained.iter().map(|s| &s.case));
        let best = singles.map(|case| (median(&case.rates()), case)).max_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((rate, case)) = best {
            let _ = writeln!(
                text,
                "Peak throughput, one sequence: {rate:.1} tokens/s ({} in, {} out)",
                case.input, case.output
            );
        }
        if let Some(Sustained { case, decode, stats, .. }) = &self.sustained {
            let rates = case.rates();
            let (least, most) =
                (rates.iter().copied().fold(f64::MAX, f64::min), rates.iter().copied().fold(0.0, f64::max));
            let _ = writeln!(
                text,
                "Sustained throughput ({} runs): {:.1} tokens/s, from {least:.1} to {most:.1}",
                rates.len(),
                median(&rates)
            );
            let itl = case.itl();
            if let Some(p50) = itl.at(0.50) {
                let ms = |us: u64| format!("{:.3} ms", us as f64 / 1e3);
                let p99 = itl.at(0.99).map_or("unknown from so few samples".into(), ms);
                let _ = writeln!(text, "Inter-token latency: P50 {}, P99 {p99}", ms(p50));
            }
            let busy: Vec<String> = stats.iter().map(|stats| format!("{:.0} %", 100.0 * stats.busy_share())).collect();
            let _ = writeln!(text, "Stages busy, one sequence: {}", busy.join(", "));
            if let Some(share) = self.bandwidth_share(decode) {
                let _ = writeln!(text, "Share of the memory's read bandwidth: {:.0} %{}", 100.0 * share, cached(share));
            }
        }
        if let Some(batch) = &self.batch {
            let _ = writeln!(
                text,
                "Batch throughput ({} sequences): {:.1} tokens/s, {:.2} times one after another",
                batch.sequences,
                batch.rate(&batch.together_totals),
                batch.gain()
            );
        }
        text
    }
}

/// One stage in decode steps.
struct StageRow<'a> {
    device: DeviceSpec,
    decode: &'a DecodeAccount,
    step_bytes: u64,
    read: Option<f64>,
}

impl StageRow<'_> {
    /// Microseconds of a token.
    fn per_token(&self, time: Duration) -> f64 {
        us(time) / self.decode.rows.max(1) as f64
    }

    fn json(&self) -> Value {
        let decode = self.decode;
        json!({
            "device": self.device.to_string(),
            "steps": decode.steps,
            "tokens": decode.rows,
            "compute_us_per_token": self.per_token(decode.compute),
            "wait_us_per_token": self.per_token(decode.wait),
            "copy_us_per_token": self.per_token(decode.copy),
            "queue_us_per_token": self.per_token(decode.queued),
            "step_bytes": self.step_bytes,
            "bytes_read": decode.bytes,
            "bytes_per_second": decode.rate(),
            "read_bandwidth": self.read,
        })
    }

    fn text(&self, busy: f64) -> String {
        let decode = self.decode;
        format!(
            "{:<17} {:>4.0}%  {:>21.1} {:>7.1} {:>7.1} {:>7.1} {:>8.1} {:>7.1} {:>8}",
            self.device.to_string(),
            100.0 * busy,
            self.per_token(decode.compute),
            self.per_token(decode.wait),
            self.per_token(decode.copy),
            self.per_token(decode.queued),
            decode.bytes as f64 / decode.steps.max(1) as f64 / 1e6,
            decode.rate() / 1e9,
            self.read.map_or("-".to_string(), |read| format!("{:.0}%", 100.0 * decode.rate() / read))
        )
    }
}

impl Batch {
    /// Tokens a second over all sequences: the median of the runs.
    fn rate(&self, totals: &[Duration]) -> f64 {
        let tokens = (self.sequences * self.together.output) as f64;
        tokens / (median(&totals.iter().copied().map(us).collect::<Vec<_>>()) / 1e6).max(1e-9)
    }

    /// How many times faster at once than one after another: the ratio of medians.
    pub fn gain(&self) -> f64 {
        self.rate(&self.together_totals) / self.rate(&self.alone_totals)
    }

    fn text(&self) -> String {
        let mut text = String::from("\n=== Batch ===\n");
        let (runs, sequences) = (self.together_totals.len(), self.sequences);
        let _ = writeln!(
            text,
            "{runs} runs of {sequences} sequences of {} tokens in, {} out",
            self.together.input, self.together.output
        );
        let _ = writeln!(text, "at once            {:>9.1} tokens/s", self.rate(&self.together_totals));
        let _ = writeln!(text, "one after another  {:>9.1} tokens/s", self.rate(&self.alone_totals));
        let _ = writeln!(text, "     {LATENCY_ROWS}   (at once)\nTTFT  {}", self.together.ttft().row());
        let _ = writeln!(text, "ITL   {}", self.together.itl().row());
        let busy: Vec<String> = self.stats.iter().map(|stats| format!("{:.0} %", 100.0 * stats.busy_share())).collect();
        let _ = writeln!(text, "stages busy: {}", busy.join(", "));
        text
    }
}

/// Median, least and greatest.
fn spread(values: &[f64]) -> (f64, f64, f64) {
    let least = values.iter().copied().fold(f64::MAX, f64::min);
    (median(values), least, values.iter().copied().fold(0.0, f64::max))
}

impl WarmupEffect {
    fn nth_ttft(started: &[Started], request: usize) -> Vec<f64> {
        started.iter().filter_map(|one| one.ttft_us.get(request).copied()).collect()
    }

    fn text(&self) -> String {
        let mut text =
            String::from("                     processes   first TTFT ms (least - most)      second TTFT ms\n");
        for (name, started) in [("cold", &self.cold), ("after a warmup", &self.warm)] {
            let (first, least, most) = spread(&Self::nth_ttft(started, 0));
            let (second, ..) = spread(&Self::nth_ttft(started, 1));
            let range = format!("{:.3} ({:.3} - {:.3})", first / 1e3, least / 1e3, most / 1e3);
            let _ = writeln!(text, "{name:<20} {:>10}   {range:>29} {:>19.3}", started.len(), second / 1e3);
        }
        let warmups: Vec<f64> = self.warm.iter().filter_map(|one| one.warmup_us).collect();
        let loads: Vec<f64> = self.cold.iter().chain(&self.warm).map(|one| one.load_us).collect();
        let _ = writeln!(
            text,
            "warmup itself {:.3} ms, loading {:.1} ms (medians)",
            median(&warmups) / 1e3,
            median(&loads) / 1e3
        );
        text + &self.pages()
    }

    /// Whether the model's files were in the page cache.
    fn pages(&self) -> String {
        let all = self.cold.iter().chain(&self.warm);
        let read: Option<Vec<u64>> = all.map(|one| one.disk_bytes).collect();
        match read.and_then(|read| read.into_iter().max()) {
            None => "whether file pages were cached is not known on this system\n".into(),
            Some(0) => "file pages were cached: no process read from a disk, so `cold` is not a cold disk\n".into(),
            Some(most) => {
                format!("file pages were not all cached: a process read {} from a disk\n", human_bytes(most))
            }
        }
    }

    fn summary(&self) -> String {
        let (cold, least_cold, most_cold) = spread(&Self::nth_ttft(&self.cold, 0));
        let (warm, least_warm, most_warm) = spread(&Self::nth_ttft(&self.warm, 0));
        let apart = least_cold > most_warm || least_warm > most_cold;
        let note = if apart { "" } else { ", within what the processes differ by" };
        let (direction, difference) = match cold >= warm {
            true => ("faster", cold - warm),
            false => ("slower", warm - cold),
        };
        format!(
            "Warmup benefit:\n  Cold TTFT: {:.3} ms\n  Warm TTFT: {:.3} ms\n  Difference: {:.3} ms ({:.1} % {direction}{note})\n",
            cold / 1e3,
            warm / 1e3,
            difference / 1e3,
            100.0 * difference / cold.max(1e-9),
        )
    }
}

/// What explains a share above 1.
fn cached(share: f64) -> &'static str {
    if share > 1.0 { " (the weights stay in the processor's caches)" } else { "" }
}

/// A title in a box.
fn boxed(title: &str) -> String {
    const WIDTH: usize = 59;
    let line = "═".repeat(WIDTH);
    format!("╔{line}╗\n║ {title:<width$}║\n╚{line}╝\n", width = WIDTH - 1)
}

fn merge(json: &mut Value, more: Value) {
    if let (Some(json), Value::Object(more)) = (json.as_object_mut(), more) {
        json.extend(more);
    }
}
