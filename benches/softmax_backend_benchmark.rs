//! Softmax on an Apple GPU: metal-ext's kernel and candle's on the same rows.
//!
//! `cargo bench --features metal --bench softmax_backend_benchmark`

#[cfg(not(all(feature = "metal", target_os = "macos")))]
#[allow(dead_code)] // a part is used
#[path = "../examples/common/output.rs"]
mod output;

#[cfg(not(all(feature = "metal", target_os = "macos")))]
fn main() -> std::process::ExitCode {
    let skipped = "softmax_backend_benchmark: skipped, it measures Apple GPUs; run it on macOS with --features metal";
    output::exit(output::print_line(skipped).map_err(Into::into))
}

#[cfg(all(feature = "metal", target_os = "macos"))]
fn main() {
    gpu::benches();
}

#[cfg(all(feature = "metal", target_os = "macos"))]
mod gpu {
    use candle_core::{Device, Tensor};
    use candle_pipeline::backend::candle::metal_matrix::Kernels;
    use criterion::{Criterion, Throughput};
    use metal_ext::MetalExtOptions;

    /// Softmaxes between two waits, so that what is measured is not the waiting.
    const REPEATS: usize = 32;

    /// Rows by values: scores of a decode step and of prefill chunks.
    const SHAPES: [(usize, usize); 5] = [(32, 128), (32, 4096), (32 * 128, 128), (32 * 256, 1024), (32 * 256, 4096)];

    pub fn benches() {
        let device = Device::new_metal(0).expect("an Apple GPU");
        let kernels = Kernels::of(&device, MetalExtOptions::default()).expect("a Metal device");
        let mut criterion = Criterion::default().configure_from_args();
        for (rows, width) in SHAPES {
            let x = Tensor::randn(0f32, 1f32, (rows, width), &device).expect("memory");
            let mut group = criterion.benchmark_group(format!("softmax {rows}x{width}"));
            group.throughput(Throughput::Elements((rows * width * REPEATS) as u64));
            let mut row = |name: &str, softmax: &dyn Fn() -> Tensor| {
                group.bench_function(name, |bencher| {
                    bencher.iter(|| {
                        for _ in 0..REPEATS {
                            softmax();
                        }
                        device.synchronize().expect("the GPU");
                    });
                });
            };
            row("kernel", &|| kernels.softmax(&x).expect("a softmax"));
            row("candle", &|| candle_nn::ops::softmax_last_dim(&x).expect("a softmax"));
            group.finish();
        }
        criterion.final_summary();
    }
}
