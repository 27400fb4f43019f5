//! Figures of real runs.

mod common;

use std::sync::Arc;
use std::time::Duration;

use candle_pipeline::instrument::Probe;
use candle_pipeline::instrument::metrics::{
    LatencyRow, Metrics, MetricsOptions, Snapshot, build_latency_rows, build_memory_rows,
};
use candle_pipeline::{DEMO_MODEL, ExecutorOptions, GenerationOptions, HeterogeneousPipelineExecutor};
use common::{executor_with, greedy};

async fn measured(options: MetricsOptions) -> (HeterogeneousPipelineExecutor, Arc<Metrics>) {
    let (collector, metrics) = Metrics::start(options).unwrap();
    let options = ExecutorOptions { probe: Probe::new(collector), ..ExecutorOptions::default() };
    (executor_with(DEMO_MODEL, "cpu,cpu", Some(&[5, 3]), options).await.unwrap(), Arc::new(metrics))
}

fn row<'a>(rows: &'a [LatencyRow], label: &str) -> &'a LatencyRow {
    rows.iter().find(|row| row.label == label).unwrap_or_else(|| panic!("{label}: {rows:#?}"))
}

/// Rows directly below the one at `index`.
fn below(rows: &[LatencyRow], index: usize) -> impl Iterator<Item = &LatencyRow> {
    let level = rows[index].level;
    rows[index + 1..].iter().take_while(move |row| row.level > level).filter(move |row| row.level == level + 1)
}

#[tokio::test]
async fn the_times_of_a_real_run_add_up_and_are_those_that_the_stages_count() {
    let (executor, metrics) =
        measured(MetricsOptions { phases: Some(Duration::ZERO), window: 1000, ..MetricsOptions::default() }).await;
    let before = executor.stage_stats();
    executor.infer_with(&[1, 40, 300, 17, 8], &greedy(50)).await.unwrap();
    let snapshot = metrics.snapshot();
    let rows = build_latency_rows(&snapshot);
    for (index, row) in rows.iter().enumerate() {
        let children: Vec<_> = below(&rows, index).collect();
        if !children.is_empty() {
            let sum: f64 = children.iter().map(|child| child.average_ms).sum();
            assert!((sum - row.average_ms).abs() < 2e-3, "{row:?}: {sum}");
            let sum: f64 = children.iter().map(|child| child.last_ms).sum();
            assert!((sum - row.last_ms).abs() < 2e-3, "{row:?}: {sum}");
        }
    }
    // The stages' own counters add the same steps up in another way.
    let stages = executor.stage_stats();
    let counted: Duration = stages.iter().zip(&before).map(|(now, before)| now.since(before).compute).sum();
    let forward = row(&rows, "Forward").average_ms * 50.0;
    let counted = counted.as_secs_f64() * 1e3;
    assert!((forward / counted - 1.0).abs() < 0.01, "{forward} of {counted} ms");
    let layers = rows.iter().filter(|row| row.label.starts_with("Layer ")).count();
    let phases = rows.iter().filter(|row| row.level == 4 && row.average_ms > 0.0).count();
    assert_eq!((layers, phases), (8, 8 * 9));
    // What no phase has is little: handing in the micro-batch and waking up.
    let named: f64 = rows.iter().filter(|row| row.level == 3 && row.label != "other").map(|row| row.average_ms).sum();
    assert!(named > 0.9 * row(&rows, "Forward").average_ms, "{rows:#?}");
    assert!(row(&rows, "Step").average_ms >= row(&rows, "Forward").average_ms);
    assert!(row(&rows, "Sampling").average_ms > 0.0);
}

#[tokio::test]
async fn memory_is_what_the_stages_say_and_comes_to_rest_below_its_peak() {
    let (executor, metrics) =
        measured(MetricsOptions { host_interval: Duration::ZERO, ..MetricsOptions::default() }).await;
    let mut options = greedy(50);
    options.reuse_prefix = false;
    executor.infer_with(&[1, 40, 300, 17, 8], &options).await.unwrap();
    common::wait_until("KV is freed", || executor.memory().iter().all(|stage| stage.kv == 0)).await;
    let snapshot = metrics.snapshot();
    for (stage, told) in snapshot.memory.stages.iter().zip(executor.memory()) {
        assert_eq!((stage.weights.current, stage.kv_reserved.current, stage.kv_used.current), (told.weights, 0, 0));
        assert!(stage.kv_used.peak > 0 && stage.kv_used.peak <= stage.kv_reserved.peak && stage.scratch.current > 0);
        assert!(stage.kv_reserved.peak < stage.kv_limit, "at the run's own capacity: {stage:?}");
    }
    let host = snapshot.memory.host;
    assert!(
        host.at_start > 0 && host.process.peak >= host.process.current && host.process.current > 1 << 20,
        "{host:?}"
    );
    let rows = build_memory_rows(&snapshot);
    let weights: u64 = executor.memory().iter().map(|stage| stage.weights).sum();
    assert_eq!((rows[0].label.as_str(), rows[0].current_bytes), ("Weights", weights));
    let parts: u64 = rows
        .iter()
        .take_while(|row| row.label != "KV cache")
        .filter(|row| row.level == 2)
        .map(|row| row.current_bytes)
        .sum();
    assert_eq!(parts, weights, "{rows:#?}");
}

#[tokio::test]
async fn counts_are_those_of_the_requests_that_ran() {
    let (executor, metrics) = measured(MetricsOptions::default()).await;
    let prompt: Vec<u32> = (1..40).collect();
    // Without the prompt's logits, which would have to be computed again.
    let options = GenerationOptions { prompt_logits: false, ..greedy(20) };
    for _ in 0..2 {
        executor.infer_with(&prompt, &options).await.unwrap();
    }
    drop(executor.infer_stream(prompt.to_vec(), 1000, 0.0, 1.0));
    common::wait_until("all requests have ended", || metrics.snapshot().requests.finished["cancelled"] == 1).await;
    let Snapshot { requests, tokens, stages, kv, dropped_events, .. } = metrics.snapshot();
    assert_eq!((requests.received, requests.finished["length"], requests.running, requests.waiting), (3, 2, 0, 0));
    assert!(tokens.generated >= 40 && tokens.ttft.count >= 2 && tokens.inter_token.count >= 38, "{tokens:?}");
    assert_eq!(dropped_events, 0);
    let prefixes = executor.prefix_stats();
    assert_eq!((tokens.prefix_hits, tokens.reused), (prefixes.hits, prefixes.reused_tokens));
    assert!(kv.lookups >= 2 && tokens.prefix_hits >= 1);
    for (figures, stats) in stages.iter().zip(executor.stage_stats()) {
        assert_eq!((figures.steps, figures.rows), (stats.steps, stats.rows));
        assert!((figures.compute - stats.compute.as_secs_f64()).abs() < 1e-6);
        assert!(figures.bandwidth.bytes_per_second > 0.0 && figures.bandwidth.share().is_none());
        let shares = figures.recent;
        assert!((shares.busy + shares.bubble + shares.copy - 1.0).abs() < 1e-9 && shares.busy > 0.0);
    }
}
