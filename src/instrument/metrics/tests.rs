//! Figures and rows from hand-made events whose times are known.

use super::*;
use crate::instrument::{Lap, Outcome, Phase, StageFacts, StepSlice};

const MS: Duration = Duration::from_millis(1);

/// Two stages of one layer each.
fn facts() -> ModelFacts {
    let stage = |index: usize, device: &str| StageFacts {
        device: device.into(),
        first_layer: index,
        layers: 1,
        weight_bytes: 1000,
        embedding_bytes: if index == 0 { 400 } else { 0 },
        layer_bytes: vec![600],
        head_bytes: if index == 1 { 400 } else { 0 },
        step_bytes: 1000 - 400 * (1 - index as u64),
        kv_bytes_per_position: 10,
        windows: vec![if index == 0 { Some(4) } else { None }],
        kv_budget: 5000,
    };
    ModelFacts {
        architecture: "llama".into(),
        n_layer: 2,
        kv_positions: 100,
        stages: vec![stage(0, "cpu"), stage(1, "cuda:0")],
        ..ModelFacts::default()
    }
}

/// Figures that are told events at times of a test's own.
struct Told {
    figures: Figures,
    began: Instant,
}

impl Told {
    fn with(options: MetricsOptions) -> Told {
        let began = Instant::now();
        let mut told = Told { figures: Figures::new(options, began), began };
        told.tell(0, Event::ModelOpened(Arc::new(facts())));
        told
    }

    fn tell(&mut self, ms: u32, event: Event) {
        self.figures.record(&Record { at: self.began + MS * ms, event });
    }

    /// A decode step of request 0 at `position`: the first stage takes `2 * factor` ms, the second `3 * factor`, each
    /// besides 1 ms that no phase has, 1 ms goes into the copy and 4 into waiting.
    fn step(&mut self, step: u64, position: usize, factor: u32) {
        let end = |ms: u32| 1000 * step as u32 + ms;
        let slices = vec![StepSlice { request: 0, position, rows: 1, prefill: false }];
        self.tell(end(0), Event::StepSent { step, slices });
        let stages = [(0, 2, 1, 3, [Phase::Embedding, Phase::AttnNorm]), (1, 3, 0, 1, [Phase::Sdpa, Phase::Output])];
        let mut at = 0;
        for (stage, parts, copy, queued, phases) in stages {
            let compute = parts * factor + 1;
            at += queued + compute + copy;
            self.tell(
                end(at),
                Event::StageStep {
                    stage,
                    step,
                    rows: 1,
                    queued: MS * queued,
                    wait: MS * 5,
                    compute: MS * compute,
                    copy: MS * copy,
                    bytes: 64 * u64::from(copy),
                },
            );
            let lap = |phase, parts: u32| {
                let edge = matches!(phase, Phase::Embedding | Phase::Output);
                Lap { layer: (!edge).then_some(stage), phase, duration: MS * (parts * factor) }
            };
            let laps = vec![lap(phases[0], 1), lap(phases[1], parts - 1)];
            self.tell(end(at), Event::Phases { stage, step, started: self.began, laps });
        }
    }

    fn snapshot(&mut self, ms: u32) -> Snapshot {
        self.figures.snapshot(self.began + MS * ms, SystemTime::UNIX_EPOCH + Duration::from_secs(9))
    }
}

fn told() -> Told {
    Told::with(MetricsOptions { phases: Some(Duration::ZERO), ..MetricsOptions::default() })
}

fn shown(rows: &[LatencyRow]) -> Vec<String> {
    rows.iter()
        .map(|row| format!("{}{} {} {}", "  ".repeat(row.level), row.label, row.last_ms, row.average_ms))
        .collect()
}

