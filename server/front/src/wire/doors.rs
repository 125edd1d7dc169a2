//! How a listener goes about connections that it cannot take.

use crate::limits::bounds::{Refusal, Slot};
use crate::limits::tenancy::FromAddress;
use crate::steps::columns::Arrival;
use crate::wire::server::Shared;
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
    shared: Arc<Shared>,
    pause: Duration,
    told: Vec<(Refusal, Instant)>,
}

impl Doors {
    pub fn new(shared: Arc<Shared>) -> Self {
        Doors { shared, pause: SHORTEST_PAUSE, told: Vec::new() }
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
        let most = self.shared.limits.address_connections;
        let mut own = None;
        if let Some(address) = address.filter(|_| most > 0) {
            own = self.shared.open.come(address, most);
            if own.is_none() {
                self.refuse(Refusal::AddressConnections);
                return None;
            }
        }
        let most = self.shared.limits.connections;
        let take = |most| Slot::take(&self.shared, |counts| &counts.connections, 1, most);
        let mut slot = take(most);
        if slot.is_none() && self.shared.open.make_room(self.shared.callers.is_some()) {
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
        self.shared.counts.refuse(why);
        self.told.retain(|(_, at)| at.elapsed() < NOTICE_EVERY);
        if self.told.iter().all(|(told, _)| *told != why) {
            self.told.push((why, Instant::now()));
            self.shared.arrive(|arrivals| arrivals.push(Arrival::Refused(why)));
        }
    }
}

/// Whether accepting failed because the peer has gone meanwhile.
fn is_of_the_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, TimedOut};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | TimedOut)
}
