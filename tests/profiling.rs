//! The profiling examples tell what is there, and compare it soundly. Their pure parts are compiled in here, since cargo
//! runs no tests of examples.

mod common;

#[allow(dead_code)] // the example uses the rest
#[path = "../examples/profile_pipeline/baseline.rs"]
mod baseline;
#[allow(dead_code)]
#[path = "../examples/profile_pipeline/events.rs"]
mod events;
#[allow(dead_code)]
#[path = "../examples/profile_pipeline/others.rs"]
mod others;
#[allow(dead_code)]
#[path = "../examples/common/ratio.rs"]
mod ratio;

use std::process::{Command, Output};

use common::programs::example;
use serde_json::Value;

fn run(name: &str, arguments: &[&str]) -> Output {
    Command::new(example(name)).args(arguments).env_remove("RUST_BACKTRACE").output().unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(json: &Value, path: &str) -> f64 {
    json.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no number at {path} in {json:#}"))
}

#[test]
fn a_profile_has_every_phase_and_its_times_fit_together() {
    let plot = tempfile::NamedTempFile::with_suffix(".svg").unwrap();
    let path = plot.path().to_str().unwrap();
    let profile = json(&run("profile_pipeline", &["--quick", "--json", "--plot", path, "--devices", "cpu,cpu"]));
    for key in ["model", "stages", "identity", "load_us", "warmup_us", "read_bandwidth", "quantities", "phases"] {
        assert!(!profile[key].is_null(), "{key}");
    }
    // The sustained phase stands at the top: 8 runs of 20 tokens.
    assert_eq!((number(&profile, "/runs"), number(&profile, "/output_tokens")), (8.0, 160.0));
    for key in
        ["input_tokens", "total_us", "tokens_per_second", "prefill_tokens_per_second", "decode_tokens_per_second"]
    {
        assert!(number(&profile, &format!("/{key}")) > 0.0, "{key}");
    }
    assert_eq!(number(&profile, "/itl/samples"), 152.0);
    let percentiles = ["p50_us", "p95_us", "p99_us", "max_us"].map(|p| number(&profile, &format!("/itl/{p}")));
    assert!(percentiles.is_sorted() && percentiles[0] > 0.0, "{percentiles:?}");
    assert_eq!(number(&profile, "/ttft/samples"), 8.0);
    assert!(profile["ttft"]["p99_us"].is_null() && profile["ttft"]["p95_us"].is_null(), "8 samples have none");

    for started in ["cold", "warm"] {
        let processes = profile["phases"]["warmup"][started].as_array().unwrap();
        assert_eq!(processes.len(), 2);
        for process in processes {
            assert_eq!(process["warmup_us"].is_null(), started == "cold");
            assert!(number(process, "/ttft_us/0") > 0.0 && number(process, "/ttft_us/1") > 0.0);
        }
    }
    let outputs: Vec<_> =
        profile["phases"]["tokens"].as_array().unwrap().iter().map(|case| &case["output_tokens"]).collect();
    assert_eq!(outputs, [5, 10, 20, 50]);
    let inputs: Vec<_> =
        profile["phases"]["input"].as_array().unwrap().iter().map(|case| &case["input_tokens"]).collect();
    assert_eq!(inputs, [4, 8, 16, 64, 256], "1024 are more than the context");
    for case in profile["phases"]["input"].as_array().unwrap() {
        let mean = |part: &str| number(case, &format!("/{part}/mean_us"));
        let parts = mean("queue") + mean("prefill") + mean("first_sample");
        // Three means of whole microseconds against one; the token may reach its caller before its event is told.
        assert!(mean("prefill") > 0.0 && parts <= 1.5 * mean("ttft") + 1000.0, "{case:#}");
    }
    let batch = &profile["phases"]["batch"];
    assert_eq!((number(batch, "/sequences"), number(batch, "/runs")), (4.0, 8.0));
    assert!(number(batch, "/gain") > 0.1, "{batch:#}");
    let steps = profile["decode_steps"].as_array().unwrap();
    assert_eq!(steps.len(), 2);
    for stage in steps {
        assert_eq!(number(stage, "/steps"), 152.0, "a step for each token behind the first");
        // Each step reads the weights and the KV of the positions so far.
        assert!(number(stage, "/bytes_read") > 152.0 * number(stage, "/step_bytes"));
        assert!(number(stage, "/compute_us_per_token") > 0.0);
    }
    assert!(number(&profile, "/bandwidth_share") > 0.0);
    let drawing = std::fs::read_to_string(plot.path()).unwrap();
    assert!(drawing.starts_with("<svg") && drawing.contains("What the stages computed when"));
}

#[test]
fn a_baseline_of_the_same_passes_and_one_that_was_faster_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, json: &Value| {
        let path = folder.path().join(name);
        std::fs::write(&path, json.to_string()).unwrap();
        path.to_str().unwrap().to_string()
    };
    let measure = ["--quick", "--phases", "sustained,tokens", "--token-counts", "5", "--devices", "cpu"];
    let profile = json(&run("profile_pipeline", &[&measure[..], &["--json"]].concat()));
    let against = |path: &str, more: &[&str]| {
        let output = run("profile_pipeline", &[&measure[..], &["--baseline", path], more].concat());
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), errors, String::from_utf8_lossy(&output.stdout).into_owned())
    };
    // Other tests, or other programs, keep the machine busy meanwhile, and can stall a few runs of half a millisecond for
    // 20 times as long. No stall reaches the tolerance here, a factor of ten million, and what is to alarm is a factor of
    // a billion; `baseline.rs` has the tests of smaller differences, on times that are no clock's.
    const TOLERANCE: &str = "1e9";
    let scaled = |name: &str, factor: f64| {
        let mut scaled = profile.clone();
        for value in scaled["quantities"][name].as_array_mut().unwrap() {
            *value = (value.as_f64().unwrap() * factor).into();
        }
        scaled
    };
    let (code, errors, text) = against(&file("same", &profile), &["--tolerance", TOLERANCE]);
    assert_eq!(code, Some(0), "{errors}{text}");
    assert!(text.contains("within noise") && text.contains("plain read"), "{text}");

    let (code, errors, text) = against(&file("faster", &scaled("sustained.itl", 1e-9)), &["--tolerance", TOLERANCE]);
    assert_eq!(code, Some(1), "{errors}{text}");
    let last = errors.lines().last().unwrap();
    assert!(last.contains("slower than the baseline: sustained.itl by"), "{errors}");
    assert!(!last.contains("sustained.ttft") && !last.contains("tokens.5"), "{errors}");

    let mut other = profile.clone();
    other["identity"]["machine"] = "an abacus".into();
    let other = file("other", &other);
    let (code, errors, _) = against(&other, &["--tolerance", TOLERANCE]);
    assert_eq!(code, Some(1));
    assert!(errors.contains("machine: `an abacus` in the baseline") && errors.contains("--force"), "{errors}");
    assert_eq!(against(&other, &["--tolerance", TOLERANCE, "--force"]).0, Some(0));

    let (code, errors, _) = against(&file("wrong", &serde_json::json!({ "a": 1 })), &[]);
    assert_eq!(code, Some(1));
    assert!(errors.contains("wrong is not what `profile_pipeline --json` prints"), "{errors}");
}

