//! metal-ext's encoder on the CPU: every dispatch of its host code runs as it would on a GPU, and is checked.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use metal_ext::encoder::{Argument, Constant, Dispatch, Region};
use metal_ext::{Error, KernelLibrary, Result};

use crate::compile::Builder;
use crate::launch::Library;
use crate::{Order, Stats, allow};

/// How closely a dispatch is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Check {
    /// Every access, in three thread orders that must give the same bits.
    AllOrders,
    /// Every access, in one thread order.
    Accesses,
    /// Barriers and divergence only, optimised: for whole models.
    Fast,
}

/// Memory for kernels, aligned as Metal's buffers are. A handle: clones are the same memory.
#[derive(Debug, Clone)]
pub struct CpuBuffer {
    // 16-byte words, for their alignment.
    words: Rc<RefCell<Vec<u128>>>,
    len: usize,
}

impl CpuBuffer {
    /// A buffer of `len` bytes that read as NaN in every float type until something is written.
    pub fn new(len: usize) -> Self {
        CpuBuffer { words: Rc::new(RefCell::new(vec![u128::MAX; len.div_ceil(16)])), len }
    }

    /// A buffer with these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let buffer = CpuBuffer::new(bytes.len());
        buffer.write(0, bytes);
        buffer
    }

    /// A buffer with these values.
    pub fn from_floats(values: &[f32]) -> Self {
        CpuBuffer::from_bytes(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Overwrites bytes from `offset` on.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let mut words = self.words.borrow_mut();
        let all = as_bytes_mut(&mut words, self.len);
        all[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        as_bytes_mut(&mut self.words.borrow_mut(), self.len).to_vec()
    }

    /// Its bytes as floats.
    pub fn floats(&self) -> Vec<f32> {
        self.bytes().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    fn pointer(&self) -> *mut u8 {
        self.words.borrow_mut().as_mut_ptr().cast()
    }
}

fn as_bytes_mut(words: &mut [u128], len: usize) -> &mut [u8] {
    // SAFETY: the words hold at least `len` initialised bytes, any bits are bytes, and the slice borrows the words.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), len) }
}

/// Runs dispatches one after the other.
pub struct CpuEncoder {
    check: Check,
    /// Counters of all dispatches.
    pub stats: Stats,
}

impl CpuEncoder {
    /// An encoder that watches so closely.
    pub fn new(check: Check) -> Self {
        CpuEncoder { check, stats: Stats::default() }
    }
}

/// Compiled kernels, one module for each: a library has many, and a test runs few.
fn compiled(library: &'static KernelLibrary, kernel: &str, check: Check) -> crate::Result<Arc<Library>> {
    type Key = (&'static str, String, bool);
    static MODULES: Mutex<Option<HashMap<Key, Arc<Library>>>> = Mutex::new(None);
    let fast = check == Check::Fast;
    let key = (library.name, kernel.to_string(), fast);
    // The lock is held while compiling, so that two tests do not compile the same thing.
    let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
    let modules = modules.get_or_insert_default();
    if let Some(module) = modules.get(&key) {
        return Ok(module.clone());
    }
    let source = library.source.ok_or_else(|| crate::Error(format!("{} comes without its source", library.name)))?;
    let builder = Builder::from_source(library.name, source).kernels(&[kernel]);
    let module = Arc::new(if fast { builder.fast() } else { builder }.compile()?);
    modules.insert(key, module.clone());
    Ok(module)
}

/// The region's bytes in its buffer.
fn range(region: &Region<'_, CpuBuffer>) -> std::result::Result<Range<usize>, String> {
    let (range, len) = (region.offset..region.offset.saturating_add(region.span), region.buffer.len());
    match range.end <= len {
        true => Ok(range),
        false => Err(format!("bytes {range:?} of a buffer of {len} are bound")),
    }
}

impl metal_ext::Encoder for CpuEncoder {
    type Buffer = CpuBuffer;

    fn dispatch(&mut self, dispatch: &Dispatch<'_, CpuBuffer>) -> Result<()> {
        let gpu = |message: String| Error::Gpu { kernel: dispatch.kernel.clone(), message };
        let library = compiled(dispatch.library, &dispatch.kernel, self.check).map_err(|e| gpu(e.to_string()))?;
        check_overlaps(dispatch).map_err(gpu)?;
        let mut encoder = library.encode(&dispatch.kernel);
        for (index, constant) in &dispatch.constants {
            encoder = match constant {
                Constant::Bool(value) => encoder.constant_bool(u32::from(*index), *value),
                Constant::Ushort(value) => encoder.constant(u32::from(*index), *value),
            };
        }
        for (index, argument) in &dispatch.arguments {
            encoder = match argument {
                Argument::Bytes(bytes) => encoder.bytes(*index, bytes),
                Argument::Read(region) => {
                    let range = range(region).map_err(gpu)?;
                    // SAFETY: the range lies within the buffer, which outlives the dispatch. Nothing else refers to it
                    // meanwhile: buffers are not shared between threads, and regions that overlap are refused above
                    // unless both are read.
                    let bytes =
                        unsafe { std::slice::from_raw_parts(region.buffer.pointer().add(range.start), range.len()) };
                    encoder.buffer(*index, bytes).skewed(range.start)
                }
                Argument::Write(region) | Argument::Update(region, _) => {
                    let range = range(region).map_err(gpu)?;
                    // SAFETY: as above.
                    let bytes = unsafe {
                        std::slice::from_raw_parts_mut(region.buffer.pointer().add(range.start), range.len())
                    };
                    encoder.buffer_mut(*index, bytes).skewed(range.start)
                }
            };
        }
        for (index, bytes) in &dispatch.threadgroup_memory {
            encoder = encoder.threadgroup_memory(*index, *bytes);
        }
        let (groups, threads) = (dispatch.threadgroups, dispatch.threads);
        let stats = match self.check {
            Check::AllOrders => encoder.dispatch_in_all_orders(groups, threads),
            Check::Accesses => encoder.order(Order::Reverse).dispatch_threadgroups(groups, threads),
            Check::Fast => encoder.allow(allow::IN_PLACE).dispatch_threadgroups(groups, threads),
        };
        let stats = stats.map_err(|e| gpu(e.to_string()))?;
        self.stats.threads += stats.threads;
        self.stats.barriers += stats.barriers;
        self.stats.simd_ops += stats.simd_ops;
        self.stats.accesses += stats.accesses;
        self.stats.same_value_races += stats.same_value_races;
        Ok(())
    }
}

/// A region that is written overlaps no other: a kernel could not tell which threads see what.
fn check_overlaps(dispatch: &Dispatch<'_, CpuBuffer>) -> std::result::Result<(), String> {
    let regions: Vec<(u32, bool, &Region<'_, CpuBuffer>)> = dispatch
        .arguments
        .iter()
        .filter_map(|(index, argument)| match argument {
            Argument::Read(region) => Some((*index, false, region)),
            Argument::Write(region) | Argument::Update(region, _) => Some((*index, true, region)),
            Argument::Bytes(_) => None,
        })
        .collect();
    for (at, (i, written, a)) in regions.iter().enumerate() {
        for (j, also_written, b) in &regions[at + 1..] {
            let (a, b) = (range(a)?, (range(b)?, b.buffer.pointer(), a.buffer.pointer()));
            let same = b.1 == b.2 && a.start < b.0.end && b.0.start < a.end;
            if same && (*written || *also_written) {
                return Err(format!("buffers {i} and {j} overlap, and one of them is written"));
            }
        }
    }
    Ok(())
}
