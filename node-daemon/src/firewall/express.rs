//! The one way past the egress hook that an unprivileged kernel offers: AF_XDP sockets in copy mode hand their frames to the
//! network device itself. A queue of a device serves one such socket at a time, so the daemon takes all of them.
//!
//! Nothing is ever sent or received here. Without the daemon (killed, or before it starts) the queues are free again: see
//! the known issues in `docs/security.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, poll};
use rustix::io::Errno;
use rustix::net::xdp::{SocketAddrXdp, SocketAddrXdpFlags, XdpUmemReg, XdpUmemRegFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};

/// The smallest piece of memory that the kernel takes for frames: one page, aligned.
const PAGE: usize = 4096;

/// More queues than network devices have.
const MAX_QUEUES: u32 = 1024;

/// The queues of a socket that was closed become free a little later.
const PATIENCE: Duration = Duration::from_secs(1);

/// The queues of all guarded interfaces.
#[derive(Debug, Default)]
pub(super) struct Express {
    /// By the interface's index: an interface that was removed and made again has another.
    taken: BTreeMap<u32, Vec<Place>>,
    /// A kernel without AF_XDP has nothing to take.
    absent: bool,
}

/// One queue, taken. The memory is the socket's: it must outlive it.
#[derive(Debug)]
pub(super) struct Place {
    _socket: OwnedFd,
    _memory: Vec<u8>,
}

impl Express {
    /// Takes every queue of these interfaces that is not ours yet, and lets go of those of others.
    pub(super) fn occupy(&mut self, interfaces: &BTreeSet<String>) -> io::Result<()> {
        let mut wanted = BTreeSet::new();
        for name in interfaces {
            match nix::net::if_::if_nametoindex(name.as_str()) {
                Ok(index) => drop(wanted.insert(index)),
                // Gone since it was listed.
                Err(nix::errno::Errno::ENODEV | nix::errno::Errno::ENXIO) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.taken.retain(|index, _| wanted.contains(index));
        for index in wanted {
            self.occupy_all(index)?;
        }
        Ok(())
    }

    fn occupy_all(&mut self, interface: u32) -> io::Result<()> {
        let places = self.taken.entry(interface).or_default();
        while !self.absent && (places.len() as u32) < MAX_QUEUES {
            match take(interface, places.len() as u32) {
                Ok(place) => places.push(place),
                Err(Errno::AFNOSUPPORT) => self.absent = true,
                // There is no such queue, or no such interface any more, or frames cannot be handed to it in this way.
                Err(Errno::INVAL | Errno::NODEV | Errno::OPNOTSUPP) => break,
                Err(error) => {
                    let queue = places.len();
                    return Err(io::Error::new(
                        error.kind(),
                        format!(
                            "cannot take queue {queue} of interface {interface}, which AF_XDP could send by: {error}"
                        ),
                    ));
                }
            }
        }
        Ok(())
    }
}

fn take(interface: u32, queue: u32) -> Result<Place, Errno> {
    let started = Instant::now();
    loop {
        match try_to_take(interface, queue) {
            Err(Errno::BUSY) if started.elapsed() < PATIENCE => {
                poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 20_000_000 }))?;
            }
            outcome => return outcome,
        }
    }
}

pub(super) fn try_to_take(interface: u32, queue: u32) -> Result<Place, Errno> {
    const SMALLEST_RING: u32 = 1;
    let socket = socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    let memory = vec![0_u8; 2 * PAGE];
    let region = XdpUmemReg {
        addr: (memory.as_ptr() as usize).next_multiple_of(PAGE) as u64,
        len: PAGE as u64,
        chunk_size: PAGE as u32,
        headroom: 0,
        flags: XdpUmemRegFlags::empty(),
        tx_metadata_len: 0,
    };
    sockopt::set_xdp_umem_reg(&socket, region)?;
    sockopt::set_xdp_umem_fill_ring_size(&socket, SMALLEST_RING)?;
    sockopt::set_xdp_umem_completion_ring_size(&socket, SMALLEST_RING)?;
    sockopt::set_xdp_tx_ring_size(&socket, SMALLEST_RING)?;
    bind(&socket, &SocketAddrXdp::new(SocketAddrXdpFlags::XDP_COPY, interface, queue))?;
    Ok(Place { _socket: socket, _memory: memory })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r30_every_queue_is_taken_and_let_go() {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("run the tests as root");
        let made = "ip link add v0 numtxqueues 3 numrxqueues 3 type veth peer name v1";
        assert!(std::process::Command::new("sh").args(["-c", made]).status().expect("sh").success());
        let interface = nix::net::if_::if_nametoindex("v0").expect("v0");
        assert!(try_to_take(interface, 0).is_ok(), "the positive control: it is free, and AF_XDP works");

        let mut express = Express::default();
        let guarded: BTreeSet<_> = ["v0".to_owned(), "v1".to_owned()].into();
        express.occupy(&guarded).expect("occupy");
        assert_eq!(express.taken[&interface].len(), 3);
        for queue in 0..3 {
            assert_eq!(try_to_take(interface, queue).expect_err("taken"), Errno::BUSY);
        }
        express.occupy(&guarded).expect("nothing is left to take");
        // Somebody else's is an error, not a silence.
        express.occupy(&BTreeSet::new()).expect("let go");
        let foreign = take(interface, 1).expect("free again");
        let error = express.occupy(&guarded).expect_err("queue 1 is another's");
        assert!(error.to_string().contains("queue 1"), "{error}");
        drop(foreign);
        express.occupy(&guarded).expect("now it is free");
    }
}
