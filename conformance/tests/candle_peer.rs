//! `candle_peer` measures, and ends quietly where nobody reads what it prints.
#![cfg(unix)]

use std::path::Path;
use std::process::{Command, Stdio};

use candle_pipeline::DEMO_MODEL;

/// The program, which `cargo test` builds beside the tests.
fn candle_peer(more: &[&str]) -> Command {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let mut command = Command::new(profile.join("examples/candle_peer"));
    command.args(["--model", DEMO_MODEL, "--cases", "4:2"]).args(more).env_remove("RUST_BACKTRACE");
    command
}

#[test]
fn a_reader_that_leaves_ends_candle_peer_quietly() {
    let whole = candle_peer(&["--json"]).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&whole.stdout).unwrap();
    assert_eq!(json["cases"][0]["case"], "4:2:1");
    let mut process = candle_peer(&[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(process.stdout.take());
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let missing = Command::new(candle_peer(&[]).get_program()).args(["--model", "/no/such"]).output().unwrap();
    let errors = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(missing.status.code() == Some(1) && errors.starts_with("error: /no/such"), "{errors}");
}
