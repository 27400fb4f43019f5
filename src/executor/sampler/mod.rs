//! From the logits of one position to one token.
//!
//! The order is that of the logits processors of transformers: penalties, tokens that the model's files rule out,
//! temperature, top-k, top-p, min-p, one draw.
//! Every filter keeps a prefix of the tokens sorted by likelihood, so the three together keep the shortest of the three
//! prefixes. The vocabulary is never sorted for it, only what top-k leaves.
//!
//! The same logits, options and seed give the same token on every platform: the exponential is computed here from
//! additions and multiplications alone (a C library's `expf` differs in the last bit from one system to the next), sums
//! are taken in a fixed order, equal logits are ordered by token id, and the generator is ChaCha8, whose stream is
//! specified.

use std::collections::HashMap;
use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::error::{Error, Result};
use crate::executor::options::{GenerationOptions, TokenLogprob};
use crate::kernels::best::{best_tokens, key, logit_of, token_of};
use crate::kernels::simd::{Isa, Ordinary};
use crate::model::config::SuppressedTokens;

/// Logits in one step of a vectorised loop; also the number of partial results it keeps.
const LANES: usize = 16;

/// Logits in one block: what the greedy search scans again, and the stride of the partial sums that a draw walks over.
const BLOCK: usize = 1024;

/// One sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// Its id.
    pub token: u32,
    /// Its log-probability, where the options ask for one.
    pub logprob: Option<TokenLogprob>,
}

/// Chooses the tokens of one sequence. It remembers what it chose, since the penalties depend on that.
#[derive(Debug, Clone)]
pub struct Sampler {
    temperature: f32,
    /// `usize::MAX` cuts nothing.
    top_k: usize,
    top_p: f32,
    min_p: f32,
    /// `None` when all three are off.
    penalties: Option<Penalties>,
    /// Tokens that are never chosen, and those that are not as the next one. Where there are none and no penalties either,
    /// the logits are used where they are.
    suppressed: Arc<SuppressedTokens>,
    /// Whether a token was chosen.
    started: bool,
    /// How many of the most likely tokens to report beside the chosen one.
    logprobs: Option<usize>,
    random: ChaCha8Rng,
    // Buffers that one step leaves to the next.
    changed: Vec<f32>,
    best: Vec<u64>,
    weights: Vec<f32>,
    block_sums: Vec<f64>,
}

impl Sampler {
    /// A sampler for one sequence. The options are taken as validated; `prompt` counts for the repetition penalty only.
    pub fn new(options: &GenerationOptions, seed: u64, prompt: &[u32]) -> Self {
        // The key is the seed itself and not rand's expansion of it, which is free to change with rand's version.
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        Self {
            temperature: options.temperature,
            top_k: options.top_k.filter(|&k| k > 0).unwrap_or(usize::MAX),
            top_p: options.top_p,
            min_p: options.min_p,
            penalties: Penalties::new(options, prompt),
            suppressed: Arc::default(),
            started: false,
            logprobs: options.logprobs,
            random: ChaCha8Rng::from_seed(key),
            changed: Vec::new(),
            best: Vec::new(),
            weights: Vec::new(),
            block_sums: Vec::new(),
        }
    }

    /// The same sampler, which never chooses these tokens.
    pub fn suppressing(self, suppressed: Arc<SuppressedTokens>) -> Self {
        Self { suppressed, ..self }
    }

    /// Tokens that the next choice leaves out.
    fn suppressed_now(&self) -> impl Iterator<Item = u32> {
        let at_first = if self.started { &[][..] } else { &self.suppressed.at_first };
        self.suppressed.always.iter().chain(at_first).copied()
    }

