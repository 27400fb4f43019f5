//! How activations get from one stage's device to the next one's, and how long a pretended slow link keeps them.

use std::cell::Cell;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::device::OpenDevice;
use crate::error::{Error, Result};

/// The type that activations have on their way. A CPU stage gets F32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WireType {
    /// Exact: holds every F16 and BF16 value too.
    F32,
    /// Half the bytes of F32. Rounds to 11 bits and turns what is beyond 65504 into infinity, which the activations of
    /// some models are: check the model's answers before relying on it.
    F16,
    /// Half the bytes of F32. Rounds to 8 bits, with the range of F32.
    BF16,
}

impl WireType {
    /// The same type in candle's terms.
    pub fn dtype(self) -> DType {
        match self {
            WireType::F32 => DType::F32,
            WireType::F16 => DType::F16,
            WireType::BF16 => DType::BF16,
        }
    }

    fn of(dtype: DType) -> Result<WireType> {
        match dtype {
            DType::F32 => Ok(WireType::F32),
            DType::F16 => Ok(WireType::F16),
            DType::BF16 => Ok(WireType::BF16),
            other => Err(Error::Tensors(format!("activations in {} cannot cross a link", other.as_str()))),
        }
    }
}

impl std::str::FromStr for WireType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name.to_ascii_lowercase().as_str() {
            "f32" => Ok(WireType::F32),
            "f16" => Ok(WireType::F16),
            "bf16" => Ok(WireType::BF16),
            _ => Err(Error::option("wire_type", format!("`{name}` is no type for a link; write f32, f16 or bf16"))),
        }
    }
}

/// A link that is slower than the one there is, for tests and for plans of machines one does not have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SimulatedLink {
    /// From the last byte sent to its arrival.
    pub latency: Duration,
    /// Bytes a second; what is sent meanwhile queues. Infinity limits nothing.
    pub bandwidth: f64,
}

impl SimulatedLink {
    /// The longest latency, and the lowest bandwidth. Clocks do not reach the times of links that are slower still.
    const MOST_LATENCY: Duration = Duration::from_secs(3600);
    const LEAST_BANDWIDTH: f64 = 1.0;

    /// Time that `bytes` occupy it.
    pub fn occupied(&self, bytes: usize) -> Duration {
        Duration::try_from_secs_f64(bytes as f64 / self.bandwidth).unwrap_or(Duration::MAX)
    }

    /// Refuses a link that is not one, or too slow to be simulated.
    pub fn validate(&self) -> Result<()> {
        // False for NaN too.
        if self.bandwidth >= Self::LEAST_BANDWIDTH && self.latency <= Self::MOST_LATENCY {
            return Ok(());
        }
        let (latency, bandwidth) = (self.latency.as_secs_f64() * 1e3, self.bandwidth);
        Err(Error::option("link", format!("invalid link `{latency},{bandwidth}`: {}", Self::wanted())))
    }

    fn wanted() -> String {
        let (most, least) = (Self::MOST_LATENCY.as_millis(), Self::LEAST_BANDWIDTH);
        format!(
            "expected a latency of 0 to {most} milliseconds, or that and at least {least} byte a second, as in 5,1.25e9"
        )
    }
}

impl std::str::FromStr for SimulatedLink {
    type Err = Error;

    /// Latency in milliseconds, and after a comma bytes a second: `5` or `5,1.25e9`.
    fn from_str(text: &str) -> Result<Self> {
        let (latency, bandwidth) = match text.split_once(',') {
            Some((latency, bandwidth)) => (latency.trim().parse(), bandwidth.trim().parse()),
            None => (text.trim().parse(), Ok(f64::INFINITY)),
        };
        let latency = latency.ok().and_then(|ms: f64| Duration::try_from_secs_f64(ms / 1e3).ok());
        let link = latency.zip(bandwidth.ok()).map(|(latency, bandwidth)| SimulatedLink { latency, bandwidth });
        let link = link.filter(|link| link.validate().is_ok());
        link.ok_or_else(|| Error::option("link", format!("invalid link `{text}`: {}", Self::wanted())))
    }
}

