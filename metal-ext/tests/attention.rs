//! A step's attention through the encoder, against f64: norms, both pairings, partial rotation, both types of cache, and
//! rows of several sequences. What a row does not see is NaN, and so is where its own key and value go; buffers end where
//! their contents do.
#![cfg(any(not(target_os = "macos"), feature = "metal"))]

mod common;

use common::Rng;
#[cfg(not(target_os = "macos"))]
use common::Shortened;
use common::attention::{Case, Kind, Regions, shape};
use common::gpu::{Check, Gpu};
use common::kv::{read_kv, write_kv};
use half::f16;
use metal_ext::attention::{Attention, AttentionShape, KvRows};
use metal_ext::heads::{Angles, NormOver, Pairing, QkNorm, Rope};
use metal_ext::kv::{KvRow, KvType};
use metal_ext::{DryRun, Region};

#[test]
fn every_head_size_and_type_with_both_pairings() {
    for kv_type in KvType::ALL {
        for head_dim in [16, 32, 64, 80, 96, 128, 256] {
            for pairing in [Pairing::Halves, Pairing::Neighbours] {
                let mut case = Case::new(shape(kv_type, head_dim, 1, 1), &[(36, 37)]);
                case.rope = Some((head_dim, pairing, Angles::OfPosition));
                case.check(Check::AllOrders, &format!("{kv_type:?}, heads of {head_dim}, {pairing:?}"));
            }
        }
    }
}

#[test]
fn a_part_of_a_head_is_rotated_or_none() {
    for kv_type in KvType::ALL {
        for rope in [Some(2), Some(20), Some(66), None] {
            for pairing in [Pairing::Halves, Pairing::Neighbours] {
                let mut case = Case::new(shape(kv_type, 80, 2, 2), &[(2, 5)]);
                case.rope = rope.map(|rotary_dim| (rotary_dim, pairing, Angles::OfPosition));
                case.check(Check::AllOrders, &format!("{kv_type:?}, {rope:?} rotated as {pairing:?}"));
            }
        }
    }
}

#[test]
fn norms_over_a_head_and_over_the_whole_projection() {
    for over in [NormOver::Head, NormOver::Projection] {
        for kv_type in KvType::ALL {
            for (head_dim, kv_heads, group, rows) in
                [(64, 3, 1, [(0, 1), (9, 10)]), (80, 2, 5, [(30, 40), (2, 3)]), (256, 1, 2, [(3, 4), (520, 521)])]
            {
                let mut case = Case::rotated(shape(kv_type, head_dim, kv_heads, group), &rows);
                case.norm = Some(over);
                case.check(Check::AllOrders, &format!("{kv_type:?}, heads of {head_dim}, {over:?}"));
            }
        }
    }
}

#[test]
fn one_to_eight_query_heads_share_a_key_head_and_more_do_in_parts() {
    for kv_type in KvType::ALL {
        for group in (1..=8).chain([9, 16]) {
            let case = Case::rotated(shape(kv_type, 64, 2, group), &[(70, 80)]);
            let check = if [7, 9].contains(&group) { Check::AllOrders } else { Check::Accesses };
            case.check(check, &format!("{kv_type:?}, {group} heads"));
        }
        // Several threadgroups need the last split's own key, and one appends it.
        let case = Case::rotated(shape(kv_type, 64, 1, 17), &[(600, 601)]);
        case.check(Check::AllOrders, &format!("{kv_type:?}, 17 heads, split"));
    }
}

#[test]
fn positions_across_the_boundaries_of_blocks_and_splits() {
    for kv_type in KvType::ALL {
        for position in [0, 1, 7, 8, 31, 32, 33, 63, 64, 255, 256, 510, 511, 512, 543, 544, 767, 1100] {
            let case = Case::rotated(shape(kv_type, 64, 1, 1), &[(position, position + 1)]);
            let check = if [0, 543, 544].contains(&position) { Check::AllOrders } else { Check::Accesses };
            case.check(check, &format!("{kv_type:?}, position {position}"));
        }
    }
}

#[test]
fn a_window_hides_what_lies_before_it() {
    for kv_type in KvType::ALL {
        for (position, window) in [(50, 1), (50, 20), (50, 51), (50, 52), (0, 1), (1300, 4), (1300, 700)] {
            let mut shape = shape(kv_type, 80, 1, 2);
            shape.window = Some(window);
            let case = Case::rotated(shape, &[(position, position + 3)]);
            let check = if position == 50 { Check::AllOrders } else { Check::Accesses };
            case.check(check, &format!("{kv_type:?}, window of {window} at {position}"));
        }
    }
}

