//! The dashboard says why it does not start, wherever that goes.
#![cfg(target_os = "linux")]

use std::fs::OpenOptions;
use std::process::{Command, Stdio};

#[test]
fn without_a_terminal_it_ends_with_an_error_and_no_panic() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dashboard"));
    let output = command.stdin(Stdio::null()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.starts_with("error: the dashboard needs a terminal"), "{errors}");
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    assert_eq!(command.stderr(full).status().unwrap().code(), Some(1));
}
