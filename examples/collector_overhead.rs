//! What listening costs: the decode rate with each kind of collector against the rate with none, in one process.
//!
//! ```text
//! cargo run --release --example make_model -- --type q8_0 --out /tmp/tinyllama-q8_0.gguf
//! cargo run --release --example collector_overhead
//! cargo run --release --example collector_overhead -- --model /tmp/tinyllama-q8_0.gguf --tokens 32
//! ```
//!
//! For each configuration an executor is loaded and generates in turns with its collectors listening and paused, in random
//! order within each pair: so a slow spell of the machine falls on both, and the weights lie in the same place. What is in
//! the queues at the end of a run is worked off before the next; a run is long enough for that to be little. The first
//! configuration has nobody listening in either run: what it shows is the noise that the others are to be seen against.
//! Compared are medians of the time of a token, with the interval that 95 of 100 such measurements would give.
//!
//! Collectors are installed as in earnest: a queue, and a thread behind it that takes the events out.

mod common;

use std::hint::black_box;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use candle_pipeline::instrument::chrome::{ChromeTrace, ChromeTraceOptions};
use candle_pipeline::instrument::jsonl::{MetricsLog, MetricsLogOptions};
use candle_pipeline::instrument::metrics::{Metrics, MetricsOptions};
use candle_pipeline::instrument::prometheus;
use candle_pipeline::instrument::queue::{QueueOptions, Sink, listen};
use candle_pipeline::instrument::session_log::{SessionLog, SessionLogLevel, SessionLogOptions};
use candle_pipeline::instrument::tracer::{ModelTracerConfig, trace};
use candle_pipeline::instrument::{AttentionFilter, Interest, LensInterest, Record};
use candle_pipeline::{ExecutorOptions, GenerationEvent, GenerationOptions, HeterogeneousPipelineExecutor};
use clap::Parser;
use common::cases::Case;
use common::instruments::Instruments;
use common::output::{note_line, print_line};
use common::ratio::Ratio;
use common::{Flags, OutputFormat};
use futures::StreamExt;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Configurations to measure, by name; all when absent.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Times that the model is loaded for each configuration.
    #[arg(long, default_value_t = 2)]
    loads: usize,
    /// Pairs of runs for each load.
    #[arg(long, default_value_t = 20)]
    pairs: usize,
    /// Tokens of each generation.
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    /// Sequences that decode at once.
    #[arg(long, default_value_t = 1)]
    streams: usize,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

/// How long a run is at least: many times a queue's interval.
const RUN: Duration = Duration::from_millis(400);

