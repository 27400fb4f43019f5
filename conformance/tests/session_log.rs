//! The session log: every line of real runs is what the schema says, and a killed process leaves whole lines.

#[path = "../../tests/common/mod.rs"]
mod common;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_pipeline::instrument::queue::{Listener, Queue, QueueOptions, listen};
use candle_pipeline::instrument::session_log::{SCHEMA_VERSION, SessionLog, SessionLogLevel, SessionLogOptions};
use candle_pipeline::instrument::{Event, Probe, StepOutcome, StepSlice};
use candle_pipeline::{DEMO_MODEL, ExecutorOptions, Tokenizer};
use common::{executor_with, greedy};
use jsonschema::Validator;
use serde_json::Value;

const LEVELS: [SessionLogLevel; 3] = [SessionLogLevel::Minimal, SessionLogLevel::Detailed, SessionLogLevel::Verbose];

fn docs(name: &str) -> String {
    std::fs::read_to_string(Path::new(DEMO_MODEL).join("../../docs").join(name)).unwrap()
}

fn schema() -> Value {
    serde_json::from_str(&docs("session-log.schema.json")).unwrap()
}

fn validator() -> Validator {
    jsonschema::draft202012::options().should_validate_formats(true).build(&schema()).unwrap()
}

fn start(options: SessionLogOptions) -> (Arc<Queue>, Listener<SessionLog>) {
    listen("session-log", SessionLog::open(options).unwrap(), QueueOptions::default()).unwrap()
}

/// Lines of a file, each of which is what the schema says.
fn lines(path: &Path, validator: &Validator) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "{} ends within a line", path.display());
    // A kill may cut a write where a page ends, so there a line must end.
    for page in text.as_bytes().chunks_exact(4096) {
        assert_eq!(page[4095], b'\n', "a line of {} lies on two pages", path.display());
    }
    let parse = |line: &str| -> Value {
        let value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        if let Err(mut errors) = validator.validate(&value) {
            panic!("{}: {line}", errors.next().unwrap());
        }
        value
    };
    text.lines().map(parse).filter(|line| line["event"] != "padding").collect()
}

fn of<'a>(lines: &'a [Value], event: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["event"] == event).collect()
}

const PROMPT: [u32; 12] = [1, 40, 300, 17, 8, 9, 55, 700, 3, 77, 21, 6];

/// Logs a run of three requests, two of which go together, on two stages.
async fn logged(path: &Path, level: SessionLogLevel) {
    let tokenizer = Tokenizer::from_hf_dir(Path::new(DEMO_MODEL)).unwrap().unwrap();
    let detokenise = Arc::new(move |tokens: &[u32]| tokenizer.decode(tokens, true).ok());
    let steps_every = Duration::ZERO;
    let options =
        SessionLogOptions { level, steps_every, detokenise: Some(detokenise), ..SessionLogOptions::new(path) };
    let (queue, listener) = start(options);
    let options = ExecutorOptions { probe: Probe::new(queue), ..ExecutorOptions::default() };
    let executor = executor_with(DEMO_MODEL, "cpu,cpu", Some(&[5, 3]), options).await.unwrap();
    executor.infer_with(&PROMPT, &greedy(10)).await.unwrap();
    executor.infer_batch_with(&[vec![1, 2, 3], vec![4; 400]], &greedy(6)).await.unwrap();
    drop(executor);
    let log = listener.close().unwrap();
    assert_eq!(log.failures().count(), 0);
}

