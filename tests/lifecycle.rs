//! Requests from their submission to their end: independent of each other, cancelled at once, never lost when a stage
//! fails, and leaving nothing behind.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use candle_pipeline::{
    DEMO_MODEL, DeviceSpec, Error, ExecutorOptions, FinishReason, GenerationEvent, GenerationOptions,
    HeterogeneousPipeline, HeterogeneousPipelineExecutor, PipelineOptions,
};
use common::{assert_memory_returns, bits, executor, executor_with, greedy, kv_bytes, meddled};
use futures::StreamExt;

fn prompt(length: usize) -> Vec<u32> {
    (0..length).map(|i| (4 + i * 13 % 500) as u32).collect()
}

#[tokio::test]
async fn the_second_request_equals_the_first() {
    let executor = executor(DEMO_MODEL, "cpu,cpu", None).await.unwrap();
    let first = executor.infer_with(&prompt(30), &greedy(30)).await.unwrap();
    executor.infer(&prompt(200), 10, 0.0, 1.0).await.unwrap();
    for reuse_prefix in [true, false] {
        let options = GenerationOptions { reuse_prefix, ..greedy(30) };
        let second = executor.infer_with(&prompt(30), &options).await.unwrap();
        assert!(bits(&first) == bits(&second), "reuse_prefix {reuse_prefix}");
    }
    assert_memory_returns(&executor).await;
}

