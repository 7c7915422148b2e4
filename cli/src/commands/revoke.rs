//! `opencluster node revoke` and `opencluster workload revoke`

use opencluster_api::rest::{RevokeRequest, RevokeResult, path};

use super::Context;
use crate::error::CliError;
use crate::output::human::printable;
use crate::output::lines::Lines;
use crate::output::style::Style;

pub(super) async fn node(context: &mut Context<'_>, name: &str, reason: String) -> Result<(), CliError> {
    revoke(context, &path::NODE_REVOKE.replace("{name}", name), reason).await
}

pub(super) async fn workload(
    context: &mut Context<'_>,
    namespace: &str,
    name: &str,
    reason: String,
) -> Result<(), CliError> {
    let path = path::WORKLOAD_REVOKE.replace("{namespace}", namespace).replace("{name}", name);
    revoke(context, &path, reason).await
}

async fn revoke(context: &mut Context<'_>, path: &str, reason: String) -> Result<(), CliError> {
    if reason.trim().is_empty() {
        return Err(CliError::usage("a revocation needs a reason", "--reason TEXT goes into the audit trail"));
    }
    let result: RevokeResult = context.client().await?.post(path, &RevokeRequest { reason }).await?;
    Ok(context.printer.print(&result, text)?)
}

fn text(result: &RevokeResult, style: Style) -> String {
    let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { printable(&names.join(", ")) };
    let mut text = Lines::default();
    text.push(style.bold(&format!("revoked (revocation version {})", result.version)));
    text.push(format_args!("  identities     {}", list(&result.identities)));
    text.push(format_args!("  in force on    {}", list(&result.acknowledged)));
    if result.pending.is_empty() {
        text.push("  every node that carries traffic has acknowledged");
    } else {
        let pending = list(&result.pending);
        let warning = format!("  not yet on     {pending}: a silent node carries nothing once its lease runs out");
        text.push(style.yellow(&warning));
    }
    text.text()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_it_and_who_does_not() {
        let result = RevokeResult {
            version: 3,
            identities: vec!["spiffe://rig.test/ns/default/sa/b".into()],
            acknowledged: vec!["a".into(), "b".into()],
            pending: Vec::new(),
        };
        let expected = "\
revoked (revocation version 3)
  identities     spiffe://rig.test/ns/default/sa/b
  in force on    a, b
  every node that carries traffic has acknowledged
";
        assert_eq!(text(&result, Style::PLAIN), expected);
        let pending = text(&RevokeResult { pending: vec!["c".into()], ..result }, Style::PLAIN);
        assert!(pending.contains("  not yet on     c: "), "{pending}");
    }
}
