//! The generation of this virtual machine: a hypervisor changes it when the machine goes on from a snapshot.
//!
//! The kernel reads it (VMGENID), reseeds its random numbers, and says so in its log; there is no other sign of it in user
//! space on Linux 6.12. Where there is no such device, nothing is ever said, and nonces and clocks must do alone.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;

/// What the kernel's random number generator says.
const FORK: &str = "crng reseeded due to virtual machine fork";

/// One record of the kernel's log is at most this long.
const RECORD: usize = 8192;

/// Whether the kernel's log is being followed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watching(Arc<AtomicBool>);

impl Watching {
    /// Now.
    pub(crate) fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Follows the kernel's log on a thread of its own, from now on, for as long as somebody listens.
pub(crate) fn watch(forks: mpsc::Sender<String>) -> Watching {
    let watching = Watching::default();
    let on = watching.clone();
    let watcher = std::thread::Builder::new().name("generation".to_owned()).spawn(move || {
        let followed = open().and_then(|log| {
            on.0.store(true, Ordering::Relaxed);
            follow(log, &forks)
        });
        on.0.store(false, Ordering::Relaxed);
        if let Err(error) = followed {
            tracing::warn!(%error, "changes of this machine's generation are not seen: the kernel's log cannot be read");
        }
    });
    if let Err(error) = watcher {
        tracing::warn!(%error, "changes of this machine's generation are not seen: no thread to watch them");
    }
    watching
}

fn open() -> io::Result<File> {
    let mut log = File::open("/dev/kmsg")?;
    log.seek(SeekFrom::End(0))?;
    Ok(log)
}

fn follow(mut log: impl Read, forks: &mpsc::Sender<String>) -> io::Result<()> {
    let mut record = [0; RECORD];
    loop {
        match log.read(&mut record) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                if let Some(message) = kernel_message(&record[..length])
                    && message.contains(FORK)
                    && forks.blocking_send(message).is_err()
                {
                    return Ok(());
                }
            }
            // Records were overwritten before they were read: the next read goes on with the oldest there is.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The text of a record (`priority,sequence,time,flags;text`) that the kernel itself has written. What user space writes
/// there has another facility: nobody can sever a node with `echo`.
fn kernel_message(record: &[u8]) -> Option<String> {
    let (head, text) = record.split_at(record.iter().position(|byte| *byte == b';')?);
    let priority: u32 = std::str::from_utf8(head).ok()?.split(',').next()?.parse().ok()?;
    let text = text[1..].split(|byte| *byte == b'\n').next()?;
    (priority >> 3 == 0).then(|| String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each read gives one record, as from the kernel.
    struct Log(std::vec::IntoIter<io::Result<&'static str>>);

    impl Read for Log {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let record = self.0.next().unwrap_or(Ok(""))?;
            buffer[..record.len()].copy_from_slice(record.as_bytes());
            Ok(record.len())
        }
    }

    #[test]
    fn r13_a_fork_is_seen_and_only_the_kernel_is_believed() {
        let lost = io::Error::from(io::ErrorKind::BrokenPipe);
        let records = vec![
            Ok("6,339,5140900,-;NET: Registered PF_VSOCK protocol family\n"),
            Ok("12,340,5140950,-;crng reseeded due to virtual machine fork\n"),
            Err(lost),
            Ok("garbage"),
            Ok("5,341,5141000,-;random: crng reseeded due to virtual machine fork\n SUBSYSTEM=acpi\n"),
            Ok("6,342,5141001,-;something else\n"),
        ];
        let (sender, mut forks) = mpsc::channel(4);
        follow(Log(records.into_iter()), &sender).expect("to the end");
        drop(sender);
        assert_eq!(forks.blocking_recv().as_deref(), Some("random: crng reseeded due to virtual machine fork"));
        assert_eq!(forks.blocking_recv(), None);
    }
}
