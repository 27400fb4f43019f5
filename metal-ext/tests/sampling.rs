//! The most likely tokens through the encoder, on the CPU, against sorting.
#![cfg(any(not(target_os = "macos"), feature = "metal"))]

mod common;

use common::Rng;
#[cfg(not(target_os = "macos"))]
use common::Shortened;
use common::gpu::{Check, Gpu, GpuBuffer};
use metal_ext::sampling::{ALL_FINITE, MOST_LOGITS, TopK, scratch_bytes};
use metal_ext::{DryRun, Encoder, Region};

/// The k greatest of each row by id and value, and the first id that is infinite or NaN.
type Found = (Vec<Vec<(u32, f32)>>, Vec<u32>);

fn find(
    encoder: &mut impl Encoder<Buffer = GpuBuffer>,
    rows: &[Vec<f32>],
    gap: usize,
    k: usize,
) -> metal_ext::Result<Found> {
    let vocab_size = rows[0].len();
    let stride = if rows.len() > 1 { (vocab_size + gap).next_multiple_of(4) } else { vocab_size };
    let mut spread = vec![f32::INFINITY; (rows.len() - 1) * stride + vocab_size];
    for (row, logits) in rows.iter().enumerate() {
        spread[row * stride..][..vocab_size].copy_from_slice(logits);
    }
    let logits = GpuBuffer::from_floats(&spread);
    let (ids, values) = (GpuBuffer::new(rows.len() * k * 4), GpuBuffer::new(rows.len() * k * 4));
    let first_not_finite = GpuBuffer::new(rows.len() * 4);
    let scratch = GpuBuffer::new(scratch_bytes(vocab_size, rows.len(), k));
    let top_k = TopK {
        logits: Region::at(&logits, 0),
        stride,
        vocab_size,
        rows: rows.len(),
        k,
        ids: Region::at(&ids, 0),
        values: Region::at(&values, 0),
        first_not_finite: Region::at(&first_not_finite, 0),
        scratch: Region::at(&scratch, 0),
    };
    top_k.encode(encoder)?;
    let integers = |buffer: &GpuBuffer| -> Vec<u32> { buffer.floats().iter().map(|v| v.to_bits()).collect() };
    let both: Vec<(u32, f32)> = integers(&ids).into_iter().zip(values.floats()).collect();
    Ok((both.chunks(k).map(<[_]>::to_vec).collect(), integers(&first_not_finite)))
}

/// The same by sorting: NaN last, the lowest id first among equals.
fn sorted(rows: &[Vec<f32>], k: usize) -> Found {
    let top = |row: &Vec<f32>| {
        let mut all: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
        all.sort_by(|(_, a), (_, b)| match (a.is_nan(), b.is_nan()) {
            (false, false) => b.partial_cmp(a).unwrap(),
            (a, b) => a.cmp(&b),
        });
        all.truncate(k);
        all
    };
    let lost = |row: &Vec<f32>| row.iter().position(|v| !v.is_finite()).map_or(ALL_FINITE, |id| id as u32);
    (rows.iter().map(top).collect(), rows.iter().map(lost).collect())
}

fn check(check: Check, rows: &[Vec<f32>], k: usize, what: &str) {
    let (got, got_lost) = find(&mut Gpu::new(check), rows, 8, k).unwrap();
    let (want, want_lost) = sorted(rows, k);
    for (row, (got, want)) in got.iter().zip(&want).enumerate() {
        for (rank, (got, want)) in got.iter().zip(want).enumerate() {
            let same = got.0 == want.0 && (got.1 == want.1 || got.1.is_nan() && want.1.is_nan());
            assert!(same, "{what}: rank {rank} of row {row} is {got:?}, expected {want:?}");
        }
    }
    assert_eq!(got_lost, want_lost, "{what}");
}

#[test]
fn argmax_of_vocabularies_off_the_pieces() {
    for vocab_size in [1, 3, 4, 31, 127, 768, 1023, 1024, 1025, 4097, 5000] {
        let rows = [Rng(vocab_size as u64).floats(vocab_size)];
        check(Check::AllOrders, &rows, 1, &format!("{vocab_size} logits"));
    }
}

