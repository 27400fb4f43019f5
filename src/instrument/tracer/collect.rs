//! A tracer on the thread behind a queue, and the way to what it has found while it works.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::queue::{Listener, Queue, QueueOptions, Sink, listen};
use super::super::{Interest, Record};
use super::quant_error::QuantError;
use super::{ModelTracer, ModelTracerConfig, ModelTracerSummary, TracerSnapshot};
use crate::error::Result;

/// The way to a tracer that is at work. Clones lead to the same one.
#[derive(Debug, Clone)]
pub struct TracerHandle(Arc<Mutex<ModelTracer>>);

impl TracerHandle {
    fn lock(&self) -> MutexGuard<'_, ModelTracer> {
        // The tracer's numbers stay sound whatever a panic interrupts.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it has found so far.
    pub fn snapshot(&self) -> TracerSnapshot {
        self.lock().snapshot()
    }

    /// The figures alone.
    pub fn summary(&self) -> ModelTracerSummary {
        self.lock().summary()
    }

    /// Takes in an error of a quantised tensor or output: no event tells of these.
    pub fn record_quant_error(&self, error: QuantError) {
        self.lock().record_quant_error(error);
    }

    /// Forgets all that was found.
    pub fn clear(&self) {
        self.lock().clear();
    }
}

/// Gives a tracer the events that a queue holds.
#[derive(Debug)]
pub struct TracerSink(TracerHandle);

impl Sink for TracerSink {
    fn record(&mut self, record: &Record) {
        self.0.lock().hear(&record.event);
    }

    fn interest(&self) -> Interest {
        self.0.lock().config().interest()
    }
}

/// A tracer at work on a thread of its own. Dropping it ends the thread; handles keep what was found.
pub struct RunningTracer {
    handle: TracerHandle,
    listener: Listener<TracerSink>,
}

/// Starts a tracer for one executor: the queue is the collector that its [`Probe`](super::super::Probe) is to tell.
///
/// The tracer holds [`max_bytes`](ModelTracerConfig::max_bytes) at most, the queue [`QueueOptions::max_bytes`].
pub fn trace(config: ModelTracerConfig, options: QueueOptions) -> Result<(Arc<Queue>, RunningTracer)> {
    let handle = TracerHandle(Arc::new(Mutex::new(ModelTracer::new(config)?)));
    let (queue, listener) = listen("model-tracer", TracerSink(handle.clone()), options)?;
    Ok((queue, RunningTracer { handle, listener }))
}

impl RunningTracer {
    /// The way to it, for other threads.
    pub fn handle(&self) -> TracerHandle {
        self.handle.clone()
    }

    /// Waits until it has heard of everything that was told before this call. False when its thread has panicked.
    pub fn flush(&self) -> bool {
        self.listener.flush()
    }

    /// What it has found of everything that was told before this call.
    ///
    /// A step is over a moment after its tokens are out: drop the executor first to have the last one too.
    pub fn snapshot(&self) -> TracerSnapshot {
        self.flush();
        self.handle.snapshot()
    }

    /// Ends the thread once it has heard everything, and returns what it has found.
    pub fn close(self) -> TracerSnapshot {
        let RunningTracer { handle, listener } = self;
        listener.close();
        handle.snapshot()
    }
}
