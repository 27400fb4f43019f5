//! Plots of a profile, as one SVG: latency over the tokens of a run, percentiles of the cases, where the time to the
//! first token goes, and what the stages computed when.

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::events::Span;
use crate::phases::{Case, Run, us};
use crate::report::Profile;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws one part.
type Panel<'a> = Box<dyn Fn(&Area) -> Result<()> + 'a>;

const WIDTH: u32 = 1000;
const PANEL_HEIGHT: u32 = 320;
const FONT: &str = "sans-serif";
/// Told apart by people who see colours differently, too (Okabe and Ito).
const BLUE: RGBColor = RGBColor(0, 114, 178);
const ORANGE: RGBColor = RGBColor(230, 159, 0);
const GREEN: RGBColor = RGBColor(0, 158, 115);
const RED: RGBColor = RGBColor(213, 94, 0);

/// Micro-batches that the timeline shows.
const STEPS: u64 = 16;

/// Whether a file begins as a plot does.
pub fn is_plot(head: &[u8]) -> bool {
    head.starts_with(format!("<svg width=\"{WIDTH}\" height=\"").as_bytes())
}

/// Draws what the chosen phases have measured, as an SVG.
pub fn draw(profile: &Profile) -> Result<String> {
    let cases = named_cases(profile);
    let mut panels: Vec<Panel> = Vec::new();
    if let Some(sustained) = profile.sustained.as_ref().filter(|sustained| sustained.case.output > 2) {
        panels.push(Box::new(|area| latency_over_tokens(area, &sustained.case)));
    }
    if !cases.is_empty() {
        panels.push(Box::new(|area| percentiles(area, &cases)));
    }
    if !profile.input.is_empty() {
        panels.push(Box::new(|area| first_tokens(area, &profile.input)));
    }
    let batch = profile.batch.as_ref().map(|batch| (format!("{} sequences", batch.sequences), &batch.spans));
    let sustained = profile.sustained.as_ref().map(|sustained| ("one sequence".to_string(), &sustained.spans));
    if let Some((what, spans)) = batch.or(sustained) {
        panels.push(Box::new(move |area| timeline(area, &what, spans, &profile.devices)));
    }
    ensure!(!panels.is_empty(), "--plot: none of the chosen --phases has anything to draw");

    let height = PANEL_HEIGHT * panels.len() as u32;
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE).map_err(failed)?;
    for (panel, area) in panels.iter().zip(root.split_evenly((panels.len(), 1))) {
        panel(&area)?;
    }
    root.present().map_err(failed)?;
    drop(root);
    Ok(svg)
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("{error}")
}

/// The cases that have times between tokens, and what to call them.
fn named_cases(profile: &Profile) -> Vec<(String, &Case)> {
    let tokens = profile.tokens.iter().map(|case| (format!("{} out", case.output), case));
    let input = profile.input.iter().map(|case| (format!("{} in", case.input), case));
    let sustained = profile.sustained.iter().map(|sustained| ("sustained".to_string(), &sustained.case));
    let batch = profile.batch.iter().map(|batch| (format!("batch of {}", batch.sequences), &batch.together));
    tokens.chain(input).chain(sustained).chain(batch).filter(|(_, case)| case.output > 1).collect()
}

/// The axes of a panel whose y begins at 0.
fn ms_range(most: f64) -> Range<f64> {
    0.0..(most * 1.08).max(1e-6)
}

/// Milliseconds, to the nanosecond.
fn ms_label(ms: &f64) -> String {
    format!("{}", (ms * 1e6).round() / 1e6)
}

/// Times that differ by more than this factor are shown on a logarithmic scale.
const SPREAD: f64 = 10.0;

/// Each token's time since the one before: the median of the runs, and where the middle nine tenths of them lie.
fn latency_over_tokens(area: &Area, case: &Case) -> Result<()> {
    let of_token = |index: usize| -> Vec<f64> {
        let mut times: Vec<f64> = case.runs.iter().filter_map(|run| Some(us(*run.itl.get(index)?) / 1e3)).collect();
        times.sort_by(f64::total_cmp);
        times
    };
    let tokens = (0..case.output - 1).map(|index| (index + 2, of_token(index)));
    let tokens: Vec<(usize, Vec<f64>)> = tokens.filter(|(_, times)| !times.is_empty()).collect();
    let at = |times: &[f64], share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    let quantile = |share| tokens.iter().map(|(token, times)| (*token as f64, at(times, share))).collect::<Vec<_>>();
    let quantiles = [quantile(0.05), quantile(0.5), quantile(0.95)];
    let title = format!("Time between tokens of {} runs: median, and P5 to P95 of each token", case.runs.len());
    let most = quantiles[2].iter().map(|(_, ms)| *ms).fold(1e-3, f64::max);
    let least = quantiles[0].iter().map(|(_, ms)| *ms).fold(most, f64::min).max(1e-3);
    match most > least * SPREAD {
        true => band(area, &title, quantiles, (least / 1.5..most * 1.5).log_scale()),
        false => band(area, &title, quantiles, ms_range(most)),
    }
}

