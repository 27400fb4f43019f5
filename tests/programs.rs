//! The examples as processes: what they do where outputs cannot be written, files are not what they should be, and users
//! press Ctrl-C.
#![cfg(unix)]

mod common;

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use candle_pipeline::{DEMO_MODEL, Generation, GenerationOptions};
use common::executor;
use common::programs::{Ended, command, end, run_example};
use serde_json::Value;

/// Every program that prints, with arguments that keep it short. `FOLDER` is a folder for files.
const PROGRAMS: &[(&str, &[&str])] = &[
    ("test_pipeline", &["--max-tokens", "300", "--ignore-eos"]),
    ("test_batch_inference", &["--max-tokens", "20", "--compare"]),
    ("test_streaming_inference", &["--max-tokens", "300", "--ignore-eos"]),
    ("stage_timeline", &["--steps", "3"]),
    ("inspect_model", &[]),
    ("bench_batch", &["--cases", "4:0,4:2"]),
    ("plan_pipeline", &["--devices", "cpu@threads=1", "--context", "16", "--cost-cache", "FOLDER/costs.json"]),
    ("collector_overhead", &["--loads", "1", "--pairs", "1", "--tokens", "8", "--only", "off"]),
    ("benchmark_metal_optimizations", &["--pairs", "1", "--loads", "1", "--prompt-tokens", "8"]),
    ("accuracy", &["--tokens", "20", "--types", "q8_0"]),
    ("profile_pipeline", &["--quick", "--phases", "tokens", "--token-counts", "5", "--runs", "1"]),
    ("trace_model", &["--max-tokens", "2"]),
    ("read_bandwidth", &["--mebibytes", "8", "--passes", "1", "--threads", "1"]),
];

fn each_program(check: impl Fn(&str, Command)) {
    let folder = tempfile::tempdir().unwrap();
    for (name, arguments) in PROGRAMS {
        let folder = folder.path().to_str().unwrap();
        let arguments: Vec<String> = arguments.iter().map(|argument| argument.replace("FOLDER", folder)).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        check(name, command(name, &arguments));
    }
}

#[cfg(target_os = "linux")]
fn full() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

/// The last line of stderr, where errors stand.
fn last_line(ended: &Ended) -> &str {
    ended.stderr.lines().last().unwrap_or_default()
}

#[test]
fn a_reader_that_leaves_ends_every_program_quietly() {
    each_program(|name, mut command| {
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(process.stdout.take());
        let ended = end(process);
        assert_eq!(ended.code, Some(0), "{name}: {}", ended.stderr);
        for word in ["panicked", "error", "Broken pipe"] {
            assert!(!ended.stderr.contains(word), "{name}: {}", ended.stderr);
        }
    });
}

#[test]
fn a_reader_of_30_bytes_has_them_and_the_log_its_end() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let path = log.path().to_str().unwrap();
    let long = ["--max-tokens", "400", "--ignore-eos", "--session-log", path];
    let mut process = command("test_pipeline", &long).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut begin = [0; 30];
    process.stdout.take().unwrap().read_exact(&mut begin).unwrap();
    let ended = end(process);
    assert!(begin.starts_with(b"Once upon a time"));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let log = fs::read_to_string(log.path()).unwrap();
    assert!(log.trim_end().lines().last().unwrap().contains("session_end"), "the log is finished");
}