#[test]
fn scores_are_capped() {
    for kv_type in KvType::ALL {
        for cap in [0.5, 50.0] {
            let mut shape = shape(kv_type, 96, 2, 3);
            (shape.softcap, shape.scale) = (Some(cap), 2.0);
            let case = Case::rotated(shape, &[(45, 64)]);
            case.check(Check::AllOrders, &format!("{kv_type:?}, cap of {cap}"));
        }
    }
}

#[test]
fn a_row_is_the_same_to_the_bit_alone_and_among_others() {
    for kv_type in KvType::ALL {
        for angles in [Angles::OfRow, Angles::OfPosition] {
            let rows = [(3, 9), (700, 701), (40, 41), (1200, 1300)];
            let mut all = Case::new(shape(kv_type, 64, 2, 4), &rows);
            (all.gap, all.norm) = (12, Some(NormOver::Head));
            all.rope = Some((64, Pairing::Halves, angles));
            let together = all.check(Check::Accesses, &format!("{kv_type:?}"));
            let width = all.shape.heads * 64;
            for row in 0..rows.len() {
                let alone = all.alone(row).encode(&mut Gpu::new(Check::Accesses)).unwrap();
                assert_eq!(alone.y, together.y[row * width..][..width], "{kv_type:?}, row {row}");
            }
            // Each row's cache in a region of its own: a dispatch for each, and one that brings the splits together.
            all.regions = Regions::OfEachRow;
            assert_eq!(all.encode(&mut Gpu::new(Check::Accesses)).unwrap(), together, "{kv_type:?}, {angles:?}");
        }
    }
}

#[test]
fn a_rows_own_key_and_value_count_as_they_are_stored() {
    for kv_type in KvType::ALL {
        let case = Case::rotated(shape(kv_type, 80, 2, 1), &[(0, 4)]);
        let out = case.check(Check::AllOrders, &format!("{kv_type:?}"));
        // Nothing else is there, so the result is the value itself.
        for head in 0..2 {
            let stored = read_kv(&case.shape.kv, &out.values, case.rows[0], head);
            let got: Vec<f64> = out.y[head * 80..][..80].iter().map(|&v| f64::from(v)).collect();
            assert_eq!(got, stored, "{kv_type:?}, head {head}");
        }
        // A later step finds it.
        let mut next = Case::rotated(case.shape, &[(1, 4)]);
        (next.keys, next.values) = (out.keys, out.values);
        next.check(Check::AllOrders, &format!("{kv_type:?}, the next step"));
    }
}

#[test]
fn extreme_scores_and_scales_stay_what_they_are() {
    for kv_type in KvType::ALL {
        // Scores of tens of thousands: one position takes everything, and no other leaves a trace.
        let mut case = Case::new(shape(kv_type, 64, 1, 2), &[(530, 531)]);
        case.each(Kind::Q, |v| *v *= 1e5);
        case.check(Check::Accesses, &format!("{kv_type:?}, large scores"));
        // Scores that are all far below zero.
        let mut case = Case::new(shape(kv_type, 64, 1, 1), &[(544, 545)]);
        case.each(Kind::Q, |v| *v = -3e4);
        let row = case.rows[0];
        for position in case.cached(row) {
            let key = vec![1.0 + position as f32 / 1024.0; 64];
            write_kv(&case.shape.kv, &mut case.keys, KvRow { position, ..row }, 0, &key);
        }
        case.each(Kind::K, |v| *v = 1.0 + 544.0 / 1024.0);
        case.check(Check::Accesses, &format!("{kv_type:?}, scores far below zero"));
        // Halves, and scales, that are denormal, and the greatest.
        for factor in [4e-6, 6e4] {
            let mut case = Case::new(shape(kv_type, 64, 1, 1), &[(20, 21)]);
            let mut rng = Rng(5);
            let row = case.rows[0];
            for position in case.cached(row) {
                let mut random = || rng.floats(64).iter().map(|v| v * factor).collect::<Vec<f32>>();
                let at = KvRow { position, ..row };
                write_kv(&case.shape.kv, &mut case.keys, at, 0, &random());
                write_kv(&case.shape.kv, &mut case.values, at, 0, &random());
            }
            case.each(Kind::Q, |v| *v /= factor);
            case.each(Kind::K, |v| *v *= factor);
            case.each(Kind::V, |v| *v *= factor);
            case.check(Check::AllOrders, &format!("{kv_type:?}, values of {factor}"));
        }
        // Equal scores are a mean.
        let mut case = Case::new(shape(kv_type, 64, 1, 1), &[(99, 100)]);
        case.each(Kind::Q, |v| *v = 0.0);
        case.check(Check::AllOrders, &format!("{kv_type:?}, equal scores"));
    }
}

