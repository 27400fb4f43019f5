//! Flags for how tokens are chosen and when a generation stops.

use std::time::Duration;

use candle_pipeline::GenerationOptions;
use clap::Args;

/// What every generation of a program gets.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Generation")]
pub struct Sampling {
    /// Tokens to generate at most.
    #[arg(long, default_value_t = 400)]
    pub max_tokens: usize,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Nucleus; 1 cuts nothing.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f32,
    /// The k most likely tokens only.
    #[arg(long)]
    pub top_k: Option<usize>,
    /// Only tokens at least this fraction as likely as the most likely one; 0 cuts nothing.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Divides the logits of tokens in prompt and output, or multiplies negative ones; 1 is off.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// Subtracted from the logit of each token that was generated.
    #[arg(long, value_name = "LOGITS", default_value_t = 0.0, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Subtracted from the logit of each generated token once for each time it was.
    #[arg(long, value_name = "LOGITS", default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Seed of the random choice.
    #[arg(long)]
    pub seed: Option<u64>,
    /// A text that ends the generation; the output ends before it. May be repeated.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// A token id that ends the generation, besides the model's own. May be repeated, or a list with commas.
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    pub stop_token: Vec<u32>,
    /// Go on past end-of-sequence tokens.
    #[arg(long)]
    pub ignore_eos: bool,
    /// End each generation this many seconds after it was asked for, with what there is by then.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_negative_numbers = true)]
    pub deadline: Option<Duration>,
    /// Compute prompts that begin like earlier ones in full.
    #[arg(long)]
    pub no_prefix_reuse: bool,
    /// With JSON: also the log-probability of each token, and of this many most likely ones beside it.
    #[arg(long, value_name = "N")]
    pub logprobs: Option<usize>,
    /// With JSON: also the logits of the last prompt position.
    #[arg(long)]
    pub logits: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| "expected seconds, as in 5 or 0.5".into())
}

impl Sampling {
    /// The options of a generation, refused where they have no meaning.
    pub fn options(&self) -> candle_pipeline::Result<GenerationOptions> {
        let options = GenerationOptions {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
            stop_tokens: self.stop_token.clone(),
            stop_strings: self.stop.clone(),
            logprobs: self.logprobs,
            ignore_eos: self.ignore_eos,
            prompt_logits: self.logits,
            deadline: self.deadline,
            reuse_prefix: !self.no_prefix_reuse,
        };
        options.validate()?;
        Ok(options)
    }

    /// What of it changes which tokens are generated, in words.
    pub fn describe(&self) -> String {
        let top_k = self.top_k.unwrap_or(0);
        let mut text = format!("temperature {}, top-p {}, top-k {top_k}", self.temperature, self.top_p);
        for (name, value, off) in [
            ("min-p", self.min_p, 0.0),
            ("repetition penalty", self.repetition_penalty, 1.0),
            ("presence penalty", self.presence_penalty, 0.0),
            ("frequency penalty", self.frequency_penalty, 0.0),
        ] {
            if value != off {
                text += &format!(", {name} {value}");
            }
        }
        text
    }
}
