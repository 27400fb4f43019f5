//! Who watches changes nothing, and sees what is there: events of the scheduler and of the stages, and what layers do.

mod common;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use candle_pipeline::backend::{
    CandleBackend, MicroBatch, SequenceId, SequenceSlice, StageBackend, StageOutput, Wanted,
};
use candle_pipeline::instrument::{
    AttentionFilter, Collector, Event, Interest, KvState, LensInterest, LensLayer, Outcome, Phase, Probe, Record,
    StepOutcome, Watch,
};
use candle_pipeline::{
    DEMO_MODEL, DeviceSpec, ExecutorOptions, GenerationOptions, HeterogeneousPipeline, KvType, PipelineOptions,
};
use common::{Meddling, bits, executor_with, fixture, greedy};
use futures::StreamExt;

/// Keeps everything.
#[derive(Default)]
struct All {
    events: Mutex<Vec<Event>>,
    interest: Interest,
}

impl Collector for All {
    fn record(&self, record: &Arc<Record>) {
        self.events.lock().unwrap().push(record.event.clone());
    }

    fn interest(&self) -> Interest {
        self.interest.clone()
    }
}

impl All {
    fn wanting(interest: Interest) -> Arc<All> {
        Arc::new(All { interest, ..All::default() })
    }

    fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }
}

/// Keeps everything with its time.
#[derive(Default)]
struct Timed(Mutex<Vec<Arc<Record>>>);

impl Collector for Timed {
    fn record(&self, record: &Arc<Record>) {
        self.0.lock().unwrap().push(record.clone());
    }

    fn interest(&self) -> Interest {
        Interest { turns: true, ..Interest::default() }
    }
}

fn everything() -> Interest {
    Interest {
        phases: Some(Duration::ZERO),
        synchronise: true,
        activations: true,
        attention: Some(AttentionFilter::default()),
        lens: Some(LensInterest { tokens: Vec::new(), top_k: 3 }),
        kv: Some(Duration::ZERO),
        turns: true,
    }
}

const PROMPT: [u32; 12] = [1, 40, 300, 17, 8, 9, 55, 700, 3, 77, 21, 6];

