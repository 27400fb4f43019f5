//! Tests of the sampler: against definitions written out plainly, and against fixed values. In a file of their own for
//! their length.

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rand_chacha::rand_core::RngCore;

use super::*;

fn options() -> GenerationOptions {
    GenerationOptions::new(16, 1.0, 1.0)
}

fn sampler(options: &GenerationOptions) -> Sampler {
    options.validate().unwrap();
    Sampler::new(options, 7, &[])
}

/// The probabilities that `filter` leaves, by token id.
fn distribution(options: &GenerationOptions, logits: &[f32]) -> Vec<f64> {
    let mut sampler = sampler(options);
    let (_, max) = most_likely(logits).unwrap();
    let mut probabilities = vec![0.0; logits.len()];
    match sampler.filter(logits, max, 1.0 / options.temperature) {
        Kept::Best(n) => {
            let total = sum(&sampler.weights[..n]);
            for (&key, &weight) in sampler.best[..n].iter().zip(&sampler.weights) {
                probabilities[token_of(key) as usize] = f64::from(weight) / total;
            }
        }
        Kept::Weighted => {
            let total: f64 = sampler.block_sums.iter().sum();
            assert!((total - sum(&sampler.weights)).abs() <= 1e-9 * total);
            for (probability, &weight) in probabilities.iter_mut().zip(&sampler.weights) {
                *probability = f64::from(weight) / total;
            }
        }
    }
    probabilities
}

/// The same by definition: sort everything, apply one filter after the other, renormalise in between.
fn naive_distribution(options: &GenerationOptions, logits: &[f32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
    let max = f64::from(logits[order[0]]);
    let mut kept: Vec<(usize, f64)> = order
        .iter()
        .map(|&token| (token, ((f64::from(logits[token]) - max) / f64::from(options.temperature)).exp()))
        .collect();
    let renormalise = |kept: &mut Vec<(usize, f64)>| {
        let total: f64 = kept.iter().map(|&(_, weight)| weight).sum();
        kept.iter_mut().for_each(|(_, weight)| *weight /= total);
    };
    if let Some(k) = options.top_k.filter(|&k| k > 0) {
        kept.truncate(k);
    }
    renormalise(&mut kept);
    if options.top_p < 1.0 {
        let mut mass = 0.0;
        let cut = kept.iter().position(|&(_, probability)| {
            mass += probability;
            mass >= f64::from(options.top_p)
        });
        kept.truncate(cut.map_or(kept.len(), |cut| cut + 1));
    }
    renormalise(&mut kept);
    let threshold = kept[0].1 * f64::from(options.min_p);
    kept.retain(|&(_, probability)| probability >= threshold);
    renormalise(&mut kept);
    let mut probabilities = vec![0.0; logits.len()];
    for (token, probability) in kept {
        probabilities[token] = probability;
    }
    probabilities
}

fn assert_same_distribution(options: &GenerationOptions, logits: &[f32]) {
    let ours = distribution(options, logits);
    let naive = naive_distribution(options, logits);
    for (token, (ours, naive)) in ours.iter().zip(&naive).enumerate() {
        assert_eq!(*ours > 0.0, *naive > 1e-35, "token {token}: {ours} against {naive} with {options:?}");
        // A rounding of the scaled logit, up to 50 in size, comes back in the exponential.
        assert!((ours - naive).abs() <= 2e-5 * naive, "token {token}: {ours} against {naive} with {options:?}");
    }
}

/// Logits as a model gives them, roughly normal; `step` above 0 rounds them, which makes ties.
fn random_logits(seed: u64, len: usize, spread: f32, step: f32) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..len)
        .map(|_| {
            let normal: f64 = (0..12).map(|_| unit_interval(random.next_u64())).sum::<f64>() - 6.0;
            let logit = normal as f32 * spread;
            if step > 0.0 { (logit / step).round() * step } else { logit }
        })
        .collect()
}

