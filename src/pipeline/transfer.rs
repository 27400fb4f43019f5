//! How activations get from one stage's device to the next one's.

use candle_core::{Device, DeviceLocation, Tensor};

use crate::error::Result;

/// The way between two stages, chosen and checked once when the stages start.
#[derive(Debug, Clone)]
pub struct Link {
    target: Device,
    route: Route,
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
        let link = |route| Link { target: target.clone(), route };
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
        Ok(if both_cuda && direct.delivers(source)? { direct } else { link(Route::Host) })
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
            Route::Host => activations.force_contiguous()?.to_device(&Device::Cpu)?.to_device(&self.target)?,
        })
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
