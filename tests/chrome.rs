//! The Chrome trace is what the format asks for, and shows what happened.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use candle_pipeline::instrument::Probe;
use candle_pipeline::instrument::chrome::{ChromeTrace, ChromeTraceOptions};
use candle_pipeline::instrument::queue::{QueueOptions, listen};
use candle_pipeline::{DEMO_MODEL, Error, ExecutorOptions, StageStats};
use common::{Meddling, executor_with, greedy};
use serde_json::Value;

const PIPELINE: u64 = 1;
const SCHEDULER: u64 = 1;
const FIRST_STAGE: u64 = 2;
const REQUESTS: u64 = 1_000_000;

/// A complete event, in nanoseconds.
#[derive(Debug, Clone)]
struct Slice {
    name: String,
    from: u64,
    until: u64,
    args: Value,
}

/// A trace that has passed the checks.
struct Trace {
    /// By thread of the pipeline: the scheduler, then the stages. Outer ones first.
    slices: BTreeMap<u64, Vec<Slice>>,
    /// Of each micro-batch: kind, thread and time, in order.
    flows: BTreeMap<u64, Vec<(String, u64, u64)>>,
    /// Of each request: kind, name and time, in order.
    requests: BTreeMap<u64, Vec<(String, String, u64)>>,
    counters: BTreeMap<String, Vec<Value>>,
    threads: BTreeMap<u64, String>,
}

fn ns(event: &Value, field: &str) -> u64 {
    let micros = event[field].as_f64().unwrap_or_else(|| panic!("no {field}: {event}"));
    assert!((0.0..1e12).contains(&micros), "{event}");
    (micros * 1000.0).round() as u64
}

impl Trace {
    /// Checks a trace against the Trace Event Format.
    fn parse(text: &str) -> Trace {
        let events: Vec<Value> = serde_json::from_str(text).unwrap();
        let mut trace = Trace {
            slices: BTreeMap::new(),
            flows: BTreeMap::new(),
            requests: BTreeMap::new(),
            counters: BTreeMap::new(),
            threads: BTreeMap::new(),
        };
        for event in &events {
            let name = event["name"].as_str().unwrap_or_else(|| panic!("no name: {event}")).to_string();
            let number = |field: &str| event[field].as_u64().unwrap_or_else(|| panic!("no {field}: {event}"));
            let (pid, tid) = (number("pid"), number("tid"));
            let ph = event["ph"].as_str().unwrap();
            match ph {
                "M" if name == "thread_name" => {
                    trace.threads.insert(tid, event["args"]["name"].as_str().unwrap().to_string());
                }
                "M" => assert!(["process_name", "thread_sort_index"].contains(&name.as_str()), "{event}"),
                "X" => {
                    assert_eq!(pid, PIPELINE);
                    let from = ns(event, "ts");
                    let slice = Slice { name, from, until: from + ns(event, "dur"), args: event["args"].clone() };
                    trace.slices.entry(tid).or_default().push(slice);
                }
                "s" | "t" | "f" => {
                    assert_eq!((pid, &event["bp"], &event["cat"]), (PIPELINE, &"e".into(), &"flow".into()));
                    trace.flows.entry(number("id")).or_default().push((ph.into(), tid, ns(event, "ts")));
                }
                "b" | "e" | "n" => {
                    assert_eq!((pid, &event["cat"]), (REQUESTS, &"request".into()));
                    trace.requests.entry(number("id")).or_default().push((ph.into(), name, ns(event, "ts")));
                }
                "C" => {
                    ns(event, "ts");
                    assert!(event["args"].as_object().unwrap().values().all(Value::is_u64), "{event}");
                    trace.counters.entry(name).or_default().push(event["args"].clone());
                }
                other => panic!("phase {other}: {event}"),
            }
        }
        trace.check_nesting();
        trace.check_requests();
        trace.check_flows();
        trace
    }

    fn check_nesting(&mut self) {
        for (tid, slices) in &mut self.slices {
            assert!(self.threads.contains_key(tid), "thread {tid} has no name");
            slices.sort_by_key(|slice| (slice.from, std::cmp::Reverse(slice.until)));
            let mut open: Vec<&Slice> = Vec::new();
            for slice in slices.iter() {
                while open.last().is_some_and(|outer| outer.until <= slice.from) {
                    open.pop();
                }
                assert!(open.last().is_none_or(|outer| slice.until <= outer.until), "{slice:?} leaves {open:?}");
                open.push(slice);
            }
        }
    }

    fn check_requests(&self) {
        for (request, events) in &self.requests {
            let (mut open, mut last) = (Vec::new(), 0);
            for (ph, name, at) in events {
                assert!(*at >= last, "request {request} goes back in time: {events:?}");
                last = *at;
                match ph.as_str() {
                    "b" => open.push(name),
                    "e" => assert_eq!(open.pop(), Some(name), "{events:?}"),
                    _ => assert!(!open.is_empty(), "{events:?}"),
                }
            }
            assert!(open.is_empty(), "request {request} does not end: {open:?}");
        }
    }

