//! An attention dispatch over KV caches of exactly their size, and what f64 says it gives.

use super::Rng;
use super::gpu::{Check, Gpu, GpuBuffer};
use super::kv::{read_kv, write_kv};
use metal_ext::attention::{Attention, AttentionShape};
use metal_ext::kv::{KvRow, KvShape, KvType};
use metal_ext::{Encoder, Region};

/// Rows, each of a sequence of its own unless their offsets are equal.
pub struct Case {
    pub shape: AttentionShape,
    pub rows: Vec<KvRow>,
    pub q: Vec<f32>,
    pub keys: Vec<u8>,
    pub values: Vec<u8>,
    /// Floats between rows beyond what is needed.
    pub gap: usize,
}

/// A shape without window and soft cap.
pub fn shape(kv_type: KvType, head_dim: usize, kv_heads: usize, group: usize) -> AttentionShape {
    let kv = KvShape { kv_type, kv_heads, head_dim };
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttentionShape { heads: kv_heads * group, kv, scale, softcap: None, window: None }
}

impl Case {
    /// A row of its own sequence for each pair of position and capacity. What a row does not see is NaN.
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
        let mut case = Case {
            shape,
            q: rng.floats(rows.len() * shape.heads * shape.kv.head_dim),
            keys: vec![0xff; bytes],
            values: vec![0xff; bytes],
            rows,
            gap: 0,
        };
        for row in case.rows.clone() {
            for position in case.seen(row) {
                for head in 0..shape.kv.kv_heads {
                    let at = KvRow { position, ..row };
                    // A few keys stand out.
                    let factor = if rng.next().is_multiple_of(8) { 4.0 } else { 1.0 };
                    let key: Vec<f32> = rng.floats(shape.kv.head_dim).iter().map(|v| v * factor).collect();
                    write_kv(&shape.kv, &mut case.keys, at, head, &key);
                    write_kv(&shape.kv, &mut case.values, at, head, &rng.floats(shape.kv.head_dim));
                }
            }
        }
        case
    }

    /// The positions that a row sees.
    pub fn seen(&self, row: KvRow) -> std::ops::Range<usize> {
        let first = self.shape.window.map_or(0, |window| (row.position + 1).saturating_sub(window));
        first..row.position + 1
    }

    fn width(&self) -> usize {
        self.shape.heads * self.shape.kv.head_dim
    }

    /// Dispatches through the encoder and returns rows of results.
    pub fn encode(&self, encoder: &mut impl Encoder<Buffer = GpuBuffer>) -> metal_ext::Result<Vec<f32>> {
        let (width, stride) = (self.width(), self.width() + self.gap);
        let len = (self.rows.len() - 1) * stride + width;
        let mut spread = vec![f32::NAN; len];
        for (row, q) in self.q.chunks(width).enumerate() {
            spread[row * stride..][..width].copy_from_slice(q);
        }
        let (q, y) = (GpuBuffer::from_floats(&spread), GpuBuffer::new(len * 4));
        let (keys, values) = (GpuBuffer::from_bytes(&self.keys), GpuBuffer::from_bytes(&self.values));
        let capacity = self.rows.iter().map(|row| row.capacity).max().unwrap();
        let scratch = GpuBuffer::new(self.shape.scratch_bytes(self.rows.len(), capacity));
        let attention = Attention {
            shape: self.shape,
            q: Region::at(&q, 0),
            stride_q: stride,
            keys: Region::at(&keys, 0),
            values: Region::at(&values, 0),
            rows: &self.rows,
            y: Region::at(&y, 0),
            stride_y: stride,
            scratch: Region::at(&scratch, 0),
        };
        attention.encode(encoder)?;
        let y = y.floats();
        for row in y.chunks(stride) {
            assert!(row.iter().skip(width).all(|v| v.is_nan()), "the gap between rows of y was written");
        }
        Ok(y.chunks(stride).flat_map(|row| row[..width].to_vec()).collect())
    }

    /// What f64 says, and the greatest value among those that are mixed.
    pub fn reference(&self) -> Vec<(f64, f64)> {
        let AttentionShape { heads, kv, scale, softcap, .. } = self.shape;
        let group = heads / kv.kv_heads;
        let mut out = Vec::new();
        for (index, &row) in self.rows.iter().enumerate() {
            for kv_head in 0..kv.kv_heads {
                let read = |bytes: &[u8]| -> Vec<Vec<f64>> {
                    self.seen(row).map(|position| read_kv(&kv, bytes, KvRow { position, ..row }, kv_head)).collect()
                };
                let (keys, values) = (read(&self.keys), read(&self.values));
                for head in kv_head * group..(kv_head + 1) * group {
                    let q = &self.q[(index * heads + head) * kv.head_dim..][..kv.head_dim];
                    let score = |key: &Vec<f64>| {
                        let product: f64 = key.iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum();
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

    /// Whether these results are within `tolerance` of the values' magnitude.
    pub fn differs(&self, got: &[f32], tolerance: f64) -> Option<String> {
        let (dim, heads) = (self.shape.kv.head_dim, self.shape.heads);
        let want = self.reference();
        assert_eq!(got.len(), want.len());
        got.iter().zip(want).enumerate().find_map(|(i, (got, (want, greatest)))| {
            let near = (f64::from(*got) - want).abs() <= tolerance * greatest.max(1e-30);
            let (row, head) = (i / dim / heads, i / dim % heads);
            (!near).then(|| format!("row {row}, head {head}, value {} is {got}, expected {want}", i % dim))
        })
    }

    /// Runs and compares.
    pub fn check(&self, check: Check, what: &str) -> Vec<f32> {
        let got = self.encode(&mut Gpu::new(check)).unwrap_or_else(|e| panic!("{what}: {e}"));
        if let Some(difference) = self.differs(&got, 2e-5) {
            panic!("{what}: {difference}");
        }
        got
    }
}