    /// The next token, given the logits of the last position.
    ///
    /// An infinite logit or NaN is an error, whatever the penalties would make of it: a weight or the model's arithmetic is
    /// wrong, and any token chosen would hide that.
    ///
    /// With a temperature above 0 each call takes exactly one number from the generator, so that the n-th token of a
    /// sequence depends on the n-th number whatever the logits before it were.
    pub fn sample(&mut self, logits: &[f32]) -> Result<SampledToken> {
        let mut changed = std::mem::take(&mut self.changed);
        let logits_for_choice = match self.penalties.is_some() || self.suppressed_now().next().is_some() {
            true => {
                check_finite(logits)?;
                changed.clear();
                changed.extend_from_slice(logits);
                if let Some(penalties) = &self.penalties {
                    penalties.apply(&mut changed);
                }
                for token in self.suppressed_now() {
                    // The lowest finite logit: its weight is 0, and an infinite one is refused.
                    if let Some(logit) = changed.get_mut(token as usize) {
                        *logit = f32::MIN;
                    }
                }
                &changed
            }
            false => logits,
        };
        let chosen = self.choose(logits_for_choice);
        self.changed = changed;
        let token = chosen?;
        self.started = true;
        if let Some(penalties) = &mut self.penalties {
            penalties.count(token);
        }
        let logprob = match self.logprobs {
            Some(top) => Some(self.logprob(logits, token, top)?),
            None => None,
        };
        Ok(SampledToken { token, logprob })
    }

    /// How many of the most likely tokens are enough to choose as from all logits, see [`sample_best`](Self::sample_best);
    /// `None` where all are needed. The greedy choice needs one; top-k needs `k`, since the other filters and the draw look
    /// at those alone. Penalties may raise any token, suppressed tokens may be the most likely ones, log-probabilities and
    /// a draw without top-k sum over all.
    pub fn enough(&self) -> Option<usize> {
        if self.penalties.is_some() || self.logprobs.is_some() || self.suppressed_now().next().is_some() {
            return None;
        }
        match self.temperature == 0.0 {
            true => Some(1),
            false => Some(self.top_k).filter(|&k| k < usize::MAX),
        }
    }

    /// The token that [`sample`](Self::sample) chooses, given the [`enough`](Self::enough) most likely ones of more, in
    /// order. All logits are finite, those of the other tokens too.
    pub fn sample_best(&mut self, best: &[(u32, f32)]) -> Result<SampledToken> {
        let (first, logprob) = (best.first().copied(), None);
        let finite = best.iter().all(|(_, logit)| logit.is_finite());
        match (self.enough(), first) {
            (Some(k), Some((token, max))) if best.len() == k && finite => {
                let Some((uniform, scale)) = self.draw(max) else { return Ok(SampledToken { token, logprob }) };
                self.best.clear();
                self.best.extend(best.iter().map(|&(token, logit)| key(logit, token)));
                let kept = self.filter_best(max, scale);
                Ok(SampledToken { token: self.walk_best(kept, uniform), logprob })
            }
            (enough, first) => {
                let wanted = enough.map_or("all logits".into(), |k| format!("the {k} most likely"));
                let found = format!("{} tokens, the first with {:?}", best.len(), first.map(|(_, logit)| logit));
                Err(Error::Tensors(format!("no token can be chosen from {found}, where {wanted} were wanted")))
            }
        }
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        let (token, max) = most_likely(logits)?;
        let Some((uniform, scale)) = self.draw(max) else { return Ok(token) };
        Ok(match self.filter(logits, max, scale) {
            Kept::Best(n) => self.walk_best(n, uniform),
            Kept::Weighted => {
                // Find the block first, then the token in it.
                let mut before = 0.0;
                let target = uniform * self.block_sums.iter().sum::<f64>();
                let mut block = None;
                for (i, &sum) in self.block_sums.iter().enumerate() {
                    if sum > 0.0 {
                        block = Some((i, before));
                    }
                    if before + sum > target {
                        break;
                    }
                    before += sum;
                }
                let (block, before) = block.unwrap_or((0, 0.0));
                let start = block * BLOCK;
                let end = self.weights.len().min(start + BLOCK);
                (start + walk(&self.weights[start..end], target - before)) as u32
            }
        })
    }

    /// The random number and the factor on logits; `None` where the most likely token is the choice.
    fn draw(&mut self, max: f32) -> Option<(f64, f32)> {
        if self.temperature == 0.0 {
            return None;
        }
        let uniform = unit_interval(self.random.next_u64());
        let scale = 1.0 / self.temperature;
        // Not finite: the temperature is too small for f32. In the limit only the best is left.
        (max.abs() * scale).is_finite().then_some((uniform, scale))
    }

    /// The token among the first `kept` of `best` at which the weights have come as far as `uniform`, 0 to 1.
    fn walk_best(&self, kept: usize, uniform: f64) -> u32 {
        let weights = &self.weights[..kept];
        token_of(self.best[walk(weights, uniform * sum(weights))])
    }

