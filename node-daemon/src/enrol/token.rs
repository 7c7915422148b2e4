//! The one-time enrolment token: `oct1.NODE.SECRET.FINGERPRINT`.

use std::fmt;

use opencluster_identity::digest::Sha256Digest;
use zeroize::Zeroizing;

/// Longer than any token: a node name has 63 bytes at most, secret and fingerprint have fixed lengths.
pub(crate) const MAX_BYTES: usize = 512;

/// A token, taken apart.
pub(crate) struct Token {
    /// The node that it was made for.
    pub(crate) node: String,
    /// What the controller compares.
    pub(crate) secret: Zeroizing<String>,
    /// SHA-256 of the cluster's root certificate.
    pub(crate) root: Sha256Digest,
}

/// Why a text is not a token. Never shows what was in it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokenError {
    #[error("longer than {MAX_BYTES} bytes")]
    TooLong,
    #[error("not of the form oct1.NODE.SECRET.FINGERPRINT: copy all of what `opencluster node token` printed")]
    Form,
    #[error("its last part is not a SHA-256 fingerprint: the token was cut off or damaged")]
    Fingerprint,
}

impl Token {
    pub(crate) fn parse(text: &str) -> Result<Self, TokenError> {
        const SECRET_CHARACTERS: usize = 43;
        if text.len() > MAX_BYTES {
            return Err(TokenError::TooLong);
        }
        let mut parts = text.trim().split('.');
        let (Some("oct1"), Some(node), Some(secret), Some(root), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenError::Form);
        };
        let alphabet = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if node.is_empty() || secret.len() != SECRET_CHARACTERS || !secret.bytes().all(alphabet) {
            return Err(TokenError::Form);
        }
        let root = Sha256Digest::from_hex(root).map_err(|_| TokenError::Fingerprint)?;
        Ok(Self { node: node.to_owned(), secret: Zeroizing::new(secret.to_owned()), root })
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("node", &self.node).field("root", &self.root).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text() -> String {
        format!("oct1.a.{}.{}", "x".repeat(43), "0f".repeat(32))
    }

    #[test]
    fn a_token_is_taken_apart_and_does_not_show_its_secret() {
        let token = Token::parse(&format!("{}\n", text())).expect("token");
        assert_eq!(token.node, "a");
        assert_eq!(*token.secret, "x".repeat(43));
        assert!(!format!("{token:?}").contains("xxx"));
    }

    #[test]
    fn damaged_tokens_are_refused() {
        let good = text();
        assert_eq!(Token::parse(&good[..good.len() - 1]).expect_err("cut off"), TokenError::Fingerprint);
        for bad in
            ["", "oct1", "oct1.a.b", &good.replace("oct1", "oct2"), &format!("{good}.x"), &good.replace("xx", "x%")]
        {
            assert_eq!(Token::parse(bad).expect_err(bad), TokenError::Form);
        }
        assert_eq!(Token::parse(&"x".repeat(MAX_BYTES + 1)).expect_err("long"), TokenError::TooLong);
    }

    proptest! {
        #[test]
        fn any_text_ends_without_a_panic(text in "(oct1)?[.a-z0-9\\PC]{0,200}") {
            drop(Token::parse(&text));
        }
    }
}
