//! What a server answered, made sense of: never trusted to be well formed.

use hyper::StatusCode;
use opencluster_api::rest::Problem;
use serde::de::DeserializeOwned;

use crate::output::human::{printable, shortened};

/// An answer that is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnswerError {
    /// Success was reported, but the result is not what it should be.
    #[error("the answer is not what this version of opencluster expects: {source}; it begins: {beginning}")]
    Result {
        /// How serde puts it.
        source: serde_json::Error,
        /// For recognising a proxy's error page and the like.
        beginning: String,
    },
    /// A failure was reported, without a description that can be read.
    #[error("HTTP status {status}, and no description of the problem; the answer begins: {beginning}")]
    Status {
        /// The HTTP status.
        status: StatusCode,
        /// For recognising a proxy's error page and the like.
        beginning: String,
    },
    /// The request could not even be built.
    #[error("the request cannot be put into HTTP: {0}")]
    Request(hyper::http::Error),
    /// The body broke off.
    #[error("the answer broke off: {0}")]
    Body(std::io::Error),
    /// An event stream with a line longer than any event.
    #[error("the event stream has an event of more than {0} bytes")]
    EventTooLarge(usize),
}

/// The result in a successful answer.
pub(crate) fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, AnswerError> {
    serde_json::from_slice(body).map_err(|source| AnswerError::Result { source, beginning: beginning(body) })
}

/// The problem in an answer with an error status. What it says of its status is not believed: the real one counts.
pub(crate) fn problem(status: StatusCode, body: &[u8]) -> Result<Problem, AnswerError> {
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => Ok(Problem { status: status.as_u16(), ..problem }),
        Err(_) => Err(AnswerError::Status { status, beginning: beginning(body) }),
    }
}

fn beginning(body: &[u8]) -> String {
    if body.is_empty() {
        return "(nothing)".to_owned();
    }
    let body = &body[..body.len().min(1024)];
    shortened(&printable(&String::from_utf8_lossy(body)), 120)
}

#[cfg(test)]
mod tests {
    use opencluster_api::rest::{ApplyResult, AuditPage, ClusterStatus, NodeStatusList, ObjectList, WatchEvent};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_error_page_is_shown_but_cannot_drive_the_terminal() {
        let error = problem(StatusCode::BAD_GATEWAY, b"<html>\x1b[2J502").expect_err("no problem document");
        let text = error.to_string();
        assert!(text.contains("502 Bad Gateway"), "{text}");
        assert!(text.contains("<html>\\u{1b}[2J502"), "{text}");
    }

    #[test]
    fn the_real_status_counts() {
        let body = br#"{"code":"forbidden","status":200,"detail":"no"}"#;
        assert_eq!(problem(StatusCode::FORBIDDEN, body).expect("a problem").status, 403);
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_and_never_a_panic(body in proptest::collection::vec(any::<u8>(), 0..300), status in 400_u16..600) {
            let status = StatusCode::from_u16(status).expect("in range");
            prop_assert!(problem(status, &body).is_err());
            prop_assert!(decode::<ClusterStatus>(&body).is_err());
            let message = decode::<ObjectList>(&body).expect_err("garbage").to_string();
            prop_assert!(message.chars().all(|character| !character.is_control()), "{message}");
        }

        #[test]
        fn any_json_is_a_result_or_an_error(text in r#"(\{|\[|"|:|,|\}|\]|version|items|nodes|events|[0-9]|null){0,40}"#) {
            let outcomes = [
                decode::<ObjectList>(text.as_bytes()).is_ok(),
                decode::<ApplyResult>(text.as_bytes()).is_ok(),
                decode::<AuditPage>(text.as_bytes()).is_ok(),
                decode::<NodeStatusList>(text.as_bytes()).is_ok(),
                decode::<WatchEvent>(text.as_bytes()).is_ok(),
            ];
            prop_assert!(outcomes.iter().filter(|&&ok| ok).count() <= 1);
        }
    }
}
