//! The program prints what is compiled, and ends quietly where nobody reads it.
#![cfg(unix)]

use std::process::{Command, Stdio};

#[test]
fn the_program_prints_cpp_and_bears_a_closed_output() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_msl2cpp"));
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../metal-ext/kernels/attention.metal"));
    let printed = command.output().unwrap();
    assert!(printed.status.success() && printed.stdout.len() > 1000, "{printed:?}");
    let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(process.stdout.take());
    let output = process.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !errors.contains("panicked"), "{errors}");
    let refused = Command::new(env!("CARGO_BIN_EXE_msl2cpp")).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
}
