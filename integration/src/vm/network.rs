//! A guest's link to the rig's switch: a tap device, and what the switch counts and loses on it.

use std::process::{Command, Stdio};

use super::error::VmError;
use crate::layout::{BRIDGE, TUNNEL_PORT};
use crate::netns;

/// A tap device in the switch's namespace. It goes with the namespace.
#[derive(Clone, Debug)]
pub struct Link {
    netns: String,
    tap: String,
}

/// What went over a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes, Ethernet headers not counted.
    pub bytes: u64,
}

impl Link {
    /// Makes it and connects it to the switch.
    pub(super) fn create(netns: &str, tap: &str) -> Result<Self, VmError> {
        netns::add_tap(netns, tap, BRIDGE)?;
        let link = Self { netns: netns.to_owned(), tap: tap.to_owned() };
        link.lose(0)?;
        Ok(link)
    }

    /// The device's name.
    pub(super) fn tap(&self) -> &str {
        &self.tap
    }

    /// From now on so many of a hundred packets are lost in each direction; counters begin anew.
    ///
    /// A guest's packets are counted after the loss, when they belong to a tunnel and carry data: what it forwarded.
    pub fn lose(&self, percent: u32) -> Result<(), VmError> {
        let Self { tap, .. } = self;
        let loss = if percent == 0 { String::new() } else { format!("numgen random mod 100 < {percent} drop") };
        // The largest headers of a TCP segment without data: 20 + 60 bytes, and 60 behind IPv6's own.
        let counted = ["sport", "dport"].map(|port| {
            format!(
                "  tcp {port} {TUNNEL_PORT} ip length > 80 counter\n  tcp {port} {TUNNEL_PORT} ip6 length > 60 counter\n"
            )
        });
        let counted = counted.concat();
        let rules = format!(
            "table netdev {tap}\ndelete table netdev {tap}\ntable netdev {tap} {{\n \
             chain from-guest {{ type filter hook ingress device {tap} priority 0;\n  {loss}\n{counted} }}\n \
             chain to-guest {{ type filter hook egress device {tap} priority 0;\n  {loss}\n }}\n}}\n"
        );
        let mut nft = self.nft();
        nft.args(["-f", "-"]);
        super::run_with_input(&mut nft, &rules).map(drop)
    }

    /// Nothing is lost any more, and counters begin anew.
    pub fn count_anew(&self) -> Result<(), VmError> {
        self.lose(0)
    }

    /// What the guest forwarded since [`Link::lose`]: packets of tunnels that carry data, sent by it.
    pub fn forwarded(&self) -> Result<Count, VmError> {
        let mut nft = self.nft();
        nft.args(["--json", "list", "chain", "netdev", &self.tap, "from-guest"]).stdin(Stdio::null());
        let text = super::run(&mut nft)?;
        count(&text).ok_or_else(|| VmError::Counter(String::from_utf8_lossy(&text).into_owned()))
    }

    fn nft(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", netns::path(&self.netns).display())).arg("nft");
        command
    }
}

/// The sum of the counters in what `nft --json` prints.
fn count(text: &[u8]) -> Option<Count> {
    let listing: serde_json::Value = serde_json::from_slice(text).ok()?;
    let mut sum = Count::default();
    let mut found = false;
    for object in listing["nftables"].as_array()? {
        for statement in object["rule"]["expr"].as_array().into_iter().flatten() {
            let counter = &statement["counter"];
            if let (Some(packets), Some(bytes)) = (counter["packets"].as_u64(), counter["bytes"].as_u64()) {
                sum.packets += packets;
                sum.bytes += bytes;
                found = true;
            }
        }
    }
    found.then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_summed_and_their_absence_is_noticed() {
        let text = br#"{"nftables":[{"metainfo":{}},{"rule":{"expr":[{"counter":{"packets":2,"bytes":300}}]}},
            {"rule":{"expr":[{"match":{}},{"counter":{"packets":1,"bytes":50}}]}}]}"#;
        assert_eq!(count(text), Some(Count { packets: 3, bytes: 350 }));
        assert_eq!(count(br#"{"nftables":[]}"#), None);
    }
}