#[tokio::test]
async fn every_line_at_every_level_is_what_the_schema_says() {
    let (folder, validator) = (tempfile::tempdir().unwrap(), validator());
    let path = folder.path().join("session.jsonl");
    let mut seen: Vec<BTreeMap<String, usize>> = Vec::new();
    let mut sessions = HashSet::new();
    for level in LEVELS {
        let before = path.metadata().map_or(0, |file| file.len());
        logged(&path, level).await;
        let all = lines(&path, &validator);
        let session = all.last().unwrap()["session_id"].clone();
        assert!(sessions.insert(session.clone()), "each session has an id of its own");
        assert!(path.metadata().unwrap().len() > before, "sessions are added");
        let lines: Vec<Value> = all.into_iter().filter(|line| line["session_id"] == session).collect();
        assert_eq!(lines[0]["event"], "session_start");
        assert_eq!(lines.last().unwrap()["event"], "session_end");
        let first = &lines[0];
        assert_eq!((&first["n_layer"], &first["model_arch"]), (&8.into(), &"llama".into()));
        assert_eq!(first["stages"][1]["first_layer"], 5);
        assert_eq!(first["level"], level.name());

        // Two requests at once stay apart.
        let tokens: Vec<u32> = of(&lines, "prompt")
            .iter()
            .filter(|line| line["request"] == 2)
            .map(|line| line["tokens"].as_array().unwrap().len() as u32)
            .collect();
        assert_eq!(tokens, [256, 144]);
        let ends = of(&lines, "request_end");
        assert_eq!(ends.len(), 3);
        let text = |request: u64, of_what: &str| -> String {
            let parts =
                of(&lines, "text").into_iter().filter(|line| line["request"] == request && line["of"] == of_what);
            parts.map(|line| line["text"].as_str().unwrap()).collect()
        };
        assert!((0..3).all(|request| !text(request, "prompt").is_empty() && !text(request, "output").is_empty()));
        for end in ends {
            assert!(end["ttft_us"].as_f64().unwrap() > 0.0 && end["ttft_us"].as_f64() <= end["duration_us"].as_f64());
        }

        // Each beginning has its end, and as long after it as it says.
        let key =
            |line: &Value| format!("{} {} {} {}", line["step_id"], line["stage"], line["layer"], line["step_name"]);
        let mut open: BTreeMap<String, &Value> = BTreeMap::new();
        let mut names = BTreeMap::new();
        for line in &lines {
            match line["event"].as_str().unwrap() {
                "step_begin" => assert!(open.insert(key(line), line).is_none(), "{line}"),
                "step_end" => {
                    let begin = open.remove(&key(line)).unwrap_or_else(|| panic!("no beginning: {line}"));
                    let time = |line: &Value| humantime::parse_rfc3339(line["timestamp"].as_str().unwrap()).unwrap();
                    let between = time(line).duration_since(time(begin)).unwrap().as_secs_f64() * 1e6;
                    assert!((between - line["duration_us"].as_f64().unwrap()).abs() <= 2.0, "{begin} {line}");
                    *names.entry(line["step_type"].as_str().unwrap().to_string()).or_insert(0) += 1;
                }
                _ => {}
            }
        }
        assert!(open.is_empty(), "{open:?}");
        let rows: u64 = of(&lines, "step_rows").iter().map(|line| line["rows"].as_u64().unwrap()).sum();
        assert_eq!(rows, 12 + 9 + 3 + 5 + 400 + 5);
        let micro_batches = names["inference_step"];
        match level {
            SessionLogLevel::Minimal => assert_eq!(names.len(), 1, "{names:?}"),
            SessionLogLevel::Detailed => {
                assert_eq!(names["stage"], 2 * micro_batches);
                assert!(names["transformer_layer"] >= 8 && names["transformer_layer"] < 8 * micro_batches, "{names:?}");
            }
            SessionLogLevel::Verbose => {
                assert_eq!((names["stage"], names["transformer_layer"]), (2 * micro_batches, 8 * micro_batches));
                assert_eq!(names["phase"], (8 * 9 + 3) * micro_batches);
            }
        }
        let weights = of(&lines, "tensor_log");
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        lines.iter().for_each(|line| *counts.entry(line["event"].as_str().unwrap().into()).or_default() += 1);
        if level >= SessionLogLevel::Detailed {
            assert_eq!(first["n_tensors"], weights.len());
            let up = weights.iter().find(|line| line["name"] == "layers.6.up_proj.weight").unwrap();
            let elements = up["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product::<u64>();
            assert_eq!(up["element_count"], elements);
            assert_eq!((up["memory_bytes"].as_u64().unwrap(), up["dtype"].as_str().unwrap()), (2 * elements, "F16"));
        }
        if level == SessionLogLevel::Verbose {
            let stats = of(&lines, "tensor_stats");
            assert_eq!(stats.len(), 5 * 8 * micro_batches);
            assert!(stats.iter().all(|line| line["std"].as_f64().unwrap() > 0.0 && line["nan_count"] == 0));
        }
        seen.push(counts);
    }
    let names = |counts: &BTreeMap<String, usize>| counts.keys().cloned().collect::<HashSet<_>>();
    assert!(names(&seen[0]).is_subset(&names(&seen[1])) && names(&seen[1]).is_subset(&names(&seen[2])), "{seen:?}");
    assert!(seen[0].len() < seen[1].len() && seen[1].len() < seen[2].len(), "{seen:?}");
}

#[test]
fn the_schema_refuses_what_is_wrong() {
    let validator = validator();
    let good = serde_json::json!({"event": "token", "timestamp": "2026-01-02T03:04:05.000006Z",
        "session_id": "sess_0123456789abcdef", "request": 1, "token": 2, "index": 0, "since_us": 1.5, "duration_us": 2});
    assert!(validator.is_valid(&good));
    let changes: [fn(&mut Value); 6] = [
        |line| line["event"] = "tokens".into(),
        |line| line["request"] = (-1).into(),
        |line| line["timestamp"] = "yesterday".into(),
        |line| line["more"] = 1.into(),
        |line| line["since_us"] = Value::Null,
        |line| line["session_id"] = "7".into(),
    ];
    for change in changes {
        let mut bad = good.clone();
        change(&mut bad);
        assert!(!validator.is_valid(&bad), "{bad}");
    }
}

#[test]
fn the_sample_is_what_the_schema_says() {
    let validator = validator();
    for line in docs("samples/session-log.jsonl").lines() {
        assert!(validator.is_valid(&serde_json::from_str(line).unwrap()), "{line}");
    }
}

#[test]
fn the_page_about_the_log_has_every_field_of_the_schema() {
    let (schema, page) = (schema(), docs("session-log.md"));
    let events = schema["$defs"].as_object().unwrap();
    assert_eq!(schema["properties"]["event"]["enum"].as_array().unwrap().len(), events.len());
    for (event, body) in events {
        assert!(page.contains(&format!("[`{event}`](#{event})")), "{event}");
        let section = page.split(&format!("### {event}\n")).nth(1).unwrap_or("");
        let section = section.split("\n### ").next().unwrap();
        for field in body["properties"].as_object().unwrap().keys() {
            let common = ["event", "timestamp", "session_id"].contains(&field.as_str());
            assert!(common || section.contains(&format!("| `{field}` |")), "{event}.{field}");
        }
    }
    assert_eq!(events["session_start"]["properties"]["schema_version"]["const"], SCHEMA_VERSION);
}

#[test]
fn files_change_by_size_and_each_can_be_read_alone() {
    let (folder, validator) = (tempfile::tempdir().unwrap(), validator());
    let path = folder.path().join("log.jsonl");
    let options = SessionLogOptions { max_bytes: Some(20_000), keep: 3, ..SessionLogOptions::new(&path) };
    let (queue, listener) = start(options.clone());
    let probe = Probe::new(queue);
    probe.emit(|| Event::ModelOpened(Arc::default()));
    for index in 0..2000 {
        let since = Duration::from_micros(3);
        probe.emit(|| Event::Sampled { request: 5, token: 9, index, since, duration: since });
        if index % 100 == 0 {
            listener.flush();
        }
    }
    drop(listener);
    let mut found: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().file_name()).collect();
    found.sort();
    assert_eq!(found, ["log.jsonl", "log.jsonl.1", "log.jsonl.2"]);
    let mut indices = Vec::new();
    let mut parts = Vec::new();
    for name in ["log.jsonl.2", "log.jsonl.1", "log.jsonl"] {
        let path = folder.path().join(name);
        assert!(path.metadata().unwrap().len() <= 20_000 + 4096, "{name}");
        let lines = lines(&path, &validator);
        assert_eq!(lines[0]["event"], "session_start");
        parts.push(lines[0]["part"].as_u64().unwrap());
        indices.extend(of(&lines, "token").iter().map(|line| line["index"].as_u64().unwrap()));
    }
    assert!(parts[0] > 2 && parts[1] == parts[0] + 1 && parts[2] == parts[0] + 2, "{parts:?}");
    let first = indices[0];
    assert_eq!(indices, (first..2000).collect::<Vec<_>>(), "nothing is lost between the files");

    // Another session goes on in the same files, with one kept.
    drop(start(SessionLogOptions { keep: 1, ..options }));
    assert_eq!(lines(&path, &validator).last().unwrap()["event"], "session_end");
}

