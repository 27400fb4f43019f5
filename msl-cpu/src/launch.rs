//! A compiled module in this process, and its launches.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::compile::Builder;
use crate::{Error, Order, Pod, Result, Stats};

const ABI_VERSION: u32 = 2;

#[repr(C)]
struct RawKernel {
    name: *const c_char,
    file: *const c_char,
    line: c_int,
    max_threads: u32,
    thunk: *const c_void,
    params: *const c_void,
    n_params: u32,
}
#[repr(C)]
struct RawModule {
    abi_version: u32,
    checked: u32,
    kernels: *const RawKernel,
    n_kernels: u32,
    n_function_constants: u32,
    set_constant: unsafe extern "C" fn(u32, *const c_void, u32) -> c_int,
    reset_constants: unsafe extern "C" fn(),
    refresh_constants: unsafe extern "C" fn(),
}
#[repr(C)]
#[derive(Clone, Copy)]
struct RawArg {
    kind: u32, // 0 buffer, 1 bytes, 2 threadgroup length, 3 nil
    index: u32,
    writable: u32,
    skew: u32,
    ptr: *mut c_void,
    len: u64,
}
#[repr(C)]
struct RawOptions {
    flags: u32,
    order: u32,
    seed: u64,
    stack_bytes: u32,
    tg_limit: u32,
}
#[repr(C)]
struct RawDispatch {
    grid: [u32; 3],
    threadgroup: [u32; 3],
    by_threads: u32,
}
#[repr(C)]
struct RawReport {
    message: [c_char; 2048],
    counters: [u64; 8],
    tg_bytes: u32,
    checked: u32,
}
type Launch = unsafe extern "C" fn(
    *const c_char,
    *const RawArg,
    u32,
    *const RawDispatch,
    *const RawOptions,
    *mut RawReport,
) -> c_int;

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}

/// A compiled `.metal` file.
pub struct Library {
    launch: Launch,
    module: &'static RawModule,
    names: Vec<String>,
    constants: Mutex<()>, // function constants are globals of the module
}

impl Library {
    /// Compiles every kernel of the file with all checks on.
    pub fn compile(path: impl AsRef<Path>) -> Result<Library> {
        Builder::new(path).compile()
    }
    /// All host names in the file, compiled or not.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    pub(crate) fn load(so: &Path, names: Vec<String>) -> Result<Library> {
        let path = CString::new(so.to_string_lossy().as_bytes()).map_err(|e| Error(e.to_string()))?;
        // SAFETY: plain dlopen/dlsym; the object was built by us and stays loaded for good.
        unsafe {
            let h = dlopen(path.as_ptr(), 2); // RTLD_NOW | RTLD_LOCAL
            if h.is_null() {
                return Err(Error(CStr::from_ptr(dlerror()).to_string_lossy().into_owned()));
            }
            let launch = dlsym(h, c"msl_launch".as_ptr());
            let module = dlsym(h, c"msl_module_table".as_ptr()) as *const RawModule;
            if launch.is_null() || module.is_null() || (*module).abi_version != ABI_VERSION {
                return Err(Error(format!("{} is not an msl-cpu module", so.display())));
            }
            let launch = std::mem::transmute::<*mut c_void, Launch>(launch);
            Ok(Library { launch, module: &*module, names, constants: Mutex::new(()) })
        }
    }

    /// Starts describing one dispatch of `kernel`.
    pub fn encode<'a>(&'a self, kernel: &str) -> Encoder<'a> {
        Encoder {
            lib: self,
            kernel: kernel.to_string(),
            args: Vec::new(),
            values: Vec::new(),
            constants: Vec::new(),
            flags: 0,
            order: Order::Forward,
            tg_limit: 0,
            stack: 0,
            buffers: PhantomData,
        }
    }
}
// SAFETY: the module's only mutable globals are its function constants, guarded by `constants`;
// everything else the runtime keeps per thread.
unsafe impl Sync for Library {}
// SAFETY: as above; the module stays loaded for good.
unsafe impl Send for Library {}