/// How the links between stages carry activations. `Default` carries them as they are, as fast as it can.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LinkOptions {
    /// Type on the way between devices. `None` is the one that the sending stage computes, which is exact. Stages on one
    /// device hand their tensors over as they are.
    pub wire_type: Option<WireType>,
    /// Pretends that every link, also one within a device, is this slow.
    pub simulated: Option<SimulatedLink>,
    /// Encodes every message and its activations to bytes and decodes them at the other end, as a link between machines
    /// does. Changes no result; it shows that a pipeline needs nothing else, and what that costs.
    pub as_bytes: bool,
}

/// The way between two stages, chosen and checked once when the stages start.
#[derive(Debug)]
pub struct Link {
    source: OpenDevice,
    target: OpenDevice,
    route: Route,
    options: LinkOptions,
    /// When the simulated link has sent all that it was given.
    free_at: Cell<Option<Instant>>,
    #[cfg(feature = "cuda")]
    staging: std::cell::RefCell<Staging>,
}

/// A way for activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Both stages are on one device: the tensor itself is handed over.
    SameDevice,
    /// Candle copies from device to device.
    Direct,
    /// Through host memory: candle cannot copy between these devices, or the direct way did not deliver what was sent.
    Host,
    /// As bytes, which is how they cross a wire.
    Bytes,
}

/// A stage's output between two stages.
#[derive(Debug, Clone)]
pub enum Activations {
    /// In the memory of the next stage's device: the way within a process, without a copy where both stages are on one
    /// device.
    Tensor(Tensor),
    /// Plain data, for the way out of the process.
    Rows(WireRows),
}

/// Rows of activations as plain data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireRows {
    /// Number of rows.
    pub rows: usize,
    /// Values of a row: the model's hidden size.
    pub width: usize,
    /// Type of the values.
    pub dtype: WireType,
    /// The values row by row, little-endian.
    #[serde(with = "whole")]
    pub bytes: Vec<u8>,
}

/// Bytes as one run, not value by value.
mod whole {
    use serde::de::{Deserializer, Error, Visitor};
    use serde::ser::Serializer;

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;

        impl Visitor<'_> for Bytes {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }

            fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }
        }

        deserializer.deserialize_byte_buf(Bytes)
    }
}

impl WireRows {
    /// The rows of a tensor (rows, width) on any device.
    pub fn of(x: &Tensor) -> Result<WireRows> {
        let (rows, width) = x.dims2()?;
        let dtype = WireType::of(x.dtype())?;
        let values = x.to_device(&Device::Cpu)?.flatten_all()?;
        let bytes = match dtype {
            WireType::F32 => values.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
            WireType::F16 => values.to_vec1::<f16>()?.into_iter().flat_map(f16::to_le_bytes).collect(),
            WireType::BF16 => values.to_vec1::<bf16>()?.into_iter().flat_map(bf16::to_le_bytes).collect(),
        };
        Ok(WireRows { rows, width, dtype, bytes })
    }

    /// The rows as a tensor (rows, width) on a device, in the type that they have here.
    fn tensor(&self, device: &Device) -> Result<Tensor> {
        let &WireRows { rows, width, dtype, ref bytes } = self;
        let needed = rows.checked_mul(width).and_then(|n| n.checked_mul(dtype.dtype().size_in_bytes()));
        if needed != Some(bytes.len()) {
            let found = bytes.len();
            return Err(Error::Tensors(format!("{found} bytes are not {rows} rows of {width} {dtype:?} activations")));
        }
        let shape = (rows, width);
        Ok(match dtype {
            WireType::F32 => Tensor::from_vec(little_endian(bytes, f32::from_le_bytes), shape, device)?,
            WireType::F16 => Tensor::from_vec(little_endian(bytes, f16::from_le_bytes), shape, device)?,
            WireType::BF16 => Tensor::from_vec(little_endian(bytes, bf16::from_le_bytes), shape, device)?,
        })
    }
}

