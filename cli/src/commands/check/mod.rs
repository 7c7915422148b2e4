//! `opencluster check`: the whole cluster looked at, in groups; every failure comes with what to do about it.

mod controller;
mod nodes;
mod policies;
mod report;
mod services;
mod workloads;

use opencluster_api::rest::{ClusterStatus, NodeStatusList, Whoami, WorkloadStatus, path};
use opencluster_policy::resource::{Kind, Resource};
use serde_json::Value;
use time::OffsetDateTime;

pub(super) use self::nodes::workload_id;
use self::report::{Check, Group, Report};
use super::Context;
use super::get::list;
use super::workload::statuses;
use crate::client::Client;
use crate::error::CliError;

pub(super) async fn run(context: &mut Context<'_>) -> Result<(), CliError> {
    let report = diagnose(context).await?;
    context.printer.print(&report, Report::text)?;
    if report.ok { Ok(()) } else { Err(CliError::Reported) }
}

async fn diagnose(context: &Context<'_>) -> Result<Report, CliError> {
    let settings = context.connection.settings()?;
    let mut connection = Group::new("connection");
    let mut client = match Client::connect(settings).await {
        Ok(client) => client,
        Err(error) => {
            connection.extend(controller::unreachable(&error));
            return Ok(Report::new(vec![connection]));
        }
    };
    connection.extend(controller::reached(client.peer(), client.settings()));
    match client.get::<Whoami>(path::WHOAMI).await {
        Ok(whoami) => connection.push(controller::credentials(&whoami, OffsetDateTime::now_utc())),
        Err(error) => {
            connection.push(Check::failed("credentials are valid", error.to_string(), error.hint()));
            return Ok(Report::new(vec![connection]));
        }
    }
    let mut groups = vec![connection];
    match read(&mut client).await {
        Ok(cluster) => groups.extend(cluster.groups()),
        Err(error) => {
            let mut group = Group::new("controller");
            group.push(Check::failed("state can be read", error.to_string(), error.hint()));
            groups.push(group);
        }
    }
    Ok(Report::new(groups))
}

/// All that the controller knows of the cluster, at about one moment.
struct Cluster {
    status: ClusterStatus,
    /// Our clock before and after [`Self::status`] was asked for.
    asked: [OffsetDateTime; 2],
    nodes: NodeStatusList,
    workloads: Vec<WorkloadStatus>,
    resources: Vec<Resource>,
    /// Resources that this version does not understand.
    unknown: Vec<String>,
}

async fn read(client: &mut Client) -> Result<Cluster, CliError> {
    let before = OffsetDateTime::now_utc();
    let status: ClusterStatus = client.get(path::STATUS).await?;
    let asked = [before, OffsetDateTime::now_utc()];
    let mut resources = Vec::new();
    let mut unknown = Vec::new();
    for kind in Kind::ALL {
        for object in list(client, kind, None).await?.items {
            match Resource::from_json(object.to_string().as_bytes()) {
                Ok(resource) => resources.push(resource),
                Err(faults) => unknown.push(format!("{}: {faults}", described(kind, &object))),
            }
        }
    }
    // Last, so that what was configured just before has the most time to arrive.
    let workloads = statuses(client).await?.workloads;
    let nodes: NodeStatusList = client.get(path::NODE_STATUS).await?;
    Ok(Cluster { status, asked, nodes, workloads, resources, unknown })
}

fn described(kind: Kind, object: &Value) -> String {
    let metadata = &object["metadata"];
    let part = |name: &str| metadata[name].as_str().unwrap_or_default().to_owned();
    format!("{} {}/{}", kind.name(), part("namespace"), part("name"))
}

impl Cluster {
    fn groups(&self) -> Vec<Group> {
        let mut groups = vec![controller::group(&self.status, self.asked)];
        if let Some(group) = nodes::none(&self.nodes.nodes) {
            groups.push(group);
        }
        groups.extend(
            self.nodes.nodes.iter().map(|node| nodes::group(node, &self.status, &self.resources, &self.workloads)),
        );
        groups.extend(workloads::group(&self.workloads));
        groups.push(services::group(&self.status.trust_domain, &self.resources, &self.nodes.nodes));
        let mut policies = policies::group(&self.status.trust_domain, &self.resources);
        for unknown in &self.unknown {
            policies.push(Check::failed(
                "all resources are understood",
                unknown.clone(),
                "this opencluster is older than the controller: install the controller's version",
            ));
        }
        groups.push(policies);
        groups
    }
}
