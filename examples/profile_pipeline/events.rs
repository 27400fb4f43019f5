//! What the events of some requests say: where the time to the first token went, and what the stages did with theirs.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use candle_pipeline::instrument::{Collector, Event, ModelFacts, Record};

/// Keeps the events that a profile is made of. They are those that cost nothing where they happen.
#[derive(Default)]
pub struct Log {
    records: Mutex<Vec<Arc<Record>>>,
    facts: OnceLock<Arc<ModelFacts>>,
}

impl Collector for Log {
    fn record(&self, record: &Arc<Record>) {
        match &record.event {
            Event::ModelOpened(facts) => {
                let _ = self.facts.set(facts.clone()); // there is one model
            }
            Event::RequestQueued { .. } | Event::StepSent { .. } | Event::StageStep { .. } | Event::Sampled { .. } => {
                self.records.lock().unwrap_or_else(PoisonError::into_inner).push(record.clone());
            }
            _ => {}
        }
    }
}

impl Log {
    /// What was told since it was asked last. A request's events are there once its stream has ended.
    pub fn take(&self) -> Vec<Arc<Record>> {
        std::mem::take(&mut *self.records.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The model on its stages; nothing before it was loaded.
    pub fn facts(&self) -> Arc<ModelFacts> {
        self.facts.get().cloned().unwrap_or_default()
    }
}

/// The way to a first token. What the caller sees is longer by the way from the scheduler to its task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FirstToken {
    /// From the submission until rows of the prompt were sent to the first stage.
    pub queue: Duration,
    /// From there until the last rows of the prompt came out of the last stage.
    pub prefill: Duration,
    /// From there until the token was chosen and handed over.
    pub sample: Duration,
}

/// One micro-batch in one stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The stage.
    pub stage: usize,
    /// Number of the step.
    pub step: u64,
    /// Whether rows of prompts are in it.
    pub prefill: bool,
    /// When the stage began to compute.
    pub from: Instant,
    /// When it was done.
    pub until: Instant,
}

/// What one stage did in the steps that only decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DecodeAccount {
    /// Steps.
    pub steps: u64,
    /// Rows in them: tokens.
    pub rows: u64,
    /// Time it computed.
    pub compute: Duration,
    /// Time it waited while there was work elsewhere: bubbles.
    pub wait: Duration,
    /// Time it copied.
    pub copy: Duration,
    /// Time that steps waited for it.
    pub queued: Duration,
    /// Bytes that it must have read: its weights once a step, and the keys and values of all positions of each row.
    pub bytes: u64,
}

impl DecodeAccount {
    /// The two together.
    pub fn and(self, other: DecodeAccount) -> DecodeAccount {
        DecodeAccount {
            steps: self.steps + other.steps,
            rows: self.rows + other.rows,
            compute: self.compute + other.compute,
            wait: self.wait + other.wait,
            copy: self.copy + other.copy,
            queued: self.queued + other.queued,
            bytes: self.bytes + other.bytes,
        }
    }

    /// Bytes a second while it computed.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.compute.as_secs_f64().max(1e-9)
    }
}

/// What the events of some requests come to.
#[derive(Debug, Clone, Default)]
pub struct Account {
    /// By request, in the order of their submission.
    pub first_tokens: BTreeMap<u64, FirstToken>,
    /// By stage.
    pub decode: Vec<DecodeAccount>,
    /// In the order of their ends.
    pub spans: Vec<Span>,
}