    /// Applies temperature, top-k, top-p and min-p, and leaves the tokens that are left with their weights
    /// (probabilities up to a common factor; the most likely token has 1) in the buffers.
    fn filter(&mut self, logits: &[f32], max: f32, scale: f32) -> Kept {
        if self.top_k < logits.len() {
            best_tokens(logits, self.top_k, &mut self.best);
            return Kept::Best(self.filter_best(max, scale));
        }
        let Self { best, weights, block_sums, .. } = self;
        let top_p = f64::from(self.top_p);
        weigh(logits, max, scale, weights, block_sums);
        if self.top_p < 1.0 {
            let cut = nucleus_end(logits, weights, top_p, block_sums.iter().sum(), best);
            let (cut_logit, cut_token) = (logit_of(cut), token_of(cut) as usize);
            // Among tokens as likely as the last one of the nucleus, those with higher ids are outside.
            let (upto, after) = weights.split_at_mut(cut_token + 1);
            let (logits_upto, logits_after) = logits.split_at(cut_token + 1);
            Isa::detect().compile(|| {
                for (weight, &logit) in upto.iter_mut().zip(logits_upto) {
                    *weight = if logit >= cut_logit { *weight } else { 0.0 };
                }
                for (weight, &logit) in after.iter_mut().zip(logits_after) {
                    *weight = if logit > cut_logit { *weight } else { 0.0 };
                }
            });
        }
        if self.min_p > 0.0 {
            for weight in weights.iter_mut() {
                *weight = if *weight >= self.min_p { *weight } else { 0.0 };
            }
        }
        if self.top_p < 1.0 || self.min_p > 0.0 {
            Isa::detect().compile(|| {
                for (sum, block) in block_sums.iter_mut().zip(weights.chunks(BLOCK)) {
                    *sum = lane_sum(block);
                }
            });
        }
        Kept::Weighted
    }

    /// Applies temperature, top-p and min-p to the tokens in `best`, sorts them and leaves their weights beside them;
    /// returns how many are kept.
    fn filter_best(&mut self, max: f32, scale: f32) -> usize {
        let Self { best, weights, .. } = self;
        best.sort_unstable();
        weights.clear();
        weights.extend(best.iter().map(|&key| exp((logit_of(key) - max) * scale)));
        let mut kept = best.len();
        if self.top_p < 1.0 {
            kept = nucleus(weights, f64::from(self.top_p) * sum(weights)).unwrap_or(kept);
        }
        // Weights fall, and the first is 1: what min-p keeps is a prefix too.
        kept.min(weights.partition_point(|&weight| weight >= self.min_p)).max(1)
    }

    /// Log-probabilities of the token and of the `top` most likely ones under the model's own distribution.
    fn logprob(&mut self, logits: &[f32], token: u32, top: usize) -> Result<TokenLogprob> {
        let (_, max) = most_likely(logits)?;
        weigh(logits, max, 1.0, &mut self.weights, &mut self.block_sums);
        let log_sum = self.block_sums.iter().sum::<f64>().ln();
        let log_probability = |logit: f32| (f64::from(logit) - f64::from(max) - log_sum) as f32;
        best_tokens(logits, top.min(logits.len()), &mut self.best);
        self.best.sort_unstable();
        Ok(TokenLogprob {
            token,
            logprob: log_probability(logits[token as usize]),
            top: self.best.iter().map(|&key| (token_of(key), log_probability(logit_of(key)))).collect(),
        })
    }
}

/// Where [`Sampler::filter`] left the tokens.
#[derive(Debug, Clone, Copy)]
enum Kept {
    /// The first so many of `best`, most likely first; their weights stand beside them in `weights`.
    Best(usize),
    /// `weights` has one for each token of the vocabulary (0: not kept), `block_sums` their sums.
    Weighted,
}

/// Penalties for tokens that were there before, with the tokens they fall on.
#[derive(Debug, Clone)]
struct Penalties {
    repetition: f32,
    presence: f64,
    frequency: f64,
    /// How often each token was generated; 0 for one that only the prompt has.
    counts: HashMap<u32, u32>,
}