proptest! {
    // The same cases each time: where a sum comes within a rounding of a cut, f32 and f64 may well disagree.
    #![proptest_config(ProptestConfig { cases: 256, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

    #[test]
    fn filters_match_their_definition(
        seed in any::<u64>(),
        len in prop_oneof![1usize..40, 1000usize..5000],
        spread in 0.01f32..6.0,
        temperature in 0.3f32..3.0,
        top_k in prop_oneof![Just(None), (0usize..60).prop_map(Some), (60usize..6000).prop_map(Some)],
        top_p in prop_oneof![Just(1.0f32), 0.01f32..1.0],
        min_p in prop_oneof![Just(0.0f32), 0.001f32..1.0],
    ) {
        let logits = random_logits(seed, len, spread, 0.0);
        assert_same_distribution(&GenerationOptions { temperature, top_k, top_p, min_p, ..options() }, &logits);
    }

    #[test]
    fn ties_are_cut_by_token_id(seed in any::<u64>(), len in 1usize..3000, top_k in 1usize..400) {
        let logits = random_logits(seed, len, 2.0, 0.5);
        assert_same_distribution(&GenerationOptions { top_k: Some(top_k), ..options() }, &logits);
        assert_same_distribution(&GenerationOptions { top_p: 0.777, ..options() }, &logits);
    }

    #[test]
    fn greedy_is_the_first_maximum(seed in any::<u64>(), len in 1usize..5000, step in prop_oneof![Just(0.0f32), Just(0.5)]) {
        let logits = random_logits(seed, len, 3.0, step);
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let first = logits.iter().position(|&logit| logit == max).unwrap();
        prop_assert_eq!(most_likely(&logits).unwrap(), (first as u32, max));
    }

    #[test]
    fn keys_order_by_logit_then_id(a in any::<f32>(), b in any::<f32>(), i in any::<u32>(), j in any::<u32>()) {
        prop_assume!(!a.is_nan() && !b.is_nan());
        let by_definition = b.partial_cmp(&a).unwrap().then(i.cmp(&j));
        prop_assert_eq!(key(a, i).cmp(&key(b, j)), by_definition);
        prop_assert_eq!(logit_of(key(a, i)), a);
        prop_assert_eq!(token_of(key(a, i)), i);
    }
}

#[test]
fn exponential_is_accurate() {
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(exp(-1e30), 0.0);
    let mut x = 0.0f32;
    while x > -87.0 {
        let expected = f64::from(x).exp();
        let relative = (f64::from(exp(x)) - expected).abs() / expected;
        assert!(relative < 2.5e-7, "exp({x}) is off by {relative}");
        x -= 0.000_37 + x.abs() * 1e-4;
    }
}

#[test]
fn every_instruction_set_weighs_the_same() {
    let logits: Vec<f32> = random_logits(3, 2 * BLOCK + 21, 30.0, 0.0);
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weighed = |isa: Isa| {
        let (mut weights, mut block_sums) = (vec![f32::NAN; logits.len()], vec![f64::NAN; 3]);
        let (weights, block_sums) = (&mut weights[..], &mut block_sums[..]);
        isa.run_ordinary(Weigh { logits: &logits, max, scale: 1.25, weights, block_sums });
        (weights.to_vec(), block_sums.to_vec())
    };
    let wanted = weighed(Isa::SCALAR);
    assert!(wanted.0.contains(&1.0));
    assert!(Isa::available().into_iter().all(|isa| weighed(isa) == wanted));
}

#[test]
fn nucleus_of_a_flat_distribution() {
    // No token stands out, so the candidates are the whole vocabulary and several rounds of sorting are needed.
    let logits = random_logits(3, 40_000, 0.001, 0.0);
    for top_p in [0.1, 0.5, 0.95, 0.9999] {
        assert_same_distribution(&GenerationOptions { top_p, ..options() }, &logits);
    }
    let equal = vec![1.5f32; 1000];
    let kept = distribution(&GenerationOptions { top_p: 0.25, ..options() }, &equal);
    assert!(kept[..250].iter().all(|&probability| (probability - 0.004).abs() < 1e-9));
    assert!(kept[250..].iter().all(|&probability| probability == 0.0));
}

#[test]
fn at_least_one_token_is_kept() {
    let logits = random_logits(4, 500, 1.0, 0.0);
    for options in [
        GenerationOptions { top_p: 1e-6, ..options() },
        GenerationOptions { min_p: 1.0, ..options() },
        GenerationOptions { top_k: Some(1), ..options() },
        GenerationOptions { top_k: Some(1), top_p: 1e-6, min_p: 1.0, ..options() },
    ] {
        let kept = distribution(&options, &logits);
        assert_eq!(kept.iter().filter(|&&probability| probability > 0.0).count(), 1, "{options:?}");
        assert_eq!(kept[most_likely(&logits).unwrap().0 as usize], 1.0);
    }
}

