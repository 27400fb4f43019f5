use super::*;

fn values(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + seed * 104_729 + 13) % 20_011) as f32 / 10_005.5 - 1.0).collect()
}

/// A sequence whose queries, keys and values lie in fused rows, as a layer may compute them.
struct Case {
    shape: AttentionShape,
    window: Option<usize>,
    rows: usize,
    fused: Vec<f32>,
}

impl Case {
    fn new((heads, kv_heads, head_dim): (usize, usize, usize), rows: usize, seed: usize) -> Case {
        // Sharp enough for the weights to differ.
        let scale = 6.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { heads, kv_heads, head_dim, scale, softcap: None };
        let fused = values(rows * (heads + 2 * kv_heads) * head_dim, seed);
        Case { shape, window: None, rows, fused }
    }

    fn stride(&self) -> usize {
        (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim
    }

    fn width(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    /// From row `row` on: queries, keys, values.
    fn parts(&self, row: usize) -> [Strided<'_>; 3] {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        [0, heads * head_dim, (heads + kv_heads) * head_dim]
            .map(|start| Strided { values: &self.fused[row * self.stride() + start..], stride: self.stride() })
    }

    fn kv(&self, kv_type: KvType) -> LayerKv {
        LayerKv::new(kv_type, self.shape.kv_heads, self.shape.head_dim, self.rows)
    }

    fn append(&self, isa: Isa, kv: &mut LayerKv, rows: Range<usize>) {
        let [_, keys, values] = self.parts(rows.start);
        kv.append(isa, rows.start, rows.len(), keys, values);
    }

    fn attend(&self, pool: &Pool, isa: Isa, kv: &LayerKv, rows: Range<usize>, out: &mut [f32]) {
        let [q, ..] = self.parts(rows.start);
        let (position, len, window) = (rows.start, rows.len(), self.window);
        attend(pool, isa, &self.shape, &mut [AttentionRows { kv, q, position, len, window, out }]);
    }

    /// All rows, so many at a time.
    fn run(&self, pool: &Pool, isa: Isa, kv_type: KvType, at_a_time: usize) -> Vec<f32> {
        let mut kv = self.kv(kv_type);
        let mut out = vec![f32::NAN; self.rows * self.width()];
        for (i, out) in out.chunks_mut(at_a_time * self.width()).enumerate() {
            let rows = i * at_a_time..self.rows.min((i + 1) * at_a_time);
            self.append(isa, &mut kv, rows.clone());
            self.attend(pool, isa, &kv, rows, out);
        }
        out
    }

    /// One row of one head, as the definition has it.
    fn reference(&self, row: usize, head: usize) -> Vec<f64> {
        let AttentionShape { heads, kv_heads, head_dim, scale, softcap } = self.shape;
        let kv_head = head / (heads / kv_heads);
        let first = self.window.map_or(0, |window| (row + 1).saturating_sub(window));
        let q = &self.parts(row)[0].values[head * head_dim..][..head_dim];
        let scores: Vec<f64> = (first..=row)
            .map(|position| {
                let key = &self.parts(position)[1].values[kv_head * head_dim..][..head_dim];
                let product: f64 = q.iter().zip(key).map(|(&q, &k)| q as f64 * k as f64).sum();
                let score = product * scale as f64;
                softcap.map_or(score, |cap| cap as f64 * (score / cap as f64).tanh())
            })
            .collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
        let mut out = vec![0f64; head_dim];
        for (position, score) in (first..=row).zip(scores) {
            let value = &self.parts(position)[2].values[kv_head * head_dim..][..head_dim];
            for (out, value) in out.iter_mut().zip(value) {
                *out += (score - most).exp() / sum * *value as f64;
            }
        }
        out
    }

    fn assert_right(&self, kv_type: KvType, out: &[f32], rows: impl Iterator<Item = usize>) {
        let tolerance = match kv_type {
            KvType::F32 => 1e-5,
            KvType::F16 => 2e-3,
            KvType::Q8_0 => 2e-2,
        };
        let (head_dim, width) = (self.shape.head_dim, self.width());
        for row in rows {
            for head in 0..self.shape.heads {
                let found = &out[row * width + head * head_dim..][..head_dim];
                for (dim, (&found, want)) in found.iter().zip(self.reference(row, head)).enumerate() {
                    let (shape, window) = (&self.shape, self.window);
                    assert!(
                        (found as f64 - want).abs() <= tolerance,
                        "{kv_type} {shape:?} window {window:?} row {row} head {head} [{dim}]: {found} for {want}"
                    );
                }
            }
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn every_shape_is_right() {
    let pool = Pool::new(1).unwrap();
    let of_dims = [1, 8, 16, 20, 32, 64, 80, 96, 112, 128, 256, 512].map(|dims| (4, 2, dims));
    let of_groups = [(1, 1), (2, 1), (4, 1), (8, 1), (7, 1), (14, 2), (71, 1)].map(|(heads, kv)| (heads, kv, 24));
    for shape in of_dims.into_iter().chain(of_groups) {
        for window in [None, Some(1), Some(13)] {
            for softcap in [None, Some(2.0)] {
                let mut case = Case::new(shape, 21, 1);
                case.window = window;
                case.shape.softcap = softcap;
                for kv_type in KvType::ALL {
                    let out = case.run(&pool, Isa::detect(), kv_type, case.rows);
                    case.assert_right(kv_type, &out, 0..case.rows);
                }
            }
        }
    }
}

#[test]
fn every_length_is_right() {
    let pool = Pool::new(2).unwrap();
    for window in [None, Some(100), Some(300)] {
        let mut case = Case::new((3, 1, 16), 2 * CHUNK + 70, 2);
        case.window = window;
        for kv_type in KvType::ALL {
            let out = case.run(&pool, Isa::detect(), kv_type, 1);
            let rows = (0..140).chain(CHUNK - 3..CHUNK + 35).chain(2 * CHUNK - 3..case.rows);
            case.assert_right(kv_type, &out, rows);
        }
    }
}

#[test]
fn nothing_changes_a_bit() {
    let pools = [1, 3].map(|threads| Pool::new(threads).unwrap());
    for (shape, window, softcap) in [
        ((7, 1, 40), None, None),
        ((2, 2, 64), Some(300), Some(3.0)),
        ((8, 2, 128), Some(20), None),
        ((12, 1, 16), None, Some(3.0)),
    ] {
        let mut case = Case::new(shape, 2 * CHUNK + 90, 3);
        case.window = window;
        case.shape.softcap = softcap;
        for kv_type in KvType::ALL {
            let want = bits(&case.run(&pools[0], Isa::detect(), kv_type, case.rows));
            for (pool, at_a_time) in [(0, 1), (0, 100), (1, 2), (1, 64), (1, 333), (1, case.rows)] {
                let found = bits(&case.run(&pools[pool], Isa::detect(), kv_type, at_a_time));
                assert!(want == found, "{kv_type} {shape:?} {window:?}: {at_a_time} rows at a time");
            }
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let pool = Pool::new(1).unwrap();
    for (shape, window, softcap) in
        [((7, 1, 40), None, None), ((2, 2, 64), Some(200), Some(3.0)), ((4, 2, 16), Some(20), None)]
    {
        let mut case = Case::new(shape, CHUNK + 30, 4);
        case.window = window;
        case.shape.softcap = softcap;
        for kv_type in KvType::ALL {
            let want = bits(&case.run(&pool, Isa::SCALAR, kv_type, case.rows));
            for isa in Isa::available() {
                let found = bits(&case.run(&pool, isa, kv_type, case.rows));
                assert!(want == found, "{kv_type} {shape:?} {window:?}: {isa}");
            }
        }
    }
}

#[test]
fn sequences_do_not_see_each_other() {
    let pools = [1, 3].map(|threads| Pool::new(threads).unwrap());
    let isa = Isa::detect();
    for kv_type in KvType::ALL {
        let cases: Vec<Case> = [1, 40, 3 * CHUNK + 5, 90].map(|rows| Case::new((4, 2, 48), rows, rows)).into();
        let kvs: Vec<LayerKv> = cases
            .iter()
            .map(|case| {
                let mut kv = case.kv(kv_type);
                case.append(isa, &mut kv, 0..case.rows);
                kv
            })
            .collect();
        for pool in &pools {
            // The last few rows of each.
            let lens = [1, 1, 1, 30];
            let mut outs: Vec<Vec<f32>> =
                cases.iter().zip(lens).map(|(case, len)| vec![f32::NAN; len * case.width()]).collect();
            let mut rows = Vec::new();
            for (((case, kv), len), out) in cases.iter().zip(&kvs).zip(lens).zip(&mut outs) {
                let position = case.rows - len;
                rows.push(AttentionRows { kv, q: case.parts(position)[0], position, len, window: None, out });
            }
            attend(pool, isa, &cases[0].shape, &mut rows);
            for (((case, kv), len), out) in cases.iter().zip(&kvs).zip(lens).zip(&outs) {
                let mut alone = vec![0f32; out.len()];
                case.attend(&pools[0], isa, kv, case.rows - len..case.rows, &mut alone);
                assert_eq!(bits(&alone), bits(out));
            }
        }
    }
}

#[test]
fn a_prefix_is_copied_and_what_was_there_before_is_not_seen() {
    let pool = Pool::new(1).unwrap();
    let isa = Isa::detect();
    for kv_type in KvType::ALL {
        for shape in [(2, 1, 16), (4, 2, 80)] {
            let case = Case::new(shape, 200, 5);
            let want = case.run(&pool, isa, kv_type, case.rows);
            let other = Case::new(shape, 300, 6);
            let other_want = other.run(&pool, isa, kv_type, other.rows);
            let mut from = case.kv(kv_type);
            case.append(isa, &mut from, 0..case.rows);
            for len in [0, 1, 15, 63, 64, 65, 130, 199] {
                // Where another sequence has been, with more room.
                let mut kv = other.kv(kv_type);
                other.append(isa, &mut kv, 0..other.rows);
                kv.copy_prefix(&from, len);
                case.append(isa, &mut kv, len..case.rows);
                let mut out = vec![0f32; want.len()];
                case.attend(&pool, isa, &kv, 0..case.rows, &mut out);
                assert!(bits(&want) == bits(&out), "{kv_type} {shape:?}: {len} positions");
                // And back: what lies behind the prefix has not changed.
                other.append(isa, &mut kv, 0..case.rows);
                kv.copy_prefix(&from, len);
                other.append(isa, &mut kv, 0..len);
                let mut out = vec![0f32; other.rows * other.width()];
                other.attend(&pool, isa, &kv, 0..other.rows, &mut out);
                assert!(bits(&other_want) == bits(&out), "{kv_type} {shape:?}: behind {len} positions");
            }
        }
    }
}

#[test]
fn large_values_stay_finite() {
    let pool = Pool::new(1).unwrap();
    let mut case = Case::new((2, 1, 20), 40, 7);
    case.fused.iter_mut().for_each(|value| *value *= 1e6);
    for kv_type in KvType::ALL {
        for isa in Isa::available() {
            let out = case.run(&pool, isa, kv_type, 16);
            assert!(out.iter().all(|value| value.is_finite()), "{kv_type} {isa}");
        }
    }
}

/// What attention of one row over 64 positions is refused with, given another shape, position, length and stride.
fn refusal(heads: usize, position: usize, len: usize, stride: usize) -> String {
    let kv = LayerKv::new(KvType::F32, 1, 16, 64);
    let pool = Pool::new(1).unwrap();
    let (q, mut out) = (values(16, 1), vec![0.0; 16]);
    // As many results as the sizes give once they have wrapped.
    let results = heads.wrapping_mul(16).wrapping_mul(len).min(16);
    let attend = || {
        let shape = AttentionShape { heads, kv_heads: 1, head_dim: 16, scale: 1.0, softcap: None };
        let q = Strided { values: &q, stride };
        let rows = AttentionRows { kv: &kv, q, position, len, window: None, out: &mut out[..results] };
        attend(&pool, Isa::SCALAR, &shape, &mut [rows]);
    };
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(attend)).expect_err("it was taken");
    panic.downcast_ref::<String>().map_or_else(|| panic.downcast_ref::<&str>().unwrap().to_string(), String::clone)
}

#[test]
fn sizes_that_wrap_are_refused_by_name() {
    for (heads, position, len, stride, message) in [
        (1, usize::MAX, 1, 16, "positions of attention: 1 from 18446744073709551615 on end beyond any number"),
        (1, usize::MAX - 62, 64, 16, "positions of attention: 64 from 18446744073709551553 on"),
        (1 << 60, 0, 1, 16, "query heads and their size: [1152921504606846976, 16] multiplied is more"),
        (1 << 59, 0, 1, 16, "query heads and their size: [576460752303423488, 16] multiplied is more"),
        (1 << 54, 0, 1 << 10, 16, "results of attention: [1024, 288230376151711744] multiplied is more"),
        (1, 0, 3, 1 << 63, "attention of wrong sizes"),
        (1, 0, 2, usize::MAX - 15, "attention of wrong sizes"),
        (1, 0, 65, 16, "position 65 is past the KV cache's 64"),
    ] {
        let found = refusal(heads, position, len, stride);
        assert!(found.contains(message), "{found}");
    }
}
