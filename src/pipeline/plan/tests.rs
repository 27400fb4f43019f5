use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::super::cost::StepSeconds;
use super::*;

fn even(layers: usize) -> WeightBytes {
    WeightBytes { embeddings: 3, layers: vec![10; layers], head: 5, tied: false }
}

fn assert_each_layer_once(ranges: &[Range<usize>], layers: usize) {
    let covered: Vec<usize> = ranges.iter().cloned().flatten().collect();
    assert_eq!(covered, (0..layers).collect::<Vec<_>>(), "{ranges:?}");
    assert!(ranges.iter().all(|range| !range.is_empty()), "{ranges:?}");
}

#[test]
fn every_number_of_layers_and_stages_assigns_each_layer_once() {
    for layers in 1..=100 {
        for stages in 1..=8 {
            let budgets: Vec<u64> = (0..stages).map(|s| 1000 + 700 * s as u64).collect();
            match split_by_bytes(&even(layers), 1, &budgets) {
                Ok(ranges) => {
                    assert_eq!(ranges.len(), stages);
                    assert_each_layer_once(&ranges, layers);
                }
                Err(_) => assert!(stages > layers),
            }
        }
    }
}

#[test]
fn a_device_with_twice_the_memory_gets_about_twice_the_layers() {
    let ranges = split_by_bytes(&even(30), 0, &[2000, 1000]).unwrap();
    assert_eq!(ranges, [0..20, 20..30]);
}

#[test]
fn given_splits_are_taken_or_refused_with_the_reason() {
    assert_eq!(given_split(8, &[5, 3], 2).unwrap(), [0..5, 5..8]);
    assert_eq!(given_split(8, &[1, 7], 2).unwrap(), [0..1, 1..8]);
    for (counts, devices, reason) in [
        (&[8, 0][..], 2, "without layers"),
        (&[5, 4], 2, "8 layers"),
        (&[8], 2, "1 parts for 2 devices"),
        (&[usize::MAX, 9], 2, "8 layers"),
    ] {
        let message = given_split(8, counts, devices).unwrap_err().to_string();
        assert!(message.contains(reason) && message.contains("`split`"), "{message}");
    }
}

/// Tries every cut.
fn brute_force(weights: &WeightBytes, kv: u64, budgets: &[u64], stage: usize, start: usize) -> f64 {
    let layers = weights.layers.len();
    let share = |range: Range<usize>| {
        let mut bytes = weights.layers[range.clone()].iter().sum::<u64>() + kv * range.len() as u64;
        bytes += if range.start == 0 { weights.embeddings } else { 0 };
        bytes += if range.end == layers { weights.head } else { 0 };
        bytes as f64 / budgets[stage] as f64
    };
    if stage + 1 == budgets.len() {
        return if start < layers { share(start..layers) } else { f64::INFINITY };
    }
    (start + 1..layers)
        .map(|end| share(start..end).max(brute_force(weights, kv, budgets, stage + 1, end)))
        .fold(f64::INFINITY, f64::min)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn no_cut_fills_the_fullest_device_less(
        layers in prop::collection::vec(1u64..1000, 1..9),
        budgets in prop::collection::vec(1u64..10_000, 1..5),
        embeddings in 0u64..3000,
        head in 0u64..3000,
        kv in 0u64..100,
    ) {
        prop_assume!(budgets.len() <= layers.len());
        let weights = WeightBytes { embeddings, layers, head, tied: false };
        let ranges = split_by_bytes(&weights, kv, &budgets).unwrap();
        assert_each_layer_once(&ranges, weights.layers.len());
        let fullest = ranges.iter().zip(&budgets).map(|(range, &budget)| {
            let bytes = weights.stage(range) + kv * range.len() as u64;
            bytes as f64 / budget as f64
        }).fold(0.0, f64::max);
        let best = brute_force(&weights, kv, &budgets, 0, 0);
        prop_assert!((fullest - best).abs() <= 1e-9 * best, "{ranges:?}: {fullest}, best {best}");
    }
}

fn seconds(decode: &[(usize, f64)]) -> StepSeconds {
    StepSeconds { decode: decode.to_vec(), prefill: 0.1 }
}

