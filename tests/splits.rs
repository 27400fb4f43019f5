//! Split equals unsplit: any cut of the layers gives the same logits and tokens to the last bit, alone and in a batch.

mod common;

use candle_pipeline::backend::{MicroBatch, SequenceId, SequenceSlice, StageOutput, Wanted};
use candle_pipeline::instrument::Watch;
use candle_pipeline::{
    DEMO_MODEL, DeviceSpec, ExecutorOptions, GenerationOptions, HeterogeneousPipeline, HeterogeneousPipelineExecutor,
    Isa, KvType, LinkOptions, PipelineOptions, Split,
};
use common::{bits, executor, executor_with, greedy};

/// Every way to write `layers` as a sum of positive numbers in order.
fn cuts(layers: usize) -> Vec<Vec<usize>> {
    (0..1usize << (layers - 1))
        .map(|pattern| {
            let mut counts = vec![1];
            for layer in 1..layers {
                match pattern >> (layer - 1) & 1 {
                    1 => counts.push(1),
                    _ => *counts.last_mut().unwrap() += 1,
                }
            }
            counts
        })
        .collect()
}

fn devices(name: &str, stages: usize) -> String {
    vec![name; stages].join(",")
}

/// Prompts around what changes paths: one token, few, many, and more than one prefill chunk.
fn prompts(vocab: usize) -> Vec<Vec<u32>> {
    let prompt = |len: usize, step: usize| (0..len).map(|i| (3 + i * step % (vocab - 3)) as u32).collect();
    vec![prompt(1, 1), prompt(7, 5), prompt(40, 11), prompt(300, 7)]
}

type Bits = Vec<(Vec<u32>, Vec<u32>)>;

async fn run(executor: &HeterogeneousPipelineExecutor, tokens: usize) -> Bits {
    let mut all = Vec::new();
    for prompt in prompts(executor.pipeline().config().vocab_size) {
        all.push(bits(&executor.infer_with(&prompt, &greedy(tokens)).await.unwrap()));
    }
    all
}

#[tokio::test]
async fn every_cut_of_the_demo_model_equals_the_uncut_one_to_the_last_bit() {
    let uncut = run(&executor(DEMO_MODEL, "cpu", None).await.unwrap(), 6).await;
    for counts in cuts(8) {
        let cut = executor(DEMO_MODEL, &devices("cpu", counts.len()), Some(&counts)).await.unwrap();
        assert_eq!(cut.stages().len(), counts.len());
        assert!(run(&cut, 6).await == uncut, "cut {counts:?} differs");
    }
}

#[tokio::test]
async fn quantised_models_and_counted_threads_are_no_exception() {
    for file in ["demo-q8_0.gguf", "demo-q4_0.gguf"] {
        let model = format!("{DEMO_MODEL}/{file}");
        let uncut = run(&executor(&model, "cpu", None).await.unwrap(), 12).await;
        for (names, counts) in
            [("cpu,cpu", &[1, 7][..]), ("cpu@threads=1,cpu@threads=1", &[5, 3]), ("cpu@threads=3", &[8])]
        {
            let cut = executor(&model, names, Some(counts)).await.unwrap();
            assert!(run(&cut, 12).await == uncut, "{file} on {names} cut {counts:?} differs");
        }
    }
}

/// Each message, reply and row of activations is encoded and decoded, so nothing else can have passed.
#[tokio::test]
async fn stages_that_exchange_only_bytes_give_the_same_bits() {
    let sampled = GenerationOptions { seed: Some(3), logprobs: Some(2), ..GenerationOptions::new(12, 0.9, 0.95) };
    for file in ["", "demo-q4_0.gguf"] {
        let model = format!("{DEMO_MODEL}/{file}");
        let uncut = executor(&model, "cpu", None).await.unwrap();
        let wanted = run(&uncut, 12).await;
        let wanted_sampled = uncut.infer_with(&[5, 6, 7], &sampled).await.unwrap();
        for (names, counts) in [("cpu", &[8][..]), ("cpu,cpu@threads=1", &[5, 3]), ("cpu,cpu,cpu", &[2, 5, 1])] {
            let link = LinkOptions { as_bytes: true, ..LinkOptions::default() };
            let split = Split::Layers(counts.to_vec());
            let options = PipelineOptions { split, link, kv_type: KvType::F32, ..PipelineOptions::default() };
            let devices = DeviceSpec::parse_list(names).unwrap();
            let pipeline = HeterogeneousPipeline::with_options(&devices, &model, options).unwrap();
            let cut = HeterogeneousPipelineExecutor::new(pipeline, &model).await.unwrap();
            assert!(run(&cut, 12).await == wanted, "{file} on {names} cut {counts:?} differs");
            let prompts = prompts(cut.pipeline().config().vocab_size);
            let together = cut.infer_batch_with(&prompts, &greedy(12)).await.unwrap();
            assert!(together.iter().map(bits).collect::<Bits>() == wanted, "{file} on {names}, all at once");
            let found = cut.infer_with(&[5, 6, 7], &sampled).await.unwrap();
            assert_eq!(
                (found.tokens, found.logprobs),
                (wanted_sampled.tokens.clone(), wanted_sampled.logprobs.clone())
            );
        }
    }
}

