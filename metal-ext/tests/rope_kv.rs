//! Norms of q and k, RoPE and the KV cache through the encoder, against f64: both pairings, partial rotation,
//! both norms, both types, rows of several sequences in one region. Buffers end where their contents do.
#![cfg(any(not(target_os = "macos"), feature = "metal"))]

mod common;

use common::Rng;
#[cfg(not(target_os = "macos"))]
use common::Shortened;
use common::gpu::{Check, Gpu, GpuBuffer};
use common::kv::{poisoned, read_kv};
use half::f16;
use metal_ext::kv::{KvRow, KvShape, KvType};
use metal_ext::rope_kv::{Angles, NormOver, Pairing, QkNorm, Rope, RopeKv};
use metal_ext::{DryRun, Region};

const EPS: f32 = 1e-5;

/// What one test dispatches.
struct Case {
    heads: usize,
    shape: KvShape,
    rows: Vec<KvRow>,
    norm: Option<NormOver>,
    rope: Option<(usize, Pairing, Angles)>,
    qkv: Vec<f32>,
    gamma_q: Vec<f32>,
    gamma_k: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Floats between rows beyond what is needed.
    gap: usize,
}

/// What came out: q, and the regions of keys and values.
struct Out {
    q: Vec<f32>,
    keys: GpuBuffer,
    values: GpuBuffer,
}

impl Case {
    fn new(shape: KvShape, heads: usize, rows: &[KvRow]) -> Case {
        let mut rng = Rng((heads * 1000 + shape.head_dim) as u64);
        let last = rows.iter().map(|row| row.position).max().unwrap() + 1;
        let angles: Vec<f32> = (0..last * shape.head_dim / 2).map(|_| rng.float() * 3.0).collect();
        Case {
            heads,
            shape,
            rows: rows.to_vec(),
            norm: None,
            rope: None,
            qkv: rng.floats(rows.len() * (heads + 2 * shape.kv_heads) * shape.head_dim),
            gamma_q: rng.floats(heads * shape.head_dim),
            gamma_k: rng.floats(shape.kv_heads * shape.head_dim),
            cos: angles.iter().map(|a| a.cos()).collect(),
            sin: angles.iter().map(|a| a.sin()).collect(),
            gap: 0,
        }
    }

    fn width(&self) -> usize {
        (self.heads + 2 * self.shape.kv_heads) * self.shape.head_dim
    }

