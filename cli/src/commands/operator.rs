//! `opencluster operator create`

use std::path::Path;
use std::time::Duration;

use opencluster_api::rest::{
    OperatorCertificate, OperatorCertificateRequest, OperatorList, OperatorRequest, OperatorResult, Role, path,
};

use super::node::print_secret;
use super::{Context, secret};
use crate::args::RoleArg;
use crate::client::settings::read_text;
use crate::error::CliError;
use crate::output::human::printable;
use crate::output::table::Table;

pub(super) async fn create(
    context: &mut Context<'_>,
    name: String,
    role: RoleArg,
    ttl: Option<Duration>,
    out: Option<&Path>,
) -> Result<(), CliError> {
    secret::check(out)?;
    let request = OperatorRequest { name, role: role.into(), ttl_s: ttl.map(|ttl| ttl.as_secs()) };
    let result: OperatorResult = context.client().await?.post(path::OPERATORS, &request).await?;
    print_secret(context, &result, &result.token, out)?;
    let (name, role, expires) = (printable(&result.name), role_name(result.role), printable(&result.expires));
    context.printer.note(&format!("{name} ({role}) can use this token until {expires}; it is not shown again"))?;
    Ok(())
}

pub(super) async fn certificate(
    context: &mut Context<'_>,
    name: &str,
    role: RoleArg,
    csr: &Path,
    ttl: Option<Duration>,
) -> Result<(), CliError> {
    let csr_pem = read_text(csr)?;
    let request = OperatorCertificateRequest { role: role.into(), csr_pem, ttl_s: ttl.map(|ttl| ttl.as_secs()) };
    let path = path::OPERATOR_CERTIFICATE.replace("{name}", name);
    let result: OperatorCertificate = context.client().await?.post(&path, &request).await?;
    // PEM is text of letters, and lines must stay lines: the one answer that is shown to people as it came.
    let shown =
        |result: &OperatorCertificate, _| result.certificate_pem.lines().map(printable).collect::<Vec<_>>().join("\n");
    context.printer.print(&result, shown)?;
    let (name, role, expires) = (printable(&result.name), role_name(result.role), printable(&result.expires));
    context.printer.note(&format!("{name} ({role}) can use this certificate until {expires}"))?;
    Ok(())
}

pub(super) async fn list(context: &mut Context<'_>) -> Result<(), CliError> {
    let operators: OperatorList = context.client().await?.get(path::OPERATORS).await?;
    Ok(context.printer.print(&operators, |operators, _| table(operators))?)
}

pub(super) async fn delete(context: &mut Context<'_>, name: &str) -> Result<(), CliError> {
    let ended: OperatorList = context.client().await?.delete(&path::OPERATOR.replace("{name}", name)).await?;
    context.printer.print(&ended, |ended, _| table(ended))?;
    context.printer.note(&format!("{} credentials of {name} are ended", ended.credentials.len()))?;
    Ok(())
}

fn table(operators: &OperatorList) -> String {
    let mut table = Table::new(&["NAME", "ROLE", "KIND", "EXPIRES"]);
    for credential in &operators.credentials {
        table.row([credential.name.as_str(), role_name(credential.role), &credential.kind, &credential.expires]);
    }
    table.render()
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Viewer => Self::Viewer,
            RoleArg::Operator => Self::Operator,
            RoleArg::Admin => Self::Admin,
        }
    }
}

/// As operators write it.
pub(super) fn role_name(role: Role) -> &'static str {
    match role {
        Role::Viewer => "viewer",
        Role::Operator => "operator",
        Role::Admin => "admin",
    }
}

#[cfg(test)]
mod tests {
    use opencluster_api::rest::OperatorCredential;

    use super::*;

    #[test]
    fn the_table_of_credentials() {
        let credential = |name: &str, role, kind: &str| OperatorCredential {
            name: name.into(),
            role,
            kind: kind.into(),
            expires: "2026-11-25T00:00:00Z".into(),
        };
        let credentials =
            vec![credential("anna", Role::Admin, "token"), credential("ci", Role::Operator, "certificate")];
        let expected = "\
NAME   ROLE       KIND          EXPIRES
anna   admin      token         2026-11-25T00:00:00Z
ci     operator   certificate   2026-11-25T00:00:00Z
";
        assert_eq!(table(&OperatorList { credentials }), expected);
    }
}
