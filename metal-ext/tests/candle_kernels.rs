//! candle-metal-kernels' own .metal files, read unmodified from the cargo registry, against plain
//! references. Skipped where that crate has not been downloaded.
#![cfg(not(target_os = "macos"))]

mod common;
use common::*;
use msl_cpu::{Builder, allow, f16, f32_of};

/// candle (after MLX) leans on mem_none barriers ordering threadgroup memory.
const GPU_LIKE: u32 = allow::MEM_NONE_FENCES;

#[test]
fn gemv() {
    let Some(path) = candle("gemv.metal") else { return };
    // (bm, bn, sm, sn, tm, tn): the block shapes candle picks for different K and N
    let shapes = [(4, 1, 1, 32, 4, 4), (8, 1, 1, 32, 4, 4), (1, 1, 8, 4, 4, 4), (1, 8, 1, 32, 4, 4)];
    let name = |t: &str, s: (usize, usize, usize, usize, usize, usize)| {
        format!("gemv_{t}_bm{}_bn{}_sm{}_sn{}_tm{}_tn{}_nc0_axpby0", s.0, s.1, s.2, s.3, s.4, s.5)
    };
    let names: Vec<String> =
        ["float16", "float32"].iter().flat_map(|t| shapes.iter().map(move |s| name(t, *s))).collect();
    let lib = Builder::new(path).kernels(&names.iter().map(String::as_str).collect::<Vec<_>>()).compile().unwrap();
    for (k, m) in [(2048usize, 64usize), (257, 37), (65, 4), (130, 129)] {
        for s in shapes {
            let mut r = Rng((k + m) as u64);
            let (w, x) = (r.halves(m * k), r.halves(k));
            let (wf, xf): (Vec<f32>, Vec<f32>) =
                (w.iter().map(|&h| f32_of(h)).collect(), x.iter().map(|&h| f32_of(h)).collect());
            let want = common::gemv(&wf, &xf, m, k);
            let groups = [m.div_ceil(s.0 * s.2 * s.4) as u32, 1, 1];
            let threads = [32, s.1 as u32, s.0 as u32];
            // With several simdgroups per row MLX's barrier sits inside `if (thrN == 0)`.
            let flags = GPU_LIKE | if s.1 > 1 { allow::PARTIAL_BARRIER } else { 0 };
            let (mut y16, mut y32) = (vec![0u16; m], vec![f32::NAN; m]);
            let one = [0i64];
            let shape = [1i32];
            macro_rules! go {
                ($t:literal, $w:expr, $x:expr, $y:expr) => {
                    lib.encode(&name($t, s))
                        .buffer(0, $w)
                        .buffer(1, $x)
                        .nil(2)
                        .buffer_mut(3, $y)
                        .value(4, k as i32)
                        .value(5, m as i32)
                        .value(6, k as i32)
                        .value(7, 1f32)
                        .value(8, 0f32)
                        .value(9, 1i32)
                        .buffer(10, &shape)
                        .buffer(11, &one)
                        .buffer(12, &one)
                        .buffer(13, &one)
                        .value(14, 1i32)
                        .allow(flags)
                        .dispatch_in_all_orders(groups, threads)
                        .unwrap()
                };
            }
            go!("float16", &w, &x, &mut y16);
            go!("float32", &wf, &xf, &mut y32);
            close(&y32, &want, 1e-5, &format!("gemv f32 K={k} M={m} {s:?}"));
            close(
                &y16.iter().map(|&h| f32_of(h)).collect::<Vec<_>>(),
                &want,
                2e-3,
                &format!("gemv f16 K={k} M={m} {s:?}"),
            );
        }
    }
}

/// The layout of arguments shared by candle's kernel_mul_mv_* kernels.
fn mul_mv<'a>(
    lib: &'a msl_cpu::Library,
    name: &str,
    w: &'a [u8],
    x: &'a [f32],
    y: &'a mut [f32],
    k: usize,
) -> msl_cpu::Encoder<'a> {
    let (k, n) = (k as i64, y.len() as i64);
    lib.encode(name)
        .buffer(0, w)
        .buffer(1, x)
        .buffer_mut(2, y)
        .value(3, k)
        .value(4, n)
        .value(5, 1i64) // ne00 ne01 ne02
        .value(6, 0u64)
        .value(7, 0u64)
        .value(8, 0u64)
        .value(9, k)
        .value(10, 1i64)
        .value(11, 1i64) // ne10 ne11 ne12
        .value(12, 0u64)
        .value(13, 0u64)
        .value(14, 0u64)
        .value(15, n)
        .value(16, 1i64) // ne0 ne1
        .value(17, 1u32)
        .value(18, 1u32)
}

