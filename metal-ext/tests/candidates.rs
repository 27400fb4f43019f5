//! The most likely tokens of some of a step's rows, as a step looks for them, on the CPU, against sorting.
#![cfg(any(not(target_os = "macos"), feature = "metal"))]

mod common;

use common::Rng;
use common::gpu::{Check, Gpu, GpuBuffer};
use metal_ext::decode::{Candidates, RowCandidates, found_words, most_candidates, read_candidates, stride};
use metal_ext::gemv::MOST_ROWS;
use metal_ext::sampling::{MOST_K, MOST_LOGITS};

/// What is found in `rows` of the step's rows of logits, over buffers of just the bytes that a stage sets aside.
fn find(logits: &[Vec<f32>], rows: &[usize], k: usize) -> Vec<Option<RowCandidates>> {
    let vocab_size = logits[0].len();
    let mut spread = vec![f32::INFINITY; logits.len() * stride(vocab_size)];
    for (row, logits) in logits.iter().enumerate() {
        spread[row * stride(vocab_size)..][..vocab_size].copy_from_slice(logits);
    }
    let bytes = Candidates::<GpuBuffer>::bytes(vocab_size);
    let candidates = Candidates { found: GpuBuffer::new(bytes.found), scratch: GpuBuffer::new(bytes.scratch) };
    let mut gpu = Gpu::new(Check::AllOrders);
    candidates.encode(&mut gpu, &GpuBuffer::from_floats(&spread), vocab_size, rows, k).unwrap();
    let words: Vec<u32> = candidates.found.floats().iter().map(|value| value.to_bits()).collect();
    read_candidates(&words[..found_words(rows.len(), k)], rows.len(), k)
}

fn sorted(logits: &[f32], k: usize) -> Option<RowCandidates> {
    if logits.iter().any(|logit| logit.is_nan()) {
        return None;
    }
    let mut all: RowCandidates = (0..).zip(logits.iter().copied()).collect();
    all.sort_by(|(_, a), (_, b)| b.partial_cmp(a).unwrap());
    all.truncate(k);
    (all[0].1 > f32::NEG_INFINITY).then_some(all)
}

#[test]
fn rows_that_are_asked_for_are_searched_and_others_are_not() {
    for vocab_size in [9, 768, 1030, 2051] {
        let mut rng = Rng(vocab_size as u64);
        let logits: Vec<Vec<f32>> =
            (0..MOST_ROWS).map(|_| rng.floats(vocab_size).iter().map(|v| (v * 50.0).round()).collect()).collect();
        for rows in [&[0][..], &[7], &[0, 1, 2, 3, 4, 5, 6, 7], &[0, 2, 4, 6], &[1, 2, 5, 6, 7]] {
            for k in [1, 3, 8] {
                let wanted: Vec<_> = rows.iter().map(|&row| sorted(&logits[row], k)).collect();
                assert_eq!(find(&logits, rows, k), wanted, "{k} of {vocab_size} in rows {rows:?}");
            }
        }
    }
}

#[test]
fn as_many_tokens_as_there_may_be_fit_the_buffers() {
    let logits: Vec<Vec<f32>> = (0..MOST_ROWS).map(|row| Rng(row as u64).floats(1500)).collect();
    let (rows, k) = ((0..MOST_ROWS).collect::<Vec<_>>(), most_candidates(1500));
    assert_eq!(k, MOST_K);
    let wanted: Vec<_> = logits.iter().map(|logits| sorted(logits, k)).collect();
    assert_eq!(find(&logits, &rows, k), wanted);
    assert_eq!([0, 1, 2, 200, MOST_LOGITS].map(most_candidates), [0, 0, 1, 199, MOST_K]);
    assert_eq!(most_candidates(MOST_LOGITS + 1), 0);
}

#[test]
fn rows_from_which_nothing_can_be_chosen_are_told() {
    let mut logits = vec![vec![1.0f32; 1200]; 4];
    logits[0][1100] = f32::NAN;
    logits[1].fill(f32::NEG_INFINITY);
    logits[2].fill(f32::MIN);
    logits[2][900] = -3e38;
    logits[3][5] = f32::INFINITY;
    let found = find(&logits, &[0, 1, 2, 3], 2);
    assert_eq!(found, [None, None, Some(vec![(900, -3e38), (0, f32::MIN)]), None]);
}
