//! `opencluster-node run`, with a daemon that admits everybody: what a workload's process can no longer do.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

const PROGRAM: &str = env!("CARGO_BIN_EXE_opencluster-node");

/// A directory with a `node.sock` that answers as told.
struct Daemon {
    directory: PathBuf,
}

impl Daemon {
    fn answering(answer: &'static str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("opencluster-run-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        fs::create_dir(&directory).expect("directory");
        let listener = UnixListener::bind(directory.join("node.sock")).expect("socket");
        thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let mut request = String::new();
                BufReader::new(&stream).read_line(&mut request).expect("request");
                assert!(request.contains(r#""request":"admit""#), "{request}");
                stream.write_all(answer.as_bytes()).expect("answer");
            }
        });
        Self { directory }
    }

    fn admitting() -> Self {
        Self::answering("{\"answer\":\"admitted\"}\n")
    }

    fn run(&self, script: &str) -> Output {
        Command::new(PROGRAM)
            .args(["run", "--workload", "a", "--socket"])
            .arg(self.directory.join("node.sock"))
            .args(["--", "sh", "-c", script])
            .output()
            .expect("run")
    }

    /// The script's output, or why it failed.
    fn output(&self, script: &str) -> String {
        let output = self.run(script);
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.directory).expect("remove");
    }
}

fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
    u64::from_str_radix(line.trim(), 16).expect("hexadecimal")
}

#[test]
fn exit_codes_and_signals_are_the_commands_own() {
    let daemon = Daemon::admitting();
    assert_eq!(daemon.run("exit 7").status.code(), Some(7));
    assert_eq!(daemon.run("kill -TERM $$").status.signal(), Some(15));
    let missing = Command::new(PROGRAM)
        .args(["run", "--workload", "a", "--socket"])
        .arg(daemon.directory.join("node.sock"))
        .args(["--", "/nonexistent"])
        .status()
        .expect("run");
    assert_eq!(missing.code(), Some(127));
}

#[test]
fn a_refusal_is_shown_and_the_command_is_not_run() {
    let daemon =
        Daemon::answering("{\"answer\":\"refused\",\"reason\":\"no workload default/a: there are default/b\"}\n");
    let output = daemon.run("echo ran");
    assert_eq!(output.status.code(), Some(125));
    assert!(output.stdout.is_empty());
    assert!(String::from_utf8_lossy(&output.stderr).contains("there are default/b"));
}

#[test]
fn r30_a_workload_has_only_harmless_capabilities_and_can_get_no_more() {
    // CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID NET_BIND_SERVICE IPC_LOCK SYS_CHROOT SYS_NICE SYS_RESOURCE
    const KEPT: u64 = 0b1_1000_0100_0100_0100_1111_1011;
    let status = Daemon::admitting().output("cat /proc/self/status");
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(field(&status, set) & !KEPT, 0, "{set}");
    }
    for set in ["CapInh:", "CapAmb:"] {
        assert_eq!(field(&status, set), 0, "{set}");
    }
    assert_eq!(field(&status, "NoNewPrivs:"), 1);
    assert_eq!(field(&status, "Seccomp:"), 2);
}

#[test]
fn r30_a_root_workload_cannot_change_its_cgroup() {
    let script = "for file in $(awk '$3 ~ /^cgroup2?$/ { print $2 \"/cgroup.procs\" }' /proc/self/mounts); do \
                  test -e $file || exit 9; echo $$ > $file && echo escaped; done; exit 0";
    // The positive control: without `run` the same script writes.
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    assert!(mounts.contains(" cgroup2 "), "no cgroup2 to try it with");
    let control = Command::new("sh").args(["-c", &script.replace("echo $$ >", "test -w")]).output().expect("sh");
    assert!(String::from_utf8_lossy(&control.stdout).contains("escaped"));

    let daemon = Daemon::admitting();
    assert_eq!(daemon.output(script), "");
    assert_eq!(daemon.output("mkdir $(awk '$3 == \"cgroup2\" { print $2; exit }' /proc/self/mounts)/x; true"), "");
    for undo in ["umount", "mount -o remount,rw"] {
        let script = format!("{undo} $(awk '$3 == \"cgroup2\" {{ print $2; exit }}' /proc/self/mounts)");
        assert!(!daemon.run(&script).status.success(), "{undo}");
    }
}

/// A process of the host, of an ordinary user, that sees the cgroups writable. Dropped, it is killed.
struct Bystander(Child);

impl Bystander {
    fn start() -> Self {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", "echo; exec sleep 600"]);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("setpriv");
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().expect("stdout")).read_line(&mut line).expect("started");
        Self(child)
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.0.kill().expect("kill");
        self.0.wait().expect("wait");
    }
}

