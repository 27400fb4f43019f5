//! Widening packed weights, through the encoder, against GGML's definition of each format.
#![cfg(any(not(target_os = "macos"), feature = "metal"))]

mod common;

use common::gpu::{Check, Gpu, GpuBuffer};
use common::{Rng, Weights};
use metal_ext::Region;
use metal_ext::dequantise::{LookUp, Widen};
use metal_ext::pack::Format;

fn width(format: Format) -> usize {
    match format {
        Format::F16 | Format::F16Blocked | Format::BF16 => 37,
        Format::Q8_0 | Format::Q4_0 => 96,
        Format::Q4_K | Format::Q6_K => 2560,
    }
}

#[test]
fn a_matrix_is_widened() {
    for format in Format::ALL {
        let weights = Weights::random(&mut Rng(3), format, 5, width(format));
        let out = GpuBuffer::new(5 * width(format) * 4);
        let widen = Widen { matrix: weights.packed(), out: Region::at(&out, 0) };
        widen.encode(&mut Gpu::new(Check::AllOrders)).unwrap();
        for (i, (got, want)) in out.floats().iter().zip(&weights.values).enumerate() {
            let off = (f64::from(*got) - want).abs();
            assert!(off <= 1e-6 * (1.0 + want.abs()), "{format:?}: value {i} is {got}, expected {want}");
        }
    }
}

#[test]
fn rows_are_looked_up() {
    for format in Format::ALL {
        let k = width(format);
        let weights = Weights::random(&mut Rng(4), format, 6, k);
        for tokens in [vec![5], vec![0, 3, 3, 1, 2, 5, 4, 0]] {
            let out = GpuBuffer::new(tokens.len() * k * 4);
            let table = weights.packed();
            let look_up = LookUp { table, tokens: &tokens, multiplier: 12.0, out: Region::at(&out, 0) };
            look_up.encode(&mut Gpu::new(Check::AllOrders)).unwrap();
            let want = tokens.iter().flat_map(|&token| &weights.values[token as usize * k..][..k]);
            for (got, want) in out.floats().iter().zip(want) {
                assert!((f64::from(*got) - 12.0 * want).abs() <= 1e-6 * (1.0 + 12.0 * want.abs()), "{format:?}");
            }
        }
    }
}

#[test]
fn a_token_outside_the_table_is_refused() {
    let weights = Weights::random(&mut Rng(4), Format::F16, 6, 8);
    let out = GpuBuffer::new(8 * 4);
    let look_up = LookUp { table: weights.packed(), tokens: &[6], multiplier: 1.0, out: Region::at(&out, 0) };
    let error = look_up.dispatch().unwrap_err().to_string();
    assert_eq!(error, "look_up: token 6 is outside the 6 rows of the table");
}
