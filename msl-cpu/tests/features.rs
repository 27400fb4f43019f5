//! The shim and the rewriter against hand-computed values.
#![cfg(not(target_os = "macos"))]

use msl_cpu::{Library, f16, f32_of};
use std::path::Path;
use std::sync::OnceLock;

fn lib() -> &'static Library {
    static LIB: OnceLock<Library> = OnceLock::new();
    LIB.get_or_init(|| Library::compile(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/features.metal")).unwrap())
}

#[test]
fn half_and_bfloat_conversions() {
    // every half, and points around every rounding boundary
    let mut x = Vec::new();
    for h in 0..=0xffffu32 {
        let v = f32_of(h as u16);
        x.extend([
            v,
            f32::from_bits(v.to_bits().wrapping_add(0x0fff)),
            f32::from_bits(v.to_bits().wrapping_add(0x1000)),
            f32::from_bits(v.to_bits().wrapping_add(0x1001)),
        ]);
    }
    let (mut h, mut b) = (vec![0u16; x.len()], vec![0u16; x.len()]);
    lib()
        .encode("half_rounding")
        .buffer(0, &x)
        .buffer_mut(1, &mut h)
        .buffer_mut(2, &mut b)
        .dispatch_threads([x.len() as u32, 1, 1], [256, 1, 1])
        .unwrap();
    for i in 0..x.len() {
        if x[i].is_nan() {
            assert!(f32_of(h[i]).is_nan() && f32::from_bits(u32::from(b[i]) << 16).is_nan());
            continue;
        }
        assert_eq!(h[i], f16(x[i]), "half({:e})", x[i]);
        let bits = x[i].to_bits();
        assert_eq!(u32::from(b[i]), (bits + 0x7fff + (bits >> 16 & 1)) >> 16, "bfloat({:e})", x[i]);
    }
}

#[test]
fn half_arithmetic_rounds_every_step() {
    let mut out = [0, 0, 0, f16(1.0)];
    lib().encode("half_sum").buffer_mut(0, &mut out).dispatch_threads([1, 1, 1], [1, 1, 1]).unwrap();
    assert_eq!(out.map(f32_of), [2048.0, 2050.0, 1.0, 1.0]);
}

#[test]
fn vectors_constants_and_layout() {
    let mut arg = [0u8; 48];
    let put = |a: &mut [u8; 48], at: usize, v: f32| a[at..at + 4].copy_from_slice(&v.to_le_bytes());
    for i in 0..3 {
        put(&mut arg, i * 4, (i + 1) as f32); // p = 1 2 3
        put(&mut arg, 16 + i * 4, (i + 4) as f32); // q = 4 5 6
    }
    arg[32..34].copy_from_slice(&f16(0.25).to_le_bytes());
    arg[34..36].copy_from_slice(&f16(0.5).to_le_bytes());
    arg[36..40].copy_from_slice(&[1, 2, 3, 250]);
    let mut out = [f32::NAN; 18];
    lib()
        .encode("vectors")
        .value(0, arg)
        .buffer_mut(1, &mut out)
        .constant(3, 10i32)
        .constant_bool(4, true)
        .dispatch_threads([1, 1, 1], [1, 1, 1])
        .unwrap();
    let want = [
        2.0,
        1.0,
        6.0,
        8.0,
        10.0,
        32.0,
        0.75,
        256.0,
        31.0,
        42.0,
        2.0,
        5.0,
        f32::from_bits(1.5f32.to_bits() + 1) - 1.5,
        (8 + 31 + 3 + 0xbc) as f32,
        1.5,
        21.0,
        1.0,
        (16 + 12 + 8 + 48) as f32,
    ];
    assert_eq!(out, want);
}

#[test]
fn simd_operations() {
    let mut out = vec![0u32; 640];
    lib().encode("simd_ops").buffer_mut(0, &mut out).dispatch_in_all_orders([1, 1, 1], [64, 1, 1]).unwrap();
    for i in 0..64u32 {
        let l = i % 32;
        let want = [
            496,
            31,
            if l < 29 { l + 3 } else { l },
            l ^ 6,
            14,
            l * l.saturating_sub(1) / 2,
            0x4924_9249,
            l / 4 * 16 + 6,
            if l >= 2 { l - 2 } else { l },
            (l + 31) % 32,
        ];
        for (k, w) in want.iter().enumerate() {
            assert_eq!(out[k * 64 + i as usize], *w, "op {k} lane {l}");
        }
    }
}

#[test]
fn builtins_on_a_ragged_grid() {
    let (w, h) = (13u32, 7u32); // threadgroups of 5x3
    let mut out = vec![0u32; (w * h * 4) as usize];
    lib().encode("builtins").buffer_mut(0, &mut out).dispatch_threads([w, h, 1], [5, 3, 1]).unwrap();
    for y in 0..h {
        for x in 0..w {
            let k = ((y * w + x) * 4) as usize;
            let size = (5.min(w - x / 5 * 5)) * (3.min(h - y / 3 * 3));
            assert_eq!(out[k..k + 4], [1, 1, size, 1], "({x},{y})");
        }
    }
}

#[test]
fn atomics() {
    let data: Vec<u8> = (0..1000).map(|i| (i * 7 % 11) as u8).collect();
    let mut bins = [0u32; 4];
    lib()
        .encode("histogram")
        .buffer(0, &data)
        .buffer_mut(1, &mut bins)
        .dispatch_threads([1000, 1, 1], [128, 1, 1])
        .unwrap();
    let mut want = [0u32; 4];
    data.iter().for_each(|b| want[(b & 3) as usize] += 1);
    assert_eq!(bins, want);
}

#[test]
fn simdgroup_matrices() {
    let a: Vec<u16> = (0..64).map(|i| f16((i % 9) as f32 - 4.0)).collect();
    let b: Vec<u16> = (0..64).map(|i| f16((i % 7) as f32 - 3.0)).collect();
    let mut c = [0f32; 64];
    lib()
        .encode("matmul8")
        .buffer(0, &a)
        .buffer(1, &b)
        .buffer_mut(2, &mut c)
        .dispatch_threadgroups([1, 1, 1], [32, 1, 1])
        .unwrap();
    for i in 0..8 {
        for j in 0..8 {
            let want: f32 = 1.0 + (0..8).map(|k| f32_of(a[i * 8 + k]) * f32_of(b[j * 8 + k])).sum::<f32>();
            assert_eq!(c[i * 8 + j], want);
        }
    }
}

#[test]
fn host_mistakes_are_reported() {
    let (mut c, a) = ([0f32; 64], [0u16; 64]);
    let e = lib()
        .encode("matmul8")
        .buffer(0, &a)
        .buffer_mut(2, &mut c)
        .dispatch_threadgroups([1, 1, 1], [32, 1, 1])
        .unwrap_err()
        .to_string();
    assert!(e.contains("buffer(1) `b` is not bound"), "{e}");
    let e = lib()
        .encode("matmul8")
        .buffer(0, &a)
        .buffer(1, &a)
        .buffer(2, &c)
        .dispatch_threadgroups([1, 1, 1], [32, 1, 1])
        .unwrap_err()
        .to_string();
    assert!(e.contains("read-only"), "{e}");
    let e = lib()
        .encode("vectors")
        .value(0, 1u32)
        .buffer_mut(1, &mut c)
        .dispatch_threads([1, 1, 1], [1, 1, 1])
        .unwrap_err()
        .to_string();
    assert!(e.contains("holds 4 bytes, the kernel expects 48"), "{e}");
    let e = lib()
        .encode("matmul8")
        .buffer(0, &a)
        .buffer(1, &a)
        .buffer_mut(2, &mut c)
        .dispatch_threadgroups([1, 1, 1], [2048, 1, 1])
        .unwrap_err()
        .to_string();
    assert!(e.contains("limit is 1024"), "{e}");
    assert!(
        lib().encode("nope").dispatch_threadgroups([1, 1, 1], [1, 1, 1]).unwrap_err().to_string().contains("no kernel")
    );
}
