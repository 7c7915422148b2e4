//! A controller for one test.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::Value;
use tempfile::TempDir;

/// A running controller, and credentials for it.
pub(crate) struct Cluster {
    directory: TempDir,
    child: Child,
}

/// What the command did.
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Cluster {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("store.key"), "42".repeat(32)).expect("written");
        make_private(&path("store.key"));
        let config = "trust_domain: cli.test\nname: ctl\nstate: store.redb\nstore_key: {file: KEY}\n\
                      node_listen: ['127.0.0.1:0']\napi_listen: []\napi_socket: api.sock\nlog: {json: true}\n";
        let config = config.replace("KEY", &path("store.key").display().to_string());
        std::fs::write(path("controller.yaml"), config).expect("written");

        let mut init = Command::new(controller());
        init.arg("init").arg("--config").arg(path("controller.yaml"));
        init.arg("--admin-token-file").arg(path("admin.token")).arg("--ca-file").arg(path("ca.pem"));
        let init = init.output().expect("the controller's program runs");
        assert!(init.status.success(), "init: {}", String::from_utf8_lossy(&init.stderr));

        let mut serve = Command::new(controller());
        serve.arg("serve").arg("--config").arg(path("controller.yaml")).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = serve.stdout(Stdio::null()).spawn().expect("the controller starts");
        wait_until_ready(&mut child);
        Self { directory, child }
    }

    /// A file of this cluster.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The command as this cluster's first administrator.
    pub(crate) fn run(&self, arguments: &[&str]) -> Outcome {
        self.run_with(arguments, "")
    }

    /// The same with standard input.
    pub(crate) fn run_with(&self, arguments: &[&str], input: &str) -> Outcome {
        self.run_as(arguments, input, &[("OPENCLUSTER_TOKEN_FILE", "admin.token")])
    }

    /// The command with credentials from files of this cluster.
    pub(crate) fn run_as(&self, arguments: &[&str], input: &str, files: &[(&str, &str)]) -> Outcome {
        let mut command = Command::new(env!("CARGO_BIN_EXE_opencluster"));
        command.args(arguments).env_clear();
        command.env("OPENCLUSTER_SERVER", format!("unix:{}", self.path("api.sock").display()));
        command.env("OPENCLUSTER_CA", self.path("ca.pem"));
        command.envs(files.iter().map(|(variable, file)| (variable, self.path(file))));
        outcome(command, input)
    }

    /// What the command says with `-o json`; it must succeed.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let outcome = self.run(&[arguments, &["-o", "json"]].concat());
        assert_eq!(outcome.code, Some(0), "{arguments:?}: {}", outcome.stderr);
        serde_json::from_str(&outcome.stdout).expect("JSON")
    }

    /// Applies documents; it must succeed.
    pub(crate) fn apply(&self, documents: &str) -> Outcome {
        let outcome = self.run_with(&["apply", "-f", "-"], documents);
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        outcome
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // It may have ended by itself; all that matters is that it is gone.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub(crate) fn outcome(mut command: Command, input: &str) -> Outcome {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let mut stdin = child.stdin.take().expect("piped");
    // A command that does not read its input closes it.
    drop(stdin.write_all(input.as_bytes()));
    drop(stdin);
    let Output { status, stdout, stderr } = child.wait_with_output().expect("the command ends");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    Outcome { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

/// Its log says when it serves. The rest of the log is read and thrown away, so that the pipe never fills.
fn wait_until_ready(child: &mut Child) {
    let mut log = BufReader::new(child.stderr.take().expect("piped"));
    let mut seen = String::new();
    loop {
        let before = seen.len();
        let length = log.read_line(&mut seen).expect("the log can be read");
        assert!(length > 0, "the controller ended instead of serving:\n{seen}");
        if seen[before..].contains("\"ready\"") {
            break;
        }
    }
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
}

/// The controller's program, built as this test was: cargo makes only the programs of the package under test by itself.
fn controller() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let directory = Path::new(env!("CARGO_BIN_EXE_opencluster")).parent().expect("a target directory");
        let profile = match directory.file_name().and_then(|name| name.to_str()).expect("a profile") {
            "debug" => "dev",
            other => other,
        };
        let target = directory.parent().expect("a target directory");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--locked", "--package", "opencluster-controller", "--profile", profile]);
        let built = build.arg("--target-dir").arg(target).status().expect("cargo runs");
        assert!(built.success(), "the controller does not build");
        directory.join("opencluster-controller")
    })
}

fn make_private(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("permissions");
}