#[test]
fn neutral_filters_cut_nothing() {
    let logits = random_logits(5, 3000, 2.0, 0.0);
    let all = distribution(&options(), &logits);
    assert!(all.iter().all(|&probability| probability > 0.0));
    for top_k in [None, Some(0), Some(3000), Some(usize::MAX)] {
        assert_eq!(distribution(&GenerationOptions { top_k, top_p: 1.0, min_p: 0.0, ..options() }, &logits), all);
    }
}

#[test]
fn greedy_ignores_the_filters() {
    let logits = [1.0, 3.0, 2.9, 3.0];
    for (top_p, top_k, min_p) in [(0.9, None, 0.0), (0.01, Some(3), 0.5), (1.0, Some(1), 1.0)] {
        let options = GenerationOptions { temperature: 0.0, top_p, top_k, min_p, ..options() };
        let mut sampler = sampler(&options);
        for _ in 0..20 {
            assert_eq!(sampler.sample(&logits).unwrap(), SampledToken { token: 1, logprob: None });
        }
    }
}

#[test]
fn vanishing_temperature_is_greedy() {
    for temperature in [f32::from_bits(1), 1e-40, 1e-38, 1e-30, 1e-6] {
        for (top_k, top_p, min_p) in [(None, 1.0, 0.0), (None, 0.9, 0.0), (Some(5), 0.9, 0.1), (None, 1.0, 0.1)] {
            let mut sampler = sampler(&GenerationOptions { temperature, top_k, top_p, min_p, ..options() });
            for seed in 0..20 {
                let logits = random_logits(seed, 300, 2.0, 0.0);
                assert_eq!(sampler.sample(&logits).unwrap().token, most_likely(&logits).unwrap().0);
            }
            assert_eq!(sampler.sample(&[0.0, -1.0, 0.0]).unwrap().token % 2, 0);
            assert_eq!(sampler.sample(&[-1.0, f32::MAX, f32::MIN]).unwrap().token, 1);
        }
    }
}

#[test]
fn a_logit_that_is_not_finite_is_an_error_that_names_the_token() {
    for (len, position) in [(1, 0), (40, 39), (5000, 17), (5000, 1024), (5000, 4999)] {
        for lost in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut logits = random_logits(1, len, 1.0, 0.0);
            logits[position] = lost;
            // A later one is not the one that is named.
            logits[len - 1] = if position < len - 1 { f32::INFINITY } else { lost };
            for options in [
                options(),
                GenerationOptions { temperature: 0.0, ..options() },
                GenerationOptions { top_p: 0.9, ..options() },
                GenerationOptions { top_k: Some(3), min_p: 0.01, ..options() },
                GenerationOptions { frequency_penalty: 1.0, ..options() },
                GenerationOptions { repetition_penalty: 1.3, logprobs: Some(2), ..options() },
            ] {
                let error = sampler(&options).sample(&logits).unwrap_err();
                let named = matches!(&error, Error::LogitsNotFinite { token, logit }
                    if *token == position && logit.total_cmp(&lost).is_eq());
                assert!(named, "{error}");
                assert!(error.to_string().contains(&format!("logit for token {position} is {lost}: ")), "{error}");
            }
        }
    }
    assert!(sampler(&options()).sample(&[]).is_err());
}

#[test]
fn penalties_beyond_f32_choose_a_token() {
    let huge = [(f32::MAX, 0.0), (1e-38, 0.0), (1.0, f32::MAX), (1.0, f32::MIN)];
    for ((repetition_penalty, frequency_penalty), temperature) in huge.into_iter().zip([0.0, 1.0, 0.0, 1.0]) {
        let options = GenerationOptions { repetition_penalty, frequency_penalty, temperature, ..options() };
        let mut sampler = Sampler::new(&options, 0, &[0, 1, 2]);
        for _ in 0..8 {
            assert!(sampler.sample(&[-3.0, 2.0, 1e30, -1e30]).unwrap().token < 4);
            assert!(sampler.changed.iter().all(|logit| logit.is_finite()), "{:?}", sampler.changed);
        }
    }
}