/// The arguments of one dispatch. Buffers are copied in, and `buffer_mut`s back after a clean run.
pub struct Encoder<'a> {
    lib: &'a Library,
    kernel: String,
    args: Vec<RawArg>,
    values: Vec<Box<[u8]>>,
    constants: Vec<(u32, Vec<u8>)>,
    flags: u32,
    order: Order,
    tg_limit: u32,
    stack: u32,
    buffers: PhantomData<&'a mut ()>,
}

fn bytes_of<T: Pod>(v: &T) -> &[u8] {
    // SAFETY: Pod has no padding.
    unsafe { std::slice::from_raw_parts((v as *const T).cast(), std::mem::size_of::<T>()) }
}

impl<'a> Encoder<'a> {
    fn arg(&mut self, kind: u32, index: u32, writable: bool, ptr: *mut c_void, len: usize) {
        self.args.retain(|a| a.index != index || (a.kind == 2) != (kind == 2));
        self.args.push(RawArg { kind, index, writable: u32::from(writable), skew: 0, ptr, len: len as u64 });
    }
    /// A buffer the kernel may only read.
    pub fn buffer<T: Pod>(mut self, index: u32, data: &'a [T]) -> Self {
        self.arg(0, index, false, data.as_ptr() as *mut c_void, size_of_val(data));
        self
    }
    /// Says that the argument given last begins so many bytes past a multiple of 16, as a buffer bound with an offset does.
    /// Without it every buffer is aligned.
    pub fn skewed(mut self, bytes: usize) -> Self {
        if let Some(last) = self.args.last_mut() {
            last.skew = bytes as u32;
        }
        self
    }
    /// A buffer the kernel may write too.
    pub fn buffer_mut<T: Pod>(mut self, index: u32, data: &'a mut [T]) -> Self {
        let len = size_of_val(data);
        self.arg(0, index, true, data.as_mut_ptr().cast(), len);
        self
    }
    /// The same with bytes that are already there.
    pub fn bytes(mut self, index: u32, bytes: &[u8]) -> Self {
        self.values.push(bytes.into());
        let (ptr, len) = self.values.last().map_or((std::ptr::null(), 0), |b| (b.as_ptr(), b.len()));
        self.arg(1, index, false, ptr as *mut c_void, len);
        self
    }
    /// Metal's setBytes: a small constant argument.
    pub fn value<T: Pod>(mut self, index: u32, v: T) -> Self {
        self.values.push(bytes_of(&v).into());
        let (ptr, len) = self.values.last().map_or((std::ptr::null(), 0), |b| (b.as_ptr(), b.len()));
        self.arg(1, index, false, ptr as *mut c_void, len);
        self
    }
    /// Leaves a buffer unbound on purpose; touching it is an error.
    pub fn nil(mut self, index: u32) -> Self {
        self.arg(3, index, false, std::ptr::null_mut(), 0);
        self
    }
    /// Length of a `[[threadgroup(index)]]` argument, a multiple of 16.
    pub fn threadgroup_memory(mut self, index: u32, bytes: usize) -> Self {
        self.arg(2, index, true, std::ptr::null_mut(), bytes);
        self
    }
    /// Value of a `[[function_constant(index)]]`.
    pub fn constant<T: Pod>(mut self, index: u32, v: T) -> Self {
        self.constants.push((index, bytes_of(&v).to_vec()));
        self
    }
    /// A boolean function constant.
    pub fn constant_bool(self, index: u32, v: bool) -> Self {
        self.constant(index, u8::from(v))
    }
    /// See [`crate::allow`].
    pub fn allow(mut self, flags: u32) -> Self {
        self.flags |= flags;
        self
    }
    /// See [`Order`].
    pub fn order(mut self, order: Order) -> Self {
        self.order = order;
        self
    }
    /// Threadgroup memory that a threadgroup may use; 32 KiB unless told.
    pub fn threadgroup_limit(mut self, bytes: u32) -> Self {
        self.tg_limit = bytes;
        self
    }
    /// Stack of one GPU thread (128 KiB unless told), for kernels with big private arrays.
    pub fn stack(mut self, bytes: u32) -> Self {
        self.stack = bytes;
        self
    }
    /// Runs a grid of threadgroups.
    pub fn dispatch_threadgroups(self, groups: [u32; 3], threads: [u32; 3]) -> Result<Stats> {
        self.dispatch(groups, threads, false, self.order)
    }
    /// A grid in threads; threadgroups at its edges may be smaller.
    pub fn dispatch_threads(self, grid: [u32; 3], threads: [u32; 3]) -> Result<Stats> {
        self.dispatch(grid, threads, true, self.order)
    }
    /// Runs forward, in reverse and shuffled, and fails unless all three give the same bits.
    pub fn dispatch_in_all_orders(mut self, groups: [u32; 3], threads: [u32; 3]) -> Result<Stats> {
        let mut results: Vec<Vec<Vec<u8>>> = Vec::new();
        let mut stats = Stats::default();
        let real = self.args.clone();
        for order in [Order::Reverse, Order::Shuffled(1), Order::Forward] {
            let mut copies: Vec<Vec<u8>> = real
                .iter()
                .map(|a| match a.kind {
                    // SAFETY: the pointers come from slices that live as long as 'a.
                    0 => unsafe { std::slice::from_raw_parts(a.ptr.cast::<u8>(), a.len as usize).to_vec() },
                    _ => Vec::new(),
                })
                .collect();
            for ((arg, copy), from) in self.args.iter_mut().zip(&mut copies).zip(&real) {
                *arg = *from;
                if from.kind == 0 {
                    arg.ptr = copy.as_mut_ptr().cast();
                }
            }
            stats =
                self.dispatch(groups, threads, false, order).map_err(|e| Error(format!("{e} [order {order:?}]")))?;
            results.push(copies);
            if results.last() != results.first() {
                return Err(Error(format!(
                    "{}: the result depends on the thread schedule ({order:?} differs from Reverse)",
                    self.kernel
                )));
            }
        }
        for (from, copy) in real.iter().zip(results.last().into_iter().flatten()) {
            if from.kind == 0 && from.writable != 0 {
                // SAFETY: as above; writable arguments come from &mut slices.
                unsafe { std::ptr::copy_nonoverlapping(copy.as_ptr(), from.ptr.cast::<u8>(), copy.len()) };
            }
        }
        Ok(stats)
    }

