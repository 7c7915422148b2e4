//! The report for people.

use std::fmt::Write;

use super::{Report, ScenarioReport, bar};
use crate::stats::Ratio;

/// How figures are called and written in tables; in the order of the rows.
const FIGURES: [(&str, &str); 18] = [
    ("rate", "rate, 1/s"),
    ("p50_us", "p50, µs"),
    ("p99_us", "p99, µs"),
    ("send_lag_p99_us", "of that the generator's own lag, p99, µs"),
    ("alone_p99_us", "p99 without the bulk flow, µs"),
    ("p99_growth", "p99 beside the bulk flow / alone"),
    ("gbit_s", "Gbit/s"),
    ("cpu_s_per_gb", "CPU s for each GB"),
    ("cpu_us_per_op", "CPU µs for each operation"),
    ("seconds", "seconds to open them all"),
    ("flows", "flows held"),
    ("bytes_per_flow", "PSS bytes for each flow"),
    ("rss_bytes_per_flow", "RSS bytes for each flow"),
    ("kernel_bytes_per_flow", "kernel bytes for each flow, whole machine"),
    ("rest_bytes", "PSS bytes at rest"),
    ("idle_cpu_percent", "CPU of the proxies while idle, % of a core"),
    ("idle_cpu_all_percent", "the same with the node daemons"),
    ("errors", "failed operations"),
];

/// The whole report as Markdown, with the plots beside it.
pub fn render(report: &Report, plots: &[&str]) -> String {
    let mut out = String::new();
    write_all(&mut out, report, plots).unwrap_or_default(); // Writing to a String cannot fail.
    out
}

fn write_all(out: &mut String, report: &Report, plots: &[&str]) -> std::fmt::Result {
    let (m, s) = (&report.machine, &report.settings);
    writeln!(out, "# Benchmark\n")?;
    writeln!(
        out,
        "{} × {}, {:.0} GiB, Linux {}; load average at the start {:.2}. Up to {} round(s) of {} s per scenario and \
         contender, interleaved, warm-up {} s each.\n",
        m.cores,
        m.cpu,
        m.memory_bytes as f64 / f64::from(1 << 30),
        m.kernel,
        m.load_average,
        s.rounds,
        s.seconds,
        s.warmup_seconds
    )?;
    for (contender, version) in &report.versions {
        writeln!(out, "- {contender}: {version}")?;
    }
    if let Some(reason) = &report.aborted {
        writeln!(out, "\n**The run ended early: {reason}**")?;
    }
    writeln!(out, "\n## The bar\n\nus against the better of haproxy and stunnel, median of paired rounds.\n")?;
    out.push_str(&bar::table(&report.bar));
    if !report.failures.is_empty() {
        writeln!(out, "\n## Failures\n")?;
        for f in &report.failures {
            let place = f.scenario.as_deref().unwrap_or("start");
            writeln!(out, "- {} at {place}: {}", f.contender, f.what.replace('\n', " "))?;
        }
    }
    writeln!(out, "\n## Figures\n\nMedian (smallest – largest round); ratios with 95 % bootstrap intervals.")?;
    for scenario in &report.scenarios {
        scenario_table(out, report, scenario)?;
    }
    if !plots.is_empty() {
        writeln!(out, "\n## Plots\n")?;
        for plot in plots {
            writeln!(out, "![{plot}]({plot})\n")?;
        }
    }
    Ok(())
}

fn scenario_table(out: &mut String, report: &Report, scenario: &ScenarioReport) -> std::fmt::Result {
    writeln!(out, "\n### {}: {}\n", scenario.name, scenario.description)?;
    let columns: Vec<&str> = report.contenders().into_iter().filter(|c| scenario.contenders.contains_key(*c)).collect();
    if columns.is_empty() {
        return writeln!(out, "Nothing was measured.");
    }
    let ratios: Vec<&str> = report.contenders().into_iter().filter(|c| scenario.ratios.contains_key(*c)).collect();
    let heads = columns.iter().map(ToString::to_string).chain(ratios.iter().map(|r| format!("us / {r}")));
    writeln!(out, "| | {} |", heads.collect::<Vec<_>>().join(" | "))?;
    writeln!(out, "|---|{}", "---|".repeat(columns.len() + ratios.len()))?;
    for (figure, label) in FIGURES {
        if !columns.iter().any(|c| scenario.contenders[*c].medians.contains_key(figure)) {
            continue;
        }
        let values = columns.iter().map(|c| {
            scenario.contenders[*c]
                .spread
                .get(figure)
                .map_or_else(|| "–".into(), |s| format!("{} ({} – {})", number(s.median), number(s.min), number(s.max)))
        });
        let against = ratios.iter().map(|c| scenario.ratios[*c].get(figure).map_or_else(|| "–".into(), times));
        writeln!(out, "| {label} | {} |", values.chain(against).collect::<Vec<_>>().join(" | "))?;
    }
    Ok(())
}

fn times(r: &Ratio) -> String {
    format!("{:.2}× ({:.2} – {:.2})", r.ratio, r.ci95[0], r.ci95[1])
}

/// Three significant digits or whole numbers, with thousands separated.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if size >= 100.0 {
        let digits = format!("{size:.0}");
        let mut grouped = String::new();
        for (index, digit) in digits.chars().enumerate() {
            if index > 0 && (digits.len() - index).is_multiple_of(3) {
                grouped.push(',');
            }
            grouped.push(digit);
        }
        return if value < 0.0 { format!("-{grouped}") } else { grouped };
    }
    if size >= 10.0 {
        format!("{value:.1}")
    } else if size >= 1.0 || size == 0.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.3}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Machine;
    use crate::runner::test_support::results;

    #[test]
    fn numbers_for_people() {
        let cases = [
            (0.0, "0.00"),
            (0.1234, "0.123"),
            (5.678, "5.68"),
            (56.78, "56.8"),
            (567.8, "568"),
            (1_234_567.0, "1,234,567"),
            (-1234.0, "-1,234"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn the_table_has_a_column_for_each_contender_and_each_ratio() {
        let (settings, results) = results(&[
            ("rr-16", "us", "rate", &[200.0, 210.0, 190.0]),
            ("rr-16", "haproxy", "rate", &[100.0, 105.0, 95.0]),
        ]);
        let text = render(&Report::build(&settings, Machine::default(), &results, None), &["rates.svg"]);
        assert!(text.contains("| | us | haproxy | us / haproxy |"), "{text}");
        assert!(text.contains("| rate, 1/s | 200 (190 – 210) | 100 (95.0 – 105) | 2.00× (2.00 – 2.00) |"), "{text}");
        assert!(text.contains("![rates.svg](rates.svg)"));
    }
}
