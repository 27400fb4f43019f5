//! Figures of real runs.

mod common;
#[path = "../examples/common/mod.rs"]
mod examples;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use candle_pipeline::instrument::Probe;
use candle_pipeline::instrument::jsonl::{MetricsLog, MetricsLogOptions};
use candle_pipeline::instrument::metrics::{
    LatencyRow, Metrics, MetricsOptions, Snapshot, build_latency_rows, build_memory_rows,
};
use candle_pipeline::{DEMO_MODEL, ExecutorOptions, GenerationOptions, HeterogeneousPipelineExecutor};
use common::{executor_with, greedy};
use examples::instruments;

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

#[tokio::test]
async fn files_have_the_rows_that_are_shown_in_whole_lines() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("logs");
    let (executor, metrics) =
        measured(MetricsOptions { host_interval: Duration::from_secs(60), ..MetricsOptions::default() }).await;
    let options = MetricsLogOptions { directory: directory.clone(), interval: Duration::from_millis(20) };
    let log = MetricsLog::start(metrics.clone(), &options).unwrap();
    executor.infer_with(&[1, 40, 300], &greedy(200)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(60)).await;
    // Nothing happens any more, so the last lines show what is shown now.
    drop(executor);
    let (latency, memory) = (log.latency_path().to_path_buf(), log.memory_path().to_path_buf());
    assert_eq!(log.failures().count(), 0);
    drop(log);
    let snapshot = metrics.snapshot();
    let lines = |path: &Path| -> Vec<Vec<serde_json::Value>> {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let without_time = |mut row: serde_json::Value| {
        let time = row.as_object_mut().unwrap().remove("time").unwrap().as_f64().unwrap();
        assert!(time > 1.7e9 && time <= snapshot.time);
        row
    };
    let shown = |rows: serde_json::Value| rows.as_array().unwrap().clone();
    for (path, rows, name) in [
        (latency, serde_json::json!(build_latency_rows(&snapshot)), "-latency.jsonl"),
        (memory, serde_json::json!(build_memory_rows(&snapshot)), "-memory.jsonl"),
    ] {
        let mut lines = lines(&path);
        assert!(lines.len() >= 3, "one at the start, one at the end, and some between: {}", lines.len());
        let last: Vec<_> = lines.pop().unwrap().into_iter().map(without_time).collect();
        assert_eq!(last, shown(rows));
        let name_of_file = path.file_name().unwrap().to_str().unwrap();
        let timestamp = name_of_file.strip_suffix(name).unwrap();
        assert!(timestamp.bytes().all(|digit| digit.is_ascii_digit()) && path.parent() == Some(&directory), "{path:?}");
    }
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 2);
}

#[test]
fn the_environment_switches_logs_on_and_a_wrong_value_is_named() {
    let options = |enabled: &str, interval: Option<&str>| {
        instruments::log_options(|name| match name {
            "METRICS_LOG_ENABLED" => Some(enabled.to_string()),
            "METRICS_LOG_INTERVAL_SECS" => interval.map(str::to_string),
            _ => None,
        })
    };
    for on in ["1", "true", "yes", "on", "ON", " True "] {
        assert_eq!(options(on, None).unwrap(), Some(MetricsLogOptions::default()), "{on}");
    }
    for off in ["0", "false", "no", "off", "", " "] {
        assert_eq!(options(off, None).unwrap(), None, "{off}");
    }
    assert_eq!(instruments::log_options(|_| None).unwrap(), None);
    assert_eq!(MetricsLogOptions::default().interval, Duration::from_secs(5));
    assert_eq!(options("1", Some("0.25")).unwrap().unwrap().interval, Duration::from_millis(250));
    for wrong in ["2", "enabled", "-", "oui"] {
        let message = options(wrong, None).unwrap_err().to_string();
        assert!(message.contains(&format!("METRICS_LOG_ENABLED={wrong}: ")), "{message}");
    }
    for wrong in ["0", "-1", "five", "inf", "NaN", "1e300", "1e-12"] {
        let message = options("1", Some(wrong)).unwrap_err().to_string();
        assert!(message.contains(&format!("METRICS_LOG_INTERVAL_SECS={wrong}: ")), "{message}");
    }
}
