//! Where the time of a model on a split goes. Five phases, each from requests whose tokens are timed as their caller
//! sees them, and a summary:
//!
//! - `warmup`: the first request of a process that did nothing before, against one that warmed up. Each is a process of
//!   its own, several of both, in turns.
//! - `tokens`: 5, 10, 20 and 50 generated tokens.
//! - `input`: prompts of 4, 8, 16 tokens and more, as far as the context goes.
//! - `sustained`: the same request again and again, with what each stage did and how near decode is to the memory's speed.
//! - `batch`: several sequences at once against the same ones after each other.
//!
//! ```text
//! cargo run --release --example profile_pipeline -- --devices cpu,cpu
//! cargo run --release --example profile_pipeline -- --json > before.json
//! cargo run --release --example profile_pipeline -- --baseline before.json --plot profile.svg
//! ```
//!
//! Times are kept in microseconds (hdrhistogram, three digits). TTFT is the time to the first token, ITL that between two
//! tokens of a sequence, both where the caller awaits them. A percentile is given when there are samples beyond it: P99
//! from 100 samples on, P95 from 20; the cases run often enough for a P99 of ITL unless `--runs` or `--quick` says
//! otherwise. What the scheduler and the stages did is taken from events that cost nothing where they happen.
//!
//! `--baseline FILE` compares with an earlier `--json` and ends with exit code 1 if something is slower by more than the
//! noise of both and the tolerance; [`baseline`] has the test. It refuses to compare what was not measured alike (model,
//! machine, split, type of KV, build, request), naming the difference, unless there is `--force`.

mod baseline;
#[path = "../common/mod.rs"]
mod common;
mod events;
mod others;
mod phases;
mod plot;
mod report;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_pipeline::instrument::Probe;
use candle_pipeline::{ExecutorOptions, HeterogeneousPipelineExecutor};
use clap::{CommandFactory, FromArgMatches, Parser};

use baseline::Baseline;
use common::cases::Case;
use common::files::{OutputFile, read_text};
use common::instruments::Instruments;
use common::output::{note, note_line, print, print_line};
use common::{Flags, OutputFormat};
use events::Log;
use others::Others;
use phases::{Bench, Phase, Start};
use report::Profile;

/// The command line.
#[derive(Parser)]
pub struct Arguments {
    /// Those of every example.
    #[command(flatten)]
    pub flags: Flags,
    /// What to measure.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["warmup", "tokens", "input", "sustained", "batch"])]
    pub phases: Vec<Phase>,
    /// Runs of each case. When absent: 10 sustained, and elsewhere as many as a P99 of ITL needs.
    #[arg(long)]
    pub runs: Option<usize>,
    /// Few runs and short cases, to see that it works; enough for a rough comparison with a baseline.
    #[arg(long)]
    pub quick: bool,
    /// Generated tokens of the `tokens` phase.
    #[arg(long, value_delimiter = ',', default_value = "5,10,20,50")]
    pub token_counts: Vec<usize>,
    /// Prompt tokens of the `input` phase; those that the context has no room for are left out.
    #[arg(long, value_delimiter = ',', default_value = "4,8,16,64,256,1024")]
    pub input_lengths: Vec<usize>,
    /// Sequences of the `batch` phase.
    #[arg(long, default_value_t = 4)]
    pub batch: usize,
    /// Cold and as many warm processes of the `warmup` phase: 5, or 2 with --quick.
    #[arg(long)]
    processes: Option<usize>,
    /// Print one JSON object instead of the tables.
    #[arg(long)]
    pub json: bool,
    /// Write plots to this file. An earlier plot is replaced, other files are left alone.
    #[arg(long)]
    pub plot: Option<PathBuf>,
    /// Compare with what --json printed earlier.
    #[arg(long)]
    pub baseline: Option<PathBuf>,
    /// Percent by which a time may grow before it counts as a regression.
    #[arg(long, default_value_t = 5.0, requires = "baseline")]
    pub tolerance: f64,
    /// Compare with a baseline of another model, machine or split too.
    #[arg(long, requires = "baseline")]
    pub force: bool,
    /// Be one of the processes of the `warmup` phase.
    #[arg(long, value_enum, hide = true)]
    start_process: Option<Start>,
}

