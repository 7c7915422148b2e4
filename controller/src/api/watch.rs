//! Watching resources: server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::Stream;
use http::StatusCode;
use opencluster_api::rest::{Problem, WatchEvent};
use serde::Deserialize;
use tokio::sync::watch as channel;
use utoipa::IntoParams;

use super::Context;
use super::auth::{Allowed, Caller, Reads};
use super::extract::Parameters;
use super::problem::ApiError;
use crate::state::Configuration;
use crate::state::history::Gone;

/// How often a comment shows that the connection lives.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Events that are read from the history at a time. A watcher holds no more than that, however slow it reads.
const PAGE: usize = 64;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct WatchParameters {
    /// Changes after this version; from now on when absent.
    #[serde(default)]
    from: Option<u64>,
}

/// Changes of resources as they happen. The stream ends when the watcher falls too far behind, and when its credentials do.
#[utoipa::path(
    get, path = "/v1/watch", tag = "resources", params(WatchParameters),
    responses(
        (status = 200, body = WatchEvent, content_type = "text/event-stream"),
        (status = 401, body = Problem),
        (status = 410, body = Problem, description = "changes since that version are not kept any more: list again, watch from there"),
    )
)]
pub(super) async fn watch(
    Allowed { caller, .. }: Allowed<Reads>,
    State(context): State<Context>,
    Parameters(parameters): Parameters<WatchParameters>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    // Subscribed first: a change between here and the first read is not missed.
    let changes = context.state.watch_configuration();
    let now = context.state.configuration().snapshot.version;
    let from = parameters.from.unwrap_or(now);
    if from > now {
        return Err(ApiError::invalid("from", format!("{from} is in the future: the version is {now}")));
    }
    if let Err(Gone { complete_after }) = context.state.history().after(from, 1) {
        let detail = format!(
            "changes after version {from} are not kept any more (kept: after {complete_after}): list again and watch from that version"
        );
        return Err(ApiError::new(StatusCode::GONE, "gone", detail));
    }
    let watcher = Watcher { context, changes, caller, after: from, page: VecDeque::new() };
    let stream = futures_util::stream::unfold(watcher, |mut watcher| async {
        let event = watcher.next().await?;
        Some((Ok(event), watcher))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive")))
}

struct Watcher {
    context: Context,
    changes: channel::Receiver<Arc<Configuration>>,
    caller: Caller,
    after: u64,
    page: VecDeque<Arc<WatchEvent>>,
}

impl Watcher {
    /// The next event; `None`: the end.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.page.pop_front() {
                // A resource is made of what JSON has.
                return Event::default().id(event.version.to_string()).event("change").json_data(&*event).ok();
            }
            let life = self.caller.expires - time::OffsetDateTime::now_utc().unix_timestamp();
            let life = Duration::from_secs(u64::try_from(life).unwrap_or(0));
            let mut shutdown = self.context.shutdown.clone();
            self.page = self.context.state.history().after(self.after, PAGE).ok()?.into();
            if let Some(last) = self.page.back() {
                self.after = last.version;
                continue;
            }
            tokio::select! {
                changed = self.changes.changed() => changed.ok()?,
                () = tokio::time::sleep(life) => return None,
                () = crate::listen::shutting_down(&mut shutdown) => return None,
            }
        }
    }
}
