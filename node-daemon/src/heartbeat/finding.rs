//! What a node found out about itself must arrive, although it is severed already.
//!
//! The session that it has may be somebody else's by now: a copy of a machine shares its connections with the original, whose
//! sequence numbers have moved on, and all that it sends on them is taken for old. So the connection that there is comes first,
//! which in most cases works and is the fastest, and then new ones, with the node's key, until a controller has answered or the
//! time is over. Attempts overlap: on a path that is slow a new one must not end the one before.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use opencluster_api::control::Finding;
use opencluster_api::control::control_client::ControlClient;
use rustls::ClientConfig;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout_at};
use tonic::transport::Channel;

use super::{Controller, Session, SessionEvent};
use crate::transport::{self, TransportError};

/// How many attempts there are at most, at equal distances.
const ATTEMPTS: u32 = 10;

/// The task that reports it. Dropped, it ends, and with it every connection that it has made.
#[derive(Debug)]
pub(crate) struct Reporting(JoinHandle<()>);

impl Drop for Reporting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How it ended.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Untold {
    /// An authenticated controller takes nothing from this node any more: whatever it found, it is out already.
    #[error("the controller takes nothing from this node any more: {0}")]
    Refused(String),
    #[error("no controller has answered within {} ms; the last: {last}", .limit.as_millis())]
    Unanswered { limit: Duration, last: String },
}

#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("{}: {}", .0.code(), .0.message())]
    Status(Box<tonic::Status>),
}

impl CallError {
    /// Whether it would be the same again: said by a controller that has proven who it is. (One that refuses the certificate
    /// itself, as the enrolment is over, says so in TLS, and cannot be told from a connection that broke.)
    fn is_final(&self) -> bool {
        use tonic::Code::{PermissionDenied, Unauthenticated};
        matches!(self, Self::Status(status) if matches!(status.code(), Unauthenticated | PermissionDenied))
    }
}

impl Session {
    /// The session's last duty, for `limit` at most; [`SessionEvent::Told`] comes when it is done. `connected` is the controller
    /// that it is with now.
    pub(crate) fn report(self, connected: Option<Controller>, finding: Finding, limit: Duration) -> Reporting {
        Reporting(tokio::spawn(async move {
            let events = self.events.clone();
            let told = self.tell(connected, finding, limit).await;
            send(&events, told).await;
        }))
    }

    async fn tell(self, connected: Option<Controller>, finding: Finding, limit: Duration) -> Result<String, Untold> {
        let mut controllers = self.controllers.clone().into_iter().cycle();
        let (tls, own_finding) = (Arc::clone(&self.tls), finding.clone());
        let anew = move || {
            let address = controllers.next();
            let (tls, finding) = (Arc::clone(&tls), own_finding.clone());
            async move {
                match address {
                    Some(address) => on_a_new_connection(address, tls, finding, limit).await,
                    None => std::future::pending().await,
                }
            }
        };
        let first = connected.as_ref().map(|controller| call(controller.client.clone(), finding));
        // The session, with our end of its stream, is kept until other connections are tried: the controller hangs up when it is
        // over, also on a report that comes right after. But then it must be gone, or it would take the place of the original's.
        let mut session = Some((self, connected));
        insist(first, anew, limit, || session = None).await
    }
}

async fn send(events: &mpsc::Sender<SessionEvent>, told: Result<String, Untold>) {
    if events.send(SessionEvent::Told(told)).await.is_err() {
        tracing::debug!("nobody waits any more for what became of the report");
    }
}

async fn on_a_new_connection(
    address: SocketAddr,
    tls: Arc<ClientConfig>,
    finding: Finding,
    limit: Duration,
) -> Result<String, CallError> {
    let stream = transport::connect(address, tls, limit).await?;
    call(ControlClient::new(transport::channel(address, stream).await?), finding).await
}

async fn call(mut client: ControlClient<Channel>, finding: Finding) -> Result<String, CallError> {
    let answer = client.report(finding).await.map_err(|status| CallError::Status(Box::new(status)))?;
    Ok(answer.into_inner().reason)
}

