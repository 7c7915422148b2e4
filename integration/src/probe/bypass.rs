//! Frames past the kernel's queues: sockets whose packets do not pass the hooks that ordinary ones do.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, ensure};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use rustix::net::xdp::{
    SocketAddrXdp, SocketAddrXdpFlags, XDP_PGOFF_TX_RING, XdpDesc, XdpDescOptions, XdpUmemReg, XdpUmemRegFlags,
};
use rustix::net::{AddressFamily, SendFlags, SocketType, bind, send, socket, sockopt};

const FRAME: usize = 4096;
const RING: u32 = 4;
/// More than the ring with its header takes.
const RING_MEMORY: usize = 4096;

/// Lets a packet socket's frames pass the queueing discipline by.
pub(crate) fn bypass_queues(socket: &OwnedFd) -> anyhow::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an int, and `on` lives through the call.
    let failed = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_QDISC_BYPASS,
            ptr::from_ref(&on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    ensure!(failed == 0, "PACKET_QDISC_BYPASS: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Sends one frame by an AF_XDP socket in copy mode, through the interface's first queue.
pub(crate) fn send_by_xdp(interface: u32, frame: &[u8]) -> anyhow::Result<()> {
    ensure!(frame.len() <= FRAME, "a frame of {} bytes", frame.len());
    let memory = Memory::anonymous(FRAME)?;
    let socket = socket(AddressFamily::XDP, SocketType::RAW, None).context("XDP socket")?;
    let region = XdpUmemReg {
        addr: memory.start as u64,
        len: FRAME as u64,
        chunk_size: FRAME as u32,
        headroom: 0,
        flags: XdpUmemRegFlags::empty(),
        tx_metadata_len: 0,
    };
    sockopt::set_xdp_umem_reg(&socket, region).context("XDP_UMEM_REG")?;
    sockopt::set_xdp_umem_fill_ring_size(&socket, RING).context("XDP_UMEM_FILL_RING")?;
    sockopt::set_xdp_umem_completion_ring_size(&socket, RING).context("XDP_UMEM_COMPLETION_RING")?;
    sockopt::set_xdp_tx_ring_size(&socket, RING).context("XDP_TX_RING")?;
    let offsets = sockopt::xdp_mmap_offsets(&socket).context("XDP_MMAP_OFFSETS")?.tx;
    let ring = Memory::ring(&socket)?;
    let descriptor = XdpDesc { addr: 0, len: frame.len() as u32, options: XdpDescOptions::empty() };
    ensure!(offsets.desc as usize + size_of::<XdpDesc>() <= RING_MEMORY, "descriptors at {}", offsets.desc);
    ensure!(offsets.producer as usize + size_of::<u32>() <= RING_MEMORY, "the producer at {}", offsets.producer);
    // SAFETY: the frame fits into the memory, and descriptor and producer lie within the ring's mapping, aligned by the
    // kernel. The kernel reads them only after the producer has moved.
    unsafe {
        ptr::copy_nonoverlapping(frame.as_ptr(), memory.start.cast(), frame.len());
        ring.start.byte_add(offsets.desc as usize).cast::<XdpDesc>().write(descriptor);
        AtomicU32::from_ptr(ring.start.byte_add(offsets.producer as usize).cast()).store(1, Ordering::Release);
    }
    let address = SocketAddrXdp::new(SocketAddrXdpFlags::XDP_COPY, interface, 0);
    bind(&socket, &address).context("bind an XDP socket")?;
    send(&socket, &[], SendFlags::DONTWAIT).context("send by XDP")?;
    Ok(())
}

/// A mapping, unmapped when it is dropped.
struct Memory {
    start: *mut libc::c_void,
    length: usize,
}

impl Memory {
    fn anonymous(length: usize) -> anyhow::Result<Self> {
        // SAFETY: a new mapping where the kernel likes takes nobody's memory away.
        let start =
            unsafe { mmap_anonymous(ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) }?;
        Ok(Self { start, length })
    }

    fn ring(socket: impl AsFd) -> anyhow::Result<Self> {
        let length = RING_MEMORY;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: as above; the socket's ring is nobody else's.
        let start = unsafe { mmap(ptr::null_mut(), length, protection, flags, socket, XDP_PGOFF_TX_RING) }
            .context("map the XDP ring")?;
        Ok(Self { start, length })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by us, and no reference into it is left.
        if let Err(error) = unsafe { munmap(self.start, self.length) } {
            eprintln!("opencluster-probe: a mapping stays: {error}");
        }
    }
}
