//! The report as text.

use std::collections::BTreeMap;
use std::fmt;

use candle_pipeline::instrument::tracer::activation::Place;
use candle_pipeline::instrument::tracer::logit::LogitTrace;
use candle_pipeline::instrument::tracer::quant_error::QuantClass;
use candle_pipeline::pipeline::human_bytes;

use super::Report;

/// The report, with so many tokens of the lens and so many tensors.
pub struct Text<'a> {
    pub report: &'a Report,
    pub shown: usize,
    pub tensors: usize,
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { model, prompt, tokens, tokenizer, .. } = self.report;
        writeln!(f, "{model}: {} prompt tokens, {} generated", prompt.len(), tokens.len())?;
        let text = |tokens: &[u32]| tokenizer.as_ref()?.decode(tokens, false).ok();
        if let (Some(prompt), Some(generated)) = (text(prompt), text(tokens)) {
            writeln!(f, "{prompt:?} {generated:?}")?;
        }
        self.activations(f)?;
        self.attention(f)?;
        self.lens(f)?;
        self.kv(f)?;
        self.quantisation(f)?;
        title(f, "Summary")?;
        writeln!(f, "{}", self.report.trace.summary)?;
        self.missing(f)
    }
}

fn title(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    writeln!(f, "\n{text}\n{}", "-".repeat(text.chars().count()))
}