fn little_endian<T, const N: usize>(bytes: &[u8], value: fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|bytes| value(*bytes)).collect()
}

impl Activations {
    /// As a tensor (rows, hidden_size) on the stage's device: on a CPU in F32, which every type widens to, elsewhere in the
    /// type that they have. For plain data the caller has the device's turn.
    pub fn into_tensor(self, device: &Device) -> Result<Tensor> {
        let x = match self {
            Activations::Tensor(x) => x,
            Activations::Rows(rows) => rows.tensor(device)?,
        };
        Ok(if device.is_cpu() { x.to_dtype(DType::F32)? } else { x })
    }

    /// As plain data.
    pub fn into_rows(self) -> Result<WireRows> {
        match self {
            Activations::Tensor(x) => WireRows::of(&x),
            Activations::Rows(rows) => Ok(rows),
        }
    }
}

impl Link {
    /// The link between two devices. Whatever crosses devices is tried with known patterns, since copies between devices
    /// have silently delivered zeros or what was sent before on some machines. A direct way that does is given up for
    /// the host's memory; if that fails too, it is an error.
    pub fn new(source: &OpenDevice, target: &OpenDevice, options: LinkOptions) -> Result<Link> {
        let link = |route| Link {
            source: source.clone(),
            target: target.clone(),
            route,
            options,
            free_at: Cell::new(None),
            #[cfg(feature = "cuda")]
            staging: Default::default(),
        };
        let (from, to) = (&source.device, &target.device);
        if options.as_bytes {
            return match link(Route::Bytes).delivers()? {
                true => Ok(link(Route::Bytes)),
                false => Err(no_way(from, to)),
            };
        }
        if from.same_device(to) && options.simulated.is_none() {
            return Ok(link(Route::SameDevice));
        }
        // Between two GPUs candle copies only from CUDA to CUDA.
        let direct = from.is_cpu() || to.is_cpu() || (from.is_cuda() && to.is_cuda());
        let routes: &[Route] = if direct { &[Route::Direct, Route::Host] } else { &[Route::Host] };
        match first_that_delivers(routes, |route| link(route).delivers()) {
            Some(route) => Ok(link(route)),
            None => Err(no_way(from, to)),
        }
    }

    /// The way it takes.
    pub fn route(&self) -> Route {
        self.route
    }

