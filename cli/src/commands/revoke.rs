//! `opencluster node revoke`, `opencluster workload revoke` and `restore`, `opencluster revocation list`

use opencluster_api::rest::{ClusterStatus, IdentityRevokeRequest, RevocationList, RevokeRequest, RevokeResult, path};

use super::Context;
use super::check::workload_id;
use crate::args::{Name, Subject};
use crate::error::CliError;
use crate::output::human::printable;
use crate::output::lines::Lines;
use crate::output::style::Style;
use crate::output::table::Table;

pub(super) async fn node(context: &mut Context<'_>, name: &str, reason: String) -> Result<(), CliError> {
    revoke(context, &path::NODE_REVOKE.replace("{name}", name), reason).await
}

pub(super) async fn workload(
    context: &mut Context<'_>,
    subject: Subject,
    namespace: &str,
    key: Option<String>,
    reason: String,
) -> Result<(), CliError> {
    check(&reason)?;
    let client = &mut context.client().await?;
    let request = match (subject, key) {
        (Subject::Workload(name), None) => {
            let path = workload_path(&name, namespace);
            let result: RevokeResult = client.post(&path, &RevokeRequest { reason }).await?;
            return Ok(context.printer.print(&result, |result, style| text(result, "revoked", style))?);
        }
        (Subject::Workload(name), Some(key)) => {
            let status: ClusterStatus = client.get(path::STATUS).await?;
            let spiffe_id = workload_id(&status.trust_domain, name.namespace_or(namespace), &name.name);
            IdentityRevokeRequest { spiffe_id, key: Some(key), reason }
        }
        (Subject::Id(spiffe_id), key) => IdentityRevokeRequest { spiffe_id, key, reason },
    };
    let result: RevokeResult = client.post(path::REVOCATIONS, &request).await?;
    Ok(context.printer.print(&result, |result, style| text(result, "revoked", style))?)
}

pub(super) async fn restore(
    context: &mut Context<'_>,
    subject: Subject,
    namespace: &str,
    reason: &str,
) -> Result<(), CliError> {
    check(reason)?;
    let reason = percent_encoded(reason);
    let path = match subject {
        Subject::Workload(name) => format!("{}?reason={reason}", workload_path(&name, namespace)),
        Subject::Id(id) => format!("{}?spiffe_id={}&reason={reason}", path::REVOCATIONS, percent_encoded(&id)),
    };
    let result: RevokeResult = context.client().await?.delete(&path).await?;
    Ok(context.printer.print(&result, |result, style| text(result, "revocation lifted", style))?)
}

fn workload_path(name: &Name, namespace: &str) -> String {
    path::WORKLOAD_REVOKE.replace("{namespace}", name.namespace_or(namespace)).replace("{name}", &name.name)
}

pub(super) async fn list(context: &mut Context<'_>) -> Result<(), CliError> {
    let list: RevocationList = context.client().await?.get(path::REVOCATIONS).await?;
    context.printer.print(&list, |list, _| table(list))?;
    if list.revocations.is_empty() {
        context.printer.note("nothing is revoked")?;
    }
    Ok(())
}

fn table(list: &RevocationList) -> String {
    if list.revocations.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["IDENTITY", "KEY", "SINCE", "UNTIL", "REASON"]);
    for revocation in &list.revocations {
        table.row([
            revocation.spiffe_id.as_str(),
            revocation.key.as_deref().unwrap_or("every key"),
            revocation.since.as_deref().unwrap_or_default(),
            revocation.until.as_deref().unwrap_or("lifted"),
            revocation.reason.as_str(),
        ]);
    }
    table.render()
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
    use opencluster_api::rest::Revocation;

    use super::*;

    #[test]
    fn a_reason_survives_the_query() {
        assert_eq!(percent_encoded("a&b=c d+e/ü"), "a%26b%3Dc%20d%2Be%2F%C3%BC");
        assert_eq!(percent_encoded("Az09-._~"), "Az09-._~");
    }

    #[test]
    fn the_table_of_revocations() {
        let revocation = |key: Option<&str>, until: Option<&str>| Revocation {
            spiffe_id: "spiffe://rig.test/ns/default/sa/b".into(),
            key: key.map(str::to_owned),
            reason: "a test".into(),
            since: Some("2026-11-24T00:00:00Z".into()),
            until: until.map(str::to_owned),
        };
        let revocations = vec![revocation(None, None), revocation(Some("a1"), Some("2026-11-24T01:05:00Z"))];
        let expected = "\
IDENTITY                            KEY         SINCE                  UNTIL                  REASON
spiffe://rig.test/ns/default/sa/b   every key   2026-11-24T00:00:00Z   lifted                 a test
spiffe://rig.test/ns/default/sa/b   a1          2026-11-24T00:00:00Z   2026-11-24T01:05:00Z   a test
";
        assert_eq!(table(&RevocationList { version: 2, revocations }), expected);
        assert_eq!(table(&RevocationList { version: 2, revocations: Vec::new() }), "");
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
