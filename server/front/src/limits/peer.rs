//! A connection, as seen by its calls and by other connections.

use crate::limits::callers::Credential;
use crate::limits::load::Load;
use crate::limits::read_quota::ReadQuota;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::{Notify, Semaphore};

/// Limit of a connection's calls that Python authenticates concurrently. Each takes as long as ten steps.
const MAX_JUDGED: usize = 8;

/// What all calls of a connection share.
#[derive(Debug)]
pub struct Peer {
    /// As gRPC writes it: `ipv4:127.0.0.1:4711`.
    pub name: String,
    /// Tells connections apart.
    pub number: u64,
    /// The names in the client's certificate, and the credential that they form.
    shown: OnceLock<(Vec<String>, Option<Credential>)>,
    pub load: Load,
    /// Whether a known caller, or one that needs no authentication, has made a call over it.
    is_known: AtomicBool,
    leave: Notify,
    pub quota: Arc<ReadQuota>,
    /// One of its messages is inflated at a time.
    pub inflating: tokio::sync::Mutex<()>,
    /// Places of calls that Python authenticates.
    pub judging: Arc<Semaphore>,
}

impl Peer {
    /// A connection without a certificate.
    pub fn new(name: String, number: u64, load: Load, quota: Arc<ReadQuota>) -> Self {
        Peer {
            name,
            number,
            shown: OnceLock::new(),
            load,
            is_known: AtomicBool::new(false),
            leave: Notify::new(),
            quota,
            inflating: tokio::sync::Mutex::default(),
            judging: Arc::new(Semaphore::new(MAX_JUDGED)),
        }
    }

    /// Set the names in the client's certificate.
    pub fn show(&self, certificate_names: Vec<String>) {
        let certificate = Credential::of_certificate(&certificate_names);
        let _ = self.shown.set((certificate_names, certificate));
    }

    pub fn certificate_names(&self) -> &[String] {
        self.shown.get().map_or(&[], |(names, _)| names)
    }

    pub fn certificate(&self) -> Option<Credential> {
        self.shown.get().and_then(|(_, certificate)| *certificate)
    }

    /// Mark the connection as used by a known caller, or by one that needs no authentication.
    pub fn know(&self) {
        self.is_known.store(true, Ordering::Relaxed);
    }

    pub fn is_known(&self) -> bool {
        self.is_known.load(Ordering::Relaxed)
    }

    /// Close the connection in favour of another, and stop reading it.
    pub fn leave(&self) {
        self.quota.give_up();
        self.leave.notify_one();
    }

    /// Return when the connection must be closed in favour of another.
    pub async fn left(&self) {
        self.leave.notified().await;
    }
}

#[cfg(test)]
impl Peer {
    pub fn numbered(number: u64) -> Self {
        Peer::new("test".to_owned(), number, Load::new(1000), Arc::default())
    }
}
