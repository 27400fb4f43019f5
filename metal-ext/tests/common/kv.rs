//! KV caches by the definition of their layout, one value at a time.

use half::f16;
use metal_ext::kv::{KvRow, KvShape, KvType};

/// Where a value of a head lies in a region of keys or of values, and its scale if it has one: first byte and length.
fn places(shape: &KvShape, row: KvRow, head: usize, dim: usize) -> Vec<(usize, usize)> {
    let KvShape { kv_type, kv_heads, head_dim } = *shape;
    let place = head * row.capacity + row.position;
    match kv_type {
        KvType::F16 => vec![(row.offset + (place * head_dim + dim) * 2, 2)],
        KvType::Q8_0 => {
            let scales = row.offset + kv_heads * row.capacity * head_dim;
            let groups = head_dim.div_ceil(32);
            vec![(row.offset + place * head_dim + dim, 1), (scales + (place * groups + dim / 32) * 2, 2)]
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f64 {
    f64::from(f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32())
}

/// A head's key or value at the row's position.
pub fn read_kv(shape: &KvShape, bytes: &[u8], row: KvRow, head: usize) -> Vec<f64> {
    let value = |dim| match places(shape, row, head, dim).as_slice() {
        [(half, _)] => half_at(bytes, *half),
        [(byte, _), (scale, _)] => f64::from(bytes[*byte] as i8) * half_at(bytes, *scale),
        _ => unreachable!("a value has at most a scale beside it"),
    };
    (0..shape.head_dim).map(value).collect()
}

/// The first byte that differs though it belongs to none of the rows.
pub fn unlike(shape: &KvShape, before: &[u8], after: &[u8], rows: &[KvRow]) -> Option<usize> {
    let mut own = vec![false; before.len()];
    for row in rows {
        for (head, dim) in (0..shape.kv_heads).flat_map(|head| (0..shape.head_dim).map(move |dim| (head, dim))) {
            for (first, len) in places(shape, *row, head, dim) {
                own[first..first + len].fill(true);
            }
        }
    }
    (0..before.len()).find(|&at| before[at] != after[at] && !own[at])
}

/// Writes a head's key or value at the row's position.
pub fn write_kv(shape: &KvShape, bytes: &mut [u8], row: KvRow, head: usize, values: &[f32]) {
    for (group, values) in values.chunks(32).enumerate() {
        let greatest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let scale = f16::from_f32(greatest / 127.0);
        for (i, value) in values.iter().enumerate() {
            match places(shape, row, head, group * 32 + i).as_slice() {
                [(half, _)] => bytes[*half..half + 2].copy_from_slice(&f16::from_f32(*value).to_le_bytes()),
                [(byte, _), (at, _)] => {
                    let quantised = if scale == f16::ZERO { 0.0 } else { value / scale.to_f32() };
                    bytes[*byte] = quantised.round().clamp(-127.0, 127.0) as i8 as u8;
                    bytes[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
                }
                _ => unreachable!("a value has at most a scale beside it"),
            }
        }
    }
}