/// Devices whose layers all take the same a row, with memory for everything and links that cost nothing.
fn problem(layers: usize, devices: &[(&str, f64)], sequences: usize) -> Problem {
    let device = |&(name, layer): &(&str, f64)| PlanDevice {
        spec: name.parse().unwrap(),
        cost: DeviceCost {
            layers: vec![seconds(&[(1, layer), (16, 16.0 * layer)]); layers],
            head: seconds(&[(1, layer), (16, 16.0 * layer)]),
            ..DeviceCost::default()
        },
        free_bytes: 1 << 40,
        kv_bytes_per_layer: 1,
        working_bytes: 7,
        logits_bytes: 2,
    };
    Problem {
        weights: even(layers),
        weight_type: WeightType::F32,
        devices: devices.iter().map(device).collect(),
        links: vec![vec![LinkCost::default(); devices.len()]; devices.len()],
        scheduler: 0.0,
        workload: Workload { context: 10, sequences },
    }
}

fn cut_of(plan: &Plan) -> Vec<(usize, Range<usize>)> {
    plan.stages.iter().map(|stage| (stage.placement.device, stage.placement.layers.clone())).collect()
}

#[test]
fn throughput_balances_unequal_devices_and_latency_takes_the_fastest() {
    let problem = problem(12, &[("cuda:0", 0.001), ("cuda:1", 0.003)], 8);
    let plan = problem.plan(Objective::Throughput).unwrap();
    // 10 layers at 1 against 2 layers and the head, which counts as one, at 3.
    assert_eq!(cut_of(&plan), [(0, 0..10), (1, 10..12)]);
    assert_eq!((plan.prediction.all.micro_batches, plan.prediction.all.rows), (2, 4));
    let plan = problem.plan(Objective::Latency).unwrap();
    assert_eq!(cut_of(&plan), [(0, 0..12)]);
    assert_eq!(plan.left_out, ["cuda:1".parse().unwrap()]);
    assert!((plan.prediction.one.seconds() - 0.013).abs() < 1e-12);
    let with_all = plan.with_all_devices.as_ref().unwrap();
    assert!(with_all.one.seconds() > plan.prediction.one.seconds());
    assert!(plan.to_string().contains("fewer devices are faster here"), "{plan}");
}

#[test]
fn a_slow_link_is_worth_it_only_for_enough_sequences() {
    let mut problem = problem(12, &[("cuda:0", 0.001), ("cuda:1", 0.001)], 1);
    let link = LinkCost { latency: 0.005, copy: 0.0, copy_per_row: 0.0, wire_per_row: 1e-4 };
    problem.links[0][1] = link;
    assert_eq!(problem.plan(Objective::Throughput).unwrap().stages.len(), 1);
    problem.workload.sequences = 32;
    let plan = problem.plan(Objective::Throughput).unwrap();
    assert_eq!(plan.stages.len(), 2);
    // A link so narrow that it is the bottleneck.
    problem.links[0][1].wire_per_row = 0.02;
    assert_eq!(problem.plan(Objective::Throughput).unwrap().stages.len(), 1);
    let cut = [Placement { device: 0, layers: 0..6 }, Placement { device: 1, layers: 6..12 }];
    let round = problem.predict(&cut).all;
    assert!((round.seconds() - 2.0 * 16.0 * 0.02).abs() < 1e-12, "{round:?}");
}

