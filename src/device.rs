//! Devices: how they are named, opened once each, and how much memory they have.

use std::collections::BTreeMap;
use std::fmt;
use std::hint::black_box;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::kernels::pool::Pool;
use crate::kernels::simd::Isa;

/// A device as a user names it: `cpu`, `cpu@threads=2`, `cuda:0`, `metal:0`.
///
/// ```
/// use candle_pipeline::DeviceSpec;
/// let devices = DeviceSpec::parse_list("cuda:0,cpu@threads=4").unwrap();
/// assert_eq!(devices, [DeviceSpec::Cuda(0), DeviceSpec::Cpu { threads: Some(4) }]);
/// assert_eq!(devices[1].to_string(), "cpu@threads=4");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DeviceSpec {
    /// The processor. Stages without a thread count share one pool over all cores; a stage with one has its own pool.
    Cpu {
        /// Threads of the stage's own pool.
        threads: Option<usize>,
    },
    /// An NVIDIA GPU by its ordinal.
    Cuda(usize),
    /// An Apple GPU by its ordinal.
    Metal(usize),
}

impl DeviceSpec {
    /// The processor with the pool that all such stages share.
    pub const CPU: DeviceSpec = DeviceSpec::Cpu { threads: None };

    /// Parses names separated by commas.
    pub fn parse_list(list: &str) -> Result<Vec<DeviceSpec>> {
        list.split(',').map(|name| name.trim().parse()).collect()
    }

    /// The kind of device without its number. Stages of one kind compute bit-equal results.
    pub fn kind(&self) -> &'static str {
        match self {
            DeviceSpec::Cpu { .. } => "cpu",
            DeviceSpec::Cuda(_) => "cuda",
            DeviceSpec::Metal(_) => "metal",
        }
    }

    /// What holds the memory: all CPU stages share the host's.
    pub(crate) fn physical(&self) -> DeviceSpec {
        match self {
            DeviceSpec::Cpu { .. } => DeviceSpec::CPU,
            gpu => *gpu,
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceSpec::Cpu { threads: None } => f.write_str("cpu"),
            DeviceSpec::Cpu { threads: Some(n) } => write!(f, "cpu@threads={n}"),
            DeviceSpec::Cuda(n) => write!(f, "cuda:{n}"),
            DeviceSpec::Metal(n) => write!(f, "metal:{n}"),
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let refuse = |why: &str| {
            Err(Error::option("devices", format!("`{name}` {why}; write cpu, cpu@threads=N, cuda:N or metal:N")))
        };
        if name == "cpu" {
            return Ok(DeviceSpec::CPU);
        }
        if let Some(threads) = name.strip_prefix("cpu@threads=") {
            return match threads.parse() {
                Ok(threads @ 1..=1024) => Ok(DeviceSpec::Cpu { threads: Some(threads) }),
                _ => refuse("needs a thread count from 1 to 1024"),
            };
        }
        let (kind, ordinal) = name.split_once(':').unwrap_or((name, "0"));
        match (kind, ordinal.parse()) {
            ("cuda", Ok(ordinal)) => Ok(DeviceSpec::Cuda(ordinal)),
            ("metal", Ok(ordinal)) => Ok(DeviceSpec::Metal(ordinal)),
            ("cuda" | "metal", Err(_)) => refuse("has a device number that is not one"),
            _ => refuse("is no device"),
        }
    }
}

/// What a CPU stage computes with.
#[derive(Clone)]
pub struct Cpu {
    /// Its threads.
    pub pool: Arc<Pool>,
    /// Its instructions.
    pub isa: Isa,
}

/// Whose work a device takes now: one thread's at a time, where several stages and links use it.
///
/// An Apple GPU has turns. Candle's Metal device keeps one list of commands for all threads, and one table of what its
/// encoders have written, which is emptied as soon as a thread has waited for its own commands: those of another thread
/// would then no longer be waited for, and a thread that waits may find that another has taken the commands it waits for.
/// So a thread has the turn from its first command until all of them are done or, where nobody reads what they write but
/// later commands, are in the list. Stages that share a GPU share its time in any case.
///
/// A CUDA device has none: the commands of its one stream run in the order in which they came, from whatever thread. Nor
/// has a CPU, whose pools serve one caller after the other.
#[derive(Debug, Clone, Default)]
pub struct Turns(Option<Arc<Mutex<()>>>);

