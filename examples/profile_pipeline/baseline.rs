//! Whether a run is slower than an earlier one by more than the noise of both.
//!
//! Each quantity is a list of times, one for each run of a case, in this process and in the earlier one. A quantity has
//! regressed if its times are longer than the earlier ones *made longer by the tolerance*, by the one-sided rank-sum test
//! (Wilcoxon, Mann-Whitney), with its exact distribution, ties included. That needs no assumption on how the times are
//! spread, and a few outliers move ranks by little. The level is [`FALSE_ALARMS`] for a whole comparison, shared out
//! evenly over the quantities (Bonferroni): with a tolerance of 0, of a hundred comparisons of runs that differ in nothing
//! but chance at most one alarms, and with a tolerance hardly any. Times that spread by a few percent and have an outlier
//! now and then are found to be a fifth slower in 19 of 20 comparisons of ten runs each, at the default tolerance.
//!
//! What it cannot see: that the machine itself was slower as a whole between the two, by its clock, by others who used
//! it, or by where the system put the pages. That is what the tolerance is for, why cases run in rounds rather than one
//! after the other, and why the plain read bandwidth of both and the cores that others used are shown. On a machine that
//! others use the test alarms for their doing. With few runs no result could be told from chance; such quantities are named, and a comparison in which all
//! are like that is an error.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// The probability that a comparison of equal runs alarms at all.
pub const FALSE_ALARMS: f64 = 0.01;

/// Longer lists are averaged in so many consecutive groups, which also takes out most of what neighbouring runs share.
const MOST_VALUES: usize = 40;

/// Times of each quantity, in microseconds, one for each run. Less is better.
pub type Quantities = BTreeMap<String, Vec<f64>>;

/// What must be equal for times to be comparable: names and what they stand for.
pub type Identity = BTreeMap<String, String>;

/// An earlier run.
#[derive(Debug, Clone, PartialEq)]
pub struct Baseline {
    /// What was measured where.
    pub identity: Identity,
    /// What it took.
    pub quantities: Quantities,
    /// Bytes a second of a plain read at the time, where it was measured.
    pub read_bandwidth: Option<f64>,
    /// Cores that something else kept busy meanwhile, where the system told.
    pub others_cores: Option<f64>,
}

impl Baseline {
    /// Parses what `--json` has printed to the file at `path`.
    pub fn read(path: &Path, text: &str) -> Result<Baseline> {
        let name = path.display();
        let json: Value = serde_json::from_str(text).with_context(|| format!("--baseline {name}: not JSON"))?;
        Baseline::parse(&json)
            .with_context(|| format!("--baseline {name} is not what `profile_pipeline --json` prints"))
    }

    fn parse(json: &Value) -> Result<Baseline> {
        let field = |name: &str| json[name].as_object().with_context(|| format!("it has no object `{name}`"));
        let mut identity = Identity::new();
        for (name, value) in field("identity")? {
            let value = value.as_str().with_context(|| format!("identity.{name} is not text"))?;
            identity.insert(name.clone(), value.to_string());
        }
        let mut quantities = Quantities::new();
        for (name, values) in field("quantities")? {
            let time = |value: &Value| value.as_f64().filter(|time| time.is_finite() && *time >= 0.0);
            let values = values.as_array().and_then(|values| values.iter().map(time).collect::<Option<Vec<_>>>());
            quantities
                .insert(name.clone(), values.with_context(|| format!("quantities.{name} is not a list of times"))?);
        }
        ensure!(!quantities.is_empty(), "its `quantities` are empty");
        Ok(Baseline {
            identity,
            quantities,
            read_bandwidth: json["read_bandwidth"].as_f64(),
            others_cores: json["others_cores"].as_f64(),
        })
    }

    /// What differs between the two, one line each.
    pub fn differences(&self, now: &Identity) -> Vec<String> {
        let names: std::collections::BTreeSet<&String> = self.identity.keys().chain(now.keys()).collect();
        let value =
            |identity: &Identity, name: &String| identity.get(name).map_or("absent", String::as_str).to_string();
        names
            .into_iter()
            .filter(|name| self.identity.get(*name) != now.get(*name))
            .map(|name| {
                format!("{name}: `{}` in the baseline, `{}` now", value(&self.identity, name), value(now, name))
            })
            .collect()
    }
}

/// What came out for one quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Slower by more than tolerance and noise.
    Slower,
    /// Faster by more than tolerance and noise.
    Faster,
    /// Neither.
    Same,
    /// With so few runs no difference could be told from chance.
    TooFewRuns,
}