#[test]
fn cpu_devices_that_compute_at_once_are_expected_to_make_each_other_slower() {
    let cpus = [("cpu@threads=1", 0.01), ("cpu@threads=1", 0.01)];
    let cut = [Placement { device: 0, layers: 0..6 }, Placement { device: 1, layers: 6..11 }];
    let mut problem = problem(11, &cpus, 8);
    let alone = problem.predict(&cut);
    // Six layers, and five with the head: both are always busy.
    assert!((alone.all.seconds() - 2.0 * 6.0 * 4.0 * 0.01).abs() < 1e-9, "{alone:?}");
    for device in &mut problem.devices {
        device.cost.crowded = vec![(1, 3.0), (4, 1.5), (8, 1.1)];
    }
    let crowded = problem.predict(&cut);
    assert_eq!(crowded.one, alone.one, "a sequence alone is in one stage at a time");
    assert!((crowded.all.seconds() / alone.all.seconds() - 1.5).abs() < 1e-9, "{crowded:?}");
    // Made four times slower by waiting, the second stage uses the memory as long as before, beside the first.
    problem.devices[1].cost = problem.devices[1].cost.clone().slowed(4.0);
    let slowed = problem.predict(&cut).all;
    assert!((slowed.stages[1] / (4.0 * 6.0 * 4.0 * 0.01) - 1.5).abs() < 1e-9, "{slowed:?}");
    // A stage of half the length takes half the memory from the other one.
    let short = [Placement { device: 0, layers: 0..8 }, Placement { device: 1, layers: 8..11 }];
    problem.devices[1].cost = problem.devices[0].cost.clone();
    let uneven = problem.predict(&short).all;
    assert!((uneven.stages[1] - 1.5 * 4.0 * 4.0 * 0.01).abs() < 1e-9, "{uneven:?}");
    let ratio = uneven.stages[1] / uneven.stages[0];
    assert!((uneven.stages[0] - 8.0 * 4.0 * 0.01 * (1.0 + 0.5 * ratio)).abs() < 1e-3, "{uneven:?}");
    // Worth the second device alone, and not in its company.
    problem.devices[1].cost = problem.devices[0].cost.clone();
    let planned = |problem: &Problem| problem.plan(Objective::Throughput).unwrap().stages.len();
    assert_eq!(planned(&problem), 2);
    problem.devices.iter_mut().for_each(|device| device.cost.crowded = vec![(1, 2.5)]);
    assert_eq!(planned(&problem), 1);
}

#[test]
fn one_processor_is_one_stage() {
    for (names, stages) in [("cpu", 1), ("cuda:0", 1), ("cpu@threads=1", 2)] {
        let plan = problem(12, &[(names, 0.01), (names, 0.01)], 8).plan(Objective::Throughput).unwrap();
        assert_eq!(plan.stages.len(), stages, "{plan}");
        assert_eq!(plan.to_string().contains("take turns"), stages == 1, "{plan}");
    }
}

#[test]
fn every_number_of_layers_and_stages_is_planned_with_each_layer_once() {
    for layers in 1..=100 {
        for stages in 1..=8 {
            let mut problem = problem(layers, &vec![("cpu@threads=1", 0.01); stages], 64);
            for (index, device) in problem.devices.iter_mut().enumerate() {
                device.spec = DeviceSpec::Cuda(index);
            }
            // Exactly these devices, whatever fewer would do.
            let devices: Vec<usize> = (0..stages).collect();
            match problem.best_cut(&devices, Objective::Throughput, f64::INFINITY) {
                None => assert!(stages > layers),
                Some((_, cut)) => {
                    assert_eq!(cut.len(), stages);
                    let ranges: Vec<_> = cut.into_iter().map(|placement| placement.layers).collect();
                    assert_each_layer_once(&ranges, layers);
                }
            }
        }
    }
}

/// All cuts over some of the devices, in order.
fn every_cut(devices: usize, layers: usize) -> Vec<Vec<Placement>> {
    fn extend(cut: &[Placement], from: usize, devices: usize, layers: usize, found: &mut Vec<Vec<Placement>>) {
        let start = cut.last().map_or(0, |placement| placement.layers.end);
        if start == layers {
            found.push(cut.to_vec());
            return;
        }
        for device in from..devices {
            for end in start + 1..=layers {
                let next = Placement { device, layers: start..end };
                extend(&[cut, &[next]].concat(), device + 1, devices, layers, found);
            }
        }
    }
    let mut found = Vec::new();
    extend(&[], 0, devices, layers, &mut found);
    found
}

