use proptest::prelude::*;

use super::activation::tests::layer;
use super::activation::{AnomalyKind, Place};
use super::*;
use crate::instrument::{AttentionFilter, ModelFacts, StageFacts, TokenRank};

fn sound(index: usize) -> LayerActivations {
    layer(index, Place::Input, &[-1.0, 2.0])
}

fn broken(index: usize) -> LayerActivations {
    layer(index, Place::PostFfn, &[1.0, f32::NAN])
}

fn row(layer: usize, head: usize, weights: &[f32]) -> AttentionRow<'_> {
    AttentionRow { request: 1, layer, head, position: weights.len() - 1, first: 0, weights }
}

fn lens(token: u32) -> Vec<LensLayer> {
    let layer = |layer| LensLayer {
        layer,
        top: vec![(token, 2.0), (3, 1.0)],
        tracked: vec![TokenRank { token, logit: 2.0, rank: 0 }, TokenRank { token: 3, logit: 1.0, rank: 1 }],
    };
    (0..2).map(layer).collect()
}

fn slice(request: u64) -> StepSlice {
    StepSlice { request, position: 0, rows: 1, prefill: false }
}

/// Events of a step in one stage, as a stage tells them.
fn stage_step(tracer: &mut ModelTracer, stage: usize, step: u64, layers: Vec<LayerActivations>) {
    let no_time = std::time::Duration::ZERO;
    tracer.hear(&Event::StageStep {
        stage,
        step,
        rows: 1,
        queued: no_time,
        wait: no_time,
        compute: no_time,
        copy: no_time,
        bytes: 0,
    });
    tracer.hear(&Event::Activations { stage, step, rows: 1, layers });
}

fn opened(stages: usize) -> Event {
    let stage = StageFacts { kv_bytes_per_position: 100, ..StageFacts::default() };
    Event::ModelOpened(Arc::new(ModelFacts { stages: vec![stage; stages], ..ModelFacts::default() }))
}

fn sampled(request: u64, token: u32) -> Event {
    let no_time = std::time::Duration::ZERO;
    Event::Sampled { request, token, index: 0, since: no_time, duration: no_time }
}

#[test]
fn a_tracer_with_nothing_switched_on_keeps_nothing() {
    let config = ModelTracerConfig::default();
    assert!(!config.is_enabled() && config.interest() == Interest::default());
    let mut tracer = ModelTracer::new(config).unwrap();
    tracer.begin_forward(0, vec![slice(0)]);
    tracer.record_layer(0, broken(1));
    tracer.record_attention(0, &row(0, 0, &[1.0]));
    tracer.record_lens(0, 1, 0, &lens(7));
    assert!(tracer.record_kv(&KvState::default()).is_none());
    tracer.record_quant_error(QuantError::of("w", &[1.0], &[-1.0]).unwrap());
    assert!(tracer.end_forward(0).is_none());
    assert_eq!((tracer.summary(), tracer.held_bytes()), (ModelTracerSummary::default(), 0));
}

#[test]
fn presets_ask_the_forward_pass_for_what_they_say() {
    let lightweight = ModelTracerConfig::lightweight();
    assert!(lightweight.is_enabled() && lightweight.attention.is_none() && !lightweight.logits);
    assert!(!lightweight.quant_error);
    let interest = lightweight.interest();
    assert!(
        interest.activations
            && interest.kv == Some(Duration::ZERO)
            && interest.attention.is_none()
            && interest.lens.is_none()
    );
    assert!(interest.phases.is_none() && !interest.synchronise);
    let full = ModelTracerConfig::full();
    assert!(full.quant_error && full.logits && full.attention.is_some());
    assert_eq!(full.interest().attention, Some(AttentionFilter::default()), "all heads");
    let attention = AttentionTraceConfig { layers: Some(vec![2]), heads: Some(vec![0, 3]), ..Default::default() };
    let filtered = ModelTracerConfig { attention: Some(attention), ..full.clone() };
    let wanted = AttentionFilter { layers: Some(vec![2]), heads: Some(vec![0, 3]) };
    assert_eq!(filtered.interest().attention, Some(wanted), "others are not computed");
    let named = ModelTracerConfig { tracked_tokens: Some(vec![4, 9]), ..full };
    assert_eq!(named.interest().lens, Some(LensInterest { tokens: vec![4, 9], top_k: 5 }));
}