impl Penalties {
    fn new(options: &GenerationOptions, prompt: &[u32]) -> Option<Self> {
        let repetition = options.repetition_penalty;
        let presence = f64::from(options.presence_penalty);
        let frequency = f64::from(options.frequency_penalty);
        if repetition == 1.0 && presence == 0.0 && frequency == 0.0 {
            return None;
        }
        let counts = if repetition == 1.0 { HashMap::new() } else { prompt.iter().map(|&token| (token, 0)).collect() };
        Some(Self { repetition, presence, frequency, counts })
    }

    fn count(&mut self, token: u32) {
        *self.counts.entry(token).or_insert(0) += 1;
    }

    /// Each token is changed on its own, so the order of the map does not matter. What a penalty moves beyond f32 stays
    /// finite: no other token is as unlikely, or as likely.
    fn apply(&self, logits: &mut [f32]) {
        for (&token, &count) in &self.counts {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            if *logit > 0.0 {
                *logit /= self.repetition;
            } else {
                *logit *= self.repetition;
            }
            if count > 0 {
                // In f64, where the penalty is always finite: infinity minus infinity would be NaN.
                *logit = (f64::from(*logit) - (self.presence + self.frequency * f64::from(count))) as f32;
            }
            *logit = logit.clamp(f32::MIN, f32::MAX);
        }
    }
}

/// The most likely token (the lowest id among equals) and its logit.
///
/// One pass that the compiler vectorises: `LANES` running maxima, and the block where the maximum rose last; only that
/// block is scanned again for the position. An infinite logit or NaN is an error that names its token.
fn most_likely(logits: &[f32]) -> Result<(u32, f32)> {
    let isa = Isa::detect();
    let mut max = f32::NEG_INFINITY;
    let mut max_block = None;
    for (i, block) in logits.chunks(BLOCK).enumerate() {
        let mut maxima = [f32::NEG_INFINITY; LANES];
        let mut lost = [0u32; LANES];
        isa.compile(|| {
            for chunk in block.chunks(LANES) {
                for ((maximum, lost), &logit) in maxima.iter_mut().zip(&mut lost).zip(chunk) {
                    *maximum = if logit > *maximum { logit } else { *maximum };
                    *lost |= u32::from(!logit.is_finite());
                }
            }
        });
        if lost.iter().any(|&lost| lost != 0) {
            check_finite(logits)?;
        }
        let block_max = maxima.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        if block_max > max {
            max = block_max;
            max_block = Some((i, block));
        }
    }
    let Some((i, block)) = max_block else {
        return Err(Error::Tensors("no token can be chosen: there are no logits".into()));
    };
    let position = block.iter().position(|&logit| logit == max).unwrap_or(0);
    Ok(((i * BLOCK + position) as u32, max))
}

/// An error that names the first token whose logit is infinite or NaN. A model that works gives neither; masks and
/// penalties come after it.
pub fn check_finite(logits: &[f32]) -> Result<()> {
    // Block by block, so that the compiler makes vectors of it.
    for (i, block) in logits.chunks(BLOCK).enumerate() {
        if block.iter().fold(false, |any, logit| any | !logit.is_finite()) {
            let lost = block.iter().enumerate().find(|(_, logit)| !logit.is_finite());
            return match lost {
                Some((position, logit)) => Err(Error::LogitsNotFinite { token: i * BLOCK + position, logit: *logit }),
                None => Ok(()),
            };
        }
    }
    Ok(())
}

/// `weights[i] = exp((logits[i] - max) * scale)`, and the sum of each block of them. `max` and `scale` are finite.
fn weigh(logits: &[f32], max: f32, scale: f32, weights: &mut Vec<f32>, block_sums: &mut Vec<f64>) {
    weights.resize(logits.len(), 0.0);
    block_sums.resize(logits.len().div_ceil(BLOCK), 0.0);
    Isa::detect().run_ordinary(Weigh { logits, max, scale, weights, block_sums });
}

struct Weigh<'a> {
    logits: &'a [f32],
    max: f32,
    scale: f32,
    weights: &'a mut [f32],
    block_sums: &'a mut [f64],
}

impl Ordinary for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let blocks = self.weights.chunks_mut(BLOCK).zip(self.logits.chunks(BLOCK));
        for ((weights, logits), sum) in blocks.zip(self.block_sums) {
            for (weight, &logit) in weights.iter_mut().zip(logits) {
                *weight = exp((logit - self.max) * self.scale);
            }
            *sum = lane_sum(weights);
        }
    }
}

