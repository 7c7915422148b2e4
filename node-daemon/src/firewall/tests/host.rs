//! Two hosts for one test: the test's thread is host A, a second thread is host B; each has a network namespace of its
//! own that ends with its thread. Processes of A are put into cgroups that end with the test.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use crate::cgroup::{self, Cgroup, Tree};
use crate::clock;
use crate::firewall::enforcer::Enforcer;
use crate::firewall::policy::{Capture, FIRST_CAPTURE_PORT, Posture, Serving};

pub(super) const A: [&str; 2] = ["10.99.0.1", "fd99::1"];
pub(super) const B: [&str; 2] = ["10.99.0.2", "fd99::2"];
pub(super) const TUNNEL: u16 = 15443;
pub(super) const CONTROLLER: u16 = 7443;

/// Longer than any connection that works takes here.
pub(super) const PATIENCE: Duration = Duration::from_millis(900);

pub(super) fn address(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse::<IpAddr>().expect("address"), port)
}

pub(super) fn shell(command: &str) -> bool {
    Command::new("sh").args(["-c", command]).stderr(Stdio::null()).status().expect("sh").success()
}

pub(super) fn output(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().expect("sh");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

type Task = Box<dyn FnOnce() + Send>;

/// Host B: runs what it is given, in its own namespace.
pub(super) struct Remote {
    tasks: SyncSender<Task>,
}

impl Remote {
    pub(super) fn run<T: Send + 'static>(&self, task: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, answered) = sync_channel(1);
        self.tasks.send(Box::new(move || answer.send(task()).expect("the test waits"))).expect("host B");
        answered.recv().expect("host B")
    }
}

pub(super) struct Hosts {
    pub(super) b: Remote,
    pub(super) base: PathBuf,
    pub(super) daemon: Cgroup,
    pub(super) proxy: Cgroup,
    pub(super) workload: Cgroup,
}

