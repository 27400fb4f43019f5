//! The encoder over a GPU, through candle's command encoder.
//!
//! candle's buffers are not tracked by Metal and its encoder is concurrent: two dispatches run at once unless a barrier
//! lies between them. candle sets that barrier when a dispatch reads what one before it wrote, and knows so only from how
//! buffers were bound. So inputs and outputs are bound as such here, and a region that is read and written as an output.
//!
//! One thread submits at a time: the encoder borrows candle's command encoder, which is locked while it is held. Nothing
//! may be allocated meanwhile, so whoever encodes a step has its buffers before it begins. That lock is let go between
//! steps, and candle forgets what other threads have in flight when one has waited for its own: threads that share a device
//! take turns from the first command until they have waited, which is the caller's to see to.

use std::collections::HashMap;

pub use candle_metal_kernels::metal::Buffer;
use candle_metal_kernels::metal::{ComputeCommandEncoder, ComputePipeline, ConstantValues, Device, Library, Value};
pub use objc2::rc::autoreleasepool;
use objc2_metal::{MTLCompileOptions, MTLDevice, MTLLanguageVersion, MTLMathMode, MTLSize};

use crate::encoder::{Argument, Constant, Dispatch, Encoder};
use crate::error::{Error, Result};
use crate::library::KernelLibrary;

type PipelineKey = (&'static str, String, Vec<(u16, Constant)>);

/// Compiled kernels of one device, by library, name and function constants. A kernel is compiled when it is first asked
/// for; whoever must not wait then asks before, see [`Pipelines::prepare`].
pub struct Pipelines {
    device: Device,
    libraries: HashMap<&'static str, Library>,
    pipelines: HashMap<PipelineKey, ComputePipeline>,
}

impl Pipelines {
    /// None yet.
    pub fn new(device: Device) -> Self {
        Pipelines { device, libraries: HashMap::new(), pipelines: HashMap::new() }
    }

    /// Kernels compiled so far.
    pub fn len(&self) -> usize {
        self.pipelines.len()
    }

    /// Whether none is compiled yet.
    pub fn is_empty(&self) -> bool {
        self.pipelines.is_empty()
    }

    /// Compiles what the dispatch needs.
    pub fn prepare<B>(&mut self, dispatch: &Dispatch<'_, B>) -> Result<()> {
        self.pipeline(dispatch).map(|_| ())
    }

    fn pipeline<B>(&mut self, dispatch: &Dispatch<'_, B>) -> Result<&ComputePipeline> {
        let key = (dispatch.library.name, dispatch.kernel.clone(), dispatch.constants.clone());
        if !self.pipelines.contains_key(&key) {
            let pipeline = self.compile(dispatch).map_err(|message| gpu(dispatch, message))?;
            self.pipelines.insert(key.clone(), pipeline);
        }
        Ok(&self.pipelines[&key])
    }

    fn compile<B>(&mut self, dispatch: &Dispatch<'_, B>) -> std::result::Result<ComputePipeline, String> {
        let constants = dispatch.constants.iter().map(|(index, constant)| {
            let value = match constant {
                Constant::Bool(value) => Value::Bool(*value),
                Constant::Ushort(value) => Value::U16(*value),
            };
            (usize::from(*index), value)
        });
        let constants = ConstantValues::new(constants.collect());
        let device = self.device.clone();
        let library = self.library(dispatch.library)?;
        let function = library.get_function(&dispatch.kernel, Some(&constants)).map_err(|e| e.to_string())?;
        device.new_compute_pipeline_state_with_function(&function).map_err(|e| e.to_string())
    }

    fn library(&mut self, library: &'static KernelLibrary) -> std::result::Result<&Library, String> {
        if !self.libraries.contains_key(library.name) {
            let compiled = match (library.metallib, library.source) {
                (Some(metallib), _) => {
                    let data = dispatch2::DispatchData::from_static_bytes(metallib);
                    let raw = self.device.as_ref().newLibraryWithData_error(&data).map_err(|e| e.to_string())?;
                    Library::new(raw)
                }
                (None, Some(source)) => {
                    self.device.new_library_with_source(source, Some(&compile_options())).map_err(|e| e.to_string())?
                }
                (None, None) => return Err("the kernel was not built into this program".into()),
            };
            self.libraries.insert(library.name, compiled);
        }
        Ok(&self.libraries[library.name])
    }
}

/// MSL 3.0, and arithmetic that keeps infinities and NaN what they are: softmax begins with minus infinity.
fn compile_options() -> objc2::rc::Retained<MTLCompileOptions> {
    let options = MTLCompileOptions::new();
    options.setLanguageVersion(MTLLanguageVersion::Version3_0);
    if objc2::available!(macos = 15) {
        options.setMathMode(MTLMathMode::Relaxed);
    } else {
        // What newer systems call the safe mode; the relaxed one does not exist there.
        #[allow(deprecated)]
        options.setFastMathEnabled(false);
    }
    options
}

fn gpu<B>(dispatch: &Dispatch<'_, B>, message: impl std::fmt::Display) -> Error {
    Error::Gpu { kernel: dispatch.kernel.clone(), message: message.to_string() }
}

/// Encodes nothing and compiles what would be: with it, a step that is encoded once costs the ones after it no compiling.
pub struct Compile<'a>(pub &'a mut Pipelines);

