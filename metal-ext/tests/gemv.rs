//! The matrix-vector kernels through the encoder, on the CPU, against f64.
#![cfg(not(target_os = "macos"))]

mod common;

use common::{Rng, Weights, close};
use metal_ext::gemv::{Finish, Gemv};
use metal_ext::pack::Format;
use metal_ext::{ColumnsPerThreadgroup, Region};
use msl_cpu::{Check, CpuBuffer, CpuEncoder};

#[test]
fn an_f16_product_equals_the_reference_at_every_size() {
    for (n, k) in [(64, 512), (61, 2048), (7, 33), (1, 1), (3, 130), (65, 5)] {
        for columns in ColumnsPerThreadgroup::ALL {
            let mut rng = Rng((n * 1000 + k) as u64);
            let w = Weights::random(&mut rng, Format::F16, n, k);
            let x = rng.floats(k);
            let (input, output) = (CpuBuffer::from_floats(&x), CpuBuffer::new(n * 4));
            let gemv = Gemv {
                matrices: &[w.packed()],
                x: Region::at(&input, 0),
                stride_x: k,
                y: Region::at(&output, 0),
                stride_y: n,
                rows: 1,
                norm: None,
                bias: None,
                finish: Finish::Store,
            };
            gemv.encode(&mut CpuEncoder::new(Check::AllOrders), columns).unwrap();
            let (want, _) = w.times(&x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
            close(&output.floats(), &want, 1e-5, &format!("{n} by {k}, {columns:?}"));
        }
    }
}
