//! Finding all the texts of a set that begin at one place of another text.

/// Texts sorted by their bytes. A step over one byte narrows the range of texts that are still possible, so the index
/// takes no memory besides the texts, however long they are.
#[derive(Debug)]
pub(super) struct Prefixes {
    sorted: Vec<(Box<[u8]>, u32)>,
    /// Where texts with each first byte begin in `sorted`.
    first: Vec<usize>,
}

impl Prefixes {
    /// An index of texts with their ids. Of equal texts the last counts; empty ones are left out.
    pub(super) fn new(texts: impl IntoIterator<Item = (Box<[u8]>, u32)>) -> Self {
        let mut sorted: Vec<_> = texts.into_iter().filter(|(text, _)| !text.is_empty()).collect();
        sorted.sort();
        sorted.dedup_by(|later, kept| {
            let same = later.0 == kept.0;
            if same {
                kept.1 = later.1;
            }
            same
        });
        let first = (0..=256).map(|byte| sorted.partition_point(|(text, _)| usize::from(text[0]) < byte)).collect();
        Self { sorted, first }
    }

    /// Calls `found` with length and id of every text that `text` begins with, the shortest first.
    pub(super) fn each(&self, text: &[u8], mut found: impl FnMut(usize, u32)) {
        let Some(&byte) = text.first() else { return };
        let mut range = &self.sorted[self.first[usize::from(byte)]..self.first[usize::from(byte) + 1]];
        let mut depth = 1;
        loop {
            if let Some(((shortest, id), longer)) = range.split_first()
                && shortest.len() == depth
            {
                found(depth, *id);
                range = longer;
            }
            let (false, Some(byte)) = (range.is_empty(), text.get(depth)) else { return };
            let from = range.partition_point(|(text, _)| text[depth] < *byte);
            let to = range.partition_point(|(text, _)| text[depth] <= *byte);
            range = &range[from..to];
            depth += 1;
        }
    }

    /// Length and id of the longest text that `text` begins with.
    pub(super) fn longest(&self, text: &[u8]) -> Option<(usize, u32)> {
        let mut longest = None;
        self.each(text, |length, id| longest = Some((length, id)));
        longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_that_begins_here_is_found() {
        let texts = ["a", "ab", "abcd", "b", "", "ab", "é"];
        let index = Prefixes::new(texts.iter().zip(0..).map(|(text, id)| (text.as_bytes().into(), id)));
        let found = |text: &str| {
            let mut found = Vec::new();
            index.each(text.as_bytes(), |length, id| found.push((length, id)));
            found
        };
        assert_eq!(found("abcde"), [(1, 0), (2, 5), (4, 2)]);
        assert_eq!(found("abc"), [(1, 0), (2, 5)]);
        assert_eq!(found("éa"), [(2, 6)]);
        assert_eq!(found("ä"), []);
        assert_eq!(found(""), []);
        assert_eq!(index.longest(b"abx"), Some((2, 5)));
    }
}
