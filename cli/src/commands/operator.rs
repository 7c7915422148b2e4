//! `opencluster operator create`

use std::path::Path;
use std::time::Duration;

use opencluster_api::rest::{OperatorRequest, OperatorResult, Role, path};

use super::node::print_secret;
use super::{Context, secret};
use crate::args::RoleArg;
use crate::error::CliError;
use crate::output::human::printable;

pub(super) async fn create(
    context: &mut Context<'_>,
    name: String,
    role: RoleArg,
    ttl: Option<Duration>,
    out: Option<&Path>,
) -> Result<(), CliError> {
    secret::check(out)?;
    let role = match role {
        RoleArg::Viewer => Role::Viewer,
        RoleArg::Operator => Role::Operator,
        RoleArg::Admin => Role::Admin,
    };
    let request = OperatorRequest { name, role, ttl_s: ttl.map(|ttl| ttl.as_secs()) };
    let result: OperatorResult = context.client().await?.post(path::OPERATORS, &request).await?;
    print_secret(context, &result, &result.token, out)?;
    let (name, role, expires) = (printable(&result.name), role_name(result.role), printable(&result.expires));
    context.printer.note(&format!("{name} ({role}) can use this token until {expires}; it is not shown again"))?;
    Ok(())
}

/// As operators write it.
pub(super) fn role_name(role: Role) -> &'static str {
    match role {
        Role::Viewer => "viewer",
        Role::Operator => "operator",
        Role::Admin => "admin",
    }
}