/// Holds a device's turn until it is dropped.
#[must_use = "the turn ends when this is dropped"]
pub struct Turn<'a> {
    _turn: Option<MutexGuard<'a, ()>>,
}

impl Turns {
    /// Those of a device that has just been opened.
    pub fn of(spec: DeviceSpec) -> Turns {
        Turns(matches!(spec, DeviceSpec::Metal(_)).then(Arc::default))
    }

    /// Waits for the turn. Whoever has it waits for no other device's, and for no other stage.
    pub fn take(&self) -> Turn<'_> {
        // What a thread that panicked has left in the list runs before what the next one adds.
        Turn { _turn: self.0.as_deref().map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner)) }
    }
}

/// A device that has been opened: candle's handle, and for a CPU the stage's threads.
#[derive(Clone)]
pub struct OpenDevice {
    /// As the user named it.
    pub spec: DeviceSpec,
    /// Candle's handle; clones of it are the same device, opening twice would not be.
    pub device: Device,
    /// Threads and instructions of a CPU stage, `None` on a GPU.
    pub cpu: Option<Cpu>,
    /// Shared by all that use the device.
    pub turns: Turns,
}

impl fmt::Debug for OpenDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OpenDevice({})", self.spec)
    }
}

impl OpenDevice {
    /// Opens the devices of all stages: one candle device for each physical one, one shared thread pool for the stages
    /// named plain `cpu`, and a pool of its own for each `cpu@threads=N`. CPU stages compute with `isa`. A device that is
    /// not there is an error.
    pub fn open_all(specs: &[DeviceSpec], isa: Isa) -> Result<Vec<OpenDevice>> {
        let mut gpus: BTreeMap<DeviceSpec, OpenDevice> = BTreeMap::new();
        let mut shared_pool: Option<Arc<Pool>> = None;
        let mut open = Vec::with_capacity(specs.len());
        warn_of_threads(specs);
        for &spec in specs {
            let opened = match spec {
                DeviceSpec::Cpu { threads } => {
                    let pool = match (threads, &shared_pool) {
                        (None, Some(pool)) => pool.clone(),
                        (None, None) => shared_pool.insert(new_pool(available_threads())?).clone(),
                        (Some(threads), _) => new_pool(threads)?,
                    };
                    OpenDevice { spec, device: Device::Cpu, cpu: Some(Cpu { pool, isa }), turns: Turns::of(spec) }
                }
                gpu => match gpus.get(&gpu) {
                    Some(opened) => opened.clone(),
                    None => {
                        let opened = OpenDevice { spec, device: open_gpu(gpu)?, cpu: None, turns: Turns::of(gpu) };
                        gpus.entry(gpu).or_insert(opened).clone()
                    }
                },
            };
            open.push(opened);
        }
        Ok(open)
    }
}

/// The devices that can be opened on this machine with the features of this build.
pub fn present_devices() -> Vec<DeviceSpec> {
    let mut present = vec![DeviceSpec::CPU];
    present.extend((0..cuda_count()).map(DeviceSpec::Cuda));
    present.extend((0..metal_count()).map(DeviceSpec::Metal));
    present
}

/// Bytes that can still be allocated on the device now.
pub fn free_memory(spec: DeviceSpec) -> Result<u64> {
    match spec {
        DeviceSpec::Cpu { .. } => {
            let mut system = sysinfo::System::new();
            system.refresh_memory();
            // A container's limit counts where it is lower than the machine's memory. Its file cache is not in use: that
            // is where a model that was just downloaded lies.
            let limit = system.cgroup_limits().map(|limits| limits.total_memory.saturating_sub(limits.rss));
            Ok(limit.unwrap_or(u64::MAX).min(system.available_memory()))
        }
        DeviceSpec::Cuda(ordinal) => cuda_free_memory(ordinal),
        DeviceSpec::Metal(ordinal) => metal_free_memory(ordinal),
    }
}

