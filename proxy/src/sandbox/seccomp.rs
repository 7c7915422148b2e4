//! The system calls that each kind of thread may make, each with its reason. Anything else kills the process: the node
//! daemon starts a new one, and the access log and the audit log show that it happened.
//!
//! Opening files is answered with EACCES instead: the allocator and the panic handler try to, and do without.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// Not for this architecture.
    #[error("seccomp: no list of system calls for this architecture")]
    Architecture,
    /// The filter cannot be built.
    #[error("seccomp filter: {0}")]
    Build(#[from] seccompiler::BackendError),
    /// The kernel refused it.
    #[error("seccomp: {0}")]
    Apply(#[from] seccompiler::Error),
}

/// The kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Carries flows.
    Worker,
    /// Talks to the node daemon and on the admin socket.
    Control,
    /// Writes the access log.
    Log,
}

/// What every thread needs to live.
const COMMON: &[libc::c_long] = &[
    libc::SYS_futex,           // locks, parking, channels between threads
    libc::SYS_close,           // descriptors that are dropped
    libc::SYS_write,           // log lines; eventfd wake-ups of other threads' runtimes
    libc::SYS_writev,          // the same, gathered
    libc::SYS_munmap,          // the allocator gives memory back
    libc::SYS_mremap,          // the allocator grows large blocks
    libc::SYS_brk,             // the allocator's main heap
    libc::SYS_madvise,         // the allocator gives parts back; a thread's stack when it ends
    libc::SYS_clock_gettime,   // where the vDSO cannot answer
    libc::SYS_getrandom,       // keys, nonces, hash seeds
    libc::SYS_sched_yield,     // spinning locks
    libc::SYS_rt_sigprocmask,  // thread start and end, abort
    libc::SYS_rt_sigaction,    // abort
    libc::SYS_rt_sigreturn,    // the end of a signal handler
    libc::SYS_sigaltstack,     // the stack overflow handler of each thread
    libc::SYS_restart_syscall, // after SIGSTOP and SIGCONT
    libc::SYS_gettid,          // abort
    libc::SYS_getpid,          // abort; fork detection of the random number generator
    libc::SYS_tgkill,          // abort
    libc::SYS_exit,            // the end of a thread
    libc::SYS_exit_group,      // the end of the process
];

/// Event loops on sockets.
const SOCKETS: &[libc::c_long] = &[
    libc::SYS_epoll_pwait, // waiting
    libc::SYS_epoll_ctl,   // descriptors come and go
    libc::SYS_read,        // eventfd and sockets
    libc::SYS_recvfrom,    // sockets
    libc::SYS_sendto,      // sockets
    libc::SYS_recvmsg,     // sockets, with passed descriptors
    libc::SYS_sendmsg,     // sockets
    libc::SYS_accept4,     // new connections
    libc::SYS_getsockopt,  // SO_ERROR; SO_ORIGINAL_DST
    libc::SYS_shutdown,    // half-close
    libc::SYS_fcntl,       // duplicates of descriptors, nonblocking mode
];

/// What only workers need.
const WORKER: &[libc::c_long] = &[
    libc::SYS_readv,       // an application's data into the places of several records
    libc::SYS_connect,     // to other proxies and to applications
    libc::SYS_setsockopt,  // TCP_NODELAY, SO_LINGER, keepalive
    libc::SYS_getsockname, // the address that a connection was captured on
    libc::SYS_getpeername, // whether a connection is established
    libc::SYS_getrusage,   // whether others want the processor
];

/// What only the control thread needs.
const CONTROL: &[libc::c_long] = &[
    libc::SYS_getsockname, // the admin socket's connections
];

/// Answered with EACCES.
const FILES: &[libc::c_long] = &[
    libc::SYS_openat, // glibc's allocator asks for overcommit_memory; the panic handler for debug information
    libc::SYS_readlinkat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getcwd, // the panic handler shortens paths
];

/// Confines the calling thread, and those that it starts.
pub fn apply(thread: Thread) -> Result<(), SeccompError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(|_| SeccompError::Architecture)?;
    let denied = FILES.iter().map(|call| (*call, Vec::new())).collect();
    let files =
        SeccompFilter::new(denied, SeccompAction::Allow, SeccompAction::Errno(libc::EACCES as u32), architecture)?;
    let allowed = SeccompFilter::new(rules(thread)?, SeccompAction::KillProcess, SeccompAction::Allow, architecture)?;
    // Of several filters' answers the strictest counts. The one that also forbids further filters comes last.
    let (files, allowed) = (BpfProgram::try_from(files)?, BpfProgram::try_from(allowed)?);
    seccompiler::apply_filter(&files)?;
    seccompiler::apply_filter(&allowed)?;
    Ok(())
}

fn rules(thread: Thread) -> Result<BTreeMap<i64, Vec<SeccompRule>>, SeccompError> {
    let own = match thread {
        Thread::Worker => [SOCKETS, WORKER].concat(),
        Thread::Control => [SOCKETS, CONTROL].concat(),
        Thread::Log => Vec::new(),
    };
    let unconditional = COMMON.iter().chain(FILES).chain(&own).copied();
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = unconditional.map(|call| (call, Vec::new())).collect();
    #[cfg(target_arch = "x86_64")]
    if thread != Thread::Log {
        rules.insert(libc::SYS_epoll_wait, Vec::new());
    }
    // Memory: never executable.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![SeccompRule::new(vec![masked(2, libc::PROT_EXEC as u64, 0)?])?]);
    }
    if thread == Thread::Worker {
        // TCP over IPv4 and IPv6, and nothing else.
        let tcp = |family: libc::c_int| {
            Ok::<_, SeccompError>(SeccompRule::new(vec![
                equal(0, family as u64)?,
                masked(1, 0xF, libc::SOCK_STREAM as u64)?,
            ])?)
        };
        rules.insert(libc::SYS_socket, vec![tcp(libc::AF_INET)?, tcp(libc::AF_INET6)?]);
        // FIONBIO, by which the standard library sets nonblocking mode.
        rules.insert(libc::SYS_ioctl, vec![SeccompRule::new(vec![equal(1, libc::FIONBIO)?])?]);
    } else if thread == Thread::Control {
        rules.insert(libc::SYS_ioctl, vec![SeccompRule::new(vec![equal(1, libc::FIONBIO)?])?]);
    }
    Ok(rules)
}

fn equal(argument: u8, value: u64) -> Result<SeccompCondition, SeccompError> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, SeccompError> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value)?)
}
