//! A matrix in one of metal-ext's packed formats on an Apple GPU, and its products.
//!
//! The packed bytes are the only copy of the weights. Where they are the file's own there is not even that: the matrix is
//! the pages of the mapped file. Up to eight rows are multiplied by metal-ext's kernel, which reads each weight once for
//! several rows; more rows are a matrix-matrix product, for which the matrix is widened and given to candle. The fused
//! decode step works on the same bytes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, MetalDevice, MetalStorage, Shape, Storage, Tensor};
use metal_ext::decode;
use metal_ext::dequantise::{LookUp, Widen};
use metal_ext::encoder::Dispatch;
use metal_ext::gemv::{Finish, Gemv, MOST_ROWS, PackedMatrix};
use metal_ext::mapped::{MappedBuffer, buffer_over};
use metal_ext::metal::{Buffer, MetalEncoder, Pipelines};
use metal_ext::pack::{Format, MatrixLayout};
use metal_ext::softmax::Softmax;
use metal_ext::{Encoder, MetalExtOptions, Region, SoftmaxBackend};

use crate::error::{Error, Result};
use crate::weights::{MappedTensor, WeightType};

/// The compiled kernels of a stage's GPU. Only the stage's thread asks for them, so the lock is never waited for.
#[derive(Clone)]
pub struct Kernels {
    device: MetalDevice,
    pipelines: Arc<Mutex<Pipelines>>,
    options: MetalExtOptions,
}

impl Kernels {
    /// Of a Metal device; `None` of any other.
    pub fn of(device: &Device, options: MetalExtOptions) -> Option<Kernels> {
        let Device::Metal(device) = device else { return None };
        let pipelines = Pipelines::new(device.metal_device().clone());
        Some(Kernels { device: device.clone(), pipelines: Arc::new(Mutex::new(pipelines)), options })
    }

    /// Whether attention over candle's tensors uses this crate's softmax.
    pub fn has_softmax(&self) -> bool {
        self.options.softmax_backend == SoftmaxBackend::Kernel
    }

    /// Softmax over the last dimension, a multiple of 4, of f32 `x`.
    pub fn softmax(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.force_contiguous()?.apply_op1_no_bwd(&SoftmaxRows(self))?)
    }

    /// The file's bytes as they lie in it; `None` where they have to be copied, for [`pack`](Self::pack) to do.
    pub fn map(&self, dtype: WeightType, stored: &MappedTensor, n: usize, k: usize) -> Result<Option<MetalMatrix>> {
        let Some(layout) = layout_of(dtype, stored.range.len(), n, k) else { return Ok(None) };
        let MappedTensor { file, range } = stored;
        let (buffer, offset) = match buffer_over(self.device.metal_device(), &layout, file, range.clone()) {
            Ok(Some(MappedBuffer { buffer, offset })) => (Arc::new(buffer), offset),
            Ok(None) => return Ok(None),
            Err(why) => {
                tracing::debug!("a {n} by {k} {dtype} matrix is copied: {why}");
                return Ok(None);
            }
        };
        let dtype = tensor_type(layout.format);
        let size = dtype.size_in_bytes();
        let elements = buffer.length() / size;
        let storage = MetalStorage::new(buffer.clone(), self.device.clone(), elements, dtype);
        let pages = Tensor::from_storage(Storage::Metal(storage), elements, BackpropOp::none(), false);
        let tensor = pages.narrow(0, offset / size, layout.bytes / size)?;
        let tensor = if dtype == DType::U8 { tensor } else { tensor.reshape((n, k))? };
        let resident = Some(Resident::new(&self.device, buffer));
        Ok(Some(MetalMatrix { layout, tensor, kernels: self.clone(), _resident: resident }))
    }

    /// Packs the file's bytes into GPU memory; `None` where no kernel reads their type.
    pub fn pack(&self, dtype: WeightType, bytes: &[u8], n: usize, k: usize) -> Result<Option<MetalMatrix>> {
        let Some(layout) = layout_of(dtype, bytes.len(), n, k) else { return Ok(None) };
        let device = Device::Metal(self.device.clone());
        let tensor = match (tensor_type(layout.format), layout.is_stored_order()) {
            (DType::U8, true) => Tensor::from_raw_buffer(bytes, DType::U8, &[bytes.len()], &device)?,
            (dense, true) => Tensor::from_raw_buffer(bytes, dense, &[n, k], &device)?,
            (_, false) => {
                let mut packed = vec![0; layout.bytes];
                layout.pack(bytes, &mut packed).map_err(gpu)?;
                Tensor::from_raw_buffer(&packed, DType::U8, &[layout.bytes], &device)?
            }
        };
        Ok(Some(MetalMatrix { layout, tensor, kernels: self.clone(), _resident: None }))
    }

    /// Encodes with the device's command encoder, which is held meanwhile: nothing may be allocated in `encode`.
    pub fn encode<T>(
        &self,
        encode: impl FnOnce(&mut MetalEncoder<'_>) -> metal_ext::Result<T>,
    ) -> candle_core::Result<T> {
        let commands = self.device.command_encoder()?;
        let mut pipelines = self.pipelines();
        let mut encoder = MetalEncoder { commands: commands.as_ref(), pipelines: &mut pipelines };
        encode(&mut encoder).map_err(candle_core::Error::wrap)
    }

    /// The device.
    pub fn device(&self) -> &MetalDevice {
        &self.device
    }

    /// The compiled kernels.
    pub fn pipelines(&self) -> MutexGuard<'_, Pipelines> {
        self.pipelines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dispatch(&self, dispatch: &Dispatch<'_, Buffer>) -> candle_core::Result<()> {
        self.encode(|encoder| encoder.dispatch(dispatch))
    }
}

