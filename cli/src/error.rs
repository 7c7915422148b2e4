//! What can go wrong, said so that a person knows what, where and what to do.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use opencluster_api::rest::Problem;
use serde::Serialize;

use crate::client::ClientError;
use crate::documents::SourceFault;
use crate::output::human::printable;
use crate::output::lines::Lines;
use crate::output::style::Style;

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The command line or the environment does not say enough, or says nonsense.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to write instead.
        hint: String,
    },
    /// Documents have faults, found here or by the controller.
    #[error("{}", summary(.0))]
    Documents(Vec<SourceFault>),
    /// The controller could not be reached, trusted or understood.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The controller refused.
    #[error("{}", printable(&.0.detail))]
    Refused(Problem),
    /// A file could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// `read` or `write`.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What was looked for is not there, or is not as it should be; `hint` may be empty.
    #[error("{message}")]
    Failed {
        /// What.
        message: String,
        /// What to do.
        hint: String,
    },
    /// The result itself says what is wrong and is printed already.
    #[error("the result has failures")]
    Reported,
    /// The result could not be printed.
    #[error("cannot print the result: {0}")]
    Output(#[from] io::Error),
}

impl CliError {
    /// A mistake of the caller.
    pub(crate) fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: hint.into() }
    }

    /// A failure with advice.
    pub(crate) fn failed(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Failed { message: message.into(), hint: hint.into() }
    }

    /// 1 refused or failed, 2 usage. A reader that closed the pipe (`| head`) has what it wanted.
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage { .. } => ExitCode::from(2),
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        }
    }

    /// Whether there is nothing (more) to say.
    pub(crate) fn silent(&self) -> bool {
        matches!(self, Self::Reported)
            || matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// For people, several lines.
    pub(crate) fn render(&self, style: Style) -> String {
        let mut text = Lines::default();
        if let Self::Documents(faults) = self {
            for fault in faults {
                fault.render(style, &mut text);
            }
        }
        text.push(format_args!("{}: {}", style.red("error"), whole_story(self)));
        let hint = self.hint();
        if !hint.is_empty() {
            text.push(format_args!("  hint: {hint}"));
        }
        text.text()
    }

    /// For programs: one JSON document.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        let description = match self {
            Self::Documents(faults) => Description::new("invalid", self).with_faults(faults),
            Self::Refused(problem) => Description { code: &problem.code, ..Description::new("refused", self) },
            Self::Usage { .. } => Description::new("usage", self),
            Self::Client(error) => Description::new(error.code(), self),
            _ => Description::new("failed", self),
        };
        serde_json::json!({ "error": description })
    }

    /// What to do; may be empty.
    pub(crate) fn hint(&self) -> String {
        match self {
            Self::Usage { hint, .. } | Self::Failed { hint, .. } => hint.clone(),
            Self::Client(error) => error.hint(),
            Self::Refused(problem) => match problem.code.as_str() {
                "unauthenticated" => "OPENCLUSTER_TOKEN_FILE names the file with your token; tokens expire, and an \
                                      administrator makes a new one with: opencluster operator create NAME --role ROLE"
                    .to_owned(),
                "forbidden" => "your role does not allow this: ask an administrator".to_owned(),
                "conflict" => "somebody else changed it: get it again, and apply your change to that".to_owned(),
                _ => String::new(),
            },
            _ => String::new(),
        }
    }
}

#[derive(Serialize)]
struct Description<'a> {
    code: &'a str,
    message: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    hint: String,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    faults: &'a [SourceFault],
}

impl<'a> Description<'a> {
    fn new(code: &'a str, error: &CliError) -> Self {
        Self { code, message: whole_story(error), hint: error.hint(), faults: &[] }
    }

    fn with_faults(self, faults: &'a [SourceFault]) -> Self {
        Self { faults, ..self }
    }
}

/// An error with all of its causes, but without saying anything twice: some errors quote their cause, some do not.
pub(crate) fn whole_story(error: &dyn std::error::Error) -> String {
    let mut story = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !story.contains(&text) {
            story = format!("{story}: {text}");
        }
        cause = error.source();
    }
    printable(&story)
}

fn summary(faults: &[SourceFault]) -> String {
    match faults.len() {
        1 => "1 fault; nothing was changed".to_owned(),
        count => format!("{count} faults; nothing was changed"),
    }
}
