//! Predictions of any number of rows, and sequences that go back: what checking a draft needs of the stages.

mod common;

use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use candle_pipeline::backend::{
    CandleBackend, MicroBatch, Prediction, SequenceId, SequenceSlice, StageBackend, StageOptions, StageSource, Wanted,
};
use candle_pipeline::instrument::{Probe, Watch};
use candle_pipeline::pipeline::message::{StageMessage, StageReply, StepTimes};
use candle_pipeline::pipeline::stages::{self, Stages, StartOptions};
use candle_pipeline::{
    DEMO_MODEL, DeviceSpec, HeterogeneousPipeline, Isa, KvType, LinkOptions, PipelineOptions, Split,
};
use common::stages::{best, largest_difference, most_likely, source_of, step};

const FILES: [&str; 3] = ["", "demo-q8_0.gguf", "demo-q4_0.gguf"];

fn tokens(len: usize, step: usize) -> Vec<u32> {
    (0..len).map(|i| (5 + i * step % 700) as u32).collect()
}

fn rows(id: u64, position: usize, len: usize, decode: bool, wanted: Wanted) -> SequenceSlice {
    SequenceSlice { id: SequenceId(id), position, len, length: position + len, decode, wanted }
}

fn predictions(backend: &mut dyn StageBackend, slices: Vec<SequenceSlice>, tokens: Vec<u32>) -> Vec<Prediction> {
    let batch = MicroBatch { slices, tokens };
    batch.validate().unwrap();
    backend.forward(&batch, None, &mut Watch::off()).unwrap().into_predictions().unwrap()
}

fn logits(prediction: &Prediction) -> &[f32] {
    match prediction {
        Prediction::Logits(logits) => logits,
        Prediction::Best(best) => panic!("{} tokens instead of all logits", best.len()),
    }
}

#[test]
fn each_of_the_last_rows_predicts_what_a_step_of_its_own_does() {
    let (a, b) = (tokens(9, 37), tokens(5, 113));
    for file in FILES {
        let source = source_of(DeviceSpec::CPU, file);
        let cpu = source.load(&|_| {}).unwrap();
        let candle = Box::new(CandleBackend::load(&source, &|_| {}).unwrap());
        for (mut backend, exact) in [(cpu, true), (candle as Box<dyn StageBackend>, false)] {
            let mut alone = Vec::new();
            for (id, tokens) in [(0, &a), (1, &b)] {
                backend.open(SequenceId(id), 16).unwrap();
                let steps = tokens.iter().enumerate();
                let steps = steps.map(|(position, &token)| step(&mut *backend, SequenceId(id), token, position));
                alone.push(steps.collect::<Vec<_>>());
            }
            for n in [1, 2, 5, 9] {
                backend.open(SequenceId(2), 16).unwrap();
                backend.open(SequenceId(3), 16).unwrap();
                let slices = vec![
                    rows(2, 0, 9, false, Wanted::Logits { rows: n }),
                    rows(3, 0, 5, false, Wanted::Best { rows: n.min(5), k: 3 }),
                ];
                let found = predictions(&mut *backend, slices, [&a[..], &b[..]].concat());
                assert_eq!(found.len(), n + n.min(5));
                for (found, wanted) in found.iter().zip(&alone[0][9 - n..]) {
                    let difference = largest_difference(logits(found), wanted);
                    // Candle rounds inputs of quantised products to 8 bits, and adds up in another order for more rows.
                    assert!(difference <= if exact { 0.0 } else { 0.3 }, "{file}, {n} rows: {difference}");
                }
                for (found, wanted) in found[n..].iter().zip(&alone[1][5 - n.min(5)..]) {
                    match found {
                        Prediction::Best(best) => assert_eq!(best, &most_likely(wanted, 3), "{file}, {n} rows"),
                        Prediction::Logits(_) => assert!(!exact, "a CPU stage looks for the most likely itself"),
                    }
                }
            }
        }
    }
}

