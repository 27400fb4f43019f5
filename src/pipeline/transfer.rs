//! How activations get from one stage's device to the next one's, and how long a pretended slow link keeps them.

use std::cell::Cell;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use crate::device::OpenDevice;
use crate::error::{Error, Result};

/// The type that activations have on their way. A stage always gets the type that the one before computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
}

/// Activations on the next stage's device, and when the simulated link has brought them there.
#[derive(Debug)]
pub struct Arrival {
    activations: Tensor,
    due: Option<Instant>,
}

impl Arrival {
    /// Waits for as long as the simulated link takes.
    pub fn wait(&self) {
        if let Some(due) = self.due {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }

    /// What has arrived.
    pub fn into_activations(self) -> Tensor {
        self.activations
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
        if from.same_device(to) && options.simulated.is_none() {
            return Ok(link(Route::SameDevice));
        }
        // Between two GPUs candle copies only from CUDA to CUDA.
        let direct = from.is_cpu() || to.is_cpu() || (from.is_cuda() && to.is_cuda());
        let routes: &[Route] = if direct { &[Route::Direct, Route::Host] } else { &[Route::Host] };
        match first_that_delivers(routes, |route| link(route).delivers()) {
            Some(route) => Ok(link(route)),
            None => Err(Error::Tensors(format!(
                "no way from {:?} to {:?} delivers what is sent; leave out one of these devices",
                from.location(),
                to.location()
            ))),
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
            let pattern = Tensor::from_iter((0..VALUES).map(value), &Device::Cpu)?;
            let wanted = checksum(&pattern.to_dtype(wire)?.to_dtype(DType::F32)?)?;
            let pattern = {
                let _turn = self.source.turns.take();
                pattern.to_device(&self.source.device)?
            };
            let carried = self.carry(pattern)?;
            let _turn = self.target.turns.take();
            if !carried.device().same_device(&self.target.device) || checksum(&carried)? != wanted {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Brings a stage's output to the next stage's device. Blocks while it is copied, not while a simulated link has it.
    pub fn send(&self, activations: Tensor) -> Result<Arrival> {
        let due = self.options.simulated.map(|simulated| {
            let size = self.options.wire_type.map_or(activations.dtype(), WireType::dtype).size_in_bytes();
            let now = Instant::now();
            let start = self.free_at.get().map_or(now, |free_at| free_at.max(now));
            let sent = later(start, simulated.occupied(activations.elem_count() * size));
            self.free_at.set(Some(sent));
            later(sent, simulated.latency)
        });
        Ok(Arrival { activations: self.carry(activations)?, due })
    }

    fn carry(&self, activations: Tensor) -> Result<Tensor> {
        if self.route == Route::SameDevice {
            return Ok(activations);
        }
        let computed = activations.dtype();
        // One device's turn after the other's: two links with one each in hand could wait for each other's for ever.
        let leaving = {
            let _turn = self.source.turns.take();
            self.leave(activations.to_dtype(self.options.wire_type.map_or(computed, WireType::dtype))?)?
        };
        let _turn = self.target.turns.take();
        Ok(leaving.to_device(&self.target.device)?.to_dtype(computed)?)
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

/// FNV-1a over the bits of f32 values, in order.
fn checksum(values: &Tensor) -> Result<u64> {
    let values = values.to_vec1::<f32>()?;
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
        tensor.to_vec1().unwrap()
    }

    #[test]
    fn stages_on_one_device_hand_the_tensor_over() {
        let options = LinkOptions { wire_type: Some(WireType::BF16), simulated: None };
        let link = Link::new(&cpu(), &cpu(), options).unwrap();
        assert_eq!(link.route(), Route::SameDevice);
        let sent = Tensor::arange(0f32, 6f32, &Device::Cpu).unwrap();
        assert_eq!(link.send(sent.clone()).unwrap().into_activations().id(), sent.id());
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
        let carried = |wire_type, dtype| {
            let options = LinkOptions { wire_type, simulated: Some(slow) };
            let link = Link::new(&cpu(), &cpu(), options).unwrap();
            let sent = Tensor::new(&sent, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let arrived = link.send(sent.clone()).unwrap().into_activations();
            assert_eq!(arrived.dtype(), dtype, "a stage gets the type that the one before computed");
            (values(sent.to_dtype(DType::F32).unwrap()), values(arrived.to_dtype(DType::F32).unwrap()))
        };
        for (wire_type, dtype) in [
            (None, DType::F32),
            (Some(WireType::F32), DType::F32),
            (Some(WireType::F32), DType::F16),
            (Some(WireType::F32), DType::BF16),
        ] {
            let (sent, arrived) = carried(wire_type, dtype);
            assert_eq!(sent, arrived, "{wire_type:?} {dtype:?}");
        }
        assert_eq!(carried(Some(WireType::F16), DType::F32).1, sent.map(|v| half::f16::from_f32(v).to_f32()));
        assert_eq!(carried(Some(WireType::BF16), DType::F32).1, sent.map(|v| half::bf16::from_f32(v).to_f32()));
    }

    #[test]
    fn a_simulated_link_delivers_after_latency_and_queues_at_its_bandwidth() {
        let simulated: SimulatedLink = "20, 4e5".parse().unwrap();
        assert_eq!(simulated.occupied(4000), Duration::from_millis(10));
        let options = LinkOptions { wire_type: None, simulated: Some(simulated) };
        let link = Link::new(&cpu(), &cpu(), options).unwrap();
        let began = Instant::now();
        let x = Tensor::zeros(1000, DType::F32, &Device::Cpu).unwrap();
        let arrivals = [link.send(x.clone()).unwrap(), link.send(x).unwrap()];
        // A third of what the two occupy the link: sending does not wait for it.
        assert!(began.elapsed() < Duration::from_millis(7), "{:?}", began.elapsed());
        for (arrival, earliest) in arrivals.iter().zip([30, 40]) {
            arrival.wait();
            assert!(began.elapsed() >= Duration::from_millis(earliest));
        }
    }

    #[test]
    fn a_link_that_hardly_carries_anything_is_not_a_fast_one() {
        for bandwidth in [1e-300, 0.0, f64::NAN] {
            let slow = SimulatedLink { latency: Duration::ZERO, bandwidth };
            let link = Link::new(&cpu(), &cpu(), LinkOptions { wire_type: None, simulated: Some(slow) }).unwrap();
            let arrival = link.send(Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap()).unwrap();
            assert!(arrival.due.unwrap() > Instant::now() + Duration::from_secs(1 << 30), "{bandwidth}");
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