#[cfg(target_os = "linux")]
#[test]
fn full_outputs_end_every_program_without_a_panic() {
    each_program(|name, mut command| {
        let ended = end(command.stdout(full()).stderr(Stdio::piped()).spawn().unwrap());
        assert_eq!(ended.code, Some(1), "{name}: {}", ended.stderr);
        let expected = "error: cannot write to stdout: No space left on device (os error 28)";
        assert_eq!(last_line(&ended), expected, "{name}: {}", ended.stderr);
        assert_eq!(end(command.stdout(full()).stderr(full()).spawn().unwrap()).code, Some(1), "{name}");
    });
    let mut quiet = command("test_pipeline", &["--max-tokens", "4"]);
    let ended = end(quiet.stdout(Stdio::piped()).stderr(full()).spawn().unwrap());
    assert_eq!(ended.code, Some(0), "what stderr does not take is lost, and no more");
    assert!(ended.stdout.starts_with("Once upon a time"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_log_that_is_not_written_is_an_error_at_the_end() {
    for flag in ["--session-log", "--chrome-trace"] {
        let whole = run_example("test_pipeline", &["--max-tokens", "20"]);
        let ended = run_example("test_pipeline", &["--max-tokens", "20", flag, "/dev/full"]);
        assert_eq!(ended.stdout, whole.stdout, "generation goes on");
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        let warned = ended.stderr.matches("warning: /dev/full: cannot be written: No space left").count();
        assert_eq!(warned, 1, "{}", ended.stderr);
        let error = last_line(&ended);
        assert!(error.starts_with(&format!("error: {flag} /dev/full: ")), "{error}");
        assert!(error.contains(" lines not written: No space left"), "{error}");
        let lines = error.split_whitespace().find_map(|word| word.parse::<u64>().ok());
        assert!(lines.is_some_and(|lines| lines > 20), "{error}");
    }
    for (name, flag) in
        [("test_batch_inference", "--prometheus"), ("trace_model", "--json"), ("profile_pipeline", "--plot")]
    {
        let (_, arguments) = PROGRAMS.iter().find(|(program, _)| *program == name).unwrap();
        let ended = run_example(name, &[arguments, &[flag, "/dev/full"][..]].concat());
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        let error = last_line(&ended);
        assert!(error.starts_with(&format!("error: {flag} /dev/full: cannot be written: No space")), "{error}");
    }
}

#[test]
fn costs_that_cannot_be_kept_are_an_error_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let letter = folder.path().join("letter");
    fs::write(&letter, "Dear all").unwrap();
    let plan = ["--devices", "cpu@threads=1", "--context", "16", "--cost-cache", letter.to_str().unwrap()];
    let ended = run_example("plan_pipeline", &plan);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(!ended.stdout.is_empty(), "the plan is printed all the same");
    assert_eq!(ended.stderr.matches("warning: ").count(), 1, "{}", ended.stderr);
    let error = last_line(&ended);
    assert!(error.starts_with("error: --cost-cache ") && error.contains("something else"), "{error}");
    assert_eq!(fs::read_to_string(&letter).unwrap(), "Dear all");
}

#[test]
fn outputs_replace_only_what_they_wrote() {
    let folder = tempfile::tempdir().unwrap();
    let short = |name: &str| PROGRAMS.iter().find(|(program, _)| *program == name).unwrap().1;
    let tiny = &["--shape", "custom", "--hidden-size", "64", "--intermediate-size", "64", "--layers", "1"][..];
    let cases: [(&str, &[&str], &str, &str); 7] = [
        ("test_pipeline", &["--max-tokens", "4"], "--session-log", "session.jsonl"),
        ("test_pipeline", &["--max-tokens", "4"], "--chrome-trace", "chrome.json"),
        ("test_batch_inference", short("test_batch_inference"), "--prometheus", "metrics.prom"),
        ("trace_model", short("trace_model"), "--json", "report.json"),
        ("profile_pipeline", short("profile_pipeline"), "--plot", "plot.svg"),
        ("make_model", tiny, "--out", "model.gguf"),
        ("make_model", tiny, "--out", "model"),
    ];
    for (name, arguments, flag, file) in cases {
        let path = folder.path().join(file);
        let with_flag = [arguments, &[flag, path.to_str().unwrap()]].concat();
        for attempt in ["first", "again"] {
            let ended = run_example(name, &with_flag);
            assert_eq!(ended.code, Some(0), "{name} {flag} {attempt}: {}", ended.stderr);
        }
        let written = if path.is_dir() { path.join("config.json") } else { path.clone() };
        assert!(written.metadata().unwrap().len() > 0);
        fs::write(&written, "{ \"Dear\": \"all\" }").unwrap();
        let ended = run_example(name, &with_flag);
        assert_eq!(ended.code, Some(1), "{name} {flag}: {}", ended.stderr);
        assert_eq!(ended.stdout, "", "{name} {flag}: it is refused before anything is done");
        let error = last_line(&ended);
        assert!(error.contains("holds something else") && error.contains(file), "{name} {flag}: {error}");
        assert_eq!(fs::read_to_string(&written).unwrap(), "{ \"Dear\": \"all\" }");
    }
}

#[test]
fn prompts_come_from_regular_files_or_standard_input() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    assert!(Command::new("mkfifo").arg(path("pipe")).status().unwrap().success());
    fs::write(path("latin1"), b"\xe9t\xe9").unwrap();
    fs::File::create(path("huge")).unwrap().set_len(65 << 20).unwrap();
    for (file, why) in [
        (path("pipe"), "not a regular file"),
        ("/dev/zero".into(), "not a regular file"),
        (folder.path().to_str().unwrap().into(), "not a regular file"),
        (path("latin1"), "UTF-8"),
        (path("huge"), "longer than 64 MiB"),
        (path("missing"), "No such file"),
    ] {
        let ended = run_example("test_pipeline", &["--prompt-file", &file]);
        assert!(ended.code.is_some_and(|code| code > 0) && ended.stdout.is_empty(), "{file}: {ended:?}");
        assert!(ended.stderr.contains(&file) && ended.stderr.contains(why), "{file}: {}", ended.stderr);
    }
    for (flag, name) in [("--baseline", "profile_pipeline"), ("--text", "accuracy")] {
        let ended = run_example(name, &[flag, &path("pipe")]);
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        assert!(last_line(&ended).contains("not a regular file"), "{}", ended.stderr);
    }
    fs::write(path("prompt"), "One day").unwrap();
    let from_file = run_example("test_pipeline", &["--max-tokens", "5", "--prompt-file", &path("prompt")]);
    assert!(from_file.stdout.starts_with("One day"), "{from_file:?}");
    let mut command = command("test_pipeline", &["--max-tokens", "5", "--prompt-file", "-"]);
    let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    process.stdin.take().unwrap().write_all(b"One day").unwrap();
    assert_eq!(end(process).stdout, from_file.stdout);
}

#[test]
fn options_are_checked_before_anything_is_printed() {
    let long = "word ".repeat(2000);
    for (arguments, why) in [
        (&["--temperature", "nan"][..], "temperature"),
        (&["--top-p", "0"], "top_p"),
        (&["--min-p", "2"], "min_p"),
        (&["--repetition-penalty", "0"], "repetition_penalty"),
        (&["--presence-penalty", "inf"], "presence_penalty"),
        (&["--frequency-penalty", "nan"], "frequency_penalty"),
        (&["--stop", ""], "stop_strings"),
        (&["--deadline", "-1"], "--deadline"),
        (&["--temperature", "-1"], "temperature"),
        (&["--link", "0,1e-300"], "byte a second"),
        (&["--devices", "cpu@threads=9999"], "1 to 1024"),
        (&["--prompt", &long], "prompt"),
    ] {
        for name in ["test_pipeline", "test_streaming_inference", "test_batch_inference"] {
            let ended = run_example(name, arguments);
            assert!(ended.code.is_some_and(|code| code > 0), "{name} {arguments:?}: {ended:?}");
            assert_eq!(ended.stdout, "", "{name} {arguments:?}");
            assert!(ended.stderr.contains(why) && !ended.stderr.contains("panicked"), "{}", ended.stderr);
        }
    }
}

#[test]
fn more_threads_than_cores_are_warned_of() {
    let cores = std::thread::available_parallelism().unwrap().get();
    let device = format!("cpu@threads={}", cores + 1);
    for (name, more) in [("test_pipeline", &["--max-tokens", "1"][..]), ("inspect_model", &[])] {
        let ended = run_example(name, &[&["--devices", &device], more].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let warning = format!("warning: {device}: this process may use {cores} cores");
        assert_eq!(ended.stderr.matches(&warning).count(), 1, "{name}: {}", ended.stderr);
        let few = run_example(name, &[&["--devices", "cpu@threads=1"], more].concat());
        assert!(!few.stderr.contains("warning"), "{name}: {}", few.stderr);
    }
}

/// What test_pipeline prints as JSON.
fn generate(arguments: &[&str]) -> Value {
    let ended = run_example("test_pipeline", &[&["--output-format", "json"], arguments].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    serde_json::from_str(&ended.stdout).unwrap()
}

fn tokens(json: &Value) -> Vec<u32> {
    json["tokens"].as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32).collect()
}

#[tokio::test]
async fn flags_of_a_generation_do_what_its_options_do() {
    let executor = executor(DEMO_MODEL, "cpu,cpu", None).await.unwrap();
    let prompt = executor.tokenizer().unwrap().encode("Once upon a time", true).unwrap();
    let expected =
        async |options: GenerationOptions| -> Generation { executor.infer_with(&prompt, &options).await.unwrap() };
    let plain = GenerationOptions::new(40, 0.0, 1.0);
    let random = GenerationOptions { seed: Some(3), temperature: 1.5, ..plain.clone() };
    let greedy = expected(plain.clone()).await.tokens;
    let sampled = expected(random.clone()).await.tokens;
    let limit = &["--kv-type", "f32", "--max-tokens", "40"][..];
    let seeded = &[limit, &["--temperature", "1.5", "--seed", "3"]].concat();
    let stop_ids = format!("7,{}", greedy[10]);
    let cases: [(&[&str], GenerationOptions, &[u32]); 7] = [
        (limit, plain.clone(), &[]),
        (
            &[limit, &["--repetition-penalty", "1.8"]].concat(),
            GenerationOptions { repetition_penalty: 1.8, ..plain.clone() },
            &greedy,
        ),
        (
            &[limit, &["--presence-penalty", "-3.5"]].concat(),
            GenerationOptions { presence_penalty: -3.5, ..plain.clone() },
            &greedy,
        ),
        (
            &[limit, &["--frequency-penalty", "2"]].concat(),
            GenerationOptions { frequency_penalty: 2.0, ..plain.clone() },
            &greedy,
        ),
        (&[seeded, &["--min-p", "0.3"][..]].concat(), GenerationOptions { min_p: 0.3, ..random.clone() }, &sampled),
        (
            &[limit, &["--stop-token", &stop_ids]].concat(),
            GenerationOptions { stop_tokens: vec![7, greedy[10]], ..plain.clone() },
            &greedy,
        ),
        (&[seeded, &["--top-k", "2"][..]].concat(), GenerationOptions { top_k: Some(2), ..random }, &sampled),
    ];
    for (arguments, options, differs) in cases {
        let found = tokens(&generate(arguments));
        assert_eq!(found, expected(options).await.tokens, "{arguments:?}");
        assert_ne!(found, differs, "{arguments:?} changes nothing");
    }

    let whole = generate(limit);
    let text = whole["text"].as_str().unwrap();
    let (before, after) = text.split_at(text.match_indices(' ').nth(6).unwrap().0);
    let stop: String = after.chars().take(6).collect();
    let stopped = generate(&[limit, &["--stop", "not in it", "--stop", &stop]].concat());
    assert_eq!(stopped["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap()], "{before:?} {stop:?}");
    assert_eq!(stopped["finish_reason"], "stop");

    let late = generate(&[limit, &["--deadline", "0"]].concat());
    assert_eq!((late["finish_reason"].as_str(), tokens(&late)), (Some("deadline"), vec![]));
}

#[tokio::test]
async fn log_probabilities_stand_in_the_json_when_asked_for() {
    let executor = executor(DEMO_MODEL, "cpu,cpu", None).await.unwrap();
    let prompt = executor.tokenizer().unwrap().encode("Once upon a time", true).unwrap();
    let options = GenerationOptions { logprobs: Some(2), ..GenerationOptions::new(6, 0.0, 1.0) };
    let expected = serde_json::json!(executor.infer_with(&prompt, &options).await.unwrap().logprobs);
    assert_eq!(expected.as_array().unwrap().len(), 6);
    let limit = ["--kv-type", "f32", "--max-tokens", "6", "--prompt", "Once upon a time"];
    let asked = [&limit[..], &["--logprobs", "2"]].concat();
    assert_eq!(generate(&asked[..])["logprobs"], expected);
    assert!(generate(&limit[..])["logprobs"].is_null(), "nobody asked");
    let asked = [&asked[..], &["--output-format", "json"]].concat();
    let batch: Value = serde_json::from_str(&run_example("test_batch_inference", &asked).stdout).unwrap();
    assert_eq!(batch["sequences"][0]["logprobs"], expected);
    let streamed = run_example("test_streaming_inference", &asked).stdout;
    for (line, expected) in streamed.lines().zip(expected.as_array().unwrap()) {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!((&line["logprob"], &line["top_logprobs"]), (&expected["logprob"], &expected["top"]));
    }
}

#[test]
fn prefixes_are_reused_unless_told_otherwise() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let story = "Once upon a time, there was a little dog who lived in a house by the sea with a big red ball.";
    let prompts = ["--prompt", story, "--prompt", story, "--max-tokens", "3"];
    for (more, reused) in [(&[][..], true), (&["--no-prefix-reuse"], false)] {
        let log_to = ["--session-log", log.path().to_str().unwrap()];
        let ended = run_example("test_streaming_inference", &[&prompts[..], &log_to, more].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let lines = fs::read_to_string(log.path()).unwrap();
        assert_eq!(lines.contains("\"prefix_reused\""), reused, "{more:?}");
        fs::write(log.path(), "").unwrap();
    }
}

/// A program that takes seconds, which gets a SIGINT `times` times once it has printed something to stdout or, where that
/// is not `spoken`, once it is ready.
fn interrupt(name: &str, arguments: &[&str], spoken: bool, times: usize) -> Ended {
    let slow = ["--link", "40", "--max-tokens", "100", "--ignore-eos"];
    let mut command = command(name, &[&slow, arguments].concat());
    let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = Vec::new();
    let mut wait = |pipe: &mut dyn Read, text: &str| {
        let mut byte = [0];
        while !String::from_utf8_lossy(&said).contains(text) && pipe.read(&mut byte).unwrap() > 0 {
            said.push(byte[0]);
        }
        std::mem::take(&mut said)
    };
    let said = wait(process.stderr.as_mut().unwrap(), "ready in");
    let printed = if spoken { wait(process.stdout.as_mut().unwrap(), " ") } else { Vec::new() };
    // Well into the generation.
    std::thread::sleep(std::time::Duration::from_millis(300));
    for _ in 0..times {
        let kill = Command::new("kill").args(["-INT", &process.id().to_string()]).status().unwrap();
        assert!(kill.success());
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let mut ended = end(process);
    ended.stdout.insert_str(0, &String::from_utf8_lossy(&printed));
    ended.stderr.insert_str(0, &String::from_utf8_lossy(&said));
    ended
}

fn finished_log(path: &Path) -> String {
    let log = fs::read_to_string(path).unwrap();
    assert!(log.trim_end().lines().last().unwrap().contains("\"session_end\""), "{log}");
    assert!(log.contains("\"outcome\":\"cancelled\"") && !log.contains("\"outcome\":\"failed\""), "{log}");
    log
}

#[test]
fn ctrl_c_ends_the_running_prompt_and_a_second_one_the_program() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let prompts = ["--prompt", "Once upon", "--prompt", "One day", "--session-log", log.path().to_str().unwrap()];
    let once = interrupt("test_streaming_inference", &prompts, true, 1);
    assert_eq!(once.code, Some(0), "{}", once.stderr);
    let generated: Vec<usize> =
        once.stderr.lines().filter_map(|line| line.split_once(" tokens in ")?.0.parse().ok()).collect();
    assert!(matches!(generated[..], [cut, 100] if cut < 100), "{}", once.stderr);
    finished_log(log.path());
    let twice = interrupt("test_streaming_inference", &prompts, true, 2);
    assert_eq!(twice.code, Some(130), "{}", twice.stderr);
    finished_log(log.path());
}

#[test]
fn ctrl_c_leaves_whole_outputs_and_logs() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let logged = ["--session-log", log.path().to_str().unwrap()];
    let ended = interrupt("test_pipeline", &[&logged[..], &["--output-format", "json"]].concat(), false, 1);
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    let json: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(json["finish_reason"], "cancelled");
    assert!((1..100).contains(&tokens(&json).len()), "{json}");
    finished_log(log.path());
    let ended = interrupt("test_batch_inference", &logged, false, 1);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(130), ""), "{}", ended.stderr);
    finished_log(log.path());
}