/// One quantity in both.
#[derive(Debug, Clone, PartialEq)]
pub struct Compared {
    /// Its name.
    pub name: String,
    /// Median of the baseline.
    pub before: f64,
    /// Median now.
    pub now: f64,
    /// Probability that chance alone makes it look as slow, beyond the tolerance.
    pub chance: f64,
    /// What follows.
    pub verdict: Verdict,
}

impl Compared {
    /// The change of the median, in percent.
    pub fn percent(&self) -> f64 {
        100.0 * (self.now / self.before.max(1e-9) - 1.0)
    }
}

/// All quantities that both have, and the names of those that only one has.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// By name.
    pub compared: Vec<Compared>,
    /// Not compared.
    pub left_out: Vec<String>,
    /// The one used.
    pub tolerance: f64,
}

/// Compares the quantities of two runs. `tolerance` is the part by which a time may grow before it counts.
pub fn compare(before: &Quantities, now: &Quantities, tolerance: f64) -> Result<Comparison> {
    let shared: Vec<(&String, &Vec<f64>, &Vec<f64>)> = before
        .iter()
        .filter_map(|(name, values)| Some((name, values, now.get(name)?)))
        .filter(|(_, before, now)| !before.is_empty() && !now.is_empty())
        .collect();
    if shared.is_empty() {
        bail!("the two runs have no quantity in common: choose the same --phases");
    }
    // Quantities that could not alarm need no share of the level; how many runs there are says nothing of their times.
    let least = |before: &[f64], now: &[f64]| 1.0 / combinations(before.len() + now.len(), now.len());
    let mut level = FALSE_ALARMS / shared.len() as f64;
    let judged = shared.iter().filter(|(_, before, now)| least(&grouped(before), &grouped(now)) <= level).count();
    level = FALSE_ALARMS / judged.max(1) as f64;
    let mut compared = Vec::new();
    for (name, before, now) in &shared {
        let (a, b) = (grouped(before), grouped(now));
        let longer = |values: &[f64]| values.iter().map(|value| value * (1.0 + tolerance)).collect::<Vec<f64>>();
        let chance = chance_of_longer(&longer(&a), &b);
        let verdict = match least(&a, &b) {
            least if least > level => Verdict::TooFewRuns,
            _ if chance <= level => Verdict::Slower,
            _ if median(&b) < median(&a) && chance_of_longer(&longer(&b), &a) <= level => Verdict::Faster,
            _ => Verdict::Same,
        };
        compared.push(Compared { name: name.to_string(), before: median(before), now: median(now), chance, verdict });
    }
    if compared.iter().all(|compared| compared.verdict == Verdict::TooFewRuns) {
        let runs = shared.iter().map(|(_, before, now)| before.len().min(now.len())).max().unwrap_or(0);
        bail!("{runs} runs are too few to tell a regression from chance: give more --runs to both");
    }
    let in_both = |name: &&String| !shared.iter().any(|(shared, ..)| shared == name);
    let left_out = before.keys().chain(now.keys()).filter(in_both).cloned().collect();
    Ok(Comparison { compared, left_out, tolerance })
}

impl Comparison {
    /// What has become slower.
    pub fn regressions(&self) -> Vec<&Compared> {
        self.compared.iter().filter(|compared| compared.verdict == Verdict::Slower).collect()
    }

    /// A table.
    pub fn text(&self) -> String {
        let mut text = format!(
            "Against the baseline (tolerance {:.0} %, {:.0} % of comparisons of equal runs alarm at most)\n{:<24} {:>14} {:>14} {:>8}\n",
            100.0 * self.tolerance,
            100.0 * FALSE_ALARMS,
            "median, ms",
            "baseline",
            "now",
            "change"
        );
        for compared in &self.compared {
            let verdict = match compared.verdict {
                Verdict::Slower => "SLOWER",
                Verdict::Faster => "faster",
                Verdict::Same => "within noise",
                Verdict::TooFewRuns => "too few runs to tell",
            };
            let (before, now) = (compared.before / 1e3, compared.now / 1e3);
            let percent = compared.percent();
            let _ = writeln!(text, "{:<24} {before:>14.3} {now:>14.3} {percent:>+7.1}%  {verdict}", compared.name);
        }
        if !self.left_out.is_empty() {
            let _ = writeln!(text, "not in both: {}", self.left_out.join(", "));
        }
        text
    }
}