#[test]
fn zeros_and_extreme_values_are_appended() {
    for kv_type in KvType::ALL {
        // Keys of zeros, which a norm leaves zeros; values whose scale is far below the smallest half.
        let mut case = Case::new(shape(kv_type, 64, 1, 1), &[(0, 1)]);
        case.norm = Some(NormOver::Head);
        case.each(Kind::K, |v| *v = 0.0);
        case.each(Kind::V, |v| *v *= 1e-9);
        let out = case.check(Check::AllOrders, &format!("{kv_type:?}"));
        for cache in [&out.keys, &out.values] {
            assert_eq!(read_kv(&case.shape.kv, cache, case.rows[0], 0), [0.0; 64], "{kv_type:?}");
        }
    }
    // The scale of the smallest group that has one: bytes are made with the scale as stored.
    let mut case = Case::new(shape(KvType::Q8_0, 64, 1, 1), &[(0, 1)]);
    let denormal = f16::from_bits(1).to_f32();
    case.each(Kind::K, |v| *v = denormal * 100.0);
    let out = case.check(Check::AllOrders, "denormal");
    let keys = read_kv(&case.shape.kv, &out.keys, case.rows[0], 0);
    assert!(keys.iter().all(|&v| (v - f64::from(denormal) * 100.0).abs() < 1e-12), "{keys:?}");
}

#[cfg(not(target_os = "macos"))] // a GPU does not tell
#[test]
fn a_dispatch_names_no_byte_more_than_the_kernel_touches() {
    let caught = |case: &Case, index: u32, what: &str| {
        let error = case.encode(&mut Shortened::new(index)).unwrap_err().to_string();
        let kv_type = case.shape.kv.kv_type;
        assert!(error.contains("out of bounds") && error.contains(&format!("`{what}`")), "{kv_type:?}: {error}");
    };
    for kv_type in KvType::ALL {
        // Unsplit: the second sequence ends where its buffer does, the first where the second begins.
        for (over, angles) in [(NormOver::Head, Angles::OfRow), (NormOver::Projection, Angles::OfPosition)] {
            let mut unsplit = Case::new(shape(kv_type, 80, 2, 2), &[(9, 10), (7, 8)]);
            (unsplit.norm, unsplit.rope) = (Some(over), Some((80, Pairing::Neighbours, angles)));
            let names = ["qkv", "gamma_q", "gamma_k", "cos_table", "sin_table", "keys", "values", "y"];
            for (index, what) in (0..).zip(names) {
                caught(&unsplit, index, what);
            }
        }
        // Split: partial results of a last row with fewer splits than there is room for; then those that are merged.
        for regions in [Regions::One, Regions::OfEachRow] {
            let mut split = Case::new(shape(kv_type, 64, 1, 1), &[(800, 801), (544, 600)]);
            split.regions = regions;
            for (index, what) in
                [(0, "qkv"), (5, "keys"), (6, "values"), (7, "y"), (8, "stats"), (1, "stats"), (2, "y")]
            {
                caught(&split, index, what);
            }
        }
    }
}

fn list(shape: AttentionShape, norm: Option<NormOver>, rows: &[KvRow]) -> metal_ext::Result<DryRun> {
    with_rope(shape, norm, rows, shape.kv.head_dim)
}

