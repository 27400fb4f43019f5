//! The most likely tokens of a row of logits, without sorting the vocabulary. A token and its logit are one number, its key,
//! whose order is the order of likelihood.

use super::simd::Isa;

/// Logits that are looked at together.
const LANES: usize = 16;

/// Logits of which one is known to be the greatest before it is searched for.
const BLOCK: usize = 1024;

/// The `k` most likely tokens with their logits: the most likely first, the lowest id first among equals. `None` where that
/// is not less than all logits, or where a logit is infinite or NaN and the error that reports it needs them all.
pub fn most_likely(logits: &[f32], k: usize) -> Option<Vec<(u32, f32)>> {
    // A token with its logit takes twice the bytes of a logit.
    if k >= logits.len().div_ceil(2) {
        return None;
    }
    if k == 1 {
        return greatest(logits).map(|best| vec![best]);
    }
    if !all_finite(logits) {
        return None;
    }
    let mut keys = Vec::new();
    best_tokens(logits, k, &mut keys);
    keys.sort_unstable();
    Some(keys.into_iter().map(|key| (token_of(key), logit_of(key))).collect())
}

/// The most likely token, in one pass; `None` where a logit is infinite or NaN.
fn greatest(logits: &[f32]) -> Option<(u32, f32)> {
    let isa = Isa::detect();
    let (mut best, mut best_block) = (f32::NEG_INFINITY, 0);
    for (index, block) in logits.chunks(BLOCK).enumerate() {
        let (mut maxima, mut lost) = ([f32::NEG_INFINITY; LANES], [0u32; LANES]);
        isa.compile(|| {
            for chunk in block.chunks(LANES) {
                for ((maximum, lost), &logit) in maxima.iter_mut().zip(&mut lost).zip(chunk) {
                    *maximum = if logit > *maximum { logit } else { *maximum };
                    *lost |= u32::from(!logit.is_finite());
                }
            }
        });
        if lost.iter().any(|&lost| lost != 0) {
            return None;
        }
        let block_max = maxima.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        if block_max > best {
            (best, best_block) = (block_max, index);
        }
    }
    let block = logits.chunks(BLOCK).nth(best_block)?;
    let position = block.iter().position(|&logit| logit == best)?;
    Some(((best_block * BLOCK + position) as u32, best + 0.0))
}

fn all_finite(logits: &[f32]) -> bool {
    logits.chunks(BLOCK).all(|block| block.iter().fold(true, |all, logit| all & logit.is_finite()))
}

/// Leaves the keys of the `k` most likely tokens in `keys`, in no order.
///
/// Tokens that cannot be among them any more are skipped sixteen at a time; of the others, those beyond the best `k`
/// are thrown away whenever twice as many have come together.
pub fn best_tokens(logits: &[f32], k: usize, keys: &mut Vec<u64>) {
    keys.clear();
    if k == 0 {
        return;
    }
    let first = k.min(logits.len());
    keys.extend(logits[..first].iter().enumerate().map(|(token, &logit)| key(logit, token as u32)));
    let limit = k.saturating_mul(2).max(k.saturating_add(128));
    let mut threshold = keys.iter().max().map_or(f32::NEG_INFINITY, |&worst| logit_of(worst));
    for (i, chunk) in logits[first..].chunks(LANES).enumerate() {
        // An equal logit at a higher id comes after all that are kept.
        if !chunk.iter().fold(false, |any, &logit| any | (logit > threshold)) {
            continue;
        }
        for (j, &logit) in chunk.iter().enumerate() {
            if logit > threshold {
                keys.push(key(logit, (first + i * LANES + j) as u32));
            }
        }
        if keys.len() >= limit {
            let (_, &mut worst, _) = keys.select_nth_unstable(k - 1);
            threshold = logit_of(worst);
            keys.truncate(k);
        }
    }
    if keys.len() > k {
        keys.select_nth_unstable(k - 1);
        keys.truncate(k);
    }
}

/// A number that orders tokens: the most likely first, the lowest id first among equals.
pub fn key(logit: f32, token: u32) -> u64 {
    // Adding 0 makes minus zero zero. The bits of positive floats are ordered as they are, those of negative ones the
    // other way round.
    let bits = (logit + 0.0).to_bits();
    let ascending = if bits >> 31 == 0 { bits | 0x8000_0000 } else { !bits };
    (u64::from(!ascending) << 32) | u64::from(token)
}

/// The token of a key.
pub fn token_of(key: u64) -> u32 {
    key as u32
}

/// The logit of a key; minus zero has become zero.
pub fn logit_of(key: u64) -> f32 {
    let ascending = !((key >> 32) as u32);
    f32::from_bits(if ascending >> 31 == 1 { ascending & 0x7fff_ffff } else { !ascending })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sorts all.
    fn sorted(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
        let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        all.sort_by(|(_, a), (_, b)| b.partial_cmp(a).unwrap());
        all.truncate(k);
        all
    }

    #[test]
    fn the_most_likely_tokens_are_those_that_sorting_finds() {
        for len in [1usize, 2, 15, 16, 17, 100, 3000, 32_003] {
            // Few values, so that many are equal.
            let logits: Vec<f32> = (0..len as u64).map(|i| ((i * 7919 + i * i * 13) % 211) as f32 - 100.0).collect();
            for k in [0, 1, 2, 7, 50, 1400] {
                let found = most_likely(&logits, k);
                assert_eq!(found.is_some(), k < len.div_ceil(2), "{k} of {len}");
                assert_eq!(found.unwrap_or_else(|| sorted(&logits, k)), sorted(&logits, k), "{k} of {len}");
            }
        }
    }

    #[test]
    fn rows_with_a_logit_that_is_no_finite_number_have_no_most_likely_tokens() {
        for lost in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for position in [0, 1000, 1024, 4999] {
                let mut logits = vec![0.5f32; 5000];
                logits[position] = lost;
                assert_eq!(most_likely(&logits, 1), None, "{lost} at {position}");
            }
        }
    }
}
