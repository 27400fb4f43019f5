//! How fast memory can be read, as `device::read_bandwidth` measures it: threads that each sum a part of a large buffer.
//! No program that reads all its weights for each token can decode faster than this rate over the bytes of those weights.
//! And how fast AMX multiplies, where there is AMX: no program that uses it can be faster with prompts than this rate over
//! the weights that each token is multiplied with.
//!
//! ```text
//! cargo run --release --example read_bandwidth -- --threads 2 --model /tmp/tinyllama.gguf
//! ```

#[allow(dead_code)] // this example uses a part
#[path = "../../examples/common/output.rs"]
mod output;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use candle_core::quantized::gguf_file::Content;
use candle_pipeline::device::{available_threads, cpu_read_rates};
use candle_pipeline::internals::{Pool, tile_rate};
use clap::Parser;
use output::{note_line, print_line};

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
    /// GGUF files: the bytes that a decode step must read of each, and the weights that a prompt's token is multiplied with,
    /// are printed too.
    #[arg(long)]
    model: Vec<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    output::exit(run())
}

fn run() -> Result<()> {
    let arguments = Arguments::parse();
    let Arguments { threads, mebibytes, passes, .. } = arguments;
    ensure!(threads > 0 && mebibytes > 0 && passes > 0, "--threads, --mebibytes and --passes must be at least 1");
    let cores = available_threads();
    if threads > cores {
        note_line(format_args!("warning: --threads {threads}: this process may use {cores} cores"));
    }
    let bytes = mebibytes << 20;
    let pool = Pool::new(threads).with_context(|| format!("{threads} threads cannot be started"))?;
    let mut rates: Vec<f64> = cpu_read_rates(&pool, bytes, passes).into_iter().map(|rate| rate / 1e9).collect();
    rates.sort_by(f64::total_cmp);
    let (median, best) = (rates[passes / 2], rates[passes - 1]);

    let tiles = tile_rate(&pool).map(|rate| rate / 1e9);

    let work: Vec<Work> = arguments.model.iter().map(|path| work_per_token(path)).collect::<Result<_>>()?;
    if arguments.json {
        let of_models = |of: &dyn Fn(&Work) -> u64| -> serde_json::Map<_, _> {
            let models = arguments.model.iter().zip(&work);
            models.map(|(path, work)| (path.display().to_string(), of(work).into())).collect()
        };
        let output = serde_json::json!({
            "threads": threads,
            "bytes": bytes,
            "median_gb_per_second": median,
            "best_gb_per_second": best,
            "median_tile_g_multiplications_per_second": tiles,
            "bytes_per_token": of_models(&|work| work.bytes),
            "multiplications_per_prompt_token": of_models(&|work| work.multiplications),
        });
        return Ok(print_line(output)?);
    }
    print_line(format_args!("{threads} threads read {median:.1} GB/s (median of {passes} passes, best {best:.1})"))?;
    if let Some(tiles) = tiles {
        print_line(format_args!("their AMX tiles do {tiles:.0} G multiplications of BF16 a second"))?;
    }
    for (path, Work { bytes, multiplications }) in arguments.model.iter().zip(work) {
        let bound = median * 1e9 / bytes as f64;
        let mut line = format!("{}: {:.0} MB a token, at most {bound:.1} tokens/s", path.display(), bytes as f64 / 1e6);
        if let Some(bound) = tiles.map(|tiles| tiles * 1e9 / multiplications as f64) {
            line += &format!("; with AMX {bound:.0} of a prompt");
        }
        print_line(line)?;
    }
    Ok(())
}

/// What a token takes.
struct Work {
    /// Of all tensors but the embeddings, of which a step reads one row; unless they are the head too.
    bytes: u64,
    /// Weights of the layers' matrices. Of a prompt only the last token goes through the head.
    multiplications: u64,
}

fn work_per_token(path: &Path) -> Result<Work> {
    let read = || -> Result<Content> { Ok(Content::read(&mut std::io::BufReader::new(std::fs::File::open(path)?))?) };
    let content = read().with_context(|| path.display().to_string())?;
    let tied = !content.tensor_infos.contains_key("output.weight");
    let tensors = content.tensor_infos.iter().filter(|(name, _)| tied || *name != "token_embd.weight");
    let bytes = tensors.map(|(_, tensor)| {
        let blocks = tensor.shape.elem_count() / tensor.ggml_dtype.block_size();
        (blocks * tensor.ggml_dtype.type_size()) as u64
    });
    let matrices =
        content.tensor_infos.iter().filter(|(name, tensor)| name.starts_with("blk.") && tensor.shape.rank() == 2);
    let multiplications = matrices.map(|(_, tensor)| tensor.shape.elem_count() as u64).sum();
    Ok(Work { bytes: bytes.sum(), multiplications })
}