fn q4_0(r: &mut Rng, n: usize, k: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut raw, mut dense) = (Vec::new(), Vec::new());
    for _ in 0..n * k / 32 {
        let d = f16(r.float() / 16.0);
        let q = r.bytes(16);
        raw.extend(d.to_le_bytes());
        raw.extend(&q);
        dense.extend(q.iter().map(|b| f32_of(d) * (f32::from(b & 15) - 8.0)));
        dense.extend(q.iter().map(|b| f32_of(d) * (f32::from(b >> 4) - 8.0)));
    }
    (raw, dense)
}

fn q4_k(r: &mut Rng, n: usize, k: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut raw, mut dense) = (Vec::new(), Vec::new());
    for _ in 0..n * k / 256 {
        let (d, dmin) = (f16(r.float() / 512.0), f16(r.float() / 512.0));
        let (s, q) = (r.bytes(12), r.bytes(128));
        for v in [d, dmin] {
            raw.extend(v.to_le_bytes());
        }
        raw.extend(&s);
        raw.extend(&q);
        for j in 0..8 {
            // six-bit scale and minimum of sub-block j
            let (sc, m) = if j < 4 {
                (s[j] & 63, s[j + 4] & 63)
            } else {
                ((s[j + 4] & 15) | (s[j - 4] >> 6 << 4), (s[j + 4] >> 4) | (s[j] >> 6 << 4))
            };
            for i in 0..32 {
                let b = q[j / 2 * 32 + i];
                let v = if j % 2 == 0 { b & 15 } else { b >> 4 };
                dense.push(f32_of(d) * f32::from(sc) * f32::from(v) - f32_of(dmin) * f32::from(m));
            }
        }
    }
    (raw, dense)
}

fn q6_k(r: &mut Rng, n: usize, k: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut raw, mut dense) = (Vec::new(), Vec::new());
    for _ in 0..n * k / 256 {
        let (ql, qh, sc, d) = (r.bytes(128), r.bytes(64), r.bytes(16), f16(r.float() / 4096.0));
        raw.extend(&ql);
        raw.extend(&qh);
        raw.extend(&sc);
        raw.extend(d.to_le_bytes());
        for i in 0..256 {
            let (half, l) = (i / 128, i % 128);
            let low = ql[half * 64 + l % 64];
            let low = if l < 64 { low & 15 } else { low >> 4 };
            let high = (qh[half * 32 + l % 32] >> (l / 32 * 2)) & 3;
            let q = i32::from(low | high << 4) - 32;
            dense.push(f32_of(d) * f32::from(sc[i / 16] as i8) * q as f32);
        }
    }
    (raw, dense)
}

#[test]
fn quantized_mul_mv() {
    let Some(path) = candle("quantized.metal") else { return };
    let names =
        ["kernel_mul_mv_q8_0_f32", "kernel_mul_mv_q4_0_f32", "kernel_mul_mv_q4_K_f32", "kernel_mul_mv_q6_K_f32"];
    let lib = Builder::new(path).kernels(&names).compile().unwrap();
    type Quantise = fn(&mut Rng, usize, usize) -> (Vec<u8>, Vec<f32>);
    let q8_0: Quantise = |r, n, k| r.q8_0(n, k);
    // (kernel, quantiser, rows per threadgroup, threads, K granularity): as in candle's quantized.rs
    let cases: [(&str, Quantise, usize, [u32; 3], usize); 4] = [
        (names[0], q8_0, 8, [8, 8, 1], 32),
        (names[1], q4_0, 8, [8, 8, 1], 32),
        (names[2], q4_k, 4, [4, 8, 1], 256),
        (names[3], q6_k, 2, [2, 32, 1], 256),
    ];
    for (name, quantise, align, threads, unit) in cases {
        for (k, n) in [(2048, 64), (unit * 3, 24), (unit, 8)] {
            let mut r = Rng(k as u64 * 31 + n as u64);
            let (w, dense) = quantise(&mut r, n, k);
            let x = r.floats(k);
            let mut y = vec![f32::NAN; n];
            mul_mv(&lib, name, &w, &x, &mut y, k)
                .dispatch_in_all_orders([n.div_ceil(align) as u32, 1, 1], threads)
                .unwrap();
            close(&y, &common::gemv(&dense, &x, n, k), 1e-4, &format!("{name} K={k} N={n}"));
        }
        // Their comment says it: the number of rows must be a multiple of the tile.
        let (k, n) = (unit, align - 1);
        let (w, _) = quantise(&mut Rng(1), n, k);
        let mut y = vec![f32::NAN; n];
        let e = mul_mv(&lib, name, &w, &vec![0.0; k], &mut y, k).dispatch_threadgroups([1, 1, 1], threads);
        let e = e.unwrap_err().to_string();
        assert!(e.contains("out of bounds") && e.contains("buffer(0)"), "{e}");
    }
}

