//! Ctrl-C: the first one ends the generation that runs where a program says so, and the program elsewhere; logs are
//! finished in both cases. A second one within [`AGAIN`] ends the program whatever it does.

use std::future::Future;
use std::process;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::oneshot::{Receiver, Sender, channel};

use super::output::{INTERRUPTED, Interrupted};

/// Two within this time mean the program.
const AGAIN: Duration = Duration::from_secs(1);

/// How long the program has for its end, before it is ended. It may be in the middle of computing something.
const GRACE: Duration = Duration::from_secs(2);

/// The generation that the next Ctrl-C is for.
static GENERATION: Mutex<Option<Sender<()>>> = Mutex::new(None);

/// The next Ctrl-C comes here and the program goes on, for as long as the receiver lives.
pub fn claim() -> Receiver<()> {
    let (sender, receiver) = channel();
    *GENERATION.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
    receiver
}

/// Whether there was a generation to end.
fn end_generation() -> bool {
    let claimed = GENERATION.lock().unwrap_or_else(PoisonError::into_inner).take();
    claimed.is_some_and(|generation| generation.send(()).is_ok())
}

/// Runs a program until it ends or is interrupted, which drops it and with it what it runs.
pub async fn run(program: impl Future<Output = Result<()>>) -> Result<()> {
    let (stop, stopped) = channel();
    // A task of its own: the program may compute for long without coming back to its caller.
    tokio::spawn(listen(stop));
    tokio::select! {
        result = program => result,
        Ok(()) = stopped => Err(Interrupted.into()),
    }
}

async fn listen(stop: Sender<()>) {
    let mut stop = Some(stop);
    let mut last: Option<Instant> = None;
    // Where nobody can listen Ctrl-C ends the process as ever.
    while tokio::signal::ctrl_c().await.is_ok() {
        let again = last.replace(Instant::now()).is_some_and(|last| last.elapsed() < AGAIN);
        if !again && stop.is_some() && end_generation() {
            continue;
        }
        let Some(stop) = stop.take() else { process::exit(INTERRUPTED.into()) };
        let _ = stop.send(());
        tokio::spawn(async {
            tokio::time::sleep(GRACE).await;
            process::exit(INTERRUPTED.into());
        });
    }
}