    fn dispatch(&self, grid: [u32; 3], threadgroup: [u32; 3], by_threads: bool, order: Order) -> Result<Stats> {
        let name = CString::new(self.kernel.as_str()).map_err(|e| Error(e.to_string()))?;
        let (order, seed) = match order {
            Order::Forward => (0, 0),
            Order::Reverse => (1, 0),
            Order::Shuffled(s) => (2, s),
        };
        let options = RawOptions { flags: self.flags, order, seed, stack_bytes: self.stack, tg_limit: self.tg_limit };
        let dispatch = RawDispatch { grid, threadgroup, by_threads: u32::from(by_threads) };
        let mut report = RawReport { message: [0; 2048], counters: [0; 8], tg_bytes: 0, checked: 0 };
        let m = self.lib.module;
        let guard =
            (m.n_function_constants > 0).then(|| self.lib.constants.lock().unwrap_or_else(PoisonError::into_inner));
        // SAFETY: all pointers outlive the call; see load() for the function pointers.
        let rc = unsafe {
            if guard.is_some() {
                (m.reset_constants)();
            }
            for (index, v) in &self.constants {
                if (m.set_constant)(*index, v.as_ptr().cast(), v.len() as u32) == 0 {
                    return Err(Error(format!("{}: no {}-byte function constant {index}", self.kernel, v.len())));
                }
            }
            (m.refresh_constants)();
            (self.lib.launch)(
                name.as_ptr(),
                self.args.as_ptr(),
                self.args.len() as u32,
                &dispatch,
                &options,
                &mut report,
            )
        };
        if rc != 0 {
            // SAFETY: the runtime terminates the message.
            let msg = unsafe { CStr::from_ptr(report.message.as_ptr()) };
            return Err(Error(format!("{}: {}", self.kernel, msg.to_string_lossy())));
        }
        let c = report.counters;
        Ok(Stats {
            threads: c[0],
            switches: c[1],
            barriers: c[2],
            simd_ops: c[3],
            accesses: c[4],
            partial_simd_ops: c[5],
            inactive_reads: c[6],
            same_value_races: c[7],
            threadgroup_bytes: report.tg_bytes,
        })
    }
}