/// Prefill: simdgroup_matrix multiplies and a [[threadgroup(0)]] argument.
#[test]
fn quantized_mul_mm() {
    let Some(path) = candle("quantized.metal") else { return };
    let lib = Builder::new(path).kernels(&["kernel_mul_mm_q8_0_f32", "kernel_mul_mm_q4_K_f32"]).compile().unwrap();
    type Quantise = fn(&mut Rng, usize, usize) -> (Vec<u8>, Vec<f32>);
    let q8_0: Quantise = |r, n, k| r.q8_0(n, k);
    for (name, quantise, block, bytes) in
        [("kernel_mul_mm_q8_0_f32", q8_0, 32, 34), ("kernel_mul_mm_q4_K_f32", q4_k, 256, 144)]
    {
        for (m, n, k) in [(5usize, 68usize, 256usize), (32, 64, 512), (5, 70, 256)] {
            let mut r = Rng(7);
            let (w, dense) = quantise(&mut r, n, k);
            let x = r.floats(m * k);
            let mut y = vec![f32::NAN; m * n];
            let row = (k / block * bytes) as u64;
            let result = lib
                .encode(name)
                .buffer(0, &w)
                .buffer(1, &x)
                .buffer_mut(2, &mut y)
                .value(3, k as i64)
                .value(4, 1i64)
                .value(5, row)
                .value(6, row * n as u64)
                .value(7, row * n as u64)
                .value(8, 1i64)
                .value(9, 4u64)
                .value(10, 4 * k as u64)
                .value(11, 4 * (m * k) as u64)
                .value(12, 4 * (m * k) as u64)
                .value(13, n as i64)
                .value(14, m as i64)
                .value(15, 1u32)
                .value(16, 1u32)
                .threadgroup_memory(0, 8192)
                .dispatch_threadgroups([m.div_ceil(32) as u32, n.div_ceil(64) as u32, 1], [128, 1, 1]);
            if let (Err(e), true) = (&result, n % 4 != 0) {
                // A finding: their tail loop stores float4s into rows that are not 16-byte
                // aligned. (g++ reports it; clang does not check whole-struct copies.)
                assert!(e.to_string().contains("misaligned"), "{e}");
                continue;
            }
            result.unwrap();
            let want: Vec<f64> = (0..m).flat_map(|i| common::gemv(&dense, &x[i * k..(i + 1) * k], n, k)).collect();
            close(&y, &want, 3e-3, &format!("{name} M={m} N={n} K={k}"));
        }
    }
}

