//! A tracer on real forward passes: it changes no bit, sees the same whatever the cut, tells requests apart, and names
//! the layer and the place where something is wrong.

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use candle_pipeline::instrument::queue::QueueOptions;
use candle_pipeline::instrument::tracer::activation::{AnomalyKind, Place};
use candle_pipeline::instrument::tracer::attention::AttentionTraceConfig;
use candle_pipeline::instrument::tracer::logit::LogitTrace;
use candle_pipeline::instrument::tracer::{ForwardTrace, ModelTracerConfig, RunningTracer, TracerSnapshot, trace};
use candle_pipeline::instrument::{Probe, StepSlice};
use candle_pipeline::{
    DEMO_MODEL, ExecutorOptions, Generation, GenerationOptions, HeterogeneousPipelineExecutor, Result,
};
use common::{bits, executor_with, greedy, wait_until};

/// A prompt of its own for each `which`.
fn prompt(which: usize, length: usize) -> Vec<u32> {
    (0..length).map(|i| (2 + (which * 97 + i * (13 + which)) % 700) as u32).collect()
}

async fn traced(
    model: &str,
    devices: &str,
    cut: Option<&[usize]>,
    config: ModelTracerConfig,
    options: ExecutorOptions,
) -> (HeterogeneousPipelineExecutor, RunningTracer) {
    let (queue, tracer) = trace(config, QueueOptions::default()).unwrap();
    let options = ExecutorOptions { probe: Probe::new(queue), ..options };
    (executor_with(model, devices, cut, options).await.unwrap(), tracer)
}

fn chunks_of(prefill_chunk: usize) -> ExecutorOptions {
    ExecutorOptions { prefill_chunk, ..ExecutorOptions::default() }
}

fn alone(max_tokens: usize) -> GenerationOptions {
    GenerationOptions { reuse_prefix: false, ..greedy(max_tokens) }
}

async fn batch(executor: &HeterogeneousPipelineExecutor, prompts: &[Vec<u32>]) -> Vec<Generation> {
    executor.infer_batch_with(prompts, &alone(8)).await.unwrap().into_iter().collect()
}

#[tokio::test]
async fn tracing_changes_no_bit() {
    let prompts = [prompt(0, 50), prompt(1, 7), prompt(2, 33)];
    let plain = executor_with(DEMO_MODEL, "cpu", None, ExecutorOptions::default()).await.unwrap();
    let expected: Vec<_> = batch(&plain, &prompts).await.iter().map(bits).collect();
    drop(plain);
    let presets = [ModelTracerConfig::full(), ModelTracerConfig::lightweight(), ModelTracerConfig::default()];
    for config in presets {
        for (devices, cut) in [("cpu", vec![8]), ("cpu,cpu", vec![3, 5])] {
            for chunk in [256, 16] {
                let (executor, tracer) =
                    traced(DEMO_MODEL, devices, Some(&cut), config.clone(), chunks_of(chunk)).await;
                let together: Vec<_> = batch(&executor, &prompts).await.iter().map(bits).collect();
                assert!(together == expected, "{devices} {chunk}");
                let single = executor.infer_with(&prompts[0], &alone(8)).await.unwrap();
                assert!(bits(&single) == expected[0], "{devices} {chunk}");
                drop(executor);
                let snapshot = tracer.close();
                let summary = snapshot.summary;
                assert_eq!(summary.total_forwards > 0, config.is_enabled());
                assert_eq!(summary.logit_traces, if config.logits { 4 * 8 } else { 0 });
                assert_eq!(summary.attention_traces, if config.attention.is_some() { 4 * 8 * 8 * 8 } else { 0 });
                assert_eq!(summary.kv_steps, summary.total_forwards);
                assert_eq!((summary.anomalies_detected, snapshot.dropped_events, snapshot.refused_traces), (0, 0, 0));
                assert!(snapshot.forwards.iter().all(|forward| forward.complete));
            }
        }
    }
}