#[test]
fn the_greatest_in_order_for_several_rows() {
    for (vocab_size, k) in [(5, 5), (100, 64), (2050, 2), (3001, 64), (1500, 256)] {
        let mut rng = Rng(k as u64);
        let rows: Vec<Vec<f32>> = (0..3).map(|_| rng.floats(vocab_size).iter().map(|v| v * 30.0).collect()).collect();
        check(Check::AllOrders, &rows, k, &format!("{k} of {vocab_size}"));
    }
}

#[test]
fn a_whole_vocabulary() {
    let mut logits = Rng(3).floats(151_936);
    logits[151_935] = 2.0; // in the last piece, in the last lane with values
    check(Check::Fast, &[logits], 50, "151936 logits");
    let rows = [vec![0.0; MOST_LOGITS]];
    check(Check::Fast, &rows, 3, "as many logits as there may be");
}

#[test]
fn equal_logits_are_ordered_by_id() {
    let mut rows = [vec![1.0; 2100], vec![-0.0; 2100]];
    rows[1][5] = 0.0; // equal to minus zero
    rows[1][1999] = f32::MIN_POSITIVE;
    check(Check::AllOrders, &rows, 40, "constant rows");
    let few: Vec<f32> = Rng(8).floats(3000).iter().map(|v| (v * 3.0).round()).collect();
    check(Check::AllOrders, &[few], 64, "seven different logits");
}

#[test]
fn infinities_are_ordered_and_nan_never_wins() {
    let mut logits = vec![f32::NEG_INFINITY; 1500];
    check(Check::AllOrders, &[logits.clone()], 3, "all minus infinity");
    logits[1200] = f32::MIN;
    logits[1300] = f32::INFINITY;
    logits[40] = f32::from_bits(1);
    logits[41] = -f32::from_bits(1);
    check(Check::AllOrders, &[logits.clone()], 7, "infinities and denormals");
    logits[1400] = f32::NAN;
    logits[1100] = f32::from_bits(0xffc0_0001); // a negative NaN
    check(Check::AllOrders, &[logits], 7, "NaN among them");
    check(Check::AllOrders, &[vec![f32::NAN; 1100], vec![1.0; 1100]], 2, "nothing but NaN");
    let nearly = [f32::NAN, f32::NEG_INFINITY, f32::NAN, -1.0].to_vec();
    check(Check::AllOrders, &[nearly], 4, "NaN behind minus infinity");
}

#[cfg(not(target_os = "macos"))] // a GPU does not tell
#[test]
fn dispatches_name_no_byte_more_than_the_kernels_touch() {
    let rows = [Rng(1).floats(1100), Rng(2).floats(1100)];
    for index in 0..5 {
        let error = find(&mut Shortened::new(index), &rows, 0, 5).unwrap_err().to_string();
        assert!(error.contains("out of bounds"), "buffer {index}: {error}");
    }
}

#[test]
fn a_dry_run_counts_the_logits_once() {
    let nothing = Region::at(&(), 0);
    let mut top_k = TopK {
        logits: nothing,
        stride: 128_256,
        vocab_size: 128_256,
        rows: 2,
        k: 1,
        ids: nothing,
        values: nothing,
        first_not_finite: nothing,
        scratch: nothing,
    };
    let mut list = DryRun::new();
    top_k.encode(&mut list).unwrap();
    let [pieces, merge] = list.dispatches.as_slice() else { panic!("{list:?}") };
    assert_eq!((pieces.threadgroups, merge.threadgroups), ([32, 2, 1], [2, 1, 1]));
    assert_eq!((pieces.read, pieces.written), (2 * 128_256 * 4, 2 * 126 * 12));
    assert_eq!((merge.read, merge.written), (2 * 126 * 12, 2 * 12));

    (top_k.vocab_size, top_k.k) = (40, 41);
    assert_eq!(top_k.dispatches().unwrap_err().to_string(), "top_k: 41 tokens wanted, expected 1 to 40");
    (top_k.vocab_size, top_k.k) = (MOST_LOGITS + 1, 1);
    assert_eq!(top_k.dispatches().unwrap_err().to_string(), "top_k: 524289 logits, expected 1 to 524288");
    (top_k.vocab_size, top_k.stride) = (42, 42);
    let expected = "top_k: rows of logits are 42 floats apart, expected a multiple of 4 from 42";
    assert_eq!(top_k.dispatches().unwrap_err().to_string(), expected);
}
