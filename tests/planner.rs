//! Measured splits from the model to the running executor. Times on a shared machine vary, so nothing here depends on
//! more of them than that a stage made much slower gets fewer layers; `plan_pipeline --verify` compares predictions.

mod common;

use std::path::Path;

use candle_pipeline::pipeline::plan::{Fit, Placement, Problem};
use candle_pipeline::{
    DEMO_MODEL, DeviceSpec, ExecutorOptions, HeterogeneousPipeline, HeterogeneousPipelineExecutor, KvType, LinkOptions,
    MeasuredSplit, Objective, PipelineOptions, SimulatedLink, Split, WireType,
};
use common::{bits, greedy};

fn devices(names: &str) -> Vec<DeviceSpec> {
    DeviceSpec::parse_list(names).unwrap()
}

fn measured(cache: Option<&Path>) -> MeasuredSplit {
    MeasuredSplit {
        objective: Objective::Throughput,
        sequences: 4,
        cache: cache.map(Path::to_path_buf),
        ..MeasuredSplit::default()
    }
}

fn short() -> PipelineOptions {
    PipelineOptions { context_length: Some(64), kv_type: KvType::F32, ..PipelineOptions::default() }
}

fn problem(names: &str, model: &str) -> Problem {
    HeterogeneousPipeline::measure(&devices(names), model, short(), &measured(None)).unwrap()
}

#[test]
fn every_layer_head_and_link_has_a_cost_on_every_device() {
    for model in ["", "/demo-q8_0.gguf"] {
        // The head is what a step with it takes longer, and more rows take longer than fewer, as long as nothing else
        // comes between: one of a few measurements on a busy machine will do.
        let plausible = |problem: &Problem| {
            problem.devices.iter().all(|device| {
                let layers = device.cost.layers.iter().all(|layer| layer.prefill > layer.decode(1));
                layers && device.cost.head.decode(4) > 0.0
            })
        };
        let mut problems = (0..5).map(|_| problem("cpu@threads=1,cpu", &format!("{DEMO_MODEL}{model}")));
        let problem = problems.find(plausible).expect("33 rows take longer than one, and the head takes time");
        assert_eq!(problem.devices.len(), 2);
        for device in &problem.devices {
            assert_eq!(device.cost.layers.len(), 8);
            for layer in &device.cost.layers {
                let rows: Vec<usize> = layer.decode.iter().map(|&(rows, _)| rows).collect();
                assert_eq!(rows, [1, 2, 4]);
                assert!(layer.prefill > 0.0 && layer.decode.iter().all(|&(_, seconds)| seconds > 0.0));
            }
        }
        assert!(problem.links[0][1].latency > 0.0 && problem.scheduler > 0.0);
    }
}

#[test]
fn layers_of_all_kinds_are_measured() {
    // Sliding windows in every other layer, and a tied head.
    let model = common::fixture("families").join("gemma2");
    let problem = problem("cpu@threads=1", model.to_str().unwrap());
    assert!(problem.devices[0].cost.layers.iter().all(|layer| layer.decode(1) > 0.0));
}

#[test]
fn a_device_made_slower_gets_fewer_layers_and_a_worthless_one_none() {
    let mut problem = problem("cpu@threads=1,cpu@threads=1", DEMO_MODEL);
    let cost = problem.devices[0].cost.clone();
    problem.devices[1].cost = cost.clone().slowed(8.0);
    let plan = problem.plan(Objective::Throughput).unwrap();
    if let [first, second] = &plan.stages[..] {
        assert!(first.placement.layers.len() > second.placement.layers.len(), "{plan}");
    }
    problem.devices[1].cost = cost.slowed(10_000.0);
    let plan = problem.plan(Objective::Throughput).unwrap();
    assert_eq!(plan.stages.len(), 1, "{plan}");
    assert_eq!(plan.left_out.len(), 1);
    assert!(plan.to_string().contains("fewer devices are faster"), "{plan}");
}

#[test]
fn a_simulated_link_costs_its_latency_and_its_bytes() {
    let options = |wire_type| {
        let simulated = Some("5,1e6".parse::<SimulatedLink>().unwrap());
        PipelineOptions { link: LinkOptions { wire_type, simulated, ..LinkOptions::default() }, ..short() }
    };
    for (wire_type, bytes) in [(None, 4.0), (Some(WireType::BF16), 2.0)] {
        let measured = measured(None);
        let names = devices("cpu@threads=1,cpu@threads=1");
        let problem = HeterogeneousPipeline::measure(&names, DEMO_MODEL, options(wire_type), &measured).unwrap();
        let hidden = HeterogeneousPipeline::new(&names, DEMO_MODEL).unwrap().config().hidden_size as f64;
        let link = problem.links[0][1];
        assert!((0.005..0.006).contains(&link.latency), "{link:?}");
        assert!((link.wire_per_row - hidden * bytes / 1e6).abs() < 1e-9, "{link:?}");
        let cut = [Placement { device: 0, layers: 0..4 }, Placement { device: 1, layers: 4..8 }];
        assert!(problem.predict(&cut).one.seconds() > 0.005 + hidden * bytes / 1e6);
    }
}

