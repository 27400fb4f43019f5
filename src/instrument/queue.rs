//! A bounded queue between the threads where things happen and one that makes something of them.
//!
//! Telling costs an allocation and a push; it wakes nobody and never waits. The thread behind the queue looks into it
//! every few milliseconds, since on a machine whose cores all compute, being woken for each event would cost more than
//! the event. What a full queue does not take is counted, and the count is told as [`Event::Dropped`]. A queue is full by
//! events or by bytes: an event may hold the attention weights of a long sequence.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Collector, Event, Interest, Record};
use crate::error::{Error, Result};

/// Takes events in order, on a thread of its own.
pub trait Sink: Send {
    /// Takes one event.
    fn record(&mut self, record: &Record);

    /// Nothing more is waiting. Called at least once an interval.
    fn idle(&mut self) {}

    /// What it wants beyond the events that cost nothing where they happen.
    fn interest(&self) -> Interest {
        Interest::default()
    }
}

/// How a queue behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueOptions {
    /// Events that it holds.
    pub capacity: usize,
    /// Bytes that the larger ones of them may hold together, see [`Event::heap_bytes`].
    pub max_bytes: usize,
    /// How often the thread behind it looks into it.
    pub interval: Duration,
}

impl Default for QueueOptions {
    fn default() -> Self {
        QueueOptions { capacity: 1 << 15, max_bytes: 64 << 20, interval: Duration::from_millis(20) }
    }
}

/// The end of a queue that events go into.
pub struct Queue {
    sender: SyncSender<Arc<Record>>,
    interest: Interest,
    max_bytes: usize,
    /// Held by what is in the queue.
    bytes: Arc<AtomicUsize>,
    dropped: Arc<AtomicU64>,
}