#[test]
fn penalties_match_their_definition() {
    let options = GenerationOptions {
        temperature: 0.0,
        repetition_penalty: 1.5,
        presence_penalty: 0.25,
        frequency_penalty: 0.5,
        ..options()
    };
    let prompt = [3, 3, 3, 5, 900];
    let logits = [2.0, 1.9, -1.0, 2.4, 0.0, -3.0];
    let mut sampler = Sampler::new(&options, 0, &prompt);
    let mut generated: Vec<u32> = Vec::new();
    for _ in 0..12 {
        let mut expected = logits;
        for (token, logit) in expected.iter_mut().enumerate() {
            let token = token as u32;
            let count = generated.iter().filter(|&&other| other == token).count();
            if count > 0 || prompt.contains(&token) {
                *logit = if *logit < 0.0 { *logit * 1.5 } else { *logit / 1.5 };
            }
            *logit -= 0.5 * count as f32;
            *logit -= if count > 0 { 0.25 } else { 0.0 };
        }
        let sampled = sampler.sample(&logits).unwrap().token;
        assert_eq!(sampler.changed, expected, "after {generated:?}");
        assert_eq!(sampled, most_likely(&expected).unwrap().0);
        generated.push(sampled);
    }
    assert!(generated.contains(&0) && generated.contains(&1) && generated.contains(&3), "{generated:?}");
}

#[test]
fn presence_and_frequency_do_not_count_the_prompt() {
    let options = GenerationOptions { temperature: 0.0, presence_penalty: 9.0, frequency_penalty: 9.0, ..options() };
    let mut sampler = Sampler::new(&options, 0, &[1, 1]);
    assert_eq!(sampler.sample(&[0.0, 1.0]).unwrap().token, 1);
    assert_eq!(sampler.sample(&[0.0, 1.0]).unwrap().token, 0);
}

#[test]
fn logprobs_are_those_of_the_raw_logits() {
    let logits = random_logits(9, 3000, 3.0, 0.5);
    let max = f64::from(most_likely(&logits).unwrap().1);
    let log_sum = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum::<f64>().ln() + max;
    let options = GenerationOptions {
        temperature: 0.7,
        top_k: Some(40),
        repetition_penalty: 1.3,
        frequency_penalty: 0.5,
        logprobs: Some(30),
        ..options()
    };
    let mut sampler = Sampler::new(&options, 1, &[1, 2, 3]);
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|&a, &b| logits[b as usize].partial_cmp(&logits[a as usize]).unwrap().then(a.cmp(&b)));
    for _ in 0..10 {
        let sampled = sampler.sample(&logits).unwrap();
        let logprob = sampled.logprob.unwrap();
        assert_eq!(logprob.token, sampled.token);
        let expected = |token: u32| f64::from(logits[token as usize]) - log_sum;
        assert!((f64::from(logprob.logprob) - expected(sampled.token)).abs() < 2e-6);
        assert_eq!(logprob.top.len(), 30);
        for (&(token, ours), &by_definition) in logprob.top.iter().zip(&order) {
            assert_eq!(token, by_definition);
            assert!((f64::from(ours) - expected(token)).abs() < 2e-6);
        }
    }
    let none = GenerationOptions { temperature: 0.0, logprobs: Some(0), ..GenerationOptions::default() };
    assert!(Sampler::new(&none, 0, &[]).sample(&logits).unwrap().logprob.unwrap().top.is_empty());
    let more = GenerationOptions { logprobs: Some(99), ..none };
    assert_eq!(Sampler::new(&more, 0, &[]).sample(&[1.0, 2.0]).unwrap().logprob.unwrap().top.len(), 2);
}

/// Pearson's statistic of 20 000 draws against the distribution by definition, and the 99.9th percentile of the
/// chi-square distribution with as many degrees of freedom (Wilson and Hilferty's approximation).
fn chi_square(options: &GenerationOptions, seed: u64, logits: &[f32]) -> (f64, f64) {
    const DRAWS: usize = 20_000;
    let expected = naive_distribution(options, logits);
    let mut sampler = Sampler::new(options, seed, &[]);
    let mut counts = vec![0usize; logits.len()];
    for _ in 0..DRAWS {
        counts[sampler.sample(logits).unwrap().token as usize] += 1;
    }
    // Tokens expected less than five times go into one bin.
    let mut statistic = 0.0;
    let mut bins = 0;
    let mut rare = (0.0, 0.0);
    for (&probability, &count) in expected.iter().zip(&counts) {
        let expected = probability * DRAWS as f64;
        if probability == 0.0 {
            assert_eq!(count, 0, "a token that was cut came out");
        } else if expected < 5.0 {
            rare = (rare.0 + expected, rare.1 + count as f64);
        } else {
            statistic += (count as f64 - expected).powi(2) / expected;
            bins += 1;
        }
    }
    if rare.0 > 5.0 {
        statistic += (rare.1 - rare.0).powi(2) / rare.0;
        bins += 1;
    }
    let freedom = f64::from(bins - 1);
    let spread = 2.0 / (9.0 * freedom);
    (statistic, freedom * (1.0 - spread + 3.09 * spread.sqrt()).powi(3))
}

