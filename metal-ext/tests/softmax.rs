//! Softmax by itself through the encoder, against f64.
#![cfg(any(not(target_os = "macos"), feature = "metal"))]

mod common;

use common::Rng;
#[cfg(not(target_os = "macos"))]
use common::Shortened;
use common::gpu::{Check, Gpu, GpuBuffer};
use metal_ext::softmax::Softmax;
use metal_ext::{Encoder, Region};

fn run(
    encoder: &mut impl Encoder<Buffer = GpuBuffer>,
    x: &[f32],
    rows: usize,
    gap: usize,
    scale: f32,
) -> metal_ext::Result<Vec<f32>> {
    let width = x.len() / rows;
    let stride = if rows > 1 { (width + gap).next_multiple_of(4) } else { width };
    let mut spread = vec![f32::NAN; (rows - 1) * stride + width];
    for (row, values) in x.chunks(width).enumerate() {
        spread[row * stride..][..width].copy_from_slice(values);
    }
    let (from, to) = (GpuBuffer::from_floats(&spread), GpuBuffer::new(spread.len() * 4));
    let softmax = Softmax {
        x: Region::at(&from, 0),
        stride_x: stride,
        y: Region::at(&to, 0),
        stride_y: stride,
        width,
        rows,
        scale,
    };
    softmax.encode(encoder)?;
    let y = to.floats();
    assert!(y.chunks(stride).all(|row| row.iter().skip(width).all(|v| v.is_nan())), "a gap was written");
    Ok(y.chunks(stride).flat_map(|row| row[..width].to_vec()).collect())
}

/// Runs in all thread orders and compares, value by value: of a weight, some millionths may be lost.
fn check(x: &[f32], rows: usize, gap: usize, scale: f32, what: &str) {
    let got = run(&mut Gpu::new(Check::AllOrders), x, rows, gap, scale).unwrap();
    for (row, (got, x)) in got.chunks(x.len() / rows).zip(x.chunks(x.len() / rows)).enumerate() {
        let scaled: Vec<f64> = x.iter().map(|&v| f64::from(v * scale)).collect();
        let most = scaled.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
        let total: f64 = scaled.iter().map(|v| (v - most).exp()).sum();
        for (i, (got, v)) in got.iter().zip(&scaled).enumerate() {
            let want = (v - most).exp() / total;
            let off = (f64::from(*got) - want).abs();
            assert!(off <= 3e-6 * want + 1e-37, "{what}: value {i} of row {row} is {got}, expected {want}");
        }
    }
}

#[test]
fn rows_of_any_length() {
    for width in [1, 2, 3, 4, 5, 31, 127, 128, 129, 1023, 1024, 1025, 4099] {
        check(&Rng(width as u64).floats(width), 1, 0, 5.0, &format!("{width} values"));
    }
}

#[test]
fn several_rows_with_gaps() {
    for (rows, width, gap) in [(3, 10, 0), (5, 300, 9), (2, 1030, 4)] {
        check(&Rng(rows as u64).floats(rows * width), rows, gap, -3.0, &format!("{rows} rows of {width}"));
    }
}

#[test]
fn extreme_values_stay_what_they_are() {
    let mut x: Vec<f32> = Rng(1).floats(1100).iter().map(|v| v * 3e38).collect();
    check(&x, 1, 0, 1.0, "values that fill the range of floats");
    x.fill(-3e38);
    check(&x, 1, 0, 1.0, "equal values, far below zero");
    x[700] = f32::NEG_INFINITY;
    x[..256].fill(f32::NEG_INFINITY); // all that some threads see
    check(&x, 1, 0, 1.0, "minus infinity in places");
    x.fill(1e-45);
    check(&x, 1, 0, 1.0, "denormals");
    x.fill(f32::NEG_INFINITY);
    let got = run(&mut Gpu::new(Check::AllOrders), &x, 1, 0, 1.0).unwrap();
    assert!(got.iter().all(|v| v.is_nan()));
}

#[cfg(not(target_os = "macos"))] // a GPU does not tell
#[test]
fn a_dispatch_names_no_byte_more_than_the_kernel_touches() {
    for (index, what) in [(0, "x"), (1, "y")] {
        let error = run(&mut Shortened::new(index), &Rng(1).floats(2 * 42), 2, 0, 1.0).unwrap_err().to_string();
        assert!(error.contains("out of bounds") && error.contains(&format!("`{what}`")), "{error}");
    }
}

#[test]
fn what_the_kernel_does_not_take_is_refused_by_name_and_value() {
    let region = |offset| Region::at(&(), offset);
    let good = || Softmax { x: region(0), stride_x: 8, y: region(0), stride_y: 8, width: 6, rows: 2, scale: 1.0 };
    let error = |softmax: Softmax<'_, ()>| softmax.dispatch().unwrap_err().to_string();
    let expected = "softmax: rows of x are 6 floats apart, expected a multiple of 4 from 6";
    assert_eq!(error(Softmax { stride_x: 6, ..good() }), expected);
    assert_eq!(error(Softmax { y: region(4), ..good() }), "softmax: y begins at byte 4, expected a multiple of 16");
    let expected = "softmax: 0 rows of 6 values, expected at least one of each";
    assert_eq!(error(Softmax { rows: 0, ..good() }), expected);
}