impl Encoder for Compile<'_> {
    type Buffer = Buffer;

    fn dispatch(&mut self, dispatch: &Dispatch<'_, Buffer>) -> Result<()> {
        self.0.prepare(dispatch)
    }
}

/// Encodes into candle's command encoder.
pub struct MetalEncoder<'a> {
    /// candle's encoder; its guard dereferences to one.
    pub commands: &'a ComputeCommandEncoder,
    /// The device's kernels.
    pub pipelines: &'a mut Pipelines,
}

impl Encoder for MetalEncoder<'_> {
    type Buffer = Buffer;

    fn dispatch(&mut self, dispatch: &Dispatch<'_, Buffer>) -> Result<()> {
        let pipeline = self.pipelines.pipeline(dispatch)?;
        let threads: u32 = dispatch.threads.iter().product();
        let most = pipeline.max_total_threads_per_threadgroup();
        if threads as usize > most {
            return Err(gpu(
                dispatch,
                format!("{threads} threads in a threadgroup, this GPU runs {most} of this kernel"),
            ));
        }
        self.commands.set_compute_pipeline_state(pipeline);
        for (index, argument) in &dispatch.arguments {
            let index = *index as usize;
            match argument {
                Argument::Bytes(bytes) => {
                    self.commands.set_bytes_directly(index, bytes.len(), bytes.as_ptr().cast());
                }
                Argument::Read(region) | Argument::Write(region) | Argument::Update(region, _) => {
                    let (end, len) = (region.offset.saturating_add(region.span), region.buffer.length());
                    if end > len {
                        let bound = format!("bytes {}..{end} of a buffer of {len} are bound", region.offset);
                        return Err(gpu(dispatch, bound));
                    }
                    match argument {
                        Argument::Read(_) => {
                            self.commands.set_input_buffer(index, Some(region.buffer), region.offset);
                        }
                        _ => self.commands.set_output_buffer(index, Some(region.buffer), region.offset),
                    }
                }
            }
        }
        for (index, bytes) in &dispatch.threadgroup_memory {
            self.commands.set_threadgroup_memory_length(*index as usize, *bytes);
        }
        let size = |[width, height, depth]: [u32; 3]| MTLSize {
            width: width as usize,
            height: height as usize,
            depth: depth as usize,
        };
        self.commands.dispatch_thread_groups(size(dispatch.threadgroups), size(dispatch.threads));
        Ok(())
    }
}
