//! Proof that mistakes in attention are found: one at a time is planted into its source, and the tests' own cases are run.
#![cfg(not(target_os = "macos"))]

mod common;

use common::attention::{Case, Out, shape};
use metal_ext::kv::KvType;
use metal_ext::{Dispatch, Encoder, KernelLibrary, attention};
use msl_cpu::{Check, CpuBuffer, CpuEncoder};

/// Runs the dispatches with another source.
struct Planted {
    encoder: CpuEncoder,
    library: &'static KernelLibrary,
}

impl Encoder for Planted {
    type Buffer = CpuBuffer;

    fn dispatch(&mut self, dispatch: &Dispatch<'_, CpuBuffer>) -> metal_ext::Result<()> {
        self.encoder.dispatch(&Dispatch { library: self.library, ..dispatch.clone() })
    }
}

/// How a run must fail.
enum Caught {
    /// It stops with this message.
    Error(&'static str),
    /// Its result differs from the reference, or what it appends.
    Wrong,
    /// Its result is right, but two threads have written the same place.
    SecondWriter,
}

/// The case's result and the places that two threads have written, or the message, with `good` replaced by `bad` where it
/// stands for the `nth` time.
fn run(case: &Case, name: &'static str, good: &str, bad: &str, nth: usize) -> metal_ext::Result<(Out, u64)> {
    let source = attention::LIBRARY.source.expect("the sources are carried");
    let (at, _) = source.match_indices(good).nth(nth).unwrap_or_else(|| panic!("{name}: no `{good}` in the source"));
    let planted = format!("{}{bad}{}", &source[..at], &source[at + good.len()..]);
    let library = KernelLibrary { name, source: Some(planted.leak()), metallib: None };
    let mut encoder = Planted { encoder: CpuEncoder::new(Check::AllOrders), library: Box::leak(Box::new(library)) };
    let out = case.encode(&mut encoder)?;
    Ok((out, encoder.encoder.stats.same_value_races))
}

#[test]
fn every_planted_bug_is_caught() {
    const BARRIER: &str = "threadgroup_barrier(mem_flags::mem_threadgroup);";
    const SIMDGROUP_BARRIER: &str = "simdgroup_barrier(mem_flags::mem_threadgroup);";
    const LAST_SPLIT: &str = "split + 1 == row.splits";
    let short = Case::rotated(shape(KvType::F16, 80, 2, 3), &[(99, 100)]);
    let few = Case::rotated(shape(KvType::F16, 80, 2, 3), &[(5, 6)]);
    let split = Case::rotated(shape(KvType::F16, 80, 1, 3), &[(544, 545)]);
    let parts = Case::rotated(shape(KvType::F16, 80, 1, 9), &[(5, 6)]);
    let quantised = Case::rotated(shape(KvType::Q8_0, 80, 2, 3), &[(99, 100)]);
    for case in [&short, &few, &split, &parts, &quantised] {
        let (got, races) = run(case, "nothing planted", BARRIER, BARRIER, 0).unwrap();
        assert_eq!((case.differs(&got, 2e-5), races), (None, 0));
    }
    let mut surprises = Vec::new();
    for (case, name, good, bad, nth, caught) in [
        (&short, "stride of positions", "* stride", "* (stride + 16)", 0, Caught::Error("out of bounds")),
        (
            &short,
            "stride of heads",
            "ulong(head) * capacity",
            "ulong(head) * (capacity - 1)",
            0,
            Caught::Error("data race on byte"),
        ),
        (&short, "stride of pieces", "place * PIECES + i]", "place + i]", 0, Caught::Wrong),
        (
            &short,
            "missing barrier behind the queries",
            BARRIER,
            "",
            0,
            Caught::Error("uninitialised threadgroup memory"),
        ),
        (
            &short,
            "missing barrier behind the sums of a slice",
            BARRIER,
            "",
            1,
            Caught::Error("uninitialised threadgroup memory"),
        ),
        (&short, "missing barrier before the next head", BARRIER, "", 2, Caught::Error("data race on byte")),
        (
            &short,
            "barrier without memory",
            BARRIER,
            "threadgroup_barrier(mem_flags::mem_none);",
            1,
            Caught::Error("lacks mem_flags::mem_threadgroup"),
        ),
        (
            &short,
            "divergent barrier",
            BARRIER,
            "if (slice == 0) { threadgroup_barrier(mem_flags::mem_threadgroup); }",
            1,
            Caught::Error("divergent threadgroup_barrier"),
        ),
        (
            &few,
            "simdgroups without positions leave",
            "float greatest[HEADS];",
            "if (first + slice * 4 * at_once >= end) { return; } float greatest[HEADS];",
            0,
            Caught::Error("not reached by all threads"),
        ),
        (
            &short,
            "idle lanes take no part in an exchange",
            "for (ushort distance = lanes / 2;",
            "if (!idle) for (ushort distance = lanes / 2;",
            0,
            Caught::Error("divergence in simdgroup"),
        ),
        (
            &short,
            "positions past the end are read",
            "min(position[u], end - 1)",
            "position[u]",
            0,
            Caught::Error("out of bounds"),
        ),
        (
            &short,
            "positions past the end count",
            "seen[u] ? exp(score[u] - most) : 0.0f",
            "exp(score[u] - most)",
            0,
            Caught::Wrong,
        ),
        (&short, "idle lanes count", "if (idle) {", "if (false) {", 0, Caught::Wrong),
        (&short, "sums are not rescaled", "sum[h][i] *= factor;", "", 0, Caught::Wrong),
        (&short, "lanes are merged without their weights", "total[h] *= factor;", "", 0, Caught::Wrong),
        (&split, "splits begin where the first does", "row.first + split * row.span", "row.first", 0, Caught::Wrong),
        (
            &short,
            "the own entry is read where it is written",
            "block + 4 * at_once > own_position",
            "false",
            0,
            Caught::Error("lacks mem_flags::mem_device"),
        ),
        (
            &parts,
            "the own entry is read where another threadgroup writes it",
            "block + 4 * at_once > own_position",
            "false",
            0,
            Caught::Error("data race on byte"),
        ),
        (&parts, "all that share a key head append", "has_own && part == 0", "has_own", 0, Caught::SecondWriter),
        (&split, "all splits append", LAST_SPLIT, "true", 0, Caught::SecondWriter),
        (&parts, "nobody appends", "has_own && part == 0", "false", 0, Caught::Wrong),
        (
            &split,
            "the first split owns the last position",
            LAST_SPLIT,
            "split == 0",
            0,
            Caught::Error("uninitialised threadgroup memory"),
        ),
        (
            &short,
            "the own entry is not what is stored",
            "((threadgroup half4*)own)[i] = stored;",
            "((threadgroup half4*)own)[i] = half4(1.01f * float4(stored));",
            0,
            Caught::Wrong,
        ),
        (
            &quantised,
            "the own scale is not what is stored",
            "((threadgroup half*)own_scales)[group] = stored;",
            "((threadgroup half*)own_scales)[group] = half(1.01f * scale);",
            0,
            Caught::Wrong,
        ),
        (
            &quantised,
            "scales of key and value share their place",
            "own_k_scales + scale_stride",
            "own_k_scales",
            0,
            Caught::Error("data race on byte"),
        ),
        (
            &short,
            "appended a position early",
            "ulong(own_position) * stride, ",
            "ulong(own_position - 1) * stride, ",
            0,
            Caught::Error("data race on byte"),
        ),
        (
            &short,
            "missing barrier before the rotation",
            SIMDGROUP_BARRIER,
            "",
            0,
            Caught::Error("uninitialised threadgroup memory"),
        ),
        (&short, "missing barrier behind the rotation", SIMDGROUP_BARRIER, "", 1, Caught::Error("data race on byte")),
        (&short, "values are rotated", "has_rope && !is_v", "has_rope", 0, Caught::Wrong),
        (&split, "splits are merged without their weights", "out[i] += weight *", "out[i] +=", 0, Caught::Wrong),
    ] {
        let got = run(case, name, good, bad, nth);
        let surprise = match (caught, got) {
            (Caught::Error(message), Err(error)) => Some(error.to_string()).filter(|error| !error.contains(message)),
            (_, Err(error)) => Some(error.to_string()),
            (caught, Ok((got, races))) => match (caught, case.differs(&got, 2e-5)) {
                (Caught::Wrong, Some(_)) => None,
                (Caught::SecondWriter, None) if races > 0 => None,
                (_, difference) => Some(difference.unwrap_or("the result is right".into())),
            },
        };
        surprises.extend(surprise.map(|surprise| format!("{name}: {surprise}")));
    }
    assert!(surprises.is_empty(), "not caught as expected:\n{}", surprises.join("\n"));
}
