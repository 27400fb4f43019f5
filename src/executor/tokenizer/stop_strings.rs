//! Stop strings: where a text ends that the model would go on with. A stop string may be spread over several pieces, so
//! its beginning is held back until it is certain.

/// Looks for stop strings in a text that comes in pieces.
///
/// What is released does not depend on where the pieces are cut: the match that ends first wins, the longest of those
/// that end together.
#[derive(Debug, Clone)]
pub struct StopStringMatcher {
    stops: Vec<String>,
    longest: usize,
    /// Text that may be the beginning of a stop string.
    held: String,
    matched: Option<usize>,
}

/// What one piece leads to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopMatch {
    /// Text that no stop string can take back any more.
    pub text: String,
    /// The index of the stop string that was found. The text ends before it, and what came after it is dropped.
    pub matched: Option<usize>,
}

impl StopStringMatcher {
    /// A matcher for these texts. Empty ones are left out of account.
    pub fn new(stops: &[String]) -> Self {
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        Self { stops: stops.to_vec(), longest, held: String::new(), matched: None }
    }

    /// Takes the next piece. After a match nothing is released any more.
    pub fn push(&mut self, piece: &str) -> StopMatch {
        if self.matched.is_some() {
            return StopMatch { text: String::new(), matched: self.matched };
        }
        self.held.push_str(piece);
        let stops = self.stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty());
        let found = stops.filter_map(|(i, stop)| self.held.find(stop).map(|start| (start + stop.len(), start, i)));
        if let Some((_, start, i)) = found.min() {
            self.matched = Some(i);
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return StopMatch { text, matched: self.matched };
        }
        let earliest = (self.held.len() + 1).saturating_sub(self.longest);
        let starts = self.held.char_indices().map(|(i, _)| i).skip_while(|&i| i < earliest);
        let first = starts.into_iter().find(|&i| self.stops.iter().any(|stop| stop.starts_with(&self.held[i..])));
        let held = self.held.split_off(first.unwrap_or(self.held.len()));
        StopMatch { text: std::mem::replace(&mut self.held, held), matched: None }
    }

    /// The text that was held back, once the last piece has been: no stop string follows. Empty after a match.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn stop_strings_do_not_depend_on_the_pieces(
            text in "[abc]{0,40}",
            stops in proptest::collection::vec("[abc]{1,5}", 0..4),
            cuts in proptest::collection::vec(1usize..6, 0..40),
        ) {
            let mut matcher = StopStringMatcher::new(&stops);
            let (mut out, mut rest, mut matched) = (String::new(), text.as_str(), None);
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                rest = after;
                let step = matcher.push(piece);
                out.push_str(&step.text);
                matched = step.matched;
                // What is out is never the beginning of a stop string in what follows.
                prop_assert!(matched.is_some() || stops.iter().all(|stop| !out.contains(stop.as_str())));
            }
            let step = matcher.push(rest);
            out.push_str(&step.text);
            matched = matched.or(step.matched);
            out.push_str(&matcher.finish());

            // By definition: go through the text and stop at the first position at which a stop string ends.
            let end = (0..=text.len()).find(|&end| stops.iter().any(|stop| text[..end].ends_with(stop.as_str())));
            match end {
                Some(end) => {
                    let ending = stops.iter().filter(|stop| text[..end].ends_with(stop.as_str()));
                    let longest = ending.max_by_key(|stop| stop.len()).unwrap();
                    prop_assert_eq!(&out, &text[..end - longest.len()]);
                    prop_assert_eq!(&stops[matched.unwrap()], longest);
                }
                None => {
                    prop_assert_eq!(&out, &text);
                    prop_assert_eq!(matched, None);
                }
            }
        }
    }

    #[test]
    fn stop_strings() {
        let stops = ["</s>".to_owned(), "\n\nUser:".to_owned(), "。终".to_owned(), String::new()];
        let run = |pieces: &[&str]| {
            let mut matcher = StopStringMatcher::new(&stops);
            let mut steps: Vec<String> = pieces.iter().map(|piece| matcher.push(piece).text).collect();
            steps.push(matcher.finish());
            (steps.join("|"), matcher.matched)
        };
        assert_eq!(run(&["hello", " <", "/", "b>"]), ("hello| ||</b>|".into(), None));
        assert_eq!(run(&["hello", " <", "/s", "> rest", "more"]), ("hello| ||||".into(), Some(0)));
        assert_eq!(run(&["a\n", "\n\nUs", "er: b"]), ("a|\n||".into(), Some(1)));
        assert_eq!(run(&["好。", "好。", "终了"]), ("好|。好||".into(), Some(2)));
        assert_eq!(run(&["end </", "s"]), ("end ||</s".into(), None));
        let mut none = StopStringMatcher::new(&[]);
        assert_eq!(none.push("anything"), StopMatch { text: "anything".into(), matched: None });
    }
}
