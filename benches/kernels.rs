//! The CPU kernels on all cores: `cargo bench --bench kernels`, with a filter such as `-- matmul/Q4_K`.
//!
//! Criterion reports bytes/s where weights or KV stream from memory and multiply-adds/s where there are many inputs. A
//! table at the end sets them against what a plain read and plain multiply-adds reach in the same run.

#[allow(dead_code)] // a part is used
#[path = "../examples/common/output.rs"]
mod output;

use std::cell::RefCell;
use std::time::{Duration, Instant};

use candle_pipeline::internals::{
    AttentionRows, AttentionShape, Input, LayerKv, Matrix, Pool, Product, Strided, attend, multiply,
};
use candle_pipeline::weights::WeightType;
use candle_pipeline::{Isa, KvType};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// A projection of TinyLlama's MLP.
const N: usize = 5632;
const K: usize = 2048;

/// Enough copies of a matrix that none is in a cache when its turn comes.
const STREAMED_BYTES: usize = 512 << 20;

/// What a case did in the best of its samples, in units a second.
struct Best {
    name: String,
    rate: f64,
    unit: &'static str,
}

thread_local! {
    static BEST: RefCell<Vec<Best>> = const { RefCell::new(Vec::new()) };
}

/// Notes the rate of a sample if it is the case's best.
fn note(name: &str, unit: &'static str, units: f64, time: Duration) {
    let rate = units / time.as_secs_f64();
    BEST.with_borrow_mut(|best| match best.iter_mut().find(|best| best.name == name) {
        Some(known) => known.rate = known.rate.max(rate),
        None => best.push(Best { name: name.to_string(), rate, unit }),
    });
}

fn pool() -> Pool {
    Pool::new(std::thread::available_parallelism().map_or(1, |n| n.get())).expect("threads")
}

/// Reads a buffer far larger than the caches, each thread its share.
fn read(c: &mut Criterion) {
    let pool = pool();
    let words = vec![1u64; STREAMED_BYTES / 8];
    let share = words.len().div_ceil(pool.threads());
    let mut group = c.benchmark_group("read");
    group.throughput(Throughput::Bytes(STREAMED_BYTES as u64)).sample_size(10);
    group.bench_function("plain", |b| {
        b.iter_custom(|rounds| {
            let began = Instant::now();
            for _ in 0..rounds {
                pool.run(&|thread| {
                    let mut sums = [0u64; 32];
                    let own = words.chunks(share).nth(thread).unwrap_or(&[]);
                    for line in own.as_chunks::<32>().0 {
                        sums.iter_mut().zip(line).for_each(|(sum, word)| *sum ^= word);
                    }
                    std::hint::black_box(sums);
                });
            }
            let time = began.elapsed();
            note("read/plain", "B", (STREAMED_BYTES as u64 * rounds) as f64, time);
            time
        });
    });
    group.finish();
}

fn matmul(c: &mut Criterion) {
    let (pool, isa) = (pool(), Isa::detect());
    for dtype in WeightType::ALL {
        let bytes = dtype.bytes_for(N * K).expect("whole blocks");
        // Any bytes are weights; small ones are finite scales.
        let stored: Vec<u8> = (0..bytes).map(|i| ((i as u32).wrapping_mul(2654435761) >> 13) as u8 & 0x3f).collect();
        let copies = STREAMED_BYTES.div_ceil(bytes);
        let matrices: Vec<Matrix> =
            (0..copies).map(|_| Matrix::pack(&pool, dtype, &stored, N, K).expect("a matrix")).collect();
        let mut group = c.benchmark_group(format!("matmul/{dtype}"));
        group.sample_size(10);
        for m in [1, 4, 16, 128, 512] {
            let mut input = Input::default();
            // So many are of prompts, which may ask for it.
            let bf16_rows = if m > 16 { m } else { 0 };
            for (i, value) in input.reset(m, bf16_rows, K).iter_mut().enumerate() {
                *value = ((i * 31 + 7) % 257) as f32 / 128.5 - 1.0;
            }
            input.prepare(&pool, isa, std::iter::once(dtype));
            let mut out = vec![0f32; m * N];
            let streams = m <= 4;
            group.throughput(match streams {
                true => Throughput::Bytes(bytes as u64),
                false => Throughput::Elements((N * K * m) as u64),
            });
            group.bench_function(BenchmarkId::from_parameter(m), |b| {
                let mut next = 0;
                b.iter_custom(|rounds| {
                    let began = Instant::now();
                    for _ in 0..rounds {
                        let products = &mut [Product { matrix: &matrices[next % copies], out: &mut out }];
                        multiply(&pool, isa, &input, products);
                        next += 1;
                    }
                    let time = began.elapsed();
                    let (unit, units) = if streams { ("B", bytes) } else { ("MAC", N * K * m) };
                    note(&format!("matmul/{dtype}/{m}"), unit, (units as u64 * rounds) as f64, time);
                    time
                });
            });
        }
        group.finish();
    }
}

