//! The norm of a branch and its addition, through the encoder, against f64.
#![cfg(not(target_os = "macos"))]

mod common;

use common::{Rng, close};
use metal_ext::Region;
use metal_ext::gemv::Norm;
use metal_ext::norm_add::NormAdd;
use msl_cpu::{Check, CpuBuffer, CpuEncoder};

#[test]
fn a_normalised_branch_is_added() {
    for (rows, width, gap) in [(1, 256, 0), (3, 1000, 4), (8, 7, 1), (2, 2048, 0)] {
        let mut rng = Rng(width as u64);
        let stride = width + gap;
        let (branch, y) = (rng.floats(rows * stride), rng.floats(rows * stride));
        let gamma = rng.floats(width);
        let (from, to) = (CpuBuffer::from_floats(&branch), CpuBuffer::from_floats(&y));
        let weight = CpuBuffer::from_floats(&gamma);
        let add = NormAdd {
            branch: Region::at(&from, 0),
            stride_branch: stride,
            y: Region::at(&to, 0),
            stride_y: stride,
            width,
            rows,
            norm: Norm { gamma: Region::at(&weight, 0), eps: 1e-6 },
            multiplier: 0.5,
        };
        add.encode(&mut CpuEncoder::new(Check::AllOrders)).unwrap();
        let mut want: Vec<f64> = y.iter().map(|&v| f64::from(v)).collect();
        for row in 0..rows {
            let from: Vec<f64> = branch[row * stride..][..width].iter().map(|&v| f64::from(v)).collect();
            let factor = 0.5 / (from.iter().map(|v| v * v).sum::<f64>() / width as f64 + 1e-6).sqrt();
            for i in 0..width {
                want[row * stride + i] += factor * from[i] * f64::from(gamma[i]);
            }
        }
        close(&to.floats(), &want, 1e-6, &format!("{rows} rows of {width}"));
    }
}