#[test]
fn a_sequence_that_goes_back_has_the_bits_of_one_that_never_went() {
    let (prompt, right, wrong) = (tokens(70, 11), tokens(6, 31), tokens(7, 211));
    for file in FILES {
        for isa in [Isa::SCALAR, Isa::detect()] {
            let devices = DeviceSpec::parse_list("cpu@threads=2").unwrap();
            let options = PipelineOptions { isa: Some(isa), ..PipelineOptions::default() };
            let model = format!("{DEMO_MODEL}/{file}");
            let source = HeterogeneousPipeline::with_options(&devices, &model, options).unwrap().stage_source(0);
            for kv_type in KvType::ALL {
                let options = StageOptions { kv_type, ..source.options };
                let mut backend = StageSource { options, ..source.clone() }.load(&|_| {}).unwrap();
                for id in 0..2 {
                    backend.open(SequenceId(id), 90).unwrap();
                    predictions(&mut *backend, vec![rows(id, 0, 70, false, Wanted::Nothing)], prompt.clone());
                }
                // Each draft begins right and goes wrong, and the sequence goes back by as many rows.
                for (index, &token) in right.iter().enumerate() {
                    let position = 70 + index;
                    let draft = [&[token], &wrong[index..]].concat();
                    let slice = rows(0, position, draft.len(), true, Wanted::Logits { rows: draft.len() });
                    let found = predictions(&mut *backend, vec![slice], draft);
                    backend.truncate(SequenceId(0), position + 1).unwrap();
                    let wanted = step(&mut *backend, SequenceId(1), token, position);
                    assert!(logits(&found[0]) == wanted, "{file}, {isa}, KV {kv_type}, after {index} drafts");
                }
                // What is copied of it is what stayed.
                for (from, to) in [(0, 2), (1, 3)] {
                    backend.fork(SequenceId(from), SequenceId(to), 75, 90).unwrap();
                }
                let ends = [2, 3].map(|id| step(&mut *backend, SequenceId(id), 9, 75));
                assert!(ends[0] == ends[1], "{file}, {isa}, KV {kv_type}, copied");
            }
        }
    }
    let mut backend = source_of(DeviceSpec::CPU, "").load(&|_| {}).unwrap();
    assert!(backend.truncate(SequenceId(5), 0).unwrap_err().to_string().contains("sequence 5 is not open"));
}

/// A scheduler of one sequence, which sends and waits.
struct Driver {
    stages: Stages,
    replies: Receiver<StageReply>,
    step: u64,
}

impl Driver {
    fn new(as_bytes: bool) -> Driver {
        let link = LinkOptions { as_bytes, ..LinkOptions::default() };
        let options = PipelineOptions { split: Split::Layers(vec![3, 5]), link, ..PipelineOptions::default() };
        let devices = DeviceSpec::parse_list("cpu,cpu").unwrap();
        let pipeline = HeterogeneousPipeline::with_options(&devices, DEMO_MODEL, options).unwrap();
        let (sender, replies) = channel();
        let options = StartOptions { inbox: 8, probe: Probe::default(), progress: None, wrap: None };
        let stages = stages::start(&pipeline, &options, move |reply| sender.send(reply).unwrap()).unwrap();
        Driver { stages, replies, step: 0 }
    }

    fn send(&self, message: StageMessage) {
        self.stages.first.send(message, None, Instant::now()).unwrap();
    }

    fn reply(&self) -> StageReply {
        self.replies.recv_timeout(Duration::from_secs(20)).expect("a reply")
    }

    fn open(&self, id: u64) {
        self.send(StageMessage::Open { id: SequenceId(id), capacity: 120, prefix: None });
    }