fn random_problem(rng: &mut ChaCha8Rng) -> Problem {
    let mut below = |n: u64| rng.next_u64() % n;
    let (layers, devices) = (1 + below(7) as usize, 1 + below(4) as usize);
    let mut ms = |most: u64| below(most) as f64 / 1e3;
    let mut times = |most: u64| {
        let one = ms(most);
        StepSeconds { decode: vec![(1, one), (2, one + ms(most)), (8, 2.0 * one + ms(10 * most))], prefill: one }
    };
    let cost: Vec<DeviceCost> = (0..devices)
        .map(|_| DeviceCost {
            layers: (0..layers).map(|_| times(50)).collect(),
            head: times(100),
            ..DeviceCost::default()
        })
        .collect();
    let mut link = || LinkCost { latency: ms(30), copy: ms(5), copy_per_row: ms(3), wire_per_row: ms(20) };
    let links = (0..devices).map(|_| (0..devices).map(|_| link()).collect()).collect();
    let scheduler = ms(5);
    let weights = WeightBytes {
        embeddings: below(100),
        head: 100 + below(100),
        layers: (0..layers).map(|_| 1 + below(100)).collect(),
        tied: below(2) == 0,
    };
    // From far too little to more than all of it.
    let most = 2 * (300 + layers as u64 * 120);
    let device = |(index, cost)| PlanDevice {
        spec: DeviceSpec::Cuda(index),
        cost,
        free_bytes: below(most),
        kv_bytes_per_layer: below(4),
        working_bytes: below(20),
        logits_bytes: below(10),
    };
    let mut devices: Vec<PlanDevice> = cost.into_iter().enumerate().map(device).collect();
    devices.iter_mut().for_each(|device| device.cost.step = below(8) as f64 / 1e3);
    let workload = Workload { context: 1 + below(10) as usize, sequences: 1 + below(9) as usize };
    Problem { weights, weight_type: WeightType::F32, devices, links, scheduler, workload }
}

#[test]
fn ten_thousand_random_problems_are_planned_as_well_as_by_trying_every_cut() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let (mut planned, mut split) = (0, 0);
    for case in 0..10_000 {
        let problem = random_problem(&mut rng);
        let objective = if case % 2 == 0 { Objective::Latency } else { Objective::Throughput };
        let seconds = |prediction: &Prediction| match objective {
            Objective::Latency => prediction.one.seconds(),
            Objective::Throughput => prediction.all.seconds(),
        };
        let fits = |cut: &Vec<Placement>| {
            cut.iter().all(|stage| problem.bytes(stage).total() <= problem.devices[stage.device].free_bytes)
        };
        let cuts = every_cut(problem.devices.len(), problem.weights.layers.len());
        let best = cuts.iter().filter(|cut| fits(cut)).map(|cut| seconds(&problem.predict(cut)));
        let best = best.fold(f64::INFINITY, f64::min);
        match problem.plan(objective) {
            Ok(plan) => {
                let found = seconds(&plan.prediction);
                assert!((found - best).abs() <= 1e-9 * best, "case {case}: {found}, best {best}: {plan}");
                let cut: Vec<Placement> = plan.stages.iter().map(|stage| stage.placement.clone()).collect();
                assert!(fits(&cut) && problem.predict(&cut) == plan.prediction, "case {case}: {plan}");
                planned += 1;
                split += usize::from(plan.stages.len() > 1);
            }
            Err(Error::DoesNotFit(_)) => assert!(best.is_infinite(), "case {case}: {best} was missed"),
            Err(other) => panic!("case {case}: {other}"),
        }
    }
    // The cases are of all sorts.
    assert!((3000..9500).contains(&planned) && split > 1500, "{planned} planned, {split} of them split");
}

/// The seconds and bytes of a round, written anew from their definitions.
#[test]
fn predictions_are_what_their_definition_says() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for _ in 0..200 {
        let problem = random_problem(&mut rng);
        for cut in every_cut(problem.devices.len(), problem.weights.layers.len()) {
            let sequences = problem.workload.sequences;
            let micro_batches = sequences.min(cut.len());
            let rows = sequences.div_ceil(micro_batches);
            let mut trip = problem.scheduler;
            let mut busiest: f64 = 0.0;
            for (index, stage) in cut.iter().enumerate() {
                let cost = &problem.devices[stage.device].cost;
                let layers = &cost.layers[stage.layers.clone()];
                let mut busy = cost.step + layers.iter().map(|layer| layer.decode(rows)).sum::<f64>();
                match cut.get(index + 1) {
                    None => busy += cost.head.decode(rows),
                    Some(next) => {
                        let link = problem.links[stage.device][next.device];
                        busy += link.copy + link.copy_per_row * rows as f64;
                        trip += link.latency + link.wire_per_row * rows as f64;
                        busiest = busiest.max(link.wire_per_row * rows as f64);
                    }
                }
                trip += busy;
                busiest = busiest.max(busy);
            }
            let wanted = trip.max(busiest * micro_batches as f64);
            let found = problem.predict(&cut).all.seconds();
            assert!((found - wanted).abs() <= 1e-9 * wanted, "{found} {wanted}");
        }
    }
}

