//! How fast this machine's memory can be read, which is what a decode step on a CPU can be held against.

use std::hint::black_box;
use std::time::Instant;

use candle_pipeline::DeviceSpec;
use candle_pipeline::device::free_memory;

/// Far above processors' caches.
const BYTES: u64 = 512 << 20;
const PASSES: usize = 5;

/// Bytes a second that `threads` threads read together, each a part of its own of one large buffer: the median of some
/// passes.
pub fn read_bandwidth(threads: usize) -> f64 {
    let bytes = BYTES.min(free_memory(DeviceSpec::CPU).unwrap_or(BYTES) / 4);
    let words = bytes as usize / size_of::<u64>() / threads;
    let mut parts: Vec<Vec<u64>> = vec![Vec::new(); threads];
    // Each thread fills what it will read, so that the pages are there and near to it.
    std::thread::scope(|scope| {
        for part in &mut parts {
            scope.spawn(move || part.resize(words, 1));
        }
    });
    let pass = || {
        let began = Instant::now();
        std::thread::scope(|scope| {
            for part in &parts {
                scope.spawn(move || black_box(sum(part)));
            }
        });
        (words * threads * size_of::<u64>()) as f64 / began.elapsed().as_secs_f64()
    };
    let mut rates: Vec<f64> = (0..PASSES).map(|_| pass()).collect();
    rates.sort_by(f64::total_cmp);
    rates[PASSES / 2]
}

/// Sums side by side, so that the compiler can use vectors and no addition waits for another.
fn sum(words: &[u64]) -> u64 {
    let (blocks, rest) = words.as_chunks::<32>();
    let mut sums = [0u64; 32];
    for block in blocks {
        for (sum, word) in sums.iter_mut().zip(block) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().chain(rest).fold(0, |all, word| all.wrapping_add(*word))
}
