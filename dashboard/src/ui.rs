//! Draws an [`App`]. Every part takes what room there is, down to none.

use candle_pipeline::instrument::metrics::{Distribution, Snapshot};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Position, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph, Sparkline};

use super::app::{App, Focus, Tree, TreeRow, latency_tree, memory_tree};

/// Shown at the bottom.
pub const KEYS: &str = "Tab focus  Up/Down move  Left/Right fold  Enter send/fold  Esc cancel  Ctrl-C quit";

/// With less room there are the text, the prompt, and the keys.
const SMALLEST: (u16, u16) = (70, 18);

pub fn draw(frame: &mut Frame, app: &App) {
    let area = frame.area();
    let [title, body, status, keys] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(0), Constraint::Length(1), Constraint::Length(1)])
            .areas(area);
    frame.render_widget(Line::from(app.title.as_str()).bold(), title);
    frame.render_widget(Line::from(status_line(app)).reversed(), status);
    frame.render_widget(Line::from(KEYS).dim(), keys);
    if area.width < SMALLEST.0 || area.height < SMALLEST.1 {
        let [text, input] = Layout::vertical([Constraint::Min(0), Constraint::Length(3)]).areas(body);
        draw_text(frame, app, text);
        draw_prompt(frame, app, input);
        return;
    }
    let [left, right] = Layout::horizontal([Constraint::Percentage(45), Constraint::Percentage(55)]).areas(body);
    let [text, input, log] =
        Layout::vertical([Constraint::Fill(3), Constraint::Length(3), Constraint::Fill(1)]).areas(left);
    draw_text(frame, app, text);
    draw_prompt(frame, app, input);
    draw_log(frame, app, log);
    let figures_height = 7 + app.snapshot.stages.len().min(6) as u16;
    let [figures, latency, memory] =
        Layout::vertical([Constraint::Length(figures_height), Constraint::Fill(3), Constraint::Fill(2)]).areas(right);
    draw_figures(frame, &app.snapshot, figures);
    let latency_block = block("Latency", "last ms", "average ms", latency.width, app.focus == Focus::Latency);
    draw_tree(frame, &app.latency, &latency_tree(&app.snapshot), latency_block, latency);
    let memory_block = block("Memory", "current", "peak", memory.width, app.focus == Focus::Memory);
    draw_tree(frame, &app.memory, &memory_tree(&app.snapshot), memory_block, memory);
}

/// A border that shows whether keys go here.
fn bordered(title: &str, focused: bool) -> Block<'static> {
    let style = if focused { Style::new().fg(Color::Cyan).add_modifier(Modifier::BOLD) } else { Style::new() };
    Block::bordered().title(format!(" {title} ")).border_style(style)
}

/// The same with the names of two columns.
fn block(title: &str, first: &str, second: &str, width: u16, focused: bool) -> Block<'static> {
    let block = bordered(title, focused);
    let columns = format!("{first:>COLUMN$}{second:>COLUMN$} ");
    if usize::from(width) < title.len() + columns.len() + 6 {
        return block;
    }
    block.title(Line::from(columns).right_aligned())
}

/// Width of a column of figures.
const COLUMN: usize = 12;

fn draw_text(frame: &mut Frame, app: &App, area: Rect) {
    let block = bordered("Text", app.focus == Focus::Text);
    let inner = block.inner(area);
    let lines: Vec<String> = app.text.lines().flat_map(|line| wrap(line, inner.width.into())).collect();
    draw_end(frame, &lines, app.text_back, block, area);
}

fn draw_log(frame: &mut Frame, app: &App, area: Rect) {
    let block = bordered("Log", app.focus == Focus::Log);
    let inner = block.inner(area);
    let lines: Vec<String> = app.log.iter().flat_map(|line| wrap(line, inner.width.into())).collect();
    draw_end(frame, &lines, app.log_back, block, area);
}

/// The last lines that have room, or as many lines before them as it is scrolled back.
fn draw_end(frame: &mut Frame, lines: &[String], back: usize, block: Block, area: Rect) {
    let height = usize::from(block.inner(area).height);
    let end = lines.len() - back.min(lines.len().saturating_sub(height));
    let shown = &lines[end.saturating_sub(height)..end];
    let shown: Vec<Line> = shown.iter().map(|line| Line::from(line.as_str())).collect();
    frame.render_widget(Paragraph::new(shown).block(block), area);
}

/// Breaks a line between words, and within those that are longer than a line.
fn wrap(line: &str, width: usize) -> Vec<String> {
    if width == 0 {
        return Vec::new();
    }
    let mut lines = vec![String::new()];
    let (mut used, mut last) = (0, 0);
    for word in line.split_inclusive(' ') {
        let room = Span::raw(word.trim_end()).width();
        if used > 0 && used + room > width {
            lines.push(String::new());
            (used, last) = (0, last + 1);
        }
        for character in word.chars() {
            let room = Span::raw(character.to_string()).width();
            // A blank at the end of a line may stand beyond it.
            if used + room > width && character != ' ' {
                lines.push(String::new());
                (used, last) = (0, last + 1);
            }
            lines[last].push(character);
            used += room;
        }
    }
    lines
}

