//! How the choice of a token comes about, layer by layer: the logit lens.

use super::super::{LensLayer, TokenRank};

/// The layer that moved a token most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Decisive {
    /// The token.
    pub token: u32,
    /// Layer in the model.
    pub layer: usize,
    /// Its rank after the layer before.
    pub from: usize,
    /// Its rank after this one.
    pub to: usize,
}

/// What each layer would have said in one row.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct LogitTrace {
    /// The request's number.
    pub request: u64,
    /// Position of the row.
    pub position: usize,
    /// The token that was then chosen. `None` until that has happened, and where it did not.
    pub chosen: Option<u32>,
    /// In order; the last one is what the model says.
    pub layers: Vec<LensLayer>,
    /// The decisive layer of each followed token, where there is one.
    pub decisive: Vec<Decisive>,
}

impl LogitTrace {
    /// Of a row whose layers are in order.
    pub fn new(request: u64, position: usize, layers: Vec<LensLayer>) -> LogitTrace {
        let tokens =
            layers.first().map_or(Vec::new(), |first| first.tracked.iter().map(|tracked| tracked.token).collect());
        let decisive = tokens.into_iter().filter_map(|token| decisive(&layers, token)).collect();
        LogitTrace { request, position, chosen: None, layers, decisive }
    }

    /// The layer that decided for the chosen token; before one is chosen, and where the chosen one was not followed, for
    /// the token that the last layer finds most likely.
    pub fn decisive_layer(&self) -> Option<Decisive> {
        let favourite = self.layers.last().and_then(|last| Some(last.top.first()?.0));
        let of = |token: u32| self.decisive.iter().find(|decisive| decisive.token == token).copied();
        match self.chosen {
            Some(token) if self.layers.last().is_some_and(|last| tracked(last, token).is_some()) => of(token),
            _ => of(favourite?),
        }
    }

    /// A token's rank after each layer: of one that is followed, or of one that is among a layer's most likely ones.
    pub fn ranks(&self, token: u32) -> impl Iterator<Item = (usize, Option<usize>)> {
        let rank = move |layer: &LensLayer| {
            let place = || layer.top.iter().position(|(other, _)| *other == token);
            (layer.layer, tracked(layer, token).map(|found| found.rank).or_else(place))
        };
        self.layers.iter().map(rank)
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        size_of::<Self>()
            + self.layers.iter().map(LensLayer::bytes).sum::<usize>()
            + self.decisive.capacity() * size_of::<Decisive>()
    }
}

fn tracked(layer: &LensLayer, token: u32) -> Option<&TokenRank> {
    layer.tracked.iter().find(|tracked| tracked.token == token)
}

