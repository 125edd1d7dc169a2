//! Places of calls: of each kind there are a number, which connections and callers share.
//!
//! Nobody may hold more than what is left for the others. So whoever holds most is refused first, however many there are,
//! and one that holds nothing gets a place as long as there is any.

use crate::limits::bounds::Refusal;
use crate::limits::settings::Limits;
use crate::steps::call::Peer;
use crate::wire::server::{Method, Shared};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

/// Kinds of calls that take no places from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// Calls of known callers; where nobody is asked who calls, all but those of the next two kinds.
    Known,
    /// Calls whose caller is not known, or not yet.
    Unknown,
    /// Whether the server is there: for everybody, and answered when nothing else is.
    Health,
    /// The same, for as long as the client likes.
    Watch,
}

pub const POOLS: usize = 4;
/// Of one connection: what asks for health needs few.
const MAX_HEALTH_CALLS: usize = 64;
const MAX_WATCHES: usize = 8;

impl Pool {
    pub fn of(method: Method, is_known: bool) -> Self {
        match (method.is_open, method.streams) {
            (true, true) => Pool::Watch,
            (true, false) => Pool::Health,
            _ if is_known => Pool::Known,
            _ => Pool::Unknown,
        }
    }

    /// Places of all, and of one connection or caller.
    fn limits(self, limits: &Limits) -> (usize, usize) {
        match self {
            Pool::Known => (limits.calls, usize::MAX),
            Pool::Unknown => (limits.unknown_calls, usize::MAX),
            Pool::Health => (limits.health_calls, MAX_HEALTH_CALLS),
            Pool::Watch => (limits.watches, MAX_WATCHES),
        }
    }

    pub fn refusal(self) -> Refusal {
        match self {
            Pool::Known => Refusal::Calls,
            Pool::Unknown => Refusal::UnknownCalls,
            Pool::Health => Refusal::HealthCalls,
            Pool::Watch => Refusal::Watches,
        }
    }
}

/// What there is of each kind.
#[derive(Debug, Default)]
pub struct Places([AtomicUsize; POOLS]);

impl Places {
    pub fn of(&self, pool: Pool) -> usize {
        self.0[pool as usize].load(Ordering::Relaxed)
    }