#[test]
fn a_refusal_shows_bytes_and_fits_that_really_plan_and_are_the_largest() {
    // 10 layers of 10 bytes and 10 x 4 of KV each on two devices of which neither holds more than four of them.
    let mut problem = problem(10, &[("cuda:0", 0.01), ("cuda:1", 0.01)], 4);
    for device in &mut problem.devices {
        device.free_bytes = 200;
    }
    let message = match problem.plan(Objective::Latency).unwrap_err() {
        Error::DoesNotFit(message) => message,
        other => panic!("{other}"),
    };
    for part in ["cuda:0", "200 B", "50 B", "4 sequences of 10 positions", "what would fit"] {
        assert!(message.contains(part), "`{part}` is missing: {message}");
    }
    let fits = problem.nearest_fits();
    let workload = |context, sequences| Problem { workload: Workload { context, sequences }, ..problem.clone() };
    let mut kinds = 0;
    for fit in &fits {
        assert!(message.contains(&fit.to_string()), "{fit}: {message}");
        kinds += match fit {
            Fit::Context(context) => {
                assert!(workload(*context, 4).plan(Objective::Latency).is_ok());
                assert!(workload(context + 1, 4).plan(Objective::Latency).is_err());
                1
            }
            Fit::Sequences(sequences) => {
                assert!(workload(10, *sequences).plan(Objective::Throughput).is_ok());
                assert!(workload(10, sequences + 1).plan(Objective::Throughput).is_err());
                10
            }
            other => panic!("{other}: the weights are not what is too much here"),
        };
    }
    assert_eq!(kinds, 11, "{fits:?}");

    // Without KV to speak of, only a smaller type helps; F16 is still too large.
    problem.workload = Workload { context: 1, sequences: 1 };
    problem.weights = WeightBytes { embeddings: 0, layers: vec![100; 10], head: 0, tied: false };
    assert_eq!(problem.nearest_fits(), [Fit::Type(WeightType::Q8_0)]);
    assert!(problem.with_weight_type(WeightType::Q8_0).plan(Objective::Latency).is_ok());
    for device in &mut problem.devices {
        device.free_bytes = 9;
    }
    assert_eq!(problem.nearest_fits(), []);
    assert!(problem.plan(Objective::Latency).unwrap_err().to_string().contains("add a device"));
}

#[test]
fn stages_in_the_hosts_memory_share_its_bytes() {
    let mut problem = problem(10, &[("cpu@threads=1", 0.01), ("cpu@threads=1", 0.03)], 8);
    let all: u64 = {
        let cut = [Placement { device: 0, layers: 0..5 }, Placement { device: 1, layers: 5..10 }];
        cut.iter().map(|placement| problem.bytes(placement).total()).sum()
    };
    // Room for all of it together: each may take more than half.
    problem.devices.iter_mut().for_each(|device| device.free_bytes = all);
    let plan = problem.plan(Objective::Throughput).unwrap();
    assert_eq!(plan.stages.len(), 2);
    assert!(plan.stages[0].bytes.total() > all / 2, "{plan}");
    // One byte less, and two stages do not fit, though each of them would.
    problem.devices.iter_mut().for_each(|device| device.free_bytes = all - 1);
    assert_eq!(problem.plan(Objective::Throughput).unwrap().stages.len(), 1);
}

#[test]
fn what_cannot_be_planned_names_the_option() {
    let none = Problem { devices: Vec::new(), ..problem(4, &[("cpu", 0.1)], 1) };
    let many = problem(40, &vec![("cpu@threads=1", 0.1); MAX_DEVICES + 1], 1);
    for (problem, option) in [(none, "`devices`"), (many, "`devices`"), (problem(4, &[("cpu", 0.1)], 0), "`sequences`")]
    {
        let message = problem.plan(Objective::Latency).unwrap_err().to_string();
        assert!(message.contains(option), "{message}");
    }
}
