//! Plots as SVG, written by hand: panels of bars and latency by percentile. No library, no fonts but the viewer's own.

use super::markdown::number;
use super::{Report, ScenarioReport, lines, ordered};
use crate::scenario::Scenario;

const INK: &str = "#24292f";
pub(super) const FAINT: &str = "#d0d7de";
const PANEL: f64 = 300.0;
const LABEL: f64 = 62.0;
const BAR: f64 = 18.0;
const GAP: f64 = 8.0;

/// Charts of bars: file, title, figure, and the scenarios that they show.
const CHARTS: [(&str, &str, &str, &[&str]); 8] = [
    ("rates.svg", "Operations a second", "rate", &["rr-", "crr-"]),
    ("throughput.svg", "Throughput, Gbit/s", "gbit_s", &["stream-"]),
    ("cpu.svg", "CPU seconds of the contender for each GB", "cpu_s_per_gb", &["stream-"]),
    ("memory.svg", "Memory for each idle flow, bytes (PSS, both proxies)", "bytes_per_flow", &["idle-"]),
    ("fixed-p99.svg", "p99 at a fixed rate, µs", "p99_us", &["fixed-"]),
    ("first.svg", "First answer on a new connection, median, µs", "p50_us", &["first-", "crr-"]),
    ("open.svg", "Seconds to open flows one after another", "seconds", &["open-"]),
    ("fair.svg", "p99 of small flows beside a bulk flow, µs", "p99_us", &["fair-"]),
];

/// Whether a file of this name is a plot of ours.
pub fn is_plot(name: &str) -> bool {
    CHARTS.iter().any(|chart| chart.0 == name)
        || lines::FILES.contains(&name)
        || name
            .strip_prefix("latency-")
            .and_then(|n| n.strip_suffix(".svg"))
            .is_some_and(|n| n.parse::<Scenario>().is_ok())
}

/// File names and contents of every plot for which there are figures.
pub fn plots(report: &Report) -> Vec<(String, String)> {
    let named =
        |prefixes: &'static [&'static str]| move |s: &&ScenarioReport| prefixes.iter().any(|p| s.name.starts_with(p));
    let mut files = Vec::new();
    for (file, title, figure, prefixes) in CHARTS {
        let panels: Vec<&ScenarioReport> = report.scenarios.iter().filter(named(prefixes)).collect();
        if let Some(text) = bars(title, figure, &panels, &report.settings.contenders) {
            files.push((file.to_owned(), text));
        }
    }
    files.extend(lines::plots(report));
    for scenario in &report.scenarios {
        if let Some(text) = percentiles(scenario, &report.settings.contenders) {
            files.push((format!("latency-{}.svg", scenario.name), text));
        }
    }
    files
}

pub(super) fn colour(contender: &str) -> &'static str {
    match contender {
        "us" => "#cf3f57",
        "haproxy" => "#2f7fb5",
        "stunnel" => "#d9952b",
        "nginx" => "#3f9a5f",
        "wireguard" => "#7a5fb5",
        "plain" => "#6f7782",
        "direct" => "#9aa4ae",
        // Whatever --external brings.
        _ => "#27606b",
    }
}

