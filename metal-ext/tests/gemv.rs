//! The matrix-vector kernels through the encoder, against f64: every format, shapes off the tiles, one to
//! eight rows, everything that is fused, extreme values. The CPU encoder binds exactly the bytes that a dispatch names, so
//! a kernel that reads or writes one more fails.
#![cfg(any(not(target_os = "macos"), feature = "metal"))]

mod common;

#[cfg(not(target_os = "macos"))]
use common::Shortened;
use common::gpu::{Check, Gpu, GpuBuffer, SLACK};
use common::{Rng, Weights};
use half::f16;
use metal_ext::gemv::{Finish, Gate, Gemv, Norm, PackedMatrix};
use metal_ext::pack::{Format, MatrixLayout};
use metal_ext::{ColumnsPerThreadgroup, DryRun, Region};

const EPS: f32 = 1e-5;

/// What one test dispatches, with values for everything.
struct Case {
    weights: Vec<Weights>,
    x: Vec<f32>,
    rows: usize,
    /// Values between rows of x and of y beyond what is needed.
    gap: usize,
    /// Bytes before x and y in their buffers.
    lead: usize,
    gamma: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    before: Vec<f32>,
    finish: Finish,
}

impl Case {
    fn new(rng: &mut Rng, format: Format, ns: &[usize], k: usize, rows: usize) -> Case {
        let weights: Vec<Weights> = ns.iter().map(|&n| Weights::random(rng, format, n, k)).collect();
        Case {
            weights,
            x: rng.floats(rows * k),
            rows,
            gap: 0,
            lead: 0,
            gamma: None,
            bias: None,
            before: Vec::new(),
            finish: Finish::Store,
        }
    }

    fn k(&self) -> usize {
        self.weights[0].layout.k
    }

    fn all_columns(&self) -> usize {
        self.weights.iter().map(|w| w.layout.n).sum()
    }

    fn width(&self) -> usize {
        match self.finish {
            Finish::Gated(_) => self.weights[0].layout.n,
            _ => self.all_columns(),
        }
    }

    /// What f64 says, and how much float sums may be off.
    fn reference(&self) -> (Vec<f64>, Vec<f64>) {
        let k = self.k();
        let (mut values, mut bounds) = (Vec::new(), Vec::new());
        for row in 0..self.rows {
            let mut x: Vec<f64> = self.x[row * k..][..k].iter().map(|&v| f64::from(v)).collect();
            if let Some(gamma) = &self.gamma {
                let mean = x.iter().map(|v| v * v).sum::<f64>() / k as f64;
                let factor = 1.0 / (mean + f64::from(EPS)).sqrt();
                x.iter_mut().zip(gamma).for_each(|(v, g)| *v *= factor * f64::from(*g));
            }
            let (mut products, mut magnitudes) = (Vec::new(), Vec::new());
            for w in &self.weights {
                let (product, magnitude) = w.times(&x);
                products.extend(product);
                magnitudes.extend(magnitude);
            }
            if let Some(bias) = &self.bias {
                products.iter_mut().zip(bias).for_each(|(p, b)| *p += f64::from(*b));
            }
            let n = self.width();
            match self.finish {
                Finish::Store => values.extend(products),
                Finish::Add { multiplier } => {
                    let before = self.before[row * n..][..n].iter();
                    values.extend(products.iter().zip(before).map(|(p, b)| f64::from(*b) + f64::from(multiplier) * p));
                }
                Finish::Gated(gate) => {
                    let (gates, ups) = products.split_at(n);
                    values.extend(gates.iter().zip(ups).map(|(g, u)| u * gated(gate, *g)));
                    let (g, u) = magnitudes.split_at(n);
                    let both = g.iter().zip(u).map(|(g, u)| (g + 1.0) * (u + 1.0));
                    bounds.extend(both);
                    continue;
                }
            }
            bounds.extend(magnitudes);
        }
        (values, bounds)
    }

