//! What watches a model while an example runs, as the environment asks for it.
//!
//! `METRICS_LOG_ENABLED=1` writes `<timestamp>-latency.jsonl` and `<timestamp>-memory.jsonl` into the working directory,
//! a line every five seconds or every `METRICS_LOG_INTERVAL_SECS`.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use candle_pipeline::instrument::Collector;
use candle_pipeline::instrument::jsonl::{MetricsLog, MetricsLogOptions};
use candle_pipeline::instrument::metrics::{Metrics, MetricsOptions};

use super::logs::watch;
use super::output::note_line;

const ENABLED: &str = "METRICS_LOG_ENABLED";
const INTERVAL: &str = "METRICS_LOG_INTERVAL_SECS";

/// Collectors for an executor, and what must be kept for as long as they are to work.
#[derive(Default)]
pub struct Instruments {
    collectors: Vec<Arc<dyn Collector>>,
    guards: Vec<Box<dyn Any + Send + Sync>>,
    metrics: Option<Arc<Metrics>>,
}

impl Instruments {
    /// Adds a collector. `guard` is dropped after the executor.
    pub fn add(&mut self, collector: Arc<dyn Collector>, guard: impl Any + Send + Sync) {
        self.collectors.push(collector);
        self.guards.push(Box::new(guard));
    }

    /// Keeps what works beside the collectors.
    pub fn keep(&mut self, guard: impl Any + Send + Sync) {
        self.guards.push(Box::new(guard));
    }

    /// The metrics, which all that show or write figures share. The first who asks says how they are gathered.
    pub fn metrics(&mut self, options: MetricsOptions) -> Result<Arc<Metrics>> {
        if let Some(metrics) = &self.metrics {
            return Ok(metrics.clone());
        }
        let (collector, metrics) = Metrics::start(options)?;
        let metrics = self.metrics.insert(Arc::new(metrics)).clone();
        self.add(collector, metrics.clone());
        Ok(metrics)
    }

    /// Adds what the environment asks for.
    pub fn add_from_environment(&mut self) -> Result<()> {
        if let Some(options) = log_options(|name| std::env::var_os(name).map(|value| value.to_string_lossy().into()))? {
            let log = MetricsLog::start(self.metrics(MetricsOptions::default())?, &options)?;
            let (latency, memory) = (log.latency_path().display(), log.memory_path().display());
            note_line(format_args!("metrics go to {latency} and {memory}"));
            watch(format!("{ENABLED}: {latency}, {memory}"), "lines", &log.failures());
            self.keep(log);
        }
        Ok(())
    }

    /// Those that are to hear of events.
    pub fn collectors(&self) -> Vec<Arc<dyn Collector>> {
        self.collectors.clone()
    }
}

impl Drop for Instruments {
    /// What was added later may use what was added before.
    fn drop(&mut self) {
        while self.guards.pop().is_some() {}
    }
}

/// What the environment says of logs. `variable` gives a variable's value.
pub fn log_options(variable: impl Fn(&str) -> Option<String>) -> Result<Option<MetricsLogOptions>> {
    let mut options = MetricsLogOptions::default();
    if let Some(text) = variable(INTERVAL).filter(|text| !text.trim().is_empty()) {
        let wanted = || format!("{INTERVAL}={text}: write seconds above 0, as in 5 or 0.5");
        let seconds: f64 = text.trim().parse().with_context(wanted)?;
        options.interval = Duration::try_from_secs_f64(seconds).with_context(wanted)?;
        if options.interval.is_zero() {
            bail!(wanted());
        }
    }
    let text = variable(ENABLED).unwrap_or_default();
    match text.trim().to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(Some(options)),
        "" | "0" | "false" | "no" | "off" => Ok(None),
        _ => bail!("{ENABLED}={text}: write 1, true, yes or on, or 0, false, no or off"),
    }
}