fn draw_prompt(frame: &mut Frame, app: &App, area: Rect) {
    let focused = app.focus == Focus::Prompt;
    let block = bordered("Next request", focused);
    let inner = block.inner(area);
    let width = |text: String| Span::raw(text).width();
    let before = width(app.prompt.chars().take(app.cursor).collect());
    // The beginning goes out of sight where the cursor would.
    let skipped = (before + 1).saturating_sub(inner.width.into());
    let paragraph = Paragraph::new(app.prompt.as_str()).scroll((0, skipped.min(u16::MAX.into()) as u16)).block(block);
    frame.render_widget(paragraph, area);
    if focused && inner.width > 0 && inner.height > 0 {
        frame.set_cursor_position(Position::new(inner.x + (before - skipped) as u16, inner.y));
    }
}

fn draw_figures(frame: &mut Frame, snapshot: &Snapshot, area: Rect) {
    let block = bordered("Figures", false);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let [text, spark] = Layout::vertical([Constraint::Min(0), Constraint::Length(2)]).areas(inner);
    let tokens = &snapshot.tokens;
    let mut lines = vec![
        Line::from(format!(
            "{:.1} tokens/s  {} generated  prompts {} computed, {} reused  prefix hits {}/{}",
            tokens.per_second,
            tokens.generated,
            tokens.prefilled,
            tokens.reused,
            tokens.prefix_hits,
            snapshot.kv.lookups
        )),
        Line::from(percentiles("TTFT", &tokens.ttft)),
        Line::from(percentiles("ITL ", &tokens.inter_token)),
    ];
    lines.extend((0..snapshot.stages.len()).map(|stage| occupancy(snapshot, stage)));
    frame.render_widget(Paragraph::new(lines), text);
    // The latest on the right.
    let first = tokens.history.len().saturating_sub(spark.width.into());
    let history: Vec<u64> = tokens.history[first..].iter().map(|&tokens| tokens.into()).collect();
    frame.render_widget(Sparkline::default().data(&history).style(Style::new().fg(Color::Green)), spark);
}

fn percentiles(name: &str, times: &Distribution) -> String {
    let ms = |us: u64| us as f64 / 1e3;
    let (p50, p95, p99) = (ms(times.p50_us), ms(times.p95_us), ms(times.p99_us));
    format!(
        "{name} ms  p50 {p50:.2}  p95 {p95:.2}  p99 {p99:.2}  max {:.2}  ({} samples)",
        ms(times.max_us),
        times.count
    )
}

/// A bar of what a stage did with its time, and how fast it reads memory.
fn occupancy(snapshot: &Snapshot, stage: usize) -> Line<'static> {
    const BAR: usize = 12;
    let figures = &snapshot.stages[stage];
    let shares = figures.recent;
    let cells = |share: f64| (share * BAR as f64).round() as usize;
    let (busy, copy) = (cells(shares.busy).min(BAR), cells(shares.copy));
    let copy = copy.min(BAR - busy);
    let bandwidth = match figures.bandwidth.share() {
        Some(share) => format!("{:.1} GB/s, {:.0}% of memory", figures.bandwidth.bytes_per_second / 1e9, 100.0 * share),
        None => format!("{:.1} GB/s", figures.bandwidth.bytes_per_second / 1e9),
    };
    Line::from(vec![
        Span::raw(format!("{:<16.16} ", snapshot.stage_label(stage))),
        Span::styled("█".repeat(busy), Style::new().fg(Color::Green)),
        Span::styled("▒".repeat(copy), Style::new().fg(Color::Yellow)),
        Span::styled("·".repeat(BAR - busy - copy), Style::new().fg(Color::DarkGray)),
        Span::raw(format!(" busy {:.0}% bubbles {:.0}%  {bandwidth}", 100.0 * shares.busy, 100.0 * shares.bubble)),
    ])
}

fn draw_tree(frame: &mut Frame, tree: &Tree, rows: &[TreeRow], block: Block, area: Rect) {
    let inner = block.inner(area);
    let (width, height) = (usize::from(inner.width), usize::from(inner.height));
    let shown = tree.shown(rows);
    let chosen = tree.chosen(&shown);
    // The chosen row is always in sight.
    let first = (chosen + 1).saturating_sub(height);
    let lines = shown.iter().enumerate().skip(first).take(height).map(|(index, row)| {
        let fold = match (row.branches, tree.is_open(row)) {
            (true, true) => "- ",
            (true, false) => "+ ",
            (false, _) => "  ",
        };
        let name = format!("{}{fold}{}", "  ".repeat(row.level), row.label);
        let [last, average] = &row.values;
        let room = width.saturating_sub(2 * COLUMN + 1);
        let line = Line::from(format!("{name:<room$.room$}{last:>COLUMN$}{average:>COLUMN$} "));
        if index == chosen { line.reversed() } else { line }
    });
    frame.render_widget(Paragraph::new(lines.collect::<Vec<_>>()).block(block), area);
}

