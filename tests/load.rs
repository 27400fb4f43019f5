//! A thousand requests, alone in this process so that its threads can be counted.

mod common;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use candle_pipeline::instrument::{Collector, Event, Probe, Record};
use candle_pipeline::{DEMO_MODEL, ExecutorOptions, FinishReason, GenerationEvent, GenerationOptions};
use common::{assert_memory_returns, executor_with, wait_until};
use futures::StreamExt;
use rand::{Rng, SeedableRng};

/// How often each request began and ended.
#[derive(Default)]
struct Ledger(Mutex<HashMap<u64, (usize, usize)>>);

impl Collector for Ledger {
    fn record(&self, record: &Arc<Record>) {
        let mut ledger = self.0.lock().unwrap();
        match record.event {
            Event::RequestStarted { request, .. } => ledger.entry(request).or_default().0 += 1,
            Event::RequestFinished { request, .. } => ledger.entry(request).or_default().1 += 1,
            _ => {}
        }
    }
}

/// Threads of this process whose name begins like this.
fn threads(name: &str) -> usize {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0 }; // not on this system
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|thread| thread.starts_with(name)).count()
}

struct Job {
    prompt: Vec<u32>,
    max_tokens: usize,
    /// Tokens after which the stream is dropped.
    dropped_after: Option<usize>,
}

fn jobs() -> Vec<Job> {
    let mut random = rand::rngs::StdRng::seed_from_u64(7);
    let system: Vec<u32> = (0..32).map(|_| random.random_range(3..768)).collect();
    let job = |_| {
        // Every other one begins alike, so that some reuse what others have computed.
        let mut prompt = if random.random_bool(0.5) { system.clone() } else { Vec::new() };
        let length = random.random_range(1..40);
        prompt.extend((0..length).map(|_| random.random_range(3..768u32)));
        let max_tokens = random.random_range(1..12);
        let dropped_after = random.random_bool(0.25).then(|| random.random_range(0..max_tokens));
        Job { prompt, max_tokens, dropped_after }
    };
    (0..1000).map(job).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_requests_end_once_each_and_leave_nothing_behind() {
    let ledger = Arc::new(Ledger::default());
    let options = ExecutorOptions { probe: Probe::new(ledger.clone()), max_sequences: 64, ..Default::default() };
    let executor = executor_with(DEMO_MODEL, "cpu,cpu", Some(&[5, 3]), options).await.unwrap();
    if cfg!(target_os = "linux") {
        wait_until("scheduler and two stages run", || threads("pipeline-s") == 3).await;
    }
    let jobs = Arc::new(jobs());
    let tasks: Vec<_> = (0..jobs.len())
        .map(|index| {
            let (executor, jobs) = (executor.clone(), jobs.clone());
            tokio::spawn(async move {
                let Job { prompt, max_tokens, dropped_after } = &jobs[index];
                let options = GenerationOptions { ignore_eos: true, ..GenerationOptions::new(*max_tokens, 0.0, 1.0) };
                let mut stream = executor.infer_stream_with(prompt.clone(), &options);
                let mut tokens = Vec::new();
                while *dropped_after != Some(tokens.len()) {
                    match stream.next().await.unwrap().unwrap() {
                        GenerationEvent::Token(token) => tokens.push(token.id),
                        GenerationEvent::Finished(finish) => {
                            assert_eq!(finish.reason, FinishReason::Length);
                            assert!(stream.next().await.is_none());
                            return tokens;
                        }
                        _ => {}
                    }
                }
                tokens
            })
        })
        .collect();
    let mut found = Vec::new();
    for task in tasks {
        found.push(task.await.unwrap());
    }
    wait_until("every request has left", || executor.waiting() == 0 && common::kv_bytes(&executor) == 0).await;

    for (tokens, job) in found.iter().zip(jobs.iter()) {
        assert_eq!(tokens.len(), job.dropped_after.unwrap_or(job.max_tokens));
    }
    // Those that were dropped before their admission never began; nothing ends twice.
    let uncancelled = jobs.iter().filter(|job| job.dropped_after.is_none()).count();
    let counts: Vec<_> = ledger.0.lock().unwrap().values().copied().collect();
    assert!(counts.iter().filter(|counts| **counts == (1, 1)).count() >= uncancelled);
    assert!(counts.iter().all(|(begun, ended)| *begun <= 1 && *ended == 1), "{counts:?}");
    assert!(executor.prefix_stats().hits > 100, "{:?}", executor.prefix_stats());

    for index in (0..jobs.len()).step_by(20) {
        let options = GenerationOptions {
            ignore_eos: true,
            reuse_prefix: false,
            ..GenerationOptions::new(found[index].len(), 0.0, 1.0)
        };
        let alone = executor.infer_with(&jobs[index].prompt, &options).await.unwrap();
        assert_eq!(alone.tokens, found[index], "request {index}");
    }
    assert_memory_returns(&executor).await;
    drop(executor);
    // The executor's threads are joined; those of the CPU pool end on their own.
    assert_eq!(threads("pipeline-s"), 0);
    wait_until("the pool's threads end", || threads("pipeline-") == 0).await;
}