#[tokio::test]
async fn a_split_shows_what_one_stage_shows() {
    let mut seen: Vec<Vec<Arc<ForwardTrace>>> = Vec::new();
    for (devices, cut) in [("cpu", vec![8]), ("cpu,cpu", vec![3, 5]), ("cpu,cpu,cpu", vec![1, 6, 1])] {
        let (executor, tracer) =
            traced(DEMO_MODEL, devices, Some(&cut), ModelTracerConfig::full(), chunks_of(16)).await;
        executor.infer_with(&prompt(3, 40), &alone(6)).await.unwrap();
        drop(executor);
        let forwards = tracer.close().forwards;
        assert_eq!(forwards.len(), 3 + 5, "three chunks and five decode steps");
        for forward in &forwards {
            assert_eq!(forward.layers.iter().map(|layer| layer.layer).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
            for pair in forward.layers.windows(2) {
                assert_eq!(pair[0].output, pair[1].input, "what one layer puts out the next takes in");
            }
        }
        seen.push(forwards);
    }
    assert!(seen[0] == seen[1] && seen[0] == seen[2]);
    let rows: Vec<usize> = seen[0].iter().map(|forward| forward.slices.iter().map(|slice| slice.rows).sum()).collect();
    assert_eq!(rows, [16, 16, 8, 1, 1, 1, 1, 1]);
    let told: Vec<_> = seen[0].iter().map(|forward| (forward.logits.len(), forward.attention.len())).collect();
    assert_eq!(told, [(0, 0), (0, 0), (1, 64), (1, 64), (1, 64), (1, 64), (1, 64), (1, 64)]);
    for forward in &seen[0] {
        let values = forward.slices.iter().map(|slice| slice.rows as u64).sum::<u64>() * 256;
        assert!(forward.layers.iter().all(|layer| Place::ALL.iter().all(|place| place.of(layer).count == values)));
    }
}

#[tokio::test]
async fn filters_filter() {
    let attention = AttentionTraceConfig { layers: Some(vec![0, 6]), heads: Some(vec![1, 5]), ..Default::default() };
    let filtered = ModelTracerConfig { attention: Some(attention), ..ModelTracerConfig::default() };
    let all = ModelTracerConfig { attention: Some(AttentionTraceConfig::default()), ..ModelTracerConfig::default() };
    let mut found = Vec::new();
    for config in [filtered, all] {
        let (executor, tracer) = traced(DEMO_MODEL, "cpu,cpu", Some(&[5, 3]), config, chunks_of(256)).await;
        executor.infer_with(&prompt(4, 20), &alone(3)).await.unwrap();
        drop(executor);
        let traces: Vec<_> = tracer.close().forwards.iter().flat_map(|forward| forward.attention.clone()).collect();
        assert!(traces.iter().all(|trace| trace.seen == trace.position + 1 && trace.top.len() == 5));
        found.push(traces);
    }
    let (filtered, mut all) = (&found[0], found[1].clone());
    assert_eq!((filtered.len(), all.len()), (3 * 4, 3 * 64));
    all.retain(|trace| [0, 6].contains(&trace.layer) && [1, 5].contains(&trace.head));
    assert!(*filtered == all);

    let named = ModelTracerConfig {
        logits: true,
        tracked_tokens: Some(vec![17, 300]),
        top_k: 2,
        ..ModelTracerConfig::default()
    };
    let (executor, tracer) = traced(DEMO_MODEL, "cpu", None, named, chunks_of(256)).await;
    executor.infer_with(&prompt(4, 20), &alone(2)).await.unwrap();
    drop(executor);
    let forwards = tracer.close().forwards;
    assert_eq!(forwards.len(), 2);
    for forward in forwards {
        assert!(forward.layers.is_empty() && forward.attention.is_empty());
        for layer in &forward.logits[0].layers {
            assert_eq!(layer.tracked.iter().map(|tracked| tracked.token).collect::<Vec<_>>(), [17, 300]);
            assert_eq!(layer.top.len(), 2);
        }
    }
}

/// The rows of one request, by position.
fn of_request(snapshot: &TracerSnapshot, request: u64) -> Vec<LogitTrace> {
    let traces = snapshot.forwards.iter().flat_map(|forward| &forward.logits);
    let mut traces: Vec<LogitTrace> = traces.filter(|trace| trace.request == request).cloned().collect();
    traces.sort_by_key(|trace| trace.position);
    traces
}

#[tokio::test]
async fn every_trace_belongs_to_its_request() {
    let prompts: Vec<Vec<u32>> = [70, 9, 45, 33].into_iter().enumerate().map(|(i, n)| prompt(5 + i, n)).collect();
    let config = ModelTracerConfig::full();
    let (executor, tracer) = traced(DEMO_MODEL, "cpu,cpu", Some(&[4, 4]), config.clone(), chunks_of(16)).await;
    let generations = batch(&executor, &prompts).await;
    drop(executor);
    let snapshot = tracer.close();
    assert_eq!(snapshot.dropped_events, 0);
    assert!(snapshot.forwards.iter().any(|forward| forward.slices.len() > 1), "some steps are shared");

    let mut rows: HashMap<u64, usize> = HashMap::new();
    for forward in &snapshot.forwards {
        let last_row = |slice: &StepSlice| slice.position + slice.rows - 1;
        let ends: HashMap<u64, usize> = forward.slices.iter().map(|slice| (slice.request, last_row(slice))).collect();
        for slice in &forward.slices {
            *rows.entry(slice.request).or_default() += slice.rows;
        }
        assert!(forward.logits.iter().all(|trace| ends[&trace.request] == trace.position));
        assert!(forward.attention.iter().all(|trace| ends[&trace.request] == trace.position));
        assert_eq!(forward.attention.len(), 64 * forward.logits.len());
    }
    for (request, (prompt, generation)) in prompts.iter().zip(&generations).enumerate() {
        let request = request as u64;
        assert_eq!(rows[&request], prompt.len() + 7, "the last token is not computed");
        let traces = of_request(&snapshot, request);
        let positions: Vec<usize> = traces.iter().map(|trace| trace.position).collect();
        assert_eq!(positions, (prompt.len() - 1..prompt.len() + 7).collect::<Vec<_>>());
        let chosen: Vec<u32> = traces.iter().filter_map(|trace| trace.chosen).collect();
        assert_eq!(chosen, generation.tokens);

        // Alone it shows the same.
        let (executor, tracer) = traced(DEMO_MODEL, "cpu", None, config.clone(), chunks_of(256)).await;
        executor.infer_with(prompt, &alone(8)).await.unwrap();
        drop(executor);
        let numbered = |mut trace: LogitTrace| {
            trace.request = request;
            trace
        };
        let same: Vec<LogitTrace> = of_request(&tracer.close(), 0).into_iter().map(numbered).collect();
        assert!(same == traces, "request {request}");
    }
}

/// The demo model with a change to its tensors.
fn write_changed(folder: &Path, tensor: &str, index: usize, value: f32) {
    let path = |name: &str| format!("{DEMO_MODEL}/{name}");
    for file in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(path(file), folder.join(file)).unwrap();
    }
    let mut tensors = candle_core::safetensors::load(path("model.safetensors"), &Device::Cpu).unwrap();
    let changed = tensors.get_mut(tensor).unwrap();
    let mut values: Vec<f32> = changed.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    values[index] = value;
    *changed = Tensor::from_vec(values, changed.dims(), &Device::Cpu).unwrap();
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

/// What the request ends with; it must not take long.
async fn soon(executor: &HeterogeneousPipelineExecutor, prompt: &[u32]) -> Result<Generation> {
    let options = alone(4);
    let generation = executor.infer_with(prompt, &options);
    tokio::time::timeout(Duration::from_secs(20), generation).await.expect("the executor hangs")
}

#[tokio::test]
async fn a_planted_value_is_found_and_named_by_layer_and_place() {
    let folder = tempfile::tempdir().unwrap();
    let cases = [
        ("model.layers.3.mlp.down_proj.weight", f32::NAN, 3, Place::PostFfn, AnomalyKind::Nan),
        ("model.layers.5.self_attn.v_proj.weight", f32::NAN, 5, Place::PostAttention, AnomalyKind::Nan),
        ("model.layers.0.input_layernorm.weight", f32::NAN, 0, Place::PostNorm, AnomalyKind::Nan),
        ("model.layers.6.self_attn.o_proj.weight", f32::INFINITY, 6, Place::PostAttention, AnomalyKind::Inf),
        ("model.layers.2.mlp.down_proj.weight", 3e9, 2, Place::PostFfn, AnomalyKind::Explosion),
    ];
    for (tensor, value, layer, place, kind) in cases {
        write_changed(folder.path(), tensor, 5, value);
        for (devices, cut) in [("cpu", vec![8]), ("cpu,cpu", vec![4, 4])] {
            let (executor, tracer) =
                traced(folder.path().to_str().unwrap(), devices, Some(&cut), ModelTracerConfig::full(), chunks_of(16))
                    .await;
            let outcome = soon(&executor, &prompt(9, 24)).await;
            if kind == AnomalyKind::Nan {
                assert!(outcome.unwrap_err().to_string().contains("NaN"), "{tensor}");
            }
            drop(executor);
            let snapshot = tracer.close();
            let first = snapshot.first_anomaly.unwrap_or_else(|| panic!("{tensor}: nothing was found"));
            assert_eq!((first.step, first.anomaly.layer, first.anomaly.place), (0, layer, place), "{tensor}");
            let found = snapshot.forwards[0].anomalies.iter().find(|anomaly| anomaly.kind == kind).unwrap();
            assert_eq!((found.layer, found.place), (layer, place), "{tensor}");
            let description = found.to_string();
            assert!(description.starts_with(&format!("layer {layer}, {}: ", place.name())), "{description}");
            assert!(snapshot.summary.anomalies_detected >= 2, "both chunks of the prompt");
            // The whole report is JSON, whatever is in it.
            let json: serde_json::Value = serde_json::to_value(&snapshot).unwrap();
            assert_eq!(json["first_anomaly"]["layer"], layer);
        }
    }
}

#[tokio::test]
async fn a_layer_that_adds_nothing_has_vanished() {
    let folder = tempfile::tempdir().unwrap();
    write_changed(folder.path(), "model.norm.weight", 0, 1.0);
    let mut tensors = candle_core::safetensors::load(folder.path().join("model.safetensors"), &Device::Cpu).unwrap();
    let down = tensors.get_mut("model.layers.4.mlp.down_proj.weight").unwrap();
    *down = down.zeros_like().unwrap();
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    let (executor, tracer) = traced(
        folder.path().to_str().unwrap(),
        "cpu",
        None,
        ModelTracerConfig::lightweight(),
        ExecutorOptions::default(),
    )
    .await;
    soon(&executor, &prompt(9, 24)).await.unwrap();
    drop(executor);
    for forward in tracer.close().forwards {
        let [anomaly] = forward.anomalies[..] else { panic!("{:?}", forward.anomalies) };
        assert_eq!((anomaly.layer, anomaly.place, anomaly.kind), (4, Place::PostFfn, AnomalyKind::Vanishing));
    }
}

#[tokio::test]
async fn the_kv_trace_is_what_the_executor_says() {
    let (executor, tracer) =
        traced(DEMO_MODEL, "cpu,cpu", Some(&[3, 5]), ModelTracerConfig::lightweight(), chunks_of(256)).await;
    let long = prompt(1, 60);
    for prompt in [&long, &long, &prompt(2, 30)] {
        executor.infer_with(prompt, &greedy(5)).await.unwrap();
    }
    // A step is over a moment after its token is out.
    let handle = tracer.handle();
    let steps = |count| wait_until("the last step is traced", move || handle.summary().kv_steps == count);
    steps.clone()(15).await;
    let snapshot = tracer.snapshot();
    let stats = executor.prefix_stats();
    assert!(stats.hits == 1 && stats.lookups == 3);
    assert_eq!(snapshot.summary.avg_hit_rate, stats.hits as f64 / stats.lookups as f64);
    let position: u64 = executor.stages().iter().map(|stage| stage.kv_bytes_per_token).sum();
    let most = snapshot.kv.iter().map(|kv| kv.size_positions).max().unwrap();
    for kv in &snapshot.kv {
        assert_eq!(kv.size_bytes, kv.size_positions as u64 * position);
        assert!(kv.valid_positions <= kv.size_positions && kv.size_positions <= kv.max_positions);
        let empty = (kv.size_positions - kv.valid_positions) as f64;
        assert!((kv.fragmentation - empty / kv.size_positions as f64).abs() < 1e-12);
    }
    // While the first prompt's five tokens were made, 65 positions were set aside for it.
    assert_eq!((snapshot.kv[0].size_positions, snapshot.kv[0].valid_positions), (65, 60));
    assert_eq!(snapshot.kv.last().unwrap().peak_positions, most);

    executor.clear_prefix_cache();
    let before = snapshot.summary.total_evictions;
    executor.infer_with(&long, &greedy(2)).await.unwrap();
    steps.clone()(17).await;
    let after = tracer.snapshot().summary;
    assert!(after.total_evictions >= before + 2, "{after:?}");
    tracer.handle().clear();
    assert_eq!(tracer.handle().summary().total_evictions, 0);
    executor.infer_with(&prompt(3, 20), &greedy(2)).await.unwrap();
    steps(2).await;
    let again = tracer.snapshot().summary;
    assert_eq!((again.total_forwards, again.kv_steps, again.total_evictions), (2, 2, 0));
    assert_eq!(again.avg_hit_rate, 0.0);
}

#[tokio::test]
async fn memory_stays_within_its_bound_while_the_figures_go_on() {
    let max_bytes = 256 << 10;
    let config = ModelTracerConfig { max_bytes, ..ModelTracerConfig::full() };
    let (executor, tracer) = traced(DEMO_MODEL, "cpu,cpu", None, config, chunks_of(16)).await;
    let handle = tracer.handle();
    let prompts: Vec<Vec<u32>> = (0..4).map(|which| prompt(which, 40)).collect();
    let options = alone(60);
    let run = executor.infer_batch_with(&prompts, &options);
    let watch = async {
        loop {
            assert!(handle.snapshot().held_bytes <= max_bytes);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! { _ = watch => unreachable!("it watches for ever"), outcome = run => { outcome.unwrap(); } }
    drop(executor);
    let snapshot = tracer.close();
    assert!(snapshot.held_bytes <= max_bytes);
    assert!(snapshot.evicted_forwards > 0 && snapshot.refused_traces == 0, "{}", snapshot.evicted_forwards);
    assert_eq!((snapshot.summary.logit_traces, snapshot.summary.attention_traces), (4 * 60, 4 * 60 * 64));
    assert_eq!(snapshot.summary.total_forwards, snapshot.evicted_forwards + snapshot.forwards.len() as u64);
    let latest = snapshot.forwards.iter().map(|forward| forward.step).max();
    assert_eq!(latest, Some(snapshot.summary.total_forwards - 1));
}