#[test]
fn options_without_meaning_are_refused_by_name() {
    let refused = |config: ModelTracerConfig, name: &str| {
        let error = ModelTracer::new(config).unwrap_err().to_string();
        assert!(error.contains(&format!("`{name}`")), "{error}");
    };
    let full = ModelTracerConfig::full;
    refused(ModelTracerConfig { max_bytes: 1000, ..full() }, "max_bytes");
    refused(ModelTracerConfig { top_k: 0, ..full() }, "top_k");
    refused(ModelTracerConfig { tracked_tokens: Some(Vec::new()), ..full() }, "tracked_tokens");
    let thresholds = AnomalyThresholds { explosion: f64::NAN, ..AnomalyThresholds::default() };
    refused(ModelTracerConfig { thresholds, ..full() }, "explosion");
    let attention = AttentionTraceConfig { sink_share: 1.5, ..AttentionTraceConfig::default() };
    refused(ModelTracerConfig { attention: Some(attention), ..full() }, "sink_share");
}

#[test]
fn the_summary_has_nine_figures_by_name() {
    let mut tracer = ModelTracer::new(ModelTracerConfig::full()).unwrap();
    for step in 0..3 {
        tracer.begin_forward(step, vec![slice(1)]);
        tracer.record_layer(step, sound(0));
        tracer.record_layer(step, if step == 1 { broken(1) } else { sound(1) });
        tracer.record_attention(step, &row(0, 0, &[0.5, 0.5]));
        tracer.record_attention(step, &row(0, 1, &[0.5, 0.5]));
        tracer.record_lens(step, 1, step as usize, &lens(7));
        let anomaly = tracer.end_forward(step);
        assert_eq!(anomaly.map(|found| (found.layer, found.kind)), (step == 1).then_some((1, AnomalyKind::Nan)));
        tracer.record_kv(&KvState { evictions: step, lookups: 2 * step, hits: step, ..KvState::default() });
    }
    for cosine in [[1.0, 0.0], [1.0, 0.12], [1.0, 1.0]] {
        tracer.record_quant_error(QuantError::of("w", &[1.0, 0.0], &cosine).unwrap());
    }
    let json = serde_json::to_value(tracer.summary()).unwrap();
    let expected = serde_json::json!({
        "total_forwards": 3,
        "anomalies_detected": 1,
        "attention_traces": 6,
        "logit_traces": 3,
        "kv_steps": 3,
        "total_evictions": 2,
        "avg_hit_rate": 0.5,
        "quant_warnings": 1,
        "quant_criticals": 1,
    });
    assert_eq!(json, expected);
    let shown = tracer.summary().to_string();
    assert_eq!(shown.lines().count(), 9);
    assert!(shown.contains("50.0 %"), "{shown}");
    let snapshot = serde_json::to_value(tracer.snapshot()).unwrap();
    assert_eq!(snapshot["first_anomaly"]["step"], 1);
    assert_eq!(snapshot["first_anomaly"]["description"], "layer 1, post_ffn: 1 of 2 values are NaN");
    assert_eq!(snapshot["forwards"][1]["attention"][0]["head"], 0);

    tracer.clear();
    assert_eq!((tracer.summary(), tracer.held_bytes()), (ModelTracerSummary::default(), 0));
    assert!(tracer.snapshot().first_anomaly.is_none() && tracer.snapshot().forwards.is_empty());
}

#[test]
fn forward_passes_count_whatever_is_traced_of_them() {
    let only = |config: ModelTracerConfig| {
        let mut tracer = ModelTracer::new(config).unwrap();
        tracer.begin_forward(5, vec![slice(1)]);
        tracer.end_forward(5);
        assert!(tracer.end_forward(5).is_none());
        tracer.summary().total_forwards
    };
    assert_eq!(only(ModelTracerConfig { logits: true, ..ModelTracerConfig::default() }), 1);
    assert_eq!(only(ModelTracerConfig { kv_cache: true, ..ModelTracerConfig::default() }), 1);
    let attention = Some(AttentionTraceConfig::default());
    assert_eq!(only(ModelTracerConfig { attention, ..ModelTracerConfig::default() }), 1);
}

