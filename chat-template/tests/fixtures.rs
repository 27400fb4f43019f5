//! Renderings that Python made, from `tools/reference.py` and `tools/fuzz.py`.

use candle_pipeline_template::{Limits, Template};
use serde_json::Value;

/// Renders every case of a fixture and compares texts; what Python refuses is refused.
fn check(fixture: &str, at_least: usize) {
    let fixture: Value = serde_json::from_str(fixture).unwrap();
    let variables = fixture["variables"].as_object().unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() >= at_least, "{}", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        let source = case["template"].as_str().unwrap();
        let rendered = Template::compile(source, &Limits::default()).and_then(|template| template.render(variables));
        let right = match (&rendered, case["ok"].as_str()) {
            (Ok(text), Some(expected)) => text == expected,
            (Err(_), None) => true,
            _ => false,
        };
        if !right {
            wrong.push(format!("{source:?}\n  gives {rendered:?}\n  not   {}", case["ok"]));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn expressions_and_statements_give_what_python_gives() {
    check(include_str!("cases.json"), 700);
}

#[test]
fn random_templates_give_what_python_gives() {
    check(include_str!("fuzz.json"), 500);
}