#[test]
fn decode_steps_that_come_fast_are_told_in_part_and_counted() {
    let (folder, validator) = (tempfile::tempdir().unwrap(), validator());
    for (level, every, told) in [
        (SessionLogLevel::Detailed, Duration::from_millis(1), vec![0, 3, 4, 6]),
        (SessionLogLevel::Detailed, Duration::ZERO, (0..7).collect()),
        (SessionLogLevel::Verbose, Duration::from_millis(1), (0..7).collect()),
    ] {
        let path = folder.path().join(format!("{level}-{}.jsonl", every.as_millis()));
        let options = SessionLogOptions { level, steps_every: every, ..SessionLogOptions::new(&path) };
        let (queue, listener) = start(options);
        let probe = Probe::new(queue);
        probe.emit(|| Event::ModelOpened(Arc::default()));
        let began = Instant::now();
        for (step, (micros, prefill)) in (0..).zip([
            (0, false),
            (400, false),
            (900, false),
            (1100, false),
            (1200, true), // a prompt is always told
            (2100, false),
            (2200, false),
        ]) {
            let at = began + Duration::from_micros(micros);
            let slices = vec![StepSlice { request: 1, position: 5, rows: 1, prefill }];
            probe.emit_at(at, || Event::StepSent { step, slices });
            let (rows, bytes, none) = (1, 0, Duration::ZERO);
            probe.emit_at(at, || Event::StageStep {
                stage: 0,
                step,
                rows,
                bytes,
                queued: none,
                wait: none,
                compute: none,
                copy: none,
            });
            probe.emit_at(at, || Event::StepFinished { step, outcome: StepOutcome::Computed });
        }
        drop(listener);
        let lines = lines(&path, &validator);
        for step_type in ["inference_step", "stage"] {
            let ends = of(&lines, "step_end").into_iter().filter(|line| line["step_type"] == step_type);
            let steps: Vec<u64> = ends.map(|line| line["step_id"].as_u64().unwrap()).collect();
            assert_eq!(steps, told, "{level} {step_type}");
        }
        let end = lines.last().unwrap();
        assert_eq!((end["steps"].as_u64(), end["steps_told"].as_u64()), (Some(7), Some(told.len() as u64)));
    }
}