#[tokio::test]
async fn families_with_their_own_layers_can_be_cut_anywhere() {
    for family in ["gemma2", "gemma3", "phi3-longrope", "smollm3", "granite", "olmo2", "llama-dynamic-rope"] {
        let dir = common::fixture("families").join(family);
        let model = dir.to_str().unwrap();
        let uncut = executor(model, "cpu", None).await.unwrap();
        let layers = uncut.pipeline().config().num_hidden_layers;
        let prompt: Vec<u32> = (3..50).collect();
        let wanted = bits(&uncut.infer_with(&prompt, &greedy(20)).await.unwrap());
        for counts in cuts(layers) {
            let cut = executor(model, &devices("cpu", counts.len()), Some(&counts)).await.unwrap();
            let found = bits(&cut.infer_with(&prompt, &greedy(20)).await.unwrap());
            assert!(found == wanted, "{family} cut {counts:?} differs");
        }
    }
}

#[tokio::test]
async fn a_batch_gives_each_prompt_what_it_gives_alone() {
    for (names, counts) in [("cpu", &[8][..]), ("cpu,cpu,cpu", &[2, 5, 1])] {
        let executor = executor(DEMO_MODEL, names, Some(counts)).await.unwrap();
        let alone = run(&executor, 16).await;
        let prompts = prompts(executor.pipeline().config().vocab_size);
        let together = executor.infer_batch_with(&prompts, &greedy(16)).await.unwrap();
        assert!(together.iter().map(bits).collect::<Bits>() == alone, "on {names}");
        let tokens = executor.infer_batch(&prompts, 16, 0.0, 1.0).await.unwrap();
        assert_eq!(tokens.len(), prompts.len());
    }
}

#[test]
fn rows_of_several_sequences_in_one_micro_batch_are_those_of_each_alone() {
    let devices = DeviceSpec::parse_list("cpu").unwrap();
    let pipeline = HeterogeneousPipeline::new(&devices, DEMO_MODEL).unwrap();
    let mut backend = pipeline.stage_source(0).load(&|_| {}).unwrap();
    let slice = |id: u64, position: usize, len: usize| SequenceSlice {
        id: SequenceId(id),
        position,
        len,
        length: position + len,
        decode: position > 0,
        wanted: Wanted::Logits { rows: 1 },
    };
    for id in 0..4 {
        backend.open(SequenceId(id), 64).unwrap();
    }
    let mut run = |slices: &[SequenceSlice], tokens: &[u32]| {
        let batch = MicroBatch { slices: slices.to_vec(), tokens: tokens.to_vec() };
        match backend.forward(&batch, None, &mut Watch::off()).unwrap() {
            StageOutput::Logits(logits) => logits,
            other => panic!("{other:?}"),
        }
    };
    let (a, b) = ([5u32, 9, 11], [20u32, 21, 22, 23, 24]);
    let alone = [run(&[slice(0, 0, 3)], &a), run(&[slice(1, 0, 5)], &b)].concat();
    let together = run(&[slice(2, 0, 3), slice(3, 0, 5)], &[&a[..], &b[..]].concat());
    assert!(alone == together, "prefill");
    let alone = [run(&[slice(0, 3, 1)], &[7]), run(&[slice(1, 5, 1)], &[8])].concat();
    let together = run(&[slice(2, 3, 1), slice(3, 5, 1)], &[7, 8]);
    assert!(alone == together, "decode");
}