#[test]
fn rmsnorm_and_rope() {
    let Some(path) = candle("reduce.metal") else { return };
    let lib = Builder::new(path).kernels(&["rmsnorm_f32", "rmsnorm_f16", "rope_f32"]).compile().unwrap();
    for (rows, d, threads) in [(3usize, 2048usize, 1024u32), (2, 100, 32), (1, 257, 256), (4, 65, 64)] {
        let mut r = Rng(d as u64);
        let (x, g) = (r.halves(rows * d), r.halves(d));
        let (xf, gf): (Vec<f32>, Vec<f32>) =
            (x.iter().map(|&h| f32_of(h)).collect(), g.iter().map(|&h| f32_of(h)).collect());
        let eps = 1e-5f32;
        let want: Vec<f64> = xf
            .chunks(d)
            .flat_map(|row| {
                let s =
                    1.0 / (row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / d as f64 + f64::from(eps)).sqrt();
                row.iter().zip(&gf).map(move |(&v, &g)| f64::from(v) * s * f64::from(g)).collect::<Vec<_>>()
            })
            .collect();
        let (mut y16, mut y32) = (vec![0u16; rows * d], vec![f32::NAN; rows * d]);
        let (n, per) = ((rows * d) as u32, d as u32);
        lib.encode("rmsnorm_f32")
            .value(0, n)
            .value(1, per)
            .buffer(2, &xf)
            .buffer_mut(3, &mut y32)
            .buffer(4, &gf)
            .value(5, eps)
            .allow(GPU_LIKE)
            .dispatch_in_all_orders([rows as u32, 1, 1], [threads, 1, 1])
            .unwrap();
        lib.encode("rmsnorm_f16")
            .value(0, n)
            .value(1, per)
            .buffer(2, &x)
            .buffer_mut(3, &mut y16)
            .buffer(4, &g)
            .value(5, eps)
            .allow(GPU_LIKE)
            .dispatch_in_all_orders([rows as u32, 1, 1], [threads, 1, 1])
            .unwrap();
        close(&y32, &want, 1e-5, &format!("rmsnorm_f32 d={d}"));
        close(&y16.iter().map(|&h| f32_of(h)).collect::<Vec<_>>(), &want, 3e-3, &format!("rmsnorm_f16 d={d}"));
        if threads > 32 {
            // without GPU_LIKE: the reduction's barriers are mem_none
            let e = lib
                .encode("rmsnorm_f32")
                .value(0, n)
                .value(1, per)
                .buffer(2, &xf)
                .buffer_mut(3, &mut y32)
                .buffer(4, &gf)
                .value(5, eps)
                .dispatch_threadgroups([rows as u32, 1, 1], [threads, 1, 1])
                .unwrap_err()
                .to_string();
            assert!(e.contains("lacks mem_flags::mem_threadgroup"), "{e}");
        }
    }
    // rope over (batch*heads, time, dim)
    let (bh, t, d) = (3usize, 5usize, 64usize);
    let mut r = Rng(9);
    let (x, cos, sin) = (r.floats(bh * t * d), r.floats(t * d / 2), r.floats(t * d / 2));
    let mut y = vec![f32::NAN; bh * t * d];
    lib.encode("rope_f32")
        .value(0, bh as u64)
        .value(1, (t * d) as u64)
        .value(2, d as u64)
        .value(3, 0u64)
        .buffer(4, &x)
        .buffer(5, &cos)
        .buffer(6, &sin)
        .buffer_mut(7, &mut y)
        .dispatch_threads([(bh * t * d / 2) as u32, 1, 1], [100, 1, 1])
        .unwrap();
    let mut want = vec![0f64; x.len()];
    for b in 0..bh * t {
        for i in 0..d / 2 {
            let (p, q, cs) = (b * d + i, b * d + i + d / 2, b % t * (d / 2) + i);
            want[p] = f64::from(x[p]) * f64::from(cos[cs]) - f64::from(x[q]) * f64::from(sin[cs]);
            want[q] = f64::from(x[p]) * f64::from(sin[cs]) + f64::from(x[q]) * f64::from(cos[cs]);
        }
    }
    close(&y, &want, 1e-6, "rope_f32");
}

