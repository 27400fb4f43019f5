//! Rows in files: every so often a line with the latency rows and a line with the memory rows, each a JSON array.
//!
//! `<timestamp>-latency.jsonl` and `<timestamp>-memory.jsonl` stand in a directory of one's choice; the timestamp is that of
//! the start, in milliseconds since the beginning of 1970. A row has the fields of
//! [`LatencyRow`](super::metrics::LatencyRow) or [`MemoryRow`](super::metrics::MemoryRow), and `time` in seconds since then.
//! Files hold whole lines whatever happens: a line is one write, and what a full disk took of it is cut off again.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use super::WriteFailures;
use super::metrics::{Metrics, Snapshot, build_latency_rows, build_memory_rows};
use crate::error::{Error, Result};

/// Where to write and how often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsLogOptions {
    /// The folder of the files. It is made if it is not there.
    pub directory: PathBuf,
    /// Time from line to line.
    pub interval: Duration,
}

impl Default for MetricsLogOptions {
    /// The working directory, every five seconds.
    fn default() -> Self {
        MetricsLogOptions { directory: PathBuf::from("."), interval: Duration::from_secs(5) }
    }
}

/// Writes the rows until it is dropped, and then once more, so that a short run is in the files too.
pub struct MetricsLog {
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    latency: PathBuf,
    memory: PathBuf,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    failures: WriteFailures,
}

impl MetricsLog {
    /// Makes the files with a first line in each, and starts the thread that writes.
    pub fn start(metrics: Arc<Metrics>, options: &MetricsLogOptions) -> Result<MetricsLog> {
        let MetricsLogOptions { directory, interval } = options.clone();
        if interval.is_zero() {
            return Err(Error::option("interval", "is 0, and the log would never rest; give it a longer time"));
        }
        std::fs::create_dir_all(directory.as_path())
            .map_err(|error| Error::file(&directory, format!("cannot be made for metrics logs: {error}")))?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let path = |kind: &str| directory.join(format!("{}-{kind}.jsonl", now.as_millis()));
        let (latency, memory) = (path("latency"), path("memory"));
        let mut files = Files { latency: create(&latency)?, memory: create(&memory)? };
        files.write(&metrics.snapshot()).map_err(|(kind, error)| {
            // Without a line they are of no use to anybody.
            let _ = (std::fs::remove_file(&latency), std::fs::remove_file(&memory));
            Error::file(path(kind), format!("metrics cannot be written: {error}; make room, or choose another folder"))
        })?;
        let shared: Arc<Shared> = Arc::default();
        // A time that a clock can hold; nothing runs so long.
        let interval = interval.min(Duration::from_secs(365 * 24 * 3600));
        let writer = Writer { metrics, files, interval, shared: shared.clone() };
        let thread = std::thread::Builder::new().name("pipeline-metrics-log".into()).spawn(move || writer.run());
        let thread = thread.map_err(|e| Error::Tensors(format!("cannot start the thread of the metrics log: {e}")))?;
        Ok(MetricsLog { thread: Some(thread), shared, latency, memory })
    }

    /// The file of latency rows.
    pub fn latency_path(&self) -> &Path {
        &self.latency
    }

    /// The file of memory rows.
    pub fn memory_path(&self) -> &Path {
        &self.memory
    }

    /// Times that a line could not be written, the last ones among them that dropping the log writes.
    pub fn failures(&self) -> WriteFailures {
        self.shared.failures.clone()
    }
}