/// One token at 2,000 positions, TinyLlama's heads, over as many layers as its KV has to come from memory.
fn attention(c: &mut Criterion) {
    const POSITIONS: usize = 2000;
    let (pool, isa) = (pool(), Isa::detect());
    let shape = AttentionShape { heads: 32, kv_heads: 4, head_dim: 64, scale: 0.125, softcap: None };
    let row = shape.kv_heads * shape.head_dim;
    for kv_type in [KvType::F32, KvType::F16, KvType::Q8_0] {
        let bytes = LayerKv::bytes_for(kv_type, shape.kv_heads, shape.head_dim, POSITIONS);
        let values: Vec<f32> = (0..POSITIONS * row).map(|i| ((i * 37 + 5) % 211) as f32 / 105.5 - 1.0).collect();
        let copies = (STREAMED_BYTES as u64 / 2).div_ceil(bytes) as usize;
        let layers: Vec<LayerKv> = (0..copies)
            .map(|_| {
                let mut layer = LayerKv::new(kv_type, shape.kv_heads, shape.head_dim, POSITIONS);
                let values = Strided { values: &values, stride: row };
                layer.append(isa, 0, POSITIONS, values, values);
                layer
            })
            .collect();
        let q: Vec<f32> = values[..shape.heads * shape.head_dim].to_vec();
        let mut out = vec![0f32; q.len()];
        let mut group = c.benchmark_group("attention");
        group.sample_size(10).throughput(Throughput::Bytes(bytes));
        group.bench_function(BenchmarkId::new("decode", kv_type), |b| {
            let mut next = 0;
            b.iter_custom(|rounds| {
                let began = Instant::now();
                for _ in 0..rounds {
                    let (kv, position) = (&layers[next % copies], POSITIONS - 1);
                    let q = Strided { values: &q, stride: q.len() };
                    let rows = AttentionRows { kv, q, position, len: 1, window: None, out: &mut out };
                    attend(&pool, isa, &shape, &mut [rows]);
                    next += 1;
                }
                let time = began.elapsed();
                note(&format!("attention/decode/{kv_type}"), "B", (bytes * rounds) as f64, time);
                time
            });
        });
        group.finish();
    }
}

/// Every case's best rate, and its share of the plain read's.
fn table(_: &mut Criterion) {
    BEST.with_borrow(|best| {
        let read = best.iter().find(|best| best.name == "read/plain").map(|best| best.rate);
        // A reader who has gone does not need the rest.
        let line = |line: std::fmt::Arguments<'_>| drop(output::print_line(line));
        let isa = Isa::detect();
        line(format_args!("\n{:<24} {:>12} {:>12}   ({isa} instructions)", "case", "best", "of plain read"));
        for Best { name, rate, unit } in best {
            let share = match read {
                Some(read) if *unit == "B" => format!("{:.0} %", 100.0 * rate / read),
                _ => "-".to_string(),
            };
            line(format_args!("{name:<24} {:>10.1} G{unit}/s {share:>10}", rate / 1e9));
        }
    });
}

criterion_group!(benches, read, matmul, attention, table);
criterion_main!(benches);
