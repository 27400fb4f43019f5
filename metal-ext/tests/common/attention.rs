//! A step's attention over KV caches of exactly their size, and what f64 says it gives.

use super::Rng;
use super::gpu::{Check, Gpu, GpuBuffer};
use super::kv::{read_kv, unlike, write_kv};
use metal_ext::attention::{Attention, AttentionShape, KvRows};
use metal_ext::heads::{Angles, NormOver, Pairing, QkNorm, Rope};
use metal_ext::kv::{KvRow, KvShape, KvType};
use metal_ext::{Encoder, Region};

const EPS: f32 = 1e-5;

/// Rows, each of a sequence of its own.
#[derive(Clone)]
pub struct Case {
    pub shape: AttentionShape,
    pub rows: Vec<KvRow>,
    /// Rows of q, k and v.
    pub qkv: Vec<f32>,
    /// The caches before the step.
    pub keys: Vec<u8>,
    pub values: Vec<u8>,
    pub norm: Option<NormOver>,
    pub rope: Option<(usize, Pairing, Angles)>,
    gamma_q: Vec<f32>,
    gamma_k: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Floats between rows beyond what is needed.
    pub gap: usize,
    pub regions: Regions,
}

/// Where the sequences' keys lie, and where their values.
#[derive(Clone, Copy)]
pub enum Regions {
    /// In one region: a dispatch for all rows.
    One,
    /// In one for each row: a dispatch for each.
    OfEachRow,
}

/// Which of a row's heads.
#[derive(Clone, Copy)]
pub enum Kind {
    Q,
    K,
    V,
}

/// What came out.
#[derive(Clone, Debug, PartialEq)]
pub struct Out {
    pub y: Vec<f32>,
    /// The caches after the step.
    pub keys: Vec<u8>,
    pub values: Vec<u8>,
}

/// A shape without window and soft cap.
pub fn shape(kv_type: KvType, head_dim: usize, kv_heads: usize, group: usize) -> AttentionShape {
    let kv = KvShape { kv_type, kv_heads, head_dim };
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttentionShape { heads: kv_heads * group, kv, scale, softcap: None, window: None }
}

impl Case {
    /// A row of its own sequence for each pair of position and capacity, neither normalised nor rotated. What a row does
    /// not see is NaN, and so is where its own key and value go.
    pub fn new(shape: AttentionShape, rows: &[(usize, usize)]) -> Case {
        let mut offset = 0;
        let place = |&(position, capacity): &(usize, usize)| {
            let row = KvRow { position, capacity, offset };
            offset += shape.kv.bytes(capacity).next_multiple_of(16);
            row
        };
        let rows: Vec<KvRow> = rows.iter().map(place).collect();
        let bytes = rows.iter().map(|row| row.offset + shape.kv.bytes(row.capacity)).max().unwrap();
        let mut rng = Rng((bytes + shape.heads) as u64);
        let KvShape { kv_heads, head_dim, .. } = shape.kv;
        let last = rows.iter().map(|row| row.position).max().unwrap().max(rows.len()) + 1;
        let angles: Vec<f32> = (0..last * head_dim / 2).map(|_| rng.float() * 3.0).collect();
        let mut case = Case {
            shape,
            qkv: rng.floats(rows.len() * (shape.heads + 2 * kv_heads) * head_dim),
            keys: vec![0xff; bytes],
            values: vec![0xff; bytes],
            rows,
            norm: None,
            rope: None,
            gamma_q: rng.floats(shape.heads * head_dim),
            gamma_k: rng.floats(kv_heads * head_dim),
            cos: angles.iter().map(|angle| angle.cos()).collect(),
            sin: angles.iter().map(|angle| angle.sin()).collect(),
            gap: 0,
            regions: Regions::One,
        };
        for row in case.rows.clone() {
            for position in case.cached(row) {
                for head in 0..kv_heads {
                    let at = KvRow { position, ..row };
                    // A few keys stand out.
                    let factor = if rng.next().is_multiple_of(8) { 4.0 } else { 1.0 };
                    let key: Vec<f32> = rng.floats(head_dim).iter().map(|v| v * factor).collect();
                    write_kv(&shape.kv, &mut case.keys, at, head, &key);
                    write_kv(&shape.kv, &mut case.values, at, head, &rng.floats(head_dim));
                }
            }
        }
        case
    }

