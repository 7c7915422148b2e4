//! What a decision costs, at 100 and at 10,000 policies.
//!
//! ```text
//! cargo run --release -p opencluster-policy --example decide
//! ```
//!
//! 100,000 workloads; every policy is about its own service and has 10 sources: 6 workloads, one service, one namespace, one
//! node, one range of addresses (which holds half of the nodes). Flows go from random workloads to random ones, so that both
//! verdicts occur and little of what is looked up is in a cache; and both indexes are asked about the same flows. The two indexes take turns; medians are shown,
//! of this thread's processor time, so that a busy machine spoils less.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::process::ExitCode;
use std::time::Instant;

use opencluster_policy::index::{Flow, Index};
use opencluster_policy::resource::{
    Effect, From, Metadata, NodeSpec, Object, PolicySpec, Protocol, Resource, ServicePort, ServiceSpec, To,
    WorkloadSpec,
};
use opencluster_policy::snapshot::Snapshot;
use opencluster_policy::spiffe::{SpiffeError, SpiffeId, TrustDomain};

const WORKLOADS: u64 = 100_000;
const NAMESPACES: u64 = 100;
const NODES: u64 = 1000;
const FLOWS: usize = 100_000;
const ROUNDS: usize = 31;
const PORT: u16 = 9000;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), SpiffeError> {
    let domain = TrustDomain::parse("bench.test")?;
    let flows = flows(&domain)?;
    let mut contenders = Vec::new();
    for policies in [100, 10_000] {
        let snapshot = snapshot(policies);
        let before = Instant::now();
        let index = Index::compile(&domain, &snapshot);
        println!("{policies:>6} policies compiled in {} ms", before.elapsed().as_millis());
        contenders.push((policies, index, Vec::new(), 0));
    }
    for _ in 0..ROUNDS {
        for (_, index, times, allowed) in &mut contenders {
            let before = processor_time();
            *allowed = flows.iter().filter(|flow| black_box(index.decide(&flow.flow())).allowed()).count();
            times.push((processor_time() - before) / FLOWS as f64);
        }
    }
    // Of rounds that followed one another: what the machine does besides changes slower than that.
    let [(.., few, _), (.., many, _)] = &contenders[..] else { unreachable!("two indexes") };
    let mut ratios: Vec<f64> = many.iter().zip(few).map(|(many, few)| many / few).collect();
    for (policies, _, times, allowed) in &mut contenders {
        let [least, median, most] = spread(times);
        println!(
            "{policies:>6} policies: {median:.0} ns a decision ({least:.0} to {most:.0}); {allowed} of {FLOWS} allowed"
        );
    }
    let [least, median, most] = spread(&mut ratios);
    println!("ratio {median:.2} ({least:.2} to {most:.2})");
    Ok(())
}

/// The least, the median and the most.
fn spread(values: &mut [f64]) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [values[0], values[values.len() / 2], values[values.len() - 1]]
}

/// Nanoseconds that this thread has run.
fn processor_time() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

struct OwnedFlow {
    source: SpiffeId,
    source_address: IpAddr,
    destination: SpiffeId,
}

impl OwnedFlow {
    fn flow(&self) -> Flow<'_> {
        Flow {
            source: &self.source,
            source_address: self.source_address,
            destination: &self.destination,
            port: PORT,
            protocol: Protocol::Tcp,
        }
    }
}

fn flows(domain: &TrustDomain) -> Result<Vec<OwnedFlow>, SpiffeError> {
    let mut random = Random(7);
    let mut flows = Vec::with_capacity(FLOWS);
    for _ in 0..FLOWS {
        let destination = random.below(WORKLOADS);
        let source = random.below(WORKLOADS);
        // IDs of their own, as they come out of certificates: not the index's memory.
        let id = |number: u64| SpiffeId::workload(domain, &namespace(number), &workload(number));
        flows.push(OwnedFlow {
            source: id(source)?,
            source_address: address(source % NODES),
            destination: id(destination)?,
        });
    }
    Ok(flows)
}

fn snapshot(policies: u64) -> Snapshot {
    let mut resources = Vec::new();
    for node in 0..NODES {
        let spec = NodeSpec { addresses: vec![address(node)], tunnel_port: 15443, max_age: None };
        resources.push(Resource::Node(Object { metadata: metadata("", format!("n{node}")), spec }));
    }
    for number in 0..WORKLOADS {
        let spec = WorkloadSpec { nodes: vec![format!("n{}", number % NODES)], ports: Vec::new() };
        resources.push(Resource::Workload(Object { metadata: metadata(&namespace(number), workload(number)), spec }));
    }
    for policy in 0..policies {
        let backends = (0..WORKLOADS / policies).map(|replica| qualified(policy + replica * policies)).collect();
        let ports = vec![ServicePort { port: PORT, name: None, protocol: Protocol::Tcp }];
        let spec = ServiceSpec { ports, workloads: backends };
        resources.push(Resource::Service(Object { metadata: metadata("services", format!("s{policy}")), spec }));

        let mut from: Vec<From> = (0..6)
            .map(|rule| From {
                workload: Some(qualified(Random(policy * 10 + rule).below(WORKLOADS))),
                ..From::default()
            })
            .collect();
        from.extend([
            From { service: Some(format!("services/s{}", (policy + 1) % policies)), ..From::default() },
            From { namespace: Some(namespace(policy + 50)), ..From::default() },
            From { node: Some(format!("n{}", policy % NODES)), ..From::default() },
            From { cidr: "10.0.0.0/23".parse().ok(), ..From::default() },
        ]);
        let to = To { service: format!("services/s{policy}"), ports: Vec::new() };
        let spec = PolicySpec { to, from, action: Effect::Allow, dry_run: false };
        resources.push(Resource::Policy(Object { metadata: metadata("default", format!("p{policy}")), spec }));
    }
    Snapshot::new(1, resources)
}

fn workload(number: u64) -> String {
    format!("workload-{number}")
}

fn namespace(number: u64) -> String {
    format!("namespace-{}", number % NAMESPACES)
}

fn qualified(number: u64) -> String {
    format!("{}/{}", namespace(number), workload(number))
}

fn address(node: u64) -> IpAddr {
    Ipv4Addr::from_bits(0x0A00_0001 + node as u32).into()
}

fn metadata(namespace: &str, name: String) -> Metadata {
    Metadata { name, namespace: namespace.to_owned(), labels: BTreeMap::new(), resource_version: None }
}

/// splitmix64
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % limit
    }
}