impl Hosts {
    /// Both hosts, connected, with nothing in the way yet; B echoes on the tunnel and controller ports and on port 80.
    pub(super) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        assert!(nix::unistd::geteuid().is_root(), "the firewall's tests make network namespaces: run them as root");
        unshare(CloneFlags::CLONE_NEWNET).expect("network namespace of host A");
        let (tasks, queue) = sync_channel::<Task>(8);
        let (ready, thread_id) = sync_channel(1);
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("network namespace of host B");
            ready.send(nix::unistd::gettid().as_raw()).expect("the test waits");
            while let Ok(task) = queue.recv() {
                task();
            }
        });
        let b = Remote { tasks };
        let thread_id = thread_id.recv().expect("host B");
        assert!(shell(&format!(
            "ip link set lo up && ip link add eth0 type veth peer name eth0 netns {thread_id} && \
             ip address add {}/24 dev eth0 && ip address add {}/64 dev eth0 nodad && ip link set eth0 up",
            A[0], A[1]
        )));
        b.run(|| {
            assert!(shell(&format!(
                "ip link set lo up && ip address add {}/24 dev eth0 && ip address add {}/64 dev eth0 nodad && \
                 ip link set eth0 up",
                B[0], B[1]
            )));
            for ip in B {
                for port in [TUNNEL, CONTROLLER, 80] {
                    echo(address(ip, port));
                }
            }
        });

        let name = format!("opencluster-test/{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let tree = Tree::new(std::path::Path::new(&name)).expect("cgroup2");
        let base = tree.daemon().parent().expect("base").to_owned();
        let create = |path: PathBuf| tree.create(&path).expect("cgroup");
        let (daemon, proxy, workload) =
            (create(tree.daemon()), create(tree.proxy()), create(tree.workload("default", "a")));
        let hosts = Self { b, base, daemon, proxy, workload };
        // The link is up on both ends once a connection has passed: the positive control of every test here.
        for ip in B {
            poll("the link to come up", || TcpStream::connect_timeout(&address(ip, 80), PATIENCE).is_ok());
        }
        hosts
    }

    pub(super) fn serving(&self) -> Serving {
        Serving {
            daemon: self.daemon,
            proxy: self.proxy,
            controllers: B.iter().map(|ip| address(ip, CONTROLLER)).collect(),
            tunnel_port: Some(TUNNEL),
            captures: BTreeMap::from([(
                "default/a".to_owned(),
                Capture { cgroup: self.workload, port: FIRST_CAPTURE_PORT },
            )]),
        }
    }

    /// The packet filter in force, with a long lease.
    pub(super) fn guarded(&self) -> Enforcer {
        let mut enforcer = Enforcer::new(None).expect("enforcer");
        enforcer.apply(Posture::Serving(self.serving())).expect("apply");
        lease(&mut enforcer, 60_000);
        enforcer
    }

    /// A process in a cgroup of host A that connects; `None` if it cannot.
    pub(super) fn connect(&self, cgroup: Option<&str>, ip: &str, port: u16) -> Option<Client> {
        let mut client = self.begin_to_connect(cgroup, ip, port);
        (client.line(PATIENCE).as_deref() == Some("connected")).then_some(client)
    }

    /// A process in a cgroup of host A that says `connected` once it is.
    pub(super) fn begin_to_connect(&self, cgroup: Option<&str>, ip: &str, port: u16) -> Client {
        let enter = cgroup
            .map_or(String::new(), |cgroup| format!("echo $$ > {}/cgroup.procs && ", self.base.join(cgroup).display()));
        // bash opens /dev/tcp itself; each line goes there and back.
        let script = format!(
            "{enter}exec 3<>/dev/tcp/{ip}/{port} && echo connected && \
             while read -r line; do echo \"$line\" >&3; if read -t 0.9 -r reply <&3; then echo \"$reply\"; \
             else echo timeout; fi; done"
        );
        let mut child = Command::new("timeout")
            .args(["--foreground", "30", "bash", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("bash");
        let input = child.stdin.take().expect("piped");
        let (lines, received) = sync_channel(64);
        let output = child.stdout.take().expect("piped");
        thread::spawn(move || forward(output, &lines));
        Client { child, input, received }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // Whatever the test left in its cgroups ends with it, the test's own process excepted: it is in none of them.
        cgroup::kill_all(&self.base).expect("kill");
        let directories = ["daemon", "proxy", "workloads/default.a", "workloads", ""];
        for directory in directories {
            let path = self.base.join(directory);
            poll("the cgroup to be empty", || cgroup::remove(&path).expect("remove"));
        }
        // The parent is shared with other tests: the last one removes it.
        if let Some(parent) = self.base.parent() {
            drop(fs::remove_dir(parent));
        }
    }
}

fn forward(output: ChildStdout, lines: &SyncSender<String>) {
    for line in BufReader::new(output).lines().map_while(Result::ok) {
        if lines.send(line).is_err() {
            return;
        }
    }
}

/// A process that holds a connection.
pub(super) struct Client {
    child: Child,
    input: ChildStdin,
    received: std::sync::mpsc::Receiver<String>,
}

impl Client {
    /// Whether a line comes back from the other end.
    pub(super) fn echoes(&mut self) -> bool {
        writeln!(self.input, "ping").expect("the client lives");
        self.line(PATIENCE * 2).as_deref() == Some("ping")
    }

    /// What the other end says by itself.
    pub(super) fn line(&mut self, patience: Duration) -> Option<String> {
        self.received.recv_timeout(patience).ok()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Its end is all the same, and it may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Echoes on this address, in the calling thread's namespace, until the process ends.
pub(super) fn echo(address: SocketAddr) {
    let listener = TcpListener::bind(address).expect("listen");
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..length]).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

pub(super) fn lease(enforcer: &mut Enforcer, milliseconds: u64) {
    enforcer.renew(clock::boottime() + milliseconds * 1_000_000).expect("renew");
}

pub(super) fn poll(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..500 {
        if done() {
            return;
        }
        pause(10);
    }
    panic!("waited in vain for {what}");
}

pub(super) fn pause(milliseconds: u64) {
    let (_keep, never) = sync_channel::<()>(1);
    never.recv_timeout(Duration::from_millis(milliseconds)).expect_err("nobody sends");
}
