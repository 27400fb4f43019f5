//! What the dashboard knows and what keys do to it. Nothing here draws or waits.

use std::collections::{HashSet, VecDeque};

use candle_pipeline::instrument::metrics::{Snapshot, build_latency_rows, build_memory_rows};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

/// Bytes of text that are kept; what came before is cut off.
const MOST_TEXT: usize = 64 << 10;

/// Log lines that are kept.
const MOST_LOG: usize = 500;

/// What keys go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Focus {
    Prompt,
    Text,
    Latency,
    Memory,
    Log,
}

impl Focus {
    const ALL: [Focus; 5] = [Focus::Prompt, Focus::Text, Focus::Latency, Focus::Memory, Focus::Log];

    fn moved(self, places: usize) -> Focus {
        let place = Focus::ALL.iter().position(|focus| *focus == self).unwrap_or(0);
        Focus::ALL[(place + places) % Focus::ALL.len()]
    }
}

/// What a key asks of whoever runs the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Submit(String),
    Cancel,
    Quit,
}

/// A row of a tree, ready to be shown.
#[derive(Debug, Clone, PartialEq)]
pub struct TreeRow {
    pub label: String,
    pub level: usize,
    /// Two columns.
    pub values: [String; 2],
    /// The labels from the root to here: what the row is known by from one snapshot to the next.
    pub path: String,
    /// Whether there are rows below it.
    pub branches: bool,
}

/// Gives each row its path.
fn with_paths(rows: impl Iterator<Item = (String, usize, [String; 2])>) -> Vec<TreeRow> {
    let (mut parents, mut tree): (Vec<String>, Vec<TreeRow>) = Default::default();
    for (label, level, values) in rows {
        parents.truncate(level);
        parents.push(label.clone());
        if let Some(before) = tree.last_mut() {
            before.branches = before.level < level;
        }
        tree.push(TreeRow { label, level, values, path: parents.join("/"), branches: false });
    }
    tree
}

/// Times as `build_latency_rows` has them.
pub fn latency_tree(snapshot: &Snapshot) -> Vec<TreeRow> {
    let ms = |ms: f64| format!("{ms:.3}");
    let rows = build_latency_rows(snapshot).into_iter();
    with_paths(rows.map(|row| (row.label, row.level, [ms(row.last_ms), ms(row.average_ms)])))
}

/// Bytes as `build_memory_rows` has them.
pub fn memory_tree(snapshot: &Snapshot) -> Vec<TreeRow> {
    let rows = build_memory_rows(snapshot).into_iter();
    with_paths(rows.map(|row| (row.label, row.level, [bytes(row.current_bytes), bytes(row.peak_bytes)])))
}

/// Bytes in a unit that keeps them short.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Which branches are open, and which row is chosen.
#[derive(Debug)]
pub struct Tree {
    /// Rows of a smaller level are open unless they were closed.
    open_below: usize,
    /// Paths of the rows for which it is the other way round.
    turned: HashSet<String>,
    /// Path of the chosen row.
    chosen: String,
}

impl Tree {
    fn new(open_below: usize) -> Tree {
        Tree { open_below, turned: HashSet::new(), chosen: String::new() }
    }

    /// Whether the rows below it are shown.
    pub fn is_open(&self, row: &TreeRow) -> bool {
        (row.level < self.open_below) != self.turned.contains(&row.path)
    }

