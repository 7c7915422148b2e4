//! `opencluster node revoke`, `opencluster workload revoke` and `restore`

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

pub(super) async fn restore(
    context: &mut Context<'_>,
    namespace: &str,
    name: &str,
    reason: &str,
) -> Result<(), CliError> {
    check(reason)?;
    let path = path::WORKLOAD_REVOKE.replace("{namespace}", namespace).replace("{name}", name);
    let path = format!("{path}?reason={}", percent_encoded(reason));
    let result: RevokeResult = context.client().await?.delete(&path).await?;
    Ok(context.printer.print(&result, |result, style| text(result, "revocation lifted", style))?)
}

async fn revoke(context: &mut Context<'_>, path: &str, reason: String) -> Result<(), CliError> {
    check(&reason)?;
    let result: RevokeResult = context.client().await?.post(path, &RevokeRequest { reason }).await?;
    Ok(context.printer.print(&result, |result, style| text(result, "revoked", style))?)
}

fn check(reason: &str) -> Result<(), CliError> {
    if reason.trim().is_empty() {
        return Err(CliError::usage("no reason is given", "--reason TEXT goes into the audit trail"));
    }
    Ok(())
}

/// For a query: everything but letters, digits and four more is encoded (RFC 3986, section 2.3).
fn percent_encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |encoded, byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            encoded + char::from(byte).encode_utf8(&mut [0; 4])
        }
        _ => encoded + &format!("%{byte:02X}"),
    })
}

fn text(result: &RevokeResult, done: &str, style: Style) -> String {
    let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { printable(&names.join(", ")) };
    let mut text = Lines::default();
    text.push(style.bold(&format!("{done} (revocation version {})", result.version)));
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
    fn a_reason_survives_the_query() {
        assert_eq!(percent_encoded("a&b=c d+e/ü"), "a%26b%3Dc%20d%2Be%2F%C3%BC");
        assert_eq!(percent_encoded("Az09-._~"), "Az09-._~");
    }

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
        assert_eq!(text(&result, "revoked", Style::PLAIN), expected);
        let pending = text(&RevokeResult { pending: vec!["c".into()], ..result }, "revoked", Style::PLAIN);
        assert!(pending.contains("  not yet on     c: "), "{pending}");
    }
}