/// A configuration: its name, and how it is installed, with a folder for files.
type Configuration = (&'static str, fn(&mut Instruments, &Path) -> Result<()>);

/// What is measured. A further collector is a further line.
const CONFIGURATIONS: &[Configuration] = &[
    ("off", |_, _| Ok(())),
    ("events", |to, _| put(to, Nothing(Interest::default()))),
    ("kv", |to, _| put(to, Nothing(Interest { kv: Some(Duration::ZERO), turns: true, ..Interest::default() }))),
    ("phases-5ms", |to, _| {
        put(to, Nothing(Interest { phases: Some(Duration::from_millis(5)), ..Interest::default() }))
    }),
    ("phases", |to, _| put(to, Nothing(Interest { phases: Some(Duration::ZERO), ..Interest::default() }))),
    ("activations", |to, _| put(to, Nothing(Interest { activations: true, ..Interest::default() }))),
    ("attention", |to, _| {
        put(to, Nothing(Interest { attention: Some(AttentionFilter::default()), ..Interest::default() }))
    }),
    ("lens", |to, _| {
        put(to, Nothing(Interest { lens: Some(LensInterest { tokens: Vec::new(), top_k: 1 }), ..Interest::default() }))
    }),
    ("metrics", metrics),
    ("log-minimal", |to, folder| session_log(to, folder, SessionLogLevel::Minimal)),
    ("log-detailed", |to, folder| session_log(to, folder, SessionLogLevel::Detailed)),
    ("log-verbose", |to, folder| session_log(to, folder, SessionLogLevel::Verbose)),
    ("chrome-trace", |to, folder| put(to, ChromeTrace::create(ChromeTraceOptions::new(folder.join("trace.json")))?)),
    ("tracer-light", |to, _| tracer(to, ModelTracerConfig::lightweight())),
    ("tracer-full", |to, _| tracer(to, ModelTracerConfig::full())),
    ("together", |to, folder| {
        metrics(to, folder)?;
        session_log(to, folder, SessionLogLevel::Detailed)?;
        put(to, ChromeTrace::create(ChromeTraceOptions::new(folder.join("trace.json")))?)?;
        tracer(to, ModelTracerConfig::lightweight())
    }),
];

/// Takes events and makes nothing of them: what telling costs, and gathering what is told.
struct Nothing(Interest);

impl Sink for Nothing {
    fn record(&mut self, _: &Record) {}

    fn interest(&self) -> Interest {
        self.0.clone()
    }
}

/// A sink behind a queue.
fn put<S: Sink + 'static>(to: &mut Instruments, sink: S) -> Result<()> {
    let (queue, listener) = listen("overhead", sink, QueueOptions::default())?;
    to.add(queue, listener);
    Ok(())
}

/// Latencies and memory, written to files and rendered for Prometheus once a second.
fn metrics(to: &mut Instruments, folder: &Path) -> Result<()> {
    let metrics = to.metrics(MetricsOptions::default())?;
    let interval = Duration::from_secs(1);
    to.keep(MetricsLog::start(metrics.clone(), &MetricsLogOptions { directory: folder.into(), interval })?);
    to.keep(Scrapes::every(interval, metrics));
    Ok(())
}

/// Asks for the Prometheus text again and again, as a server is asked.
struct Scrapes {
    stop: Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Scrapes {
    fn every(interval: Duration, metrics: Arc<Metrics>) -> Scrapes {
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                black_box(prometheus::render(&metrics.snapshot()));
            }
        });
        Scrapes { stop, thread: Some(thread) }
    }
}