/// The middle one, or the mean of the two in the middle; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// Means of consecutive groups, [`MOST_VALUES`] at most.
fn grouped(values: &[f64]) -> Vec<f64> {
    let groups = values.len().min(MOST_VALUES);
    let edge = |group: usize| group * values.len() / groups;
    let mean = |group: &[f64]| group.iter().sum::<f64>() / group.len() as f64;
    (0..groups).map(|group| mean(&values[edge(group)..edge(group + 1)])).collect()
}

/// Ways to choose `k` of `n`.
fn combinations(n: usize, k: usize) -> f64 {
    // In this order each division has no remainder.
    (0..k).fold(1.0, |ways, i| ways * (n - i) as f64 / (i + 1) as f64)
}

/// The probability that the ranks of `b` among all add up to as much as they do, if it were chance which values are
/// whose: one-sided, exact, with equal values sharing the mean of their ranks.
fn chance_of_longer(a: &[f64], b: &[f64]) -> f64 {
    let mut all: Vec<(f64, bool)> = a.iter().map(|&x| (x, false)).chain(b.iter().map(|&x| (x, true))).collect();
    all.sort_by(|x, y| x.0.total_cmp(&y.0));
    // Twice the rank, so that shared ranks are whole numbers: those of a run of equal values from `i` to `j` (the latter
    // not included) are i + 1 to j, and i + 1 + j is twice their mean.
    let mut ranks = vec![0usize; all.len()];
    let mut i = 0;
    while i < all.len() {
        let j = i + all[i..].iter().take_while(|(value, _)| *value == all[i].0).count();
        ranks[i..j].fill(i + 1 + j);
        i = j;
    }
    let observed: usize = ranks.iter().zip(&all).filter(|(_, (_, of_b))| *of_b).map(|(rank, _)| rank).sum();
    // ways[k][s]: choices of k values whose ranks add up to s.
    let most: usize = ranks.iter().sum();
    let mut ways = vec![vec![0.0f64; most + 1]; b.len() + 1];
    ways[0][0] = 1.0;
    for (seen, &rank) in ranks.iter().enumerate() {
        for k in (0..b.len().min(seen + 1)).rev() {
            let (fewer, more) = ways.split_at_mut(k + 1);
            for (to, from) in more[0][rank..].iter_mut().zip(&fewer[k]) {
                *to += from;
            }
        }
    }
    let ways = &ways[b.len()];
    ways[observed..].iter().sum::<f64>() / ways.iter().sum::<f64>()
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// Times as they are: a floor, a skewed spread above it, now and then an outlier, and whole microseconds.
    fn times(random: &mut ChaCha8Rng, runs: usize, scale: f64) -> Vec<f64> {
        let one = |random: &mut ChaCha8Rng| {
            let spread = -0.03 * random.random::<f64>().max(1e-9).ln();
            let outlier = if random.random::<f64>() < 0.03 { 0.5 } else { 0.0 };
            (scale * 200.0 * (1.0 + spread + outlier)).round()
        };
        (0..runs).map(|_| one(random)).collect()
    }

    fn run(random: &mut ChaCha8Rng, names: usize, runs: usize, scale: f64) -> Quantities {
        (0..names).map(|name| (format!("quantity {name}"), times(random, runs, scale))).collect()
    }

    #[test]
    fn equal_runs_alarm_no_more_often_than_stated() {
        let random = &mut ChaCha8Rng::seed_from_u64(7);
        for runs in [8, 10] {
            let alarms = |tolerance: f64, random: &mut ChaCha8Rng| {
                let trial = |random: &mut ChaCha8Rng| {
                    let (before, now) = (run(random, 4, runs, 1.0), run(random, 4, runs, 1.0));
                    !compare(&before, &now, tolerance).unwrap().regressions().is_empty()
                };
                (0..1000).filter(|_| trial(random)).count()
            };
            // Of 1,000 trials 10 may; 20 would be more than three standard deviations above that.
            let without = alarms(0.0, random);
            assert!(without <= 20, "{without} of 1000 with {runs} runs");
            assert_eq!(alarms(0.05, random), 0, "with {runs} runs and a tolerance");
        }
    }

    #[test]
    fn a_fifth_slower_is_found_and_named_and_a_fifth_faster_is_no_regression() {
        let random = &mut ChaCha8Rng::seed_from_u64(8);
        let mut found = 0;
        for _ in 0..1000 {
            let before = run(random, 4, 10, 1.0);
            let mut now = run(random, 4, 10, 1.0);
            now.insert("quantity 2".into(), times(random, 10, 1.2));
            let comparison = compare(&before, &now, 0.05).unwrap();
            let names: Vec<_> = comparison.regressions().iter().map(|r| r.name.as_str()).collect();
            found += usize::from(names == ["quantity 2"]);
            let back = compare(&now, &before, 0.05).unwrap();
            assert!(back.regressions().is_empty());
        }
        assert!(found >= 950, "{found} of 1000");
        let slower = compare(&run(random, 1, 10, 1.0), &run(random, 1, 10, 1.2), 0.05).unwrap();
        assert!((15.0..25.0).contains(&slower.compared[0].percent()) && slower.text().contains("SLOWER"));
        let faster = compare(&run(random, 1, 10, 1.2), &run(random, 1, 10, 1.0), 0.05).unwrap();
        assert_eq!(faster.compared[0].verdict, Verdict::Faster);
    }

    #[test]
    fn a_few_percent_within_the_tolerance_are_no_regression() {
        let random = &mut ChaCha8Rng::seed_from_u64(9);
        let (before, now) = (run(random, 2, 40, 1.0), run(random, 2, 40, 1.04));
        assert!(compare(&before, &now, 0.05).unwrap().regressions().is_empty());
        assert_eq!(compare(&before, &now, 0.0).unwrap().regressions().len(), 2, "without one it is seen");
    }

    #[test]
    fn the_chance_is_the_share_of_all_choices() {
        // Of the six ways to choose two of four values one has the two greatest.
        assert!((chance_of_longer(&[1.0, 2.0], &[3.0, 4.0]) - 1.0 / 6.0).abs() < 1e-12);
        assert!((chance_of_longer(&[3.0, 4.0], &[1.0, 2.0]) - 1.0).abs() < 1e-12);
        // Values 1, 2, 2, 3 have ranks 1, 2.5, 2.5, 4; of the six sums two are 6.5 and none is more.
        assert!((chance_of_longer(&[1.0, 2.0], &[2.0, 3.0]) - 2.0 / 6.0).abs() < 1e-12);
        assert!((chance_of_longer(&[5.0; 9], &[5.0; 9]) - 1.0).abs() < 1e-12, "all equal");
        assert_eq!(combinations(20, 10), 184_756.0);
    }

    #[test]
    fn too_few_runs_are_said_to_be_and_never_pass() {
        let values = |runs: usize, x: f64| Quantities::from([("a".to_string(), vec![x; runs])]);
        let error = compare(&values(3, 1.0), &values(3, 9.0), 0.05).unwrap_err().to_string();
        assert!(error.contains("too few") && error.contains("--runs"), "{error}");
        let mut before = values(10, 1.0);
        let mut now = before.clone();
        before.insert("b".into(), vec![1.0; 2]);
        now.insert("b".into(), vec![9.0; 2]);
        let comparison = compare(&before, &now, 0.05).unwrap();
        assert_eq!(comparison.compared[1].verdict, Verdict::TooFewRuns);
        assert!(compare(&before, &Quantities::from([("c".to_string(), vec![1.0])]), 0.05).is_err());
    }

    #[test]
    fn long_lists_are_averaged_in_groups_that_keep_their_mean() {
        let values: Vec<f64> = (0..200).map(f64::from).collect();
        let groups = grouped(&values);
        assert_eq!((groups.len(), groups[0], groups[39]), (40, 2.0, 197.0));
        assert_eq!(grouped(&values[..7]), values[..7]);
    }

    #[test]
    fn what_differs_is_named_and_what_is_no_baseline_is_refused() {
        let text = serde_json::json!({
            "identity": { "model": "a", "machine": "x" },
            "quantities": { "ttft": [1.0, 2.5] },
            "read_bandwidth": 3e10,
        });
        let baseline = Baseline::parse(&text).unwrap();
        assert!(baseline.differences(&baseline.identity).is_empty());
        let now = Identity::from([("model".to_string(), "b".to_string()), ("machine".into(), "x".into())]);
        assert_eq!(baseline.differences(&now), ["model: `a` in the baseline, `b` now"]);
        let wrong = [
            (serde_json::json!({ "quantities": {} }), "identity"),
            (serde_json::json!({ "identity": {}, "quantities": {} }), "empty"),
            (serde_json::json!({ "identity": {}, "quantities": { "ttft": [1.0, "x"] } }), "quantities.ttft"),
            (serde_json::json!({ "identity": {}, "quantities": { "ttft": [-1.0] } }), "quantities.ttft"),
        ];
        for (json, named) in wrong {
            let error = Baseline::parse(&json).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
