//! A terminal that shows a model at work: the text as it comes, where the time goes, what is held, how busy the stages are.
//!
//! ```text
//! cargo run --release -p dashboard
//! cargo run --release -p dashboard -- --devices cpu@threads=1,cpu@threads=1 --prompt "One day"
//! ```
//!
//! Keys are shown at the bottom. `METRICS_LOG_ENABLED=1` writes the same rows to files.

#[path = "../../examples/common/mod.rs"]
mod common;

mod app;
mod ui;

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;
use std::io::{IsTerminal, stdout};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use candle_pipeline::device::{OpenDevice, read_bandwidth};
use candle_pipeline::instrument::metrics::{Metrics, MetricsOptions};
use candle_pipeline::{ChatMessage, DeviceSpec, ExecutorOptions, GenerationEvent, HeterogeneousPipelineExecutor, Isa};
use clap::Parser;
use futures::StreamExt;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::event::{self, Event};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode};
use ratatui::{Terminal, crossterm};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use self::app::{Action, App};
use self::common::instruments::Instruments;
use self::common::{Flags, parse_ids};

/// From one picture to the next.
const FRAME: Duration = Duration::from_millis(100);

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// Do not measure how fast the devices read memory; their share of it is not shown then.
    #[arg(long)]
    no_bandwidth: bool,
    /// Wait for the device at the end of each phase. GPUs show the true time of phases only so.
    #[arg(long)]
    synchronise: bool,
    /// Panic after so many milliseconds, to try out that the terminal is restored.
    #[arg(long, hide = true)]
    panic_after: Option<u64>,
}

fn main() -> ExitCode {
    common::end(run())
}

fn run() -> Result<()> {
    let arguments = Arguments::parse();
    let terminal = std::io::stdin().is_terminal() && stdout().is_terminal();
    ensure!(terminal, "the dashboard needs a terminal; test_pipeline writes to files and pipes");
    let log = LogLines::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(log.clone()))?;

    let flags = &arguments.flags;
    let runtime = Runtime::new()?;
    let mut instruments = Instruments::default();
    let options = MetricsOptions {
        synchronise: arguments.synchronise,
        device_bandwidth: if arguments.no_bandwidth { BTreeMap::new() } else { bandwidths(flags)? },
        ..MetricsOptions::default()
    };
    let metrics = instruments.metrics(options)?;
    let executor = runtime.block_on(flags.load_watched(ExecutorOptions::default(), instruments))?;
    tracing::info!("loaded in {:.2?}", executor.load_time());

    let (updates, inbox) = channel();
    let devices: Vec<String> = executor.stages().iter().map(|stage| stage.device.to_string()).collect();
    let app = App::new(format!("{} on {}", flags.model, devices.join(", ")));
    let panic_at = arguments.panic_after.map(|ms| Instant::now() + Duration::from_millis(ms));
    let mut dashboard = Dashboard { app, flags, runtime: &runtime, executor: &executor, running: None, updates, inbox };
    let first = flags.prompt.first().or(flags.token_ids.first()).cloned();
    let first = first.or_else(|| executor.tokenizer().map(|_| "Once upon a time".to_string()));
    if let Some(prompt) = first {
        dashboard.submit(prompt);
    }
    let screen = Screen::enter()?;
    let ended = dashboard.show(&metrics, &log, panic_at);
    drop(screen);
    dashboard.cancel();
    ended
}

/// How fast the devices read their memory, by their names.
fn bandwidths(flags: &Flags) -> Result<BTreeMap<String, f64>> {
    let mut specs = DeviceSpec::parse_list(&flags.devices)?;
    specs.sort();
    specs.dedup();
    let mut rates = BTreeMap::new();
    for device in OpenDevice::open_all(&specs, flags.isa.unwrap_or_else(Isa::detect))? {
        let rate = read_bandwidth(&device)?;
        tracing::info!("{} reads {:.1} GB/s", device.spec, rate / 1e9);
        rates.insert(device.spec.to_string(), rate);
    }
    Ok(rates)
}

/// What a running request tells.
enum Update {
    Text(String),
    End(String),
}

struct Dashboard<'a> {
    app: App,
    flags: &'a Flags,
    runtime: &'a Runtime,
    executor: &'a HeterogeneousPipelineExecutor,
    running: Option<JoinHandle<()>>,
    updates: Sender<Update>,
    inbox: Receiver<Update>,
}