#[test]
fn draws_follow_the_distribution() {
    let small = random_logits(11, 30, 1.5, 0.0);
    let large = random_logits(12, 4000, 2.5, 0.0);
    for (seed, options) in [
        options(),
        GenerationOptions { temperature: 0.6, ..options() },
        GenerationOptions { temperature: 1.7, ..options() },
        GenerationOptions { top_k: Some(7), ..options() },
        GenerationOptions { top_p: 0.8, ..options() },
        GenerationOptions { min_p: 0.1, ..options() },
        GenerationOptions { temperature: 1.3, top_k: Some(20), top_p: 0.9, min_p: 0.05, ..options() },
    ]
    .iter()
    .enumerate()
    {
        for logits in [&small, &large] {
            let (statistic, limit) = chi_square(options, seed as u64, logits);
            assert!(statistic < limit, "{statistic} is above {limit} with {options:?}");
        }
    }
    // The test can tell: draws at one temperature do not pass for another.
    let logits_times_1_1: Vec<f32> = small.iter().map(|logit| logit * 1.1).collect();
    let mut wrong = Sampler::new(&options(), 0, &[]);
    let expected = naive_distribution(&options(), &small);
    let mut counts = vec![0.0; small.len()];
    for _ in 0..20_000 {
        counts[wrong.sample(&logits_times_1_1).unwrap().token as usize] += 1.0;
    }
    let statistic: f64 = expected.iter().zip(&counts).map(|(p, n)| (n - p * 2e4f64).powi(2) / (p * 2e4)).sum();
    assert!(statistic > 70.0, "{statistic}");
}

#[test]
fn same_seed_same_tokens() {
    let options = GenerationOptions { temperature: 1.0, top_p: 0.95, presence_penalty: 0.3, ..options() };
    let tokens = |seed: u64| {
        let mut sampler = Sampler::new(&options, seed, &[1, 2]);
        (0..64u64).map(|step| sampler.sample(&random_logits(step, 500, 2.0, 0.0)).unwrap().token).collect::<Vec<_>>()
    };
    assert_eq!(tokens(1), tokens(1));
    assert_ne!(tokens(1), tokens(2));
}

/// The stream is part of what a seed promises: it must not change with a dependency or a platform.
#[test]
fn the_stream_of_a_seed_is_fixed() {
    let logits = random_logits(21, 1000, 2.0, 0.0);
    let mut sampler = Sampler::new(&options(), 42, &[]);
    let tokens: Vec<u32> = (0..8).map(|_| sampler.sample(&logits).unwrap().token).collect();
    assert_eq!(tokens, [380, 336, 533, 399, 842, 94, 533, 308]);
}

/// The `k` most likely tokens in order, by definition.
fn most_likely_tokens(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    all.sort_by(|(_, a), (_, b)| b.partial_cmp(a).unwrap());
    all.truncate(k);
    all
}

/// Options under which a few tokens are enough, with how many.
fn narrow_options() -> Vec<(GenerationOptions, usize)> {
    let narrow = |temperature, top_k: Option<usize>, top_p, min_p| {
        let enough = if temperature == 0.0 { 1 } else { top_k.unwrap() };
        (GenerationOptions { top_k, min_p, ..GenerationOptions::new(16, temperature, top_p) }, enough)
    };
    vec![
        narrow(0.0, None, 1.0, 0.0),
        narrow(0.0, Some(40), 0.5, 0.2),
        narrow(1.0, Some(1), 1.0, 0.0),
        narrow(1.0, Some(5), 1.0, 0.0),
        narrow(0.7, Some(40), 0.9, 0.0),
        narrow(1.5, Some(40), 0.6, 0.1),
        narrow(3.0, Some(64), 1.0, 0.3),
        narrow(1e-39, Some(8), 1.0, 0.0), // in the limit the greedy choice
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, rng_seed: RngSeed::Fixed(3), ..ProptestConfig::default() })]

    #[test]
    fn the_most_likely_tokens_choose_what_all_logits_choose(
        // Few values, so that there are ties, zeros of both signs and what is ruled out.
        logits in prop::collection::vec(
            prop_oneof![
                4 => (-40i8..40).prop_map(|v| f32::from(v) / 4.0),
                2 => -20.0f32..20.0,
                1 => Just(-0.0f32),
                1 => Just(f32::MIN),
                1 => Just(1e-41f32),
            ],
            65..300,
        ),
        certain in prop_oneof![9 => Just(None), 1 => (0usize..65).prop_map(Some)],
    ) {
        let mut logits = logits;
        logits[7] = 3.0; // there is something to choose
        if let Some(token) = certain {
            logits[token] = f32::MAX;
        }
        for (options, enough) in narrow_options() {
            let (mut all, mut few) = (sampler(&options), sampler(&options));
            prop_assert_eq!(few.enough(), Some(enough));
            let best = most_likely_tokens(&logits, enough);
            for _ in 0..20 {
                prop_assert_eq!(few.sample_best(&best).unwrap(), all.sample(&logits).unwrap(), "{:?}", options);
            }
        }
    }
}