#[test]
fn the_tree_of_times_is_that_of_the_latest_steps_and_says_what_its_branches_leave() {
    let mut told = told();
    told.step(0, 7, 1);
    told.step(1, 8, 3);
    told.tell(3000, Event::Sampled { request: 0, token: 1, index: 0, since: MS * 40, duration: MS * 2 });
    told.tell(3000, Event::RequestStarted { request: 0, prompt_tokens: 7, queued: MS * 6 });
    let expected = [
        "Step 22 17", // 3 + 7 + 1 + 1 + 10, and 3 + 3 + 1 + 1 + 4
        "  Queue 4 4",
        "    Stage 0 (cpu) 3 3",
        "    Stage 1 (cuda:0) 1 1",
        "  Forward 17 12",
        "    Stage 0 (cpu) 7 5",
        "      embedding 3 2",
        "      Layer 0 3 2",
        "        attn_norm 3 2",
        "      other 1 1",
        "    Stage 1 (cuda:0) 10 7",
        "      Layer 1 3 2",
        "        sdpa 3 2",
        "      output 6 4",
        "      other 1 1",
        "  Transfer 1 1",
        "    Stage 0 (cpu) 1 1",
        "    Stage 1 (cuda:0) 0 0",
        "Sampling 2 2",
        "Admission 6 6",
        "Bubbles 10 10",
        "  Stage 0 (cpu) 5 5",
        "  Stage 1 (cuda:0) 5 5",
    ];
    assert_eq!(shown(&build_latency_rows(&told.snapshot(3000))), expected);
}

#[test]
fn an_average_is_over_the_latest_ten_steps() {
    let mut told = told();
    (0..5).for_each(|step| told.step(step, 1, 100));
    (5..15).for_each(|step| told.step(step, 1, 2 + u32::from(step == 14) * 10));
    let layer = &told.snapshot(0).latency.stages[1].layers[0];
    assert_eq!(layer.total, Timing { last_ns: 12_000_000, average_ns: 3_000_000 });
    assert_eq!(layer.phases, [(Phase::Sdpa, layer.total)]);
}

#[test]
fn steps_that_were_not_told_of_as_a_whole_are_left_out_and_forgotten() {
    let mut told = told();
    told.step(0, 1, 1);
    let before = told.snapshot(0).latency;
    for step in 1..1000 {
        told.tell(0, Event::StepSent { step, slices: Vec::new() });
        let (compute, copy, queued, wait) = (MS * 50, MS, MS, MS);
        told.tell(0, Event::StageStep { stage: 0, step, rows: 1, queued, wait, compute, copy, bytes: 0 });
        told.tell(0, Event::StageStep { stage: 1, step, rows: 1, queued, wait, compute, copy, bytes: 0 });
    }
    assert_eq!(told.snapshot(0).latency, before, "their phases were not told");
    assert!(told.figures.steps.open() <= 2 && told.snapshot(0).stages[0].steps == 1000);

    let mut plain = Told::with(MetricsOptions { phases: None, ..MetricsOptions::default() });
    plain.step(0, 1, 1);
    let latency = plain.snapshot(0).latency;
    assert_eq!((latency.forward.last_ns, latency.stages[0].layers.len()), (7_000_000, 0), "all steps, and no phases");
}

#[test]
fn what_comes_for_stages_and_steps_that_there_are_not_changes_nothing() {
    let mut told = told();
    let before = told.snapshot(0);
    let (compute, copy, queued, wait) = (MS, MS, MS, MS);
    told.tell(0, Event::StageStep { stage: 9, step: 0, rows: 1, queued, wait, compute, copy, bytes: 0 });
    told.tell(0, Event::Phases { stage: 9, step: 77, started: told.began, laps: Vec::new() });
    told.tell(0, Event::StageMemory { stage: 9, weights: 1, kv: 1, scratch: 1 });
    assert_eq!(told.snapshot(0), before);
}