#[tokio::test]
async fn warmup_leaves_no_trace_and_reports_each_stage() {
    let cold = executor(DEMO_MODEL, "cpu,cpu", None).await.unwrap();
    let warm = executor(DEMO_MODEL, "cpu,cpu", None).await.unwrap();
    let report = warm.warmup().await.unwrap();
    assert_eq!(report.stages.len(), 2);
    assert!(report.stages.iter().all(|(_, compute)| *compute > Duration::ZERO), "{report:?}");
    assert!(report.prefill_tokens > 1 && report.decode_steps > 0 && report.duration > Duration::ZERO);
    let run = greedy(20);
    let cold = cold.infer_with(&prompt(20), &run).await.unwrap();
    assert_eq!(bits(&cold), bits(&warm.infer_with(&prompt(20), &run).await.unwrap()));
    assert_memory_returns(&warm).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn eight_streams_at_once_equal_eight_alone() {
    let executor = executor(DEMO_MODEL, "cpu,cpu", None).await.unwrap();
    let mut alone = Vec::new();
    for i in 0..8 {
        alone.push(executor.infer(&prompt(5 + 20 * i), 30, 0.0, 1.0).await.unwrap());
    }
    let tasks: Vec<_> = (0..8)
        .map(|i| {
            let executor = executor.clone();
            tokio::spawn(async move {
                let stream = executor.infer_stream(prompt(5 + 20 * i), 30, 0.0, 1.0);
                stream.map(Result::unwrap).collect::<Vec<u32>>().await
            })
        })
        .collect();
    for (task, alone) in tasks.into_iter().zip(alone) {
        assert_eq!(task.await.unwrap(), alone);
    }
    assert_memory_returns(&executor).await;
}

#[tokio::test]
async fn dropping_a_stream_in_decode_stops_the_work_and_frees_its_memory() {
    let (executor, meddling) = meddled(256).await;
    let endless = GenerationOptions { ignore_eos: true, ..GenerationOptions::new(400, 0.0, 1.0) };
    let mut stream = executor.infer_stream_with(prompt(10), &endless);
    for _ in 0..5 {
        stream.next().await.unwrap().unwrap();
    }
    assert!(kv_bytes(&executor) > 0);
    meddling.delay_ms.store(20, Ordering::SeqCst);
    drop(stream);
    let passes = meddling.passes.load(Ordering::SeqCst);
    assert_memory_returns(&executor).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let later = meddling.passes.load(Ordering::SeqCst) - passes;
    // A stage that has begun a step ends it; one more may have begun before the stages heard of it.
    assert!(later <= 2, "{later} passes after the stream was dropped");
}

#[tokio::test]
async fn dropping_a_stream_in_prefill_stops_within_a_chunk() {
    let (executor, meddling) = meddled(8).await;
    meddling.delay_ms.store(10, Ordering::SeqCst);
    let stream = executor.infer_stream(prompt(400), 10, 0.0, 1.0); // 50 chunks in two stages: 100 passes
    while meddling.passes.load(Ordering::SeqCst) < 6 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    drop(stream);
    let passes = meddling.passes.load(Ordering::SeqCst);
    assert_memory_returns(&executor).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let later = meddling.passes.load(Ordering::SeqCst) - passes;
    // One chunk may be on its way into each stage when they hear of it.
    assert!(later <= 3, "{later} passes after the stream was dropped");
    // The executor goes on.
    meddling.delay_ms.store(0, Ordering::SeqCst);
    assert_eq!(executor.infer(&prompt(3), 4, 0.0, 1.0).await.unwrap().len(), 4);
}

#[tokio::test]
async fn a_stream_that_is_never_polled_is_cancelled_too() {
    let (executor, meddling) = meddled(8).await;
    meddling.delay_ms.store(20, Ordering::SeqCst);
    drop(executor.infer_stream(prompt(400), 100, 0.0, 1.0)); // 13 seconds of work, if it were done
    assert_memory_returns(&executor).await;
    meddling.delay_ms.store(0, Ordering::SeqCst);
    assert_eq!(executor.infer(&prompt(3), 4, 0.0, 1.0).await.unwrap().len(), 4);
    assert!(meddling.passes.load(Ordering::SeqCst) < 20);
}

/// An executor whose KV holds `positions` positions at once.
async fn with_room_for(positions: u64) -> HeterogeneousPipelineExecutor {
    let devices = DeviceSpec::parse_list("cpu,cpu").unwrap();
    let options = PipelineOptions { kv_positions: Some(positions), ..PipelineOptions::default() };
    let pipeline = HeterogeneousPipeline::with_options(&devices, DEMO_MODEL, options).unwrap();
    HeterogeneousPipelineExecutor::new(pipeline, DEMO_MODEL).await.unwrap()
}

#[tokio::test]
async fn requests_wait_until_their_kv_fits_and_can_be_cancelled_while_they_do() {
    let executor = with_room_for(100).await;
    let alone = executor.infer(&prompt(20), 40, 0.0, 1.0).await.unwrap();
    // Each takes 60 positions, so that they run one after the other.
    let streams: Vec<_> = (0..6).map(|_| executor.infer_stream(prompt(20), 40, 0.0, 1.0)).collect();
    for (index, stream) in streams.into_iter().enumerate() {
        if index == 2 || index == 4 {
            continue; // dropped while it waits
        }
        let tokens: Vec<u32> = stream.map(Result::unwrap).collect().await;
        assert_eq!(tokens, alone);
        let most: u64 = executor.stages().iter().map(|stage| stage.kv_budget).sum();
        assert!(kv_bytes(&executor) <= most);
    }
    assert_memory_returns(&executor).await;
    // What can never fit is refused at once, with numbers.
    let error = executor.infer(&prompt(20), 100, 0.0, 1.0).await.unwrap_err();
    match error {
        Error::KvCacheTooSmall { tokens, tokens_that_fit, .. } => assert_eq!((tokens, tokens_that_fit), (120, 100)),
        other => panic!("{other:?}"),
    }
    assert_eq!(executor.infer(&prompt(20), 80, 0.0, 1.0).await.unwrap().len(), 80);
}

#[tokio::test]
async fn chunks_do_not_show_in_the_tokens() {
    let whole = executor(DEMO_MODEL, "cpu", None).await.unwrap().infer(&prompt(90), 20, 0.0, 1.0).await.unwrap();
    for chunk in [1, 7, 64] {
        let (executor, _) = meddled(chunk).await;
        assert_eq!(executor.infer(&prompt(90), 20, 0.0, 1.0).await.unwrap(), whole, "chunks of {chunk}");
    }
}

#[tokio::test]
async fn an_error_in_a_step_ends_the_sequences_in_it_and_no_other() {
    let (executor, meddling) = meddled(256).await;
    let alone = executor.infer(&prompt(10), 30, 0.0, 1.0).await.unwrap();
    let passes = meddling.second_stage.load(Ordering::SeqCst);
    meddling.error_at.store(passes + 5, Ordering::SeqCst);
    let runs = (0..3).map(|_| {
        let executor = &executor;
        async move { executor.infer(&prompt(10), 30, 0.0, 1.0).await }
    });
    let (fine, failed): (Vec<_>, Vec<_>) = futures::future::join_all(runs).await.into_iter().partition(Result::is_ok);
    // Three sequences in two micro-batches: one or two of them are in the step.
    assert!((1..=2).contains(&failed.len()), "{failed:?}");
    assert!(fine.into_iter().all(|tokens| tokens.unwrap() == alone));
    for outcome in failed {
        match outcome.unwrap_err() {
            Error::StageFailed { stage: 1, device, reason } => {
                assert_eq!(device, "cpu");
                assert!(reason.contains("the test wants this error"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(executor.failure().is_none());
    assert_eq!(executor.infer(&prompt(10), 5, 0.0, 1.0).await.unwrap().len(), 5);
    assert_memory_returns(&executor).await;
}

#[tokio::test]
async fn a_panic_in_a_stage_reaches_every_caller_and_a_new_executor_works() {
    let (executor, meddling) = meddled(256).await;
    meddling.panic_at.store(12, Ordering::SeqCst);
    let endless = GenerationOptions { ignore_eos: true, ..GenerationOptions::new(300, 0.0, 1.0) };
    let prompts: Vec<_> = (1..6).map(|i| prompt(i * 4)).collect();
    let runs = prompts.iter().map(|prompt| executor.infer_with(prompt, &endless));
    let all = tokio::time::timeout(Duration::from_secs(20), futures::future::join_all(runs)).await;
    for outcome in all.expect("nothing hangs") {
        match outcome.unwrap_err() {
            Error::StagePanicked { stage: 1, reason, .. } => assert!(reason.contains("wants this panic"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(executor.failure(), Some(Error::StagePanicked { .. })));
    let later = executor.infer(&prompt(3), 3, 0.0, 1.0).await.unwrap_err();
    assert!(matches!(later, Error::StagePanicked { .. }), "{later:?}");
    drop(executor);
    assert_eq!(meddling.dropped.load(Ordering::SeqCst), 2);
    let (fresh, _) = meddled(256).await;
    assert_eq!(fresh.infer(&prompt(3), 3, 0.0, 1.0).await.unwrap().len(), 3);
}

#[tokio::test]
async fn dropping_the_last_handle_joins_the_threads_and_ends_its_streams() {
    let (executor, meddling) = meddled(256).await;
    let endless = GenerationOptions { ignore_eos: true, ..GenerationOptions::new(400, 0.0, 1.0) };
    let mut stream = executor.infer_stream_with(prompt(5), &endless);
    stream.next().await.unwrap().unwrap();
    let second = executor.clone();
    drop(executor);
    assert_eq!(meddling.dropped.load(Ordering::SeqCst), 0);
    drop(second);
    // Joined: both backends are gone by now, not some time later.
    assert_eq!(meddling.dropped.load(Ordering::SeqCst), 2);
    let mut last = None;
    while let Some(item) = stream.next().await {
        last = Some(item);
    }
    assert!(matches!(last, Some(Err(Error::Stopped))), "{last:?}");
}

#[test]
fn no_runtime_is_needed_but_the_callers_own_executor() {
    let tokens = futures::executor::block_on(async {
        let executor = executor(DEMO_MODEL, "cpu", None).await.unwrap();
        executor.infer(&prompt(4), 5, 0.0, 1.0).await.unwrap()
    });
    assert_eq!(tokens.len(), 5);
}

#[test]
fn handles_and_streams_can_be_sent_between_threads() {
    fn send<T: Send>() {}
    fn sync<T: Sync>() {}
    send::<HeterogeneousPipelineExecutor>();
    sync::<HeterogeneousPipelineExecutor>();
    send::<candle_pipeline::TokenStream>();
    send::<candle_pipeline::TextStream>();
    send::<candle_pipeline::GenerationStream>();
    send::<HeterogeneousPipeline>();
}

#[tokio::test]
async fn bad_requests_are_refused_by_name() {
    let executor = executor(DEMO_MODEL, "cpu,cpu", None).await.unwrap();
    let context = executor.pipeline().context_length();
    let vocab = executor.pipeline().config().vocab_size as u32;
    assert!(matches!(executor.infer(&[], 5, 0.0, 1.0).await, Err(Error::EmptyPrompt)));
    let error = executor.infer(&[1, vocab], 5, 0.0, 1.0).await.unwrap_err();
    assert!(matches!(error, Error::TokenOutOfRange { position: 1, .. }), "{error:?}");
    let error = executor.infer(&prompt(context), 5, 0.0, 1.0).await.unwrap_err();
    assert!(matches!(error, Error::PromptTooLong { prompt_tokens, .. } if prompt_tokens == context), "{error:?}");
    for (temperature, top_p, option) in
        [(-1.0, 1.0, "temperature"), (f32::NAN, 1.0, "temperature"), (1.0, 0.0, "top_p")]
    {
        let error = executor.infer(&[1], 5, temperature, top_p).await.unwrap_err();
        assert!(matches!(&error, Error::InvalidOption { option: found, .. } if *found == option), "{error:?}");
    }
    // Streams carry the refusal as their only item.
    let items: Vec<_> = executor.infer_stream(vec![], 5, 0.0, 1.0).collect().await;
    assert!(matches!(items.as_slice(), [Err(Error::EmptyPrompt)]));
}

#[tokio::test]
async fn generation_ends_with_the_context_and_with_max_tokens() {
    let devices = DeviceSpec::parse_list("cpu,cpu").unwrap();
    let options = PipelineOptions { context_length: Some(32), ..PipelineOptions::default() };
    let pipeline = HeterogeneousPipeline::with_options(&devices, DEMO_MODEL, options).unwrap();
    let executor = HeterogeneousPipelineExecutor::new(pipeline, DEMO_MODEL).await.unwrap();
    let full = executor.infer_with(&prompt(30), &greedy(1000)).await.unwrap();
    assert_eq!((full.tokens.len(), full.finish_reason), (2, FinishReason::Length));
    let none = executor.infer_with(&prompt(3), &greedy(0)).await.unwrap();
    assert_eq!((none.tokens.len(), none.finish_reason), (0, FinishReason::Length));
    let error = executor.infer(&prompt(32), 1, 0.0, 1.0).await.unwrap_err().to_string();
    assert!(error.contains("32 tokens") && error.contains("context_length"), "{error}");
}

#[tokio::test]
async fn every_generation_ends_exactly_once() {
    let executor = executor(DEMO_MODEL, "cpu,cpu", None).await.unwrap();
    let streams = (0..20).map(|i| executor.infer_stream_with(prompt(1 + i * 9), &greedy(i)).collect::<Vec<_>>());
    for events in futures::future::join_all(streams).await {
        let ends = events.iter().filter(|event| matches!(event, Ok(GenerationEvent::Finished(_)) | Err(_))).count();
        assert_eq!(ends, 1);
        assert!(matches!(events.last(), Some(Ok(GenerationEvent::Finished(_)))));
    }
    assert_memory_returns(&executor).await;
}

#[tokio::test]
async fn text_streams_stop_strings_and_log_probabilities() {
    let executor = executor(DEMO_MODEL, "cpu,cpu", None).await.unwrap();
    let tokenizer = executor.tokenizer().unwrap();
    let options = GenerationOptions { logprobs: Some(3), ..GenerationOptions::new(400, 0.0, 1.0) };
    let story = executor.infer_text("Once upon a time", &options).await.unwrap();
    assert_eq!(story.finish_reason, FinishReason::Stop);
    assert_eq!(story.logprobs.len(), story.tokens.len());
    for (token, logprob) in story.tokens.iter().zip(&story.logprobs) {
        assert_eq!((*token, logprob.top.len()), (logprob.token, 3));
        assert_eq!(logprob.top[0].0, *token, "greedy takes the most likely");
    }
    let prompt = tokenizer.encode("Once upon a time", true).unwrap();
    let whole: Vec<u32> = prompt.iter().chain(&story.tokens).copied().collect();
    assert_eq!(tokenizer.decode(&whole, true).unwrap(), format!("Once upon a time{}", story.text));
    let pieces: Vec<String> = executor
        .infer_text_stream("Once upon a time", &GenerationOptions::new(400, 0.0, 1.0))
        .map(Result::unwrap)
        .collect()
        .await;
    assert_eq!(pieces.concat(), story.text);

    let stop = ". ";
    let options = GenerationOptions { stop_strings: vec![stop.into()], ..GenerationOptions::new(400, 0.0, 1.0) };
    let sentence = executor.infer_text("Once upon a time", &options).await.unwrap();
    assert_eq!(sentence.finish_reason, FinishReason::Stop);
    assert_eq!(sentence.text, story.text.split(stop).next().unwrap());
}

#[tokio::test]
async fn loading_reports_its_progress() {
    let seen = Arc::new(AtomicUsize::new(0));
    let complete = Arc::new(AtomicBool::new(false));
    let (bytes, done) = (seen.clone(), complete.clone());
    let options = ExecutorOptions {
        progress: Some(Arc::new(move |loaded, total| {
            bytes.fetch_max(loaded as usize, Ordering::SeqCst);
            // Norms are too small to count.
            done.fetch_or(loaded as f64 > 0.95 * total as f64, Ordering::SeqCst);
        })),
        ..ExecutorOptions::default()
    };
    executor_with(DEMO_MODEL, "cpu,cpu", None, options).await.unwrap();
    assert!(complete.load(Ordering::SeqCst), "{} bytes seen", seen.load(Ordering::SeqCst));
}

/// A collector that panics at the first token.
struct Panicking;

impl candle_pipeline::instrument::Collector for Panicking {
    fn record(&self, record: &Arc<candle_pipeline::instrument::Record>) {
        use candle_pipeline::instrument::Event;
        assert!(!matches!(record.event, Event::Sampled { .. }), "the collector panics");
    }
}

#[tokio::test]
async fn a_panic_of_the_scheduler_reaches_every_caller_by_name() {
    let probe = candle_pipeline::instrument::Probe::new(Arc::new(Panicking));
    let options = ExecutorOptions { probe, ..ExecutorOptions::default() };
    let executor = executor_with(DEMO_MODEL, "cpu,cpu", None, options).await.unwrap();
    let prompts: Vec<_> = (1..5).map(|i| prompt(i * 30)).collect();
    let runs = prompts.iter().map(|prompt| executor.infer(prompt, 20, 0.0, 1.0));
    for outcome in futures::future::join_all(runs).await {
        let error = outcome.unwrap_err();
        assert!(
            matches!(&error, Error::SchedulerPanicked { reason } if reason.contains("collector panics")),
            "{error:?}"
        );
    }
    assert!(matches!(executor.failure(), Some(Error::SchedulerPanicked { .. })));
}

#[tokio::test]
async fn a_file_truncated_while_it_loads_is_a_named_error() {
    for file in ["model.safetensors", "demo-q8_0.gguf"] {
        let dir = tempfile::tempdir().unwrap();
        for name in ["config.json", file] {
            std::fs::copy(format!("{DEMO_MODEL}/{name}"), dir.path().join(name)).unwrap();
        }
        let path = dir.path().join(file);
        let model = if file.ends_with(".gguf") { path.clone() } else { dir.path().to_path_buf() };
        let model = model.to_str().unwrap().to_owned();
        let pipeline = HeterogeneousPipeline::new(&DeviceSpec::parse_list("cpu,cpu").unwrap(), &model).unwrap();
        let weights = std::fs::File::options().write(true).open(&path).unwrap();
        // Called as soon as the first tensor has been read.
        let progress = Arc::new(move |_, _| weights.set_len(1 << 20).unwrap());
        let options = ExecutorOptions { progress: Some(progress), ..ExecutorOptions::default() };
        let error = HeterogeneousPipelineExecutor::with_options(pipeline, &model, options).await.unwrap_err();
        let message = error.to_string();
        assert!(message.contains(file) && message.contains("now has 1048576"), "{message}");
    }
}