#[test]
fn what_tables_masks_and_warmup_gain_is_measured_without_metal_too() {
    let arguments = ["--pairs", "6", "--loads", "1", "--devices", "cpu", "--prompt-tokens", "32", "--json"];
    let output = json(&run("benchmark_metal_optimizations", &arguments));
    assert!(output["cannot"][0].as_str().unwrap().contains("no Metal device"), "{output:#}");
    let measured = output["devices"][0]["measured"].as_array().unwrap();
    let names: Vec<_> =
        measured.iter().map(|m| (m["what"].as_str().unwrap(), m["backend"].as_str().unwrap())).collect();
    let tables = ("rotary tables", "cpu");
    let candle = ("rotary tables", "candle");
    assert_eq!(names, [tables, tables, candle, candle, ("masks", "candle"), ("warmup", "cpu")]);
    for one in measured {
        let ratio = |field: &str| number(one, &format!("/without_over_with/{field}"));
        assert!(ratio("first") > 0.0 && ratio("second") > 0.0, "{one:#}");
        let interval = &one["without_over_with"]["interval"];
        assert_eq!(interval.is_null(), one["what"] == "warmup", "one pair has none");
        assert!(interval.is_null() || interval[0].as_f64() <= interval[1].as_f64(), "{one:#}");
    }
}

#[test]
fn overheads_are_measured_by_name() {
    let few = ["--loads", "1", "--pairs", "2", "--tokens", "8", "--json"];
    let output = json(&run("collector_overhead", &[&few[..], &["--only", "off,phases"]].concat()));
    let rows = output["configurations"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["off", "phases"]);
    for row in rows {
        assert_eq!(number(row, "/pairs"), 2.0);
        assert!(number(row, "/on_over_off/first") > 0.0 && number(row, "/on_over_off/ratio") > 0.0, "{row:#}");
    }
    let unknown = run("collector_overhead", &["--only", "everything"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("there are off, events"));
}
