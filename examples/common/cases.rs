//! What a bench measures: prompts of one length for so many sequences at once, and then so many tokens of each.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Written `prompt:generate` or `prompt:generate:sequences`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// Prompt tokens of each sequence.
    pub prompt: usize,
    /// Decode steps after the prompt; 0 measures the prompt alone.
    pub generate: usize,
    /// Sequences side by side.
    pub sequences: usize,
}

impl FromStr for Case {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Case> {
        let numbers = text.split(':').map(|number| number.trim().parse::<usize>());
        let numbers = numbers.collect::<Result<Vec<_>, _>>().with_context(|| format!("`{text}`"))?;
        let (prompt, generate, sequences) = match *numbers {
            [prompt, generate] => (prompt, generate, 1),
            [prompt, generate, sequences] => (prompt, generate, sequences),
            _ => anyhow::bail!("`{text}` is not prompt:generate or prompt:generate:sequences"),
        };
        ensure!(prompt > 0 && sequences > 0, "`{text}`: a case needs a prompt token and a sequence at least");
        Ok(Case { prompt, generate, sequences })
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.prompt, self.generate, self.sequences)
    }
}

impl Case {
    /// The same prompts in every run and every program.
    pub fn prompts(&self, vocab_size: usize) -> Vec<Vec<u32>> {
        let token = |sequence: usize, position: usize| ((sequence * 131 + position) * 7919 + 1) % vocab_size;
        let prompt = |sequence| (0..self.prompt).map(|position| token(sequence, position) as u32).collect();
        (0..self.sequences).map(prompt).collect()
    }
}

/// What running a case took.
#[derive(Debug, Clone, Default)]
pub struct Timing {
    /// From the submission until every sequence has its first token.
    pub prefill: Duration,
    /// From there to the last token that counts.
    pub decode: Duration,
    /// Tokens that came in that time, over all sequences.
    pub decoded: usize,
    /// Time between two tokens of one sequence, for each of those.
    pub steps: Vec<Duration>,
    /// Share of its time that each stage computed, from 0 to 1.
    pub busy: Vec<f64>,
    /// Time between two tokens while another prompt was computed, where that was asked for.
    pub disturbed: Vec<Duration>,
}

impl Timing {
    /// Prompt tokens a second over all sequences.
    pub fn prefill_rate(&self, case: &Case) -> f64 {
        (case.prompt * case.sequences) as f64 / self.prefill.as_secs_f64().max(1e-9)
    }

    /// Generated tokens a second over all sequences.
    pub fn decode_rate(&self) -> Option<f64> {
        (self.decoded > 0).then(|| self.decoded as f64 / self.decode.as_secs_f64().max(1e-9))
    }

    /// The same by the median step.
    pub fn median_decode_rate(&self, case: &Case) -> Option<f64> {
        let mut steps = self.steps.clone();
        steps.sort_unstable();
        let median = steps.get(steps.len() / 2)?;
        Some(case.sequences as f64 / median.as_secs_f64().max(1e-9))
    }

    /// The 99th percentile of times between two tokens, in microseconds.
    fn p99_us(steps: &[Duration]) -> Option<u64> {
        let mut steps = steps.to_vec();
        steps.sort_unstable();
        Some(steps.get((steps.len() * 99 / 100).min(steps.len().checked_sub(1)?))?.as_micros() as u64)
    }

    /// One case of the JSON output.
    pub fn json(&self, case: &Case) -> serde_json::Value {
        serde_json::json!({
            "case": case.to_string(),
            "prompt": case.prompt,
            "generate": case.generate,
            "sequences": case.sequences,
            "prefill_us": self.prefill.as_micros() as u64,
            "decode_us": self.decode.as_micros() as u64,
            "decoded": self.decoded,
            "prefill_tokens_per_second": self.prefill_rate(case),
            "decode_tokens_per_second": self.decode_rate(),
            "decode_median_tokens_per_second": self.median_decode_rate(case),
            "inter_token_p99_us": Self::p99_us(&self.steps),
            "disturbed_inter_token_p99_us": Self::p99_us(&self.disturbed),
            "disturbed_inter_tokens": self.disturbed.len(),
            "busy_shares": self.busy,
        })
    }

    /// One line of the table under [`HEADER`].
    pub fn row(&self, case: &Case) -> String {
        let rate = |rate: Option<f64>| rate.map_or("-".into(), |rate| format!("{rate:.2}"));
        format!(
            "{:>8} {:>8} {:>9} {:>12} {:>12} {:>12}",
            case.prompt,
            case.generate,
            case.sequences,
            rate(Some(self.prefill_rate(case))),
            rate(self.decode_rate()),
            rate(self.median_decode_rate(case)),
        )
    }
}

/// Names of the columns; rates are tokens a second over all sequences.
pub const HEADER: &str = "  prompt generate sequences  prefill t/s   decode t/s   median t/s";