#[test]
fn r30_a_root_workload_gets_at_no_cgroup_through_another_process() {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let cgroups = mounts.lines().find(|line| line.contains(" cgroup2 ")).and_then(|line| line.split(' ').nth(1));
    let cgroups = cgroups.expect("a cgroup2 to try it with").trim_start_matches('/');
    let bystander = Bystander::start();
    // As the bystander's user into its root directory, and there root again.
    let script = format!(
        "perl -e '$) = 65534; $> = 65534; chdir(\"/proc/{}/root\") or die qq(no way in: $!\n); $> = 0;
         open(my $file, \">>\", \"{cgroups}/cgroup.procs\") or die qq(not writable: $!\n); print qq(escaped\n)'",
        bystander.0.id()
    );
    let control = Command::new("sh").args(["-c", &script]).output().expect("sh");
    assert_eq!(String::from_utf8_lossy(&control.stdout), "escaped\n", "the positive control");
    let output = Daemon::admitting().run(&script);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("no way in: Permission denied"), "{said}");
    // Moving files between directories, which a sandbox of this kind denies if nothing is said, works.
    let script =
        "d=$(mktemp -d); cd $d && mkdir a b && echo x > a/file && mv a/file b/ && ln b/file a/ && cat a/file; rm -r $d";
    assert_eq!(Daemon::admitting().output(script), "x\n");
}

#[test]
fn r30_the_daemons_sockets_are_out_of_a_workloads_sight() {
    let daemon = Daemon::admitting();
    let directory = daemon.directory.display();
    assert_eq!(daemon.output(&format!("ls -A {directory}")), "");
    assert!(!daemon.run(&format!("umount {directory}")).status.success());
    assert!(daemon.directory.join("node.sock").exists(), "hidden from the workload only");
}

#[test]
fn r30_a_workload_cannot_make_sockets_past_the_packet_filter() {
    // (family, type, protocol): packet, XDP, raw IPv4 and IPv6, netfilter netlink, vsock, the kernel's crypto, Bluetooth
    let script = r#"perl -e '
        for (
            ["tcp", 1, 2, 1, 0], ["udp6", 1, 10, 2, 0], ["unix", 1, 1, 1, 0], ["route", 1, 16, 3, 0],
            ["packet", 0, 17, 3, 0], ["packet, datagrams", 0, 17, 2, 0], ["old packet", 0, 2, 10, 0],
            ["xdp", 0, 44, 3, 0], ["raw", 0, 2, 3, 1], ["raw6", 0, 10, 3, 58], ["raw, flags", 0, 2, 3 | 02000000, 1],
            ["netfilter", 0, 16, 3, 12], ["vsock", 0, 40, 1, 0], ["alg", 0, 38, 5, 0], ["bluetooth", 0, 31, 3, 1]
        ) {
            my ($name, $wanted, @arguments) = @$_;
            my $made = socket(my $socket, $arguments[0], $arguments[1], $arguments[2]) ? 1 : 0;
            print "$name: $made\n" if $made != $wanted;
            print "$name: $!\n" if !$wanted && $! != 1;
        }'"#;
    assert_eq!(Daemon::admitting().output(script), "");
}

#[test]
fn r30_a_workload_cannot_leave_its_namespaces_or_look_into_others() {
    let daemon = Daemon::admitting();
    let own = std::process::id();
    for escape in [
        "unshare -n true".to_owned(),
        "unshare -U true".to_owned(),
        "unshare -m true".to_owned(),
        format!("nsenter -t {own} -n true"),
        format!("ls /proc/{own}/root/"),
        format!("cat /proc/{own}/environ"),
        "mount -t tmpfs none /mnt".to_owned(),
        "nft list ruleset".to_owned(),
        "ip link add x type veth".to_owned(),
    ] {
        let control = escape.replace("ip link add x type veth", "true").replace("mount -t tmpfs none /mnt", "true");
        assert!(Command::new("sh").args(["-c", &control]).output().expect("sh").status.success(), "control: {control}");
        assert!(!daemon.run(&escape).status.success(), "{escape}");
    }
    // Threads and children are no namespaces: programs work.
    assert_eq!(daemon.output("seq 300000 | sort --parallel=4 -n | tail -n 1"), "300000\n");
    assert_eq!(daemon.output("echo a | cat"), "a\n");
}

#[test]
fn the_kept_capabilities_suffice_for_a_server_that_changes_its_user() {
    let daemon = Daemon::admitting();
    let script = r#"perl -MPOSIX -MSocket -e '
        socket(my $socket, AF_INET, SOCK_STREAM, 0) or die $!;
        bind($socket, pack_sockaddr_in(0, INADDR_LOOPBACK)) or die $!;
        $) = "65534 65534"; setgid(65534) or die $!; setuid(65534) or die $!; print "$<\n"'"#;
    assert_eq!(daemon.output(script), "65534\n");
}