impl Arguments {
    /// `--max-tokens` has another default here: 400 tokens of a big model take their time.
    fn parse_all() -> Result<Arguments> {
        let command = Arguments::command().mut_arg("max_tokens", |argument| argument.default_value("64"));
        let arguments = Arguments::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit());
        let counts = [
            ("--runs", arguments.runs),
            ("--batch", Some(arguments.batch)),
            ("--processes", arguments.processes),
            ("--max-tokens", Some(arguments.flags.sampling.max_tokens)),
            ("--token-counts", arguments.token_counts.iter().min().copied()),
            ("--input-lengths", arguments.input_lengths.iter().min().copied()),
        ];
        if let Some((option, _)) = counts.into_iter().find(|(_, count)| *count == Some(0)) {
            bail!("{option}: 0 measures nothing");
        }
        let tolerance = arguments.tolerance;
        ensure!(tolerance.is_finite() && tolerance >= 0.0, "--tolerance {tolerance}: percent, at least 0");
        let drawn = arguments.phases.iter().any(|phase| *phase != Phase::Warmup);
        ensure!(drawn || arguments.plot.is_none(), "--plot: the warmup phase alone gives nothing to draw");
        Ok(arguments)
    }

    /// Whether a phase was asked for.
    pub fn has(&self, phase: Phase) -> bool {
        self.phases.contains(&phase)
    }

    /// Tokens of a sustained run.
    pub fn tokens(&self) -> usize {
        if self.quick { self.flags.sampling.max_tokens.min(20) } else { self.flags.sampling.max_tokens }
    }

    /// Cold processes, and as many warm ones.
    pub fn processes(&self) -> usize {
        self.processes.unwrap_or(if self.quick { 2 } else { 5 })
    }

    /// Tells what is being done.
    pub fn say(&self, text: &str) {
        if self.flags.output_format != OutputFormat::None {
            note_line(text);
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    common::program(run()).await
}

async fn run() -> Result<()> {
    let mut arguments = Arguments::parse_all()?;
    if let Some(start) = arguments.start_process {
        arguments.flags.output_format = OutputFormat::None;
        // The process that starts this one writes them.
        (arguments.flags.logs.session_log, arguments.flags.logs.chrome_trace) = (None, None);
        let measured = be_measured(&arguments, start).await;
        // So does it report a cost cache that cannot be written.
        common::logs::forget();
        return measured;
    }
    let baseline = arguments.baseline.as_deref().map(read_baseline).transpose()?;
    let plot = arguments.plot.as_deref().map(|path| OutputFile::new("--plot", path, plot::is_plot)).transpose()?;
    let planned = arguments.flags.plan().await?;
    let identity = report::identity(&arguments, &planned);
    if let Some(baseline) = &baseline {
        let differences = baseline.differences(&identity);
        if !differences.is_empty() {
            let all = differences.join("\n  ");
            ensure!(arguments.force, "the baseline was measured otherwise (--force compares all the same):\n  {all}");
            arguments.say(&format!("comparing all the same:\n  {all}"));
        }
    }
    let others = Others::from_now();
    // Before this process holds the model: two of them might not fit.
    let warmup = arguments.has(Phase::Warmup).then(|| phases::warmup_effect(&arguments)).transpose()?;
    let read = report::read_bandwidths(&planned)?;
    let log = Arc::new(Log::default());
    let executor = arguments.flags.load_planned(planned, options(&log), Instruments::default()).await?;
    let warmed = executor.warmup().await?;
    let bench =
        Bench { executor: &executor, log: &log, arguments: &arguments, prompts: prompts(&arguments, &executor)? };
    let mut profile = Profile::new(identity, &executor, warmed, &log.facts(), read);
    profile.warmup_effect = warmup;
    if arguments.has(Phase::Tokens) {
        profile.tokens = bench.token_counts().await?;
    }
    if arguments.has(Phase::Input) {
        profile.input = bench.input_lengths().await?;
    }
    if arguments.has(Phase::Sustained) {
        profile.sustained = Some(bench.sustained().await?);
    }
    if arguments.has(Phase::Batch) {
        profile.batch = Some(bench.batch().await?);
    }
    profile.others = others.cores();
    match arguments.json {
        true => print_line(profile.json(&arguments, &executor))?,
        false => print(profile.text())?,
    }
    if let Some((file, path)) = plot.zip(arguments.plot.as_ref()) {
        file.write(plot::draw(&profile)?.as_bytes())?;
        arguments.say(&format!("plots in {}", path.display()));
    }
    match baseline {
        Some(baseline) => judge(&arguments, &baseline, &profile),
        None => Ok(()),
    }
}

fn read_baseline(path: &Path) -> Result<Baseline> {
    let text = read_text(path).with_context(|| format!("--baseline {}", path.display()))?;
    Baseline::read(path, &text)
}

/// One process of the warmup phase.
async fn be_measured(arguments: &Arguments, start: Start) -> Result<()> {
    let log = Arc::new(Log::default());
    let executor = arguments.flags.load_with(options(&log)).await?;
    let bench = Bench { executor: &executor, log: &log, arguments, prompts: prompts(arguments, &executor)? };
    Ok(print_line(serde_json::to_string(&bench.start(start).await?)?)?)
}

fn options(log: &Arc<Log>) -> ExecutorOptions {
    ExecutorOptions { probe: Probe::new(log.clone()), ..ExecutorOptions::default() }
}

/// The prompts that were given; without a tokenizer and without ids, four tokens.
fn prompts(arguments: &Arguments, executor: &HeterogeneousPipelineExecutor) -> Result<Vec<Vec<u32>>> {
    let flags = &arguments.flags;
    let given = !flags.prompt.is_empty() || flags.prompt_file.is_some() || !flags.token_ids.is_empty();
    if executor.tokenizer().is_none() && !given {
        let case = Case { prompt: 4, generate: 0, sequences: 1 };
        return Ok(case.prompts(executor.pipeline().config().vocab_size));
    }
    let prompts = flags.prompts(executor.needed_tokenizer(), &["Once upon a time"])?;
    ensure!(prompts.iter().all(|prompt| !prompt.is_empty()), "a prompt is empty");
    Ok(prompts)
}

/// Shows how the run compares with an earlier one; an error names what is slower.
fn judge(arguments: &Arguments, baseline: &Baseline, profile: &Profile) -> Result<()> {
    let now = profile.quantities();
    let comparison = baseline::compare(&baseline.quantities, &now, arguments.tolerance / 100.0)?;
    let mut text = comparison.text();
    if let (Some(before), Some(now)) = (baseline.read_bandwidth, profile.read_bandwidth()) {
        text += &format!("plain read: {:.1} GB/s in the baseline, {:.1} GB/s now\n", before / 1e9, now / 1e9);
    }
    if let Some(cores) = baseline.others_cores.filter(|cores| *cores >= report::DISTURBED) {
        text += &format!("others kept {cores:.1} cores busy during the baseline\n");
    }
    text += &profile.disturbed();
    match arguments.json {
        true => note(&text),
        false => print(&text)?,
    }
    let slower: Vec<String> = comparison
        .regressions()
        .into_iter()
        .map(|regression| format!("{} by {:.1} %", regression.name, regression.percent()))
        .collect();
    let disturbed = profile.disturbed();
    let quiet = if disturbed.is_empty() { "" } else { "; measure again on a quiet machine" };
    ensure!(slower.is_empty(), "slower than the baseline: {}{quiet}", slower.join(", "));
    Ok(())
}