#[test]
fn what_other_collectors_asked_for_is_left_out() {
    let attention = AttentionTraceConfig { layers: Some(vec![1]), heads: Some(vec![2]), ..Default::default() };
    let config = ModelTracerConfig {
        attention: Some(attention),
        logits: true,
        tracked_tokens: Some(vec![3]),
        top_k: 1,
        ..ModelTracerConfig::default()
    };
    let mut tracer = ModelTracer::new(config).unwrap();
    for (layer, head) in [(0, 2), (1, 2), (1, 0)] {
        tracer.record_attention(0, &row(layer, head, &[1.0]));
    }
    tracer.record_lens(0, 1, 0, &lens(7));
    tracer.end_forward(0);
    let forward = &tracer.snapshot().forwards[0];
    assert_eq!(forward.attention.iter().map(|trace| (trace.layer, trace.head)).collect::<Vec<_>>(), [(1, 2)]);
    assert!(forward.logits[0].layers.iter().all(|layer| layer.top.len() == 1 && layer.tracked.len() == 1));
    assert_eq!(forward.logits[0].layers[0].tracked[0].token, 3);
    assert_eq!(tracer.summary().attention_traces, 1);
}

#[test]
fn logits_by_hand_give_the_lens() {
    let config = ModelTracerConfig { logits: true, top_k: 2, ..ModelTracerConfig::default() };
    let mut tracer = ModelTracer::new(config).unwrap();
    let logits = [(0, vec![3.0, 2.0, 1.0]), (1, vec![2.0, 1.0, 3.0]), (2, vec![0.0, 1.0, 5.0])];
    tracer.record_logits(9, 4, 11, &logits);
    tracer.record_chosen(4, 2);
    tracer.end_forward(9);
    let trace = &tracer.snapshot().forwards[0].logits[0];
    assert_eq!((trace.request, trace.position, trace.chosen), (4, 11, Some(2)));
    let decisive = trace.decisive_layer().unwrap();
    assert_eq!((decisive.token, decisive.layer, decisive.from, decisive.to), (2, 1, 2, 0));
}

#[test]
fn a_forward_pass_is_a_step_over_all_its_stages() {
    let mut tracer = ModelTracer::new(ModelTracerConfig::full()).unwrap();
    tracer.hear(&opened(2));
    // Steps overlap: the first stage is ahead.
    for step in 0..4 {
        tracer.hear(&Event::StepSent { step, slices: vec![slice(step)] });
    }
    stage_step(&mut tracer, 0, 0, vec![sound(0)]);
    stage_step(&mut tracer, 0, 1, vec![broken(0)]);
    stage_step(&mut tracer, 1, 0, vec![broken(1)]);
    stage_step(&mut tracer, 0, 2, vec![sound(0)]);
    tracer.hear(&Event::StepFinished { step: 0, outcome: StepOutcome::Computed });
    tracer.hear(&Event::StepFinished { step: 2, outcome: StepOutcome::Computed }); // the second stage passed it by
    stage_step(&mut tracer, 1, 1, vec![broken(1)]);
    tracer.hear(&Event::StepFinished { step: 1, outcome: StepOutcome::Failed });
    let summary = tracer.summary();
    assert_eq!((summary.total_forwards, summary.anomalies_detected), (1, 2));
    let snapshot = tracer.snapshot();
    let forwards: Vec<_> = snapshot.forwards.iter().map(|f| (f.step, f.complete, f.layers.len())).collect();
    assert_eq!(forwards, [(0, true, 2), (2, false, 1), (1, false, 2)]);
    assert_eq!(snapshot.forwards[0].slices, [slice(0)]);
    let first = snapshot.first_anomaly.unwrap();
    assert_eq!((first.step, first.anomaly.layer), (0, 1), "of the earliest step, though told later");

    tracer.hear(&opened(1)); // step 3 of the executor before is not step 3 of this one
    tracer.hear(&Event::StepSent { step: 3, slices: vec![slice(9)] });
    stage_step(&mut tracer, 0, 3, vec![sound(0), sound(1)]);
    tracer.hear(&Event::StepFinished { step: 3, outcome: StepOutcome::Computed });
    let last = tracer.snapshot().forwards[4].clone();
    assert_eq!((last.complete, last.layers.len(), last.slices[0].request), (true, 2, 9));
    assert_eq!(tracer.summary().total_forwards, 2);
    let kv = KvState { reserved: 7, ..KvState::default() };
    tracer.hear(&Event::Kv(kv));
    tracer.hear(&Event::Dropped { events: 3 });
    let snapshot = tracer.snapshot();
    assert_eq!((snapshot.kv[0].size_bytes, snapshot.dropped_events), (700, 3));
}

