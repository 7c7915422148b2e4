use super::enforcer::Enforcer;
use super::policy::*;
use crate::cgroup::Cgroup;
use std::collections::BTreeMap;

#[test]
fn listing() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    std::process::Command::new("ip")
        .args(["link", "add", "eth0", "type", "veth", "peer", "name", "eth1"])
        .status()
        .unwrap();
    let mut e = Enforcer::new(None).unwrap();
    let serving = Serving {
        daemon: Cgroup { id: 11, level: 2 },
        proxy: Cgroup { id: 12, level: 2 },
        controllers: ["10.0.0.2:7443".parse().expect("address"), "[fd00::2]:7443".parse().expect("address")].into(),
        tunnel_port: Some(15443),
        captures: BTreeMap::from([(
            "default/a".to_owned(),
            Capture { cgroup: Cgroup { id: 13, level: 3 }, port: FIRST_CAPTURE_PORT },
        )]),
    };
    e.apply(Posture::Serving(serving.clone())).unwrap();
    e.renew(crate::clock::boottime() + 3_000_000_000).unwrap();
    e.apply(Posture::Serving(serving)).unwrap();
    println!("{:?}", e.verify().unwrap());
    e.renew(crate::clock::boottime() + 3_000_000_000).unwrap();
    println!("{:?}", e.verify().unwrap());
    std::process::Command::new("nft").args(["list", "ruleset"]).status().unwrap();
    std::process::Command::new("nft").args(["delete", "table", "inet", "opencluster"]).status().unwrap();
    std::process::Command::new("nft").args(["flush", "ruleset"]).status().unwrap();
    println!("{:?}", e.verify().unwrap());
    e.apply(Posture::Closed).unwrap();
    std::process::Command::new("nft").args(["list", "ruleset"]).status().unwrap();
}