fn status_line(app: &App) -> String {
    let Snapshot { requests, kv, dropped_events, uptime, .. } = &app.snapshot;
    let dropped = if *dropped_events > 0 { format!("  {dropped_events} events dropped") } else { String::new() };
    format!(
        " {}  |  {} running, {} waiting  |  KV {} used, {} reserved of {}  |  up {uptime:.0} s{dropped}",
        app.status, requests.running, requests.waiting, kv.valid, kv.reserved, kv.limit
    )
}

#[cfg(test)]
mod tests {
    use candle_pipeline::instrument::metrics::{build_latency_rows, build_memory_rows};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

    use super::super::app::tests::snapshot;
    use super::*;

    fn app() -> App {
        let mut app = App::new("demo on cpu,cuda:0".into());
        app.snapshot = snapshot();
        app.begin("Once", "\n");
        app.append("upon a time, in a land of 日本 and ünïcode, ".repeat(20).as_str());
        app.log("INFO loaded".into());
        app
    }

    fn drawn(app: &App, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, app)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol().to_string()).collect::<String>();
        (0..height).map(line).collect()
    }

    #[test]
    fn all_parts_are_there() {
        let screen = drawn(&app(), 140, 50).join("\n");
        for part in [
            "demo on cpu,cuda:0",
            "> Once",
            "upon a time",
            "Next request",
            "INFO loaded",
            "123.4 tokens/s",
            "TTFT ms  p50",
            "Stage 0 (cpu)    █████████··· busy 75% bubbles 25%  3.0 GB/s, 25% of memory",
            "██████······ busy 50%",
            "last ms  average ms",
            "Forward",
            "other",
            "Weights",
            "Host process",
            "generating",
            KEYS,
        ] {
            assert!(screen.contains(part), "{part}\n{screen}");
        }
    }

    #[test]
    fn the_trees_show_the_rows_that_logs_have() {
        let mut app = app();
        let snapshot = app.snapshot.clone();
        for focus in [Focus::Latency, Focus::Memory] {
            app.focus = focus;
            // Opens all that is closed.
            for _ in 0..100 {
                for code in [KeyCode::Right, KeyCode::Down] {
                    app.key(KeyEvent::new(code, KeyModifiers::NONE));
                }
            }
            app.key(KeyEvent::new(KeyCode::Home, KeyModifiers::NONE));
        }
        let screen = drawn(&app, 160, 160);
        let mut lines = screen.iter();
        for row in build_latency_rows(&snapshot) {
            let values =
                format!("{:>COLUMN$}{:>COLUMN$} ", format!("{:.3}", row.last_ms), format!("{:.3}", row.average_ms));
            let found = lines.any(|line| line.contains(&format!(" {} ", row.label)) && line.contains(&values));
            assert!(found, "{row:?} in order\n{}", screen.join("\n"));
        }
        for row in build_memory_rows(&snapshot) {
            let found = lines.any(|line| line.contains(&format!(" {} ", row.label)));
            assert!(found, "{row:?} in order\n{}", screen.join("\n"));
        }
    }

    #[test]
    fn the_chosen_row_stays_in_sight() {
        let mut app = app();
        app.focus = Focus::Memory;
        app.key(KeyEvent::new(KeyCode::End, KeyModifiers::NONE));
        assert!(drawn(&app, 100, 30).join("\n").contains("unattributed"));
    }

    #[test]
    fn no_size_is_too_small() {
        let mut app = app();
        app.prompt = "a long prompt that has no room".into();
        app.cursor = app.prompt.chars().count();
        for (width, height) in (0..40).flat_map(|width| (0..12).map(move |height| (width, height))) {
            drawn(&app, width, height);
        }
        for (width, height) in [(70, 18), (71, 19), (69, 60), (300, 17), (300, 100)] {
            drawn(&app, width, height);
        }
        app.text_back = usize::MAX / 2;
        app.log_back = 3;
        assert!(drawn(&app, 30, 10).join("\n").contains("> Once"), "scrolled to the beginning");
        app.snapshot = Snapshot::default();
        drawn(&app, 100, 40);
    }

    #[test]
    fn lines_break_between_words_and_within_long_ones() {
        assert_eq!(wrap("one two three", 7), ["one two ", "three"]);
        assert_eq!(wrap("abcdefgh ij", 3), ["abc", "def", "gh ", "ij"]);
        assert_eq!(wrap("日本語", 4), ["日本", "語"]);
        assert_eq!((wrap("", 5), wrap("x", 0)), (vec![String::new()], Vec::new()));
    }
}