/// The layer after which a token's rank differs most from its rank after the layer before, up or down. Of equal changes a
/// rise counts before a fall, and then the earliest.
///
/// The first layer has none before it and decides nothing. `None` where the rank never changes: then the first layer's
/// input had decided, or the token was out of sight all the way.
pub fn decisive(layers: &[LensLayer], token: u32) -> Option<Decisive> {
    let mut best: Option<Decisive> = None;
    let weight = |found: &Decisive| (found.from.abs_diff(found.to), found.to < found.from);
    for pair in layers.windows(2) {
        let (Some(before), Some(after)) = (tracked(&pair[0], token), tracked(&pair[1], token)) else { continue };
        let found = Decisive { token, layer: pair[1].layer, from: before.rank, to: after.rank };
        if weight(&found) > best.as_ref().map_or((0, true), weight) {
            best = Some(found);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::super::{LensInterest, lens_layers};
    use super::*;

    /// Layers in which one token has these ranks.
    fn layers(ranks: &[usize]) -> Vec<LensLayer> {
        let layer = |(index, &rank): (usize, &usize)| LensLayer {
            layer: 10 + index,
            top: vec![(if rank == 0 { 7 } else { 8 }, 1.0)],
            tracked: vec![TokenRank { token: 7, logit: -(rank as f32), rank }],
        };
        ranks.iter().enumerate().map(layer).collect()
    }

    #[test]
    fn the_decisive_layer_is_that_of_the_largest_change_of_rank() {
        let layer = |ranks: &[usize]| decisive(&layers(ranks), 7).map(|found| (found.layer, found.from, found.to));
        assert_eq!(layer(&[90, 40, 4, 0]), Some((11, 90, 40)));
        assert_eq!(layer(&[9, 9, 500, 3]), Some((13, 500, 3)));
        assert_eq!(layer(&[3, 700, 650]), Some((11, 3, 700)), "a fall counts as a rise does");
        assert_eq!(layer(&[0, 9, 0, 9]), Some((12, 9, 0)), "of equals a rise");
        assert_eq!(layer(&[20, 10, 0]), Some((11, 20, 10)), "of equals the earliest");
        assert_eq!(layer(&[0, 0, 0]), None, "nothing was decided after the first layer");
        assert_eq!((layer(&[5]), layer(&[])), (None, None));
    }

    #[test]
    fn a_trace_speaks_of_the_chosen_token_and_before_that_of_the_favourite() {
        let mut trace = LogitTrace::new(1, 4, layers(&[30, 10, 0]));
        assert_eq!(trace.decisive_layer().unwrap().layer, 11);
        assert_eq!(trace.ranks(7).map(|(_, rank)| rank).collect::<Vec<_>>(), [Some(30), Some(10), Some(0)]);
        assert_eq!(trace.ranks(8).map(|(_, rank)| rank).collect::<Vec<_>>(), [Some(0), Some(0), None]);
        trace.chosen = Some(7);
        assert_eq!(trace.decisive_layer().unwrap().token, 7);
        trace.chosen = Some(99);
        assert_eq!(trace.decisive_layer().unwrap().token, 7, "99 was not followed");
        trace.layers[2].top = vec![(8, 1.0)];
        assert_eq!(trace.decisive_layer(), None);
    }

    proptest! {
        #[test]
        fn ranks_logits_and_the_decisive_layer_equal_a_full_sort(
            logits in (2usize..9, 3usize..12).prop_flat_map(|(layers, vocab)| {
                prop::collection::vec(prop::collection::vec((-40i32..40).prop_map(|x| x as f32 / 4.0), vocab), layers)
            }),
            tokens in prop::collection::vec(0u32..3, 0..3),
            top_k in 1usize..4,
        ) {
            let numbered: Vec<(usize, Vec<f32>)> = logits.iter().cloned().enumerate().collect();
            let mut tokens = tokens;
            tokens.sort_unstable();
            tokens.dedup();
            let interest = LensInterest { tokens: tokens.clone(), top_k };
            let trace = LogitTrace::new(0, 0, lens_layers(&interest, &numbered));
            let sorted = |logits: &[f32]| {
                let mut order: Vec<u32> = (0..logits.len() as u32).collect();
                order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
                order
            };
            let followed = match tokens.is_empty() {
                true => sorted(logits.last().unwrap())[..top_k].to_vec(),
                false => tokens,
            };
            for token in followed {
                // The rank is the number of tokens in front, with equals beside each other.
                let rank = |logits: &Vec<f32>| {
                    let order = sorted(logits);
                    order.iter().position(|&other| logits[other as usize] == logits[token as usize]).unwrap()
                };
                let ranks: Vec<usize> = logits.iter().map(rank).collect();
                prop_assert_eq!(trace.ranks(token).map(|(_, rank)| rank.unwrap()).collect::<Vec<_>>(), ranks.clone());
                // Of all changes in the order of their size, rises before falls, the first.
                let mut changes: Vec<(usize, usize, usize)> =
                    ranks.windows(2).zip(1..).map(|(pair, layer)| (layer, pair[0], pair[1])).collect();
                changes.sort_by_key(|&(layer, from, to)| (std::cmp::Reverse(from.abs_diff(to)), to > from, layer));
                let expected = changes.first().filter(|(_, from, to)| from != to).map(|(layer, ..)| *layer);
                let found = trace.decisive.iter().find(|found| found.token == token).map(|found| found.layer);
                prop_assert_eq!(found, expected);
            }
            for (layer, logits) in trace.layers.iter().zip(&logits) {
                let top: Vec<u32> = layer.top.iter().map(|(token, _)| *token).collect();
                prop_assert_eq!(top, sorted(logits)[..top_k].to_vec());
            }
        }
    }
}
