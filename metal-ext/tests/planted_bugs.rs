//! Proof that the harness finds mistakes: one kernel, twelve planted bugs.
#![cfg(not(target_os = "macos"))]

mod common;
use common::*;
use msl_cpu::{Builder, Order, Pod, Result, Stats, f32_of};
use std::path::Path;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args(u32, u32, u32);
#[allow(unsafe_code)]
// SAFETY: numbers without padding.
unsafe impl Pod for Args {}

struct Run {
    stats: Result<Stats>,
    wrong: bool, // the numbers differ from the reference
}

fn run(bug: u32, checked: bool, order: Order) -> Run {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/planted/row_dot.metal");
    let b = Builder::new(path).define(&format!("BUG={bug}"));
    let lib = if checked { b } else { b.fast() }.compile().unwrap();
    let (k, n, threads) = (216usize, 5usize, 128u32);
    let mut r = Rng(3);
    let (w, x) = (r.halves(n * k), r.floats(k));
    let mut y = vec![f32::NAN; n];
    let stats = lib
        .encode("row_dot")
        .buffer(0, &w)
        .buffer(1, &x)
        .buffer_mut(2, &mut y)
        .value(3, Args(k as u32, n as u32, k as u32))
        .order(order)
        .dispatch_threadgroups([n as u32, 1, 1], [threads, 1, 1]);
    let dense: Vec<f32> = w.iter().map(|&h| f32_of(h)).collect();
    let want = gemv(&dense, &x, n, k);
    let wrong = y.iter().zip(&want).any(|(&g, &w)| g.is_nan() || (f64::from(g) - w).abs() > 1e-3);
    Run { stats, wrong }
}

#[test]
fn every_planted_bug_is_caught() {
    for order in [Order::Forward, Order::Reverse, Order::Shuffled(5)] {
        let good = run(0, true, order);
        good.stats.unwrap();
        assert!(!good.wrong);
    }
    let expected = [
        (1, "missing barrier", "data race on byte"),
        (2, "wrong stride", "out of bounds"),
        (3, "divergent barrier", "divergent threadgroup_barrier"),
        (4, "early return before a barrier", "not reached by all threads"),
        (5, "barrier without mem_threadgroup", "lacks mem_flags::mem_threadgroup"),
        (6, "uninitialised threadgroup memory", "uninitialised threadgroup memory"),
        (7, "simd op in divergent code", "divergence in simdgroup"),
        (8, "private array overrun", "array index out of bounds"),
        (9, "misaligned vector load", "misaligned access"),
        (10, "two threads store different values", "data race on byte"),
        (11, "reads another threadgroup's output", "different threadgroups are never ordered"),
        (12, "too much threadgroup memory", "the limit is 32768"),
    ];
    for (bug, what, message) in expected {
        // Caught in every schedule. What is reported first may vary: simdgroup 0 running first
        // meets a missing barrier as an uninitialised read, running last as a race.
        let e = [Order::Reverse, Order::Forward].map(|o| run(bug, true, o).stats.expect_err(what).to_string());
        println!("{bug:2} {what}:\n   {}", e[0].replace('\n', "\n   "));
        assert!(e.iter().any(|e| e.contains(message)), "{what}: {e:?}");
    }
}

/// What is left without the memory checks: divergence is still caught, a missing barrier shows
/// only as a wrong result, and only in some schedules.
#[test]
fn fast_build_catches_less() {
    assert!(!run(0, false, Order::Forward).wrong);
    assert!(run(3, false, Order::Forward).stats.is_err());
    assert!(run(4, false, Order::Forward).stats.is_err());
    assert!(run(7, false, Order::Forward).stats.is_err());
    let missing_barrier =
        [Order::Forward, Order::Reverse].map(|o| run(1, false, o)).map(|r| r.stats.is_ok() && r.wrong);
    assert_eq!(missing_barrier, [true, false]); // simdgroup 0 goes first, or last
}