#[tokio::test]
async fn a_measured_split_runs_with_the_tokens_of_any_other_and_measures_once() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("costs.json");
    let wanted = common::executor(DEMO_MODEL, "cpu", None).await.unwrap();
    let wanted = bits(&wanted.infer_with(&[5, 6, 7], &greedy(12)).await.unwrap());
    let mut plans = Vec::new();
    for _ in 0..2 {
        let options = PipelineOptions { split: Split::Measured(measured(Some(&cache))), ..short() };
        let names = devices("cpu@threads=1,cpu@threads=1,cpu,cpu");
        let pipeline = HeterogeneousPipeline::with_options(&names, DEMO_MODEL, options).unwrap();
        let plan = pipeline.plan().unwrap().clone();
        assert!(pipeline.to_string().contains("tokens/s"), "{pipeline}");
        assert_eq!(plan.stages.len(), pipeline.stages().len());
        let layers: Vec<usize> = pipeline.stages().iter().flat_map(|stage| stage.layers.clone()).collect();
        assert_eq!(layers, (0..8).collect::<Vec<_>>());
        assert_eq!(pipeline.devices().len(), pipeline.ropes().len());
        let executor = HeterogeneousPipelineExecutor::with_options(pipeline, DEMO_MODEL, ExecutorOptions::default());
        let executor = executor.await.unwrap();
        assert!(bits(&executor.infer_with(&[5, 6, 7], &greedy(12)).await.unwrap()) == wanted);
        plans.push((plan, std::fs::read(&cache).unwrap()));
    }
    // Equal to the last digit: the second time nothing was measured.
    assert_eq!(plans[0].0.prediction, plans[1].0.prediction);
    assert!(plans[0].1 == plans[1].1);
    // Another context is measured beside it, and measuring again changes the file.
    let pipeline = |context, remeasure| {
        let split = Split::Measured(MeasuredSplit { remeasure, ..measured(Some(&cache)) });
        let options = PipelineOptions { split, context_length: Some(context), ..PipelineOptions::default() };
        HeterogeneousPipeline::with_options(&devices("cpu@threads=1"), DEMO_MODEL, options).unwrap();
        std::fs::read(&cache).unwrap()
    };
    let longer = pipeline(128, false);
    assert!(longer.len() > plans[0].1.len());
    let again = pipeline(128, true);
    assert!(again != longer);
}

#[tokio::test]
async fn a_link_of_f32_is_exact_and_of_bf16_nearly() {
    let slow = Some("1".parse::<SimulatedLink>().unwrap());
    let mut found = Vec::new();
    for (wire_type, simulated) in
        [(None, None), (Some(WireType::F32), slow), (Some(WireType::F16), slow), (Some(WireType::BF16), slow)]
    {
        let link = LinkOptions { wire_type, simulated, ..LinkOptions::default() };
        let options = PipelineOptions { split: Split::Layers(vec![3, 5]), link, ..PipelineOptions::default() };
        let pipeline = HeterogeneousPipeline::with_options(&devices("cpu,cpu"), DEMO_MODEL, options).unwrap();
        let executor = HeterogeneousPipelineExecutor::new(pipeline, DEMO_MODEL).await.unwrap();
        let began = std::time::Instant::now();
        let generation = executor.infer_with(&[5, 6, 7, 8], &greedy(10)).await.unwrap();
        if simulated.is_some() {
            assert!(began.elapsed() >= std::time::Duration::from_millis(10), "ten steps over a link of 1 ms");
        }
        found.push(generation.prompt_logits.unwrap());
    }
    let [plain, f32, f16, bf16] = &found[..] else { unreachable!() };
    assert!(plain.iter().zip(f32).all(|(a, b)| a.to_bits() == b.to_bits()));
    let furthest = |other: &[f32]| plain.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(furthest(f16) > 0.0 && furthest(f16) < 0.05, "{}", furthest(f16));
    assert!(furthest(bf16) > furthest(f16) && furthest(bf16) < 0.5, "{}", furthest(bf16));
}

#[test]
fn a_refused_plan_names_a_context_that_is_then_planned() {
    // A rope without end takes any context, so KV for it is more than there is.
    let model = common::fixture("families").join("llama-dynamic-rope");
    let model = model.to_str().unwrap();
    let plan = |context_length| {
        let split = Split::Measured(MeasuredSplit { sequences: 1 << 20, ..measured(None) });
        let options = PipelineOptions { split, context_length: Some(context_length), ..PipelineOptions::default() };
        HeterogeneousPipeline::with_options(&devices("cpu@threads=1"), model, options)
    };
    let message = plan(1 << 16).unwrap_err().to_string();
    assert!(message.contains("cpu@threads=1") && message.contains("what would fit"), "{message}");
    let mut problem =
        HeterogeneousPipeline::measure(&devices("cpu@threads=1"), model, short(), &measured(None)).unwrap();
    problem.workload.context = 1 << 16;
    problem.workload.sequences = 1 << 20;
    let fits = problem.nearest_fits();
    assert!(!fits.is_empty());
    for fit in fits {
        let mut smaller = problem.clone();
        match fit {
            Fit::Context(context) => smaller.workload.context = context,
            Fit::Sequences(sequences) => smaller.workload.sequences = sequences,
            other => panic!("{other}"),
        }
        smaller.plan(Objective::Throughput).unwrap();
    }
}