    fn check_flows(&self) {
        for (step, events) in &self.flows {
            let kinds: String = events.iter().map(|(ph, ..)| ph.as_str()).collect();
            assert!(kinds.starts_with('s') && kinds.ends_with('f'), "micro-batch {step}: {kinds}");
            assert!(kinds[1..kinds.len() - 1].chars().all(|kind| kind == 't'), "micro-batch {step}: {kinds}");
            assert!(events.windows(2).all(|pair| pair[0].2 <= pair[1].2), "micro-batch {step}: {events:?}");
            for (_, tid, at) in events {
                let encloses = |slice: &Slice| (slice.from..=slice.until).contains(at);
                assert!(self.slices[tid].iter().any(encloses), "micro-batch {step} meets no slice on {tid} at {at}");
            }
        }
    }

    /// What a stage did of one kind: `copy`, or a micro-batch by its kinds.
    fn of(&self, stage: u64, names: &[&str]) -> Vec<&Slice> {
        let slices = self.slices.get(&(FIRST_STAGE + stage)).map_or(&[][..], Vec::as_slice);
        slices.iter().filter(|slice| names.contains(&slice.name.as_str())).collect()
    }
}

const STEPS: [&str; 3] = ["prefill", "decode", "mixed"];

/// Two stages that take 2 ms longer than they need, and four sequences.
async fn traced(path: &Path, in_flight: Option<usize>, phases: Option<Duration>) -> (Trace, Vec<StageStats>) {
    let trace = ChromeTrace::create(ChromeTraceOptions { phases, ..ChromeTraceOptions::new(path) }).unwrap();
    let (queue, listener) = listen("chrome-trace", trace, QueueOptions::default()).unwrap();
    let meddling = Arc::new(Meddling::default());
    meddling.delay_ms.store(2, Ordering::SeqCst);
    let options = ExecutorOptions { probe: Probe::new(queue), in_flight, ..meddling.options() };
    let executor = executor_with(DEMO_MODEL, "cpu,cpu", Some(&[5, 3]), options).await.unwrap();
    let prompts: Vec<Vec<u32>> = (1..5).map(|n| vec![n, 2 * n, 3 * n]).collect();
    executor.infer_batch_with(&prompts, &greedy(12)).await.unwrap();
    let stats = executor.stage_stats();
    drop(executor);
    assert_eq!(listener.dropped(), 0);
    assert_eq!(listener.close().unwrap().failures().count(), 0);
    (Trace::parse(&std::fs::read_to_string(path).unwrap()), stats)
}

#[tokio::test]
async fn a_trace_nests_flows_from_the_scheduler_to_the_tokens_and_adds_up_to_the_accounts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let (trace, stats) = traced(&path, None, Some(Duration::ZERO)).await;
    assert_eq!(trace.threads[&SCHEDULER], "scheduler");
    assert_eq!(trace.threads[&FIRST_STAGE], "stage 0: cpu, layers 0-4");
    assert_eq!(trace.threads[&(FIRST_STAGE + 1)], "stage 1: cpu, layers 5-7");
    for (stage, stats) in stats.iter().enumerate() {
        let sum = |names: &[&str]| -> Duration {
            let slices = trace.of(stage as u64, names);
            slices.iter().map(|slice| Duration::from_nanos(slice.until - slice.from)).sum()
        };
        assert_eq!(trace.of(stage as u64, &STEPS).len() as u64, stats.steps);
        let rows: u64 = trace.of(stage as u64, &STEPS).iter().map(|slice| slice.args["rows"].as_u64().unwrap()).sum();
        assert_eq!(rows, stats.rows);
        assert!(sum(&STEPS).abs_diff(stats.compute) < Duration::from_micros(1), "{:?} {stats:?}", sum(&STEPS));
        if stage == 0 {
            assert!(sum(&["copy"]).abs_diff(stats.copy) < Duration::from_micros(1), "{:?} {stats:?}", sum(&["copy"]));
        }
    }
    assert!(trace.of(1, &["copy"]).is_empty(), "the last stage hands nothing on");

    // The layers lie within the micro-batches, and the phases within the layers.
    let names: BTreeMap<&str, usize> = trace.slices.values().flatten().fold(BTreeMap::new(), |mut names, slice| {
        *names.entry(slice.name.as_str()).or_default() += 1;
        names
    });
    let steps = stats[0].steps as usize;
    assert!((0..8).all(|layer| names[format!("layer {layer}").as_str()] == steps), "{names:?}");
    assert_eq!((names["sdpa"], names["output"]), (8 * steps, steps));
    assert_eq!((names["embedding"], names["input"]), (steps, steps));
    let within_steps = |stage: u64, inner: &str| {
        let steps = trace.of(stage, &STEPS);
        let inside = |inner: &&Slice| steps.iter().any(|step| step.from <= inner.from && inner.until <= step.until);
        trace.of(stage, &[inner]).iter().all(inside)
    };
    assert!(within_steps(0, "layer 4") && within_steps(1, "layer 7") && within_steps(1, "output"));

    // Each micro-batch goes through both stages, and each token has its way there.
    for events in trace.flows.values() {
        let stages: Vec<_> = events.iter().map(|(_, tid, _)| *tid).filter(|tid| *tid != SCHEDULER).collect();
        assert_eq!(stages, [FIRST_STAGE, FIRST_STAGE + 1], "{events:?}");
    }
    let samples: Vec<&Slice> = trace.slices[&SCHEDULER].iter().filter(|slice| slice.name == "sample").collect();
    assert_eq!(samples.len(), 4 * 12);
    for sample in samples {
        let arrives = |(ph, tid, at): &(String, u64, u64)| ph == "t" && *tid == SCHEDULER && *at == sample.from;
        assert!(trace.flows.values().flatten().any(arrives), "{sample:?}");
    }
    assert_eq!(trace.requests.len(), 4);
    for events in trace.requests.values() {
        let begun: Vec<_> = events.iter().filter(|(ph, ..)| ph == "b").map(|(_, name, _)| name.as_str()).collect();
        assert_eq!(begun, ["request", "queued", "prefill", "decode"]);
        assert_eq!(events.iter().filter(|(ph, name, _)| ph == "n" && name == "token").count(), 12);
    }
    assert!(trace.counters["KV positions"].iter().any(|kv| kv["valid"].as_u64() > Some(12)));
    assert!(trace.counters["requests"].iter().any(|requests| requests["running"] == 4));
    assert!(trace.counters["stage 1 bytes"].iter().any(|bytes| bytes["kv"].as_u64() > Some(0)));
}