impl Drop for Scrapes {
    fn drop(&mut self) {
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn session_log(to: &mut Instruments, folder: &Path, level: SessionLogLevel) -> Result<()> {
    put(to, SessionLog::open(SessionLogOptions { level, ..SessionLogOptions::new(folder.join("session.jsonl")) })?)
}

fn tracer(to: &mut Instruments, config: ModelTracerConfig) -> Result<()> {
    let (queue, tracer) = trace(config, QueueOptions::default())?;
    to.add(queue, tracer);
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    common::program(run()).await
}

async fn run() -> Result<()> {
    let arguments = Arguments::parse();
    let Arguments { flags, only, loads, pairs, tokens, streams, json } = &arguments;
    ensure!(*loads > 0 && *pairs > 0 && *streams > 0, "--loads, --pairs and --streams must be at least 1");
    ensure!(*tokens > 1, "--tokens must be at least 2: the time between tokens is what is compared");
    let logs = flags.logs.session_log.is_some() || flags.logs.chrome_trace.is_some();
    let asked = logs || std::env::var_os("METRICS_LOG_ENABLED").is_some();
    ensure!(!asked, "leave --session-log, --chrome-trace and METRICS_LOG_ENABLED out: they would watch both sides");
    let names: Vec<&str> = CONFIGURATIONS.iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = only.iter().find(|name| !names.contains(&name.as_str())) {
        bail!("--only {unknown}: there is no such configuration; there are {}", names.join(", "));
    }
    let chosen = CONFIGURATIONS.iter().filter(|(name, _)| only.is_empty() || only.iter().any(|other| other == name));
    if !json {
        let (off, on) = ("off, us/token", "on, us/token");
        print_line(format_args!("{:<14} {off:>14} {on:>14}  longer by (95 of 100 lie between)", ""))?;
    }
    let mut rows = Vec::new();
    for (name, install) in chosen {
        if flags.output_format != OutputFormat::None {
            note_line(format_args!("{name}: {loads} loads of {pairs} pairs"));
        }
        let times = measure(&arguments, *install).await?;
        let ratio = Ratio::of(&times);
        if !json {
            let Ratio { first, second, .. } = ratio;
            print_line(format_args!("{name:<14} {second:>14.2} {first:>14.2}  {}", ratio.percent()))?;
        }
        rows.push(serde_json::json!({ "name": name, "pairs": times.len(), "on_over_off": ratio }));
    }
    if *json {
        let output = serde_json::json!({
            "model": flags.model,
            "devices": flags.devices,
            "streams": streams,
            "tokens": tokens,
            "configurations": rows,
        });
        print_line(output)?;
    }
    Ok(())
}

/// Microseconds of a token (on, off) in pairs of runs.
async fn measure(arguments: &Arguments, install: fn(&mut Instruments, &Path) -> Result<()>) -> Result<Vec<(f64, f64)>> {
    let flags = Flags { output_format: OutputFormat::None, ..arguments.flags.clone() };
    let random = &mut ChaCha8Rng::seed_from_u64(1);
    let mut times = Vec::new();
    for _ in 0..arguments.loads {
        let folder = tempfile::tempdir()?;
        let mut instruments = Instruments::default();
        install(&mut instruments, folder.path())?;
        let executor = flags.load_watched(ExecutorOptions::default(), instruments).await?;
        executor.warmup().await?;
        for _ in 0..arguments.pairs {
            let first = random.random();
            let [one, other] =
                [run_us(&executor, first, arguments).await?, run_us(&executor, !first, arguments).await?];
            times.push(if first { (one, other) } else { (other, one) });
        }
        drop(executor); // and what listens, before its files
    }
    Ok(times)
}

/// Microseconds of a token in generations one after the other.
async fn run_us(executor: &HeterogeneousPipelineExecutor, on: bool, arguments: &Arguments) -> Result<f64> {
    if on {
        executor.probe().resume();
    } else {
        executor.probe().pause();
    }
    let (began, mut decoding, mut tokens) = (Instant::now(), Duration::ZERO, 0);
    while tokens == 0 || began.elapsed() < RUN {
        let (time, count) = generate(executor, arguments).await?;
        (decoding, tokens) = (decoding + time, tokens + count);
    }
    // What is still in the queues is not to fall on the next run.
    tokio::time::sleep(2 * QueueOptions::default().interval).await;
    Ok(decoding.as_nanos() as f64 / 1e3 / f64::from(tokens))
}

/// Tokens of all streams behind the first one, and their time.
async fn generate(executor: &HeterogeneousPipelineExecutor, arguments: &Arguments) -> Result<(Duration, u32)> {
    let case = Case { prompt: 4, generate: arguments.tokens, sequences: arguments.streams };
    let options = GenerationOptions {
        ignore_eos: true,
        reuse_prefix: false,
        ..GenerationOptions::new(arguments.tokens, 0.0, 1.0)
    };
    let prompts = case.prompts(executor.pipeline().config().vocab_size);
    let streams = prompts.into_iter().map(|prompt| executor.infer_stream_with(prompt, &options));
    let mut events = futures::stream::select_all(streams);
    let (mut begun, mut tokens) = (None, 0u32);
    while let Some(event) = events.next().await {
        if let GenerationEvent::Token(_) = event? {
            tokens += u32::from(begun.is_some());
            begun.get_or_insert_with(Instant::now);
        }
    }
    let begun = begun.filter(|_| tokens > 0);
    let Some(begun) = begun else { bail!("fewer than two tokens came: the context is too short for --tokens") };
    Ok((begun.elapsed(), tokens))
}
