//! SPIFFE identities: keys, CSRs, issuing, verification and rustls configuration.
