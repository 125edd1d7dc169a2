//! TLS: the server's certificate, the CAs of its clients, and the names in client certificates.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::server::TlsStream;
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Time limit of a peer's handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// The part of the configuration that cannot be used, and the reason.
#[derive(Debug)]
pub enum Unusable {
    Certificate(String),
    Key(String),
    ClientCa(String),
}

/// TLS configuration of new connections. All files are PEM. With `client_ca`, clients need a certificate signed by it.
pub fn configuration(
    chain: &[u8],
    key: &[u8],
    client_ca: Option<&[u8]>,
) -> Result<Arc<ServerConfig>, Unusable> {
    let chain = certificates(chain).map_err(Unusable::Certificate)?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|problem| Unusable::Key(problem.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|problem| Unusable::Certificate(problem.to_string()))?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(pem) => {
            let mut roots = RootCertStore::empty();
            for root in certificates(pem).map_err(Unusable::ClientCa)? {
                roots.add(root).map_err(|problem| Unusable::ClientCa(problem.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|problem| Unusable::ClientCa(problem.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|problem| match problem {
        rustls::Error::InvalidCertificate(_) => Unusable::Certificate(problem.to_string()),
        _ => Unusable::Key(problem.to_string()),
    })?;
    config.alpn_protocols = vec![HTTP2.to_vec()];
    Ok(Arc::new(config))
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err("it holds no certificate".to_owned()),
        Ok(found) => Ok(found),
        Err(problem) => Err(problem.to_string()),
    }
}

/// The same for connections that may also use HTTP/1.1.
pub fn with_http1(config: &ServerConfig) -> Arc<ServerConfig> {
    let mut config = config.clone();
    config.alpn_protocols.push(HTTP1.to_vec());
    Arc::new(config)
}

/// An encrypted connection.
pub struct Secured<S> {
    pub socket: TlsStream<S>,
    /// The names in the client's certificate.
    pub names: Vec<String>,
    /// Whether client and server have agreed on HTTP/2.
    pub is_http2: bool,
}

/// Returns the encrypted connection; None: the handshake failed or timed out.
pub async fn accept<S>(config: Arc<ServerConfig>, socket: S) -> Option<Secured<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = TlsAcceptor::from(config).accept(socket);
    let socket = tokio::time::timeout(HANDSHAKE, handshake).await.ok()?.ok()?;
    let (_, session) = socket.get_ref();
    let is_http2 = session.alpn_protocol() == Some(HTTP2);
    let own = session.peer_certificates().and_then(<[_]>::first);
    let names = own.map(|certificate| names(certificate)).unwrap_or_default();
    Some(Secured { socket, names, is_http2 })
}

/// The subject alternative names of a certificate, DNS, email, URI and IP in their order; without any, the common name
/// of its subject. What gRPC calls the identities of a peer.
fn names(certificate: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let mut found = Vec::new();
    if let Ok(Some(alternative)) = certificate.subject_alternative_name() {
        found.extend(alternative.value.general_names.iter().filter_map(text));
    }
    if found.is_empty() {
        let common = certificate.subject().iter_common_name().next();
        found.extend(common.and_then(|name| name.as_str().ok()).map(str::to_owned));
    }
    found
}

fn text(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) | GeneralName::RFC822Name(name) | GeneralName::URI(name) => {
            Some((*name).to_owned())
        }
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(|octets| Ipv4Addr::from(octets).to_string());
            v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(|octets| Ipv6Addr::from(octets).to_string())).ok()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::server::{ClientHello, ResolvesServerCert};
    use rustls::sign::CertifiedKey;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::Instant;

    /// For tests without a handshake.
    #[derive(Debug)]
    struct NoCertificate;

    impl ResolvesServerCert for NoCertificate {
        fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
            None
        }
    }

    fn without_certificate() -> Arc<ServerConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        Arc::new(builder.unwrap().with_no_client_auth().with_cert_resolver(Arc::new(NoCertificate)))
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_is_given_up_after_a_while() {
        for begun in [b"".as_slice(), b"\x16\x03\x01\x02\x00\x01"] {
            let (mut peer, socket) = tokio::io::duplex(1024);
            peer.write_all(begun).await.unwrap();
            let began = Instant::now();
            assert!(accept(without_certificate(), socket).await.is_none());
            assert_eq!((Instant::now() - began).as_secs(), HANDSHAKE.as_secs());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_speaks_no_tls_is_told_so_at_once() {
        let (mut peer, socket) = tokio::io::duplex(1024);
        peer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        let began = Instant::now();
        assert!(accept(without_certificate(), socket).await.is_none());
        assert_eq!(Instant::now(), began);
        let mut said = Vec::new();
        peer.read_to_end(&mut said).await.unwrap();
        assert_eq!(said[0], 21, "an alert");
    }

    #[test]
    fn the_error_names_the_unusable_file() {
        let key = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        let certificate = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(matches!(configuration(b"", key, None), Err(Unusable::Certificate(_))));
        assert!(matches!(configuration(certificate, b"", None), Err(Unusable::Key(_))));
        assert!(matches!(configuration(certificate, key, Some(b"")), Err(Unusable::ClientCa(_))));
        assert!(matches!(configuration(certificate, key, Some(certificate)), Err(Unusable::ClientCa(_))));
        assert!(configuration(certificate, key, None).is_err());
    }

    #[test]
    fn invalid_certificates_have_no_names() {
        assert!(names(b"").is_empty());
        assert!(names(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff]).is_empty());
    }
}