/// The layout of a matrix that is stored in so many bytes; `None` where no kernel reads it.
fn layout_of(dtype: WeightType, bytes: usize, n: usize, k: usize) -> Option<MatrixLayout> {
    let layout = MatrixLayout::new(dtype.packed_format()?, n, k).ok()?;
    (layout.stored_bytes() == bytes).then_some(layout)
}

/// The type of a tensor over a matrix in the file's own order: candle multiplies half floats as they are.
fn tensor_type(format: Format) -> DType {
    match format {
        Format::F16 => DType::F16,
        Format::BF16 => DType::BF16,
        _ => DType::U8,
    }
}

/// A buffer that candle has not made and keeps in the GPU's memory from step to step as it does its own.
struct Resident {
    device: MetalDevice,
    buffer: Arc<Buffer>,
}

impl Resident {
    fn new(device: &MetalDevice, buffer: Arc<Buffer>) -> Resident {
        device.register_buffers([&*buffer]);
        Resident { device: device.clone(), buffer }
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        self.device.unregister_buffers([&*self.buffer]);
    }
}

/// A matrix of `n` rows by `k` columns.
pub struct MetalMatrix {
    layout: MatrixLayout,
    /// (n, k) where candle can multiply it as it is, else (bytes), u8. Over a mapped file it begins within its buffer.
    tensor: Tensor,
    kernels: Kernels,
    /// The pages of a mapped file.
    _resident: Option<Resident>,
}

impl MetalMatrix {
    /// Bytes that it holds. Pages of a mapped file are counted like any others: a step has all of them in memory.
    pub fn bytes(&self) -> u64 {
        self.layout.bytes as u64
    }

    /// The same in the fused step's terms. The buffer is the tensor's, which must be kept.
    pub fn packed(&self) -> Result<decode::FusedMatrix<Buffer>> {
        let (buffer, offset) = buffer_of(&self.tensor)?;
        Ok(decode::FusedMatrix { layout: self.layout, buffer, offset })
    }

    /// The kernels that multiply it.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// `x`: (rows, k) -> (rows, n), in x's type.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, _) = x.dims2()?;
        let k = self.layout.k;
        // The kernel's rows of x begin at multiples of 16 bytes.
        if rows <= MOST_ROWS && (rows == 1 || k.is_multiple_of(4)) {
            let x32 = x.to_dtype(DType::F32)?.force_contiguous()?;
            return Ok(x32.apply_op1_no_bwd(&Multiply(self))?.to_dtype(x.dtype())?);
        }
        let weight = match self.tensor.dtype() {
            DType::U8 => self.tensor.apply_op1_no_bwd(&Widened(self))?, // (n, k), f32
            _ => self.tensor.clone(),
        };
        Ok(x.to_dtype(weight.dtype())?.matmul(&weight.t()?)?.to_dtype(x.dtype())?)
    }

    /// The rows of `tokens` as floats: (tokens, k).
    pub fn look_up(&self, tokens: &[u32]) -> Result<Tensor> {
        let parts = tokens
            .chunks(MOST_ROWS)
            .map(|tokens| Ok(self.tensor.apply_op1_no_bwd(&Rows { table: self, tokens })?))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// In a kernel's terms, given the tensor's storage and where it begins there.
    fn in_storage<'a>(&self, storage: &'a MetalStorage, layout: &Layout) -> PackedMatrix<'a, Buffer> {
        let offset = layout.start_offset() * self.tensor.dtype().size_in_bytes();
        PackedMatrix { layout: self.layout, buffer: storage.buffer(), offset }
    }

    fn output(&self, rows: usize, width: usize) -> candle_core::Result<Arc<Buffer>> {
        self.kernels.device.new_buffer(rows * width, DType::F32, "metal-ext")
    }

    fn storage(&self, buffer: Arc<Buffer>, rows: usize, width: usize) -> (MetalStorage, Shape) {
        let storage = MetalStorage::new(buffer, self.kernels.device.clone(), rows * width, DType::F32);
        (storage, Shape::from((rows, width)))
    }
}

