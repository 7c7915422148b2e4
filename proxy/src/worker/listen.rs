//! A worker's listeners. Running out of descriptors or memory slows accepting down, and stops nothing else.

use std::io;
use std::net::TcpListener as StdListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use opencluster_identity::SpiffeId;
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::Worker;
use crate::capture::{self, Destination};
use crate::relay::socket::reset_unless_finished;
use crate::tunnel::inbound;

/// The first wait after a failure to accept; doubled each time.
const FIRST_WAIT: Duration = Duration::from_millis(10);
/// The longest.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// What a listener is for.
#[derive(Clone, Debug)]
pub enum Purpose {
    /// Redirected connections of one workload.
    Capture(Arc<SpiffeId>, Destination),
    /// Tunnels from other proxies.
    Tunnel,
}

/// The listeners that are served.
#[derive(Debug)]
pub struct Listening {
    tasks: Vec<(Purpose, JoinHandle<()>)>,
    config: Arc<ServerConfig>,
}

impl Listening {
    /// None yet.
    pub fn new(config: Arc<ServerConfig>) -> Self {
        Self { tasks: Vec::new(), config }
    }

    /// Serves one more; the socket is nonblocking.
    pub fn serve(&mut self, worker: &Rc<Worker>, listener: StdListener, purpose: Purpose) {
        let ready = match purpose {
            Purpose::Capture(..) => reset_unless_finished(&listener),
            Purpose::Tunnel => Ok(()),
        };
        let listener = match ready.and_then(|()| TcpListener::from_std(listener)) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%error, "a listener that was passed cannot be used");
                return;
            }
        };
        let task = accept_all(Rc::clone(worker), listener, purpose.clone(), Arc::clone(&self.config));
        self.tasks.push((purpose, tokio::task::spawn_local(task)));
    }

    /// Closes a workload's listeners.
    pub fn stop_workload(&mut self, workload: &SpiffeId) {
        self.tasks.retain(|(purpose, task)| {
            let stop = matches!(purpose, Purpose::Capture(of, _) if **of == *workload);
            if stop {
                task.abort();
            }
            !stop
        });
    }

    /// Closes all of them.
    pub fn stop(&mut self) {
        for (_, task) in self.tasks.drain(..) {
            task.abort();
        }
    }
}

async fn accept_all(worker: Rc<Worker>, listener: TcpListener, purpose: Purpose, config: Arc<ServerConfig>) {
    let mut wait = FIRST_WAIT;
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) if is_of_the_connection(&error) => continue,
            Err(error) => {
                // The kernel keeps the connection in its queue; the others go on, and may free what is missing.
                worker.shared.metrics.accept_failures.inc();
                tracing::warn!(%error, ?wait, "cannot accept connections");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(LONGEST_WAIT);
                continue;
            }
        };
        wait = FIRST_WAIT;
        let worker = Rc::clone(&worker);
        match &purpose {
            Purpose::Capture(workload, destination) => {
                tokio::task::spawn_local(capture::serve(worker, stream, peer, Arc::clone(workload), *destination));
            }
            Purpose::Tunnel => {
                tokio::task::spawn_local(inbound::serve(worker, stream, peer, Arc::clone(&config)));
            }
        }
    }
}

/// Errors that accept(2) reports for a connection that has already gone.
fn is_of_the_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}
