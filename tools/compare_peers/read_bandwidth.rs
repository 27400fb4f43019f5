//! How fast memory can be read, as `device::read_bandwidth` measures it: threads that each sum a part of a large buffer.
//! No program that reads all its weights for each token can decode faster than this rate over the bytes of those weights.
//!
//! ```text
//! cargo run --release --example read_bandwidth -- --threads 2 --model /tmp/tinyllama.gguf
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::quantized::gguf_file::Content;
use candle_pipeline::device::cpu_read_rates;
use candle_pipeline::kernels::pool::Pool;
use clap::Parser;

#[derive(Parser)]
struct Arguments {
    /// Threads that read.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Size of the buffer; must be far above that of the caches.
    #[arg(long, default_value_t = 1024)]
    mebibytes: usize,
    /// Times that the buffer is read.
    #[arg(long, default_value_t = 5)]
    passes: usize,
    /// GGUF files: the bytes that a decode step must read of each are printed too.
    #[arg(long)]
    model: Vec<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let Arguments { threads, mebibytes, passes, .. } = arguments;
    ensure!(threads > 0 && mebibytes > 0 && passes > 0, "--threads, --mebibytes and --passes must be at least 1");
    let bytes = mebibytes << 20;
    let pool = Pool::new(threads).with_context(|| format!("{threads} threads cannot be started"))?;
    let mut rates: Vec<f64> = cpu_read_rates(&pool, bytes, passes).into_iter().map(|rate| rate / 1e9).collect();
    rates.sort_by(f64::total_cmp);
    let (median, best) = (rates[passes / 2], rates[passes - 1]);

    let weights: Vec<u64> = arguments.model.iter().map(|path| bytes_per_token(path)).collect::<Result<_>>()?;
    if arguments.json {
        let models = arguments.model.iter().zip(&weights);
        let models: serde_json::Map<_, _> =
            models.map(|(path, &bytes)| (path.display().to_string(), bytes.into())).collect();
        let output = serde_json::json!({
            "threads": threads,
            "bytes": bytes,
            "median_gb_per_second": median,
            "best_gb_per_second": best,
            "bytes_per_token": models,
        });
        println!("{output}");
        return Ok(());
    }
    println!("{threads} threads read {median:.1} GB/s (median of {passes} passes, best {best:.1})");
    for (path, bytes) in arguments.model.iter().zip(weights) {
        let bound = median * 1e9 / bytes as f64;
        println!("{}: {:.0} MB a token, at most {bound:.1} tokens/s", path.display(), bytes as f64 / 1e6);
    }
    Ok(())
}

/// Bytes of all tensors but the embeddings, of which a step reads one row; unless they are the head too.
fn bytes_per_token(path: &Path) -> Result<u64> {
    let read = || -> Result<Content> { Ok(Content::read(&mut std::io::BufReader::new(std::fs::File::open(path)?))?) };
    let content = read().with_context(|| path.display().to_string())?;
    let tied = !content.tensor_infos.contains_key("output.weight");
    let tensors = content.tensor_infos.iter().filter(|(name, _)| tied || *name != "token_embd.weight");
    let bytes = tensors.map(|(_, tensor)| {
        let blocks = tensor.shape.elem_count() / tensor.ggml_dtype.block_size();
        (blocks * tensor.ggml_dtype.type_size()) as u64
    });
    Ok(bytes.sum())
}
