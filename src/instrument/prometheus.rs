//! The figures in Prometheus' text format, version 0.0.4. Serve what [`render`] gives with [`CONTENT_TYPE`], or write it to a
//! file for node_exporter's textfile collector.
//!
//! Times are in seconds and memory is in bytes, as Prometheus advises; names begin with `candle_pipeline_`. Counters begin
//! anew when another model is opened, which Prometheus takes for a restart.

use std::fmt::{Display, Write};

use super::metrics::{Distribution, Snapshot, StageFigures, StageFootprint};

/// What HTTP is to call it.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The text.
pub fn render(snapshot: &Snapshot) -> String {
    let mut text = Text::default();
    let Snapshot { requests, tokens, kv, memory, .. } = snapshot;
    text.histogram("time_to_first_token_seconds", "From submission to the first token.", &tokens.ttft);
    text.histogram("inter_token_seconds", "From one token to the next of a request.", &tokens.inter_token);

    text.gauge("requests_waiting", "Requests that wait for admission.", requests.waiting);
    text.gauge("requests_running", "Requests that are running.", requests.running);
    text.counter("requests_received_total", "Requests that came to the scheduler.", requests.received);
    let outcomes = requests.finished.iter().map(|(outcome, count)| (vec![("outcome", *outcome)], *count));
    text.family("requests_finished_total", Kind::Counter, "Requests that ended, by how.", outcomes);
    let errors = requests.errors.iter().map(|(kind, count)| (vec![("kind", *kind)], *count));
    text.family("request_errors_total", Kind::Counter, "Requests that ended in an error, by its kind.", errors);
    let cancelled = requests.finished.get("cancelled").copied().unwrap_or(0);
    text.counter("requests_cancelled_total", "Requests whose stream was dropped.", cancelled);

    text.counter("tokens_generated_total", "Tokens generated.", tokens.generated);
    text.counter("prompt_tokens_total", "Tokens in prompts that were admitted.", tokens.prompt);
    text.counter("prompt_tokens_computed_total", "Prompt tokens that were computed.", tokens.prefilled);
    text.counter("prompt_tokens_reused_total", "Prompt tokens taken over from other requests.", tokens.reused);
    text.counter("prefix_lookups_total", "Requests that might have reused a prefix.", kv.lookups);
    text.counter("prefix_hits_total", "Requests that reused a prefix.", tokens.prefix_hits);
    text.counter("prefix_evictions_total", "Kept sequences that made way.", kv.evictions);

    let footprints = |of: fn(&StageFootprint) -> u64| {
        let stages = memory.stages.iter().enumerate();
        stages.map(move |(index, stage)| (snapshot.stage_labels(index), of(stage)))
    };
    text.gauges("kv_reserved_bytes", "KV set aside.", footprints(|stage| stage.kv_reserved.current));
    text.gauges("kv_used_bytes", "KV of computed positions.", footprints(|stage| stage.kv_used.current));
    text.gauges("kv_limit_bytes", "KV that there may be.", footprints(|stage| stage.kv_limit));
    text.gauges("weight_bytes", "Weights held.", footprints(|stage| stage.weights.current));
    text.gauges("scratch_bytes", "Buffers of forward passes.", footprints(|stage| stage.scratch.current));
    text.gauge("process_resident_bytes", "Memory of the process.", memory.host.process.current);

    let stages = |of: fn(&StageFigures) -> f64| {
        let stages = snapshot.stages.iter().enumerate();
        stages.map(move |(index, stage)| (snapshot.stage_labels(index), of(stage)))
    };
    text.counters("stage_busy_seconds_total", "Time that a stage computed.", stages(|stage| stage.compute));
    text.counters(
        "stage_wait_seconds_total",
        "Time that a stage waited while there was work.",
        stages(|stage| stage.wait),
    );
    text.counters("stage_copy_seconds_total", "Time that a stage copied its output.", stages(|stage| stage.copy));
    text.counters("stage_queue_seconds_total", "Time that steps waited for a stage.", stages(|stage| stage.queued));
    text.counters("stage_steps_total", "Micro-batches computed.", stages(|stage| stage.steps as f64));
    text.counters("stage_rows_total", "Rows computed.", stages(|stage| stage.rows as f64));
    text.counters("stage_sent_bytes_total", "Activations handed on.", stages(|stage| stage.transfer_bytes as f64));
    text.gauges(
        "stage_read_bytes_per_second",
        "Bytes that the latest decode steps read over their time.",
        stages(|stage| stage.bandwidth.bytes_per_second),
    );
    let measured =
        snapshot.stages.iter().enumerate().filter_map(|(index, stage)| {
            Some((snapshot.stage_labels(index), stage.bandwidth.device_bytes_per_second?))
        });
    text.gauges("device_read_bytes_per_second", "Bytes that a stage's device can read.", measured);
    text.counter("dropped_events_total", "Events that a full queue did not take.", snapshot.dropped_events);
    text.0
}

