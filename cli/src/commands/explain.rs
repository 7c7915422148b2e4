//! `opencluster explain flow`

use opencluster_api::rest::{ExplainRequest, ExplainResult, path};

use super::Context;
use crate::args::ExplainArgs;
use crate::error::CliError;
use crate::output::human::printable;
use crate::output::lines::Lines;
use crate::output::style::Style;

pub(super) async fn run(context: &mut Context<'_>, args: &ExplainArgs) -> Result<(), CliError> {
    let (Some(from), Some(to)) = (&args.from, &args.to) else {
        return Err(CliError::usage(
            "a flow has two ends",
            "opencluster explain flow --from WORKLOAD --to SERVICE:PORT",
        ));
    };
    let request = ExplainRequest {
        from: qualified(from, &args.namespace.namespace),
        to: qualified(to, &args.namespace.namespace),
    };
    let result: ExplainResult = context.client().await?.post(path::EXPLAIN_FLOW, &request).await?;
    Ok(context.printer.print(&result, text)?)
}

/// With the namespace of `-n` where none was given.
fn qualified(name: &str, namespace: &str) -> String {
    if name.contains('/') { name.to_owned() } else { format!("{namespace}/{name}") }
}

fn text(result: &ExplainResult, style: Style) -> String {
    let verdict = if result.allowed { style.green("allowed") } else { style.red("denied") };
    let rule = if result.rule.is_empty() { "no rule: default deny" } else { &result.rule };
    let backends = if result.backends.is_empty() { "none".to_owned() } else { result.backends.join(", ") };
    let mut text = Lines::default();
    text.push(format_args!("{verdict}: {} -> {}", printable(&result.from), printable(&result.to)));
    text.push(format_args!("  decided by  {}", printable(rule)));
    text.push(format_args!("  backends    {}", printable(&backends)));
    for reason in &result.reasons {
        text.push(format_args!("  - {}", printable(reason)));
    }
    text.text()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_story_of_a_denial() {
        let result = ExplainResult {
            allowed: false,
            from: "spiffe://rig.test/ns/default/sa/c".into(),
            to: "default/echo:9000".into(),
            backends: vec!["spiffe://rig.test/ns/default/sa/b".into()],
            rule: String::new(),
            reasons: vec!["the nearest rule is default/a-to-echo, from[0]: it wants workload default/a".into()],
        };
        let expected = "\
denied: spiffe://rig.test/ns/default/sa/c -> default/echo:9000
  decided by  no rule: default deny
  backends    spiffe://rig.test/ns/default/sa/b
  - the nearest rule is default/a-to-echo, from[0]: it wants workload default/a
";
        assert_eq!(text(&result, Style::PLAIN), expected);
        let allowed = ExplainResult { allowed: true, rule: "default/a-to-echo, from[0]".into(), ..result };
        assert!(text(&allowed, Style::PLAIN).starts_with("allowed: "));
    }

    #[test]
    fn bare_names_are_of_the_namespace() {
        assert_eq!(qualified("a", "prod"), "prod/a");
        assert_eq!(qualified("echo:9000", "prod"), "prod/echo:9000");
        assert_eq!(qualified("x/echo:9000", "prod"), "x/echo:9000");
        assert_eq!(qualified("spiffe://td/ns/x/sa/y", "prod"), "spiffe://td/ns/x/sa/y");
    }
}