#[test]
fn sdpa_vector() {
    let Some(path) = candle("scaled_dot_product_attention.metal") else {
        return;
    };
    let lib = Builder::new(path)
        .kernels(&[
            "sdpa_vector_float16_t_128",
            "sdpa_vector_float_64",
            "sdpa_vector_bfloat16_t_64",
            "sdpa_vector_2pass_1_float_64",
            "sdpa_vector_2pass_2_float_64",
        ])
        .compile()
        .unwrap();
    for (heads, kv_heads, n) in [(4usize, 2usize, 37usize), (2, 2, 1), (3, 1, 300)] {
        for d in [64usize, 128] {
            let mut r = Rng((n * d) as u64);
            let half = |v: &[f32]| v.iter().map(|&f| f16(f)).collect::<Vec<_>>();
            // values that are exact in half, so that one reference serves both types
            let mut exact = |n: usize| r.halves(n).iter().map(|&h| f32_of(h)).collect::<Vec<f32>>();
            let (q, k, v) = (exact(heads * d), exact(kv_heads * n * d), exact(kv_heads * n * d));
            let mask: Vec<u8> = (0..heads * n).map(|i| u8::from(i % 7 != 3)).collect();
            let scale = 1.0 / (d as f32).sqrt();
            for masked in [false, true] {
                let mut want = Vec::new();
                for h in 0..heads {
                    let at = h / (heads / kv_heads) * n * d;
                    let dot = |j: usize| {
                        (0..d).map(|i| f64::from(q[h * d + i]) * f64::from(k[at + j * d + i])).sum::<f64>()
                            * f64::from(scale)
                    };
                    let w: Vec<f64> =
                        (0..n).map(|j| if masked && mask[h * n + j] == 0 { 0.0 } else { dot(j).exp() }).collect();
                    let total: f64 = w.iter().sum();
                    want.extend(
                        (0..d).map(|i| (0..n).map(|j| w[j] * f64::from(v[at + j * d + i])).sum::<f64>() / total),
                    );
                }
                macro_rules! common_args {
                    ($e:expr, $first:expr) => {
                        $e.constant_bool(20, masked)
                            .value($first, (heads / kv_heads) as i32)
                            .value($first + 1, n as i32)
                            .value($first + 2, (n * d) as u64)
                            .value($first + 3, (n * d) as u64)
                            .value($first + 4, scale)
                            .value($first + 5, 1f32)
                            .buffer($first + 6, &mask)
                            .value($first + 7, 1i32)
                            .value($first + 8, n as i32)
                    };
                }
                let what = format!("sdpa_vector heads={heads} n={n} d={d} masked={masked}");
                if d == 128 {
                    let (qh, kh, vh) = (half(&q), half(&k), half(&v));
                    let mut o = vec![0u16; heads * d];
                    common_args!(
                        lib.encode("sdpa_vector_float16_t_128")
                            .buffer(0, &qh)
                            .buffer(1, &kh)
                            .buffer(2, &vh)
                            .buffer_mut(3, &mut o),
                        4
                    )
                    .dispatch_in_all_orders([1, heads as u32, 1], [1024, 1, 1])
                    .unwrap();
                    close(&o.iter().map(|&h| f32_of(h)).collect::<Vec<_>>(), &want, 2e-3, &what);
                } else {
                    let mut o = vec![f32::NAN; heads * d];
                    common_args!(
                        lib.encode("sdpa_vector_float_64")
                            .buffer(0, &q)
                            .buffer(1, &k)
                            .buffer(2, &v)
                            .buffer_mut(3, &mut o),
                        4
                    )
                    .dispatch_in_all_orders([1, heads as u32, 1], [1024, 1, 1])
                    .unwrap();
                    close(&o, &want, 1e-5, &what);

                    let blocks = 32;
                    let (mut part, mut sums, mut maxs) = (
                        vec![f32::NAN; heads * blocks * d],
                        vec![f32::NAN; heads * blocks],
                        vec![f32::NAN; heads * blocks],
                    );
                    common_args!(
                        lib.encode("sdpa_vector_2pass_1_float_64")
                            .buffer(0, &q)
                            .buffer(1, &k)
                            .buffer(2, &v)
                            .buffer_mut(3, &mut part)
                            .buffer_mut(4, &mut sums)
                            .buffer_mut(5, &mut maxs),
                        6
                    )
                    .dispatch_threadgroups([1, heads as u32, blocks as u32], [8 * 32, 1, 1])
                    .unwrap();
                    let mut o = vec![f32::NAN; heads * d];
                    lib.encode("sdpa_vector_2pass_2_float_64")
                        .buffer(0, &part)
                        .buffer(1, &sums)
                        .buffer(2, &maxs)
                        .buffer_mut(3, &mut o)
                        .dispatch_threadgroups([1, heads as u32, 1], [1024, 1, 1])
                        .unwrap();
                    close(&o, &want, 1e-5, &format!("2-pass {what}"));
                }
            }
        }
    }
}
