//! What listening costs: the decode rate with each kind of collector against the rate with none, in one process.
//!
//! ```text
//! cargo run --release --example make_model -- --type q8_0 --out /tmp/tinyllama-q8_0.gguf
//! cargo run --release --example collector_overhead
//! cargo run --release --example collector_overhead -- --model /tmp/tinyllama-q8_0.gguf --tokens 32
//! ```
//!
//! For each configuration two executors are loaded, one with it and one without, and generate in turns, in random order
//! within each pair; so a slow spell of the machine falls on both. Where the weights of an executor lie in memory may make
//! it a little faster or slower for as long as it lives; therefore both are loaded anew some times, in turns too. The first
//! configuration has nobody listening in either: what it shows is the noise that the others are to be seen against.
//! Compared are medians of the time of a token, with the interval that 95 of 100 such measurements would give.
//!
//! Collectors are installed as in earnest: a queue, and a thread behind it that takes the events out.

mod common;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use candle_pipeline::instrument::queue::{Listener, QueueOptions, Sink, listen};
use candle_pipeline::instrument::{AttentionFilter, Collector, Interest, LensInterest, Probe, Record};
use candle_pipeline::{ExecutorOptions, GenerationEvent, GenerationOptions, HeterogeneousPipelineExecutor};
use clap::Parser;
use common::cases::Case;
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
    /// Times that both executors of a configuration are loaded.
    #[arg(long, default_value_t = 3)]
    loads: usize,
    /// Pairs of generations for each load.
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

/// Collectors, and what must live as long as they are to work.
struct Installed {
    collectors: Vec<Arc<dyn Collector>>,
    _behind: Vec<Box<dyn Send>>,
}

/// A configuration: its name, and how it is installed.
type Configuration = (&'static str, fn() -> Result<Installed>);

/// What is measured. A further collector is a further line.
const CONFIGURATIONS: &[Configuration] = &[
    ("off", || Ok(Installed { collectors: Vec::new(), _behind: Vec::new() })),
    ("events", || sink(Interest::default())),
    ("kv", || sink(Interest { kv: true, ..Interest::default() })),
    ("phases-5ms", || sink(Interest { phases: Some(Duration::from_millis(5)), ..Interest::default() })),
    ("phases", || sink(Interest { phases: Some(Duration::ZERO), ..Interest::default() })),
    ("activations", || sink(Interest { activations: true, ..Interest::default() })),
    ("attention", || sink(Interest { attention: Some(AttentionFilter::default()), ..Interest::default() })),
    ("lens", || sink(Interest { lens: Some(LensInterest { tokens: Vec::new(), top_k: 1 }), ..Interest::default() })),
    ("all", || {
        sink(Interest {
            phases: Some(Duration::ZERO),
            synchronise: true,
            activations: true,
            attention: Some(AttentionFilter::default()),
            lens: Some(LensInterest { tokens: Vec::new(), top_k: 1 }),
            kv: true,
        })
    }),
];

/// Takes events and makes nothing of them.
struct Nothing(Interest);

impl Sink for Nothing {
    fn record(&mut self, _: &Record) {}

    fn interest(&self) -> Interest {
        self.0.clone()
    }
}

/// A queue with an empty sink behind it: what telling costs, and gathering what is told.
fn sink(interest: Interest) -> Result<Installed> {
    let (queue, listener): (_, Listener<Nothing>) = listen("nothing", Nothing(interest), QueueOptions::default())?;
    Ok(Installed { collectors: vec![queue], _behind: vec![Box::new(listener)] })
}

#[tokio::main]
async fn main() -> ExitCode {
    common::exit(run().await)
}

async fn run() -> Result<()> {
    let arguments = Arguments::parse();
    let Arguments { flags, only, loads, pairs, tokens, streams, json } = &arguments;
    ensure!(*loads > 0 && *pairs > 0 && *streams > 0, "--loads, --pairs and --streams must be at least 1");
    ensure!(*tokens > 1, "--tokens must be at least 2: the time between tokens is what is compared");
    let names: Vec<&str> = CONFIGURATIONS.iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = only.iter().find(|name| !names.contains(&name.as_str())) {
        bail!("--only {unknown}: there is no such configuration; there are {}", names.join(", "));
    }
    let chosen = CONFIGURATIONS.iter().filter(|(name, _)| only.is_empty() || only.iter().any(|other| other == name));
    if !json {
        println!("{:<14} {:>14} {:>14}  longer by (95 of 100 lie between)", "", "off, us/token", "on, us/token");
    }
    let mut rows = Vec::new();
    for (name, install) in chosen {
        if flags.output_format != OutputFormat::None {
            eprintln!("{name}: {loads} loads of {pairs} pairs");
        }
        let times = measure(&arguments, *install).await?;
        let ratio = Ratio::of(&times);
        if !json {
            println!("{name:<14} {:>14.2} {:>14.2}  {}", ratio.second, ratio.first, ratio.percent());
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
        println!("{output}");
    }
    Ok(())
}

/// Microseconds of a token (on, off) in pairs of generations.
async fn measure(arguments: &Arguments, install: fn() -> Result<Installed>) -> Result<Vec<(f64, f64)>> {
    let flags = Flags { output_format: OutputFormat::None, ..arguments.flags.clone() };
    let random = &mut ChaCha8Rng::seed_from_u64(1);
    let mut times = Vec::new();
    for load in 0..arguments.loads {
        let installed = install()?;
        let on = ExecutorOptions { probe: Probe::to_all(installed.collectors.clone()), ..ExecutorOptions::default() };
        let mut options = [Some(on), Some(ExecutorOptions::default())];
        let mut executors = [None, None];
        for place in if load % 2 == 0 { [0, 1] } else { [1, 0] } {
            let executor = flags.load_with(options[place].take().unwrap_or_default()).await?;
            executor.warmup().await?;
            executors[place] = Some(executor);
        }
        let [Some(on), Some(off)] = &executors else { bail!("an executor was not loaded") };
        for _ in 0..arguments.pairs {
            let pair = match random.random() {
                true => {
                    let on = token_us(on, arguments).await?;
                    (on, token_us(off, arguments).await?)
                }
                false => {
                    let off = token_us(off, arguments).await?;
                    (token_us(on, arguments).await?, off)
                }
            };
            times.push(pair);
        }
        drop(executors);
        drop(installed);
    }
    Ok(times)
}

/// Microseconds between two tokens over all streams, behind the first token of each.
async fn token_us(executor: &HeterogeneousPipelineExecutor, arguments: &Arguments) -> Result<f64> {
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
    Ok(begun.elapsed().as_nanos() as f64 / 1e3 / f64::from(tokens))
}