    /// The same with q and k rotated whole, in halves.
    pub fn rotated(shape: AttentionShape, rows: &[(usize, usize)]) -> Case {
        Case { rope: Some((shape.kv.head_dim, Pairing::Halves, Angles::OfRow)), ..Case::new(shape, rows) }
    }

    /// The positions that a row sees.
    fn seen(&self, row: KvRow) -> std::ops::Range<usize> {
        let first = self.shape.window.map_or(0, |window| (row.position + 1).saturating_sub(window));
        first..row.position + 1
    }

    /// Those of them that are there before the step.
    pub fn cached(&self, row: KvRow) -> std::ops::Range<usize> {
        self.seen(row).start..row.position
    }

    fn width(&self) -> usize {
        (self.shape.heads + 2 * self.shape.kv.kv_heads) * self.shape.kv.head_dim
    }

    fn y_width(&self) -> usize {
        self.shape.heads * self.shape.kv.head_dim
    }

    /// The first head of this kind within a row of q, k and v, and how many there are.
    fn heads(&self, kind: Kind) -> (usize, usize) {
        let AttentionShape { heads, kv, .. } = self.shape;
        match kind {
            Kind::Q => (0, heads),
            Kind::K => (heads, kv.kv_heads),
            Kind::V => (heads + kv.kv_heads, kv.kv_heads),
        }
    }

    /// The values of this kind in all rows.
    pub fn each(&mut self, kind: Kind, change: impl Fn(&mut f32)) {
        let (width, dim, (first, count)) = (self.width(), self.shape.kv.head_dim, self.heads(kind));
        for row in self.qkv.chunks_mut(width) {
            row[first * dim..][..count * dim].iter_mut().for_each(&change);
        }
    }

    /// The row of index `row` alone.
    pub fn alone(&self, row: usize) -> Case {
        let (width, width_of_table) = (self.width(), self.rope.map_or(0, |(rotary_dim, ..)| rotary_dim / 2));
        let skipped = match self.rope {
            Some((.., Angles::OfRow)) => row * width_of_table,
            _ => 0,
        };
        Case {
            qkv: self.qkv[row * width..][..width].to_vec(),
            rows: vec![self.rows[row]],
            cos: self.cos[skipped..].to_vec(),
            sin: self.sin[skipped..].to_vec(),
            ..self.clone()
        }
    }

