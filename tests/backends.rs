//! The CPU's own backend and the one over candle's tensors run the same layer text over operations of their own: on every
//! family they compute the same and are seen in the same order.

mod common;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use candle_core::Tensor;
use candle_pipeline::backend::{
    CandleBackend, MicroBatch, SequenceId, SequenceSlice, StageBackend, StageOutput, StageSource, Wanted,
};
use candle_pipeline::instrument::{Collector, Event, Interest, LayerActivations, Phase, Probe, Record, Watch};
use candle_pipeline::{DEMO_MODEL, DeviceSpec, HeterogeneousPipeline, KvType, PipelineOptions, Split};

fn models() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(common::fixture("families")).expect("fixtures are part of the repository");
    let dirs = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let models: Vec<PathBuf> = dirs.chain([PathBuf::from(DEMO_MODEL)]).collect();
    assert!(models.len() > 20, "fixtures are missing");
    models
}

/// The stages of a model on CPUs, cut so.
fn sources(model: &str, cut: &[usize]) -> Vec<StageSource> {
    let options =
        PipelineOptions { kv_type: KvType::F32, split: Split::Layers(cut.to_vec()), ..PipelineOptions::default() };
    let pipeline = HeterogeneousPipeline::with_options(&vec![DeviceSpec::CPU; cut.len()], model, options).unwrap();
    (0..cut.len()).map(|stage| pipeline.stage_source(stage)).collect()
}

fn whole(model: &str) -> StageSource {
    let pipeline = HeterogeneousPipeline::new(&[DeviceSpec::CPU], model).unwrap();
    let layers = pipeline.stage_source(0).config.num_hidden_layers;
    sources(model, &[layers]).remove(0)
}

fn slice(id: u64, position: usize, len: usize, decode: bool, wanted: Wanted) -> SequenceSlice {
    SequenceSlice { id: SequenceId(id), position, len, length: position + len, decode, wanted }
}

/// Two steps: prompts of two sequences, then one row of the first beside a third prompt of which nothing is wanted yet.
fn steps() -> [MicroBatch; 2] {
    let tokens = |range: std::ops::Range<u32>| range.map(|i| 1 + i * 7 % 60).collect();
    [
        MicroBatch {
            slices: vec![slice(1, 0, 20, false, Wanted::Logits { rows: 1 }), slice(2, 0, 3, false, Wanted::Nothing)],
            tokens: tokens(0..23),
        },
        MicroBatch {
            slices: vec![
                slice(1, 20, 1, true, Wanted::Logits { rows: 1 }),
                slice(2, 3, 4, false, Wanted::Logits { rows: 1 }),
            ],
            tokens: tokens(40..45),
        },
    ]
}

/// Keeps what is emitted.
#[derive(Default)]
struct Kept(Mutex<Vec<Event>>);

impl Collector for Kept {
    fn record(&self, record: &Arc<Record>) {
        self.0.lock().unwrap().push(record.event.clone());
    }
}

/// What a step was seen to do.
struct Seen {
    logits: Vec<Vec<f32>>,
    laps: Vec<(Option<usize>, Phase)>,
    activations: Vec<LayerActivations>,
}

/// Runs the steps through stages, the last of which has the head.
fn run(mut stages: Vec<Box<dyn StageBackend>>) -> Vec<Seen> {
    let ids = [1, 2].map(SequenceId);
    stages.iter_mut().for_each(|stage| ids.iter().for_each(|&id| stage.open(id, 32).unwrap()));
    let interest = Interest { phases: Some(Duration::ZERO), activations: true, ..Interest::default() };
    let seen = |batch: MicroBatch| {
        let kept = Arc::new(Kept::default());
        let mut input: Option<Tensor> = None;
        let mut logits = Vec::new();
        for stage in &mut stages {
            let mut watch = Watch::of(&interest, Probe::new(kept.clone()));
            match stage.forward(&batch, input.take(), &mut watch).unwrap() {
                StageOutput::Activations(x) => input = Some(x),
                StageOutput::Logits(found) => logits = found,
                StageOutput::Predictions(_) => unreachable!("logits were wanted"),
            }
            watch.finish(batch.tokens.len());
        }
        let (mut laps, mut activations) = (Vec::new(), Vec::new());
        for event in kept.0.lock().unwrap().drain(..) {
            match event {
                Event::Phases { laps: of_stage, .. } => {
                    laps.extend(of_stage.iter().map(|lap| (lap.layer, lap.phase)));
                }
                Event::Activations { layers, .. } => activations.extend(layers),
                _ => {}
            }
        }
        Seen { logits, laps, activations }
    };
    steps().into_iter().map(seen).collect()
}

fn candle(source: &StageSource) -> Box<dyn StageBackend> {
    Box::new(CandleBackend::load(source, &|_| {}).unwrap())
}