#[test]
fn the_tree_of_bytes_adds_up_now_and_keeps_what_was_held_at_most() {
    let mut told = told();
    told.figures.holdings.start(10_000);
    told.tell(0, Event::StageMemory { stage: 0, weights: 1100, kv: 500, scratch: 70 });
    told.tell(0, Event::StageMemory { stage: 1, weights: 1000, kv: 500, scratch: 30 });
    told.tell(0, Event::Kv(KvState { limit: 100, reserved: 50, valid: 20, ..KvState::default() }));
    told.tell(0, Event::StageMemory { stage: 1, weights: 1000, kv: 100, scratch: 30 });
    told.figures.holdings.resident(13_000);
    let rows = build_memory_rows(&told.snapshot(0));
    let shown: Vec<String> = rows
        .iter()
        .map(|row| format!("{}{} {} {}", "  ".repeat(row.level), row.label, row.current_bytes, row.peak_bytes))
        .collect();
    let expected = [
        "Weights 2100 2100",
        "  Stage 0 (cpu) 1100 1100",
        "    embeddings 400 400",
        "    Layer 0 600 600",
        "    other 100 100",
        "  Stage 1 (cuda:0) 1000 1000",
        "    Layer 1 600 600",
        "    head 400 400",
        "KV cache 600 1000",
        "  Stage 0 (cpu) 500 500",
        "    used 200 200",
        "    not used yet 300 500",
        "  Stage 1 (cuda:0) 100 500",
        "    used 100 200",
        "    not used yet 0 500",
        "KV limit 2000 2000",
        "  Stage 0 (cpu) 1000 1000",
        "  Stage 1 (cuda:0) 1000 1000",
        "Scratch 100 100",
        "  Stage 0 (cpu) 70 70",
        "  Stage 1 (cuda:0) 30 30",
        "Host process 13000 13000",
        "  weights 1100 1100",
        "  KV cache 500 500",
        "  scratch 70 70",
        "  unattributed 11330 11330",
        "    at start 10000 10000",
        "    other 1330 1330",
    ];
    assert_eq!(shown, expected);
}

#[test]
fn a_decode_step_reads_the_weights_once_and_the_kv_that_each_row_looks_at() {
    let device_bandwidth = BTreeMap::from([("cuda:0".to_string(), 400_000.0)]);
    let mut told = Told::with(MetricsOptions { device_bandwidth, ..MetricsOptions::default() });
    told.step(0, 7, 1);
    let prefill = vec![StepSlice { request: 1, position: 0, rows: 50, prefill: true }];
    told.tell(0, Event::StepSent { step: 1, slices: prefill });
    let (compute, copy, queued, wait) = (MS * 500, MS, MS, MS);
    told.tell(0, Event::StageStep { stage: 0, step: 1, rows: 50, queued, wait, compute, copy, bytes: 0 });
    let [first, second] = &told.snapshot(0).stages[..] else { panic!() };
    assert_eq!(first.bandwidth.step_bytes, 600 + 4 * 10, "the first stage looks back four positions at most");
    assert_eq!((first.bandwidth.bytes_per_second, first.bandwidth.share()), (640.0 / 0.003, None));
    assert_eq!(second.bandwidth.step_bytes, 1000 + 8 * 10);
    assert_eq!(second.bandwidth.share(), Some(1080.0 / 0.004 / 400_000.0));
    assert_eq!(told.snapshot(0).tokens.prefilled, 50);
    assert_eq!((first.rows, first.transfer_bytes), (51, 64));
}

#[test]
fn occupancy_is_of_the_time_in_which_there_was_work() {
    let mut told = told();
    told.step(0, 1, 2);
    let recent = told.snapshot(0).stages[0].recent;
    let off = (recent.busy - 5.0 / 11.0).abs() + (recent.bubble - 5.0 / 11.0).abs() + (recent.copy - 1.0 / 11.0).abs();
    assert!(off < 1e-12, "{recent:?}");
    assert_eq!(Occupancy::of(0.0, 0.0, 0.0), Occupancy::default());
}