/// A scenario's name, and for each contender its name, median and interval.
type Panel<'a> = (&'a str, Vec<(&'a str, f64, [f64; 2])>);

/// A panel of horizontal bars for each scenario, each with its own scale; whiskers are the 95 % interval.
fn bars(title: &str, figure: &str, scenarios: &[&ScenarioReport], contenders: &[String]) -> Option<String> {
    let panels: Vec<Panel<'_>> = scenarios
        .iter()
        .map(|s| {
            let rows = ordered(contenders).into_iter().filter_map(|c| {
                let summary = s.contenders.get(c)?.spread.get(figure)?;
                Some((c, summary.median, summary.ci95))
            });
            (s.name.as_str(), rows.collect::<Vec<_>>())
        })
        .filter(|(_, rows)| !rows.is_empty())
        .collect();
    let rows = panels.iter().map(|(_, rows)| rows.len()).max()?;
    let height = 66.0 + rows as f64 * (BAR + GAP);
    let width = (20.0 + panels.len() as f64 * PANEL).max(32.0 + title.chars().count() as f64 * 8.0);
    let mut svg = Svg::new(width, height, title);
    for (index, (name, rows)) in panels.iter().enumerate() {
        let left = 16.0 + index as f64 * PANEL;
        let most = rows.iter().map(|(_, v, ci)| v.max(ci[1])).fold(f64::MIN_POSITIVE, f64::max);
        let scale = (PANEL - LABEL - 78.0) / most;
        svg.text(left, 48.0, "start", true, name);
        for (row, (contender, value, ci)) in rows.iter().enumerate() {
            let top = 58.0 + row as f64 * (BAR + GAP);
            let middle = top + BAR / 2.0;
            let x = left + LABEL;
            svg.text(x - 6.0, middle + 4.0, "end", false, contender);
            svg.rect(x, top, (value * scale).max(0.0), BAR, colour(contender));
            svg.line(x + ci[0] * scale, middle, x + ci[1] * scale, middle, INK);
            svg.text(x + value.max(ci[1]) * scale + 6.0, middle + 4.0, "start", false, &number(*value));
        }
    }
    Some(svg.finish())
}

/// Latency by percentile: the cumulative distribution with its tail stretched out, both axes logarithmic.
fn percentiles(scenario: &ScenarioReport, contenders: &[String]) -> Option<String> {
    const LEFT: f64 = 62.0;
    const TOP: f64 = 44.0;
    const WIDTH: f64 = 560.0;
    const HEIGHT: f64 = 300.0;
    const NINES: f64 = 4.0;
    let curves: Vec<(&str, &[(f64, f64)])> = ordered(contenders)
        .into_iter()
        .filter_map(|c| Some((c, scenario.contenders.get(c)?.cdf_us.as_slice())))
        .filter(|(_, points)| !points.is_empty())
        .collect();
    let latencies = || curves.iter().flat_map(|(_, points)| points.iter().map(|p| p.1.max(1.0)));
    let low = latencies().reduce(f64::min)?.log10().floor();
    let high = latencies().reduce(f64::max)?.log10().ceil().max(low + 1.0);
    let x = |share: f64| LEFT + (-(1.0 - share).max(1e-9).log10()).clamp(0.0, NINES) / NINES * WIDTH;
    let y = |us: f64| TOP + HEIGHT - (us.max(1.0).log10() - low) / (high - low) * HEIGHT;

    let title = format!("{}: latency by percentile, µs", scenario.name);
    let mut svg = Svg::new(LEFT + WIDTH + 100.0, TOP + HEIGHT + 40.0, &title);
    for (label, share) in [("0", 0.0), ("50", 0.5), ("90", 0.9), ("99", 0.99), ("99.9", 0.999), ("99.99", 0.9999)] {
        svg.line(x(share), TOP, x(share), TOP + HEIGHT, FAINT);
        svg.text(x(share), TOP + HEIGHT + 18.0, "middle", false, &format!("{label} %"));
    }
    let mut decade = low;
    while decade <= high {
        for step in [1.0, 2.0, 5.0] {
            let us = step * 10f64.powf(decade);
            if us <= 10f64.powf(high) * 1.001 {
                svg.line(LEFT, y(us), LEFT + WIDTH, y(us), FAINT);
                svg.text(LEFT - 6.0, y(us) + 4.0, "end", false, &number_short(us));
            }
        }
        decade += 1.0;
    }
    for (index, (contender, points)) in curves.iter().enumerate() {
        let line = points.iter().map(|&(share, us)| format!("{:.1},{:.1}", x(share), y(us))).collect::<Vec<_>>();
        svg.polyline(&line.join(" "), colour(contender));
        let at = TOP + 14.0 + index as f64 * 20.0;
        svg.rect(LEFT + WIDTH + 14.0, at - 9.0, 12.0, 10.0, colour(contender));
        svg.text(LEFT + WIDTH + 32.0, at, "start", false, contender);
    }
    Some(svg.finish())
}

fn number_short(us: f64) -> String {
    if us >= 1000.0 { format!("{}k", us / 1000.0) } else { format!("{us:.0}") }
}

/// A picture that is being drawn.
pub(super) struct Svg(String);

impl Svg {
    pub(super) fn new(width: f64, height: f64, title: &str) -> Self {
        let title = escape(title);
        Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
             height=\"{height:.0}\" font-family=\"system-ui, sans-serif\" font-size=\"12\" role=\"img\">\n\
             <title>{title}</title>\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
             <text x=\"16\" y=\"24\" font-size=\"15\" fill=\"{INK}\">{title}</text>\n"
        ))
    }

    pub(super) fn text(&mut self, x: f64, y: f64, anchor: &str, bold: bool, text: &str) {
        let weight = if bold { " font-weight=\"600\"" } else { "" };
        let text = escape(text);
        self.element(
            &format!("text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{INK}\"{weight}"),
            &text,
            "</text>",
        );
    }

    pub(super) fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, fill: &str) {
        let place = format!("x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"");
        self.element(&format!("rect {place} rx=\"2\" fill=\"{fill}\"/"), "", "");
    }

    pub(super) fn line(&mut self, x1: f64, y1: f64, x2: f64, y2: f64, stroke: &str) {
        let path = format!("M{x1:.1} {y1:.1}L{x2:.1} {y2:.1}");
        self.element(&format!("path d=\"{path}\" stroke=\"{stroke}\" fill=\"none\"/"), "", "");
    }

    pub(super) fn polyline(&mut self, points: &str, stroke: &str) {
        let style = format!("stroke=\"{stroke}\" stroke-width=\"2\" fill=\"none\"");
        self.element(&format!("polyline points=\"{points}\" {style}/"), "", "");
    }

    fn element(&mut self, tag: &str, content: &str, end: &str) {
        self.0.extend(["<", tag, ">", content, end, "\n"]);
    }

    pub(super) fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Machine;
    use crate::runner::test_support::results;

    #[test]
    fn plots_are_made_of_what_was_measured_and_nothing_else() {
        let (settings, mut results) = results(&[
            ("rr-16", "us", "rate", &[200.0, 210.0, 190.0]),
            ("rr-16", "haproxy", "rate", &[100.0, 105.0, 95.0]),
        ]);
        for us in [70, 90, 4000] {
            results.record_latency("rr-16", "us", std::time::Duration::from_micros(us));
        }
        let plots = plots(&Report::build(&settings, Machine::default(), &results, None));
        let names: Vec<&str> = plots.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["rates.svg", "latency-rr-16.svg"]);
        for (name, text) in &plots {
            assert!(text.starts_with("<svg") && text.ends_with("</svg>\n"), "{name}");
            assert!(!text.contains("NaN") && !text.contains("inf"), "{name}: {text}");
        }
    }
}
