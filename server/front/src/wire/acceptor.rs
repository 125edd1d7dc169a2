//! Accepts connections of a listener, and refuses or delays those beyond the limits.

use crate::calls::queue::Queue;
use crate::limits::bounds::{Bounds, Slot};
use crate::limits::connections::{Connections, FromAddress};
use crate::limits::refusals::Refusal;
use crate::steps::columns::Arrival;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Interval between two log messages about refused connections.
const NOTICE_EVERY: Duration = Duration::from_secs(60);
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Connections above the limit, until as many idle ones have closed for them.
const EVICTION_SLACK: usize = 64;

/// A connection's place among all.
#[derive(Debug)]
pub struct Entry {
    _slot: Slot,
    _address: Option<FromAddress>,
}

/// Accepts the connections of one listener.
#[derive(Debug)]
pub struct Acceptor {
    bounds: Arc<Bounds>,
    queue: Arc<Queue>,
    open: Arc<Connections>,
    /// Whether callers are authenticated.
    asks: bool,
    pause: Duration,
    logged: Vec<(Refusal, Instant)>,
}

impl Acceptor {
    pub fn new(bounds: Arc<Bounds>, queue: Arc<Queue>, open: Arc<Connections>, asks: bool) -> Self {
        Acceptor { bounds, queue, open, asks, pause: SHORTEST_PAUSE, logged: Vec::new() }
    }

    /// Returns the socket of an accepted connection and its place among all; None: it was refused, or accepting failed.
    /// `address`: the peer's address, if it is limited.
    pub async fn admit<S>(
        &mut self,
        accepted: io::Result<S>,
        address: impl FnOnce(&S) -> Option<IpAddr>,
    ) -> Option<(S, Entry)> {
        match accepted {
            Ok(socket) => {
                self.pause = SHORTEST_PAUSE;
                self.enter(address(&socket)).map(|entry| (socket, entry))
            }
            Err(error) if is_of_the_peer(&error) => None,
            Err(_) => {
                // out of file descriptors or memory, until other connections end
                self.refuse(Refusal::OpenFiles);
                tokio::time::sleep(self.pause).await;
                self.pause = LONGEST_PAUSE.min(2 * self.pause);
                None
            }
        }
    }

    fn enter(&mut self, address: Option<IpAddr>) -> Option<Entry> {
        let most = self.bounds.limits.address_connections;
        let mut own = None;
        if let Some(address) = address.filter(|_| most > 0) {
            own = self.open.come(address, most);
            if own.is_none() {
                self.refuse(Refusal::AddressConnections);
                return None;
            }
        }
        let most = self.bounds.limits.connections;
        let take = |most| Slot::take(&self.bounds, |counts| &counts.connections, 1, most);
        let mut slot = take(most);
        if slot.is_none() && self.open.make_room(self.asks) {
            slot = take(most + EVICTION_SLACK);
            self.refuse(Refusal::Evicted);
        }
        if slot.is_none() {
            self.refuse(Refusal::Connections);
        }
        Some(Entry { _slot: slot?, _address: own })
    }

    /// Count a refusal, and log it from time to time.
    fn refuse(&mut self, why: Refusal) {
        self.bounds.counts.refuse(why);
        self.logged.retain(|(_, at)| at.elapsed() < NOTICE_EVERY);
        if self.logged.iter().all(|(logged, _)| *logged != why) {
            self.logged.push((why, Instant::now()));
            self.queue.push(Arrival::Refused(why));
        }
    }
}

/// Whether accepting failed because the peer closed the connection.
fn is_of_the_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, TimedOut};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | TimedOut)
}