    fn run(&self, check: Check, columns: ColumnsPerThreadgroup) -> Vec<f32> {
        let (k, n) = (self.k(), self.width());
        let (stride_x, stride_y) = ((k + self.gap).next_multiple_of(4), n + self.gap);
        let spread = |values: &[f32], width: usize, stride: usize| {
            let mut bytes = vec![0xff; self.lead];
            for row in values.chunks(width) {
                bytes.extend(row.iter().flat_map(|v| v.to_le_bytes()));
                bytes.extend(std::iter::repeat_n(0xff, (stride - width) * 4));
            }
            bytes.truncate(self.lead + ((self.rows - 1) * stride + width) * 4);
            GpuBuffer::from_bytes(&bytes)
        };
        let x = spread(&self.x, k, stride_x);
        let nothing = vec![f32::NAN; self.rows * n];
        let y = spread(if self.before.is_empty() { &nothing } else { &self.before }, n, stride_y);
        let gamma = self.gamma.as_deref().map(GpuBuffer::from_floats);
        let bias = self.bias.as_deref().map(GpuBuffer::from_floats);
        let matrices: Vec<PackedMatrix<GpuBuffer>> = self.weights.iter().map(Weights::packed).collect();
        let gemv = Gemv {
            matrices: &matrices,
            x: Region::at(&x, self.lead),
            stride_x,
            y: Region::at(&y, self.lead),
            stride_y,
            rows: self.rows,
            norm: gamma.as_ref().map(|gamma| Norm { gamma: Region::at(gamma, 0), eps: EPS }),
            bias: bias.as_ref().map(|bias| Region::at(bias, 0)),
            finish: self.finish,
        };
        gemv.encode(&mut Gpu::new(check), columns).unwrap();
        let out = y.bytes();
        assert_eq!(out[..self.lead], vec![0xff; self.lead], "what lies before y was written");
        let floats: Vec<f32> =
            out[self.lead..].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        for row in floats.chunks(stride_y) {
            assert!(row.iter().skip(n).all(|v| v.is_nan()), "the gap between rows of y was written");
        }
        floats.chunks(stride_y).flat_map(|row| row[..n].to_vec()).collect()
    }

    /// Runs in all thread orders and compares.
    fn check(&self, columns: ColumnsPerThreadgroup, what: &str) {
        let got = self.run(Check::AllOrders, columns);
        let (want, bounds) = self.reference();
        for (i, ((g, w), bound)) in got.iter().zip(&want).zip(&bounds).enumerate() {
            let off = (f64::from(*g) - w).abs();
            assert!(
                off <= SLACK * 2e-6 * (bound + w.abs()),
                "{what}: value {i} is {g}, expected {w}, off by {off:e} of {bound}"
            );
        }
        assert_eq!(got.len(), want.len());
    }
}

fn gated(gate: Gate, x: f64) -> f64 {
    match gate {
        Gate::Silu => x / (1.0 + (-x).exp()),
        Gate::GeluTanh => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh()),
    }
}

/// Columns that fit the format, off the tiles where it allows.
fn widths(format: Format) -> [usize; 3] {
    match format {
        Format::F16 | Format::F16Blocked | Format::BF16 => [33, 300, 1],
        Format::Q8_0 | Format::Q4_0 => [96, 32, 1056],
        Format::Q4_K | Format::Q6_K => [256, 768, 1536],
    }
}

#[test]
fn every_format_equals_the_reference_off_the_tiles() {
    for format in Format::ALL {
        for (k, n) in widths(format).into_iter().zip([17, 6, 1]) {
            for columns in ColumnsPerThreadgroup::ALL {
                let case = Case::new(&mut Rng((n * 1000 + k) as u64), format, &[n], k, 1);
                case.check(columns, &format!("{format:?} {n} by {k}, {columns:?}"));
            }
        }
    }
}

#[test]
fn one_to_eight_rows_with_offsets_and_strides() {
    for format in Format::ALL {
        let k = widths(format)[0];
        for rows in 1..=8 {
            let mut case = Case::new(&mut Rng(rows as u64), format, &[7], k, rows);
            (case.gap, case.lead) = (5, 48);
            case.check(ColumnsPerThreadgroup::Two, &format!("{format:?}, {rows} rows"));
        }
    }
}

#[test]
fn a_norm_before_several_outputs_with_biases() {
    for format in Format::ALL {
        for (rows, ns) in [(1, vec![9, 4, 3]), (3, vec![5, 2]), (1, vec![8])] {
            let mut rng = Rng(rows as u64 + 70);
            let k = widths(format)[0];
            let mut case = Case::new(&mut rng, format, &ns, k, rows);
            case.gamma = Some(rng.floats(k));
            case.check(ColumnsPerThreadgroup::Four, &format!("{format:?}, {rows} rows to {ns:?}"));
            case.bias = Some(rng.floats(case.all_columns()));
            case.check(ColumnsPerThreadgroup::Eight, &format!("{format:?}, {rows} rows to {ns:?} with bias"));
        }
    }
}

