//! In place of candle's quantisation: blocks of seeded bytes with small scales. A tensor's own values only where they are
//! stored as they are.

use half::{bf16, f16};

use crate::weights::WeightType;
use crate::{Device, Result, Tensor, kernels};

pub struct QTensor {
    dtype: WeightType,
    bytes: Vec<u8>,
}

impl QTensor {
    pub fn quantize(tensor: &Tensor, dtype: WeightType) -> Result<QTensor> {
        let values = &tensor.0;
        let bytes = match dtype {
            WeightType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            WeightType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            WeightType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            _ => {
                let (_, size, floats) = dtype.layout();
                let len = dtype.bytes_for(values.len()).expect("whole blocks");
                let mut bytes: Vec<u8> = (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
                for (i, block) in bytes.chunks_exact_mut(size).enumerate() {
                    for (number, &at) in floats.iter().enumerate() {
                        let float = f16::from_f32(((i * 31 + number * 7) % 61 + 1) as f32 / 8000.0);
                        block[at..at + 2].copy_from_slice(&float.to_le_bytes());
                    }
                }
                bytes
            }
        };
        Ok(QTensor { dtype, bytes })
    }

    pub fn data(&self) -> Result<&[u8]> {
        Ok(&self.bytes)
    }

    /// By plain Rust, which the workspace's tests compare with candle.
    pub fn dequantize(&self, _device: &Device) -> Result<Tensor> {
        Ok(Tensor(kernels::dequantise(self.dtype, &self.bytes).expect("whole blocks")))
    }
}
