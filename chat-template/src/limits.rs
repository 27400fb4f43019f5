//! Bounds of compiling and rendering. A template comes from a downloaded file: it may be wrong, or made to do harm.

use std::cell::Cell;

use crate::error::{Error, Result};

/// Bounds of one template. The defaults leave room for conversations of some megabytes; what exceeds them ends in an
/// error of kind [`ErrorKind::Limit`](crate::ErrorKind::Limit) that names the field and its value, before the memory is
/// allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Length of the template's source in bytes.
    pub source: usize,
    /// Depth of the syntax tree: nested blocks, brackets, chains of operators, of filters and of attributes.
    pub nesting: usize,
    /// Work of a rendering: evaluated nodes, visited elements and, in larger units, copied bytes.
    pub steps: usize,
    /// Depth of evaluation: the syntax tree's depth, added up over calls of macros and recursive loops.
    pub recursion: usize,
    /// Depth of nested lists, tuples and maps.
    pub value_depth: usize,
    /// Size of one text in bytes.
    pub text: usize,
    /// Number of elements of one list, tuple or map.
    pub elements: usize,
    /// Memory in bytes of the values that a rendering holds at a time, beside those it was given.
    pub memory: usize,
    /// Size of the rendered text in bytes.
    pub output: usize,
}

const DEFAULT: Limits = Limits {
    source: 1 << 20,
    nesting: 400,
    steps: 20_000_000,
    recursion: 1_500,
    value_depth: 150,
    text: 32 << 20,
    elements: 1_000_000,
    memory: 112 << 20,
    output: 48 << 20,
};

impl Default for Limits {
    fn default() -> Self {
        DEFAULT
    }
}

/// Stack of the threads that compile and render: the depths that [`Limits`] allows fit with room to spare, also
/// without optimisation.
pub(crate) const STACK: usize = 32 << 20;

/// Upper bounds of the depths, whatever the caller asks for: [`STACK`] has to hold them.
const MOST_NESTING: usize = 400;
const MOST_RECURSION: usize = 1_500;
const MOST_VALUE_DEPTH: usize = 150;

impl Limits {
    pub(crate) fn within_stack(self) -> Self {
        Self {
            nesting: self.nesting.min(MOST_NESTING),
            recursion: self.recursion.min(MOST_RECURSION),
            value_depth: self.value_depth.min(MOST_VALUE_DEPTH),
            ..self
        }
    }
}

/// What the rendering on this thread may still use. Every rendering has a thread of its own, so the values that it
/// makes need no handle to be counted, not even when they are dropped.
struct Meter {
    limits: Cell<Limits>,
    steps: Cell<usize>,
    memory: Cell<usize>,
}

thread_local! {
    static METER: Meter = const {
        Meter { limits: Cell::new(DEFAULT), steps: Cell::new(DEFAULT.steps), memory: Cell::new(DEFAULT.memory) }
    };
}

/// Starts to count for the work of this thread.
pub(crate) fn start(limits: Limits) {
    METER.with(|meter| {
        meter.limits.set(limits);
        meter.steps.set(limits.steps);
        meter.memory.set(limits.memory);
    });
}

pub(crate) fn current() -> Limits {
    METER.with(|meter| meter.limits.get())
}

/// Counts work. One step is a node of the syntax tree or an element of a container.
pub(crate) fn step(count: usize) -> Result<()> {
    METER.with(|meter| match meter.steps.get().checked_sub(count) {
        Some(left) => {
            meter.steps.set(left);
            Ok(())
        }
        None => Err(Error::limit("steps", meter.limits.get().steps)),
    })
}

/// Counts the work of looking at every character of a text of so many bytes.
pub(crate) fn scan(bytes: usize) -> Result<()> {
    step(bytes / 16)
}

/// Checks the size of a text that is about to be made.
pub(crate) fn check_text(bytes: usize) -> Result<()> {
    METER.with(|meter| {
        let limit = meter.limits.get().text;
        if bytes > limit {
            return Err(Error::limit("text", limit));
        }
        match bytes > meter.memory.get() {
            true => Err(Error::limit("memory", meter.limits.get().memory)),
            false => Ok(()),
        }
    })
}

/// Checks the number of elements of a container that is about to be made, each of which takes `each` bytes.
pub(crate) fn check_elements(count: usize, each: usize) -> Result<()> {
    METER.with(|meter| {
        let limit = meter.limits.get().elements;
        if count > limit {
            return Err(Error::limit("elements", limit));
        }
        match count.saturating_mul(each) > meter.memory.get() {
            true => Err(Error::limit("memory", meter.limits.get().memory)),
            false => Ok(()),
        }
    })
}

pub(crate) fn check_value_depth(depth: usize) -> Result<()> {
    let limit = METER.with(|meter| meter.limits.get().value_depth);
    if depth > limit { Err(Error::limit("value_depth", limit)) } else { Ok(()) }
}

/// Memory taken from the rendering's share until it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Charge(usize);

impl Charge {
    /// For values that do not count: those of the template itself and of the caller.
    pub(crate) const FREE: Self = Self(0);

    pub(crate) fn new(bytes: usize) -> Result<Self> {
        METER.with(|meter| match meter.memory.get().checked_sub(bytes) {
            Some(left) => {
                meter.memory.set(left);
                Ok(Self(bytes))
            }
            None => Err(Error::limit("memory", meter.limits.get().memory)),
        })
    }

    pub(crate) fn grow(&mut self, bytes: usize) -> Result<()> {
        let mut more = Self::new(bytes)?;
        self.0 += std::mem::take(&mut more.0);
        Ok(())
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if self.0 != 0 {
            // A thread that ends drops its locals in no particular order.
            let _ = METER.try_with(|meter| meter.memory.set(meter.memory.get().saturating_add(self.0)));
        }
    }
}