/// Names the file that a child of this test logs to, and what it does all the while.
const CHILD: &str = "SESSION_LOG_TEST_CHILD";
const DOING: &str = "SESSION_LOG_TEST_DOING";

/// Nothing but writing, so that a kill meets a write.
fn log_without_pause(probe: &Probe, listener: &Listener<SessionLog>) {
    probe.emit(|| Event::ModelOpened(Arc::default()));
    for index in 0.. {
        let since = Duration::from_micros(3);
        probe.emit(|| Event::Sampled { request: 5, token: 9, index, since, duration: since });
        if index % 500 == 0 {
            listener.flush();
        }
    }
}

#[test]
fn a_killed_process_leaves_whole_lines() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    if let Some(path) = std::env::var_os(CHILD) {
        let options = SessionLogOptions {
            level: SessionLogLevel::Verbose,
            max_bytes: Some(300_000),
            keep: 4,
            ..SessionLogOptions::new(path)
        };
        let (queue, listener) = start(options);
        if std::env::var_os(DOING).is_some_and(|doing| doing == "writing") {
            log_without_pause(&Probe::new(queue), &listener);
            return;
        }
        runtime().block_on(async {
            let options = ExecutorOptions { probe: Probe::new(queue), ..ExecutorOptions::default() };
            let executor = executor_with(DEMO_MODEL, "cpu,cpu", None, options).await.unwrap();
            loop {
                executor.infer_batch_with(&[PROMPT.to_vec(), vec![7; 300]], &greedy(50)).await.unwrap();
            }
        });
        return;
    }
    let validator = validator();
    let mut most_files = 0;
    for round in 0..24_u64 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("killed.jsonl");
        let files = || -> Vec<_> { std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect() };
        let bytes = || -> u64 { files().iter().filter_map(|file| Some(file.metadata().ok()?.len())).sum() };
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_killed_process_leaves_whole_lines", "--nocapture"])
            .env(CHILD, &path)
            .env(DOING, if round % 2 == 0 { "computing" } else { "writing" })
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // From the loading of the model to the middle of a run, and a few files on.
        let enough = rand::random_range(0..=30_000 * round);
        while bytes() < enough {
            assert!(child.try_wait().unwrap().is_none(), "the child has ended by itself");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(rand::random_range(0..=30_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        most_files = most_files.max(files().len());
        for file in files() {
            let lines = lines(&file, &validator);
            assert!(lines.first().is_none_or(|line| line["event"] == "session_start"), "{}", file.display());
        }
    }
    assert!(most_files > 1, "the run was long enough for a second file");
}
