//! The lines of a session log: what `docs/session-log.schema.json` says, as types.

use std::time::Duration;

use serde::Serialize;

use crate::instrument::{
    KvState, LayerActivations, ModelFacts, Outcome, StepOutcome, TensorFacts, TensorStats, micros,
};

/// Version of the schema. It is raised when a field changes its meaning or goes; fields may be added within one.
pub const SCHEMA_VERSION: u32 = 1;

/// Stages that are listed; a line is to fit a page of a file.
const MOST_STAGES: usize = 24;

/// What a line says beside its event, time and session.
#[derive(Serialize)]
#[serde(untagged)]
pub enum Body<'a> {
    SessionStart {
        schema_version: u32,
        crate_version: &'a str,
        level: &'a str,
        part: u64,
        model_arch: &'a str,
        n_layer: usize,
        n_embd: usize,
        vocab_size: usize,
        context_length: usize,
        kv_positions: usize,
        n_tensors: usize,
        n_stages: usize,
        stages: Vec<Stage<'a>>,
    },
    SessionEnd {
        requests: u64,
        steps: u64,
        steps_told: u64,
        duration_us: f64,
    },
    TensorLog(&'a TensorFacts),
    RequestStart {
        request: u64,
        prompt_tokens: usize,
    },
    Prompt {
        request: u64,
        first: usize,
        tokens: &'a [u32],
    },
    Text {
        request: u64,
        of: &'a str,
        part: usize,
        text: &'a str,
    },
    RequestAdmitted {
        request: u64,
        queued_us: f64,
    },
    PrefixReused {
        request: u64,
        tokens: usize,
    },
    Token {
        request: u64,
        token: u32,
        index: usize,
        since_us: f64,
        duration_us: f64,
    },
    RequestEnd {
        request: u64,
        tokens: usize,
        outcome: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        ttft_us: Option<f64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        duration_us: Option<f64>,
    },
    StepBegin(Step<'a>),
    StepRows {
        step_id: u64,
        request: u64,
        position: usize,
        rows: usize,
        prefill: bool,
    },
    StepEnd {
        #[serde(flatten)]
        step: Step<'a>,
        duration_us: f64,
        duration_ms: f64,
        #[serde(skip_serializing_if = "Option::is_none")]
        outcome: Option<StepOutcome>,
        #[serde(flatten)]
        account: Option<Account>,
    },
    TensorStats {
        step_id: u64,
        stage: usize,
        layer: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        request: Option<u64>,
        name: &'a str,
        rows: usize,
        #[serde(flatten)]
        stats: Stats,
        #[serde(skip_serializing_if = "Option::is_none")]
        residual_ratio: Option<f64>,
    },
    StageMemory {
        stage: usize,
        weight_bytes: u64,
        kv_bytes: u64,
        scratch_bytes: u64,
    },
    KvState(KvState),
    Dropped {
        reason: &'a str,
        count: u64,
    },
    Padding {},
}

/// A stage in a session's first line.
#[derive(Serialize)]
pub struct Stage<'a> {
    stage: usize,
    device: &'a str,
    first_layer: usize,
    layers: usize,
    weight_bytes: u64,
    kv_bytes_per_position: u64,
    kv_budget: u64,
}

/// What names a step, at its beginning and at its end.
#[derive(Serialize, Clone, Copy)]
pub struct Step<'a> {
    pub step_id: u64,
    pub step_name: &'a str,
    pub step_type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rows: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<u64>,
}

/// Where a stage's time with a micro-batch went.
#[derive(Serialize)]
pub struct Account {
    pub queued_us: f64,
    pub wait_us: f64,
    pub compute_us: f64,
    pub copy_us: f64,
    pub transfer_bytes: u64,
}

/// [`TensorStats`] with the number of values by the name that weights have for it.
#[derive(Serialize)]
pub struct Stats {
    element_count: u64,
    min: f32,
    max: f32,
    mean: f64,
    std: f64,
    l2: f64,
    nan_count: u64,
    inf_count: u64,
}

