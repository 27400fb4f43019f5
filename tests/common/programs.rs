//! Runs the examples as processes, each within a time limit.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// An example's program, which `cargo test` builds beside the tests.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let program = profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(
        program.exists(),
        "{} is not built: run `cargo test`, or `cargo build --examples` first",
        program.display()
    );
    program
}

/// A command for an example, without what the environment would change of it.
pub fn command(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(example(name));
    command.args(arguments).env_remove("RUST_BACKTRACE").env_remove("METRICS_LOG_ENABLED").stdin(Stdio::null());
    command
}

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Longer than any program here takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs a command to its end. Its stdout and stderr are captured where it does not say otherwise.
pub fn run(mut command: Command) -> Ended {
    end(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// Waits for a process, reading what it writes.
pub fn end(mut process: Child) -> Ended {
    fn reader(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                pipe.read_to_end(&mut bytes).unwrap();
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    }
    let (stdout, stderr) = (reader(process.stdout.take()), reader(process.stderr.take()));
    let began = Instant::now();
    let code = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break status.code();
        }
        if began.elapsed() > LIMIT {
            let _ = process.kill();
            panic!("a program runs for longer than {LIMIT:?}: {}", stderr.join().unwrap());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Ended { code, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// Runs an example with arguments.
pub fn run_example(name: &str, arguments: &[&str]) -> Ended {
    run(command(name, arguments))
}