impl Dashboard<'_> {
    /// Draws and listens to keys until somebody wants to go.
    fn show(&mut self, metrics: &Metrics, log: &LogLines, panic_at: Option<Instant>) -> Result<()> {
        let mut terminal = Terminal::new(CrosstermBackend::new(stdout()))?;
        loop {
            for update in self.inbox.try_iter() {
                match update {
                    Update::Text(text) => self.app.append(&text),
                    Update::End(status) => self.app.end(status),
                }
            }
            log.take().into_iter().for_each(|line| self.app.log(line));
            self.app.snapshot = metrics.snapshot();
            terminal.draw(|frame| ui::draw(frame, &self.app))?;
            assert!(panic_at.is_none_or(|at| Instant::now() < at), "asked for by --panic-after");
            // All keys that are there, so that pasted text does not take a frame for each letter.
            let mut wait = FRAME;
            while event::poll(wait)? {
                wait = Duration::ZERO;
                let Event::Key(key) = event::read()? else { continue };
                match self.app.key(key) {
                    Some(Action::Quit) => return Ok(()),
                    Some(Action::Cancel) => self.cancel(),
                    Some(Action::Submit(prompt)) => self.submit(prompt),
                    None => {}
                }
            }
        }
    }

    fn submit(&mut self, prompt: String) {
        let tokenizer = self.executor.tokenizer();
        // What is not a chat is the beginning of the text.
        self.app.begin(&prompt, if self.flags.chat || tokenizer.is_none() { "\n" } else { "" });
        let ids = match tokenizer {
            Some(tokenizer) if self.flags.chat => tokenizer.encode_chat(&[ChatMessage::user(prompt)]),
            Some(tokenizer) => tokenizer.encode(&prompt, true),
            None => match parse_ids(&prompt) {
                Ok(ids) => Ok(ids),
                Err(_) => {
                    let why = self.executor.needed_tokenizer().err().map(|error| error.to_string()).unwrap_or_default();
                    return self.app.end(format!("{why}; write token ids, as in 1,2,3"));
                }
            },
        };
        let ids = match ids {
            Ok(ids) => ids,
            Err(error) => return self.app.end(format!("failed: {error}")),
        };
        let options = match self.flags.generation() {
            Ok(options) => options,
            Err(error) => return self.app.end(format!("failed: {error}")),
        };
        let has_text = tokenizer.is_some();
        let mut stream = match has_text {
            true => self.executor.infer_stream_with_text(ids, &options),
            false => self.executor.infer_stream_with(ids, &options),
        };
        let updates = self.updates.clone();
        self.running = Some(self.runtime.spawn(async move {
            // A dashboard that is gone hears nothing, and drops this task soon.
            let tell = |update| drop(updates.send(update));
            while let Some(event) = stream.next().await {
                match event {
                    Ok(GenerationEvent::Token(token)) if has_text => tell(Update::Text(token.text)),
                    Ok(GenerationEvent::Token(token)) => tell(Update::Text(format!("{} ", token.id))),
                    Ok(GenerationEvent::Finished(finish)) => {
                        tell(Update::Text(finish.text));
                        tell(Update::End(format!("ended: {:?}", finish.reason).to_lowercase()));
                    }
                    Ok(_) => {}
                    Err(error) => tell(Update::End(format!("failed: {error}"))),
                }
            }
        }));
    }

    /// Ends the request that runs, if any: its stream is dropped, which stops the work in every stage.
    fn cancel(&mut self) {
        if let Some(running) = self.running.take()
            && self.app.generating
        {
            running.abort();
            let _ = self.runtime.block_on(running);
            for update in self.inbox.try_iter() {
                if let Update::Text(text) = update {
                    self.app.append(&text);
                }
            }
            self.app.end("cancelled".into());
        }
    }
}

/// The alternate screen in raw mode. Left on drop, and before the message of a panic of this thread is shown.
struct Screen;

impl Screen {
    fn enter() -> Result<Screen> {
        let (drawing, before) = (std::thread::current().id(), std::panic::take_hook());
        std::panic::set_hook(Box::new(move |panic| {
            if std::thread::current().id() == drawing {
                leave();
                before(panic);
            } else {
                // The dashboard goes on and shows it; the executor tells the request.
                tracing::error!("{panic}");
            }
        }));
        enable_raw_mode()?;
        ENTERED.store(true, Ordering::SeqCst);
        // Made before the screen is changed: an error on the way is followed by `drop`.
        let screen = Screen;
        execute!(stdout(), EnterAlternateScreen)?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        leave();
    }
}

/// Whether there is a screen to leave. A second time would take the cursor back to where it was, over a panic's message.
static ENTERED: AtomicBool = AtomicBool::new(false);

fn leave() {
    if !ENTERED.swap(false, Ordering::SeqCst) {
        return;
    }
    // There is nobody to tell if the terminal is gone.
    let _ = disable_raw_mode();
    let _ = execute!(stdout(), LeaveAlternateScreen, crossterm::cursor::Show);
}

/// Keeps log lines until they are taken.
#[derive(Clone, Default)]
struct LogLines(Arc<Mutex<VecDeque<String>>>);

impl LogLines {
    fn take(&self) -> VecDeque<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<S: tracing::Subscriber> Layer<S> for LogLines {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        /// Lines that wait to be taken at most.
        const MOST: usize = 500;
        let level = *event.metadata().level();
        if level > tracing::Level::INFO {
            return;
        }
        let mut message = Message(format!("{level} "));
        event.record(&mut message);
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() < MOST {
            lines.push_back(message.0);
        }
    }
}

/// The text of an event, with its fields behind.
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_events_become_lines_and_those_for_developers_do_not() {
        let log = LogLines::default();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(log.clone()), || {
            tracing::warn!(stage = 3, "it is {}", "slow");
            tracing::debug!("details");
        });
        assert_eq!(log.take(), ["WARN it is slow stage=3"]);
        assert!(log.take().is_empty());
    }
}