    /// The rows that closed branches do not hide.
    pub fn shown<'a>(&self, rows: &'a [TreeRow]) -> Vec<&'a TreeRow> {
        let mut hidden_from = usize::MAX;
        let shown = rows.iter().filter(|row| {
            if row.level > hidden_from {
                return false;
            }
            hidden_from = if row.branches && !self.is_open(row) { row.level } else { usize::MAX };
            true
        });
        shown.collect()
    }

    /// The chosen one of the rows that are shown.
    pub fn chosen(&self, shown: &[&TreeRow]) -> usize {
        // One that is gone or hidden gives way to what it was part of.
        let mut path = self.chosen.as_str();
        loop {
            if let Some(index) = shown.iter().position(|row| row.path == path) {
                return index;
            }
            match path.rsplit_once('/') {
                Some((parent, _)) => path = parent,
                None => return 0,
            }
        }
    }

    fn key(&mut self, key: KeyCode, rows: &[TreeRow]) {
        let shown = self.shown(rows);
        let Some(last) = shown.len().checked_sub(1) else { return };
        let index = self.chosen(&shown);
        let row = shown[index];
        let next = match key {
            KeyCode::Up => index.saturating_sub(1),
            KeyCode::Down => (index + 1).min(last),
            KeyCode::PageUp => index.saturating_sub(10),
            KeyCode::PageDown => (index + 10).min(last),
            KeyCode::Home => 0,
            KeyCode::End => last,
            KeyCode::Left if !(row.branches && self.is_open(row)) => {
                shown[..index].iter().rposition(|before| before.level < row.level).unwrap_or(index)
            }
            _ => index,
        };
        let turns = match key {
            KeyCode::Enter | KeyCode::Char(' ') => true,
            KeyCode::Left => self.is_open(row),
            KeyCode::Right => !self.is_open(row),
            _ => false,
        };
        self.chosen = shown[next].path.clone();
        if turns && row.branches && !self.turned.remove(&row.path) {
            self.turned.insert(row.path.clone());
        }
    }
}

/// Everything that is drawn.
pub struct App {
    /// Model and devices.
    pub title: String,
    pub snapshot: Snapshot,
    pub focus: Focus,
    /// What was asked and answered.
    pub text: String,
    /// The next request as far as it is written, and where in it the cursor is, in characters.
    pub prompt: String,
    pub cursor: usize,
    pub latency: Tree,
    pub memory: Tree,
    pub log: VecDeque<String>,
    /// Lines that text and log are scrolled back from their end.
    pub text_back: usize,
    pub log_back: usize,
    /// Whether a request is running.
    pub generating: bool,
    /// What happened last.
    pub status: String,
}

impl App {
    pub fn new(title: String) -> App {
        App {
            title,
            snapshot: Snapshot::default(),
            focus: Focus::Prompt,
            text: String::new(),
            prompt: String::new(),
            cursor: 0,
            latency: Tree::new(2),
            memory: Tree::new(1),
            log: VecDeque::new(),
            text_back: 0,
            log_back: 0,
            generating: false,
            status: "ready".into(),
        }
    }

    /// A request was sent; its answer stands behind `gap`.
    pub fn begin(&mut self, prompt: &str, gap: &str) {
        let before = if self.text.is_empty() { "" } else { "\n\n" };
        self.append(&format!("{before}> {prompt}{gap}"));
        self.text_back = 0;
        self.generating = true;
        self.status = "generating".into();
    }

    /// Text has come.
    pub fn append(&mut self, text: &str) {
        self.text.push_str(text);
        if self.text.len() > MOST_TEXT {
            let cut = self.text.len() - MOST_TEXT / 2;
            let cut = (cut..self.text.len()).find(|&at| self.text.is_char_boundary(at)).unwrap_or(0);
            self.text.drain(..cut);
        }
    }

    /// The request has ended.
    pub fn end(&mut self, status: String) {
        self.generating = false;
        self.status = status;
    }

    pub fn log(&mut self, line: String) {
        self.log.push_back(line);
        while self.log.len() > MOST_LOG {
            self.log.pop_front();
        }
    }