/// A line, and the area between one below it and one above.
fn band<Y>(
    area: &Area,
    title: &str,
    [below, middle, above]: [Vec<(f64, f64)>; 3],
    ms: impl AsRangedCoord<CoordDescType = Y, Value = f64>,
) -> Result<()>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let last = middle.last().map_or(0.0, |(token, _)| *token);
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(1.0..last + 1.0, ms)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("token")
        .y_desc("ms")
        .x_label_formatter(&|token| format!("{token:.0}"))
        .y_label_formatter(&ms_label)
        .draw()
        .map_err(failed)?;
    let outline: Vec<(f64, f64)> = above.into_iter().chain(below.into_iter().rev()).collect();
    chart.draw_series([Polygon::new(outline, BLUE.mix(0.2))]).map_err(failed)?;
    chart.draw_series(LineSeries::new(middle, BLUE.stroke_width(2))).map_err(failed)?;
    Ok(())
}

/// P50, P95 and P99 of the time between tokens, side by side for each case.
fn percentiles(area: &Area, cases: &[(String, &Case)]) -> Result<()> {
    let ms = |case: &Case, quantile| case.itl().at(quantile).map(|us| us.max(1) as f64 / 1e3);
    let cases: Vec<(&str, [Option<f64>; 3])> =
        cases.iter().map(|(name, case)| (name.as_str(), [0.50, 0.95, 0.99].map(|q| ms(case, q)))).collect();
    let all = cases.iter().flat_map(|(_, values)| values.iter().flatten().copied());
    let (least, most) = all.fold((f64::MAX, 1e-3), |(least, most), ms| (ms.min(least), ms.max(most)));
    let least = least.min(most);
    // Above the bars there is room for the legend.
    match most > least * SPREAD {
        true => percentile_bars(area, &cases, (least / 2.0..most * 6.0).log_scale(), least / 2.0),
        false => percentile_bars(area, &cases, 0.0..most * 1.4, 0.0),
    }
}

fn percentile_bars<Y>(
    area: &Area,
    cases: &[(&str, [Option<f64>; 3])],
    ms: impl AsRangedCoord<CoordDescType = Y, Value = f64>,
    bottom: f64,
) -> Result<()>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let name = |place: usize| cases.get(place).map_or(String::new(), |(name, _)| name.to_string());
    let mut chart = bars(area, "Time between tokens by case", cases.len(), ms, bottom, &name)?;
    for (index, (name, colour)) in [("P50", BLUE), ("P95", ORANGE), ("P99", RED)].into_iter().enumerate() {
        let bar = |place: usize, ms: f64| {
            let left = place as f64 + 0.14 + 0.24 * index as f64;
            Rectangle::new([(left, bottom), (left + 0.22, ms)], colour.filled())
        };
        let drawn = cases.iter().enumerate().filter_map(|(place, (_, values))| Some(bar(place, values[index]?)));
        named(&mut chart, name, colour, drawn)?;
    }
    legend(&mut chart, SeriesLabelPosition::UpperLeft)
}

/// Where the time to the first token goes in the run with the median one, by length of the prompt.
fn first_tokens(area: &Area, cases: &[Case]) -> Result<()> {
    let runs: Vec<(usize, &Run)> = cases.iter().filter_map(|case| Some((case.input, case.middle()?))).collect();
    let most = runs.iter().map(|(_, run)| us(run.ttft) / 1e3).fold(0.0, f64::max);
    let name = |place: usize| runs.get(place).map_or(String::new(), |(input, _)| format!("{input} in"));
    let title = "Time to the first token by prompt length, the run with the median";
    let mut chart = bars(area, title, runs.len(), ms_range(most), 0.0, &name)?;
    type Part = fn(&Run) -> Duration;
    let parts: [(&str, RGBColor, Part); 4] = [
        ("queue", RED, |run| run.first.queue),
        ("prefill", BLUE, |run| run.first.prefill),
        ("first sample", GREEN, |run| run.first.sample),
        ("to the caller", ORANGE, |run| {
            run.ttft.saturating_sub(run.first.queue + run.first.prefill + run.first.sample)
        }),
    ];
    let mut from = vec![0.0; runs.len()];
    for (name, colour, part) in parts {
        let drawn = runs.iter().zip(&mut from).enumerate().map(|(place, ((_, run), from))| {
            let (below, above) = (*from, *from + us(part(run)) / 1e3);
            *from = above;
            Rectangle::new([(place as f64 + 0.2, below), (place as f64 + 0.8, above)], colour.filled())
        });
        named(&mut chart, name, colour, drawn)?;
    }
    legend(&mut chart, SeriesLabelPosition::UpperLeft)
}

