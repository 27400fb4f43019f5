//! Flags for what is written while an example runs: the session log and the Chrome trace. And what became of it: a log that
//! could not be written does not hold up the program, and is an error at its end.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Result, bail};
use candle_pipeline::Tokenizer;
use candle_pipeline::instrument::chrome::{ChromeTrace, ChromeTraceOptions};
use candle_pipeline::instrument::queue::{Listener, QueueOptions, Sink, listen};
use candle_pipeline::instrument::session_log::{SessionLog, SessionLogLevel, SessionLogOptions};
use candle_pipeline::instrument::{Collector, WriteFailures};
use clap::Args;

/// Which logs to write, and what writes them. They are finished when the last clone is dropped, so an executor has to be
/// dropped before.
#[derive(Debug, Clone, Args)]
pub struct Logs {
    /// Write a session log (newline-delimited JSON, docs/session-log.md) to this file.
    #[arg(long, value_name = "FILE")]
    pub session_log: Option<PathBuf>,
    /// How much the session log says: MINIMAL, DETAILED or VERBOSE.
    #[arg(long, default_value_t, requires = "session_log")]
    pub session_log_level: SessionLogLevel,
    /// Size at which the session log goes on in a new file; five are kept.
    #[arg(long, value_name = "BYTES", requires = "session_log")]
    pub session_log_max_bytes: Option<u64>,
    /// Write a Chrome trace for ui.perfetto.dev to this file. An earlier trace is replaced, other files are left alone.
    #[arg(long, value_name = "FILE")]
    pub chrome_trace: Option<PathBuf>,
    /// How often the Chrome trace has the layers and phases of a step of each stage, in milliseconds; 0 is every step.
    #[arg(long, value_name = "MS", default_value_t = 0, requires = "chrome_trace")]
    pub chrome_trace_phases: u64,
    #[arg(skip)]
    writers: Writers,
}

/// The threads behind the logs.
#[derive(Clone, Default)]
struct Writers(Arc<Mutex<Vec<Box<dyn Writer>>>>);

impl std::fmt::Debug for Writers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Writers")
    }
}

/// A thread that finishes its file when dropped.
trait Writer: Send {}

impl<S: Send> Writer for Listener<S> {}

impl Logs {
    /// Opens the files and starts what writes them. Texts are logged once `tokenizer` is there.
    pub fn start(&self, tokenizer: &Arc<OnceLock<Tokenizer>>) -> Result<Vec<Arc<dyn Collector>>> {
        let mut collectors: Vec<Arc<dyn Collector>> = Vec::new();
        if let Some(path) = &self.session_log {
            let tokenizer = tokenizer.clone();
            let log = SessionLog::open(SessionLogOptions {
                level: self.session_log_level,
                max_bytes: self.session_log_max_bytes,
                detokenise: Some(Arc::new(move |tokens| tokenizer.get()?.decode(tokens, true).ok())),
                ..SessionLogOptions::new(path)
            })?;
            watch(format!("--session-log {}", path.display()), "lines", &log.failures());
            collectors.push(self.listen("session-log", log)?);
        }
        if let Some(path) = &self.chrome_trace {
            let phases = Some(Duration::from_millis(self.chrome_trace_phases));
            let trace = ChromeTrace::create(ChromeTraceOptions { phases, ..ChromeTraceOptions::new(path) })?;
            watch(format!("--chrome-trace {}", path.display()), "lines", &trace.failures());
            collectors.push(self.listen("chrome-trace", trace)?);
        }
        Ok(collectors)
    }

    fn listen<S: Sink + 'static>(&self, name: &str, sink: S) -> Result<Arc<dyn Collector>> {
        let (collector, writer) = listen(name, sink, QueueOptions::default())?;
        self.writers.0.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(writer));
        Ok(collector)
    }
}

/// What this process writes besides its output: the flag that asked for it, what it consists of, and what it lacks.
static WATCHED: Mutex<Vec<(String, &str, WriteFailures)>> = Mutex::new(Vec::new());

/// Makes failures to write the `parts` of `what` an error at the program's end.
pub fn watch(what: String, parts: &'static str, failures: &WriteFailures) {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner).push((what, parts, failures.clone()));
}

/// Leaves what was watched so far to another process to report.
pub fn forget() {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// Looks at what was watched, after all writers have been dropped: an error names each file that lacks something. What the
/// program printed is right all the same, but it is not all that was asked for.
pub fn check() -> Result<()> {
    let watched = std::mem::take(&mut *WATCHED.lock().unwrap_or_else(PoisonError::into_inner));
    let failed: Vec<String> = watched
        .iter()
        .filter_map(|(what, parts, failures)| {
            Some(format!("{what}: {} {parts} not written: {}", failures.count(), failures.first()?))
        })
        .collect();
    if !failed.is_empty() {
        bail!("{}", failed.join("; "));
    }
    Ok(())
}