/// Sum in f64 over eight lanes: one addition after the other would wait for each.
#[inline(always)]
fn lane_sum(weights: &[f32]) -> f64 {
    let mut sums = [0.0f64; 8];
    let (chunks, rest) = weights.as_chunks::<8>();
    for chunk in chunks {
        for (sum, &weight) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(weight);
        }
    }
    for (sum, &weight) in sums.iter_mut().zip(rest) {
        *sum += f64::from(weight);
    }
    sums.iter().sum()
}

fn sum(weights: &[f32]) -> f64 {
    weights.iter().map(|&weight| f64::from(weight)).sum()
}

/// The smallest number of leading weights that add up to `target`, if all together do.
fn nucleus(weights: &[f32], target: f64) -> Option<usize> {
    let mut mass = 0.0;
    for (i, &weight) in weights.iter().enumerate() {
        mass += f64::from(weight);
        if mass >= target {
            return Some(i + 1);
        }
    }
    None
}

/// The key of the last token of the nucleus: the first in order of likelihood with which the weights add up to `top_p`
/// times their sum `total`.
///
/// Found by quickselect over weight in place of rank: halve the candidates, look on which side the mass is reached, and
/// go on there. Nothing is sorted but the last few.
fn nucleus_end(logits: &[f32], weights: &[f32], top_p: f64, total: f64, candidates: &mut Vec<u64>) -> u64 {
    // Tokens lighter than (1 - p) of the mean weigh less than 1 - p of the total together, so the nucleus ends among
    // the others. What rounding may do to the sums is far below the margin.
    let threshold = ((1.0 - top_p) * total / logits.len() as f64 * (1.0 - 1e-6)) as f32;
    candidates.clear();
    for (i, chunk) in weights.chunks(LANES).enumerate() {
        if !chunk.iter().fold(false, |any, &weight| any | (weight >= threshold)) {
            continue;
        }
        for (j, &weight) in chunk.iter().enumerate() {
            if weight >= threshold {
                let token = i * LANES + j;
                candidates.push(key(logits[token], token as u32));
            }
        }
    }
    let weight_of = |key: u64| f64::from(weights[token_of(key) as usize]);
    let mut rest = candidates.as_mut_slice();
    let mut wanted = top_p * total;
    while rest.len() > 64 {
        let middle = rest.len() / 2;
        rest.select_nth_unstable(middle);
        let (left, right) = rest.split_at_mut(middle);
        let mass: f64 = left.iter().map(|&key| weight_of(key)).sum();
        if mass >= wanted {
            rest = left;
        } else {
            wanted -= mass;
            rest = right;
        }
    }
    rest.sort_unstable();
    let mut end = 0;
    for &mut candidate in rest {
        end = candidate;
        wanted -= weight_of(candidate);
        if wanted <= 0.0 {
            break;
        }
    }
    end
}

/// The first index at which the running sum of the weights exceeds `target`; where rounding leaves none, the last index
/// with a weight above 0. An index of weight 0 is never chosen.
fn walk(weights: &[f32], target: f64) -> usize {
    let mut mass = 0.0;
    let mut last = 0;
    for (i, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            mass += f64::from(weight);
            last = i;
            if mass > target {
                break;
            }
        }
    }
    last
}

/// The 53 high bits as a number in [0, 1).
fn unit_interval(bits: u64) -> f64 {
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// e^x for x <= 0 to within 2 ulp; below the smallest normal number it is 0.
///
/// The method of the Cephes library's `expf`: x = n ln 2 + r with ln 2 in two parts, a polynomial of degree 5 for the
/// rest of e^r, and n added to the exponent. Written without branches, calls and fused operations, so it vectorises and
/// its bits do not depend on the platform.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.0;
    // Adding and subtracting this rounds to the nearest integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > LOWEST { x } else { LOWEST };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.0e-1;
    let y = p * r * r + r + 1.0;
    let power_of_two = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    // A mask in place of a branch around the polynomial.
    let in_range = u32::from(x >= LOWEST).wrapping_neg();
    f32::from_bits((y * f32::from_bits(power_of_two)).to_bits() & in_range)
}

#[cfg(test)]
mod tests;
