//! One module for each command.

mod apply;
mod audit;
mod check;
mod completion;
mod delete;
mod diff;
mod explain;
mod fields;
mod get;
mod node;
mod operator;
mod revoke;
mod secret;
mod status;
mod version;
mod watch;
mod workload;

use crate::args::{AuditCommand, Command, NodeCommand, OperatorCommand, RevocationCommand, Topic, WorkloadCommand};
use crate::client::Client;
use crate::client::settings::ConnectionArgs;
use crate::error::CliError;
use crate::output::Printer;

/// What a command works with.
pub(crate) struct Context<'a> {
    /// Where results go.
    pub(crate) printer: Printer<'a>,
    /// How to reach the controller.
    pub(crate) connection: ConnectionArgs,
}

impl Context<'_> {
    /// Connects to the controller.
    pub(crate) async fn client(&self) -> Result<Client, CliError> {
        let settings = self.connection.settings()?;
        Ok(Client::connect(settings).await?)
    }
}

/// Does what the command line says.
pub(crate) async fn run(mut context: Context<'_>, command: Command) -> Result<(), CliError> {
    let context = &mut context;
    match command {
        Command::Apply(args) => apply::run(context, &args).await,
        Command::Get(args) => get::run(context, &args).await,
        Command::Delete(args) => delete::run(context, &args).await,
        Command::Diff(args) => diff::run(context, &args).await,
        Command::Explain(args) => match args.topic {
            Topic::Flow => explain::run(context, &args).await,
            Topic::Kind(kind) => fields::run(context, kind),
        },
        Command::Node { command } => match command {
            NodeCommand::List => node::list(context).await,
            NodeCommand::Show { name } => node::show(context, &name).await,
            NodeCommand::Token { name, ttl, out } => node::token(context, &name, ttl, out.as_deref()).await,
            NodeCommand::Revoke { name, reason } => revoke::node(context, &name, reason.reason).await,
        },
        Command::Workload { command } => match command {
            WorkloadCommand::List { namespace, all_namespaces } => {
                workload::list(context, (!all_namespaces).then_some(namespace.namespace.as_str())).await
            }
            WorkloadCommand::Show { name, namespace } => {
                workload::show(context, name.namespace_or(&namespace.namespace), &name.name).await
            }
            WorkloadCommand::Revoke { subject, key, reason, namespace } => {
                revoke::workload(context, subject, &namespace.namespace, key, reason.reason).await
            }
            WorkloadCommand::Restore { subject, reason, namespace } => {
                revoke::restore(context, subject, &namespace.namespace, &reason.reason).await
            }
        },
        Command::Revocation { command: RevocationCommand::List } => revoke::list(context).await,
        Command::Check => check::run(context).await,
        Command::Status => status::run(context).await,
        Command::Audit { command: AuditCommand::List { from, last } } => audit::list(context, from, last).await,
        Command::Audit { command: AuditCommand::Verify } => audit::verify(context).await,
        Command::Operator { command } => match command {
            OperatorCommand::Create { name, role, ttl, out } => {
                operator::create(context, name, role, ttl, out.as_deref()).await
            }
            OperatorCommand::Certificate { name, role, csr, ttl } => {
                operator::certificate(context, &name, role, &csr, ttl).await
            }
            OperatorCommand::List => operator::list(context).await,
            OperatorCommand::Delete { name } => operator::delete(context, &name).await,
        },
        Command::Watch(args) => watch::run(context, &args).await,
        Command::Completion(args) => completion::run(context, args.shell),
        Command::Version => version::run(context).await,
    }
}