#[test]
fn all_logits_are_needed_where_any_token_may_be_raised_or_is_summed() {
    let greedy = GenerationOptions::default();
    let top_k = GenerationOptions { top_k: Some(40), ..options() };
    for options in [
        options(),
        GenerationOptions { top_p: 0.9, ..options() },
        GenerationOptions { top_k: Some(0), ..options() },
        GenerationOptions { logprobs: Some(0), ..greedy.clone() },
        GenerationOptions { logprobs: Some(3), ..top_k.clone() },
        GenerationOptions { repetition_penalty: 1.1, ..greedy.clone() },
        GenerationOptions { presence_penalty: 0.1, ..top_k.clone() },
        GenerationOptions { frequency_penalty: -0.1, ..greedy },
    ] {
        let mut sampler = sampler(&options);
        assert_eq!(sampler.enough(), None, "{options:?}");
        let message = sampler.sample_best(&[(3, 1.0)]).unwrap_err().to_string();
        assert!(message.contains("1 tokens") && message.contains("all logits were wanted"), "{message}");
    }
    assert_eq!(sampler(&top_k).enough(), Some(40));
}

#[test]
fn tokens_that_are_not_as_promised_choose_nothing() {
    let options = GenerationOptions { top_k: Some(2), ..options() };
    for best in [
        &[][..],
        &[(1, 0.5)],
        &[(1, 0.5), (2, 0.4), (3, 0.3)],
        &[(1, f32::NAN), (2, 0.0)],
        &[(1, 0.0), (2, f32::NAN)],
        &[(1, f32::INFINITY), (2, 0.0)],
        &[(1, 0.0), (2, f32::NEG_INFINITY)],
    ] {
        let message = sampler(&options).sample_best(best).unwrap_err().to_string();
        assert!(message.contains(&format!("from {} tokens", best.len())), "{message}");
        assert!(message.contains("the 2 most likely were wanted"), "{message}");
    }
}

#[test]
fn suppressed_tokens_are_never_chosen() {
    use crate::model::config::SuppressedTokens;
    let suppressed = Arc::new(SuppressedTokens { always: vec![2, 9999], at_first: vec![0, 1] });
    let logits = [5.0, 6.0, 9.0, 1.0, 4.0];
    for (temperature, top_k, repetition_penalty) in
        [(0.0, None, 1.0), (0.0, None, 1.5), (1.0, None, 1.0), (1.0, Some(2), 1.0), (1.0, Some(4), 1.5)]
    {
        let options = GenerationOptions { temperature, top_k, repetition_penalty, ..options() };
        let mut sampler = Sampler::new(&options, 3, &[]).suppressing(suppressed.clone());
        assert_eq!(sampler.enough(), None);
        let chosen: Vec<u32> = (0..200).map(|_| sampler.sample(&logits).unwrap().token).collect();
        assert!(!chosen.contains(&2) && chosen[0] >= 3, "{temperature} {top_k:?}: {chosen:?}");
        assert!(chosen[1..].contains(&1), "{temperature} {top_k:?}: {chosen:?}");
    }
    let mut greedy = Sampler::new(&GenerationOptions::new(16, 0.0, 1.0), 3, &[]).suppressing(suppressed.clone());
    assert_eq!(greedy.sample(&logits).unwrap().token, 4);
    assert_eq!(greedy.sample(&logits).unwrap().token, 1);
    // NaN at a suppressed token is a fault of the model all the same.
    assert!(greedy.sample(&[1.0, 2.0, f32::NAN]).is_err());
    // Only the first choice needs all logits here.
    let first = Arc::new(SuppressedTokens { always: vec![], at_first: vec![1] });
    let mut greedy = Sampler::new(&GenerationOptions::new(16, 0.0, 1.0), 3, &[]).suppressing(first);
    assert_eq!((greedy.enough(), greedy.sample(&logits).unwrap().token, greedy.enough()), (None, 2, Some(1)));
}
