//! Writes that failed, for whoever has to report them after the writer is gone.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// Counts what could not be written to a file, and keeps the first cause. Clones share both: a program keeps one, drops
/// the writer, which writes for the last time then, and looks at it.
///
/// Writers log their first failure as a warning and go on: what is observed is not held up by its log.
#[derive(Debug, Clone, Default)]
pub struct WriteFailures(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    count: AtomicU64,
    first: OnceLock<String>,
}

/// The same handle: figures of two writers are not compared.
impl PartialEq for WriteFailures {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for WriteFailures {}

impl WriteFailures {
    /// Lines, or whole files, that were not written.
    pub fn count(&self) -> u64 {
        self.0.count.load(Ordering::Relaxed)
    }

    /// Why the first of them was not.
    pub fn first(&self) -> Option<&str> {
        self.0.first.get().map(String::as_str)
    }

    /// Counts `lost` lines. True the first time, when the writer is to log a warning.
    pub(crate) fn record(&self, lost: u64, cause: &io::Error) -> bool {
        self.0.count.fetch_add(lost, Ordering::Relaxed);
        self.0.first.set(cause.to_string()).is_ok()
    }

    /// Takes back what was counted too much.
    pub(crate) fn discount(&self, lines: u64) {
        self.0.count.fetch_sub(lines, Ordering::Relaxed);
    }
}