    pub fn all(&self) -> usize {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    fn add(&self, pool: Pool) {
        self.0[pool as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn remove(&self, pool: Pool) {
        self.0[pool as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

/// What one connection holds, or one caller over all of its connections.
#[derive(Debug, Default)]
pub struct Share {
    pub places: Places,
    /// Bytes of messages and replies in memory.
    pub bytes: AtomicUsize,
}

/// The place of a call, until this is dropped.
#[derive(Debug)]
pub struct CallPlace {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    /// That of its caller, if it is known.
    caller: Option<Arc<Share>>,
    pool: Pool,
}

impl CallPlace {
    /// None: there is none for this connection, or this caller.
    pub fn take(
        shared: &Arc<Shared>,
        peer: &Arc<Peer>,
        caller: Option<Arc<Share>>,
        pool: Pool,
    ) -> Option<Self> {
        let (limit, most) = pool.limits(&shared.limits);
        let left = limit.saturating_sub(shared.counts.calls.of(pool));
        let may_have_one = |share: &Share| {
            let own = share.places.of(pool);
            own < most && (own < left || own == 0 && left > 0)
        };
        if !may_have_one(&peer.load.share) || !caller.as_deref().is_none_or(may_have_one) {
            return None;
        }
        let place = CallPlace { shared: shared.clone(), peer: peer.clone(), caller, pool };
        place.each(|places| places.add(pool));
        Some(place)
    }

    /// Its caller is known now: it takes a place among those instead; whether there is one.
    pub fn know(&mut self, caller: Option<Arc<Share>>) -> bool {
        if self.pool != Pool::Unknown {
            return true;
        }
        let found = CallPlace::take(&self.shared, &self.peer, caller, Pool::Known);
        found.map(|found| *self = found).is_some()
    }

    fn each(&self, change: impl Fn(&Places)) {
        change(&self.shared.counts.calls);
        change(&self.peer.load.share.places);
        if let Some(caller) = &self.caller {
            change(&caller.places);
        }
    }
}

impl Drop for CallPlace {
    fn drop(&mut self) {
        self.each(|places| places.remove(self.pool));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::server::Plain;

    fn take(shared: &Arc<Shared>, peer: &Arc<Peer>, caller: Option<&Arc<Share>>) -> Option<CallPlace> {
        CallPlace::take(shared, peer, caller.cloned(), Pool::Known)
    }

    /// As many as there are for a connection.
    fn fill(shared: &Arc<Shared>, peer: &Arc<Peer>, caller: Option<&Arc<Share>>) -> Vec<CallPlace> {
        std::iter::from_fn(|| take(shared, peer, caller)).collect()
    }

    #[test]
    fn nobody_holds_more_than_is_left_for_the_others() {
        let shared = Arc::new(Shared::for_test()); // 10 places
        let peers: Vec<_> = (0..4).map(|_| Arc::new(Peer::for_test())).collect();
        let first = fill(&shared, &peers[0], None);
        assert_eq!(first.len(), 5);
        let second = fill(&shared, &peers[1], None);
        assert_eq!(second.len(), 3);
        assert!(take(&shared, &peers[0], None).is_none(), "it holds most");
        let one = take(&shared, &peers[2], None);
        let last = take(&shared, &peers[3], None);
        assert!(one.is_some() && last.is_some(), "those that hold nothing");
        assert!(take(&shared, &peers[3], None).is_none(), "none is left");
        drop((first, second, one, last));
        assert_eq!((shared.counts.calls.all(), peers[0].load.share.places.all()), (0, 0));
    }

    #[test]
    fn a_caller_has_one_share_over_all_of_its_connections() {
        let shared = Arc::new(Shared::for_test());
        let caller = Arc::default();
        let peers: Vec<_> = (0..5).map(|_| Arc::new(Peer::for_test())).collect();
        let held: Vec<_> = peers.iter().flat_map(|peer| fill(&shared, peer, Some(&caller))).collect();
        assert_eq!(held.len(), 5);
        assert!(
            take(&shared, &Arc::new(Peer::for_test()), Some(&Arc::default())).is_some(),
            "another caller"
        );
    }

    #[test]
    fn a_call_moves_when_its_caller_is_known() {
        let shared = Arc::new(Shared::for_test());
        let peer = Arc::new(Peer::for_test());
        let unknown = || CallPlace::take(&shared, &peer, None, Pool::Unknown);
        let mut place = unknown().unwrap();
        assert!(place.know(None));
        assert_eq!((shared.counts.calls.of(Pool::Unknown), shared.counts.calls.of(Pool::Known)), (0, 1));
        let _others = fill(&shared, &peer, None);
        let mut late = unknown().unwrap();
        assert!(!late.know(None), "there is no place");
        drop(late);
        assert_eq!(shared.counts.calls.of(Pool::Unknown), 0);
    }

    #[test]
    fn health_has_places_of_its_own() {
        let method = |streams, is_open| Method { index: 0, streams, plain: Plain::No, is_open };
        assert_eq!(Pool::of(method(false, true), false), Pool::Health);
        assert_eq!(Pool::of(method(true, true), true), Pool::Watch);
        assert_eq!(Pool::of(method(true, false), true), Pool::Known);
        assert_eq!(Pool::of(method(false, false), false), Pool::Unknown);
        let shared = Arc::new(Shared::for_test());
        let peer = Arc::new(Peer::for_test());
        let _all = fill(&shared, &peer, None);
        assert!(CallPlace::take(&shared, &peer, None, Pool::Health).is_some());
    }
}
