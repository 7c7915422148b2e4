//! What `opencluster-node run` and `status` say to the daemon over `node.sock`: one JSON object a line, one of each.

use std::io;

use serde::{Deserialize, Serialize};

use crate::status::Status;

/// Longer than any request.
pub(crate) const MAX_REQUEST: usize = 4 * 1024;

/// Longer than any answer: a status with all workloads.
pub(crate) const MAX_ANSWER: usize = 1024 * 1024;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case", tag = "request")]
pub(crate) enum Request {
    /// Let the asking process into this workload.
    Admit { namespace: String, workload: String },
    /// How are things?
    Status,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub(crate) enum Answer {
    /// It is in.
    Admitted,
    /// It is not.
    Refused { reason: String },
    /// Things are so.
    Status { status: Box<Status> },
}

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProtocolError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("a message of more than {0} bytes")]
    TooLong(usize),
    #[error("the other side ended before its message did")]
    CutOff,
    #[error("a message that cannot be read: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// One line.
pub(crate) fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, ProtocolError> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// The message in `bytes`, once its line is complete.
pub(crate) fn decode<'a, M: Deserialize<'a>>(bytes: &'a [u8], limit: usize) -> Result<Option<M>, ProtocolError> {
    match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) if end <= limit => Ok(Some(serde_json::from_slice(&bytes[..end])?)),
        None if bytes.len() <= limit => Ok(None),
        _ => Err(ProtocolError::TooLong(limit)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_is_read_when_its_line_is_complete() {
        let request = Request::Admit { namespace: "default".into(), workload: "web".into() };
        let line = encode(&request).expect("encode");
        assert!(decode::<Request>(&line[..line.len() - 1], MAX_REQUEST).expect("incomplete").is_none());
        assert_eq!(decode::<Request>(&line, MAX_REQUEST).expect("complete"), Some(request));
    }

    #[test]
    fn long_and_unknown_messages_are_refused() {
        assert!(matches!(decode::<Request>(&[b'x'; 11], 10), Err(ProtocolError::TooLong(10))));
        let unknown = b"{\"request\":\"admit\",\"namespace\":\"a\",\"workload\":\"b\",\"pid\":1}\n";
        assert!(matches!(decode::<Request>(unknown, MAX_REQUEST), Err(ProtocolError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_end_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            drop(decode::<Request>(&bytes, 100));
        }
    }
}