impl Text<'_> {
    /// A line for each place of each layer, and what is wrong.
    fn activations(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { layers, trace, .. } = self.report;
        let rows: usize = trace.forwards.iter().flat_map(|forward| &forward.slices).map(|slice| slice.rows).sum();
        title(f, &format!("Activations ({rows} rows in {} forward passes)", trace.forwards.len()))?;
        let mut wrong: BTreeMap<(usize, Place), (u64, String)> = BTreeMap::new();
        for anomaly in trace.forwards.iter().flat_map(|forward| &forward.anomalies) {
            let known = wrong.entry((anomaly.layer, anomaly.place)).or_insert_with(|| (0, anomaly.kind.name().into()));
            known.0 += 1;
            if !known.1.contains(anomaly.kind.name()) {
                known.1 = format!("{}, {}", known.1, anomaly.kind.name());
            }
        }
        writeln!(
            f,
            "layer  {:<14} {:>10} {:>10} {:>10} {:>10} {:>10} {:>9}  anomalies",
            "place", "mean", "std", "min", "max", "l2", "residual"
        )?;
        for layer in layers {
            for place in Place::ALL {
                let stats = place.of(layer);
                let residual = match place {
                    Place::Output => format!("{:.4}", layer.residual_ratio),
                    _ => String::new(),
                };
                let anomalies = wrong.get(&(layer.layer, place));
                let anomalies = anomalies.map_or(String::new(), |(count, kinds)| format!("{kinds} ({count})"));
                let line = format!(
                    "{:>5}  {:<14} {:>10.4} {:>10.4} {:>10.4} {:>10.4} {:>10.3} {residual:>9}  {anomalies}",
                    layer.layer,
                    place.name(),
                    stats.mean,
                    stats.std,
                    stats.min,
                    stats.max,
                    stats.l2,
                );
                writeln!(f, "{}", line.trim_end())?;
            }
        }
        match &trace.first_anomaly {
            Some(first) => writeln!(f, "first anomaly, in step {}: {}", first.step, first.anomaly),
            None => writeln!(f, "no anomalies"),
        }
    }

    /// A line for each layer.
    fn attention(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let traces: usize = self.report.attention.iter().map(|layer| layer.traces).sum();
        title(f, &format!("Attention ({traces} rows of heads; entropies in nats, shares as means over rows)"))?;
        writeln!(
            f,
            "layer  {:>16} {:>20} {:>13} {:>8} {:>7} {:>8} {:>7}",
            "most sink", "least entropy", "mean entropy", "recency", "sinks", "uniform", "recent"
        )?;
        for layer in &self.report.attention {
            writeln!(
                f,
                "{:>5}  {:>16} {:>20} {:>13.3} {:>7.1}% {:>6.0}% {:>7.0}% {:>6.0}%",
                layer.layer,
                format!("head {} {:.1}%", layer.most_sink.0, 100.0 * layer.most_sink.1),
                format!("head {} {:.3}", layer.least_entropy.0, layer.least_entropy.1),
                layer.mean_entropy,
                100.0 * layer.recency,
                100.0 * layer.sinks,
                100.0 * layer.uniform,
                100.0 * layer.recent,
            )?;
        }
        Ok(())
    }

    /// A table for each of the first generated tokens, and the decisive layers of all.
    fn lens(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let traces: Vec<&LogitTrace> = self.report.trace.forwards.iter().flat_map(|forward| &forward.logits).collect();
        title(f, &format!("Logit lens ({} tokens, {} shown)", traces.len(), self.shown.min(traces.len())))?;
        for trace in traces.iter().take(self.shown) {
            self.lens_of(f, trace)?;
        }
        let mut decisive: BTreeMap<Option<usize>, usize> = BTreeMap::new();
        for trace in &traces {
            *decisive.entry(trace.decisive_layer().map(|decisive| decisive.layer)).or_default() += 1;
        }
        let name = |layer: &Option<usize>| layer.map_or("none".into(), |layer| format!("layer {layer}"));
        let all: Vec<String> = decisive.iter().map(|(layer, count)| format!("{} {count}x", name(layer))).collect();
        writeln!(f, "decisive layers of all tokens: {}", all.join(", "))
    }

    fn lens_of(&self, f: &mut fmt::Formatter<'_>, trace: &LogitTrace) -> fmt::Result {
        let token = |token| self.report.token(token);
        let favourite = trace.layers.last().and_then(|last| Some(last.top.first()?.0));
        let Some(said) = trace.chosen.or(favourite) else { return Ok(()) };
        let decisive = match trace.decisive_layer() {
            Some(found) => {
                format!("layer {}: {} from rank {} to {}", found.layer, token(found.token), found.from, found.to)
            }
            None => "none, its rank never changes".into(),
        };
        writeln!(f, "position {}, then {}; decisive: {decisive}", trace.position, token(said))?;
        writeln!(f, "  layer  {:<16} {:>8}  {:>9}  next", "on top", "logit", "rank")?;
        for (layer, (_, rank)) in trace.layers.iter().zip(trace.ranks(said)) {
            let (first, logit) = layer.top.first().copied().unwrap_or_default();
            let rank = rank.map_or("-".into(), |rank| rank.to_string());
            let others: Vec<String> = layer.top.iter().skip(1).take(3).map(|(other, _)| token(*other)).collect();
            let mark = match trace.decisive_layer() {
                Some(found) if found.layer == layer.layer => "*",
                _ => " ",
            };
            writeln!(
                f,
                "{mark} {:>5}  {:<16} {logit:>8.3}  {rank:>9}  {}",
                layer.layer,
                token(first),
                others.join(" ")
            )?;
        }
        writeln!(f)
    }

    fn kv(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        title(f, "KV cache")?;
        let Some(last) = self.report.trace.kv.last() else { return writeln!(f, "nothing was told") };
        let during = self.report.trace.kv.iter().map(|kv| kv.fragmentation);
        writeln!(f, "set aside      {} positions ({})", last.size_positions, human_bytes(last.size_bytes))?;
        writeln!(f, "valid          {} positions of at most {}", last.valid_positions, last.max_positions)?;
        writeln!(f, "peak           {} positions", last.peak_positions)?;
        writeln!(
            f,
            "fragmentation  {:.1} % at the end, {:.1} % at most",
            100.0 * last.fragmentation,
            100.0 * during.fold(0.0, f64::max)
        )?;
        writeln!(f, "evictions      {}", last.evictions)?;
        writeln!(f, "hit rate       {:.1} %", 100.0 * last.hit_rate)
    }

    /// The worst tensors, and the logits.
    fn quantisation(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { reference: Some(reference), trace, logits, .. } = self.report else { return Ok(()) };
        let errors = &trace.quant_errors;
        title(f, &format!("Quantisation, against {reference}"))?;
        let (outputs, tensors): (Vec<_>, Vec<_>) = errors.iter().partition(|error| error.dtype.is_empty());
        let count = |class| tensors.iter().filter(|error| error.class == class).count();
        writeln!(
            f,
            "{} tensors: {} acceptable, {} warnings, {} critical",
            tensors.len(),
            count(QuantClass::Acceptable),
            count(QuantClass::Warning),
            count(QuantClass::Critical)
        )?;
        writeln!(
            f,
            "{:<32} {:<5} {:>10} {:>8} {:>10} {:>10}  class",
            "worst first", "type", "cosine", "SNR dB", "MSE", "greatest"
        )?;
        for error in tensors.iter().take(self.tensors).chain(&outputs) {
            writeln!(
                f,
                "{:<32} {:<5} {:>10.7} {:>8.2} {:>10.3e} {:>10.3e}  {}",
                error.name,
                error.dtype,
                error.cosine,
                error.snr_db,
                error.mse,
                error.max_error,
                error.class.name()
            )?;
        }
        let Some(logits) = logits else { return Ok(()) };
        writeln!(
            f,
            "KL of the logits over {} positions: mean {:.3e} nats, greatest {:.3e} at position {}; {:.1} % same favourite",
            logits.positions,
            logits.kl_mean,
            logits.kl_max,
            logits.kl_max_position,
            100.0 * logits.agreement
        )
    }

    /// What the report is without.
    fn missing(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let trace = &self.report.trace;
        for (count, what) in [
            (trace.evicted_forwards, "forward passes made way for later ones: raise --max-bytes"),
            (trace.refused_traces, "traces had no room: raise --max-bytes"),
            (trace.dropped_events, "events did not fit into the queue: trace fewer heads or layers"),
        ] {
            if count > 0 {
                writeln!(f, "missing: {count} {what}")?;
            }
        }
        Ok(())
    }
}