    /// The most likely tokens behind each of the rows.
    fn compute(&mut self, id: u64, position: usize, decode: bool, tokens: &[u32]) -> Vec<u32> {
        let slice = rows(id, position, tokens.len(), decode, Wanted::Best { rows: tokens.len(), k: 1 });
        let batch = MicroBatch { slices: vec![slice], tokens: tokens.to_vec() };
        let (step, times) = (self.step, StepTimes::new(Duration::ZERO));
        self.step += 1;
        self.send(StageMessage::Step { step, batch, times, hidden: Vec::new() });
        let StageReply::Done { step: done, mut predictions, .. } = self.reply() else { panic!("step {step} failed") };
        assert_eq!((done, predictions.len(), predictions[0].0), (step, 1, SequenceId(id)));
        let token = |prediction| match prediction {
            Prediction::Best(best) => best[0].0,
            Prediction::Logits(logits) => best(&logits),
        };
        predictions.remove(0).1.into_iter().map(token).collect()
    }

    fn finish(self) {
        let Driver { stages: Stages { first, threads, .. }, .. } = self;
        drop(first);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

/// Speculative decoding by hand: a draft that is right for a while, one step that checks it, and back.
#[test]
fn a_checked_draft_gives_the_tokens_of_single_steps() {
    let prompt = tokens(20, 29);
    let mut plain = Driver::new(false);
    plain.open(1);
    let mut wanted = vec![*plain.compute(1, 0, false, &prompt).last().unwrap()];
    while wanted.len() < 60 {
        let position = 20 + wanted.len() - 1;
        wanted.push(plain.compute(1, position, true, &wanted[wanted.len() - 1..])[0]);
    }
    plain.finish();
    for as_bytes in [false, true] {
        let mut driver = Driver::new(as_bytes);
        driver.open(7);
        let mut found = vec![*driver.compute(7, 0, false, &prompt).last().unwrap()];
        let mut steps = 0;
        while found.len() < 50 {
            // Of four guesses the first few are right, none to all of them.
            let (known, right) = (found.len(), steps % 5);
            let guess = |i: usize| if i < right { wanted[known + i] } else { (wanted[known + i] + 1) % 700 };
            let draft: Vec<u32> = [found[known - 1]].into_iter().chain((0..4).map(guess)).collect();
            let position = 20 + known - 1;
            let predicted = driver.compute(7, position, true, &draft);
            let kept = draft[1..].iter().zip(&predicted).take_while(|(guess, predicted)| guess == predicted).count();
            assert_eq!(kept, right);
            found.extend(&predicted[..kept + 1]);
            driver.send(StageMessage::Truncate { id: SequenceId(7), length: position + 1 + kept });
            steps += 1;
        }
        assert_eq!(found, wanted[..found.len()]);
        assert!(steps < 20, "{steps}");
        driver.finish();
    }
}

#[test]
fn a_stage_refuses_what_contradicts_itself_and_goes_on() {
    let mut driver = Driver::new(true);
    driver.open(1);
    for (slice, tokens, reason) in [
        (
            rows(1, 0, 2, false, Wanted::Logits { rows: 3 }),
            vec![5, 6],
            "predictions of 3 rows are wanted of sequence 1",
        ),
        (rows(1, 0, 2, false, Wanted::Nothing), vec![5], "another number of rows"),
        (rows(1, 0, usize::MAX, false, Wanted::Nothing), vec![5], "another number of rows"),
    ] {
        let batch = MicroBatch { slices: vec![slice], tokens };
        let times = StepTimes::new(Duration::ZERO);
        driver.send(StageMessage::Step { step: 99, batch, times, hidden: Vec::new() });
        let StageReply::StepFailed { step: 99, failure } = driver.reply() else { panic!("{reason}") };
        assert!(failure.stage == 0 && failure.reason.contains(reason), "{failure:?}");
    }
    driver.send(StageMessage::Truncate { id: SequenceId(2), length: 0 });
    let StageReply::SequenceFailed { id: SequenceId(2), failure } = driver.reply() else { panic!("truncated") };
    assert!(failure.reason.contains("sequence 2 is not open"), "{failure:?}");
    assert_eq!(driver.compute(1, 0, false, &[5, 6]).len(), 2);
    driver.send(StageMessage::Close { id: SequenceId(1) });
    assert_eq!(driver.reply(), StageReply::Closed { id: SequenceId(1) });
    driver.finish();
}