impl Queue {
    /// Whether there was room for the record.
    fn take(&self, record: &Arc<Record>) -> bool {
        // Most events hold nothing, and are not slowed down by a counter that all threads share.
        let bytes = record.event.heap_bytes();
        let room = bytes == 0 || self.bytes.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= self.max_bytes;
        let taken = room && self.sender.try_send(record.clone()).is_ok();
        if !taken && bytes > 0 {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        taken
    }
}

impl Collector for Queue {
    fn record(&self, record: &Arc<Record>) {
        if !self.take(record) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn interest(&self) -> Interest {
        self.interest.clone()
    }
}

/// The thread behind a queue. Dropping it lets the sink have what is in the queue, and joins the thread.
pub struct Listener<S> {
    thread: Option<JoinHandle<S>>,
    shared: Arc<Shared>,
    dropped: Arc<AtomicU64>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Flushes asked for and done.
    flushes: Mutex<(u64, u64)>,
    flushed: Condvar,
}

/// Starts a thread named `name` that gives events to `sink`.
pub fn listen<S: Sink + 'static>(name: &str, sink: S, options: QueueOptions) -> Result<(Arc<Queue>, Listener<S>)> {
    if options.capacity == 0 {
        return Err(Error::option("capacity", "a queue of 0 events takes none; give it at least 1"));
    }
    let (sender, receiver) = sync_channel(options.capacity);
    let (shared, dropped): (Arc<Shared>, Arc<AtomicU64>) = Default::default();
    let bytes: Arc<AtomicUsize> = Arc::default();
    let queue = Queue {
        sender,
        interest: sink.interest(),
        max_bytes: options.max_bytes,
        bytes: bytes.clone(),
        dropped: dropped.clone(),
    };
    let drain = Drain { receiver, shared: shared.clone(), bytes, dropped: dropped.clone(), told: 0 };
    let thread = std::thread::Builder::new().name(name.into()).spawn(move || drain.run(sink, options.interval));
    let thread = thread.map_err(|e| Error::Tensors(format!("cannot start the thread {name}: {e}")))?;
    Ok((Arc::new(queue), Listener { thread: Some(thread), shared, dropped }))
}

impl<S> Listener<S> {
    /// Waits until the sink has had everything that was told before this call. False when its thread has panicked.
    pub fn flush(&self) -> bool {
        let Some(thread) = &self.thread else { return false };
        let mut flushes = self.shared.flushes.lock().unwrap_or_else(PoisonError::into_inner);
        flushes.0 += 1;
        let wanted = flushes.0;
        thread.thread().unpark();
        while flushes.1 < wanted {
            if thread.is_finished() {
                return false;
            }
            let wait = self.shared.flushed.wait_timeout(flushes, Duration::from_millis(20));
            flushes = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Events that did not fit so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Ends the thread after it has given the sink what is in the queue, and gives the sink back. `None` when the sink
    /// panicked.
    pub fn close(mut self) -> Option<S> {
        self.end()
    }

    fn end(&mut self) -> Option<S> {
        let thread = self.thread.take()?;
        self.shared.stop.store(true, Ordering::Release);
        thread.thread().unpark();
        thread.join().ok()
    }
}

impl<S> Drop for Listener<S> {
    fn drop(&mut self) {
        self.end();
    }
}

struct Drain {
    receiver: Receiver<Arc<Record>>,
    shared: Arc<Shared>,
    bytes: Arc<AtomicUsize>,
    dropped: Arc<AtomicU64>,
    /// How many dropped events the sink has been told of.
    told: u64,
}

impl Drain {
    fn run<S: Sink>(mut self, mut sink: S, interval: Duration) -> S {
        loop {
            // Asked before looking: what was told before the question is in the queue by then.
            let stop = self.shared.stop.load(Ordering::Acquire);
            let wanted = self.shared.flushes.lock().unwrap_or_else(PoisonError::into_inner).0;
            let open = self.drain(&mut sink);
            sink.idle();
            self.shared.flushes.lock().unwrap_or_else(PoisonError::into_inner).1 = wanted;
            self.shared.flushed.notify_all();
            if stop || !open {
                return sink;
            }
            std::thread::park_timeout(interval);
        }
    }

    /// Gives the sink what there is; false when nothing can come any more.
    fn drain<S: Sink>(&mut self, sink: &mut S) -> bool {
        let open = loop {
            match self.receiver.try_recv() {
                Ok(record) => {
                    sink.record(&record);
                    let bytes = record.event.heap_bytes();
                    drop(record);
                    if bytes > 0 {
                        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
                    }
                }
                Err(TryRecvError::Empty) => break true,
                Err(TryRecvError::Disconnected) => break false,
            }
        };
        let dropped = self.dropped.load(Ordering::Relaxed);
        if dropped > self.told {
            let events = dropped - self.told;
            self.told = dropped;
            sink.record(&Record { at: Instant::now(), event: Event::Dropped { events } });
        }
        open
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instrument::Probe;

    #[derive(Default)]
    struct Count {
        steps: Vec<u64>,
        dropped: u64,
        slow: Option<Duration>,
    }

    impl Sink for Count {
        fn record(&mut self, record: &Record) {
            if let Some(delay) = self.slow {
                std::thread::sleep(delay);
            }
            match &record.event {
                Event::StepSent { step, .. } => self.steps.push(*step),
                Event::Dropped { events } => self.dropped += events,
                _ => panic!("the test wants this panic"),
            }
        }
    }

    fn step(probe: &Probe, step: u64) {
        probe.emit(|| Event::StepSent { step, slices: Vec::new() });
    }

    #[test]
    fn events_arrive_in_order_and_a_flush_waits_for_them() {
        let (queue, listener) = listen("count", Count::default(), QueueOptions::default()).unwrap();
        let probe = Probe::new(queue);
        (0..1000).for_each(|n| step(&probe, n));
        assert!(listener.flush());
        (1000..1010).for_each(|n| step(&probe, n));
        let count = listener.close().unwrap();
        assert_eq!(count.steps, (0..1010).collect::<Vec<_>>());
        assert_eq!(count.dropped, 0);
        step(&probe, 0); // nobody is there any more; nothing waits
    }

    #[test]
    fn a_full_queue_counts_what_it_does_not_take_and_says_so() {
        let slow = Count { slow: Some(Duration::from_millis(1)), ..Count::default() };
        let (queue, listener) = listen("slow", slow, QueueOptions { capacity: 4, ..QueueOptions::default() }).unwrap();
        let probe = Probe::new(queue);
        let began = Instant::now();
        (0..1000).for_each(|n| step(&probe, n));
        assert!(began.elapsed() < Duration::from_millis(500), "telling waits for nobody");
        let count = listener.close().unwrap();
        assert!(count.dropped > 900, "{}", count.dropped);
        assert_eq!(count.steps.len() as u64 + count.dropped, 1000);
    }

    #[test]
    fn a_queue_is_full_by_bytes_too_and_has_room_again_when_they_are_gone() {
        let attention = |len: usize| Event::Attention {
            request: 0,
            step: 0,
            layer: 0,
            head: 0,
            position: len - 1,
            first: 0,
            weights: vec![0.0; len],
        };
        #[derive(Default)]
        struct Lengths(Vec<usize>, u64, Arc<Mutex<()>>);
        impl Sink for Lengths {
            fn record(&mut self, record: &Record) {
                let _open = self.2.lock();
                match &record.event {
                    Event::Attention { weights, .. } => self.0.push(weights.len()),
                    Event::Dropped { events } => self.1 += events,
                    _ => {}
                }
            }
        }
        let gate: Arc<Mutex<()>> = Arc::default();
        let options = QueueOptions { max_bytes: 1000, ..QueueOptions::default() };
        let (queue, listener) = listen("bytes", Lengths(Vec::new(), 0, gate.clone()), options).unwrap();
        let probe = Probe::new(queue);
        let closed = gate.lock().unwrap();
        for len in [200, 60, 40, 1] {
            probe.emit(|| attention(len)); // 800 bytes and 160 fit, 160 more do not, 4 do
        }
        step(&probe, 0);
        drop(closed);
        assert!(listener.flush());
        probe.emit(|| attention(251));
        probe.emit(|| attention(250));
        let lengths = listener.close().unwrap();
        assert_eq!((lengths.0, lengths.1), (vec![200, 40, 1, 250], 2));
    }

    #[test]
    fn a_sink_that_panics_is_found_out_and_holds_nobody_up() {
        let (queue, listener) = listen("panics", Count::default(), QueueOptions::default()).unwrap();
        let probe = Probe::new(queue);
        probe.emit(|| Event::Dropped { events: 1 });
        assert!(listener.flush());
        probe.emit(|| Event::StageMemory { stage: 0, weights: 0, kv: 0, scratch: 0 });
        while listener.flush() {}
        step(&probe, 0);
        assert_eq!(listener.dropped(), 1);
        assert!(listener.close().is_none());
    }
}
