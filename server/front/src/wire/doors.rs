//! How a listener goes about connections that it cannot take.

use crate::calls::queue::Queue;
use crate::limits::bounds::{Bounds, Slot};
use crate::limits::refusals::Refusal;
use crate::limits::tenancy::{Connections, FromAddress};
use crate::steps::columns::Arrival;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The log says so often at most that connections are refused.
const NOTICE_EVERY: Duration = Duration::from_secs(60);
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Connections beyond those that may be, until as many have left for them.
const LEAVING: usize = 64;

/// A connection's place among all.
#[derive(Debug)]
pub struct Entry {
    _slot: Slot,
    _address: Option<FromAddress>,
}

/// One listener's.
#[derive(Debug)]
pub struct Doors {
    bounds: Arc<Bounds>,
    queue: Arc<Queue>,
    open: Arc<Connections>,
    /// Callers are asked who they are.
    asks: bool,
    pause: Duration,
    told: Vec<(Refusal, Instant)>,
}

impl Doors {
    pub fn new(bounds: Arc<Bounds>, queue: Arc<Queue>, open: Arc<Connections>, asks: bool) -> Self {
        Doors { bounds, queue, open, asks, pause: SHORTEST_PAUSE, told: Vec::new() }
    }

    /// The socket of a connection that was accepted, and its place among all; None: it is closed, or there was none.
    /// `address`: where a socket comes from, if that counts.
    pub async fn admit<S>(
        &mut self,
        accepted: io::Result<S>,
        address: impl FnOnce(&S) -> Option<IpAddr>,
    ) -> Option<(S, Entry)> {
        match accepted {
            Ok(socket) => {
                self.pause = SHORTEST_PAUSE;
                let entry = self.enter(address(&socket))?;
                Some((socket, entry))
            }
            Err(error) if is_of_the_peer(&error) => None,
            Err(_) => {
                // file descriptors or memory have run out: others' ends bring some back
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
            slot = take(most + LEAVING);
            self.refuse(Refusal::Evicted);
        }
        if slot.is_none() {
            self.refuse(Refusal::Connections);
        }
        Some(Entry { _slot: slot?, _address: own })
    }

    /// Count it, and let the log say so from time to time.
    fn refuse(&mut self, why: Refusal) {
        self.bounds.counts.refuse(why);
        self.told.retain(|(_, at)| at.elapsed() < NOTICE_EVERY);
        if self.told.iter().all(|(told, _)| *told != why) {
            self.told.push((why, Instant::now()));
            self.queue.push(Arrival::Refused(why));
        }
    }
}

/// Whether accepting failed because the peer has gone meanwhile.
fn is_of_the_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, TimedOut};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | TimedOut)
}
