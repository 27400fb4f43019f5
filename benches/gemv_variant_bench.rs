//! Matrix-vector products on an Apple GPU: weight formats by shapes by columns per threadgroup. Throughput is bytes of
//! weights, to compare with the chip's bandwidth.
//!
//! `cargo bench --features metal --bench gemv_variant_bench -- --warm-up-time 1 --measurement-time 3`

#[cfg(not(all(feature = "metal", target_os = "macos")))]
#[allow(dead_code)] // a part is used
#[path = "../examples/common/output.rs"]
mod output;

#[cfg(not(all(feature = "metal", target_os = "macos")))]
fn main() -> std::process::ExitCode {
    let skipped = "gemv_variant_bench: skipped, it measures Apple GPUs; run it on macOS with --features metal";
    output::exit(output::print_line(skipped).map_err(Into::into))
}

#[cfg(all(feature = "metal", target_os = "macos"))]
fn main() {
    gpu::benches();
}

#[cfg(all(feature = "metal", target_os = "macos"))]
mod gpu {
    use candle_core::{DType, Device, Tensor};
    use candle_pipeline::backend::candle::metal_matrix::Kernels;
    use candle_pipeline::weights::WeightType;
    use criterion::{Criterion, Throughput};
    use metal_ext::{ColumnsPerThreadgroup, MetalExtOptions};

    /// Products between two waits, so that what is measured is not the waiting.
    const REPEATS: usize = 32;

    /// n by k: projections of small and large models, and a head.
    const SHAPES: [(usize, usize); 4] = [(2048, 2048), (5632, 2048), (4096, 14336), (32000, 2048)];

    const TYPES: [WeightType; 6] =
        [WeightType::F16, WeightType::BF16, WeightType::Q8_0, WeightType::Q4_0, WeightType::Q4_K, WeightType::Q6_K];

    pub fn benches() {
        let device = Device::new_metal(0).expect("an Apple GPU");
        let mut criterion = Criterion::default().configure_from_args();
        for (n, k) in SHAPES {
            let x = Tensor::ones((1, k), DType::F32, &device).expect("memory");
            for dtype in TYPES {
                // Bytes of ones are small numbers in every format.
                let bytes = vec![1u8; dtype.bytes_for(n * k).expect("whole blocks")];
                let mut group = criterion.benchmark_group(format!("{n}x{k} {dtype}"));
                group.throughput(Throughput::Bytes((bytes.len() * REPEATS) as u64));
                for columns_per_threadgroup in ColumnsPerThreadgroup::ALL {
                    let options = MetalExtOptions { columns_per_threadgroup, ..MetalExtOptions::default() };
                    let kernels = Kernels::of(&device, options).expect("a Metal device");
                    let matrix = kernels.pack(dtype, &bytes, n, k).expect("memory").expect("a packed format");
                    group.bench_function(format!("{columns_per_threadgroup:?}"), |bencher| {
                        bencher.iter(|| {
                            for _ in 0..REPEATS {
                                matrix.forward(&x).expect("a product");
                            }
                            device.synchronize().expect("the GPU");
                        });
                    });
                }
                group.finish();
            }
        }
        criterion.final_summary();
    }
}