fn with_rope(
    shape: AttentionShape,
    norm: Option<NormOver>,
    rows: &[KvRow],
    rotary_dim: usize,
) -> metal_ext::Result<DryRun> {
    let nothing = Region::at(&(), 0);
    let rope = Rope { cos: nothing, sin: nothing, angles: Angles::OfPosition, rotary_dim, pairing: Pairing::Halves };
    let attention = Attention {
        shape,
        qkv: nothing,
        stride_qkv: (shape.heads + 2 * shape.kv.kv_heads) * shape.kv.head_dim,
        norm: norm.map(|over| QkNorm { over, gamma_q: nothing, gamma_k: nothing, eps: 1e-5 }),
        sequences: &[KvRows { keys: nothing, values: nothing, rows, rope: Some(rope) }],
        y: nothing,
        stride_y: shape.heads * shape.kv.head_dim,
        scratch: nothing,
    };
    let mut list = DryRun::new();
    attention.encode(&mut list)?;
    Ok(list)
}

fn at(position: usize, capacity: usize, offset: usize) -> KvRow {
    KvRow { position, capacity, offset }
}

#[test]
fn a_dry_run_lists_keys_and_values_once_and_partial_results_twice() {
    let mut shape = shape(KvType::F16, 128, 8, 4);
    let (entry, row) = (8 * 256, 48 * 512 + 2 * 256);
    let short = list(shape, None, &[at(299, 4096, 0)]).unwrap();
    assert_eq!(short.dispatches.len(), 1);
    let attend = &short.dispatches[0];
    assert_eq!((attend.kernel.as_str(), attend.threadgroups, attend.threads), ("attend_f16_4", [1, 8, 1], [256, 1, 1]));
    assert_eq!((attend.read, attend.written), (2 * 299 * entry + row, 32 * 512 + 2 * entry));
    let second = shape.kv.bytes(4096);
    let long = list(shape, None, &[at(2047, 4096, 0), at(99, 100, second)]).unwrap();
    assert_eq!(long.dispatches.len(), 2);
    let (attend, merge) = (&long.dispatches[0], &long.dispatches[1]);
    assert_eq!((attend.threadgroups, merge.threadgroups), ([8, 8, 2], [32, 2, 1]));
    let partials = 9 * 32 * (512 + 8);
    assert_eq!((attend.read, attend.written), (2 * 2146 * entry + 2 * row, partials + 2 * 2 * entry));
    assert_eq!((merge.read, merge.written), (partials, 2 * 32 * 512));
    // With a window, no more than it is read; and norms.
    shape.window = Some(128);
    for (over, gammas) in [(NormOver::Head, 2 * 512), (NormOver::Projection, 40 * 512)] {
        let windowed = list(shape, Some(over), &[at(2047, 4096, 0)]).unwrap();
        assert_eq!(windowed.dispatches[0].read, 2 * 127 * entry + row + gammas);
    }
}

#[test]
fn what_the_kernels_do_not_take_is_refused_by_name_and_value() {
    let good = shape(KvType::Q8_0, 64, 2, 2);
    let error = |shape: AttentionShape, rows: &[KvRow]| list(shape, None, rows).unwrap_err().to_string();
    let row = [at(0, 1, 0)];
    let many: Vec<KvRow> = (0..129).map(|index| at(0, 1, index * 1024)).collect();
    for (message, expected) in [
        (error(AttentionShape { window: Some(0), ..good }, &row), "a window of 0 positions, expected at least 1"),
        (error(AttentionShape { softcap: Some(0.0), ..good }, &row), "a soft cap of 0, expected a positive number"),
        (error(AttentionShape { heads: 5, ..good }, &row), "5 query heads cannot share 2 key heads"),
        (error(shape(KvType::F16, 72, 2, 2), &row), "heads of 72 values, expected a multiple of 16 up to 256"),
        (error(shape(KvType::F16, 512, 2, 2), &row), "heads of 512 values, expected a multiple of 16 up to 256"),
        (error(good, &[at(1, 1, 0)]), "position 1 is past the KV cache's 1"),
        (error(good, &[at(0, 9, 8)]), "a sequence's keys begin at byte 8, expected a multiple of 16"),
        (error(good, &[]), "0 rows, expected 1 to 128"),
        (error(good, &many), "129 rows, expected 1 to 128"),
        (error(good, &[at(5, 9, 16), at(6, 9, 16)]), "two rows of the sequence at byte 16, expected one of each"),
        (
            with_rope(good, None, &row, 66).unwrap_err().to_string(),
            "66 values are rotated, expected an even number up to 64",
        ),
        (
            with_rope(good, None, &row, 31).unwrap_err().to_string(),
            "31 values are rotated, expected an even number up to 64",
        ),
    ] {
        assert_eq!(message, format!("attention: {expected}"));
    }
}
