//! What programs print, and how they end. Nothing here panics: a reader that closes stdout ends the program quietly, a
//! full disk behind it ends it with an error, and what stderr does not take is lost.

use std::fmt::{self, Display};
use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Result;
use candle_pipeline::error::one_line;

/// Exit code of a program that Ctrl-C has ended, as shells have it: 128 and the signal's number.
pub const INTERRUPTED: u8 = 130;

/// Stdout does not take what is printed.
#[derive(Debug)]
pub struct StdoutError(io::Error);

impl Display for StdoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot write to stdout: {}", self.0)
    }
}

impl std::error::Error for StdoutError {}

/// Ctrl-C has ended what the program did.
#[derive(Debug)]
pub struct Interrupted;

impl Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Prints to stdout at once. An error is to end the program: it goes to [`exit`].
pub fn print(text: impl Display) -> Result<(), StdoutError> {
    // Whole, so that a text whose formatting fails half-way is not printed.
    let text = text.to_string();
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(StdoutError)
}

/// Prints a line to stdout.
pub fn print_line(line: impl Display) -> Result<(), StdoutError> {
    print(format_args!("{line}\n"))
}

/// Prints to stderr.
pub fn note(text: impl Display) {
    let _ = io::stderr().lock().write_all(text.to_string().as_bytes());
}

/// Prints a line to stderr.
pub fn note_line(line: impl Display) {
    note(format_args!("{line}\n"));
}

/// Ends a program: an error is one line on stderr, whatever RUST_BACKTRACE says, since it is meant for the user.
///
/// A closed stdout is no error: whoever closed it has read enough. The exit code is 0 then, so that
/// `set -o pipefail` accepts `program | head`.
pub fn exit(result: Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    if error.is::<Interrupted>() {
        return ExitCode::from(INTERRUPTED);
    }
    if let Some(StdoutError(cause)) = error.downcast_ref()
        && cause.kind() == io::ErrorKind::BrokenPipe
    {
        return ExitCode::SUCCESS;
    }
    let text = format!("{error:#}");
    // The library's own message may be a table; those of other libraries may carry escapes or a backtrace.
    let is_own = error.is::<candle_pipeline::Error>();
    note_line(format_args!("error: {}", if is_own { text } else { one_line(&text) }));
    ExitCode::FAILURE
}
