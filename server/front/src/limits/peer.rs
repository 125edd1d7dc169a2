//! A connection, as seen by its calls and by other connections.

use crate::limits::callers::Credential;
use crate::limits::load::Load;
use crate::limits::read_quota::ReadQuota;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::{Notify, Semaphore};

/// Calls of one connection of which Python is asked at the same time who makes them. Asking takes as long as ten steps.
const MAX_JUDGED: usize = 8;

/// What all calls of a connection share.
#[derive(Debug)]
pub struct Peer {
    /// As gRPC writes it: `ipv4:127.0.0.1:4711`.
    pub name: String,
    /// Tells connections apart.
    pub number: u64,
    /// Of the certificate with which its client has shown who it is; and the same, as what calls are known by.
    shown: OnceLock<(Vec<String>, Option<Credential>)>,
    pub load: Load,
    /// A caller who is known, or need not be, has made a call over it.
    is_known: AtomicBool,
    leave: Notify,
    pub quota: Arc<ReadQuota>,
    /// One of its messages is inflated at a time.
    pub inflating: tokio::sync::Mutex<()>,
    /// Places of calls that Python authenticates.
    pub judging: Arc<Semaphore>,
}

impl Peer {
    /// One that has shown no certificate.
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

    /// It has shown a certificate with these names.
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

    /// A caller who is known, or need not be, makes a call over it.
    pub fn know(&self) {
        self.is_known.store(true, Ordering::Relaxed);
    }

    pub fn is_known(&self) -> bool {
        self.is_known.load(Ordering::Relaxed)
    }

    /// Make the connection leave for another. It is read no further.
    pub fn leave(&self) {
        self.quota.give_up();
        self.leave.notify_one();
    }

    /// Return when the connection is to leave for another.
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