impl From<TensorStats> for Stats {
    fn from(stats: TensorStats) -> Stats {
        let TensorStats { count: element_count, min, max, mean, std, l2, nan_count, inf_count } = stats;
        Stats { element_count, min, max, mean, std, l2, nan_count, inf_count }
    }
}

impl<'a> Body<'a> {
    pub fn session_start(facts: &'a ModelFacts, level: &'a str, part: u64) -> Body<'a> {
        let stages = facts.stages.iter().enumerate().take(MOST_STAGES).map(|(stage, facts)| Stage {
            stage,
            device: &facts.device,
            first_layer: facts.first_layer,
            layers: facts.layers,
            weight_bytes: facts.weight_bytes,
            kv_bytes_per_position: facts.kv_bytes_per_position,
            kv_budget: facts.kv_budget,
        });
        Body::SessionStart {
            schema_version: SCHEMA_VERSION,
            crate_version: env!("CARGO_PKG_VERSION"),
            level,
            part,
            model_arch: &facts.architecture,
            n_layer: facts.n_layer,
            n_embd: facts.n_embd,
            vocab_size: facts.vocab_size,
            context_length: facts.context_length,
            kv_positions: facts.kv_positions,
            n_tensors: facts.tensors.len(),
            n_stages: facts.stages.len(),
            stages: stages.collect(),
        }
    }

    pub fn step_end(step: Step<'a>, duration: Duration) -> Body<'a> {
        let duration_ms = duration.as_nanos() as f64 / 1e6;
        Body::StepEnd { step, duration_us: micros(duration), duration_ms, outcome: None, account: None }
    }

    pub fn request_end(
        request: u64,
        tokens: usize,
        outcome: Outcome,
        ttft: Option<Duration>,
        duration: Option<Duration>,
    ) -> Body<'a> {
        let error = if let Outcome::Error(kind) = outcome { Some(kind) } else { None };
        let (ttft_us, duration_us) = (ttft.map(micros), duration.map(micros));
        Body::RequestEnd { request, tokens, outcome: outcome.name(), error, ttft_us, duration_us }
    }

    /// The line's event.
    pub fn event(&self) -> &'static str {
        match self {
            Body::SessionStart { .. } => "session_start",
            Body::SessionEnd { .. } => "session_end",
            Body::TensorLog(_) => "tensor_log",
            Body::RequestStart { .. } => "request_start",
            Body::Prompt { .. } => "prompt",
            Body::Text { .. } => "text",
            Body::RequestAdmitted { .. } => "request_admitted",
            Body::PrefixReused { .. } => "prefix_reused",
            Body::Token { .. } => "token",
            Body::RequestEnd { .. } => "request_end",
            Body::StepBegin(_) => "step_begin",
            Body::StepRows { .. } => "step_rows",
            Body::StepEnd { .. } => "step_end",
            Body::TensorStats { .. } => "tensor_stats",
            Body::StageMemory { .. } => "stage_memory",
            Body::KvState(_) => "kv_state",
            Body::Dropped { .. } => "dropped",
            Body::Padding {} => "padding",
        }
    }

    /// The line, without its end.
    pub fn write(&self, session_id: &str, timestamp: &str, line: &mut Vec<u8>) {
        line.clear();
        let event = self.event();
        for text in [r#"{"event":""#, event, r#"","timestamp":""#, timestamp, r#"","session_id":""#, session_id, r#"""#]
        {
            line.extend_from_slice(text.as_bytes());
        }
        let body = line.len();
        // Numbers, texts and lists of them always can be written.
        let written = serde_json::to_writer(&mut *line, self);
        debug_assert!(written.is_ok(), "{written:?}");
        match line.get(body + 1) {
            Some(b'"') => line[body] = b',',
            _ => {
                line.truncate(body);
                line.push(b'}');
            }
        }
    }
}

/// The tensors that a layer's line of statistics may be of, and the name of each.
pub fn tensors_of(layer: &LayerActivations) -> [(&'static str, TensorStats); 5] {
    [
        ("input", layer.input),
        ("post_norm", layer.post_norm),
        ("post_attention", layer.post_attention),
        ("post_ffn", layer.post_ffn),
        ("output", layer.output),
    ]
}