impl Account {
    /// Puts together what was told of whole requests.
    pub fn of(records: &[Arc<Record>], facts: &ModelFacts) -> Account {
        let mut account = Account { decode: vec![DecodeAccount::default(); facts.stages.len()], ..Account::default() };
        let mut submissions = HashMap::new();
        let mut steps = HashMap::new();
        // When a request's first and last prompt rows were sent and came out.
        let (mut began, mut computed) = (HashMap::new(), HashMap::new());
        for record in records {
            match &record.event {
                Event::RequestQueued { request, submitted, .. } => {
                    submissions.insert(*request, *submitted);
                }
                Event::StepSent { step, slices } => {
                    for slice in slices.iter().filter(|slice| slice.prefill) {
                        began.entry(slice.request).or_insert(record.at);
                    }
                    steps.insert(*step, slices.clone());
                }
                Event::StageStep { stage, step, rows, queued, wait, compute, copy, .. } => {
                    let Some(slices) = steps.get(step) else { continue };
                    let until = record.at - *copy;
                    let prefill = slices.iter().any(|slice| slice.prefill);
                    account.spans.push(Span { stage: *stage, step: *step, prefill, from: until - *compute, until });
                    if stage + 1 == facts.stages.len() {
                        let prompts = slices.iter().filter(|slice| slice.prefill);
                        computed.extend(prompts.map(|slice| (slice.request, record.at)));
                    }
                    let (Some(decode), Some(facts), false) =
                        (account.decode.get_mut(*stage), facts.stages.get(*stage), prefill)
                    else {
                        continue;
                    };
                    let positions: usize = slices.iter().map(|slice| slice.position + slice.rows).sum();
                    *decode = decode.and(DecodeAccount {
                        steps: 1,
                        rows: *rows as u64,
                        compute: *compute,
                        wait: *wait,
                        copy: *copy,
                        queued: *queued,
                        bytes: facts.step_bytes + facts.kv_bytes_per_position * positions as u64,
                    });
                }
                Event::Sampled { request, index: 0, .. } => {
                    let times = (submissions.get(request), began.get(request), computed.get(request));
                    if let (Some(&submitted), Some(&began), Some(&computed)) = times {
                        let first = FirstToken {
                            queue: began.saturating_duration_since(submitted),
                            prefill: computed.saturating_duration_since(began),
                            sample: record.at.saturating_duration_since(computed),
                        };
                        account.first_tokens.insert(*request, first);
                    }
                }
                _ => {}
            }
        }
        account
    }
}

#[cfg(test)]
mod tests {
    use candle_pipeline::instrument::{StageFacts, StepSlice};

    use super::*;

    /// Two stages; a prompt in two chunks, the first token, and one decode step.
    #[test]
    fn the_way_to_the_first_token_and_the_decode_steps_are_taken_apart() {
        let began = Instant::now();
        let ms = Duration::from_millis;
        let log = Log::default();
        let tell = |at: u64, event: Event| log.record(&Arc::new(Record { at: began + ms(at), event }));
        let stage = StageFacts { step_bytes: 1000, kv_bytes_per_position: 10, ..StageFacts::default() };
        let facts = Arc::new(ModelFacts { stages: vec![stage.clone(), stage], ..ModelFacts::default() });
        tell(0, Event::ModelOpened(facts));
        tell(1, Event::RequestQueued { request: 5, submitted: began, prompt: vec![1; 6] });
        let sent = |step, position, rows, prefill| Event::StepSent {
            step,
            slices: vec![StepSlice { request: 5, position, rows, prefill }],
        };
        let computed = |stage, step, rows, compute, copy| Event::StageStep {
            stage,
            step,
            rows,
            queued: ms(1),
            wait: ms(2),
            compute: ms(compute),
            copy: ms(copy),
            bytes: 0,
        };
        tell(4, sent(0, 0, 4, true));
        tell(5, sent(1, 4, 2, true));
        tell(10, computed(0, 0, 4, 5, 1));
        tell(15, computed(0, 1, 2, 4, 1));
        tell(20, computed(1, 0, 4, 9, 0));
        tell(30, computed(1, 1, 2, 9, 0));
        tell(33, Event::Sampled { request: 5, token: 1, index: 0, since: ms(33), duration: ms(1) });
        tell(34, sent(2, 6, 1, false));
        tell(38, computed(0, 2, 1, 3, 1));
        tell(40, computed(1, 2, 1, 2, 0));
        tell(41, Event::Sampled { request: 5, token: 1, index: 1, since: ms(8), duration: ms(1) });

        let account = Account::of(&log.take(), &log.facts());
        assert!(log.take().is_empty());
        let first = FirstToken { queue: ms(4), prefill: ms(26), sample: ms(3) };
        assert_eq!(account.first_tokens, BTreeMap::from([(5, first)]));
        let decode = |compute, copy| DecodeAccount {
            steps: 1,
            rows: 1,
            compute: ms(compute),
            wait: ms(2),
            copy: ms(copy),
            queued: ms(1),
            bytes: 1070,
        };
        assert_eq!(account.decode, [decode(3, 1), decode(2, 0)]);
        assert_eq!(account.decode[1].rate(), 535_000.0);
        assert_eq!(account.spans.len(), 6);
        let first = Span { stage: 0, step: 0, prefill: true, from: began + ms(4), until: began + ms(9) };
        assert_eq!(account.spans[0], first);
        assert!(!account.spans[5].prefill);
    }
}