    /// Whether patterns come out on the other side as they went in: two, so that a copy which leaves the first one in
    /// place is found, of more values than one page or one copy engine's packet has, and not a round number of them.
    fn delivers(&self) -> Result<bool> {
        const VALUES: u32 = (1 << 18) + 13;
        let wire = self.options.wire_type.map_or(DType::F32, WireType::dtype);
        for seed in [1u32, 2] {
            let value = |i: u32| ((i ^ seed << 20).wrapping_mul(2_654_435_761) >> 16) as f32 + 1.0;
            let pattern = Tensor::from_iter((0..VALUES).map(value), &Device::Cpu)?.unsqueeze(0)?;
            let wanted = checksum(&pattern.to_dtype(wire)?.to_dtype(DType::F32)?)?;
            let pattern = {
                let _turn = self.source.turns.take();
                pattern.to_device(&self.source.device)?
            };
            let carried = self.carry(pattern)?;
            let _turn = self.target.turns.take();
            let arrived = carried.into_tensor(&self.target.device)?;
            let here = arrived.device().same_device(&self.target.device);
            if !here || checksum(&arrived.to_dtype(DType::F32)?)? != wanted {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes a stage's output off its device, to the next stage's if the route goes there, and says when a simulated link
    /// has brought it. Blocks while it is copied, not while a simulated link has it.
    pub fn depart(&self, output: Tensor) -> Result<(Activations, Option<Instant>)> {
        let due = self.options.simulated.map(|simulated| {
            let size = self.options.wire_type.map_or(output.dtype(), WireType::dtype).size_in_bytes();
            let now = Instant::now();
            let start = self.free_at.get().map_or(now, |free_at| free_at.max(now));
            let sent = later(start, simulated.occupied(output.elem_count() * size));
            self.free_at.set(Some(sent));
            later(sent, simulated.latency)
        });
        Ok((self.carry(output)?, due))
    }

    fn carry(&self, output: Tensor) -> Result<Activations> {
        if self.route == Route::SameDevice {
            return Ok(Activations::Tensor(output));
        }
        let computed = output.dtype();
        // One device's turn after the other's: two links with one each in hand could wait for each other's for ever.
        let leaving = {
            let _turn = self.source.turns.take();
            let leaving = output.to_dtype(self.options.wire_type.map_or(computed, WireType::dtype))?;
            if self.route == Route::Bytes {
                return Ok(Activations::Rows(WireRows::of(&leaving)?));
            }
            self.leave(leaving)?
        };
        let _turn = self.target.turns.take();
        Ok(Activations::Tensor(leaving.to_device(&self.target.device)?.to_dtype(computed)?))
    }

    /// The part of the way on which the source has something to do.
    fn leave(&self, activations: Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.route == Route::Host
            && let Some(carried) = self.staging.borrow_mut().carry(&activations, &self.target.device)?
        {
            return Ok(carried);
        }
        // Candle copies the whole storage under a view, so a view becomes a tensor of its own first.
        let activations = activations.force_contiguous()?;
        match self.route {
            Route::Direct if !activations.device().is_metal() => Ok(activations),
            // What leaves an Apple GPU is in host memory in any case.
            _ => Ok(activations.to_device(&Device::Cpu)?),
        }
    }
}

/// An instant after `start`, at most a century after it: clocks end somewhere.
fn later(start: Instant, time: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    start.checked_add(time.min(CENTURY)).unwrap_or(start)
}

/// The first route that brings what is sent. One that fails is as good as one that lies.
fn first_that_delivers(routes: &[Route], delivers: impl Fn(Route) -> Result<bool>) -> Option<Route> {
    routes.iter().copied().find(|&route| match delivers(route) {
        Ok(true) => true,
        Ok(false) => {
            tracing::warn!("a copy between devices ({route:?}) delivered something else than was sent");
            false
        }
        Err(error) => {
            tracing::warn!("a copy between devices ({route:?}) failed: {error}");
            false
        }
    })
}

fn no_way(from: &Device, to: &Device) -> Error {
    let (from, to) = (from.location(), to.location());
    Error::Tensors(format!("no way from {from:?} to {to:?} delivers what is sent; leave out one of these devices"))
}

/// FNV-1a over the bits of f32 values, in order.
fn checksum(values: &Tensor) -> Result<u64> {
    let values = values.flatten_all()?.to_vec1::<f32>()?;
    let mix = |hash: u64, value: &f32| (hash ^ u64::from(value.to_bits())).wrapping_mul(0x0100_0000_01b3);
    Ok(values.iter().fold(0xcbf2_9ce4_8422_2325, mix))
}

/// Host memory between two GPUs, kept from one activation to the next. A copy to or from a CPU stage needs none: it
/// lands in the activation itself.
#[cfg(feature = "cuda")]
#[derive(Debug, Default)]
struct Staging {
    f32: Vec<f32>,
    f16: Vec<half::f16>,
    bf16: Vec<half::bf16>,
}

#[cfg(feature = "cuda")]
impl Staging {
    /// Brings a CUDA tensor to `target` by way of the staging memory, only the bytes of the view. `None` where it is
    /// another device's or another type.
    fn carry(&mut self, x: &Tensor, target: &Device) -> Result<Option<Tensor>> {
        use candle_core::backend::BackendStorage;
        use candle_core::{DType, Storage};

        let x = x.contiguous()?;
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cuda(cuda) = &*storage else { return Ok(None) };
        let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
        macro_rules! carry {
            ($type:ty, $staging:expr) => {{
                $staging.resize(range.len(), Default::default());
                let view = cuda.as_cuda_slice::<$type>()?.slice(range);
                cuda.device().memcpy_dtoh(&view, $staging)?;
                Tensor::from_slice($staging, layout.shape(), target)?
            }};
        }
        Ok(Some(match cuda.dtype() {
            DType::F32 => carry!(f32, &mut self.f32),
            DType::F16 => carry!(half::f16, &mut self.f16),
            DType::BF16 => carry!(half::bf16, &mut self.bf16),
            _ => return Ok(None),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceSpec;
    use crate::kernels::simd::Isa;

    fn cpu() -> OpenDevice {
        OpenDevice::open_all(&[DeviceSpec::Cpu { threads: Some(1) }], Isa::detect()).unwrap().remove(0)
    }

    fn values(tensor: Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn stages_on_one_device_hand_the_tensor_over() {
        let options = LinkOptions { wire_type: Some(WireType::BF16), ..LinkOptions::default() };
        let link = Link::new(&cpu(), &cpu(), options).unwrap();
        assert_eq!(link.route(), Route::SameDevice);
        let sent = Tensor::arange(0f32, 6f32, &Device::Cpu).unwrap();
        let (arrived, due) = link.depart(sent.clone()).unwrap();
        assert_eq!((arrived.into_tensor(&Device::Cpu).unwrap().id(), due), (sent.id(), None));
    }

    #[test]
    fn a_route_that_lies_or_fails_is_passed_over() {
        let routes = [Route::Direct, Route::Host];
        assert_eq!(first_that_delivers(&routes, |_| Ok(true)), Some(Route::Direct));
        assert_eq!(first_that_delivers(&routes, |route| Ok(route == Route::Host)), Some(Route::Host));
        let fails = |route| if route == Route::Host { Ok(true) } else { Err(Error::Stopped) };
        assert_eq!(first_that_delivers(&routes, fails), Some(Route::Host));
        assert_eq!(first_that_delivers(&routes, |_| Ok(false)), None);
    }

    #[test]
    fn the_checksum_sees_zeros_order_and_one_bit() {
        let sum = |values: &[f32]| checksum(&Tensor::new(values, &Device::Cpu).unwrap()).unwrap();
        let seen = [sum(&[1.0, 2.0]), sum(&[2.0, 1.0]), sum(&[0.0, 0.0]), sum(&[1.0, f32::from_bits(0x4000_0001)])];
        for (i, a) in seen.iter().enumerate() {
            assert!(seen[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn a_wire_of_f32_is_exact_and_half_types_round_as_they_say() {
        let slow = SimulatedLink { latency: Duration::ZERO, bandwidth: f64::INFINITY };
        let sent = [0.1f32, -1.0 / 3.0, 1e30, 1e-20, 70_000.0];
        let carried = |wire_type, dtype, as_bytes| {
            let options = LinkOptions { wire_type, simulated: Some(slow), as_bytes };
            let link = Link::new(&cpu(), &cpu(), options).unwrap();
            let sent = Tensor::new(&[sent], &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let arrived = link.depart(sent.clone()).unwrap().0.into_tensor(&Device::Cpu).unwrap();
            assert_eq!(arrived.dtype(), DType::F32, "what a CPU computes with");
            (values(sent.to_dtype(DType::F32).unwrap()), values(arrived.to_dtype(DType::F32).unwrap()))
        };
        for as_bytes in [false, true] {
            for (wire_type, dtype) in [
                (None, DType::F32),
                (None, DType::BF16),
                (Some(WireType::F32), DType::F32),
                (Some(WireType::F32), DType::F16),
                (Some(WireType::F32), DType::BF16),
            ] {
                let (sent, arrived) = carried(wire_type, dtype, as_bytes);
                assert_eq!(sent, arrived, "{wire_type:?} {dtype:?} {as_bytes}");
            }
            let rounded = |wire_type| carried(Some(wire_type), DType::F32, as_bytes).1;
            assert_eq!(rounded(WireType::F16), sent.map(|v| f16::from_f32(v).to_f32()));
            assert_eq!(rounded(WireType::BF16), sent.map(|v| bf16::from_f32(v).to_f32()));
        }
    }

    #[test]
    fn rows_of_another_length_than_they_say_are_refused() {
        let x = Tensor::new(&[[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]], &Device::Cpu).unwrap();
        let rows = WireRows::of(&x).unwrap();
        assert_eq!((rows.rows, rows.width, rows.dtype, rows.bytes.len()), (2, 3, WireType::F32, 24));
        for wrong in [
            WireRows { rows: 3, ..rows.clone() },
            WireRows { dtype: WireType::F16, ..rows.clone() },
            WireRows { rows: usize::MAX, width: usize::MAX, ..rows },
        ] {
            let message = wrong.tensor(&Device::Cpu).unwrap_err().to_string();
            assert!(message.contains("24 bytes are not"), "{message}");
        }
    }

    #[test]
    fn a_simulated_link_delivers_after_latency_and_queues_at_its_bandwidth() {
        let simulated: SimulatedLink = "20, 4e5".parse().unwrap();
        assert_eq!(simulated.occupied(4000), Duration::from_millis(10));
        let options = LinkOptions { simulated: Some(simulated), ..LinkOptions::default() };
        let link = Link::new(&cpu(), &cpu(), options).unwrap();
        let began = Instant::now();
        let x = Tensor::zeros((1, 1000), DType::F32, &Device::Cpu).unwrap();
        let due = [link.depart(x.clone()).unwrap().1, link.depart(x).unwrap().1];
        // A third of what the two occupy the link: sending does not wait for it.
        assert!(began.elapsed() < Duration::from_millis(7), "{:?}", began.elapsed());
        for (due, earliest) in due.into_iter().zip([30, 40]) {
            let after = due.unwrap() - began;
            assert!((earliest..earliest + 7).contains(&after.as_millis()), "{after:?}");
        }
    }

    #[test]
    fn a_link_that_hardly_carries_anything_is_not_a_fast_one() {
        for bandwidth in [1e-300, 0.0, f64::NAN] {
            let slow = SimulatedLink { latency: Duration::ZERO, bandwidth };
            let link =
                Link::new(&cpu(), &cpu(), LinkOptions { simulated: Some(slow), ..LinkOptions::default() }).unwrap();
            let (_, due) = link.depart(Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap()).unwrap();
            assert!(due.unwrap() > Instant::now() + Duration::from_secs(1 << 30), "{bandwidth}");
            assert!(slow.validate().unwrap_err().to_string().contains("byte a second"));
        }
    }

    #[test]
    fn links_are_read_from_text_or_refused() {
        let link: SimulatedLink = "5".parse().unwrap();
        assert_eq!(link, SimulatedLink { latency: Duration::from_millis(5), bandwidth: f64::INFINITY });
        for text in ["", "x", "-1", "5,0", "5,-3", "5,x", "5,nan", "0,1e-300", "nan", "1e300", "1e15"] {
            let message = text.parse::<SimulatedLink>().unwrap_err().to_string();
            assert!(message.contains(&format!("`{text}`")) && message.contains("milliseconds"), "{message}");
        }
        assert!("3600000,1".parse::<SimulatedLink>().is_ok());
        assert!("f64".parse::<WireType>().unwrap_err().to_string().contains("bf16"));
    }
}
