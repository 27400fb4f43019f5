//! A plan, and what would fit where none does, in words.

use std::fmt;

use super::{Fit, Objective, Plan, Prediction, Round, Workload};
use crate::pipeline::human_bytes;

impl fmt::Display for Fit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fit::Context(context) => write!(f, "a context of {context} positions"),
            Fit::Sequences(sequences) => write!(f, "{sequences} sequences at once"),
            Fit::Type(dtype) => write!(f, "the model in {dtype}"),
            Fit::Split(devices, counts) => write!(f, "layers {} on {}", comma(counts), comma(devices)),
        }
    }
}

/// With commas between.
pub fn comma<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}

/// What would fit, as a sentence.
pub fn in_words(fits: &[Fit]) -> String {
    match fits {
        [] => "add a device or take a smaller model".to_string(),
        fits => {
            let fits: Vec<String> = fits.iter().map(Fit::to_string).collect();
            format!("what would fit: {}; or add a device", fits.join("; or "))
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Prediction { one, all, prompt_tokens_per_second } = &self.prediction;
        let Workload { context, sequences } = self.workload;
        let several = sequences > 1;
        let ms = |seconds: f64| format!("{:.3} ms", seconds * 1e3);
        let times = |one: f64, all: f64| match several {
            true => format!("{:>11}  {:>11}", ms(one), ms(all)),
            false => format!("{:>11}", ms(one)),
        };
        let rows = if several { format!("  {:>11}", format!("{} rows", all.rows)) } else { String::new() };
        writeln!(
            f,
            "{:<5}  {:<15}  {:<7}  {:>10}  {:>14}  {:>10}  {:>10}  {:>10}  {:>11}{rows}",
            "stage",
            "device",
            "layers",
            "weights",
            format!("KV@{sequences}x{context}"),
            "working",
            "total",
            "free",
            "1 row",
        )?;
        for (index, stage) in self.stages.iter().enumerate() {
            writeln!(
                f,
                "{index:<5}  {:<15}  {:<7}  {:>10}  {:>14}  {:>10}  {:>10}  {:>10}  {}",
                stage.spec.to_string(),
                format!("{}-{}", stage.placement.layers.start, stage.placement.layers.end - 1),
                human_bytes(stage.bytes.weights),
                human_bytes(stage.bytes.kv),
                human_bytes(stage.bytes.working),
                human_bytes(stage.bytes.total()),
                human_bytes(stage.free_bytes),
                times(one.stages[index], all.stages[index]),
            )?;
        }
        writeln!(f, "1 sequence: {:.1} tokens/s, {} a token", one.tokens_per_second(), ms(one.seconds()))?;
        if several {
            writeln!(
                f,
                "{sequences} sequences: {:.1} tokens/s, {} a token of each, {} in flight of {} rows",
                all.tokens_per_second(),
                ms(all.seconds()),
                all.micro_batches,
                all.rows
            )?;
        }
        writeln!(f, "long prompts: {prompt_tokens_per_second:.0} tokens/s")?;
        let round = match self.objective {
            Objective::Latency => one,
            Objective::Throughput => all,
        };
        writeln!(f, "bottleneck: {}", self.bottleneck(round))?;
        if !self.left_out.is_empty() {
            write!(f, "left out: {}", comma(&self.left_out))?;
            let round = |prediction: &Prediction| match self.objective {
                Objective::Latency => prediction.one.tokens_per_second(),
                Objective::Throughput => prediction.all.tokens_per_second(),
            };
            match &self.with_all_devices {
                Some(with_all) => {
                    let (fewer, all) = (round(&self.prediction), round(with_all));
                    writeln!(f, "; fewer devices are faster here: {fewer:.1} tokens/s, with all {all:.1}")?;
                }
                None if self.left_out.iter().all(|spec| self.stages.iter().any(|stage| stage.spec == *spec)) => {
                    writeln!(f, "; two stages on one processor take turns")?;
                }
                None => writeln!(f, "; no cut over all devices fits")?,
            }
        }
        Ok(())
    }
}

impl Plan {
    /// The stage or link that is busiest in a round, and for how much of it; the rest is waiting.
    fn bottleneck(&self, round: &Round) -> String {
        let busiest = |seconds: &[f64]| {
            let indexed = seconds.iter().copied().enumerate();
            indexed.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 0.0))
        };
        let (stage, seconds) = busiest(&round.stages);
        let (link, wire) = busiest(&round.links);
        let latency = round.trip - round.stages.iter().chain(&round.links).sum::<f64>();
        let percent = |seconds: f64| format!("busy {:.0} % of the time", round.busy_share(seconds) * 100.0);
        if latency > seconds.max(wire) {
            format!("the links' latency, {:.3} ms a micro-batch", latency * 1e3)
        } else if wire > seconds {
            format!("the link from stage {link} to {}, {}", link + 1, percent(wire))
        } else {
            format!("stage {stage} ({}), {}", self.stages[stage].spec, percent(seconds))
        }
    }
}