impl Snapshot {
    fn stage_labels(&self, stage: usize) -> Vec<(&'static str, String)> {
        let device = self.stages.get(stage).map_or_else(String::new, |figures| figures.device.clone());
        vec![("stage", stage.to_string()), ("device", device)]
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let _ = writeln!(self.0, "# HELP candle_pipeline_{name} {help}");
        let _ = writeln!(self.0, "# TYPE candle_pipeline_{name} {kind}");
    }

    fn sample<L: AsRef<str>>(&mut self, name: &str, labels: &[(&str, L)], value: impl Display) {
        let labels = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value.as_ref())));
        let labels: Vec<String> = labels.collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "candle_pipeline_{name}{labels} {value}");
    }

    /// All samples of a name. One that has none is not told of.
    fn family<L: AsRef<str>, V: Display>(
        &mut self,
        name: &str,
        kind: Kind,
        help: &str,
        samples: impl Iterator<Item = (Vec<(&'static str, L)>, V)>,
    ) {
        let mut samples = samples.peekable();
        if samples.peek().is_some() {
            self.head(name, kind, help);
        }
        for (labels, value) in samples {
            self.sample(name, &labels, value);
        }
    }

    fn gauges<L: AsRef<str>, V: Display>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl Iterator<Item = (Vec<(&'static str, L)>, V)>,
    ) {
        self.family(name, Kind::Gauge, help, samples);
    }

    fn counters<L: AsRef<str>, V: Display>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl Iterator<Item = (Vec<(&'static str, L)>, V)>,
    ) {
        self.family(name, Kind::Counter, help, samples);
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.gauges::<&str, _>(name, help, std::iter::once((Vec::new(), value)));
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.counters::<&str, _>(name, help, std::iter::once((Vec::new(), value)));
    }

    fn histogram(&mut self, name: &str, help: &str, times: &Distribution) {
        self.head(name, Kind::Histogram, help);
        let bucket = format!("{name}_bucket");
        for (bound, count) in &times.buckets {
            self.sample(&bucket, &[("le", bound.to_string())], count);
        }
        self.sample(&bucket, &[("le", "+Inf")], times.count);
        self.sample::<&str>(&format!("{name}_sum"), &[], times.sum);
        self.sample::<&str>(&format!("{name}_count"), &[], times.count);
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use super::*;
    use crate::instrument::metrics::{Memory, Requests, Tokens};

    /// Samples by name and labels as they stand there, and the kind of each family. Follows the format's description to the
    /// letter and shares nothing with the code that writes it.
    struct Parsed {
        samples: BTreeMap<(String, Vec<(String, String)>), f64>,
        kinds: BTreeMap<String, String>,
    }

    fn is_name(text: &str, colons: bool) -> bool {
        let fits = |c: char| c.is_ascii_alphabetic() || c == '_' || (colons && c == ':');
        text.starts_with(fits) && text.chars().all(|c| fits(c) || c.is_ascii_digit())
    }

    fn parse(text: &str) -> Result<Parsed, String> {
        let mut parsed = Parsed { samples: BTreeMap::new(), kinds: BTreeMap::new() };
        let (mut helped, mut current) = (HashSet::new(), String::new());
        if !text.ends_with('\n') {
            return Err("the last line has no end".into());
        }
        for line in text.lines() {
            let wrong = |why: &str| Err(format!("{why}: {line}"));
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let Some((name, _)) = rest.split_once(' ') else { return wrong("no help") };
                if !is_name(name, true) || !helped.insert(name.to_string()) {
                    return wrong("a wrong name or a second HELP");
                }
                continue;
            }
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let Some((name, kind)) = rest.split_once(' ') else { return wrong("no type") };
                if !["counter", "gauge", "histogram"].contains(&kind) || !helped.contains(name) {
                    return wrong("an unknown type, or no HELP before it");
                }
                current = name.to_string();
                if parsed.kinds.insert(name.to_string(), kind.to_string()).is_some() {
                    return wrong("a second TYPE");
                }
                continue;
            }
            let end = line.find(['{', ' ']).ok_or(format!("no value: {line}"))?;
            let (name, mut rest) = line.split_at(end);
            let mut labels = Vec::new();
            if let Some(list) = rest.strip_prefix('{') {
                let mut list = list;
                loop {
                    let Some((label, quoted)) = list.split_once("=\"") else { return wrong("no label") };
                    let (mut value, mut chars) = (String::new(), quoted.char_indices());
                    let end = loop {
                        match chars.next() {
                            Some((at, '"')) => break at,
                            Some((_, '\\')) => match chars.next() {
                                Some((_, 'n')) => value.push('\n'),
                                Some((_, c @ ('\\' | '"'))) => value.push(c),
                                _ => return wrong("an escape that there is not"),
                            },
                            Some((_, c)) => value.push(c),
                            None => return wrong("a label without an end"),
                        }
                    };
                    if !is_name(label, false) {
                        return wrong("no name of a label");
                    }
                    labels.push((label.to_string(), value));
                    list = &quoted[end + 1..];
                    match (list.strip_prefix(','), list.strip_prefix('}')) {
                        (Some(more), _) => list = more,
                        (_, Some(after)) => {
                            rest = after;
                            break;
                        }
                        _ => return wrong("labels without an end"),
                    }
                }
            }
            let Some(value) = rest.strip_prefix(' ') else { return wrong("no blank before the value") };
            let value: f64 = value.parse().map_err(|_| format!("no number: {line}"))?;
            let family = match parsed.kinds.get(&current).map(String::as_str) {
                Some("histogram") => ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)),
                _ => Some(name),
            };
            if !is_name(name, true) || family != Some(&current) {
                return wrong("not of the family above");
            }
            if parsed.samples.insert((name.to_string(), labels), value).is_some() {
                return wrong("twice");
            }
        }
        Ok(parsed)
    }

    fn filled() -> Snapshot {
        let times = Distribution {
            count: 7,
            sum: 1.25,
            buckets: vec![(0.001, 0), (0.25, 4), (10.0, 6)],
            ..Distribution::default()
        };
        Snapshot {
            stages: vec![
                StageFigures { device: "cpu@threads=2".into(), compute: 1.5, wait: 0.25, ..StageFigures::default() },
                StageFigures { device: "a \"b\"\\\nc".into(), copy: 1e-9, ..StageFigures::default() },
            ],
            memory: Memory {
                stages: vec![StageFootprint { kv_limit: 9, ..StageFootprint::default() }; 2],
                ..Memory::default()
            },
            requests: Requests {
                waiting: 3,
                finished: BTreeMap::from([("cancelled", 2), ("stop", 0)]),
                errors: BTreeMap::from([("stage_failed", 1)]),
                ..Requests::default()
            },
            tokens: Tokens { ttft: times.clone(), inter_token: times, generated: u64::MAX, ..Tokens::default() },
            dropped_events: 4,
            ..Snapshot::default()
        }
    }

    #[test]
    fn the_text_is_what_the_format_asks_for_and_has_the_figures() {
        let text = render(&filled());
        let Parsed { samples, kinds } = parse(&text).unwrap_or_else(|why| panic!("{why}\n{text}"));
        let value = |name: &str, labels: &[(&str, &str)]| {
            let labels = labels.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
            *samples.get(&(format!("candle_pipeline_{name}"), labels)).unwrap_or_else(|| panic!("{name}\n{text}"))
        };
        assert_eq!(value("requests_waiting", &[]), 3.0);
        assert_eq!(value("requests_finished_total", &[("outcome", "stop")]), 0.0);
        assert_eq!(value("requests_cancelled_total", &[]), 2.0);
        assert_eq!(value("request_errors_total", &[("kind", "stage_failed")]), 1.0);
        assert_eq!(value("stage_busy_seconds_total", &[("stage", "0"), ("device", "cpu@threads=2")]), 1.5);
        assert_eq!(value("stage_copy_seconds_total", &[("stage", "1"), ("device", "a \"b\"\\\nc")]), 1e-9);
        assert_eq!(value("kv_limit_bytes", &[("stage", "0"), ("device", "cpu@threads=2")]), 9.0);
        assert_eq!(value("tokens_generated_total", &[]), u64::MAX as f64);
        assert_eq!(value("dropped_events_total", &[]), 4.0);
        for name in ["time_to_first_token_seconds", "inter_token_seconds"] {
            assert_eq!(kinds[&format!("candle_pipeline_{name}")], "histogram");
            let bucket = |bound| value(&format!("{name}_bucket"), &[("le", bound)]);
            assert_eq!([bucket("0.001"), bucket("0.25"), bucket("10"), bucket("+Inf")], [0.0, 4.0, 6.0, 7.0]);
            assert_eq!((value(&format!("{name}_sum"), &[]), value(&format!("{name}_count"), &[])), (1.25, 7.0));
        }
        let totals = kinds.iter().filter(|(name, _)| name.ends_with("_total"));
        assert!(totals.clone().count() > 10 && totals.into_iter().all(|(_, kind)| kind == "counter"));
        assert!(!text.contains("device_read_bytes_per_second"), "what was not measured is not told");
    }

    #[test]
    fn the_parser_of_the_test_refuses_what_is_wrong() {
        let head = "# HELP a b\n# TYPE a counter\n";
        for (wrong, line) in [
            ("no value", "a\n"),
            ("another family", "b 1\n"),
            ("no end", "a{x=\"y} 1\n"),
            ("a wrong escape", "a{x=\"\\q\"} 1\n"),
            ("no number", "a 1s\n"),
            ("twice", "a 1\na 2\n"),
            ("no end of line", "a 1"),
            ("a family in two places", "a 1\n# HELP a b\n"),
        ] {
            assert!(parse(&format!("{head}{line}")).is_err(), "{wrong}");
        }
        assert!(parse(&format!("{head}a{{x=\"\"}} 1\n")).is_ok());
    }

    #[test]
    fn nothing_to_tell_is_still_text_that_parses() {
        assert!(parse(&render(&Snapshot::default())).is_ok());
    }
}
