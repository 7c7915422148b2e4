//! System calls that a workload does not get. A deny-list: workloads are any software, so what is not known to lead
//! around the proxy or out of the sandbox is allowed. Each line has its reason.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Why the filter is not in force.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SeccompError {
    #[error("cannot make the system call filter: {0}")]
    Build(#[from] BackendError),
    #[error("cannot put the system call filter in force: {0}")]
    Apply(#[from] seccompiler::Error),
}

/// Denied whatever the arguments.
const DENIED: &[libc::c_long] = &[
    // Programs in the kernel: sockets' traffic could be redirected and memory read.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    // Opens sockets (and more) without the socket call that is looked at below.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Other processes' memory, registers and descriptors: those of another workload of the same user, for example.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // Another network namespace has other rules; a user namespace has all capabilities in it.
    libc::SYS_setns,
    libc::SYS_unshare,
    // What the read-only cgroups and the hidden sockets rest on.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_mount_setattr,
    // Files by handle, around the mounts.
    libc::SYS_open_by_handle_at,
    // Another kernel, or more of this one.
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    // The host's storage, accounting and clock: the lease is counted in time.
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    // Keys are not in namespaces: another workload's could be found.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // A favourite of kernel exploits, needed by nothing that serves.
    libc::SYS_userfaultfd,
];

/// Direct access to hardware ports exists on this architecture only.
#[cfg(target_arch = "x86_64")]
const DENIED_HERE: &[libc::c_long] = &[libc::SYS_iopl, libc::SYS_ioperm];
#[cfg(not(target_arch = "x86_64"))]
const DENIED_HERE: &[libc::c_long] = &[];

/// The x32 numbers of what is denied above: they count as the same architecture.
#[cfg(target_arch = "x86_64")]
const X32: i64 = 0x4000_0000;
/// ptrace, kexec_load, process_vm_readv, process_vm_writev have numbers of their own there.
#[cfg(target_arch = "x86_64")]
const DENIED_X32: &[i64] = &[521, 528, 539, 540];

/// Puts both filters in force for this process and everything that it becomes or starts.
pub(super) fn apply() -> Result<(), SeccompError> {
    for program in programs()? {
        seccompiler::apply_filter(&program)?;
    }
    Ok(())
}

fn programs() -> Result<[BpfProgram; 2], SeccompError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let mut denied: BTreeMap<i64, Vec<SeccompRule>> =
        DENIED.iter().chain(DENIED_HERE).map(|call| (*call, Vec::new())).collect();
    denied.insert(libc::SYS_socket, sockets()?);
    denied.insert(libc::SYS_clone, namespaces()?);
    denied.insert(libc::SYS_ioctl, terminals()?);
    #[cfg(target_arch = "x86_64")]
    {
        let x32: Vec<_> = denied.iter().map(|(call, rules)| (call | X32, rules.clone())).collect();
        denied.extend(x32);
        denied.extend(DENIED_X32.iter().map(|call| (call | X32, Vec::new())));
    }
    // clone3 hides its flags in memory. libc takes 'not implemented' as advice to use clone.
    let missing = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    Ok([filter(denied, libc::EPERM, architecture)?, filter(missing, libc::ENOSYS, architecture)?])
}

fn filter(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    errno: i32,
    architecture: TargetArch,
) -> Result<BpfProgram, SeccompError> {
    let filter =
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno.unsigned_abs()), architecture)?;
    Ok(filter.try_into()?)
}

/// Only sockets that the packet filter sees: of TCP, UDP and ICMP echo in both families, Unix, and routing netlink (libc
/// lists interfaces by it). Not AF_PACKET and AF_XDP (around the hooks), AF_VSOCK (to the hypervisor), AF_BLUETOOTH,
/// AF_ALG, AF_KEY, AF_RDS, AF_TIPC, AF_SMC (TCP in disguise) or whatever comes next.
fn sockets() -> Result<Vec<SeccompRule>, SeccompError> {
    const SOCK_PACKET: i32 = 10;
    let family = |operation, family: i32| condition(0, operation, family);
    let known = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
    let unknown = known.into_iter().map(|known| family(SeccompCmpOp::Ne, known)).collect::<Result<_, _>>()?;
    let mut rules = vec![
        SeccompRule::new(unknown)?,
        SeccompRule::new(vec![
            family(SeccompCmpOp::Eq, libc::AF_NETLINK)?,
            condition(2, SeccompCmpOp::Ne, libc::NETLINK_ROUTE)?,
        ])?,
    ];
    // Raw packets, also under the name that packet sockets had in Linux 2.0.
    for kind in [libc::SOCK_RAW, SOCK_PACKET] {
        for internet in [libc::AF_INET, libc::AF_INET6] {
            const KIND: u64 = 0xf;
            rules.push(SeccompRule::new(vec![
                family(SeccompCmpOp::Eq, internet)?,
                condition(1, SeccompCmpOp::MaskedEq(KIND), kind)?,
            ])?);
        }
    }
    Ok(rules)
}

fn namespaces() -> Result<Vec<SeccompRule>, SeccompError> {
    let flags = [
        libc::CLONE_NEWNS,
        libc::CLONE_NEWCGROUP,
        libc::CLONE_NEWUTS,
        libc::CLONE_NEWIPC,
        libc::CLONE_NEWUSER,
        libc::CLONE_NEWPID,
        libc::CLONE_NEWNET,
    ];
    flags
        .into_iter()
        .map(|flag| Ok(SeccompRule::new(vec![condition(0, SeccompCmpOp::MaskedEq(flag as u64), flag)?])?))
        .collect()
}

/// Typing into the terminal of whoever started us (TIOCSTI, TIOCLINUX).
fn terminals() -> Result<Vec<SeccompRule>, SeccompError> {
    const TIOCSTI: i32 = 0x5412;
    const TIOCLINUX: i32 = 0x541c;
    [TIOCSTI, TIOCLINUX]
        .into_iter()
        .map(|request| Ok(SeccompRule::new(vec![condition(1, SeccompCmpOp::Eq, request)?])?))
        .collect()
}

fn condition(argument: u8, operation: SeccompCmpOp, value: i32) -> Result<SeccompCondition, SeccompError> {
    // The kernel reads these arguments as 32 bits, so that is what is compared.
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operation, u64::from(value.cast_unsigned()))?)
}
