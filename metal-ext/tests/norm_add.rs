//! The norm of a branch and its addition, through the encoder, against f64.
#![cfg(any(not(target_os = "macos"), feature = "metal"))]

mod common;

use common::gpu::{Check, Gpu, GpuBuffer};
use common::{Rng, close};
use metal_ext::Region;
use metal_ext::gemv::Norm;
use metal_ext::norm_add::NormAdd;

#[test]
fn a_normalised_branch_is_added() {
    for (rows, width, gap) in [(1, 256, 0), (3, 1000, 4), (8, 7, 1), (2, 2048, 0)] {
        let mut rng = Rng(width as u64);
        let stride = width + gap;
        let (branch, y) = (rng.floats(rows * stride), rng.floats(rows * stride));
        let gamma = rng.floats(width);
        let (from, to) = (GpuBuffer::from_floats(&branch), GpuBuffer::from_floats(&y));
        let weight = GpuBuffer::from_floats(&gamma);
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
        add.encode(&mut Gpu::new(Check::AllOrders)).unwrap();
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