    /// A key was pressed.
    pub fn key(&mut self, key: KeyEvent) -> Option<Action> {
        if key.kind == KeyEventKind::Release {
            return None;
        }
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Some(Action::Quit),
            KeyCode::Char('q') if self.focus != Focus::Prompt => return Some(Action::Quit),
            KeyCode::Esc => return self.generating.then_some(Action::Cancel),
            KeyCode::Tab => self.focus = self.focus.moved(1),
            KeyCode::BackTab => self.focus = self.focus.moved(Focus::ALL.len() - 1),
            code => match self.focus {
                Focus::Prompt => return self.prompt_key(code, key.modifiers),
                Focus::Text => scroll(&mut self.text_back, code),
                Focus::Log => scroll(&mut self.log_back, code),
                Focus::Latency => self.latency.key(code, &latency_tree(&self.snapshot)),
                Focus::Memory => self.memory.key(code, &memory_tree(&self.snapshot)),
            },
        }
        None
    }

    fn prompt_key(&mut self, code: KeyCode, modifiers: KeyModifiers) -> Option<Action> {
        let place = |at: usize, prompt: &str| prompt.char_indices().nth(at).map_or(prompt.len(), |(byte, _)| byte);
        match code {
            KeyCode::Enter if self.generating => {
                self.status = "one at a time: Esc cancels the request that runs".into()
            }
            KeyCode::Enter if !self.prompt.trim().is_empty() => {
                self.cursor = 0;
                return Some(Action::Submit(std::mem::take(&mut self.prompt)));
            }
            KeyCode::Char('u') if modifiers.contains(KeyModifiers::CONTROL) => {
                (self.prompt, self.cursor) = Default::default();
            }
            KeyCode::Char(c) if !modifiers.intersects(KeyModifiers::CONTROL | KeyModifiers::ALT) => {
                self.prompt.insert(place(self.cursor, &self.prompt), c);
                self.cursor += 1;
            }
            KeyCode::Backspace if self.cursor > 0 => {
                self.cursor -= 1;
                self.prompt.remove(place(self.cursor, &self.prompt));
            }
            KeyCode::Delete if self.cursor < self.prompt.chars().count() => {
                self.prompt.remove(place(self.cursor, &self.prompt));
            }
            KeyCode::Left => self.cursor = self.cursor.saturating_sub(1),
            KeyCode::Right => self.cursor = (self.cursor + 1).min(self.prompt.chars().count()),
            KeyCode::Home => self.cursor = 0,
            KeyCode::End => self.cursor = self.prompt.chars().count(),
            _ => {}
        }
        None
    }
}

/// How far back from the end; drawing stops at the beginning.
fn scroll(back: &mut usize, code: KeyCode) {
    *back = match code {
        KeyCode::Up => *back + 1,
        KeyCode::Down => back.saturating_sub(1),
        KeyCode::PageUp => *back + 10,
        KeyCode::PageDown => back.saturating_sub(10),
        KeyCode::End => 0,
        KeyCode::Home => usize::MAX / 2,
        _ => *back,
    };
}

#[cfg(test)]
pub mod tests {
    use candle_pipeline::instrument::Phase;
    use candle_pipeline::instrument::metrics::{
        Bandwidth, Bytes, Latency, LayerLatency, Memory, Occupancy, StageFigures, StageFootprint, StageLatency, Timing,
        Tokens,
    };

    use super::*;

    /// Two stages of two layers each.
    pub fn snapshot() -> Snapshot {
        let timing = |ms: u64| Timing { last_ns: ms * 1_000_000, average_ns: ms * 2_000_000 };
        let layer = |layer| LayerLatency {
            layer,
            total: timing(4),
            phases: vec![(Phase::Sdpa, timing(3)), (Phase::Rope, timing(1))],
        };
        let stage = |stage: usize| StageLatency {
            compute: timing(9),
            layers: vec![layer(2 * stage), layer(2 * stage + 1)],
            ..StageLatency::default()
        };
        let figures = |device: &str, share| StageFigures {
            device: device.into(),
            recent: Occupancy { busy: share, bubble: 1.0 - share, copy: 0.0 },
            bandwidth: Bandwidth { step_bytes: 1, bytes_per_second: 3e9, device_bytes_per_second: Some(12e9) },
            ..StageFigures::default()
        };
        let footprint = StageFootprint {
            weights: Bytes { current: 3 << 20, peak: 4 << 20 },
            layer_bytes: vec![(0, 1 << 20)],
            ..StageFootprint::default()
        };
        Snapshot {
            stages: vec![figures("cpu", 0.75), figures("cuda:0", 0.5)],
            latency: Latency {
                step: timing(20),
                forward: timing(18),
                stages: vec![stage(0), stage(1)],
                ..Latency::default()
            },
            memory: Memory {
                weights: Bytes { current: 6 << 20, peak: 8 << 20 },
                stages: vec![footprint.clone(), footprint],
                ..Memory::default()
            },
            tokens: Tokens { per_second: 123.4, history: vec![1, 5, 9], history_slice: 0.25, ..Tokens::default() },
            ..Snapshot::default()
        }
    }

    fn press(app: &mut App, codes: &[KeyCode]) -> Option<Action> {
        codes.iter().fold(None, |_, &code| app.key(KeyEvent::new(code, KeyModifiers::NONE)))
    }

    fn labels(app: &App) -> Vec<String> {
        let rows = latency_tree(&app.snapshot);
        app.latency.shown(&rows).iter().map(|row| row.label.clone()).collect()
    }

