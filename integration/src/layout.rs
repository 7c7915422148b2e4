//! Who is in a rig, and what everything is called: a pure function of the rig's name and its hosts.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// The rig that is meant when nobody says otherwise.
pub const DEFAULT_RIG: &str = "oc";

/// The controller's host.
pub const CONTROLLER: &str = "ctl";

/// The namespace that holds the switch.
pub const SWITCH: &str = "net";

/// The bridge's name in the switch's namespace.
pub const BRIDGE: &str = "br0";

/// The name of every host's one interface.
pub const INTERFACE: &str = "eth0";

/// The port on which the controller takes nodes.
pub const NODE_PORT: u16 = 7443;

/// The port on which the controller takes operators.
pub const API_PORT: u16 = 7480;

/// The port on which proxies take tunnels from each other.
pub const TUNNEL_PORT: u16 = 15443;

const CONTROLLER_ADDRESS: u8 = 2;
const FIRST_NODE: u8 = 11;
const FIRST_GUEST: u8 = 180;
const FIRST_BARE: u8 = 200;
const MOST_NODES: usize = (FIRST_GUEST - FIRST_NODE) as usize;
const MOST_BARE: usize = 50;

/// What is wrong with the names that were asked for.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// The rig's name is not usable as part of names of namespaces and cgroups.
    #[error("the rig's name {0:?} must be 1 to 12 of a-z 0-9 (it becomes the first part of its namespaces' names)")]
    RigName(String),
    /// A host's name is not a DNS label.
    #[error("the host's name {0:?} must be a DNS label: 1 to 63 of a-z 0-9 -, not beginning or ending with -")]
    HostName(String),
    /// `net` and `ctl` are taken.
    #[error("the host's name {0:?} is taken by the rig itself (net is the switch, ctl the controller)")]
    Reserved(String),
    /// The same host twice.
    #[error("the host {0:?} is named twice")]
    Twice(String),
    /// No node at all.
    #[error("a rig needs at least one node (--nodes a,b)")]
    NoNodes,
    /// More hosts than addresses.
    #[error("at most {MOST_NODES} nodes and {MOST_BARE} bare hosts fit into the rig's network")]
    TooMany,
    /// No such host.
    #[error("the rig {rig:?} has no host {host:?}; it has: {known}")]
    Unknown {
        /// The rig.
        rig: String,
        /// Who was asked for.
        host: String,
        /// Who is there.
        known: String,
    },
}

/// What a host is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs `opencluster-controller`.
    Controller,
    /// Runs `opencluster-node`.
    Node,
    /// On the same switch, without Opencluster: intruders and positive controls.
    Bare,
}

/// One host of a rig.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Its name, a DNS label.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Its network namespace, as `ip netns list` shows it.
    pub netns: String,
    /// Its end of the link at the switch.
    pub port: String,
    /// Its IPv4 address, /24.
    pub v4: Ipv4Addr,
    /// Its IPv6 address, /64.
    pub v6: Ipv6Addr,
}

impl Host {
    /// Both addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// A rig: its name and its hosts, the controller first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The rig's name.
    pub rig: String,
    /// Everybody on the switch.
    pub hosts: Vec<Host>,
}

impl Layout {
    /// Lays out a rig of a controller, `nodes` and `bare` hosts.
    pub fn new(rig: &str, nodes: &[String], bare: &[String]) -> Result<Self, LayoutError> {
        check_rig_name(rig)?;
        if nodes.is_empty() {
            return Err(LayoutError::NoNodes);
        }
        if nodes.len() > MOST_NODES || bare.len() > MOST_BARE {
            return Err(LayoutError::TooMany);
        }
        let mut hosts = vec![host(rig, CONTROLLER, Role::Controller, CONTROLLER_ADDRESS, 0)];
        let nodes = nodes.iter().zip(FIRST_NODE..).map(|(name, address)| (name, Role::Node, address));
        let bare = bare.iter().zip(FIRST_BARE..).map(|(name, address)| (name, Role::Bare, address));
        for (name, role, address) in nodes.chain(bare) {
            check_host_name(name)?;
            if hosts.iter().any(|host| host.name == *name) {
                return Err(LayoutError::Twice(name.clone()));
            }
            hosts.push(host(rig, name, role, address, hosts.len()));
        }
        Ok(Self { rig: rig.to_owned(), hosts })
    }

    /// The host of that name.
    pub fn host(&self, name: &str) -> Result<&Host, LayoutError> {
        self.hosts.iter().find(|host| host.name == name).ok_or_else(|| LayoutError::Unknown {
            rig: self.rig.clone(),
            host: name.to_owned(),
            known: self.hosts.iter().map(|host| host.name.as_str()).collect::<Vec<_>>().join(", "),
        })
    }