#[test]
fn a_gate_and_its_activation() {
    for format in Format::ALL {
        for gate in [Gate::Silu, Gate::GeluTanh] {
            for rows in [1, 2, 5] {
                let mut rng = Rng(rows as u64 + 300);
                let k = widths(format)[1];
                let mut case = Case::new(&mut rng, format, &[5, 5], k, rows);
                case.gamma = Some(rng.floats(k));
                case.bias = (rows == 2).then(|| rng.floats(10));
                case.finish = Finish::Gated(gate);
                case.check(ColumnsPerThreadgroup::Two, &format!("{format:?} {gate:?}, {rows} rows"));
            }
        }
    }
}

#[test]
fn a_residual_is_added_to() {
    for format in Format::ALL {
        for (rows, multiplier) in [(1, 1.0), (2, 0.22), (8, -3.5)] {
            let mut rng = Rng(rows as u64 + 500);
            let mut case = Case::new(&mut rng, format, &[11], widths(format)[0], rows);
            case.before = rng.floats(rows * 11);
            case.bias = (rows == 2).then(|| rng.floats(11));
            case.finish = Finish::Add { multiplier };
            case.check(ColumnsPerThreadgroup::Four, &format!("{format:?}, {rows} rows times {multiplier}"));
        }
    }
}

#[test]
fn extreme_values_stay_what_they_are() {
    // The largest and the smallest half, int8, nibbles and scales that there are; sums that nearly cancel.
    let (n, k) = (3, 256);
    let big = f16::MAX.to_le_bytes();
    let tiny = f16::from_bits(1).to_le_bytes();
    for (format, stored) in [
        (Format::F16, [big, tiny].concat().repeat(n * k / 2)),
        (
            Format::BF16,
            [half::bf16::MAX.to_le_bytes(), half::bf16::from_f32(-1e-38).to_le_bytes()].concat().repeat(n * k / 2),
        ),
        (Format::Q8_0, [big.as_slice(), &[0x80, 0x7f].repeat(16)].concat().repeat(n * k / 32)),
        (Format::Q4_0, [tiny.as_slice(), &[0xf0; 16]].concat().repeat(n * k / 32)),
        (Format::Q4_K, [big.as_slice(), &big, &[0xff; 140]].concat().repeat(n)),
        (Format::Q6_K, [[0x5a; 192].as_slice(), &[0x80, 0x7f].repeat(8), &big].concat().repeat(n)),
    ] {
        let mut rng = Rng(9);
        let mut case = Case::new(&mut rng, format, &[n], k, 2);
        case.weights = vec![Weights::new(format, n, k, &stored)];
        case.x.iter_mut().step_by(3).for_each(|v| *v *= 1e-3);
        if format == Format::BF16 {
            case.x.iter_mut().for_each(|v| *v *= 1e-4); // the sum itself must stay a float
        }
        case.check(ColumnsPerThreadgroup::Four, &format!("{format:?}"));
    }
    // An activation far into saturation is exactly nothing, or the value itself.
    let ones = f16::ONE.to_le_bytes().repeat(2 * 8);
    let mut case = Case::new(&mut Rng(1), Format::F16, &[2, 2], 8, 2);
    case.weights = vec![Weights::new(Format::F16, 2, 8, &ones), Weights::new(Format::F16, 2, 8, &ones)];
    case.x = [[-1e4f32; 8], [1e4; 8]].concat();
    for gate in [Gate::Silu, Gate::GeluTanh] {
        case.finish = Finish::Gated(gate);
        let got = case.run(Check::AllOrders, ColumnsPerThreadgroup::Two);
        assert_eq!(got, [0.0, 0.0, 6.4e9, 6.4e9], "{gate:?}");
    }
}

#[test]
fn a_row_is_the_same_alone_and_among_others() {
    let mut rng = Rng(12);
    let mut all = Case::new(&mut rng, Format::Q4_0, &[6], 96, 8);
    all.gamma = Some(rng.floats(96));
    let together = all.run(Check::Fast, ColumnsPerThreadgroup::Four);
    let x = all.x.clone();
    all.rows = 1;
    for row in 0..8 {
        all.x = x[row * 96..][..96].to_vec();
        let alone = all.run(Check::Fast, ColumnsPerThreadgroup::Four);
        // A GPU's compiler may order the sums of another kernel differently.
        match cfg!(target_os = "macos") {
            true => common::close(
                &alone,
                &together[row * 6..][..6].iter().map(|&v| v.into()).collect::<Vec<_>>(),
                1e-6,
                "row",
            ),
            false => assert_eq!(alone, together[row * 6..][..6], "row {row}"),
        }
    }
}