fn gpu(error: metal_ext::Error) -> Error {
    Error::Tensors(error.to_string())
}

/// The buffer of a tensor on Metal, and where the tensor begins in it, in bytes. The handle does not keep candle from
/// giving the buffer to another tensor: keep this one as long.
pub fn buffer_of(tensor: &Tensor) -> Result<(Buffer, usize)> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Metal(storage) => {
            Ok((storage.buffer().clone(), layout.start_offset() * tensor.dtype().size_in_bytes()))
        }
        _ => Err(Error::Tensors("a tensor of another device where one on Metal was expected".into())),
    }
}

fn not_on_cpu(name: &str) -> candle_core::Error {
    candle_core::Error::Msg(format!("{name} runs on Metal only"))
}

/// Up to eight rows of x with the matrix.
struct Multiply<'a>(&'a MetalMatrix);

impl CustomOp1 for Multiply<'_> {
    fn name(&self) -> &'static str {
        "metal-ext gemv"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Err(not_on_cpu(self.name()))
    }

    fn metal_fwd(&self, x: &MetalStorage, layout: &Layout) -> candle_core::Result<(MetalStorage, Shape)> {
        let (rows, k) = layout.shape().dims2()?;
        let matrix = self.0;
        let n = matrix.layout.n;
        let out = matrix.output(rows, n)?;
        let packed = matrix.packed().map_err(candle_core::Error::wrap)?;
        let gemv = Gemv {
            matrices: &[PackedMatrix { layout: packed.layout, buffer: &packed.buffer, offset: packed.offset }],
            x: Region::at(x.buffer(), layout.start_offset() * x.dtype().size_in_bytes()),
            stride_x: k,
            y: Region::at(&*out, 0),
            stride_y: n,
            rows,
            norm: None,
            bias: None,
            finish: Finish::Store,
        };
        let columns = matrix.kernels.options.columns_per_threadgroup;
        matrix.kernels.dispatch(&gemv.dispatch(columns).map_err(candle_core::Error::wrap)?)?;
        Ok(matrix.storage(out, rows, n))
    }
}

/// The matrix as floats.
struct Widened<'a>(&'a MetalMatrix);

impl CustomOp1 for Widened<'_> {
    fn name(&self) -> &'static str {
        "metal-ext widen"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Err(not_on_cpu(self.name()))
    }

    fn metal_fwd(&self, packed: &MetalStorage, layout: &Layout) -> candle_core::Result<(MetalStorage, Shape)> {
        let matrix = self.0;
        let MatrixLayout { n, k, .. } = matrix.layout;
        let out = matrix.output(n, k)?;
        let widen = Widen { matrix: matrix.in_storage(packed, layout), out: Region::at(&*out, 0) };
        matrix.kernels.dispatch(&widen.dispatch())?;
        Ok(matrix.storage(out, n, k))
    }
}

/// A few rows as floats.
struct Rows<'a> {
    table: &'a MetalMatrix,
    tokens: &'a [u32],
}

impl CustomOp1 for Rows<'_> {
    fn name(&self) -> &'static str {
        "metal-ext look_up"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Err(not_on_cpu(self.name()))
    }

    fn metal_fwd(&self, packed: &MetalStorage, layout: &Layout) -> candle_core::Result<(MetalStorage, Shape)> {
        let (matrix, rows) = (self.table, self.tokens.len());
        let k = matrix.layout.k;
        let out = matrix.output(rows, k)?;
        let look_up = LookUp {
            table: matrix.in_storage(packed, layout),
            tokens: self.tokens,
            multiplier: 1.0,
            out: Region::at(&*out, 0),
        };
        matrix.kernels.dispatch(&look_up.dispatch().map_err(candle_core::Error::wrap)?)?;
        Ok(matrix.storage(out, rows, k))
    }
}

/// Softmax of every row.
struct SoftmaxRows<'a>(&'a Kernels);

impl CustomOp1 for SoftmaxRows<'_> {
    fn name(&self) -> &'static str {
        "metal-ext softmax"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Err(not_on_cpu(self.name()))
    }

    fn metal_fwd(&self, x: &MetalStorage, layout: &Layout) -> candle_core::Result<(MetalStorage, Shape)> {
        let (count, width) = (layout.shape().elem_count(), layout.dims().last().copied().unwrap_or(1));
        let device = &self.0.device;
        let out = device.new_buffer(count, DType::F32, "metal-ext")?;
        let softmax = Softmax {
            x: Region::at(x.buffer(), layout.start_offset() * 4),
            stride_x: width,
            y: Region::at(&*out, 0),
            stride_y: width,
            width,
            rows: count / width,
            scale: 1.0,
        };
        self.0.dispatch(&softmax.dispatch().map_err(candle_core::Error::wrap)?)?;
        Ok((MetalStorage::new(out, device.clone(), count, DType::F32), layout.shape().clone()))
    }
}