/// The hardware behind a name, to tell what was measured on one machine from what was on another.
pub fn hardware_name(spec: DeviceSpec) -> String {
    let model = match spec {
        DeviceSpec::Cpu { threads } => {
            let mut system = sysinfo::System::new();
            system.refresh_cpu_list(sysinfo::CpuRefreshKind::nothing());
            let brand = system.cpus().first().map_or("", |cpu| cpu.brand().trim()).to_string();
            let cores = available_threads();
            return format!("cpu {brand}, {} threads on {cores} cores", threads.unwrap_or(cores));
        }
        DeviceSpec::Cuda(ordinal) => cuda_name(ordinal),
        DeviceSpec::Metal(ordinal) => metal_name(ordinal),
    };
    format!("{} {}", spec.kind(), model.unwrap_or_else(|| spec.to_string()))
}

/// Bytes that are read to find out how fast: far more than last-level caches hold, so that the memory is measured.
const READ_BYTES: usize = 512 << 20;

/// Bytes a second that a device reads from its memory, measured now, in about half a second: on a CPU its threads each sum
/// a part of a large buffer; on a GPU the device sums one large F32 tensor, launching and fetching the sum included. The
/// median of several passes. No model whose weights are all read for each token can decode faster than this rate over
/// their bytes.
///
/// It takes 512 MiB of the device's memory for as long, or an eighth of what is free if that is less; with less than that
/// it measures caches.
pub fn read_bandwidth(device: &OpenDevice) -> Result<f64> {
    let bytes = READ_BYTES.min(free_memory(device.spec)? as usize / 8).max(1 << 20);
    let mut rates = match &device.cpu {
        Some(cpu) => cpu_read_rates(&cpu.pool, bytes, READ_PASSES),
        None => gpu_read_rates(&device.device, bytes)?,
    };
    rates.sort_by(f64::total_cmp);
    Ok(rates[rates.len() / 2])
}

/// Times that [`read_bandwidth`] reads, after one that is not counted.
const READ_PASSES: usize = 7;

/// Bytes a second in each of `passes` in which the threads of a pool sum `bytes` of a buffer.
pub fn cpu_read_rates(pool: &Pool, bytes: usize, passes: usize) -> Vec<f64> {
    let words = bytes / size_of::<u64>() / pool.threads();
    let parts: Vec<Mutex<Vec<u64>>> = (0..pool.threads()).map(|_| Mutex::default()).collect();
    let part = |index: usize| parts[index].lock().unwrap_or_else(PoisonError::into_inner);
    // Each thread fills what it will read, so that the pages are there and near to it.
    pool.run(&|index| part(index).resize(words, 1));
    let bytes = (words * size_of::<u64>() * parts.len()) as f64;
    let pass = |_| {
        let began = Instant::now();
        pool.run(&|index| {
            black_box(sum(&part(index)));
        });
        bytes / began.elapsed().as_secs_f64()
    };
    (0..=passes).map(pass).skip(1).collect()
}

