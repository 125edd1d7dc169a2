//! The open connections. Idle ones are closed to make room for new ones.

use crate::limits::peer::Peer;
use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Limit of connections to check when a new one finds no room.
const LOOKS: usize = 64;

/// All of them.
#[derive(Debug, Default)]
pub struct Connections(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    /// Roughly from oldest to newest.
    all: VecDeque<Weak<Peer>>,
    /// Number of connections from each address.
    addresses: HashMap<IpAddr, usize>,
}

impl Connections {
    pub fn add(&self, peer: &Arc<Peer>) {
        let mut table = self.table();
        // drops ended connections as new ones are added, so that the list does not grow
        for _ in 0..2 {
            match table.all.pop_front() {
                Some(old) if old.strong_count() > 0 => table.all.push_back(old),
                _ => {}
            }
        }
        table.all.push_back(Arc::downgrade(peer));
    }

    /// Close an idle connection, or one without a known caller. Returns whether there was one. `asks`: callers are
    /// authenticated.
    pub fn make_room(&self, asks: bool) -> bool {
        let mut table = self.table();
        let mut idle = None;
        for _ in 0..LOOKS.min(table.all.len()) {
            let Some(weak) = table.all.pop_front() else { break };
            let Some(peer) = weak.upgrade() else { continue };
            if asks && !peer.is_known() {
                peer.leave();
                return true;
            }
            if idle.is_none() && peer.load.share.places.all() == 0 {
                idle = Some(peer);
            } else {
                table.all.push_back(weak);
            }
        }
        idle.inspect(|peer| peer.leave()).is_some()
    }

    /// Close the connection with the most bytes outside the flow-control windows, first those without a known caller. It
    /// stops after `LOOKS` connections once it has found one. Returns whether there was one.
    pub fn end_largest(&self) -> bool {
        let mut table = self.table();
        let mut largest: Option<Arc<Peer>> = None;
        for looks in 0..table.all.len() {
            if looks >= LOOKS && largest.is_some() {
                break;
            }
            let Some(weak) = table.all.pop_front() else { break };
            let Some(peer) = weak.upgrade() else { continue };
            table.all.push_back(weak);
            let rank = |peer: &Peer| (!peer.is_known(), peer.quota.kept());
            if peer.quota.kept() > 0 && largest.as_ref().is_none_or(|other| rank(&peer) > rank(other)) {
                largest = Some(peer);
            }
        }
        let Some(peer) = largest else { return false };
        peer.leave();
        true
    }

    /// Count a connection from an address until the result is dropped; None: the address has reached its limit.
    pub fn come(self: &Arc<Self>, address: IpAddr, limit: usize) -> Option<FromAddress> {
        let address = address.to_canonical();
        let mut table = self.table();
        let count = table.addresses.entry(address).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(FromAddress { connections: self.clone(), address })
    }

    #[cfg(test)]
    pub fn know_last(&self) {
        self.table().all.iter().filter_map(Weak::upgrade).max_by_key(|peer| peer.number).unwrap().know();
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a connection among those of its address.
#[derive(Debug)]
pub struct FromAddress {
    connections: Arc<Connections>,
    address: IpAddr,
}

impl Drop for FromAddress {
    fn drop(&mut self) {
        let mut table = self.connections.table();
        if let Some(count) = table.addresses.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                table.addresses.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::bounds::{Bounds, CallPlace};
    use crate::limits::places::Pool;
    use std::net::Ipv4Addr;

    fn has_left(peer: &Peer) -> bool {
        let waker = std::task::Waker::noop();
        std::pin::pin!(peer.left()).poll(&mut std::task::Context::from_waker(waker)).is_ready()
    }

    use std::future::Future;

    #[test]
    fn idle_connections_are_closed_first() {
        let bounds = Arc::new(Bounds::for_test());
        let connections = Connections::default();
        let peers: Vec<_> = (0..3).map(|_| Arc::new(Peer::numbered(0))).collect();
        peers.iter().for_each(|peer| connections.add(peer));
        peers.iter().for_each(|peer| peer.know());
        let place = CallPlace::take(&bounds, &peers[0].load.share, None, Pool::Known);
        assert!(place.is_some() && connections.make_room(true) && connections.make_room(true));
        assert!(!connections.make_room(true), "the other connection has a call");
        assert_eq!(peers.iter().map(|peer| has_left(peer)).collect::<Vec<_>>(), [false, true, true]);
        drop(place);
        assert!(connections.make_room(true) && has_left(&peers[0]));
    }

    #[test]
    fn with_authentication_connections_of_unknown_callers_are_closed_even_if_busy() {
        let bounds = Arc::new(Bounds::for_test());
        let connections = Connections::default();
        let (idle, stranger) = (Arc::new(Peer::numbered(0)), Arc::new(Peer::numbered(0)));
        idle.know();
        connections.add(&idle);
        connections.add(&stranger);
        let _place = CallPlace::take(&bounds, &stranger.load.share, None, Pool::Unknown);
        assert!(connections.make_room(true) && has_left(&stranger) && !has_left(&idle));
    }

    #[test]
    fn of_connections_with_incomplete_frames_unknown_callers_are_closed_first() {
        let connections = Connections::default();
        let peers: Vec<_> = (0..4).map(|_| Arc::new(Peer::numbered(0))).collect();
        peers.iter().for_each(|peer| connections.add(peer));
        for (peer, bytes) in peers.iter().zip([3000, 2000, 1000, 0]) {
            peer.quota.set_kept(bytes);
        }
        peers[0].know();
        for left in [[false, true, false, false], [false, false, true, false], [true, false, false, false]] {
            assert!(connections.end_largest());
            assert_eq!(peers.iter().map(|peer| has_left(peer)).collect::<Vec<_>>(), left);
        }
        assert!(!connections.end_largest());
        let idle: Vec<_> = (0..2 * LOOKS).map(|_| Arc::new(Peer::numbered(0))).collect();
        idle.iter().for_each(|peer| connections.add(peer));
        let last = idle.last().unwrap();
        last.quota.set_kept(1);
        assert!(connections.end_largest() && has_left(last), "it is found at any position");
    }

    #[test]
    fn connections_of_an_address_are_counted() {
        let connections = Arc::new(Connections::default());
        let [one, other] = [1, 2].map(|last| IpAddr::from(Ipv4Addr::new(10, 0, 0, last)));
        let mapped = IpAddr::from(Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped());
        let held = (connections.come(one, 2), connections.come(mapped, 2));
        assert!(held.0.is_some() && held.1.is_some() && connections.come(one, 2).is_none());
        assert!(connections.come(other, 2).is_some());
        drop(held);
        assert!(connections.come(one, 1).is_some() && connections.table().addresses.is_empty());
    }
}