    /// Dispatches through the encoder.
    pub fn encode(&self, encoder: &mut impl Encoder<Buffer = GpuBuffer>) -> metal_ext::Result<Out> {
        let (width, y_width) = (self.width(), self.y_width());
        let (stride, stride_y) = (width + self.gap, y_width + self.gap);
        let mut spread = vec![f32::NAN; (self.rows.len() - 1) * stride + width];
        for (row, values) in self.qkv.chunks(width).enumerate() {
            spread[row * stride..][..width].copy_from_slice(values);
        }
        let (qkv, y) =
            (GpuBuffer::from_floats(&spread), GpuBuffer::new(((self.rows.len() - 1) * stride_y + y_width) * 4));
        let (keys, values) = (GpuBuffer::from_bytes(&self.keys), GpuBuffer::from_bytes(&self.values));
        let capacity = self.rows.iter().map(|row| row.capacity).max().unwrap();
        let scratch = GpuBuffer::new(self.shape.scratch_bytes(self.rows.len(), capacity));
        let gammas = |gamma: &[f32], over: NormOver| match over {
            NormOver::Head => GpuBuffer::from_floats(&gamma[..self.shape.kv.head_dim]),
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
        // The rows of a region's sequences, from this one of all on.
        let rope_from = |first: usize| {
            tables.as_ref().map(|(cos, sin, rotary_dim, pairing, angles)| {
                let skipped = match angles {
                    Angles::OfRow => first * rotary_dim * 2,
                    Angles::OfPosition => 0,
                };
                let (cos, sin) = (Region::at(cos, skipped), Region::at(sin, skipped));
                Rope { cos, sin, angles: *angles, rotary_dim: *rotary_dim, pairing: *pairing }
            })
        };
        let kv_rows =
            |first: usize, offset: usize| (Region::at(&keys, offset), Region::at(&values, offset), rope_from(first));
        let from_zero: Vec<KvRow> = self.rows.iter().map(|row| KvRow { offset: 0, ..*row }).collect();
        let sequences: Vec<KvRows<'_, GpuBuffer>> = match self.regions {
            Regions::One => {
                let (keys, values, rope) = kv_rows(0, 0);
                vec![KvRows { keys, values, rows: &self.rows, rope }]
            }
            Regions::OfEachRow => {
                let rows = self.rows.iter().zip(from_zero.chunks(1)).enumerate();
                rows.map(|(index, (row, rows))| {
                    let (keys, values, rope) = kv_rows(index, row.offset);
                    KvRows { keys, values, rows, rope }
                })
                .collect()
            }
        };
        let attention = Attention {
            shape: self.shape,
            qkv: Region::at(&qkv, 0),
            stride_qkv: stride,
            norm: gamma.as_ref().map(|(gamma_q, gamma_k, over)| QkNorm {
                over: *over,
                gamma_q: Region::at(gamma_q, 0),
                gamma_k: Region::at(gamma_k, 0),
                eps: EPS,
            }),
            sequences: &sequences,
            y: Region::at(&y, 0),
            stride_y,
            scratch: Region::at(&scratch, 0),
        };
        attention.encode(encoder)?;
        let y = y.floats();
        for row in y.chunks(stride_y) {
            assert!(row.iter().skip(y_width).all(|v| v.is_nan()), "the gap between rows of y was written");
        }
        let y = y.chunks(stride_y).flat_map(|row| row[..y_width].to_vec()).collect();
        Ok(Out { y, keys: keys.bytes(), values: values.bytes() })
    }

