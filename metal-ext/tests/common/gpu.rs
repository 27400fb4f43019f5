//! The GPU of the tests: an Apple GPU on a Mac, the CPU elsewhere.

#[cfg(not(target_os = "macos"))]
pub use msl_cpu::{Check, CpuBuffer as GpuBuffer, CpuEncoder as Gpu};

/// How much further than the CPU's the results may be off: a GPU's exp, tanh and order of sums are its own.
pub const SLACK: f64 = if cfg!(target_os = "macos") { 8.0 } else { 1.0 };

#[cfg(target_os = "macos")]
pub use real::{Check, Gpu, GpuBuffer};

/// The same calls on a real GPU. It checks nothing by itself; what it adds is Apple's compiler and arithmetic.
#[cfg(target_os = "macos")]
#[allow(unsafe_code)] // reads and writes buffers that the GPU has finished with
mod real {
    use candle_metal_kernels::RESOURCE_OPTIONS;
    use candle_metal_kernels::metal::{Buffer, Commands, Device, ResidencySet};
    use metal_ext::encoder::{Argument, Dispatch, Encoder, Region};
    use metal_ext::metal::{MetalEncoder, Pipelines, autoreleasepool};
    use metal_ext::{Error, Result};

    /// How closely the CPU would watch.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Check {
        AllOrders,
        Accesses,
        Fast,
    }

    fn device() -> Device {
        Device::system_default().expect("these tests need an Apple GPU")
    }

    /// Memory that both sides see.
    #[derive(Debug, Clone)]
    pub struct GpuBuffer {
        raw: Buffer,
        len: usize,
    }

    impl GpuBuffer {
        /// Bytes that read as NaN until something is written.
        pub fn new(len: usize) -> Self {
            GpuBuffer::from_bytes(&vec![0xff; len])
        }

        pub fn from_bytes(bytes: &[u8]) -> Self {
            let raw = device().new_buffer(bytes.len().max(16), RESOURCE_OPTIONS).expect("memory");
            let buffer = GpuBuffer { raw, len: bytes.len() };
            buffer.write(0, bytes);
            buffer
        }

        pub fn from_floats(values: &[f32]) -> Self {
            GpuBuffer::from_bytes(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
        }

        pub fn len(&self) -> usize {
            self.len
        }

        pub fn write(&self, offset: usize, bytes: &[u8]) {
            assert!(offset + bytes.len() <= self.len);
            // SAFETY: within the buffer, which no dispatch uses now: each is waited for.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.raw.contents().add(offset), bytes.len()) }
        }

        pub fn bytes(&self) -> Vec<u8> {
            // SAFETY: as above.
            unsafe { std::slice::from_raw_parts(self.raw.contents(), self.len).to_vec() }
        }

        pub fn floats(&self) -> Vec<f32> {
            self.bytes().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
    }

    /// Runs each dispatch and waits for it.
    pub struct Gpu {
        commands: Commands,
        pipelines: Pipelines,
    }

    impl Gpu {
        pub fn new(_: Check) -> Self {
            let device = device();
            let queue = device.new_command_queue().expect("a queue");
            let commands = Commands::new(queue, &ResidencySet::new(&device)).expect("commands");
            Gpu { commands, pipelines: Pipelines::new(device) }
        }
    }

    fn raw<'a>(region: &Region<'a, GpuBuffer>) -> Result<Region<'a, Buffer>> {
        let (end, len) = (region.offset.saturating_add(region.span), region.buffer.len);
        if end > len {
            let message = format!("bytes {}..{end} of a buffer of {len} are bound", region.offset);
            return Err(Error::Gpu { kernel: "a kernel".into(), message });
        }
        Ok(Region { buffer: &region.buffer.raw, offset: region.offset, span: region.span, touched: region.touched })
    }

    impl Encoder for Gpu {
        type Buffer = GpuBuffer;

        fn dispatch(&mut self, dispatch: &Dispatch<'_, GpuBuffer>) -> Result<()> {
            let mut own = Dispatch::new(dispatch.library, dispatch.kernel.clone());
            own.constants.clone_from(&dispatch.constants);
            own.threadgroup_memory.clone_from(&dispatch.threadgroup_memory);
            (own.threadgroups, own.threads) = (dispatch.threadgroups, dispatch.threads);
            for (index, argument) in &dispatch.arguments {
                let argument = match argument {
                    Argument::Read(region) => Argument::Read(raw(region)?),
                    Argument::Write(region) => Argument::Write(raw(region)?),
                    Argument::Update(region, written) => Argument::Update(raw(region)?, *written),
                    Argument::Bytes(bytes) => Argument::Bytes(bytes.clone()),
                };
                own.arguments.push((*index, argument));
            }
            let failed = |message: String| Error::Gpu { kernel: dispatch.kernel.clone(), message };
            autoreleasepool(|_| {
                {
                    let guard = self.commands.command_encoder().map_err(|e| failed(e.to_string()))?;
                    let mut encoder = MetalEncoder { commands: guard.as_ref(), pipelines: &mut self.pipelines };
                    encoder.dispatch(&own)?;
                }
                self.commands.flush_and_wait().map_err(|e| failed(e.to_string()))
            })
        }
    }
}
