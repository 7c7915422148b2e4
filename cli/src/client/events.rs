//! Server-sent events (WHATWG HTML, section 9.2), as far as the watch uses them: the data of each event.

use std::collections::VecDeque;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::de::DeserializeOwned;

use super::{AnswerError, ClientError, answer};

/// The largest event that is accepted: a resource is at most 4 MiB.
const MAX_EVENT: usize = 8 * 1024 * 1024;

/// A stream of events.
pub(crate) struct Events {
    body: Incoming,
    server: String,
    parser: Parser,
}

impl Events {
    pub(super) fn new(body: Incoming, server: String) -> Self {
        Self { body, server, parser: Parser::default() }
    }

    /// The next event; `None` when the server ended the stream.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            if let Some(data) = self.parser.complete.pop_front() {
                return answer::decode(&data).map(Some).map_err(|source| self.bad(source));
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let frame = frame.map_err(|source| ClientError::Http { server: self.server.clone(), source })?;
            if let Some(data) = frame.data_ref() {
                self.parser.push(data).map_err(|source| self.bad(source))?;
            }
        }
    }

    fn bad(&self, source: AnswerError) -> ClientError {
        ClientError::Answer { server: self.server.clone(), source }
    }
}

/// Bytes in, the data of complete events out.
#[derive(Debug, Default)]
struct Parser {
    line: Vec<u8>,
    data: Vec<u8>,
    after_carriage_return: bool,
    complete: VecDeque<Vec<u8>>,
}

impl Parser {
    fn push(&mut self, bytes: &[u8]) -> Result<(), AnswerError> {
        for &byte in bytes {
            // A line ends with LF, CR or CR LF.
            let ends_line = byte == b'\r' || byte == b'\n' && !self.after_carriage_return;
            let second_half = byte == b'\n' && self.after_carriage_return;
            self.after_carriage_return = byte == b'\r';
            if ends_line {
                self.end_line();
            } else if !second_half {
                if self.line.len() + self.data.len() >= MAX_EVENT {
                    return Err(AnswerError::EventTooLarge(MAX_EVENT));
                }
                self.line.push(byte);
            }
        }
        Ok(())
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            if !self.data.is_empty() {
                // Each line of data ended with LF; the last one's is not part of the event.
                self.data.pop();
                self.complete.push_back(std::mem::take(&mut self.data));
            }
            return;
        }
        // Names, IDs, retry times and comments (which keep the connection alive) do not matter here.
        if let Some(value) = line.strip_prefix(b"data:") {
            self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
            self.data.push(b'\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(chunks: &[&[u8]]) -> Vec<String> {
        let mut parser = Parser::default();
        for chunk in chunks {
            parser.push(chunk).expect("small events");
        }
        parser.complete.into_iter().map(|data| String::from_utf8(data).expect("text")).collect()
    }

    #[test]
    fn events_are_found_wherever_the_network_cuts_them() {
        let stream =
            b": keep-alive\n\nid: 7\nevent: change\ndata: {\"a\":\ndata:1}\n\r\ndata: x\r\n\r\nretry: 1\n\ndata: cut";
        for at in 0..stream.len() {
            let (head, tail) = stream.split_at(at);
            assert_eq!(parse(&[head, tail]), ["{\"a\":\n1}", "x"], "cut at {at}");
        }
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut parser = Parser::default();
        let error = std::iter::repeat_with(|| parser.push(&[b'x'; 8192])).take(10_000).find_map(Result::err);
        assert!(matches!(error, Some(AnswerError::EventTooLarge(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_and_bounded(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut parser = Parser::default();
            parser.push(&bytes).expect("far below the limit");
            let held: usize = parser.complete.iter().map(Vec::len).sum();
            prop_assert!(held + parser.line.len() + parser.data.len() <= bytes.len() + 1);
        }
    }
}