/// Largest difference as a share of the largest magnitude.
fn relative_difference(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let size = wanted.iter().fold(0f32, |size, value| size.max(value.abs()));
    found.iter().zip(wanted).fold(0f32, |worst, (a, b)| worst.max((a - b).abs())) / size
}

#[test]
fn both_backends_compute_the_same_of_every_family() {
    let mut wrong = Vec::new();
    for model in models() {
        let model = model.to_str().unwrap();
        let source = whole(model);
        let layers = source.config.num_hidden_layers;
        let (expected, found) = (run(vec![candle(&source)]), run(vec![source.load(&|_| {}).unwrap()]));
        for (expected, found) in expected.iter().zip(&found) {
            assert_eq!(expected.logits.len(), found.logits.len());
            for (expected, found) in expected.logits.iter().zip(&found.logits) {
                let difference = relative_difference(found, expected);
                if difference.is_nan() || difference > 1e-4 {
                    wrong.push(format!("{model}: logits differ by {difference:e}"));
                }
            }
            let places = |layer: &LayerActivations| {
                let stats = [layer.input, layer.post_norm, layer.post_attention, layer.post_ffn, layer.output];
                stats.map(|stats| stats.l2)
            };
            let stats = |seen: &Seen| seen.activations.iter().flat_map(places).map(|l2| l2 as f32).collect::<Vec<_>>();
            let difference = relative_difference(&stats(found), &stats(expected));
            if difference.is_nan() || difference > 1e-4 {
                wrong.push(format!("{model}: values within the layers differ by {difference:e}"));
            }
            let mut order = vec![(None, Phase::Embedding)];
            order.extend((0..layers).flat_map(|layer| Phase::LAYER.map(|phase| (Some(layer), phase))));
            order.push((None, Phase::Output));
            assert_eq!((&expected.laps, &found.laps), (&order, &order), "{model}");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn candles_stages_equal_the_uncut_model_to_the_last_bit() {
    let expected = run(vec![candle(&whole(DEMO_MODEL))]);
    for cut in [&[1, 7][..], &[3, 2, 3]] {
        let found = run(sources(DEMO_MODEL, cut).iter().map(candle).collect());
        for (expected, found) in expected.iter().zip(&found) {
            let bits = |seen: &Seen| seen.logits.iter().flatten().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert!(bits(found) == bits(expected), "{cut:?}");
            assert!(found.activations == expected.activations, "{cut:?}");
        }
    }
}

#[test]
fn both_backends_refuse_tokens_that_the_table_lacks() {
    let source = whole(DEMO_MODEL);
    let vocab_size = source.config.vocab_size;
    for mut backend in [candle(&source), source.load(&|_| {}).unwrap()] {
        backend.open(SequenceId(1), 8).unwrap();
        let mut step = |tokens: Vec<u32>| {
            let slices = vec![slice(1, 0, tokens.len(), false, Wanted::Logits { rows: 1 })];
            backend.forward(&MicroBatch { slices, tokens }, None, &mut Watch::off())
        };
        let error = step(vec![1, vocab_size as u32]).unwrap_err().to_string();
        assert!(error.contains(&format!("token {vocab_size} is outside the {vocab_size} rows")), "{error}");
        assert!(step(vec![1, vocab_size as u32 - 1]).is_ok(), "the sequence is still open");
    }
}

#[test]
fn both_backends_refuse_input_that_is_not_theirs() {
    let [first, last]: [StageSource; 2] = sources(DEMO_MODEL, &[4, 4]).try_into().ok().unwrap();
    let hidden = first.config.hidden_size;
    let activations = |rows: usize| Tensor::zeros((rows, hidden), candle_core::DType::F32, &candle_core::Device::Cpu);
    for load in [candle as fn(&StageSource) -> _, |source: &StageSource| source.load(&|_| {}).unwrap()] {
        let (mut first, mut last): (Box<dyn StageBackend>, Box<dyn StageBackend>) = (load(&first), load(&last));
        let step = |stage: &mut Box<dyn StageBackend>, input: Option<Tensor>| {
            stage.open(SequenceId(1), 8).unwrap();
            let slices = vec![slice(1, 0, 2, false, Wanted::Logits { rows: 1 })];
            stage.forward(&MicroBatch { slices, tokens: vec![1, 2] }, input, &mut Watch::off())
        };
        let wrong = [
            step(&mut first, Some(activations(2).unwrap())),
            step(&mut last, None),
            step(&mut last, Some(activations(3).unwrap())),
        ];
        let reasons = wrong.map(|result| result.unwrap_err().to_string());
        assert!(reasons[..2].iter().all(|reason| reason.contains("only the first stage is given tokens")));
        assert!(reasons[2].contains("for 2 rows of"), "{reasons:?}");
        assert!(step(&mut last, Some(activations(2).unwrap())).is_ok());
    }
}