#[tokio::test]
async fn chunks_threads_instructions_and_reused_prefixes_change_no_bit() {
    for file in ["", "demo-q8_0.gguf", "demo-q4_0.gguf"] {
        let model = format!("{DEMO_MODEL}/{file}");
        let wanted = run(&executor(&model, "cpu", None).await.unwrap(), 8).await;
        for prefill_chunk in [1, 7, 64, 1000] {
            let options = ExecutorOptions { prefill_chunk, ..ExecutorOptions::default() };
            let chunked = executor_with(&model, "cpu,cpu", None, options).await.unwrap();
            assert!(run(&chunked, 8).await == wanted, "{file} in chunks of {prefill_chunk}");
            // The second time all but the last token's KV is another sequence's.
            assert!(run(&chunked, 8).await == wanted, "{file} in chunks of {prefill_chunk}, again");
            assert!(chunked.prefix_stats().hits > 0);
        }
        for isa in Isa::available() {
            for kv_type in KvType::ALL {
                let options = PipelineOptions { isa: Some(isa), kv_type, ..PipelineOptions::default() };
                let devices = DeviceSpec::parse_list("cpu@threads=1,cpu@threads=3").unwrap();
                let pipeline = HeterogeneousPipeline::with_options(&devices, &model, options).unwrap();
                let executor = HeterogeneousPipelineExecutor::new(pipeline, &model).await.unwrap();
                let short: Vec<u32> = (3..40).collect();
                let found = bits(&executor.infer_with(&short, &greedy(8)).await.unwrap());
                // The safetensors are F16, which AMX adds up in an order of its own.
                let order = if file.is_empty() && isa.name() == "amx" { isa } else { Isa::SCALAR };
                let options = PipelineOptions { isa: Some(order), kv_type, ..PipelineOptions::default() };
                let pipeline = HeterogeneousPipeline::with_options(&devices[..1], &model, options).unwrap();
                let reference = HeterogeneousPipelineExecutor::new(pipeline, &model).await.unwrap();
                let wanted = bits(&reference.infer_with(&short, &greedy(8)).await.unwrap());
                assert!(found == wanted, "{file} with {isa} and {kv_type}");
            }
        }
    }
}

/// The demo model in the types whose products some instruction sets have an order of their own for.
#[tokio::test]
async fn halves_of_f32_have_the_same_bits_in_chunks_batches_and_cuts() {
    for dtype in [candle_core::DType::BF16, candle_core::DType::F16] {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(DEMO_MODEL).unwrap().map(Result::unwrap) {
            let (from, to) = (entry.path(), folder.path().join(entry.file_name()));
            match from.extension().and_then(|extension| extension.to_str()) {
                Some("safetensors") => {
                    let tensors = candle_core::safetensors::load(&from, &candle_core::Device::Cpu).unwrap();
                    let rounded = tensors.into_iter().map(|(name, t)| (name, t.to_dtype(dtype).unwrap()));
                    candle_core::safetensors::save(&rounded.collect(), to).unwrap();
                }
                Some("json") => _ = std::fs::copy(from, to).unwrap(),
                _ => {}
            }
        }
        let model = folder.path().to_str().unwrap();
        let wanted = run(&executor(model, "cpu", None).await.unwrap(), 8).await;
        for (devices, prefill_chunk) in
            [("cpu", 1), ("cpu,cpu", 7), ("cpu@threads=1,cpu@threads=2", 64), ("cpu,cpu,cpu", 50)]
        {
            let options = ExecutorOptions { prefill_chunk, ..ExecutorOptions::default() };
            let cut = executor_with(model, devices, None, options).await.unwrap();
            assert!(run(&cut, 8).await == wanted, "{dtype:?} on {devices} in chunks of {prefill_chunk}");
            let prompts = prompts(cut.pipeline().config().vocab_size);
            let together = cut.infer_batch_with(&prompts, &greedy(8)).await.unwrap();
            let together: Bits = together.iter().map(bits).collect();
            assert!(together == wanted, "{dtype:?} on {devices}, all at once");
        }
    }
}