    /// A head of a row as f64 has it after norm and RoPE.
    fn prepared(&self, row: usize, kind: Kind, head: usize) -> Vec<f64> {
        let (dim, (first, count)) = (self.shape.kv.head_dim, self.heads(kind));
        let all = &self.qkv[row * self.width()..][..self.width()];
        let of_kind: Vec<f64> = all[first * dim..][..count * dim].iter().map(|&v| f64::from(v)).collect();
        let mut out = of_kind[head * dim..][..dim].to_vec();
        let gamma = match kind {
            Kind::Q => &self.gamma_q,
            Kind::K => &self.gamma_k,
            Kind::V => return out,
        };
        if let Some(over) = self.norm {
            let (normed, gamma) = match over {
                NormOver::Head => (&out, &gamma[..dim]),
                NormOver::Projection => (&of_kind, &gamma[head * dim..][..dim]),
            };
            let mean = normed.iter().map(|v| v * v).sum::<f64>() / normed.len() as f64;
            let factor = 1.0 / (mean + f64::from(EPS)).sqrt();
            out.iter_mut().zip(gamma).for_each(|(v, g)| *v *= factor * f64::from(*g));
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
                let (c, s, x, y) = (angle(&self.cos), angle(&self.sin), out[a], out[b]);
                (out[a], out[b]) = (x * c - y * s, x * s + y * c);
            }
        }
        out
    }

    /// What f64 makes of the caches after the step, and the greatest value among those that are mixed.
    fn reference(&self, after: &Out) -> Vec<(f64, f64)> {
        let AttentionShape { heads, kv, scale, softcap, .. } = self.shape;
        let group = heads / kv.kv_heads;
        let mut out = Vec::new();
        for (index, &row) in self.rows.iter().enumerate() {
            for kv_head in 0..kv.kv_heads {
                let read = |bytes: &[u8]| -> Vec<Vec<f64>> {
                    self.seen(row).map(|position| read_kv(&kv, bytes, KvRow { position, ..row }, kv_head)).collect()
                };
                let (keys, values) = (read(&after.keys), read(&after.values));
                for head in kv_head * group..(kv_head + 1) * group {
                    let q = self.prepared(index, Kind::Q, head);
                    let score = |key: &Vec<f64>| {
                        let product: f64 = key.iter().zip(&q).map(|(k, q)| k * q).sum();
                        let score = product * f64::from(scale);
                        softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                    };
                    let scores: Vec<f64> = keys.iter().map(score).collect();
                    let most = scores.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
                    let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for dim in 0..kv.head_dim {
                        let mixed: f64 = weights.iter().zip(&values).map(|(w, v)| w * v[dim]).sum();
                        let greatest = values.iter().fold(0.0f64, |m, v| m.max(v[dim].abs()));
                        out.push((mixed / total, greatest));
                    }
                }
            }
        }
        out
    }

    /// What of a cache is not as it should be after the step: each row's own entries rounded to the type, and no other
    /// byte changed.
    fn cache_differs(&self, kind: Kind, before: &[u8], after: &[u8]) -> Option<String> {
        let kv = &self.shape.kv;
        if let Some(byte) = unlike(kv, before, after, &self.rows) {
            return Some(format!("byte {byte} beside the rows' own was written"));
        }
        for (index, &row) in self.rows.iter().enumerate() {
            for head in 0..kv.kv_heads {
                let (got, want) = (read_kv(kv, after, row, head), self.prepared(index, kind, head));
                for (group, (got, want)) in got.chunks(32).zip(want.chunks(32)).enumerate() {
                    let greatest = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
                    for (got, want) in got.iter().zip(want) {
                        // Half a step of the type, and what the scale's own rounding adds at the far end.
                        let step = match kv.kv_type {
                            KvType::F16 => (want.abs() / 2048.0).max(6e-8),
                            KvType::Q8_0 => greatest / 127.0 * 0.6,
                        };
                        let near = (got - want).abs() <= step + 1e-5;
                        if !near {
                            return Some(format!("row {index}, head {head}, group {group} has {got}, expected {want}"));
                        }
                    }
                }
            }
        }
        None
    }

    /// What of these results is not within `tolerance` of the values' magnitude, or of the caches not as it should be.
    pub fn differs(&self, got: &Out, tolerance: f64) -> Option<String> {
        for (what, kind, before, after) in
            [("keys", Kind::K, &self.keys, &got.keys), ("values", Kind::V, &self.values, &got.values)]
        {
            if let Some(difference) = self.cache_differs(kind, before, after) {
                return Some(format!("{what}: {difference}"));
            }
        }
        let (dim, heads) = (self.shape.kv.head_dim, self.shape.heads);
        let want = self.reference(got);
        assert_eq!(got.y.len(), want.len());
        got.y.iter().zip(want).enumerate().find_map(|(i, (got, (want, greatest)))| {
            let near = (f64::from(*got) - want).abs() <= tolerance * greatest.max(1e-30);
            let (row, head) = (i / dim / heads, i / dim % heads);
            (!near).then(|| format!("row {row}, head {head}, value {} is {got}, expected {want}", i % dim))
        })
    }

    /// Runs and compares.
    pub fn check(&self, check: Check, what: &str) -> Out {
        let got = self.encode(&mut Gpu::new(check)).unwrap_or_else(|e| panic!("{what}: {e}"));
        if let Some(difference) = self.differs(&got, 2e-5) {
            panic!("{what}: {difference}");
        }
        got
    }
}