type Chart<'a, 'b, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, Y>>;

/// A panel of `places` bars side by side that rise from `bottom`, each named below its middle.
fn bars<'a, 'b, Y>(
    area: &'a Area<'b>,
    title: &str,
    places: usize,
    ms: impl AsRangedCoord<CoordDescType = Y, Value = f64>,
    bottom: f64,
    name: &dyn Fn(usize) -> String,
) -> Result<Chart<'a, 'b, Y>>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..places as f64, ms)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .light_line_style(TRANSPARENT)
        .y_desc("ms")
        .y_label_formatter(&ms_label)
        .draw()
        .map_err(failed)?;
    let style = TextStyle::from((FONT, 13)).pos(Pos::new(HPos::Center, VPos::Top));
    let names = (0..places)
        .map(|place| EmptyElement::at((place as f64 + 0.5, bottom)) + Text::new(name(place), (0, 8), style.clone()));
    chart.draw_series(names).map_err(failed)?;
    Ok(chart)
}

/// Draws rectangles of one colour, and names the colour in the legend.
fn named<'a, 'b: 'a, Y: Ranged<ValueType = f64>>(
    chart: &mut Chart<'a, 'b, Y>,
    name: &str,
    colour: RGBColor,
    rectangles: impl Iterator<Item = Rectangle<(f64, f64)>>,
) -> Result<()> {
    let drawn = chart.draw_series(rectangles).map_err(failed)?;
    if !name.is_empty() {
        drawn.label(name).legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], colour.filled()));
    }
    Ok(())
}

fn legend<'a, 'b: 'a, Y: Ranged<ValueType = f64>>(
    chart: &mut Chart<'a, 'b, Y>,
    place: SeriesLabelPosition,
) -> Result<()> {
    chart
        .configure_series_labels()
        .position(place)
        .background_style(WHITE.mix(0.85))
        .label_font((FONT, 13))
        .draw()
        .map_err(failed)
}

/// What each stage computed when: the prompts and the steps behind them, a row a stage.
fn timeline(area: &Area, what: &str, spans: &[Span], devices: &[candle_pipeline::DeviceSpec]) -> Result<()> {
    let first = spans.iter().map(|span| span.step).min().context("no step was computed")?;
    let shown: Vec<&Span> = spans.iter().filter(|span| span.step < first + STEPS).collect();
    let began = shown.iter().map(|span| span.from).min().context("no step was computed")?;
    let ms = |at: std::time::Instant| us(at.saturating_duration_since(began)) / 1e3;
    let until = shown.iter().map(|span| ms(span.until)).fold(0.0, f64::max);
    let title = format!("What the stages computed when: {what}, the first {STEPS} micro-batches");
    let stages = devices.len();
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(110)
        .build_cartesian_2d(0.0..until.max(1e-6), 0.0..stages as f64 + 0.3)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(TRANSPARENT)
        .x_desc("ms")
        .x_label_formatter(&ms_label)
        .draw()
        .map_err(failed)?;
    // Stage 0 on top; of neighbouring steps one is darker.
    let row = |stage: usize| (stages - 1 - stage) as f64;
    let kinds: [(&str, bool, u64, RGBColor); 4] = [
        ("prefill", true, 0, ORANGE),
        ("", true, 1, RGBColor(240, 190, 90)),
        ("decode", false, 0, BLUE),
        ("", false, 1, RGBColor(110, 180, 220)),
    ];
    for (name, prefill, parity, colour) in kinds {
        let of_kind = shown.iter().filter(|span| span.prefill == prefill && span.step % 2 == parity);
        let bars = of_kind.map(|span| {
            let bottom = row(span.stage) + 0.2;
            Rectangle::new([(ms(span.from), bottom), (ms(span.until), bottom + 0.6)], colour.filled())
        });
        named(&mut chart, name, colour, bars)?;
    }
    let style = TextStyle::from((FONT, 13)).pos(Pos::new(HPos::Right, VPos::Center));
    let names = devices.iter().enumerate().map(|(stage, device)| {
        EmptyElement::at((0.0, row(stage) + 0.5)) + Text::new(format!("{stage}: {device}"), (-8, 0), style.clone())
    });
    chart.draw_series(names).map_err(failed)?;
    legend(&mut chart, SeriesLabelPosition::UpperRight)
}
