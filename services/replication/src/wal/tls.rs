//! TLS of the replication connection: `sslmode` means the same as on the ordinary connections.

use std::io;
use std::sync::Arc;

use millstream_runtime::postgres::advice;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sqlx::postgres::PgSslMode;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::socket::Socket;
use crate::error::Error;

/// What is asked of TLS. Files may also be given as PEM text.
#[derive(Clone)]
pub struct Tls {
    pub mode: PgSslMode,
    /// Certificates of authorities that are trusted besides those of the system.
    pub root: Option<String>,
    /// Our own certificate and its key.
    pub certificate: Option<String>,
    pub key: Option<String>,
}

/// What follows from the server's answer to the request for TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Plain,
    Handshake,
}

impl Tls {
    /// Whether the server is asked for TLS; not by `allow`, as on the ordinary connections.
    pub fn is_asked_for(&self) -> bool {
        !matches!(self.mode, PgSslMode::Disable | PgSslMode::Allow)
    }

    /// Plain text is gone on with only if the server says that it has no TLS, and none was required.
    pub fn answer(&self, answer: u8) -> Result<Answer, Error> {
        match (answer, self.mode) {
            (b'S', _) => Ok(Answer::Handshake),
            (b'N', PgSslMode::Prefer) => Ok(Answer::Plain),
            (b'N', _) => Err(Error::NoTls),
            _ => Err(Error::Tls("the server's answer to the request for TLS is none".into())),
        }
    }

    /// Encrypts a connection.
    pub async fn handshake<S: Socket>(&self, stream: S, host: &str) -> Result<TlsStream<S>, Error> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| Error::Tls("the host is no name that a certificate can have".into()))?;
        let config = self.config()?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|error| refusal(&error))
    }

    fn config(&self) -> Result<ClientConfig, Error> {
        let provider = Arc::new(ring::default_provider());
        let tls = |error: rustls::Error| Error::Tls(error.to_string());
        let builder =
            ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().map_err(tls)?;
        let builder = match self.mode {
            PgSslMode::VerifyFull => builder.with_root_certificates(self.roots()?),
            PgSslMode::VerifyCa => {
                let roots = Arc::new(self.roots()?);
                let chain = WebPkiServerVerifier::builder_with_provider(roots, provider.clone()).build();
                let chain = chain.map_err(|error| Error::Tls(format!("no certificate is trusted: {error}")))?;
                builder
                    .dangerous()
                    .with_custom_certificate_verifier(Arc::new(Verifier { provider, chain: Some(chain) }))
            }
            _ => builder.dangerous().with_custom_certificate_verifier(Arc::new(Verifier { provider, chain: None })),
        };
        match (&self.certificate, &self.key) {
            (None, None) => Ok(builder.with_no_client_auth()),
            (Some(certificate), Some(key)) => {
                let key = PrivateKeyDer::from_pem_slice(&pem("sslkey", key)?)
                    .map_err(|error| Error::Tls(format!("sslkey: {error}")))?;
                builder.with_client_auth_cert(certificates("sslcert", certificate)?, key).map_err(tls)
            }
            _ => Err(Error::Tls("sslcert and sslkey go together".into())),
        }
    }

    /// The system's authorities, and those of `sslrootcert`.
    fn roots(&self) -> Result<RootCertStore, Error> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(root) = &self.root {
            for certificate in certificates("sslrootcert", root)? {
                roots.add(certificate).map_err(|error| Error::Tls(format!("sslrootcert: {error}")))?;
            }
        }
        Ok(roots)
    }
}

fn certificates(name: &str, file: &str) -> Result<Vec<CertificateDer<'static>>, Error> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem(name, file)?).collect();
    let certificates = certificates.map_err(|error| Error::Tls(format!("{name}: {error}")))?;
    if certificates.is_empty() {
        return Err(Error::Tls(format!("{name}: the file holds no certificate")));
    }
    Ok(certificates)
}

fn pem(name: &str, file: &str) -> Result<Vec<u8>, Error> {
    if file.trim_start().starts_with("-----BEGIN ") {
        return Ok(file.as_bytes().to_vec());
    }
    std::fs::read(file).map_err(|error| Error::Tls(format!("{name}: cannot read {file:?}: {error}")))
}

fn refusal(error: &io::Error) -> Error {
    Error::Tls(advice(error).map_or_else(|| error.to_string(), str::to_owned))
}

/// Checks less than `verify-full`: the chain alone, or nothing but that the server holds its certificate's key.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    chain: Option<Arc<WebPkiServerVerifier>>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        // The name is looked at last: an error about it means that the chain is right.
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tls(mode: PgSslMode) -> Tls {
        Tls { mode, root: None, certificate: None, key: None }
    }

    #[test]
    fn plain_text_only_where_it_is_allowed() {
        use PgSslMode::{Allow, Disable, Prefer, Require, VerifyCa, VerifyFull};
        for (mode, asked, plain) in [
            (Disable, false, true),
            (Allow, false, true),
            (Prefer, true, true),
            (Require, true, false),
            (VerifyCa, true, false),
            (VerifyFull, true, false),
        ] {
            let tls = tls(mode);
            assert_eq!(tls.is_asked_for(), asked, "{mode:?}");
            if asked {
                assert_eq!(tls.answer(b'S').ok(), Some(Answer::Handshake), "{mode:?}");
                assert_eq!(tls.answer(b'N').ok(), plain.then_some(Answer::Plain), "{mode:?}");
                // Neither a yes nor a no: an error message, for example, is no leave to go on in plain text.
                assert!(tls.answer(b'E').is_err(), "{mode:?}");
            }
        }
    }

    #[test]
    fn files_that_are_no_certificates_are_named() {
        let mut missing = tls(PgSslMode::VerifyFull);
        missing.root = Some("/nowhere/root.pem".into());
        assert!(missing.config().unwrap_err().to_string().contains("sslrootcert: cannot read"));
        let mut half = tls(PgSslMode::Require);
        half.certificate = Some("-----BEGIN CERTIFICATE-----".into());
        assert!(half.config().unwrap_err().to_string().contains("sslcert and sslkey"));
    }
}
