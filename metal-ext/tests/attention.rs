//! Attention of single queries through the encoder, against f64. What a row does not see is NaN, and buffers
//! end where their contents do.
#![cfg(any(not(target_os = "macos"), feature = "metal"))]

mod common;

use common::Rng;
#[cfg(not(target_os = "macos"))]
use common::Shortened;
use common::attention::{Case, shape};
use common::gpu::{Check, Gpu};
use common::kv::write_kv;
use metal_ext::attention::{Attention, AttentionShape};
use metal_ext::kv::{KvRow, KvType};
use metal_ext::{DryRun, Region};

#[test]
fn every_head_size_and_type() {
    for kv_type in KvType::ALL {
        for head_dim in [32, 64, 80, 96, 128, 256] {
            let case = Case::new(shape(kv_type, head_dim, 1, 1), &[(36, 37)]);
            case.check(Check::AllOrders, &format!("{kv_type:?}, heads of {head_dim}"));
        }
    }
}

#[test]
fn one_to_eight_query_heads_share_a_key_head_and_more_do_in_parts() {
    for kv_type in KvType::ALL {
        for group in (1..=8).chain([9, 16]) {
            let case = Case::new(shape(kv_type, 64, 2, group), &[(70, 80)]);
            let check = if group == 7 { Check::AllOrders } else { Check::Accesses };
            case.check(check, &format!("{kv_type:?}, {group} heads"));
        }
    }
}

#[test]
fn positions_across_the_boundaries_of_blocks_and_splits() {
    for kv_type in KvType::ALL {
        for position in [0, 1, 7, 8, 31, 32, 33, 63, 64, 255, 256, 510, 511, 512, 543, 544, 767, 1100] {
            let case = Case::new(shape(kv_type, 64, 1, 1), &[(position, position + 1)]);
            let check = if position == 544 { Check::AllOrders } else { Check::Accesses };
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
            let case = Case::new(shape, &[(position, position + 3)]);
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
            let case = Case::new(shape, &[(45, 64)]);
            case.check(Check::AllOrders, &format!("{kv_type:?}, cap of {cap}"));
        }
    }
}

#[test]
fn a_row_is_the_same_to_the_bit_alone_and_among_others() {
    for kv_type in KvType::ALL {
        let rows = [(3, 9), (700, 701), (40, 41), (1200, 1300)];
        let mut all = Case::new(shape(kv_type, 64, 2, 4), &rows);
        all.gap = 12;
        let together = all.check(Check::Accesses, &format!("{kv_type:?}"));
        let width = all.shape.heads * 64;
        let (q, places) = (all.q.clone(), all.rows.clone());
        for row in 0..rows.len() {
            (all.q, all.rows) = (q[row * width..][..width].to_vec(), vec![places[row]]);
            let alone = all.encode(&mut Gpu::new(Check::Accesses)).unwrap();
            assert_eq!(alone, together[row * width..][..width], "{kv_type:?}, row {row}");
        }
    }
}

#[test]
fn several_rows_of_one_sequence_see_what_is_before_them() {
    let mut case = Case::new(shape(KvType::F16, 64, 1, 2), &[(40, 64)]);
    let last = case.rows[0];
    case.rows = (38..=40).map(|position| KvRow { position, ..last }).collect();
    case.q = Rng(2).floats(case.rows.len() * case.shape.heads * 64);
    case.check(Check::AllOrders, "three rows");
}

#[test]
fn extreme_scores_and_scales_stay_what_they_are() {
    for kv_type in KvType::ALL {
        // Scores of tens of thousands: one position takes everything, and no other leaves a trace.
        let mut case = Case::new(shape(kv_type, 64, 1, 2), &[(530, 531)]);
        case.q.iter_mut().for_each(|v| *v *= 1e5);
        case.check(Check::Accesses, &format!("{kv_type:?}, large scores"));
        // Scores that are all far below zero, and one alone in its split.
        let mut case = Case::new(shape(kv_type, 64, 1, 1), &[(544, 545)]);
        case.q.fill(-3e4);
        let row = case.rows[0];
        for position in case.seen(row) {
            let key = vec![1.0 + position as f32 / 1024.0; 64];
            write_kv(&case.shape.kv, &mut case.keys, KvRow { position, ..row }, 0, &key);
        }
        case.check(Check::Accesses, &format!("{kv_type:?}, scores far below zero"));
        // Halves, and scales, that are denormal, and the greatest.
        for factor in [4e-6, 6e4] {
            let mut case = Case::new(shape(kv_type, 64, 1, 1), &[(20, 21)]);
            let mut rng = Rng(5);
            let row = case.rows[0];
            for position in case.seen(row) {
                let mut random = || rng.floats(64).iter().map(|v| v * factor).collect::<Vec<f32>>();
                let at = KvRow { position, ..row };
                write_kv(&case.shape.kv, &mut case.keys, at, 0, &random());
                write_kv(&case.shape.kv, &mut case.values, at, 0, &random());
            }
            case.q.iter_mut().for_each(|v| *v /= factor);
            case.check(Check::AllOrders, &format!("{kv_type:?}, values of {factor}"));
        }
        // Equal scores are a mean.
        let mut case = Case::new(shape(kv_type, 64, 1, 1), &[(99, 100)]);
        case.q.fill(0.0);
        case.check(Check::AllOrders, &format!("{kv_type:?}, equal scores"));
    }
}