impl Drop for MetricsLog {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.shared.stop.store(true, Ordering::Release);
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn create(path: &Path) -> Result<Lines<File>> {
    let file = File::create_new(path);
    let file = file.map_err(|error| Error::file(path, format!("cannot be made for metrics: {error}")))?;
    Ok(Lines::new(file))
}

struct Writer {
    metrics: Arc<Metrics>,
    files: Files<File>,
    interval: Duration,
    shared: Arc<Shared>,
}

impl Writer {
    fn run(mut self) {
        let mut next = Instant::now() + self.interval;
        loop {
            // Asked before the snapshot: what was told before the end is in the last line.
            let stop = self.shared.stop.load(Ordering::Acquire);
            let now = Instant::now();
            if now >= next || stop {
                if let Err((kind, error)) = self.files.write(&self.metrics.snapshot())
                    && self.shared.failures.record(1, &error)
                {
                    tracing::warn!("{kind} metrics cannot be written: {error}; further failures are only counted");
                }
                // What a slow disk has missed is not made up for.
                next = now.max(next) + self.interval;
            }
            if stop {
                return;
            }
            std::thread::park_timeout(next.saturating_duration_since(Instant::now()));
        }
    }
}

struct Files<F> {
    latency: Lines<F>,
    memory: Lines<F>,
}

impl<F: Cut> Files<F> {
    /// A line in each. One that fails does not keep the other from being written.
    fn write(&mut self, snapshot: &Snapshot) -> std::result::Result<(), (&'static str, io::Error)> {
        let latency = self.latency.write(&timed(snapshot, build_latency_rows(snapshot)));
        let memory = self.memory.write(&timed(snapshot, build_memory_rows(snapshot)));
        latency.map_err(|error| ("latency", error))?;
        memory.map_err(|error| ("memory", error))
    }
}

/// A row as it stands in a file.
#[derive(Serialize)]
struct Timed<R> {
    time: f64,
    #[serde(flatten)]
    row: R,
}

fn timed<R>(snapshot: &Snapshot, rows: Vec<R>) -> Vec<Timed<R>> {
    rows.into_iter().map(|row| Timed { time: snapshot.time, row }).collect()
}

/// Something to write to whose end can be taken back.
trait Cut: Write {
    /// Goes back to the first `len` bytes.
    fn cut(&mut self, len: u64) -> io::Result<()>;
}

impl Cut for File {
    fn cut(&mut self, len: u64) -> io::Result<()> {
        self.set_len(len)?;
        self.seek(SeekFrom::Start(len)).map(|_| ())
    }
}

/// Whole lines.
struct Lines<F> {
    file: F,
    /// Bytes of whole lines.
    len: u64,
    /// Whether a part of a line may stand behind them.
    torn: bool,
}

impl<F: Cut> Lines<F> {
    fn new(file: F) -> Lines<F> {
        Lines { file, len: 0, torn: false }
    }

    fn write(&mut self, value: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        if self.torn {
            self.file.cut(self.len)?;
            self.torn = false;
        }
        let written = self.file.write_all(&line).and_then(|()| self.file.flush());
        match written {
            Ok(()) => self.len += line.len() as u64,
            // If it cannot be cut off now, it is before the next line.
            Err(_) => self.torn = self.file.cut(self.len).is_err(),
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instrument::metrics::MetricsOptions;

    /// A disk with room for so many bytes.
    struct Disk {
        bytes: Vec<u8>,
        room: usize,
        cuts: bool,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let len = bytes.len().min(self.room - self.bytes.len());
            if len == 0 {
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            self.bytes.extend_from_slice(&bytes[..len]);
            Ok(len)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Cut for Disk {
        fn cut(&mut self, len: u64) -> io::Result<()> {
            match self.cuts {
                true => self.bytes.truncate(len as usize),
                false => return Err(io::Error::from(io::ErrorKind::StorageFull)),
            }
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_leaves_whole_lines_and_room_later_is_used() {
        for cuts in [true, false] {
            let mut lines = Lines::new(Disk { bytes: Vec::new(), room: 20, cuts });
            lines.write(&[1, 2, 3]).unwrap();
            lines.write(&[4, 5, 6]).unwrap();
            assert_eq!(lines.write(&[7, 8, 9]).unwrap_err().kind(), io::ErrorKind::StorageFull);
            assert_eq!(lines.torn, !cuts, "what could not be cut off is remembered");
            lines.file.cuts = true;
            lines.file.room = 100;
            lines.write(&[10]).unwrap();
            assert_eq!(String::from_utf8(lines.file.bytes).unwrap(), "[1,2,3]\n[4,5,6]\n[10]\n");
        }
    }

    #[test]
    fn one_file_that_fails_does_not_keep_the_other_from_its_line() {
        let disk = |room| Lines::new(Disk { bytes: Vec::new(), room, cuts: true });
        let mut files = Files { latency: disk(5), memory: disk(100_000) };
        let (kind, error) = files.write(&Snapshot::default()).unwrap_err();
        assert_eq!((kind, error.kind()), ("latency", io::ErrorKind::StorageFull));
        assert!(files.latency.file.bytes.is_empty() && files.memory.file.bytes.ends_with(b"]\n"));
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_at_the_start() {
        let (_collector, metrics) = Metrics::start(MetricsOptions::default()).unwrap();
        let metrics = Arc::new(metrics);
        let file = tempfile::NamedTempFile::new().unwrap();
        let options = MetricsLogOptions { directory: file.path().join("logs"), ..MetricsLogOptions::default() };
        let message = MetricsLog::start(metrics.clone(), &options).err().expect("refused").to_string();
        assert!(message.contains("logs: cannot be made for metrics logs"), "{message}");
        let options = MetricsLogOptions { interval: Duration::ZERO, ..MetricsLogOptions::default() };
        assert!(MetricsLog::start(metrics, &options).err().expect("refused").to_string().contains("`interval`"));
    }
}
