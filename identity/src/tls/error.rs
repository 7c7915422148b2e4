//! How verification's errors travel through rustls, and back.

use std::sync::Arc;

use rustls::{CertificateError, OtherError};

use crate::SpiffeId;
use crate::verify::VerifyError;

/// Why a configuration could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// rustls does not take the crypto provider.
    #[error("rustls does not accept the crypto provider for TLS 1.3")]
    Provider(#[source] rustls::Error),
    /// Only workloads, nodes and controllers serve.
    #[error("{0} has no TLS server name: only workloads, nodes and controllers with DNS names can be called")]
    NoServerName(SpiffeId),
}

/// Why our own verification refused the peer, if that is what this error of a handshake says. `None`: something else
/// went wrong, for example the peer refused us.
pub fn refusal(error: &std::io::Error) -> Option<&VerifyError> {
    match error.get_ref()?.downcast_ref()? {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(source))) => source.downcast_ref(),
        _ => None,
    }
}

/// Carries the reason to [`refusal`]. The peer learns no more than "certificate unknown".
pub(super) fn to_rustls(error: VerifyError) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}