    /// The hosts that run `opencluster-node`.
    pub fn nodes(&self) -> impl Iterator<Item = &Host> {
        self.hosts.iter().filter(|host| host.role == Role::Node)
    }

    /// The controller's host.
    pub fn controller(&self) -> &Host {
        &self.hosts[0]
    }
}

/// Refuses names that could not be part of the names of namespaces, or that could be confused with another rig's:
/// there is no dash in a rig's name, so `oc-a-net` can only be the host `a-net` of the rig `oc`.
pub fn check_rig_name(name: &str) -> Result<(), LayoutError> {
    let good = (1..=12).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if good { Ok(()) } else { Err(LayoutError::RigName(name.to_owned())) }
}

fn check_host_name(name: &str) -> Result<(), LayoutError> {
    let label = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let good =
        (1..=63).contains(&name.len()) && name.bytes().all(label) && !name.starts_with('-') && !name.ends_with('-');
    if !good {
        return Err(LayoutError::HostName(name.to_owned()));
    }
    if [SWITCH, CONTROLLER].contains(&name) {
        return Err(LayoutError::Reserved(name.to_owned()));
    }
    Ok(())
}

/// A node of a rig that is a virtual machine, not a namespace: what is its own hangs on the switch. `index` is from 0.
pub fn guest(rig: &str, name: &str, index: u8) -> Host {
    let host = host(rig, name, Role::Node, FIRST_GUEST.saturating_add(index), usize::from(index));
    Host { netns: netns(rig, SWITCH), port: format!("tap-{name}"), ..host }
}

/// The namespace of a host of a rig.
pub fn netns(rig: &str, host: &str) -> String {
    format!("{rig}-{host}")
}

/// The cgroup of a host of a rig, relative to the cgroup2 mount.
pub fn cgroup(rig: &str, host: &str) -> String {
    format!("{}/{host}", rig_cgroup(rig))
}

/// The cgroup of a rig, relative to the cgroup2 mount.
pub fn rig_cgroup(rig: &str) -> String {
    format!("{ALL_RIGS}/{rig}")
}

/// The cgroup that holds all rigs.
pub const ALL_RIGS: &str = "opencluster-rig";

fn host(rig: &str, name: &str, role: Role, address: u8, index: usize) -> Host {
    // The kernel allows 15 characters; a longer name is replaced by its number.
    let port = format!("to-{name}");
    let port = if port.len() <= 15 { port } else { format!("to-{index}") };
    // The digits are the same in both families to the eye: 10.88.0.11 and fd88::11.
    let last = u16::from_str_radix(&address.to_string(), 16).expect("decimal digits are hexadecimal digits");
    Host {
        name: name.to_owned(),
        role,
        netns: netns(rig, name),
        port,
        v4: Ipv4Addr::new(10, 88, 0, address),
        v6: Ipv6Addr::new(0xfd88, 0, 0, 0, 0, 0, 0, last),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn addresses_and_names_are_the_contracted_ones() {
        let layout = Layout::new("oc", &names(&["a", "b"]), &names(&["x"])).expect("layout");
        let shown: Vec<_> = layout.hosts.iter().map(|host| format!("{} {} {}", host.netns, host.v4, host.v6)).collect();
        assert_eq!(
            shown,
            [
                "oc-ctl 10.88.0.2 fd88::2",
                "oc-a 10.88.0.11 fd88::11",
                "oc-b 10.88.0.12 fd88::12",
                "oc-x 10.88.0.200 fd88::200"
            ]
        );
    }

    #[test]
    fn names_that_would_collide_or_break_are_refused() {
        let layout = |rig: &str, nodes: &[&str]| Layout::new(rig, &names(nodes), &[]);
        assert!(matches!(layout("oc-a", &["a"]), Err(LayoutError::RigName(_))));
        assert!(matches!(layout("", &["a"]), Err(LayoutError::RigName(_))));
        assert!(matches!(layout("oc", &["net"]), Err(LayoutError::Reserved(_))));
        assert!(matches!(layout("oc", &["a", "a"]), Err(LayoutError::Twice(_))));
        assert!(matches!(layout("oc", &["../a"]), Err(LayoutError::HostName(_))));
        assert!(matches!(layout("oc", &[]), Err(LayoutError::NoNodes)));
    }

    #[test]
    fn a_long_host_name_still_gets_a_port() {
        let layout = Layout::new("oc", &names(&["a-very-long-name-for-a-node"]), &[]).expect("layout");
        assert_eq!(layout.hosts[1].port, "to-1");
    }
}