    #[test]
    fn branches_open_and_close_and_stay_so_in_the_next_snapshot() {
        let mut app = App::new(String::new());
        app.snapshot = snapshot();
        app.focus = Focus::Latency;
        let layers = |app: &App| labels(app).iter().filter(|label| label.starts_with("Layer")).count();
        assert_eq!((layers(&app), labels(&app)[0].as_str()), (0, "Step"));
        // Step, Queue, its two stages, Forward, the first stage.
        press(&mut app, &[KeyCode::Down; 5]);
        press(&mut app, &[KeyCode::Right]);
        assert_eq!(layers(&app), 2);
        press(&mut app, &[KeyCode::Down, KeyCode::Enter]);
        assert!(labels(&app).contains(&"sdpa".to_string()));
        app.snapshot.latency.step.last_ns += 1;
        assert!(labels(&app).contains(&"sdpa".to_string()));
        press(&mut app, &[KeyCode::Left]);
        assert!(!labels(&app).contains(&"sdpa".to_string()), "closed, and still chosen");
        press(&mut app, &[KeyCode::Left, KeyCode::Left]);
        assert_eq!(layers(&app), 0, "to the stage, and closed");
        press(&mut app, &[KeyCode::Home, KeyCode::Left]);
        assert_eq!(labels(&app)[..2], ["Step", "Sampling"]);
    }

    #[test]
    fn a_chosen_row_that_is_gone_gives_way_to_what_it_was_part_of() {
        let mut app = App::new(String::new());
        app.snapshot = snapshot();
        app.focus = Focus::Latency;
        press(&mut app, &[KeyCode::Down, KeyCode::Down]);
        app.snapshot = Snapshot::default();
        let rows = latency_tree(&app.snapshot);
        let shown = app.latency.shown(&rows);
        assert_eq!(shown[app.latency.chosen(&shown)].label, "Queue");
        press(&mut app, &[KeyCode::End, KeyCode::PageUp, KeyCode::PageDown, KeyCode::Enter]);
    }

    #[test]
    fn keys_write_a_prompt_send_it_and_cancel_it() {
        let mut app = App::new(String::new());
        assert_eq!(press(&mut app, &[KeyCode::Enter]), None, "there is nothing to send");
        press(&mut app, &"aäqx".chars().map(KeyCode::Char).collect::<Vec<_>>());
        press(&mut app, &[KeyCode::Backspace, KeyCode::Home, KeyCode::Right, KeyCode::Delete, KeyCode::Char('ö')]);
        assert_eq!((app.prompt.as_str(), app.cursor), ("aöq", 2), "a q here is a letter");
        assert_eq!(press(&mut app, &[KeyCode::Esc]), None, "nothing runs");
        assert_eq!(press(&mut app, &[KeyCode::Enter]), Some(Action::Submit("aöq".into())));
        app.begin("aöq", "\n");
        press(&mut app, &[KeyCode::Char('b')]);
        assert_eq!(press(&mut app, &[KeyCode::Enter]), None, "one at a time");
        assert_eq!((app.prompt.as_str(), app.text.as_str()), ("b", "> aöq\n"));
        assert_eq!(press(&mut app, &[KeyCode::Esc]), Some(Action::Cancel));
        assert_eq!(press(&mut app, &[KeyCode::Tab, KeyCode::Char('q')]), Some(Action::Quit));
        assert_eq!((app.focus, press(&mut app, &[KeyCode::BackTab]), app.focus), (Focus::Text, None, Focus::Prompt));
        let ctrl_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(app.key(ctrl_c), Some(Action::Quit));
    }

    #[test]
    fn long_texts_and_logs_lose_their_beginning() {
        let mut app = App::new(String::new());
        for _ in 0..20_000 {
            app.append("größer ");
        }
        assert!(app.text.len() <= MOST_TEXT && app.text.ends_with("größer "));
        (0..2 * MOST_LOG).for_each(|line| app.log(line.to_string()));
        assert_eq!((app.log.len(), app.log[0].as_str()), (MOST_LOG, "500"));
    }

    #[test]
    fn bytes_are_short() {
        assert_eq!(
            [bytes(0), bytes(1023), bytes(1536), bytes(u64::MAX)],
            ["0 B", "1023 B", "1.5 KiB", "16777216.0 TiB"]
        );
    }
}