#[test]
fn a_chosen_token_goes_to_the_row_it_was_chosen_from() {
    let mut tracer = ModelTracer::new(ModelTracerConfig::full()).unwrap();
    tracer.hear(&opened(1));
    let hear_lens = |tracer: &mut ModelTracer, step, request| {
        tracer.hear(&Event::Lens { request, step, position: step as usize, layers: lens(7) });
    };
    hear_lens(&mut tracer, 0, 1);
    hear_lens(&mut tracer, 0, 2);
    hear_lens(&mut tracer, 1, 3);
    tracer.hear(&sampled(2, 70));
    tracer.hear(&sampled(1, 60));
    tracer.hear(&Event::StepFinished { step: 0, outcome: StepOutcome::Computed });
    hear_lens(&mut tracer, 2, 1);
    tracer.hear(&sampled(3, 80));
    tracer.hear(&sampled(9, 90)); // of a row that is not traced
    tracer.hear(&Event::StepFinished { step: 1, outcome: StepOutcome::Computed });
    tracer.hear(&Event::StepFinished { step: 2, outcome: StepOutcome::Computed });
    let snapshot = tracer.snapshot();
    let chosen: Vec<_> = snapshot.forwards.iter().flat_map(|f| &f.logits).map(|t| (t.request, t.chosen)).collect();
    assert_eq!(chosen, [(1, Some(60)), (2, Some(70)), (3, Some(80)), (1, None)]);
}

/// What may happen to a tracer.
#[derive(Debug, Clone)]
enum Act {
    Begin(u64),
    Layer(u64, bool),
    Attention(u64, usize),
    Lens(u64, usize),
    Kv,
    Quant(usize),
    End(u64),
    Clear,
}

