//! The daemon's end of `node.sock`: root's only, and checked for it on every connection.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

use super::protocol::{self, Answer, MAX_REQUEST, ProtocolError, Request};
use crate::status::Status;

/// A request has to be there by then.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// How long `run` waits for its workload's identity.
const ADMISSION_LIMIT: Duration = Duration::from_secs(15);

/// Connections at once.
const MAX_CONNECTIONS: usize = 64;

/// Why the socket could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {source}", path.display())]
pub(crate) struct ServerError {
    path: PathBuf,
    what: &'static str,
    source: io::Error,
}

/// A question to the daemon's core.
#[derive(Debug)]
pub(crate) enum Query {
    Admit { namespace: String, workload: String, process: u32, answer: oneshot::Sender<Admission> },
    Status(oneshot::Sender<Box<Status>>),
}

/// What the core says to an admission.
#[derive(Debug)]
pub(crate) enum Admission {
    /// The process is in its cgroup, with everything around it in place.
    Admitted,
    /// Not yet: ask again.
    NotYet(String),
    /// Never.
    Refused(String),
}

/// Makes the socket; its directory too.
pub(crate) fn bind(path: &Path) -> Result<UnixListener, ServerError> {
    let failed = |what| move |source| ServerError { path: path.to_owned(), what, source };
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(failed("make the directory of"))?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("replace")(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed("listen on"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed("protect"))?;
    Ok(listener)
}

/// Serves until the core is gone.
pub(crate) async fn serve(listener: UnixListener, core: mpsc::Sender<Query>) {
    let places = std::sync::Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = std::sync::Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let core = core.clone();
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &core).await {
                        tracing::debug!(%error, "node.sock");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                // Out of descriptors, for example: others are served meanwhile.
                tracing::warn!(%error, "node.sock: cannot accept");
                sleep(Duration::from_millis(100)).await;
            }
        }
        if core.is_closed() {
            return;
        }
    }
}

async fn converse(mut stream: UnixStream, core: &mpsc::Sender<Query>) -> Result<(), ProtocolError> {
    let peer = stream.peer_cred()?;
    let answer = if peer.uid() == 0 {
        let request = timeout(REQUEST_LIMIT, read_request(&mut stream)).await;
        let request = request.map_err(|_| ProtocolError::Io(io::ErrorKind::TimedOut.into()))?;
        match (request, peer.pid().and_then(|process| u32::try_from(process).ok())) {
            (Ok(request), Some(process)) => answer(request, process, core).await,
            (Ok(_), None) => Answer::Refused { reason: "the asking process cannot be identified".to_owned() },
            (Err(error), _) => Answer::Refused { reason: error.to_string() },
        }
    } else {
        Answer::Refused { reason: format!("only root may ask, not user {}", peer.uid()) }
    };
    stream.write_all(&protocol::encode(&answer)?).await?;
    Ok(())
}

async fn read_request(stream: &mut UnixStream) -> Result<Request, ProtocolError> {
    let mut bytes = Vec::with_capacity(256);
    loop {
        if let Some(request) = protocol::decode(&bytes, MAX_REQUEST)? {
            return Ok(request);
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(ProtocolError::CutOff);
        }
    }
}

async fn answer(request: Request, process: u32, core: &mpsc::Sender<Query>) -> Answer {
    match request {
        Request::Status => {
            let (sender, status) = oneshot::channel();
            if core.send(Query::Status(sender)).await.is_err() {
                return ending();
            }
            status.await.map_or_else(|_| ending(), |status| Answer::Status { status })
        }
        Request::Admit { namespace, workload } => admit(&namespace, &workload, process, core).await,
    }
}

async fn admit(namespace: &str, workload: &str, process: u32, core: &mpsc::Sender<Query>) -> Answer {
    const ASK_EVERY: Duration = Duration::from_millis(25);
    let deadline = Instant::now() + ADMISSION_LIMIT;
    loop {
        let (answer, answered) = oneshot::channel();
        let query = Query::Admit { namespace: namespace.to_owned(), workload: workload.to_owned(), process, answer };
        if core.send(query).await.is_err() {
            return ending();
        }
        match answered.await {
            Ok(Admission::Admitted) => return Answer::Admitted,
            Ok(Admission::Refused(reason)) => return Answer::Refused { reason },
            Ok(Admission::NotYet(_)) if Instant::now() < deadline => sleep(ASK_EVERY).await,
            Ok(Admission::NotYet(reason)) => {
                let waited = ADMISSION_LIMIT.as_secs();
                return Answer::Refused { reason: format!("{reason} (waited {waited} s)") };
            }
            Err(_) => return ending(),
        }
    }
}

fn ending() -> Answer {
    Answer::Refused { reason: "the daemon is ending".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A socket whose core admits workload `a` at the third question, and nobody else.
    struct Served(PathBuf);

    impl Served {
        fn start() -> Self {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let name = format!("opencluster-server-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
            let directory = std::env::temp_dir().join(name);
            let listener = bind(&directory.join("node.sock")).expect("bind");
            let (sender, mut queries) = mpsc::channel(4);
            tokio::spawn(serve(listener, sender));
            tokio::spawn(async move {
                let mut asked = 0;
                while let Some(query) = queries.recv().await {
                    match query {
                        Query::Admit { workload, process, answer, .. } => {
                            assert_eq!(process, std::process::id(), "who asks is who gets in");
                            asked += 1;
                            let admission = match (workload.as_str(), asked) {
                                ("a", 3..) => Admission::Admitted,
                                ("a", _) => Admission::NotYet("soon".to_owned()),
                                _ => Admission::Refused("there is only a".to_owned()),
                            };
                            answer.send(admission).expect("the server waits");
                        }
                        Query::Status(answer) => answer.send(Box::default()).expect("the server waits"),
                    }
                }
            });
            Self(directory)
        }

        async fn ask(&self, request: &[u8]) -> Answer {
            let mut stream = UnixStream::connect(self.0.join("node.sock")).await.expect("connect");
            stream.write_all(request).await.expect("write");
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.expect("read");
            protocol::decode(&answer, protocol::MAX_ANSWER).expect("an answer").expect("a whole answer")
        }
    }

    impl Drop for Served {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).expect("remove");
        }
    }

    #[tokio::test]
    async fn an_admission_waits_until_the_workload_can_run() {
        let served = Served::start();
        let request = Request::Admit { namespace: "default".to_owned(), workload: "a".to_owned() };
        assert_eq!(served.ask(&protocol::encode(&request).expect("encode")).await, Answer::Admitted);
        let request = Request::Admit { namespace: "default".to_owned(), workload: "b".to_owned() };
        let refused = Answer::Refused { reason: "there is only a".to_owned() };
        assert_eq!(served.ask(&protocol::encode(&request).expect("encode")).await, refused);
    }

    #[tokio::test]
    async fn garbage_is_answered_with_what_is_wrong_and_service_goes_on() {
        let served = Served::start();
        for garbage in [&b"\x00\xff\n"[..], b"{}\n", &[b'x'; MAX_REQUEST + 1]] {
            assert!(matches!(served.ask(garbage).await, Answer::Refused { .. }));
        }
        let _silent = UnixStream::connect(served.0.join("node.sock")).await.expect("connect");
        let status = protocol::encode(&Request::Status).expect("encode");
        assert!(matches!(served.ask(&status).await, Answer::Status { .. }));
    }

    #[tokio::test]
    async fn the_socket_is_roots_only() {
        let served = Served::start();
        let mode = fs::metadata(served.0.join("node.sock")).expect("socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
