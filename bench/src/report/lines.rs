//! Charts of lines: how a figure grows with the number of flows. Both axes begin at zero.

use super::svg::{FAINT, Svg, colour};
use super::{Report, ordered};
use crate::report::markdown::number;
use crate::scenario::Scenario;

/// Files that this module writes.
pub(super) const FILES: [&str; 2] = ["throughput-by-flows.svg", "memory-by-flows.svg"];

/// A contender's points, (flows, figure).
type Line<'a> = (&'a str, Vec<(f64, f64)>);

/// File names and contents of the charts for which there are at least two numbers of flows.
pub(super) fn plots(report: &Report) -> Vec<(String, String)> {
    let [throughput, memory] = FILES;
    [
        (throughput, "Throughput by flows, Gbit/s", throughput_lines(report)),
        (memory, "Memory by idle flows, MB (PSS, both proxies)", memory_lines(report)),
    ]
    .into_iter()
    .filter_map(|(file, title, lines)| Some((file.to_owned(), chart(title, &lines)?)))
    .collect()
}

fn throughput_lines(report: &Report) -> Vec<Line<'_>> {
    let of = |contender: &str| {
        let points = report.scenarios.iter().filter_map(|s| {
            let Ok(Scenario::Stream(flows)) = s.name.parse() else { return None };
            Some((flows as f64, *s.contenders.get(contender)?.medians.get("gbit_s")?))
        });
        sorted(points.collect())
    };
    ordered(&report.settings.contenders).into_iter().map(|c| (c, of(c))).collect()
}

fn memory_lines(report: &Report) -> Vec<Line<'_>> {
    let of = |contender: &str| {
        let points = report.scenarios.iter().filter_map(|s| s.contenders.get(contender));
        sorted(points.flat_map(|f| f.memory_by_flows.iter().map(|&(flows, bytes)| (flows, bytes / 1e6))).collect())
    };
    ordered(&report.settings.contenders).into_iter().map(|c| (c, of(c))).collect()
}

fn sorted(mut points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points
}

fn chart(title: &str, lines: &[Line<'_>]) -> Option<String> {
    const LEFT: f64 = 62.0;
    const TOP: f64 = 44.0;
    const WIDTH: f64 = 480.0;
    const HEIGHT: f64 = 280.0;
    let lines: Vec<&Line<'_>> = lines.iter().filter(|(_, points)| points.len() >= 2).collect();
    let points = || lines.iter().flat_map(|(_, points)| points.iter());
    let right = points().map(|p| p.0).reduce(f64::max)?;
    let high = points().map(|p| p.1).fold(f64::MIN_POSITIVE, f64::max);
    let x = |flows: f64| LEFT + flows / right * WIDTH;
    let y = |value: f64| TOP + HEIGHT - (value / high).clamp(0.0, 1.0) * HEIGHT;

    let mut svg = Svg::new(LEFT + WIDTH + 120.0, TOP + HEIGHT + 40.0, title);
    for quarter in 0..=4 {
        let value = high * f64::from(quarter) / 4.0;
        svg.line(LEFT, y(value), LEFT + WIDTH, y(value), FAINT);
        svg.text(LEFT - 6.0, y(value) + 4.0, "end", false, &number(value));
    }
    let mut marks: Vec<f64> = points().map(|p| p.0).collect();
    marks.sort_by(f64::total_cmp);
    marks.dedup();
    for mark in marks {
        svg.line(x(mark), TOP, x(mark), TOP + HEIGHT, FAINT);
        svg.text(x(mark), TOP + HEIGHT + 18.0, "middle", false, &format!("{mark:.0}"));
    }
    for (index, (contender, points)) in lines.iter().enumerate() {
        let line = points.iter().map(|&(flows, value)| format!("{:.1},{:.1}", x(flows), y(value)));
        svg.polyline(&line.collect::<Vec<_>>().join(" "), colour(contender));
        for &(flows, value) in points {
            svg.rect(x(flows) - 3.0, y(value) - 3.0, 6.0, 6.0, colour(contender));
        }
        let at = TOP + 14.0 + index as f64 * 20.0;
        svg.rect(LEFT + WIDTH + 14.0, at - 9.0, 12.0, 10.0, colour(contender));
        svg.text(LEFT + WIDTH + 32.0, at, "start", false, contender);
    }
    Some(svg.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Machine;
    use crate::runner::test_support::results;

    #[test]
    fn a_line_needs_two_numbers_of_flows() {
        let names = |data: &[(&str, &str, &'static str, &[f64])]| {
            let (settings, results) = results(data);
            let plots = plots(&Report::build(&settings, Machine::default(), &results, None));
            for (name, text) in &plots {
                assert!(text.ends_with("</svg>\n") && !text.contains("NaN") && !text.contains("inf"), "{name}: {text}");
            }
            plots.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert!(names(&[("stream-1", "us", "gbit_s", &[8.0])]).is_empty());
        let two: [(&str, &str, &'static str, &[f64]); 2] =
            [("stream-16", "us", "gbit_s", &[9.0]), ("stream-4", "us", "gbit_s", &[8.0])];
        assert_eq!(names(&two), ["throughput-by-flows.svg"]);
    }
}