#[cfg(not(target_os = "macos"))] // a GPU does not tell
#[test]
fn a_dispatch_names_no_byte_more_than_the_kernel_touches() {
    for kv_type in KvType::ALL {
        // Unsplit: the second sequence ends where its buffer does, the first where the second begins.
        let unsplit = Case::new(shape(kv_type, 80, 2, 1), &[(9, 10), (7, 8)]);
        for (index, what) in (0..).zip(["q", "keys", "values", "y"]) {
            let error = unsplit.encode(&mut Shortened::new(index)).unwrap_err().to_string();
            assert!(error.contains("out of bounds") && error.contains(&format!("`{what}`")), "{kv_type:?}: {error}");
        }
        // Split: partial results of a last row with fewer splits than there is room for.
        let split = Case::new(shape(kv_type, 64, 1, 1), &[(800, 801), (544, 600)]);
        for (index, what) in (0..).zip(["q", "keys", "values", "y", "stats"]) {
            let error = split.encode(&mut Shortened::new(index)).unwrap_err().to_string();
            assert!(error.contains("out of bounds") && error.contains(&format!("`{what}`")), "{kv_type:?}: {error}");
        }
    }
}

fn list(shape: AttentionShape, rows: &[KvRow]) -> metal_ext::Result<DryRun> {
    let nothing = Region::at(&(), 0);
    let width = shape.heads * shape.kv.head_dim;
    let attention = Attention {
        shape,
        q: nothing,
        stride_q: width,
        keys: nothing,
        values: nothing,
        rows,
        y: nothing,
        stride_y: width,
        scratch: nothing,
    };
    let mut list = DryRun::new();
    attention.encode(&mut list)?;
    Ok(list)
}

fn at(position: usize, capacity: usize) -> KvRow {
    KvRow { position, capacity, offset: 0 }
}

#[test]
fn a_dry_run_lists_keys_and_values_once_and_partial_results_twice() {
    let mut shape = shape(KvType::F16, 128, 8, 4);
    let short = list(shape, &[at(299, 4096)]).unwrap();
    assert_eq!(short.dispatches.len(), 1);
    let attend = &short.dispatches[0];
    assert_eq!((attend.kernel.as_str(), attend.threadgroups, attend.threads), ("attend_f16_4", [1, 8, 1], [256, 1, 1]));
    assert_eq!((attend.read, attend.written), (2 * 300 * 8 * 256 + 32 * 512, 32 * 512));
    let long = list(shape, &[at(2047, 4096), at(99, 100)]).unwrap();
    assert_eq!(long.dispatches.len(), 2);
    let (attend, merge) = (&long.dispatches[0], &long.dispatches[1]);
    assert_eq!((attend.threadgroups, merge.threadgroups), ([8, 8, 2], [32, 2, 1]));
    let partials = 9 * 32 * (512 + 8);
    assert_eq!((attend.read, attend.written), (2 * 2148 * 8 * 256 + 2 * 32 * 512, partials));
    assert_eq!((merge.read, merge.written), (partials, 2 * 32 * 512));
    // With a window, no more than it is read.
    shape.window = Some(128);
    assert_eq!(list(shape, &[at(2047, 4096)]).unwrap().dispatches[0].read, 2 * 128 * 8 * 256 + 32 * 512);
}

#[test]
fn what_the_kernels_do_not_take_is_refused_by_name_and_value() {
    let good = shape(KvType::Q8_0, 64, 2, 2);
    let error = |shape: AttentionShape, rows: &[KvRow]| list(shape, rows).unwrap_err().to_string();
    for (message, expected) in [
        (
            error(AttentionShape { window: Some(0), ..good }, &[at(0, 1)]),
            "a window of 0 positions, expected at least 1",
        ),
        (
            error(AttentionShape { softcap: Some(0.0), ..good }, &[at(0, 1)]),
            "a soft cap of 0, expected a positive number",
        ),
        (error(AttentionShape { heads: 5, ..good }, &[at(0, 1)]), "5 query heads cannot share 2 key heads"),
        (error(shape(KvType::F16, 72, 2, 2), &[at(0, 1)]), "heads of 72 values, expected a multiple of 16 up to 256"),
        (error(good, &[at(1, 1)]), "position 1 is past the KV cache's 1"),
        (error(good, &[at(0, 1); 129]), "129 rows, expected 1 to 128"),
    ] {
        assert_eq!(message, format!("attention: {expected}"));
    }
}