    /// Calls `then` with the dispatch's host side over buffers of exactly the sizes needed.
    fn with(&self, then: impl FnOnce(&RopeKv<'_, GpuBuffer>)) -> Out {
        let (width, q_width) = (self.width(), self.heads * self.shape.head_dim);
        let stride = width + self.gap;
        let mut spread = vec![f32::NAN; (self.rows.len() - 1) * stride + width];
        for (row, values) in self.qkv.chunks(width).enumerate() {
            spread[row * stride..][..width].copy_from_slice(values);
        }
        let qkv = GpuBuffer::from_floats(&spread);
        let q = GpuBuffer::new(((self.rows.len() - 1) * (q_width + self.gap) + q_width) * 4);
        let end = self.rows.iter().map(|row| row.offset + self.shape.bytes(row.capacity)).max().unwrap();
        let (keys, values) = (GpuBuffer::new(end), GpuBuffer::new(end));
        let gammas = |gamma: &[f32], over: NormOver| match over {
            NormOver::Head => GpuBuffer::from_floats(&gamma[..self.shape.head_dim]),
            NormOver::Projection => GpuBuffer::from_floats(gamma),
        };
        let gamma = self.norm.map(|over| (gammas(&self.gamma_q, over), gammas(&self.gamma_k, over), over));
        let tables = self.rope.map(|(rotary_dim, pairing, angles)| {
            let rows = match angles {
                Angles::OfRow => self.rows.len(),
                Angles::OfPosition => self.rows.iter().map(|row| row.position).max().unwrap() + 1,
            };
            let table = |values: &[f32]| GpuBuffer::from_floats(&values[..rows * rotary_dim / 2]);
            (table(&self.cos), table(&self.sin), rotary_dim, pairing, angles)
        });
        then(&RopeKv {
            heads: self.heads,
            shape: self.shape,
            qkv: Region::at(&qkv, 0),
            stride_qkv: stride,
            norm: gamma.as_ref().map(|(gamma_q, gamma_k, over)| QkNorm {
                over: *over,
                gamma_q: Region::at(gamma_q, 0),
                gamma_k: Region::at(gamma_k, 0),
                eps: EPS,
            }),
            rope: tables.as_ref().map(|(cos, sin, rotary_dim, pairing, angles)| Rope {
                cos: Region::at(cos, 0),
                sin: Region::at(sin, 0),
                angles: *angles,
                rotary_dim: *rotary_dim,
                pairing: *pairing,
            }),
            q: Region::at(&q, 0),
            stride_q: q_width + self.gap,
            keys: Region::at(&keys, 0),
            values: Region::at(&values, 0),
            rows: &self.rows,
        });
        let q = q.floats().chunks(q_width + self.gap).flat_map(|row| row[..q_width].to_vec()).collect();
        Out { q, keys, values }
    }

    fn run(&self, check: Check) -> Out {
        self.with(|rope_kv| rope_kv.encode(&mut Gpu::new(check)).unwrap())
    }

    /// Head `index` of a row, counted through q, k and v, as f64 says it leaves the kernel.
    fn reference(&self, row: usize, index: usize) -> Vec<f64> {
        let dim = self.shape.head_dim;
        let all: Vec<f64> = self.qkv[row * self.width()..][..self.width()].iter().map(|&v| f64::from(v)).collect();
        let (is_q, is_v) = (index < self.heads, index >= self.heads + self.shape.kv_heads);
        let mut head = all[index * dim..][..dim].to_vec();
        if is_v {
            return head;
        }
        if let Some(over) = self.norm {
            let (first, count) = if is_q { (0, self.heads) } else { (self.heads, self.shape.kv_heads) };
            let (normed, gamma_at) = match over {
                NormOver::Head => (head.clone(), 0),
                NormOver::Projection => (all[first * dim..][..count * dim].to_vec(), (index - first) * dim),
            };
            let mean = normed.iter().map(|v| v * v).sum::<f64>() / normed.len() as f64;
            let gamma = &(if is_q { &self.gamma_q } else { &self.gamma_k })[gamma_at..];
            let factor = 1.0 / (mean + f64::from(EPS)).sqrt();
            head.iter_mut().zip(gamma).for_each(|(v, g)| *v *= factor * f64::from(*g));
        }
        if let Some((rotary_dim, pairing, angles)) = self.rope {
            let pairs = rotary_dim / 2;
            let table = match angles {
                Angles::OfRow => row,
                Angles::OfPosition => self.rows[row].position,
            };
            for pair in 0..pairs {
                let (a, b) = match pairing {
                    Pairing::Halves => (pair, pair + pairs),
                    Pairing::Neighbours => (2 * pair, 2 * pair + 1),
                };
                let angle = |values: &[f32]| f64::from(values[table * pairs + pair]);
                let (c, s, x, y) = (angle(&self.cos), angle(&self.sin), head[a], head[b]);
                (head[a], head[b]) = (x * c - y * s, x * s + y * c);
            }
        }
        head
    }

    /// Runs in all thread orders and compares q, what was appended, and that nothing else was.
    fn check(&self, what: &str) {
        let out = self.run(Check::AllOrders);
        let (dim, shape) = (self.shape.head_dim, &self.shape);
        for row in 0..self.rows.len() {
            for head in 0..self.heads {
                let got = &out.q[(row * self.heads + head) * dim..][..dim];
                for (i, (got, want)) in got.iter().zip(self.reference(row, head)).enumerate() {
                    assert!(
                        (f64::from(*got) - want).abs() <= 1e-5 * want.abs().max(1.0),
                        "{what}: q of row {row}, head {head}, value {i} is {got}, expected {want}"
                    );
                }
            }
            let place = self.rows[row];
            for (kind, buffer) in [&out.keys, &out.values].into_iter().enumerate() {
                for head in 0..shape.kv_heads {
                    let want = self.reference(row, self.heads + kind * shape.kv_heads + head);
                    let got = read_kv(shape, &buffer.bytes(), place, head);
                    for (group, (got, want)) in got.chunks(32).zip(want.chunks(32)).enumerate() {
                        let greatest = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
                        for (got, want) in got.iter().zip(want) {
                            // Half a step of the type, and what the scale's own rounding adds at the far end.
                            let step = match shape.kv_type {
                                KvType::F16 => (want.abs() / 2048.0).max(6e-8),
                                KvType::Q8_0 => greatest / 127.0 * 0.6,
                            };
                            assert!(
                                (got - want).abs() <= step + 1e-5,
                                "{what}: {kind} of row {row}, head {head}, group {group} has {got}, expected {want}"
                            );
                        }
                    }
                }
            }
        }
        for buffer in [&out.keys, &out.values] {
            let written = buffer.bytes().len() - poisoned(shape, &buffer.bytes(), &self.rows);
            assert_eq!(written, self.rows.len() * shape.bytes(1), "{what}: bytes beside the rows' own were written");
        }
    }
}

fn at(position: usize, capacity: usize, offset: usize) -> KvRow {
    KvRow { position, capacity, offset }
}

#[test]
fn every_head_size_and_type_with_both_pairings() {
    for kv_type in KvType::ALL {
        for head_dim in [64, 80, 96, 128, 256] {
            for pairing in [Pairing::Halves, Pairing::Neighbours] {
                let shape = KvShape { kv_type, kv_heads: 1, head_dim };
                let mut case = Case::new(shape, 2, &[at(3, 4, 0)]);
                case.rope = Some((head_dim, pairing, Angles::OfPosition));
                case.check(&format!("{shape:?}, {pairing:?}"));
            }
        }
    }
}

#[test]
fn a_part_of_a_head_is_rotated_or_none() {
    for kv_type in KvType::ALL {
        for rope in [Some(2), Some(20), Some(66), None] {
            for pairing in [Pairing::Halves, Pairing::Neighbours] {
                let shape = KvShape { kv_type, kv_heads: 2, head_dim: 80 };
                let mut case = Case::new(shape, 4, &[at(2, 5, 0)]);
                case.rope = rope.map(|rotary_dim| (rotary_dim, pairing, Angles::OfPosition));
                case.check(&format!("{shape:?}, {rope:?} rotated as {pairing:?}"));
            }
        }
    }
}

#[test]
fn norms_over_a_head_and_over_the_whole_projection() {
    for over in [NormOver::Head, NormOver::Projection] {
        for (head_dim, heads, kv_heads) in [(64, 3, 3), (80, 4, 2), (256, 2, 1)] {
            let shape = KvShape { kv_type: KvType::F16, kv_heads, head_dim };
            let mut case = Case::new(shape, heads, &[at(0, 1, 0), at(0, 2, shape.bytes(1))]);
            case.norm = Some(over);
            case.rope = Some((head_dim, Pairing::Halves, Angles::OfPosition));
            case.check(&format!("{shape:?}, {over:?}"));
        }
    }
}

#[test]
fn rows_of_several_sequences_in_one_region() {
    for kv_type in KvType::ALL {
        let shape = KvShape { kv_type, kv_heads: 2, head_dim: 64 };
        let second = shape.bytes(7).next_multiple_of(16);
        let third = second + shape.bytes(16).next_multiple_of(16);
        // Two rows of one sequence among them, and last positions of all.
        let rows = [at(6, 7, 0), at(14, 16, second), at(15, 16, second), at(0, 1, third)];
        for angles in [Angles::OfRow, Angles::OfPosition] {
            let mut case = Case::new(shape, 4, &rows);
            (case.gap, case.norm) = (8, Some(NormOver::Head));
            case.rope = Some((64, Pairing::Halves, angles));
            case.check(&format!("{kv_type:?}, {angles:?}"));
        }
    }
}

#[test]
fn zeros_and_extreme_values_are_kept() {
    for kv_type in KvType::ALL {
        let shape = KvShape { kv_type, kv_heads: 1, head_dim: 64 };
        let mut case = Case::new(shape, 1, &[at(0, 1, 0)]);
        // Keys of zeros; values whose scale is far below the smallest half, and such as reach its end.
        case.qkv[64..128].fill(0.0);
        case.qkv[128..160].iter_mut().for_each(|v| *v *= 1e-9);
        case.qkv[160..192].iter_mut().for_each(|v| *v *= 6e4);
        let out = case.run(Check::AllOrders);
        assert_eq!(read_kv(&shape, &out.keys.bytes(), case.rows[0], 0), [0.0; 64], "{kv_type:?}");
        let values = read_kv(&shape, &out.values.bytes(), case.rows[0], 0);
        assert!(values[..32].iter().all(|&v| v == 0.0), "{kv_type:?}: {:?}", &values[..32]);
        for (got, want) in values[32..].iter().zip(&case.qkv[160..]) {
            assert!((got - f64::from(*want)).abs() <= 300.0, "{kv_type:?}: {got}, expected {want}");
        }
        // A norm of nothing but zeros is zeros.
        case.norm = Some(NormOver::Head);
        case.qkv.fill(0.0);
        assert!(case.run(Check::AllOrders).q.iter().all(|&v| v == 0.0));
    }
    // The scale of the smallest group that has one: bytes are made with the scale as stored.
    let shape = KvShape { kv_type: KvType::Q8_0, kv_heads: 1, head_dim: 64 };
    let mut case = Case::new(shape, 1, &[at(0, 1, 0)]);
    let denormal = f16::from_bits(1).to_f32();
    case.qkv[64..128].fill(denormal * 100.0);
    let out = case.run(Check::AllOrders);
    let keys = read_kv(&shape, &out.keys.bytes(), case.rows[0], 0);
    assert!(keys.iter().all(|&v| (v - f64::from(denormal) * 100.0).abs() < 1e-12), "{keys:?}");
}

#[cfg(not(target_os = "macos"))] // a GPU does not tell
#[test]
fn a_dispatch_names_no_byte_more_than_the_kernel_touches() {
    for kv_type in KvType::ALL {
        let shape = KvShape { kv_type, kv_heads: 2, head_dim: 80 };
        let mut case = Case::new(shape, 4, &[at(1, 8, 0), at(4, 8, shape.bytes(8))]);
        case.norm = Some(NormOver::Head);
        case.rope = Some((80, Pairing::Neighbours, Angles::OfPosition));
        let names = ["qkv", "gamma_q", "gamma_k", "cos_table", "sin_table", "q", "keys", "values"];
        for (index, what) in (0..).zip(names) {
            case.with(|rope_kv| {
                let error = rope_kv.encode(&mut Shortened::new(index)).unwrap_err();
                let error = error.to_string();
                assert!(
                    error.contains("out of bounds") && error.contains(&format!("`{what}`")),
                    "{kv_type:?}: {error}"
                );
            });
        }
    }
}

#[test]
fn a_dry_run_lists_what_is_read_and_written() {
    let shape = KvShape { kv_type: KvType::Q8_0, kv_heads: 8, head_dim: 128 };
    let nothing = Region::at(&(), 0);
    let rope_kv = RopeKv {
        heads: 32,
        shape,
        qkv: nothing,
        stride_qkv: 48 * 128,
        norm: None,
        rope: Some(Rope {
            cos: nothing,
            sin: nothing,
            angles: Angles::OfPosition,
            rotary_dim: 128,
            pairing: Pairing::Halves,
        }),
        q: nothing,
        stride_q: 32 * 128,
        keys: nothing,
        values: nothing,
        rows: &[at(1000, 4096, 0), at(5, 4096, shape.bytes(4096))],
    };
    let mut list = DryRun::new();
    rope_kv.encode(&mut list).unwrap();
    let recorded = &list.dispatches[0];
    assert_eq!(recorded.kernel, "rope_kv_q8_0");
    assert_eq!((recorded.threadgroups, recorded.threads), ([12, 2, 1], [128, 1, 1]));
    assert_eq!(recorded.read, 2 * (48 * 128 * 4 + 2 * 64 * 4));
    assert_eq!(recorded.written, 2 * (32 * 128 * 4 + 2 * 8 * (128 + 4 * 2)));
}

#[test]
fn what_the_kernels_do_not_take_is_refused_by_name_and_value() {
    let error = |shape: KvShape, heads: usize, rows: &[KvRow], rope: Option<(usize, Pairing, Angles)>| {
        let mut message = String::new();
        let mut case = Case::new(shape, heads, &[at(0, 1, 0)]);
        case.rope = rope.map(|(_, pairing, angles)| (16, pairing, angles));
        case.with(|rope_kv| {
            let changed = RopeKv { rows, ..copied(rope_kv, rope.map(|rope| rope.0)) };
            message = changed.dispatch().unwrap_err().to_string();
        });
        message
    };
    let shape = |head_dim| KvShape { kv_type: KvType::F16, kv_heads: 2, head_dim };
    let row = [at(0, 1, 0)];
    let rope = |dim| Some((dim, Pairing::Halves, Angles::OfRow));
    for (message, expected) in [
        (error(shape(72), 2, &row, None), "rope_kv: heads of 72 values, expected a multiple of 16 up to 256"),
        (error(shape(512), 2, &row, None), "rope_kv: heads of 512 values, expected a multiple of 16 up to 256"),
        (error(shape(64), 3, &row, None), "rope_kv: 3 query heads cannot share 2 key heads"),
        (error(shape(64), 2, &[], None), "rope_kv: 0 rows, expected 1 to 128"),
        (error(shape(64), 2, &[at(9, 9, 0)], None), "rope_kv: position 9 is past the KV cache's 9"),
        (
            error(shape(64), 2, &[at(0, 9, 8)], None),
            "rope_kv: a sequence's keys begin at byte 8, expected a multiple of 16",
        ),
        (error(shape(64), 2, &row, rope(66)), "rope_kv: 66 values are rotated, expected an even number up to 64"),
        (error(shape(64), 2, &row, rope(31)), "rope_kv: 31 values are rotated, expected an even number up to 64"),
    ] {
        assert_eq!(message, expected);
    }
}

/// The same dispatch, with so many values rotated.
fn copied<'a>(from: &RopeKv<'a, GpuBuffer>, rotary_dim: Option<usize>) -> RopeKv<'a, GpuBuffer> {
    let rope = from.rope.as_ref().zip(rotary_dim);
    RopeKv { norm: None, rope: rope.map(|(rope, rotary_dim)| Rope { rotary_dim, ..*rope }), ..*from }
}