/// Where there is AMX prompts are computed in another way than decode steps; elsewhere the option changes nothing.
#[tokio::test]
async fn prompts_in_bf16_have_the_same_bits_in_chunks_batches_and_cuts() {
    // The folder's own weights are F16.
    for file in ["", "demo-q8_0.gguf", "demo-q4_0.gguf"] {
        let model = format!("{DEMO_MODEL}/{file}");
        let executor = async |devices: &str, bf16_prompts, prefill_chunk| {
            let options = PipelineOptions { bf16_prompts, ..PipelineOptions::default() };
            let devices = DeviceSpec::parse_list(devices).unwrap();
            let pipeline = HeterogeneousPipeline::with_options(&devices, &model, options).unwrap();
            let options = ExecutorOptions { prefill_chunk, ..ExecutorOptions::default() };
            HeterogeneousPipelineExecutor::with_options(pipeline, &model, options).await.unwrap()
        };
        let stored = run(&executor("cpu", false, 512).await, 8).await;
        let wanted = run(&executor("cpu", true, 512).await, 8).await;
        assert_eq!(wanted != stored, Isa::detect().name() == "amx", "{file}");
        for (devices, prefill_chunk) in
            [("cpu", 1), ("cpu,cpu", 7), ("cpu@threads=1,cpu@threads=2", 64), ("cpu,cpu,cpu", 50)]
        {
            let cut = executor(devices, true, prefill_chunk).await;
            assert!(run(&cut, 8).await == wanted, "{file} on {devices} in chunks of {prefill_chunk}");
            assert!(run(&cut, 8).await == wanted, "{file} on {devices} in chunks of {prefill_chunk}, again");
            assert!(cut.prefix_stats().hits > 0);
            let prompts = prompts(cut.pipeline().config().vocab_size);
            let options = GenerationOptions { reuse_prefix: false, ..greedy(8) };
            let together = cut.infer_batch_with(&prompts, &options).await.unwrap();
            let together: Bits = together.iter().map(bits).collect();
            assert!(together == wanted, "{file} on {devices}, all at once");
        }
    }
}

#[test]
fn stages_on_one_device_share_its_rotary_tables() {
    let devices = DeviceSpec::parse_list("cpu,cpu@threads=1,cpu").unwrap();
    let pipeline = HeterogeneousPipeline::new(&devices, DEMO_MODEL).unwrap();
    let ropes = pipeline.ropes();
    assert!(std::sync::Arc::ptr_eq(&ropes[0], &ropes[1]) && std::sync::Arc::ptr_eq(&ropes[0], &ropes[2]));
}

#[tokio::test]
async fn a_seed_gives_the_same_tokens_on_any_cut() {
    let options = GenerationOptions {
        seed: Some(11),
        top_k: Some(40),
        ignore_eos: true,
        ..GenerationOptions::new(40, 0.9, 0.95)
    };
    let uncut = executor(DEMO_MODEL, "cpu", None).await.unwrap();
    let wanted = uncut.infer_with(&[5, 6, 7], &options).await.unwrap().tokens;
    for counts in [&[4, 4][..], &[1, 1, 6], &[3, 2, 2, 1]] {
        let cut = executor(DEMO_MODEL, &devices("cpu", counts.len()), Some(counts)).await.unwrap();
        assert_eq!(cut.infer_with(&[5, 6, 7], &options).await.unwrap().tokens, wanted, "{counts:?}");
    }
    let other = GenerationOptions { seed: Some(12), ..options };
    assert_ne!(uncut.infer_with(&[5, 6, 7], &other).await.unwrap().tokens, wanted);
}

/// Runs by itself where there is a GPU.
#[tokio::test]
async fn gpus_equal_themselves_at_every_cut_and_the_cpu_nearly() {
    let gpus: Vec<_> = candle_pipeline::present_devices().into_iter().filter(|d| d.kind() != "cpu").collect();
    if gpus.is_empty() {
        println!("skipped: no GPU here, or built without the feature `cuda` or `metal`");
        return;
    }
    let on_cpu = executor(DEMO_MODEL, "cpu", None).await.unwrap().infer(&[5, 6, 7], 40, 0.0, 1.0).await.unwrap();
    for gpu in gpus {
        let name = gpu.to_string();
        let uncut = run(&executor(DEMO_MODEL, &name, None).await.unwrap(), 12).await;
        for counts in [&[4, 4][..], &[1, 7], &[7, 1], &[3, 2, 3]] {
            let cut = executor(DEMO_MODEL, &devices(&name, counts.len()), Some(counts)).await.unwrap();
            assert!(run(&cut, 12).await == uncut, "{name} cut {counts:?} differs");
        }
        for names in [format!("{name},cpu"), format!("cpu,{name}")] {
            let mixed = executor(DEMO_MODEL, &names, Some(&[4, 4])).await.unwrap();
            let found = mixed.infer(&[5, 6, 7], 40, 0.0, 1.0).await.unwrap();
            let same = found.iter().zip(&on_cpu).take_while(|(a, b)| a == b).count();
            assert!(same >= 10, "{names}: only {same} tokens as on the CPU");
        }
    }
}