/// Makes the first attempt at once and more at equal distances, until one has its answer or the limit is reached. `anew` is
/// told before the second.
async fn insist<F, A>(
    first: Option<F>,
    mut anew: impl FnMut() -> A,
    limit: Duration,
    mut before_others: impl FnMut(),
) -> Result<String, Untold>
where
    F: Future<Output = Result<String, CallError>> + Send + 'static,
    A: Future<Output = Result<String, CallError>> + Send + 'static,
{
    let now = Instant::now();
    let end = now + limit;
    let mut next = now;
    let mut attempts = JoinSet::new();
    if let Some(first) = first {
        attempts.spawn(first);
        next += limit / ATTEMPTS;
    }
    let mut last = "nothing was heard".to_owned();
    loop {
        let attempt = async {
            tokio::select! {
                Some(told) = attempts.join_next() => Some(told),
                () = sleep_until(next) => None,
            }
        };
        match timeout_at(end, attempt).await {
            Err(_) => return Err(Untold::Unanswered { limit, last }),
            Ok(Some(Ok(Ok(reason)))) => return Ok(reason),
            Ok(Some(Ok(Err(error)))) => {
                if error.is_final() {
                    return Err(Untold::Refused(error.to_string()));
                }
                tracing::warn!(%error, "what this node found out could not be reported; trying again");
                last = error.to_string();
            }
            Ok(Some(Err(error))) => last = error.to_string(),
            Ok(None) => {
                before_others();
                attempts.spawn(anew());
                next += limit / ATTEMPTS;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(3);

    /// What an attempt comes to.
    #[derive(Clone, Copy)]
    enum Fate {
        Silent,
        Fails,
        Refused,
        AnsweredAfter(Duration),
    }

    async fn attempt(fate: Fate) -> Result<String, CallError> {
        let status = |status| Err(CallError::Status(Box::new(status)));
        match fate {
            Fate::Silent => std::future::pending().await,
            Fate::Fails => status(tonic::Status::unavailable("broken pipe")),
            Fate::Refused => status(tonic::Status::permission_denied("it is out")),
            Fate::AnsweredAfter(time) => {
                tokio::time::sleep(time).await;
                Ok("copied".to_owned())
            }
        }
    }

    /// What comes of it, how long that takes, and when new connections were made.
    async fn insist_with(first: Option<Fate>, others: &[Fate]) -> (Result<String, Untold>, Duration, Vec<Duration>) {
        let begun = Instant::now();
        let made = Mutex::new(Vec::new());
        let mut others = others.iter().copied();
        let anew = || {
            made.lock().expect("whole").push(begun.elapsed());
            attempt(others.next().unwrap_or(Fate::Silent))
        };
        let mut alone = true;
        let told = insist(first.map(attempt), anew, LIMIT, || alone = false).await;
        let made = made.into_inner().expect("whole");
        assert_eq!(
            alone,
            made.is_empty(),
            "the session is let go of before other connections are made, and not sooner"
        );
        (told, begun.elapsed(), made)
    }

    const INTERVAL: Duration = Duration::from_millis(300);

    #[tokio::test]
    async fn r13_the_session_that_works_is_enough() {
        let (told, _, made) = insist_with(Some(Fate::AnsweredAfter(Duration::ZERO)), &[]).await;
        assert_eq!((told, made.len()), (Ok("copied".to_owned()), 0));
    }

    #[tokio::test]
    async fn r13_a_finding_arrives_although_the_session_is_somebody_elses() {
        for first in [Fate::Silent, Fate::Fails] {
            let (told, took, made) = insist_with(Some(first), &[Fate::AnsweredAfter(Duration::ZERO)]).await;
            assert_eq!((told, made.len()), (Ok("copied".to_owned()), 1));
            assert!(made[0] >= INTERVAL && took < LIMIT, "{made:?}, {took:?}");
        }
        let (told, _, made) = insist_with(None, &[Fate::AnsweredAfter(Duration::ZERO)]).await;
        assert_eq!((told, made.len()), (Ok("copied".to_owned()), 1));
        assert!(made[0] < INTERVAL, "without a session at once, not after {made:?}");
    }

    #[tokio::test]
    async fn r13_a_slow_path_is_not_given_up_for_a_new_one() {
        // All that were made are as slow: if each ended the one before, none would be answered.
        let slow = [Fate::AnsweredAfter(INTERVAL * 4); 10];
        let (told, took, made) = insist_with(Some(Fate::Silent), &slow).await;
        assert_eq!(told, Ok("copied".to_owned()));
        assert!(took >= INTERVAL * 5 && made.len() > 1, "{took:?}, {made:?}");
    }

    #[tokio::test]
    async fn r13_the_key_is_kept_no_longer_than_a_lease() {
        let (told, took, made) = insist_with(Some(Fate::Silent), &[Fate::Fails]).await;
        assert!((LIMIT..LIMIT * 2).contains(&took), "{took:?}");
        assert!(matches!(&told, Err(Untold::Unanswered { last, .. }) if last.contains("broken pipe")), "{told:?}");
        assert!((2..=10).contains(&made.len()), "{made:?}");
        let (told, _, made) = insist_with(Some(Fate::Silent), &[Fate::Fails, Fate::Refused]).await;
        assert!(matches!(told, Err(Untold::Refused(_))), "whom the controller has put out need not insist: {told:?}");
        assert_eq!(made.len(), 2);
    }
}