/// Independent sums side by side: the compiler keeps them in vector registers, and no addition waits for another.
fn sum(words: &[u64]) -> u64 {
    let (blocks, rest) = words.as_chunks::<32>();
    let mut sums = [0u64; 32];
    for block in blocks {
        for (sum, word) in sums.iter_mut().zip(block) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().chain(rest).fold(0, |all, word| all.wrapping_add(*word))
}

fn gpu_read_rates(device: &Device, bytes: usize) -> Result<Vec<f64>> {
    // Rows of sums first, since one sum over all is work for a single block of threads.
    const ROW: usize = 1 << 16;
    let rows = bytes / size_of::<f32>() / ROW;
    let values = Tensor::ones((rows.max(1), ROW), DType::F32, device)?;
    let bytes = (values.elem_count() * size_of::<f32>()) as f64;
    let pass = |_| {
        device.synchronize()?;
        let began = Instant::now();
        values.sum(1)?.sum_all()?.to_scalar::<f32>()?;
        Ok(bytes / began.elapsed().as_secs_f64())
    };
    (0..=READ_PASSES).map(pass).skip(1).collect()
}

/// Cores that this process may run on.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Threads spin between the passes of a step, so more of them than cores take time from each other.
fn warn_of_threads(specs: &[DeviceSpec]) {
    let cores = available_threads();
    let mut crowded: Vec<&DeviceSpec> =
        specs.iter().filter(|spec| matches!(spec, DeviceSpec::Cpu { threads: Some(n) } if *n > cores)).collect();
    crowded.dedup();
    for spec in crowded {
        tracing::warn!(
            "{spec}: this process may use {cores} cores, and more threads than cores are slower; write cpu, or \
             cpu@threads={cores}"
        );
    }
}

fn new_pool(threads: usize) -> Result<Arc<Pool>> {
    Pool::new(threads)
        .map(Arc::new)
        .map_err(|e| Error::option("devices", format!("cannot start {threads} CPU threads: {e}")))
}

fn open_gpu(spec: DeviceSpec) -> Result<Device> {
    let unavailable = |reason: String| {
        let present: Vec<String> = present_devices().iter().map(DeviceSpec::to_string).collect();
        Error::DeviceUnavailable { device: spec.to_string(), reason, present: present.join(", ") }
    };
    match spec {
        DeviceSpec::Cpu { .. } => Ok(Device::Cpu),
        DeviceSpec::Cuda(_) if cfg!(not(feature = "cuda")) => {
            Err(unavailable("this build lacks the feature `cuda`".into()))
        }
        DeviceSpec::Metal(_) if cfg!(not(all(feature = "metal", target_os = "macos"))) => {
            Err(unavailable("this build lacks the feature `metal` (macOS only)".into()))
        }
        // A stream of its own: candle's default one belongs to the thread that uses it, and the stage is another thread.
        DeviceSpec::Cuda(ordinal) => {
            if ordinal >= cuda_count() {
                return Err(unavailable(format!("there are {} CUDA devices", cuda_count())));
            }
            Device::new_cuda_with_stream(ordinal).map_err(|e| unavailable(e.to_string()))
        }
        DeviceSpec::Metal(ordinal) => {
            if ordinal >= metal_count() {
                return Err(unavailable(format!("there are {} Metal devices", metal_count())));
            }
            Device::new_metal(ordinal).map_err(|e| unavailable(e.to_string()))
        }
    }
}

#[cfg(feature = "cuda")]
fn cuda_count() -> usize {
    // Loading the driver library panics where there is none; a machine without a driver has no device.
    let count = std::panic::catch_unwind(candle_core::cuda_backend::cudarc::driver::CudaContext::device_count);
    count.ok().and_then(|count| count.ok()).map_or(0, |count| count.max(0) as usize)
}

#[cfg(not(feature = "cuda"))]
fn cuda_count() -> usize {
    0
}

#[cfg(feature = "cuda")]
fn cuda_free_memory(ordinal: usize) -> Result<u64> {
    let context = candle_core::cuda_backend::cudarc::driver::CudaContext::new(ordinal);
    let free = context.and_then(|context| context.mem_get_info());
    free.map(|(free, _total)| free as u64).map_err(|e| Error::Tensors(format!("memory of cuda:{ordinal}: {e}")))
}

#[cfg(not(feature = "cuda"))]
fn cuda_free_memory(_ordinal: usize) -> Result<u64> {
    Ok(0)
}

#[cfg(feature = "cuda")]
fn cuda_name(ordinal: usize) -> Option<String> {
    candle_core::cuda_backend::cudarc::driver::CudaContext::new(ordinal).and_then(|context| context.name()).ok()
}

#[cfg(not(feature = "cuda"))]
fn cuda_name(_ordinal: usize) -> Option<String> {
    None
}

#[cfg(all(feature = "metal", target_os = "macos"))]
fn metal_count() -> usize {
    metal_ext::device::count()
}

#[cfg(not(all(feature = "metal", target_os = "macos")))]
fn metal_count() -> usize {
    0
}

#[cfg(all(feature = "metal", target_os = "macos"))]
fn metal_free_memory(ordinal: usize) -> Result<u64> {
    Ok(metal_ext::device::free_memory(ordinal).unwrap_or(0))
}

#[cfg(not(all(feature = "metal", target_os = "macos")))]
fn metal_free_memory(_ordinal: usize) -> Result<u64> {
    Ok(0)
}

#[cfg(all(feature = "metal", target_os = "macos"))]
fn metal_name(ordinal: usize) -> Option<String> {
    metal_ext::device::name(ordinal)
}

#[cfg(not(all(feature = "metal", target_os = "macos")))]
fn metal_name(_ordinal: usize) -> Option<String> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for name in ["cpu", "cpu@threads=3", "cuda:1", "metal:0"] {
            assert_eq!(name.parse::<DeviceSpec>().unwrap().to_string(), name);
        }
        assert_eq!("cuda".parse::<DeviceSpec>().unwrap(), DeviceSpec::Cuda(0));
    }

    #[test]
    fn bad_names_are_refused_with_the_good_ones() {
        for name in ["", "gpu", "cpu:", "cpu@threads=0", "cpu@threads=x", "cuda:-1", "metal:x", "cpu@cores=2"] {
            let message = name.parse::<DeviceSpec>().unwrap_err().to_string();
            assert!(message.contains(&format!("`{name}`")) && message.contains("cuda:N"), "{message}");
        }
    }

    #[test]
    fn an_absent_device_is_an_error_that_lists_those_present() {
        let absent = [DeviceSpec::Cuda(99), DeviceSpec::Metal(99)];
        for spec in absent {
            let message = OpenDevice::open_all(&[DeviceSpec::CPU, spec], Isa::detect()).unwrap_err().to_string();
            assert!(message.contains(&spec.to_string()) && message.contains("present here: cpu"), "{message}");
        }
    }

    #[test]
    fn plain_cpu_stages_share_a_pool_and_counted_ones_do_not() {
        let specs = DeviceSpec::parse_list("cpu,cpu,cpu@threads=1,cpu@threads=1").unwrap();
        let open = OpenDevice::open_all(&specs, Isa::detect()).unwrap();
        let pool = |i: usize| &open[i].cpu.as_ref().unwrap().pool;
        assert!(Arc::ptr_eq(pool(0), pool(1)));
        assert!(!Arc::ptr_eq(pool(2), pool(3)));
        assert_eq!(pool(2).threads(), 1);
    }

    #[test]
    fn an_apple_gpu_has_one_turn_for_all_threads_and_other_devices_need_none() {
        let busy = |turns: &Turns| turns.0.as_ref().map(|turn| turn.try_lock().is_err());
        let turns = Turns::of(DeviceSpec::Metal(0));
        let (shared, other) = (turns.clone(), Turns::of(DeviceSpec::Metal(1)));
        let turn = turns.take();
        assert_eq!((busy(&shared), busy(&other)), (Some(true), Some(false)));
        drop(turn);
        assert_eq!(busy(&shared), Some(false));
        for spec in [DeviceSpec::CPU, DeviceSpec::Cpu { threads: Some(2) }, DeviceSpec::Cuda(0)] {
            let turns = Turns::of(spec);
            let _both = (turns.take(), turns.take());
            assert_eq!(busy(&turns), None, "{spec}");
        }
    }

    #[test]
    fn a_turn_outlives_a_panic() {
        let turns = Turns::of(DeviceSpec::Metal(0));
        let shared = turns.clone();
        let panicked = std::thread::spawn(move || {
            let _turn = shared.take();
            panic!("the test wants this panic");
        });
        assert!(panicked.join().is_err());
        let _turn = turns.take();
    }

    #[test]
    fn hardware_is_told_apart_by_its_threads() {
        let name = |name: &str| hardware_name(name.parse().unwrap());
        assert_eq!(name("cpu"), name("cpu"));
        assert_ne!(name("cpu@threads=77"), name("cpu@threads=78"));
        assert_ne!(name("cpu"), name("cuda:0"));
    }

    #[test]
    fn a_device_reads_its_memory_at_a_rate_that_memory_has() {
        let open = OpenDevice::open_all(&[DeviceSpec::Cpu { threads: Some(2) }], Isa::detect()).unwrap();
        let rate = read_bandwidth(&open[0]).unwrap();
        assert!((1e8..1e13).contains(&rate), "{rate}");
        assert_eq!(sum(&(0..1000).collect::<Vec<_>>()), 499_500);
        // The way of GPUs, on candle's CPU.
        let rates = gpu_read_rates(&Device::Cpu, 8 << 20).unwrap();
        assert!(rates.len() == READ_PASSES && rates.iter().all(|rate| (1e6..1e13).contains(rate)), "{rates:?}");
    }

    #[test]
    fn the_host_has_free_memory() {
        assert!(free_memory(DeviceSpec::CPU).unwrap() > 1 << 20);
    }
}