/// Dispatches one matrix of 4 by 64 with this x and y.
fn dispatch(format: Format, x: Region<'_, GpuBuffer>, rows: usize, stride_x: usize) -> metal_ext::Result<()> {
    let (weights, y) = (Weights::random(&mut Rng(1), format, 4, 64), GpuBuffer::new(8 * 4 * 4));
    let gemv = Gemv {
        matrices: &[weights.packed()],
        x,
        stride_x,
        y: Region::at(&y, 0),
        stride_y: 4,
        rows,
        norm: None,
        bias: None,
        finish: Finish::Store,
    };
    gemv.encode(&mut Gpu::new(Check::Accesses), ColumnsPerThreadgroup::Two)
}

#[test]
fn what_the_kernels_do_not_take_is_refused_by_name_and_value() {
    let x = GpuBuffer::new(64 * 4 * 9);
    for (offset, rows, stride, message) in [
        (4, 1, 64, "gemv: x begins at byte 4, expected a multiple of 16"),
        (0, 9, 64, "gemv: 9 rows, expected 1 to 8"),
        (0, 0, 64, "gemv: 0 rows, expected 1 to 8"),
        (0, 2, 66, "gemv: rows of x are 66 floats apart, expected a multiple of 4 from 64"),
        (0, 2, 60, "gemv: rows of x are 60 floats apart, expected a multiple of 4 from 64"),
    ] {
        let error = dispatch(Format::F16, Region::at(&x, offset), rows, stride).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
    let error = ColumnsPerThreadgroup::try_from(3).unwrap_err().to_string();
    assert_eq!(error, "columns per threadgroup: 3 is none of 2, 4 and 8");
    // A buffer that is one float short is an error of the dispatch, not a read past its end.
    let short = GpuBuffer::new(63 * 4);
    let error = dispatch(Format::Q8_0, Region::at(&short, 0), 1, 64).unwrap_err().to_string();
    assert!(error.contains("bytes 0..256 of a buffer of 252 are bound"), "{error}");
}

#[cfg(not(target_os = "macos"))] // a GPU does not tell
#[test]
fn a_dispatch_names_no_byte_more_than_the_kernel_touches() {
    for format in Format::ALL {
        let mut rng = Rng(4);
        let k = widths(format)[0].next_multiple_of(8); // no padding, which nobody would read
        let weights = Weights::random(&mut rng, format, 4, k);
        let (x, y) = (GpuBuffer::from_floats(&rng.floats(k)), GpuBuffer::new(4 * 4));
        let (gamma, bias) = (GpuBuffer::from_floats(&rng.floats(k)), GpuBuffer::from_floats(&rng.floats(4)));
        let gemv = Gemv {
            matrices: &[weights.packed()],
            x: Region::at(&x, 0),
            stride_x: k,
            y: Region::at(&y, 0),
            stride_y: 4,
            rows: 1,
            norm: Some(Norm { gamma: Region::at(&gamma, 0), eps: EPS }),
            bias: Some(Region::at(&bias, 0)),
            finish: Finish::Store,
        };
        for (index, what) in [(0, "w0"), (3, "x"), (4, "gamma"), (5, "bias"), (6, "y")] {
            if format == Format::F16Blocked && index == 0 && !k.is_multiple_of(32) {
                continue; // its last block is padded
            }
            let error = gemv.encode(&mut Shortened::new(index), ColumnsPerThreadgroup::Two).unwrap_err().to_string();
            assert!(error.contains("out of bounds") && error.contains(&format!("`{what}`")), "{format:?}: {error}");
        }
    }
}

#[test]
fn a_dry_run_lists_what_is_read_and_written() {
    let layout = MatrixLayout::new(Format::Q8_0, 100, 64).unwrap();
    let matrix = PackedMatrix { layout, buffer: &(), offset: 0 };
    let gemv = Gemv {
        matrices: &[matrix, matrix],
        x: Region::at(&(), 0),
        stride_x: 64,
        y: Region::at(&(), 0),
        stride_y: 200,
        rows: 2,
        norm: None,
        bias: None,
        finish: Finish::Store,
    };
    let mut list = DryRun::new();
    gemv.encode(&mut list, ColumnsPerThreadgroup::Four).unwrap();
    let recorded = &list.dispatches[0];
    assert_eq!(recorded.kernel, "gemv_q8_0_2");
    assert_eq!((recorded.threadgroups, recorded.threads), ([25, 1, 1], [128, 1, 1]));
    assert_eq!(recorded.read, 2 * 100 * 68 + 2 * 64 * 4);
    assert_eq!(recorded.written, 2 * 200 * 4);
}
