//! What runs when: sequences share micro-batches and stages work at the same time, prompts leave room for running
//! streams, requests wait or are refused, time runs out, and equal beginnings are computed once.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use candle_pipeline::{
    DEMO_MODEL, DeviceSpec, Error, ExecutorOptions, FinishReason, GenerationEvent, GenerationOptions, GenerationStream,
    HeterogeneousPipeline, HeterogeneousPipelineExecutor, Isa, PipelineOptions,
};
use common::{Meddling, assert_memory_returns, bits, executor, executor_with, greedy, meddled, wait_until};
use futures::StreamExt;

/// A prompt that shares no prefix with one of another seed.
fn prompt(seed: usize, length: usize) -> Vec<u32> {
    (0..length).map(|i| (4 + (seed * 97 + i * (13 + seed)) % 700) as u32).collect()
}

/// Greedy, to the given length, without prefix reuse.
fn plain(max_tokens: usize) -> GenerationOptions {
    GenerationOptions { ignore_eos: true, reuse_prefix: false, ..GenerationOptions::new(max_tokens, 0.0, 1.0) }
}

async fn on_two_stages(options: ExecutorOptions) -> HeterogeneousPipelineExecutor {
    executor_with(DEMO_MODEL, "cpu,cpu", Some(&[4, 4]), options).await.unwrap()
}