fn acts() -> impl Strategy<Value = Act> {
    let step = || 0u64..400;
    prop_oneof![
        20 => step().prop_map(Act::Begin),
        40 => (step(), any::<bool>()).prop_map(|(step, sound)| Act::Layer(step, sound)),
        40 => (step(), 1usize..200).prop_map(|(step, len)| Act::Attention(step, len)),
        20 => (step(), 1usize..40).prop_map(|(step, layers)| Act::Lens(step, layers)),
        20 => Just(Act::Kv),
        20 => (0usize..2000).prop_map(Act::Quant),
        40 => step().prop_map(Act::End),
        1 => Just(Act::Clear),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn memory_stays_within_its_bound_and_the_figures_go_on(
        acts in prop::collection::vec(acts(), 1..3000),
        top_k in 0usize..40,
    ) {
        let max_bytes = LEAST_BYTES;
        let attention = Some(AttentionTraceConfig { top_k, ..AttentionTraceConfig::default() });
        let config = ModelTracerConfig { max_bytes, attention, ..ModelTracerConfig::full() };
        let mut tracer = ModelTracer::new(config).unwrap();
        let mut expected = ModelTracerSummary::default();
        for act in acts {
            match act {
                Act::Begin(step) => tracer.begin_forward(step, vec![slice(step); 1 + step as usize % 9]),
                Act::Layer(step, true) => tracer.record_layer(step, sound(0)),
                Act::Layer(step, false) => tracer.record_layer(step, broken(0)),
                Act::Attention(step, len) => {
                    tracer.record_attention(step, &row(0, 0, &vec![1.0 / len as f32; len]));
                    expected.attention_traces += 1;
                }
                Act::Lens(step, layers) => {
                    let layers: Vec<_> = (0..layers).flat_map(|_| lens(7)).collect();
                    tracer.record_lens(step, 1, 0, &layers);
                    expected.logit_traces += 1;
                }
                Act::Kv => {
                    tracer.record_kv(&KvState::default());
                    expected.kv_steps += 1;
                }
                Act::Quant(len) => {
                    tracer.record_quant_error(QuantError::of(&"n".repeat(len), &[1.0], &[-1.0]).unwrap());
                    expected.quant_criticals += 1;
                }
                Act::End(step) => _ = tracer.end_forward(step),
                Act::Clear => {
                    tracer.clear();
                    expected = ModelTracerSummary::default();
                }
            }
            prop_assert!(tracer.held_bytes() <= max_bytes, "{} of {max_bytes}", tracer.held_bytes());
        }
        let recounted = tracer.forwards.recounted() + tracer.kv.bytes() + tracer.quant.bytes();
        prop_assert_eq!(tracer.held_bytes(), recounted);
        let found = tracer.summary();
        let figures = |s: &ModelTracerSummary| (s.attention_traces, s.logit_traces, s.kv_steps, s.quant_criticals);
        prop_assert_eq!(figures(&found), figures(&expected));
    }
}

#[test]
fn a_long_run_keeps_the_latest_and_counts_them_all() {
    let config = ModelTracerConfig { max_bytes: LEAST_BYTES, ..ModelTracerConfig::full() };
    let mut tracer = ModelTracer::new(config).unwrap();
    for step in 0..5000 {
        tracer.begin_forward(step, vec![slice(1)]);
        (0..4).for_each(|index| tracer.record_layer(step, sound(index)));
        (0..8).for_each(|head| tracer.record_attention(step, &row(0, head, &[0.25; 4])));
        tracer.record_lens(step, 1, step as usize, &lens(7));
        tracer.end_forward(step);
        tracer.record_kv(&KvState::default());
        assert!(tracer.held_bytes() <= LEAST_BYTES);
    }
    let snapshot = tracer.snapshot();
    assert_eq!((snapshot.summary.total_forwards, snapshot.summary.attention_traces), (5000, 40_000));
    let kept = snapshot.forwards.len();
    assert!(kept > 5 && kept as u64 + snapshot.evicted_forwards == 5000, "{kept} kept");
    assert_eq!(snapshot.forwards.last().unwrap().step, 4999);
    assert!(snapshot.refused_traces == 0 && snapshot.held_bytes > LEAST_BYTES / 2);
}

#[test]
fn steps_under_way_that_make_way_for_each_other_still_count() {
    let config = ModelTracerConfig { max_bytes: LEAST_BYTES, ..ModelTracerConfig::full() };
    let mut tracer = ModelTracer::new(config).unwrap();
    for step in 0..3 {
        tracer.begin_forward(step, vec![slice(1)]);
    }
    // Any one of them nearly fills the room.
    for step in 0..3 {
        (0..100).for_each(|index| tracer.record_layer(step, if index == 50 { broken(index) } else { sound(index) }));
        assert!(tracer.held_bytes() <= LEAST_BYTES);
    }
    tracer.record_layer(0, broken(100)); // too late for this one
    for step in 0..3 {
        tracer.end_forward(step);
    }
    let snapshot = tracer.snapshot();
    assert_eq!((snapshot.summary.total_forwards, snapshot.summary.anomalies_detected), (3, 3));
    assert_eq!((snapshot.forwards.len(), snapshot.evicted_forwards), (1, 2));
    assert_eq!((snapshot.forwards[0].step, snapshot.forwards[0].layers.len()), (2, 100));
    assert!(snapshot.refused_traces >= 1);
}
