//! How activations get from one stage's device to the next one's.

use candle_core::{Device, DeviceLocation, Tensor};

use crate::error::Result;

/// The way between two stages, chosen and checked once when the stages start.
#[derive(Debug)]
pub struct Link {
    target: Device,
    route: Route,
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

impl Link {
    /// The link between two devices. A direct one between GPUs is tried with a known pattern, since peer copies have
    /// silently returned zeros on some machines, and given up for the host's memory if that comes out wrong.
    pub fn new(source: &Device, target: &Device) -> Result<Link> {
        let link = |route| Link {
            target: target.clone(),
            route,
            #[cfg(feature = "cuda")]
            staging: Default::default(),
        };
        if source.same_device(target) {
            return Ok(link(Route::SameDevice));
        }
        if source.is_cpu() || target.is_cpu() {
            return Ok(link(Route::Direct));
        }
        let both_cuda = matches!(
            (source.location(), target.location()),
            (DeviceLocation::Cuda { .. }, DeviceLocation::Cuda { .. })
        );
        let direct = link(Route::Direct);
        // A copy that fails is as good a reason for the host's memory as one that lies.
        let delivered = both_cuda && direct.delivers(source).unwrap_or(false);
        Ok(if delivered { direct } else { link(Route::Host) })
    }

    /// The way it takes.
    pub fn route(&self) -> Route {
        self.route
    }

    /// Whether a pattern comes out on the other side as it went in.
    fn delivers(&self, source: &Device) -> Result<bool> {
        let pattern: Vec<f32> = (0..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 + 1.0).collect();
        let sent = Tensor::from_vec(pattern.clone(), pattern.len(), source)?;
        Ok(self.send(sent)?.to_vec1::<f32>()? == pattern)
    }

    /// Brings a stage's output to the next stage's device.
    pub fn send(&self, activations: Tensor) -> Result<Tensor> {
        // Candle copies the whole storage under a view, so a view becomes a tensor of its own first.
        Ok(match self.route {
            Route::SameDevice => activations,
            Route::Direct => activations.force_contiguous()?.to_device(&self.target)?,
            Route::Host => {
                #[cfg(feature = "cuda")]
                if let Some(carried) = self.staging.borrow_mut().carry(&activations, &self.target)? {
                    return Ok(carried);
                }
                activations.force_contiguous()?.to_device(&Device::Cpu)?.to_device(&self.target)?
            }
        })
    }
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

    #[test]
    fn stages_on_one_device_hand_the_tensor_over() {
        let link = Link::new(&Device::Cpu, &Device::Cpu).unwrap();
        assert_eq!(link.route(), Route::SameDevice);
        let sent = Tensor::arange(0f32, 6f32, &Device::Cpu).unwrap();
        assert_eq!(link.send(sent.clone()).unwrap().id(), sent.id());
    }
}