#[tokio::test]
async fn watching_changes_no_bit_and_each_cut_shows_the_same() {
    let plain = executor_with(DEMO_MODEL, "cpu", None, ExecutorOptions::default()).await.unwrap();
    let expected = plain.infer_with(&PROMPT, &greedy(10)).await.unwrap();
    let mut seen: Vec<Vec<Vec<LensLayer>>> = Vec::new();
    for (devices, cut) in [("cpu", vec![8]), ("cpu,cpu", vec![3, 5]), ("cpu,cpu,cpu", vec![1, 6, 1])] {
        let all = All::wanting(everything());
        let options = ExecutorOptions { probe: Probe::new(all.clone()), ..ExecutorOptions::default() };
        let executor = executor_with(DEMO_MODEL, devices, Some(&cut), options).await.unwrap();
        let watched = executor.infer_with(&PROMPT, &greedy(10)).await.unwrap();
        assert!(bits(&watched) == bits(&expected), "{devices}");
        drop(executor);

        let events = all.events();
        assert!(matches!(&events[0], Event::ModelOpened(facts)
            if facts.n_layer == 8 && facts.stages.len() == cut.len() && facts.tensors.len() > 60
                && facts.stages.iter().all(|stage| stage.weight_bytes
                    == stage.embedding_bytes + stage.layer_bytes.iter().sum::<u64>() + stage.head_bytes)));
        let lens: Vec<_> = events
            .iter()
            .filter_map(|event| match event {
                Event::Lens { layers, position, .. } => Some((*position, layers.clone())),
                _ => None,
            })
            .collect();
        let positions: Vec<_> = lens.iter().map(|(position, _)| *position).collect();
        assert_eq!(positions, (11..21).collect::<Vec<_>>(), "one for each token");
        for (index, (_, layers)) in lens.iter().enumerate() {
            assert_eq!(layers.iter().map(|layer| layer.layer).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
            assert_eq!(layers[7].top[0].0, expected.tokens[index], "the last layer says what was chosen");
            let tracked: Vec<_> = layers[7].tracked.iter().map(|tracked| tracked.rank).collect();
            assert_eq!(tracked, [0, 1, 2]);
        }
        seen.push(lens.into_iter().map(|(_, layers)| layers).collect());

        let mut laps_of_layers = 0;
        let mut activations = 0;
        for event in &events {
            match event {
                Event::Phases { laps, stage, .. } => {
                    let layers = cut[*stage];
                    let edges = 1 + usize::from(*stage + 1 == cut.len());
                    assert_eq!(laps.len(), layers * Phase::LAYER.len() + edges);
                    laps_of_layers += laps.len() - edges;
                }
                Event::Activations { layers, .. } => {
                    for layer in layers {
                        activations += 1;
                        let stats = [layer.input, layer.post_norm, layer.post_attention, layer.post_ffn, layer.output];
                        assert!(stats.iter().all(|stats| stats.is_finite() && stats.std > 0.0), "{layer:?}");
                        assert!(layer.residual_ratio > 0.0);
                    }
                }
                _ => {}
            }
        }
        assert_eq!((laps_of_layers, activations), (10 * 8 * 9, 10 * 8), "{devices}: a prompt and nine steps");
    }
    assert!(seen[0] == seen[1] && seen[0] == seen[2], "the lens does not see the cut");
}

#[tokio::test]
async fn every_request_is_told_from_its_arrival_to_its_end() {
    let all = All::wanting(Interest { kv: Some(Duration::ZERO), ..Interest::default() });
    let options = ExecutorOptions { probe: Probe::new(all.clone()), max_sequences: 1, ..ExecutorOptions::default() };
    let executor = executor_with(DEMO_MODEL, "cpu,cpu", None, options).await.unwrap();
    let mut first = executor.infer_stream(PROMPT.to_vec(), 100_000, 0.0, 1.0);
    first.next().await.unwrap().unwrap();
    let waiting = executor.infer_stream(PROMPT.to_vec(), 5, 0.0, 1.0);
    let short = GenerationOptions { ignore_eos: true, ..GenerationOptions::new(3, 0.0, 1.0) };
    drop(waiting);
    drop(first);
    assert_eq!(executor.infer_with(&PROMPT, &short).await.unwrap().tokens.len(), 3);
    drop(executor);
    let events = all.events();
    let of = |request: u64| -> Vec<&Event> {
        let is = |event: &&Event| match event {
            Event::RequestQueued { request: other, .. }
            | Event::RequestStarted { request: other, .. }
            | Event::RequestFinished { request: other, .. }
            | Event::Sampled { request: other, .. } => *other == request,
            _ => false,
        };
        events.iter().filter(is).collect()
    };
    assert!(
        matches!(of(0).last(), Some(Event::RequestFinished { outcome: Outcome::Cancelled, tokens, .. }) if *tokens > 0)
    );
    assert!(matches!(
        of(1)[..],
        [Event::RequestQueued { .. }, Event::RequestFinished { outcome: Outcome::Cancelled, tokens: 0, .. }]
    ));
    let third = of(2);
    assert!(matches!(&third[0], Event::RequestQueued { prompt, .. } if *prompt == PROMPT));
    assert!(matches!(third[1], Event::RequestStarted { prompt_tokens: 12, .. }));
    let indices: Vec<_> = third
        .iter()
        .filter_map(|event| match event {
            Event::Sampled { index, .. } => Some(*index),
            _ => None,
        })
        .collect();
    assert_eq!(indices, [0, 1, 2]);
    assert!(matches!(third[5], Event::RequestFinished { outcome: Outcome::Length, tokens: 3, .. }));
    let states = events.iter().filter_map(|event| match event {
        Event::Kv(state) => Some(*state),
        _ => None,
    });
    let states: Vec<_> = states.collect();
    let sound = |state: &KvState| state.valid <= state.reserved && state.reserved <= state.limit;
    assert!(states.iter().all(sound), "{states:?}");
    assert!(states.iter().any(|state| state.sequences == 1 && state.valid >= PROMPT.len()), "{states:?}");
}

#[tokio::test]
async fn every_micro_batch_is_told_to_its_end_and_lies_within_turns_of_the_scheduler() {
    let timed = Arc::new(Timed::default());
    let options = ExecutorOptions { probe: Probe::new(timed.clone()), ..ExecutorOptions::default() };
    let executor = executor_with(DEMO_MODEL, "cpu,cpu", None, options).await.unwrap();
    let prompts: Vec<Vec<u32>> = (1..4).map(|n| vec![n, 2, 3]).collect();
    executor.infer_batch_with(&prompts, &greedy(8)).await.unwrap();
    drop(executor.infer_stream(PROMPT.to_vec(), 1000, 0.0, 1.0)); // what it has in flight is wanted by nobody
    executor.infer_with(&PROMPT, &greedy(3)).await.unwrap();
    drop(executor);
    let records = timed.0.lock().unwrap().clone();
    let steps = |wanted: fn(&Event) -> Option<u64>| {
        let mut steps: Vec<u64> = records.iter().filter_map(|record| wanted(&record.event)).collect();
        steps.sort_unstable();
        steps
    };
    let sent = steps(|event| if let Event::StepSent { step, .. } = event { Some(*step) } else { None });
    let finished = steps(|event| if let Event::StepFinished { step, .. } = event { Some(*step) } else { None });
    assert!(sent.len() > 10 && sent == finished, "{sent:?} {finished:?}");
    let turns = records.iter().filter_map(|record| match record.event {
        Event::SchedulerTurn { busy } => Some((record.at - busy, record.at)),
        _ => None,
    });
    let turns: Vec<_> = turns.collect();
    assert!(turns.windows(2).all(|pair| pair[0].1 <= pair[1].0), "one after the other");
    for record in records.iter().filter(|record| matches!(record.event, Event::StepSent { .. })) {
        assert!(turns.iter().any(|(from, until)| (from..=until).contains(&&record.at)), "{record:?}");
    }
}

#[tokio::test]
async fn every_step_that_is_sent_ends_once_and_nothing_is_told_of_it_afterwards() {
    // With a request that is cancelled, with an error in a stage, and with a panic.
    for (error_at, panic_at) in [(0, 0), (2, 0), (0, 2)] {
        let all = All::wanting(everything());
        let meddling = Arc::new(Meddling::default());
        meddling.error_at.store(error_at, Ordering::SeqCst);
        meddling.panic_at.store(panic_at, Ordering::SeqCst);
        let options = ExecutorOptions { probe: Probe::new(all.clone()), prefill_chunk: 8, ..meddling.options() };
        let executor = executor_with(DEMO_MODEL, "cpu,cpu", Some(&[5, 3]), options).await.unwrap();
        let sound = (error_at, panic_at) == (0, 0);
        let mut cancelled = sound.then(|| executor.infer_stream(PROMPT.to_vec(), 100_000, 0.0, 1.0));
        let outcome = executor.infer_with(&PROMPT, &greedy(4)).await;
        assert_eq!(outcome.is_ok(), sound);
        if let Some(stream) = &mut cancelled {
            stream.next().await.unwrap().unwrap();
        }
        drop(cancelled);
        let running = all.events().len();
        drop(executor);
        let events = all.events();
        let numbers = |event: &Event| match *event {
            Event::StepSent { step, .. } => Some((step, false)),
            Event::StepFinished { step, .. } => Some((step, true)),
            _ => None,
        };
        let (ended, sent): (Vec<_>, Vec<_>) = events.iter().filter_map(numbers).partition(|(_, ended)| *ended);
        let steps = |told: Vec<(u64, bool)>| {
            let mut steps: Vec<_> = told.into_iter().map(|(step, _)| step).collect();
            steps.sort_unstable();
            steps
        };
        // What is under way when the last handle goes ends with the threads.
        let (sent, ended) = (steps(sent), steps(ended));
        assert!(ended.len() >= 2 && sent.starts_with(&ended), "{sent:?} {ended:?}");
        assert!(sent.len() - ended.len() <= 2, "{sent:?} {ended:?}");
        let failed = events
            .iter()
            .filter(|event| matches!(event, Event::StepFinished { outcome: StepOutcome::Failed, .. }))
            .count();
        assert!(failed > 0 || sound, "what is under way when the executor stops counts as failed too");
        let mut over = std::collections::HashSet::new();
        // Stages may end what they compute when the executor goes.
        for event in &events[..running] {
            match event {
                Event::StepFinished { step, outcome } if *outcome != StepOutcome::Failed => {
                    assert!(over.insert(*step), "{step} ends twice")
                }
                Event::StageStep { step, .. } | Event::Activations { step, .. } | Event::Lens { step, .. } => {
                    assert!(!over.contains(step), "{event:?}");
                }
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn a_cancelled_step_has_not_failed_when_the_executor_goes() {
    let all = All::wanting(Interest::default());
    let meddling = Arc::new(Meddling::default());
    let options = ExecutorOptions { probe: Probe::new(all.clone()), ..meddling.options() };
    let executor = executor_with(DEMO_MODEL, "cpu,cpu", Some(&[5, 3]), options).await.unwrap();
    meddling.delay_ms.store(50, Ordering::SeqCst);
    let mut stream = executor.infer_stream(PROMPT.to_vec(), 100_000, 0.0, 1.0);
    stream.next().await.unwrap().unwrap();
    let sent = |event: &&Event| matches!(event, Event::StepSent { .. });
    let under_way = async {
        while all.events().iter().filter(sent).count() < 2 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), under_way).await.unwrap();
    drop(stream);
    drop(executor);
    let events = all.events();
    let outcomes = events.iter().filter_map(|event| match event {
        Event::StepFinished { outcome, .. } => Some(*outcome),
        _ => None,
    });
    let outcomes: Vec<_> = outcomes.collect();
    assert!(outcomes.contains(&StepOutcome::Unwanted) && !outcomes.contains(&StepOutcome::Failed), "{outcomes:?}");
    let cancelled = |event: &Event| matches!(event, Event::RequestFinished { outcome: Outcome::Cancelled, .. });
    assert!(events.iter().any(cancelled), "{events:?}");
}

/// Attention weights of the prompt's last row: (layer, head, first, weights).
type Weights = Vec<(usize, usize, usize, Vec<f32>)>;

fn attention(mut backend: Box<dyn StageBackend>, tokens: &[u32]) -> Weights {
    let all = All::wanting(everything());
    let (len, id) = (tokens.len(), SequenceId(4));
    backend.open(id, len).unwrap();
    let slice = SequenceSlice { id, position: 0, len, length: len, decode: false, wanted: Wanted::Logits { rows: 1 } };
    let batch = MicroBatch { slices: vec![slice], tokens: tokens.to_vec() };
    let mut watch = Watch::of(&everything(), Probe::new(all.clone()));
    let output = backend.forward(&batch, None, &mut watch).unwrap();
    let hidden = watch.finish(len);
    let lens = backend.lens(&hidden).unwrap();
    let StageOutput::Logits(logits) = output else { panic!("no logits") };
    assert!(lens.last().unwrap() == &logits[0], "the lens on the last layer is the head");
    let mut weights: Weights = all
        .events()
        .into_iter()
        .filter_map(|event| match event {
            Event::Attention { request: 4, layer, head, first, position, weights, .. } => {
                assert_eq!((position + 1 - first, position), (weights.len(), len - 1));
                Some((layer, head, first, weights))
            }
            _ => None,
        })
        .collect();
    weights.sort_by_key(|(layer, head, ..)| (*layer, *head));
    weights
}

#[test]
fn attention_weights_are_those_of_the_other_backend_for_each_type_of_kv() {
    let gemma = fixture("families/gemma3"); // sliding windows, norms on q and k
    for model in [DEMO_MODEL, gemma.to_str().unwrap()] {
        let tokens: Vec<u32> = (0..40).map(|i| 1 + i * 5 % 90).collect();
        let source = |kv_type| {
            let options = PipelineOptions { kv_type, ..PipelineOptions::default() };
            HeterogeneousPipeline::with_options(&[DeviceSpec::CPU], model, options).unwrap().stage_source(0)
        };
        let expected = attention(Box::new(CandleBackend::load(&source(KvType::F32), &|_| {}).unwrap()), &tokens);
        assert!(expected.len() > 4);
        for (kv_type, tolerance) in [(KvType::F32, 1e-5), (KvType::F16, 1e-3), (KvType::Q8_0, 3e-2)] {
            let found = attention(source(kv_type).load(&|_| {}).unwrap(), &tokens);
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!((found.0, found.1, found.2), (expected.0, expected.1, expected.2));
                let sum: f32 = found.3.iter().sum();
                assert!((sum - 1.0).abs() < 1e-4, "{sum}");
                let worst = found.3.iter().zip(&expected.3).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst <= tolerance, "{model} {kv_type} layer {} head {}: {worst}", found.0, found.1);
            }
        }
    }
}