async fn next_token(stream: &mut GenerationStream) -> u32 {
    loop {
        match stream.next().await.unwrap().unwrap() {
            GenerationEvent::Token(token) => return token.id,
            GenerationEvent::Prefilled { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Number of terminal events, and the last one.
async fn drain(stream: GenerationStream) -> (usize, Option<candle_pipeline::Result<GenerationEvent>>) {
    let events: Vec<_> = stream.collect().await;
    let ends = events.iter().filter(|event| matches!(event, Ok(GenerationEvent::Finished(_)) | Err(_))).count();
    (ends, events.into_iter().last())
}

#[tokio::test]
async fn decode_steps_of_many_sequences_are_one_micro_batch_a_stage() {
    let meddling = Arc::new(Meddling::default());
    let executor = on_two_stages(meddling.options()).await;
    let prompts: Vec<_> = (0..8).map(|seed| prompt(seed, 10 + seed)).collect();
    let mut alone = Vec::new();
    for prompt in &prompts {
        alone.push(executor.infer_with(prompt, &plain(24)).await.unwrap().tokens);
    }
    meddling.delay_ms.store(2, Ordering::SeqCst);
    meddling.log.lock().unwrap().clear();
    let together = executor.infer_batch_with(&prompts, &plain(24)).await.unwrap();
    for (together, alone) in together.iter().zip(&alone) {
        assert_eq!(together.tokens, *alone);
    }
    let log = meddling.log.lock().unwrap().clone();
    // 8 sequences in two micro-batches: each has 4 rows as soon as all decode.
    let decodes = |rows: usize| log.iter().filter(|(_, batch, ..)| batch.slices.len() == rows).count();
    assert!(decodes(4) > 2 * 2 * 15, "{} passes of four sequences", decodes(4));
    assert!(log.iter().all(|(_, batch, ..)| batch.tokens.len() > 4 || batch.slices.len() <= 4));
    assert_memory_returns(&executor).await;
}

/// Time in which both stages were at work, as a part of the time from the first pass to the last.
fn overlap(meddling: &Meddling) -> f64 {
    let log = meddling.log.lock().unwrap();
    let mut both = Duration::ZERO;
    for (_, _, began, ended) in log.iter().filter(|(stage, ..)| *stage == 0) {
        for (_, _, other_began, other_ended) in log.iter().filter(|(stage, ..)| *stage == 1) {
            both += (*ended.min(other_ended)).saturating_duration_since(*began.max(other_began));
        }
    }
    let (first, last) = (log.iter().map(|pass| pass.2).min(), log.iter().map(|pass| pass.3).max());
    both.as_secs_f64() / (last.unwrap() - first.unwrap()).as_secs_f64()
}

#[tokio::test]
async fn stages_work_at_the_same_time_and_their_bubbles_are_counted() {
    let mut times = Vec::new();
    for in_flight in [None, Some(1)] {
        let meddling = Arc::new(Meddling::default());
        let executor = on_two_stages(ExecutorOptions { in_flight, ..meddling.options() }).await;
        meddling.delay_ms.store(20, Ordering::SeqCst);
        let prompts: Vec<_> = (0..4).map(|seed| prompt(seed, 6)).collect();
        let before = executor.stage_stats();
        let began = Instant::now();
        executor.infer_batch_with(&prompts, &plain(16)).await.unwrap();
        times.push(began.elapsed());
        let stats: Vec<_> = executor.stage_stats().iter().zip(&before).map(|(now, then)| now.since(then)).collect();
        let share = overlap(&meddling);
        match in_flight {
            None => {
                assert!(share > 0.4, "both stages at work {share:.2} of the time");
                assert!(stats.iter().all(|stage| stage.busy_share() > 0.4), "{stats:?}");
            }
            Some(_) => {
                assert!(share < 0.01, "both stages at work {share:.2} of the time");
                assert!(stats.iter().all(|stage| (0.15..0.85).contains(&stage.busy_share())), "{stats:?}");
            }
        }
        // Everything a stage did is in the figures, and idle time before and after is not.
        for stage in stats {
            let accounted = stage.compute + stage.wait + stage.copy;
            assert!(accounted <= times[times.len() - 1] && accounted > times[times.len() - 1].mul_f64(0.6));
            assert!(stage.steps >= 16 && stage.rows >= 4 * (6 + 15));
        }
    }
    assert!(times[1] > times[0].mul_f64(1.15), "with overlap {:?}, without {:?}", times[0], times[1]);
}

#[tokio::test]
async fn chunks_of_a_prompt_follow_each_other_through_the_stages() {
    let (executor, meddling) = meddled(16).await;
    meddling.delay_ms.store(10, Ordering::SeqCst);
    executor.infer_with(&prompt(1, 320), &plain(1)).await.unwrap();
    let share = overlap(&meddling);
    assert!(share > 0.4, "both stages at work {share:.2} of the time");
}

#[tokio::test]
async fn prompts_of_a_batch_share_micro_batches_from_the_first_on() {
    let (executor, meddling) = meddled(64).await;
    let prompts: Vec<_> = (0..32).map(|seed| prompt(seed, 10)).collect();
    executor.infer_batch_with(&prompts, &plain(1)).await.unwrap();
    assert_eq!(meddling.passes.load(Ordering::SeqCst), 2 * 320 / 64);
    // One bad prompt, and none is begun.
    let bad = [prompts[0].clone(), vec![]];
    assert!(matches!(executor.infer_batch_with(&bad, &plain(1)).await, Err(Error::EmptyPrompt)));
    assert_eq!((meddling.passes.load(Ordering::SeqCst), executor.waiting()), (2 * 320 / 64, 0));
}

/// Inter-token latencies of four streams in decode: undisturbed, and while a long prompt is computed.
async fn latencies(options: ExecutorOptions, meddling: &Meddling) -> (Vec<Duration>, Vec<Duration>) {
    let executor = on_two_stages(options).await;
    meddling.delay_ms.store(8, Ordering::SeqCst);
    meddling.row_delay_us.store(1000, Ordering::SeqCst);
    let (told, mut tokens) = tokio::sync::mpsc::unbounded_channel();
    let tasks: Vec<_> = (0..4)
        .map(|seed| {
            let mut stream = executor.infer_stream_with(prompt(seed, 4), &plain(400));
            let told = told.clone();
            tokio::spawn(async move {
                loop {
                    next_token(&mut stream).await;
                    let _ = told.send((seed, Instant::now()));
                }
            })
        })
        .collect();
    let mut last = [None; 4];
    let mut gaps = async |until: &mut (dyn FnMut() -> bool + Send)| {
        let mut gaps = Vec::new();
        while !until() {
            let (seed, now) = tokens.recv().await.unwrap();
            gaps.extend(last[seed].replace(now).map(|last| now - last));
        }
        gaps.sort();
        gaps
    };
    let mut count = 0;
    gaps(&mut || {
        count += 1;
        count > 40
    })
    .await; // settles
    count = 0;
    let undisturbed = gaps(&mut || {
        count += 1;
        count > 100
    })
    .await;
    let long = executor.clone();
    let prefill = tokio::spawn(async move { long.infer_with(&prompt(9, 300), &plain(1)).await.unwrap() });
    let disturbed = gaps(&mut || prefill.is_finished()).await;
    prefill.await.unwrap();
    tasks.iter().for_each(|task| task.abort());
    (undisturbed, disturbed)
}

fn median<T: Copy>(sorted: &[T]) -> T {
    sorted[sorted.len() / 2]
}

/// Medians, since a loaded machine makes outliers of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn running_streams_keep_flowing_while_a_long_prompt_is_computed() {
    let meddling = Arc::new(Meddling::default());
    let (undisturbed, disturbed) = latencies(meddling.options(), &meddling).await;
    let (undisturbed, disturbed) = (median(&undisturbed), median(&disturbed));
    assert!(disturbed < undisturbed.mul_f64(4.0), "{disturbed:?} against {undisturbed:?} undisturbed");
    let rows = rows_beside_decode(&meddling);
    // 8 ms a step and 1 ms a row: two decode steps take 10 ms, so that 10 rows of prompt double it. A loaded machine adds
    // to the step and allows more, but never the whole prompt.
    assert!((4..=80).contains(&median(&rows)), "{rows:?}");
}

/// Rows of the micro-batches that hold decode steps and a chunk of a prompt behind them, sorted.
fn rows_beside_decode(meddling: &Meddling) -> Vec<usize> {
    let log = meddling.log.lock().unwrap();
    let mixed = log.iter().filter(|(_, batch, ..)| batch.slices[0].len == 1 && batch.tokens.len() > batch.slices.len());
    let mut rows: Vec<_> = mixed.map(|(_, batch, ..)| batch.tokens.len()).collect();
    rows.sort();
    rows
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_given_token_budget_bounds_every_step_beside_running_streams() {
    let meddling = Arc::new(Meddling::default());
    let options = ExecutorOptions { token_budget: Some(6), ..meddling.options() };
    latencies(options, &meddling).await;
    let rows = rows_beside_decode(&meddling);
    assert!(rows.len() > 2 * 300 / 6 && rows.iter().all(|&rows| rows <= 6), "{rows:?}");
}

#[tokio::test]
async fn a_short_prompt_is_not_stuck_behind_a_long_one() {
    let (executor, meddling) = meddled(16).await;
    meddling.delay_ms.store(5, Ordering::SeqCst);
    let long = executor.infer_stream_with(prompt(1, 480), &plain(4)); // 30 chunks
    wait_until("the long prompt has begun", || meddling.passes.load(Ordering::SeqCst) >= 4).await;
    let short = executor.infer_with(&prompt(2, 5), &plain(1)).await.unwrap();
    let passes = meddling.passes.load(Ordering::SeqCst);
    assert!(short.tokens.len() == 1 && passes < 40, "{passes} passes"); // the long prompt alone makes 60
    assert_eq!(drain(long).await.0, 1);
}

/// An executor on two stages whose KV holds `positions` positions at once.
async fn with_room_for(positions: u64, options: ExecutorOptions) -> HeterogeneousPipelineExecutor {
    let devices = DeviceSpec::parse_list("cpu,cpu").unwrap();
    let plan = PipelineOptions { kv_positions: Some(positions), ..PipelineOptions::default() };
    let pipeline = HeterogeneousPipeline::with_options(&devices, DEMO_MODEL, plan).unwrap();
    HeterogeneousPipelineExecutor::with_options(pipeline, DEMO_MODEL, options).await.unwrap()
}

#[tokio::test]
async fn a_full_queue_is_busy_or_waits_as_one_likes() {
    let options = ExecutorOptions { queue_limit: Some(2), max_sequences: 1, ..ExecutorOptions::default() };
    let executor = on_two_stages(options).await;
    let mut running = executor.infer_stream_with(prompt(0, 4), &plain(400));
    next_token(&mut running).await;
    let waiting: Vec<_> = (1..3).map(|seed| executor.infer_stream_with(prompt(seed, 4), &plain(3))).collect();
    assert_eq!(executor.waiting(), 2);
    match executor.infer_with(&prompt(3, 4), &plain(3)).await {
        Err(error @ Error::Busy { waiting: 2, limit: 2 }) => assert!(error.to_string().contains("queue_limit")),
        other => panic!("{other:?}"),
    }
    // A cancelled request leaves its place, and an end lets the next one in.
    let mut waiting = waiting.into_iter();
    drop(waiting.next());
    wait_until("the place is free", || executor.waiting() == 1).await;
    let later = executor.infer_stream_with(prompt(3, 4), &plain(3));
    drop(running);
    for stream in waiting.chain([later]) {
        assert!(matches!(drain(stream).await, (1, Some(Ok(GenerationEvent::Finished(_))))));
    }
    assert_eq!(executor.waiting(), 0);
    assert_memory_returns(&executor).await;

    let patient = on_two_stages(ExecutorOptions { max_sequences: 2, ..ExecutorOptions::default() }).await;
    let prompts: Vec<_> = (0..40).map(|seed| prompt(seed, 4)).collect();
    assert_eq!(patient.infer_batch_with(&prompts, &plain(3)).await.unwrap().len(), 40);
    assert_memory_returns(&patient).await;
}

#[tokio::test]
async fn options_without_meaning_are_refused_by_name() {
    let none = ExecutorOptions::default;
    for (name, options) in [
        ("prefill_chunk", ExecutorOptions { prefill_chunk: 0, ..none() }),
        ("token_budget", ExecutorOptions { token_budget: Some(0), ..none() }),
        ("micro_batches", ExecutorOptions { micro_batches: Some(0), ..none() }),
        ("in_flight", ExecutorOptions { in_flight: Some(0), ..none() }),
        ("max_sequences", ExecutorOptions { max_sequences: 0, ..none() }),
        ("queue_limit", ExecutorOptions { queue_limit: Some(0), ..none() }),
    ] {
        let refused = executor_with(DEMO_MODEL, "cpu", None, options).await.unwrap_err();
        assert!(matches!(&refused, Error::InvalidOption { option, .. } if *option == name), "{refused:?}");
    }
}

#[tokio::test]
async fn requests_are_admitted_in_the_order_of_their_arrival() {
    let executor = with_room_for(64, ExecutorOptions::default()).await;
    let meddled = |seed, tokens| executor.infer_stream_with(prompt(seed, 4), &plain(tokens));
    let mut first = meddled(0, 40);
    next_token(&mut first).await;
    // The big one does not fit beside the first; the small ones behind it would, and must not overtake it.
    let streams = [meddled(1, 56), meddled(2, 2), meddled(3, 2)];
    let ends = streams.map(|stream| async move {
        drain(stream).await;
        Instant::now()
    });
    let ends = futures::future::join(drain(first), futures::future::join_all(ends)).await.1;
    assert!(ends[0] < ends[1] && ends[0] < ends[2], "{ends:?}");
}

#[tokio::test]
async fn a_deadline_ends_a_request_wherever_it_is() {
    let meddling = Arc::new(Meddling::default());
    let executor = on_two_stages(ExecutorOptions { max_sequences: 1, ..meddling.options() }).await;
    meddling.delay_ms.store(5, Ordering::SeqCst);
    let within = |ms| GenerationOptions { deadline: Some(Duration::from_millis(ms)), ..plain(400) };
    let (prompts, limit, early) = ([prompt(1, 8), prompt(2, 8)], within(400), within(100));
    // The first runs into its deadline, the second waits for it until its own.
    let (running, waiting) = futures::join!(executor.infer_with(&prompts[0], &limit), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        executor.infer_with(&prompts[1], &early).await
    });
    let (running, waiting) = (running.unwrap(), waiting.unwrap());
    assert_eq!((running.finish_reason, waiting.finish_reason), (FinishReason::Deadline, FinishReason::Deadline));
    assert!(running.total_time >= Duration::from_millis(400) && running.total_time < Duration::from_secs(3));
    // It did not wait for the other's end.
    assert!(waiting.total_time >= Duration::from_millis(100) && waiting.total_time < running.total_time);
    assert!(waiting.tokens.is_empty() && waiting.time_to_first_token.is_zero());
    meddling.delay_ms.store(0, Ordering::SeqCst);
    let whole = executor.infer_with(&prompts[0], &plain(400)).await.unwrap();
    assert!(running.tokens.len() > 3 && whole.tokens.starts_with(&running.tokens));
    // Time to spare changes nothing, nor does a deadline that no clock can show.
    for deadline in [Duration::from_secs(60), Duration::MAX] {
        let spare = GenerationOptions { deadline: Some(deadline), ..plain(5) };
        let found = executor.infer_with(&prompts[0], &spare).await.unwrap();
        assert_eq!((found.finish_reason, &found.tokens[..]), (FinishReason::Length, &whole.tokens[..5]));
    }
    assert_memory_returns(&executor).await;
}

#[tokio::test]
async fn a_deadline_in_prefill_stops_the_work() {
    let (executor, meddling) = meddled(8).await;
    meddling.delay_ms.store(10, Ordering::SeqCst);
    let options = GenerationOptions { deadline: Some(Duration::from_millis(60)), ..plain(4) };
    let found = executor.infer_with(&prompt(1, 400), &options).await.unwrap(); // 50 chunks
    assert_eq!((found.finish_reason, found.tokens.len()), (FinishReason::Deadline, 0));
    assert_memory_returns(&executor).await;
    assert!(meddling.passes.load(Ordering::SeqCst) < 30);
}

/// Greedy with prefix reuse.
fn reusing(max_tokens: usize) -> GenerationOptions {
    GenerationOptions { reuse_prefix: true, ..plain(max_tokens) }
}

#[tokio::test]
async fn a_shared_prefix_is_computed_once() {
    let meddling = Arc::new(Meddling::default());
    let executor = on_two_stages(meddling.options()).await;
    let rows = || meddling.log.lock().unwrap().iter().map(|(_, batch, ..)| batch.tokens.len()).sum::<usize>() / 2;
    let system = prompt(1, 100);
    let with = |tail: &[u32]| [&system[..], tail].concat();
    let (a, b) = (with(&[5, 6, 7]), with(&[8, 9]));
    let wanted_a = executor.infer_with(&a, &plain(10)).await.unwrap();
    let wanted_b = executor.infer_with(&b, &plain(10)).await.unwrap();
    assert_eq!(executor.prefix_stats().lookups, 0);

    let first = executor.infer_with(&a, &reusing(10)).await.unwrap();
    assert_eq!((first.tokens == wanted_a.tokens, first.reused_tokens), (true, 0));
    let before = rows();
    let second = executor.infer_with(&b, &reusing(10)).await.unwrap();
    assert_eq!((second.tokens == wanted_b.tokens, second.reused_tokens), (true, 100));
    assert_eq!(rows() - before, 2 + 9, "two rows of prompt, nine of decode");
    // The same prompt again: its last token is computed all the same, for the logits.
    let again = executor.infer_with(&a, &reusing(10)).await.unwrap();
    assert_eq!((again.tokens == wanted_a.tokens, again.reused_tokens), (true, 102));
    // A conversation goes on: prompt and answer, but for the last token, which was never computed.
    let next = [&a[..], &again.tokens, &[11, 12]].concat();
    let wanted = executor.infer_with(&next, &plain(10)).await.unwrap();
    let found = executor.infer_with(&next, &reusing(10)).await.unwrap();
    assert_eq!((found.tokens == wanted.tokens, found.reused_tokens), (true, 103 + 9));

    let stats = executor.prefix_stats();
    assert_eq!((stats.lookups, stats.hits, stats.reused_tokens), (4, 3, 100 + 102 + 112));
    // The conversation's own beginnings went with it: what is kept are the longest of each branch.
    assert_eq!(stats.retained_sequences, 2);
    let only_kept = || executor.memory().iter().all(|stage| stage.kv == stage.kv_retained && stage.kv > 0);
    wait_until("only what is kept is left", only_kept).await;
    assert_memory_returns(&executor).await;
}

/// Where prompts are computed in another way than decode steps, what has been generated is computed anew.
#[tokio::test]
async fn a_conversation_has_the_same_bits_whether_its_beginning_was_kept_or_not() {
    // The folder's own weights are F16.
    for file in ["", "demo-q8_0.gguf", "demo-q4_0.gguf"] {
        for (isa, bf16_prompts) in Isa::available().into_iter().flat_map(|isa| [(isa, false), (isa, true)]) {
            let options = PipelineOptions { isa: Some(isa), bf16_prompts, ..PipelineOptions::default() };
            let model = format!("{DEMO_MODEL}/{file}");
            let pipeline =
                HeterogeneousPipeline::with_options(&DeviceSpec::parse_list("cpu,cpu").unwrap(), &model, options)
                    .unwrap();
            let executor = HeterogeneousPipelineExecutor::new(pipeline, &model).await.unwrap();
            let prompt = prompt(1, 90);
            let answer = executor.infer_with(&prompt, &reusing(40)).await.unwrap().tokens;
            let next = [&prompt[..], &answer, &[11, 12]].concat();
            let anew = GenerationOptions { reuse_prefix: false, ..greedy(20) };
            let wanted = executor.infer_with(&next, &anew).await.unwrap();
            let found = executor.infer_with(&next, &greedy(20)).await.unwrap();
            assert!(bits(&found) == bits(&wanted), "{file} with {isa}");
            let kept = if isa.name() == "amx" && bf16_prompts { 90 } else { 90 + 39 };
            assert_eq!(found.reused_tokens, kept, "{file} with {isa}");
        }
    }
}

#[tokio::test]
async fn a_running_sequence_shares_its_prefix_and_both_go_their_own_ways() {
    let executor = on_two_stages(ExecutorOptions::default()).await;
    let a = prompt(1, 80);
    let mut b = a.clone();
    b[60] += 1;
    let wanted_a = executor.infer_with(&a, &plain(150)).await.unwrap().tokens;
    let wanted_b = executor.infer_with(&b, &plain(150)).await.unwrap().tokens;
    let mut first = executor.infer_stream_with(a, &reusing(150));
    let mut tokens = vec![next_token(&mut first).await];
    let second = executor.infer_with(&b, &reusing(150)).await.unwrap();
    assert_eq!((second.tokens == wanted_b, second.reused_tokens), (true, 60));
    while tokens.len() < 150 {
        tokens.push(next_token(&mut first).await);
    }
    assert!(tokens == wanted_a);
    drop(first);
    assert_memory_returns(&executor).await;
}

#[tokio::test]
async fn a_batch_with_one_beginning_computes_it_once() {
    let meddling = Arc::new(Meddling::default());
    let executor = on_two_stages(meddling.options()).await;
    let prompts: Vec<Vec<u32>> = (0..8).map(|seed| [prompt(1, 300), prompt(2 + seed, 5)].concat()).collect();
    let wanted = executor.infer_batch_with(&prompts, &plain(6)).await.unwrap();
    meddling.log.lock().unwrap().clear();
    let found = executor.infer_batch_with(&prompts, &reusing(6)).await.unwrap();
    let reused: Vec<_> = found.iter().map(|generation| generation.reused_tokens).collect();
    assert_eq!(reused, [0, 300, 300, 300, 300, 300, 300, 300]);
    assert!(found.iter().zip(&wanted).all(|(found, wanted)| found.tokens == wanted.tokens));
    let rows: usize = meddling.log.lock().unwrap().iter().map(|(_, batch, ..)| batch.tokens.len()).sum();
    assert_eq!(rows / 2, 300 + 8 * 5 + 8 * 5);
    assert_memory_returns(&executor).await;

    // Those that wait do not hang on the first: it may be dropped or fail, and they too.
    for error in [false, true] {
        meddling.delay_ms.store(10, Ordering::SeqCst);
        let mut streams: Vec<_> =
            prompts.iter().map(|prompt| executor.infer_stream_with(prompt.clone(), &reusing(6))).collect();
        if error {
            meddling.error_at.store(meddling.second_stage.load(Ordering::SeqCst) + 1, Ordering::SeqCst);
            assert!(matches!(drain(streams.remove(0)).await, (1, Some(Err(Error::StageFailed { .. })))));
        } else {
            let passes = meddling.passes.load(Ordering::SeqCst);
            wait_until("the first has begun", || meddling.passes.load(Ordering::SeqCst) > passes).await;
            drop(streams.remove(0));
        }
        drop(streams.remove(0));
        for (stream, wanted) in streams.into_iter().zip(&wanted[2..]) {
            let events: Vec<_> = stream.map(Result::unwrap).collect().await;
            let tokens = events.iter().filter_map(|event| match event {
                GenerationEvent::Token(token) => Some(token.id),
                _ => None,
            });
            assert_eq!(tokens.collect::<Vec<_>>(), wanted.tokens);
        }
        assert_memory_returns(&executor).await;
    }
}

#[tokio::test]
async fn a_cancelled_prompt_leaves_what_was_computed() {
    let (executor, meddling) = meddled(16).await;
    let a = prompt(1, 200);
    let wanted = executor.infer_with(&a, &plain(8)).await.unwrap().tokens;
    meddling.delay_ms.store(10, Ordering::SeqCst);
    let stream = executor.infer_stream_with(a.clone(), &reusing(8));
    let passes = meddling.passes.load(Ordering::SeqCst);
    wait_until("some chunks are computed", || meddling.passes.load(Ordering::SeqCst) > passes + 6).await;
    drop(stream);
    meddling.delay_ms.store(0, Ordering::SeqCst);
    let found = executor.infer_with(&a, &reusing(8)).await.unwrap();
    assert!(found.tokens == wanted);
    assert!(found.reused_tokens >= 16 && found.reused_tokens < 160, "{}", found.reused_tokens);
    assert_eq!(found.reused_tokens % 16, 0, "whole chunks only");
    assert_memory_returns(&executor).await;
}

#[tokio::test]
async fn kept_kv_makes_way_for_requests_and_stays_within_its_budget() {
    // A request takes 60 of 100 positions: nothing can be kept beside the next one.
    let executor = with_room_for(100, ExecutorOptions::default()).await;
    for seed in 0..4 {
        let found = executor.infer_with(&prompt(seed, 40), &reusing(20)).await.unwrap();
        assert_eq!((found.tokens.len(), found.reused_tokens), (20, 0));
        assert_eq!(executor.prefix_stats().retained_positions, 60);
    }
    // The source itself makes way when there is no room for both.
    let found = executor.infer_with(&prompt(3, 40), &reusing(20)).await.unwrap();
    assert_eq!((found.tokens.len(), found.reused_tokens), (20, 0));
    assert_memory_returns(&executor).await;

    let small = on_two_stages(ExecutorOptions { prefix_cache: 150, ..ExecutorOptions::default() }).await;
    for seed in [0, 1, 0, 2, 0, 1] {
        small.infer_with(&prompt(seed, 40), &reusing(20)).await.unwrap();
        assert!(small.prefix_stats().retained_positions <= 150);
    }
    // 1 made way for 2, since 0 had been used after it.
    assert_eq!(small.prefix_stats().hits, 2);
    assert_memory_returns(&small).await;
}

#[tokio::test]
async fn prefix_reuse_can_be_switched_off() {
    let off = on_two_stages(ExecutorOptions { prefix_cache: 0, ..ExecutorOptions::default() }).await;
    for _ in 0..2 {
        assert_eq!(off.infer_with(&prompt(1, 60), &reusing(4)).await.unwrap().reused_tokens, 0);
    }
    let stats = off.prefix_stats();
    assert_eq!((stats.lookups, stats.hits, stats.retained_positions), (0, 0, 0));
    wait_until("all KV is freed", || off.memory().iter().all(|stage| stage.kv == 0)).await;

    let on = on_two_stages(ExecutorOptions::default()).await;
    let private = prompt(1, 60);
    on.infer_with(&private, &plain(4)).await.unwrap();
    assert_eq!(on.infer_with(&private, &reusing(4)).await.unwrap().reused_tokens, 0, "left nothing behind");
    assert_eq!(on.infer_with(&private, &plain(4)).await.unwrap().reused_tokens, 0, "takes nothing");
    assert_eq!(on.infer_with(&private, &reusing(4)).await.unwrap().reused_tokens, 59);
}

/// LongRoPE rotates sequences of more than 32 positions differently; dynamic NTK each length past the trained one.
#[tokio::test]
async fn rotations_that_depend_on_the_length_are_not_mixed() {
    for family in ["phi3-longrope", "llama-dynamic-rope"] {
        let dir = common::fixture("families").join(family);
        let executor = executor(dir.to_str().unwrap(), "cpu,cpu", None).await.unwrap();
        let prompt: Vec<u32> = (3..60).collect();
        // Short, across the switch while decoding, long, and long again.
        let mut reused = Vec::new();
        for (length, tokens) in [(20, 8), (22, 20), (28, 4), (36, 8), (40, 8), (24, 4)] {
            let wanted = executor.infer_with(&prompt[..length], &plain(tokens)).await.unwrap();
            let found = executor.infer_with(&prompt[..length], &reusing(tokens)).await.unwrap();
            assert_eq!(found.tokens, wanted.tokens, "{family}: {length} + {tokens}");
            reused.push(found.reused_tokens);
        }
        match family {
            // What has crossed the switch has long rotations, and serves long prompts only.
            "phi3-longrope" => assert_eq!(reused, [0, 20, 20, 22, 36, 23]),
            _ => assert_eq!(reused[3..5], [0, 0], "{reused:?}"),
        }
        assert_memory_returns(&executor).await;
    }
}

/// The first generated token is the one that makes a LongRoPE sequence be computed anew, in chunks of 32 rows and of one.
#[tokio::test]
async fn a_sequence_that_is_computed_anew_may_end_in_a_chunk_of_one_row() {
    let dir = common::fixture("families").join("phi3-longrope");
    let mut found = Vec::new();
    for prefill_chunk in [32, 256] {
        let options = ExecutorOptions { prefill_chunk, ..ExecutorOptions::default() };
        let executor = executor_with(dir.to_str().unwrap(), "cpu,cpu", None, options).await.unwrap();
        let prompt: Vec<u32> = (3..35).collect();
        let run = tokio::time::timeout(Duration::from_secs(10), executor.infer(&prompt, 4, 0.0, 1.0)).await;
        found.push(run.expect("nothing hangs").unwrap());
    }
    assert_eq!(found[0], found[1]);
}

#[tokio::test]
async fn a_failing_step_ends_each_of_its_sequences_once() {
    let meddling = Arc::new(Meddling::default());
    let executor = on_two_stages(meddling.options()).await;
    meddling.delay_ms.store(2, Ordering::SeqCst);
    let streams: Vec<_> = (0..8).map(|seed| executor.infer_stream_with(prompt(seed, 20), &reusing(60))).collect();
    let passes = meddling.second_stage.load(Ordering::SeqCst);
    meddling.error_at.store(passes + 20, Ordering::SeqCst);
    let mut failed = 0;
    for (ends, last) in futures::future::join_all(streams.into_iter().map(drain)).await {
        assert_eq!(ends, 1);
        match last.unwrap() {
            Err(Error::StageFailed { stage: 1, .. }) => failed += 1,
            Ok(GenerationEvent::Finished(finish)) => assert_eq!(finish.reason, FinishReason::Length),
            other => panic!("{other:?}"),
        }
    }
    assert!((2..=6).contains(&failed), "{failed} of 8 were in the step");
    // What failed is not kept, and the rest serves on.
    assert_eq!(executor.prefix_stats().retained_sequences, 8 - failed);
    assert_eq!(executor.infer_with(&prompt(0, 20), &plain(4)).await.unwrap().tokens.len(), 4);
    assert_memory_returns(&executor).await;
}

#[tokio::test]
async fn a_sequence_that_a_stage_has_no_room_for_ends_alone() {
    let meddling = Arc::new(Meddling::default());
    let executor = on_two_stages(meddling.options()).await;
    let prompts: Vec<_> = (0..6).map(|seed| prompt(seed, 20)).collect();
    let mut wanted = Vec::new();
    for prompt in &prompts {
        wanted.push(executor.infer_with(prompt, &plain(12)).await.unwrap().tokens);
    }
    // While the first pass takes long, all the others are opened and share the next micro-batch.
    meddling.delay_ms.store(30, Ordering::SeqCst);
    let opened = meddling.opened.load(Ordering::SeqCst);
    meddling.refuse_open.store(opened + 4, Ordering::SeqCst);
    let options = plain(12);
    let runs = prompts.iter().map(|prompt| executor.infer_with(prompt, &options));
    for (index, outcome) in futures::future::join_all(runs).await.into_iter().enumerate() {
        match outcome {
            Ok(generation) => assert!(index != 3 && generation.tokens == wanted[index], "{index}"),
            Err(Error::StageFailed { stage: 1, reason, .. }) => {
                assert!(index == 3 && reason.contains("no room"), "{index}: {reason}");
            }
            other => panic!("{index}: {other:?}"),
        }
    }
    assert_memory_returns(&executor).await;
}

#[tokio::test]
async fn streams_dropped_in_the_middle_of_a_step_do_not_disturb_the_others_in_it() {
    let meddling = Arc::new(Meddling::default());
    let executor = on_two_stages(meddling.options()).await;
    let wanted: Vec<_> = futures::future::join_all((0..8).map(|seed| {
        let executor = &executor;
        async move { executor.infer_with(&prompt(seed, 10), &plain(40)).await.unwrap().tokens }
    }))
    .await;
    meddling.delay_ms.store(3, Ordering::SeqCst);
    let mut streams: Vec<_> =
        (0..8).map(|seed| Some(executor.infer_stream_with(prompt(seed, 10), &plain(40)))).collect();
    let mut tokens = vec![Vec::new(); 8];
    for round in 0..40 {
        for (seed, stream) in streams.iter_mut().enumerate() {
            // The odd ones are dropped one after the other, while their next step is under way.
            if seed % 2 == 1 && round == 3 * seed {
                *stream = None;
            }
            if let Some(stream) = stream {
                tokens[seed].push(next_token(stream).await);
            }
        }
    }
    for (seed, tokens) in tokens.iter().enumerate() {
        let length = if seed % 2 == 1 { 3 * seed } else { 40 };
        assert_eq!(*tokens, wanted[seed][..length], "{seed}");
    }
    drop(streams);
    assert_memory_returns(&executor).await;
}

#[tokio::test]
async fn sequences_join_and_leave_between_steps() {
    let meddling = Arc::new(Meddling::default());
    let executor = executor_with(DEMO_MODEL, "cpu", None, meddling.options()).await.unwrap();
    meddling.delay_ms.store(2, Ordering::SeqCst);
    let mut long = executor.infer_stream_with(prompt(0, 4), &plain(100));
    next_token(&mut long).await;
    let short = executor.infer_with(&prompt(1, 4), &plain(5)).await.unwrap();
    // The short one did not wait for the end of the long one, and shared its steps.
    assert_eq!(short.tokens.len(), 5);
    let log = meddling.log.lock().unwrap().clone();
    let together = log.iter().filter(|(_, batch, ..)| batch.slices.len() == 2).count();
    assert!(together >= 4, "{together}");
    let ids: BTreeSet<_> = log.iter().flat_map(|(_, batch, ..)| &batch.slices).map(|slice| slice.id).collect();
    assert_eq!(ids.len(), 2);
    assert!(log.last().unwrap().1.slices.len() <= 2);
    assert_eq!(drain(long).await.0, 1);
}