#[test]
fn requests_are_counted_from_their_arrival_to_their_end() {
    let mut told = told();
    for request in 0..5 {
        told.tell(0, Event::RequestQueued { request, submitted: told.began, prompt: vec![1, 2] });
    }
    (0..3).for_each(|request| told.tell(0, Event::RequestStarted { request, prompt_tokens: 2, queued: MS }));
    told.tell(0, Event::PrefixReused { request: 2, tokens: 1 });
    told.tell(0, Event::RequestFinished { request: 0, tokens: 3, outcome: Outcome::Error("stage_failed") });
    told.tell(0, Event::RequestFinished { request: 4, tokens: 0, outcome: Outcome::Cancelled });
    told.tell(0, Event::Dropped { events: 3 });
    let snapshot = told.snapshot(0);
    let Requests { received, waiting, running, finished, errors } = snapshot.requests;
    assert_eq!((received, waiting, running), (5, 1, 2));
    assert_eq!((finished["cancelled"], finished["error"], finished["stop"]), (1, 1, 0));
    assert_eq!(errors, BTreeMap::from([("stage_failed", 1)]));
    assert_eq!((snapshot.tokens.prompt, snapshot.tokens.reused, snapshot.tokens.prefix_hits), (6, 1, 1));
    assert_eq!(snapshot.dropped_events, 3);
    // Ends that were dropped are made up for by what the scheduler says.
    told.tell(0, Event::Kv(KvState::default()));
    let Requests { waiting, running, .. } = told.snapshot(0).requests;
    assert_eq!((waiting, running), (0, 0));
}

#[test]
fn tokens_are_counted_by_when_they_came_and_by_how_long_they_took() {
    let mut told = told();
    for index in 0..100 {
        let since = if index == 0 { MS * 30 } else { Duration::from_micros(500 * index as u64) };
        told.tell(10 * index as u32, Event::Sampled { request: 0, token: 1, index, since, duration: MS });
    }
    let tokens = told.snapshot(1100).tokens;
    assert_eq!((tokens.generated, tokens.ttft.count, tokens.inter_token.count), (100, 1, 99));
    assert_eq!(tokens.history, [25, 25, 25, 25, 0]);
    assert_eq!((tokens.per_second, tokens.history_slice), (100.0, 0.25));
    assert_eq!(told.snapshot(3000).tokens.per_second, 0.0);
    assert_eq!(told.snapshot(100_000).tokens.history.len(), 240);
    let inter_token = &tokens.inter_token;
    assert!((inter_token.p50_us as f64 / 25_000.0 - 1.0).abs() < 0.01, "{inter_token:?}");
    assert!((inter_token.p99_us as f64 / 49_500.0 - 1.0).abs() < 0.02, "{inter_token:?}");
    assert!((inter_token.sum - 0.0005 * 4950.0).abs() < 1e-9);
    let up_to = |bound: f64| inter_token.buckets.iter().find(|bucket| bucket.0 == bound).unwrap().1;
    assert_eq!((up_to(0.0005), up_to(0.01), up_to(0.025), up_to(2.5)), (1, 20, 50, 99));
}

#[test]
fn another_model_begins_anew_and_keeps_what_was_there_before_any() {
    let mut told = told();
    told.figures.holdings.start(10_000);
    told.step(0, 1, 1);
    told.tell(5, Event::ModelOpened(Arc::new(facts())));
    let snapshot = told.snapshot(5);
    assert_eq!((snapshot.stages[0].steps, snapshot.latency.step), (0, Timing::default()));
    assert_eq!((snapshot.memory.host.at_start, snapshot.uptime), (10_000, 0.0));
}

#[test]
fn options_without_a_meaning_are_refused() {
    let refused = |options| Metrics::start(options).err().expect("refused").to_string();
    assert!(refused(MetricsOptions { window: 0, ..MetricsOptions::default() }).contains("`window`"));
    let device_bandwidth = BTreeMap::from([("cpu".to_string(), f64::NAN)]);
    let message = refused(MetricsOptions { device_bandwidth, ..MetricsOptions::default() });
    assert!(message.contains("NaN bytes a second of cpu"), "{message}");
}
