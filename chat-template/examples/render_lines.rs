//! Renders templates from standard input, for comparison with other engines: one JSON object a line with `template` and
//! `variables` in, one with `ok` or `error` out.

use std::io::{BufRead, Write};

use candle_pipeline_template::{Limits, Template};
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut out = std::io::stdout().lock();
    let mut last: Option<(String, Result<Template, candle_pipeline_template::Error>)> = None;
    for line in std::io::stdin().lock().lines() {
        let task: Value = serde_json::from_str(&line?)?;
        let source = task["template"].as_str().unwrap_or_default();
        if last.as_ref().is_none_or(|(template, _)| template != source) {
            last = Some((source.to_owned(), Template::compile(source, &Limits::default())));
        }
        let empty = serde_json::Map::new();
        let variables = task["variables"].as_object().unwrap_or(&empty);
        let result = match &last {
            Some((_, Ok(template))) => template.render(variables).map_err(|error| error.to_string()),
            Some((_, Err(error))) => Err(format!("does not compile: {error}")),
            None => continue,
        };
        let answer = match result {
            Ok(text) => json!({"ok": text}),
            Err(error) => json!({"error": error}),
        };
        writeln!(out, "{answer}")?;
    }
    Ok(())
}