/// Time in which both stages compute.
fn overlap(trace: &Trace) -> u64 {
    let (first, second) = (trace.of(0, &STEPS), trace.of(1, &STEPS));
    let both = |a: &Slice, b: &Slice| a.until.min(b.until).saturating_sub(a.from.max(b.from));
    first.iter().map(|a| second.iter().map(|b| both(a, b)).sum::<u64>()).sum()
}

#[tokio::test]
async fn stages_are_seen_to_work_at_the_same_time_and_one_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let (both, stats) = traced(&folder.path().join("both.json"), None, None).await;
    assert!(overlap(&both) > stats[0].compute.as_nanos() as u64 / 3, "{} of {stats:?}", overlap(&both));
    let (one, _) = traced(&folder.path().join("one.json"), Some(1), None).await;
    assert_eq!(overlap(&one), 0);
    assert!(!both.slices[&FIRST_STAGE].iter().any(|slice| slice.name.starts_with("layer")), "nobody asked for layers");
}

#[tokio::test]
async fn a_trace_that_is_cut_off_lacks_its_bracket_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    traced(&path, None, None).await;
    let text = std::fs::read_to_string(&path).unwrap();
    let events = |text: &str| serde_json::from_str::<Vec<Value>>(text).map(|events| events.len());
    let all = events(&text).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    for cut in [5, lines.len() / 2, lines.len() - 1] {
        let cut = format!("{}]", lines[..cut].join("\n"));
        assert!(events(&cut).is_ok_and(|some| some > 1 && some <= all));
    }
    for page in text.as_bytes().chunks_exact(4096) {
        assert_eq!(page[4095], b'\n', "a kill may cut a write where a page ends");
    }
}

#[tokio::test]
async fn requests_that_fail_or_are_cancelled_end_in_the_trace_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let trace = ChromeTrace::create(ChromeTraceOptions::new(&path)).unwrap();
    let (queue, listener) = listen("chrome-trace", trace, QueueOptions::default()).unwrap();
    let meddling = Arc::new(Meddling::default());
    meddling.error_at.store(4, Ordering::SeqCst);
    let options = ExecutorOptions { probe: Probe::new(queue), max_sequences: 1, ..meddling.options() };
    let executor = executor_with(DEMO_MODEL, "cpu,cpu", Some(&[5, 3]), options).await.unwrap();
    let waiting = executor.infer_stream(vec![4, 5, 6], 100, 0.0, 1.0);
    let second = executor.infer_stream(vec![7, 8], 100, 0.0, 1.0);
    drop(second);
    let failed = futures::StreamExt::collect::<Vec<_>>(waiting).await;
    assert!(matches!(failed.last(), Some(Err(Error::StageFailed { .. }))), "{failed:?}");
    executor.infer_with(&[1, 2, 3], &greedy(4)).await.unwrap();
    drop(executor);
    drop(listener);
    let trace = Trace::parse(&std::fs::read_to_string(&path).unwrap());
    assert_eq!(trace.requests.len(), 3);
    assert!(trace.flows.len() > 4);
}

#[test]
fn a_trace_that_cannot_be_written_is_refused_at_once() {
    let refused = ChromeTrace::create(ChromeTraceOptions::new("/no/such/folder/trace.json")).err().unwrap().to_string();
    assert!(refused.contains("/no/such/folder/trace.json") && refused.contains("opened for writing"), "{refused}");
}
