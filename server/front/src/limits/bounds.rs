//! Limits of the memory that peers can use, per connection and in total. Beyond them, the server waits or refuses.

use crate::limits::places::{Places, Pool, Share};
use crate::limits::refusals::{Refusal, REFUSALS};
use crate::limits::settings::Limits;
use bytes::Bytes;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;

/// Current counts, and the number of refusals by reason.
#[derive(Debug, Default)]
pub struct Counts {
    pub connections: AtomicUsize,
    pub calls: Places,
    /// Total size of the flow-control windows of all connections, in bytes.
    pub windows: AtomicUsize,
    refused: [AtomicU64; REFUSALS.len()],
}

impl Counts {
    pub fn refuse(&self, why: Refusal) {
        self.refused[why as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn refusals(&self) -> Vec<(&'static str, u64)> {
        REFUSALS
            .iter()
            .map(|(why, name)| (*name, self.refused[*why as usize].load(Ordering::Relaxed)))
            .collect()
    }
}

/// The limits and current counts of all connections together.
#[derive(Debug)]
pub struct Bounds {
    pub limits: Limits,
    pub counts: Counts,
    /// Bytes of messages and replies in memory.
    pub held: Arc<AtomicUsize>,
}

impl Bounds {
    pub fn new(limits: Limits) -> Self {
        Bounds { limits, counts: Counts::default(), held: Arc::default() }
    }

    #[cfg(test)]
    pub fn for_test() -> Self {
        Bounds::new(Limits::for_test())
    }
}

/// A part of a count, taken until this is dropped.
#[derive(Debug)]
pub struct Slot {
    bounds: Arc<Bounds>,
    of: fn(&Counts) -> &AtomicUsize,
    size: usize,
}

impl Slot {
    /// Add `size` to a count, if it stays within the limit.
    pub fn take(
        bounds: &Arc<Bounds>,
        of: fn(&Counts) -> &AtomicUsize,
        size: usize,
        limit: usize,
    ) -> Option<Self> {
        let count = of(&bounds.counts);
        if count.fetch_add(size, Ordering::Relaxed) + size > limit {
            count.fetch_sub(size, Ordering::Relaxed);
            return None;
        }
        Some(Slot { bounds: bounds.clone(), of, size })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        (self.of)(&self.bounds.counts).fetch_sub(self.size, Ordering::Relaxed);
    }
}

/// Bytes in memory for a connection and a caller, counted while this lives.
#[derive(Debug)]
pub struct Held {
    bounds: Arc<Bounds>,
    /// Share of its connection.
    own: Arc<Share>,
    /// Share of its caller; None: no authentication, or an unknown caller.
    caller: Option<Arc<Share>>,
    bytes: usize,
}

/// A call that holds at most this continues even if its connection or caller holds too much.
const SMALL_BYTES: usize = 64 << 10;
/// Calls that hold little may exceed a limit by this fraction of it.
const SMALL_PART: usize = 8;

impl Held {
    pub fn new(bounds: &Arc<Bounds>, own: &Arc<Share>, caller: Option<Arc<Share>>, bytes: usize) -> Self {
        let mut held = Held { bounds: bounds.clone(), own: own.clone(), caller, bytes: 0 };
        held.set(bytes);
        held
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Set the current number of bytes.
    pub fn set(&mut self, bytes: usize) {
        let caller = self.caller.as_ref().map(|caller| &caller.bytes);
        for count in [&*self.bounds.held, &self.own.bytes].into_iter().chain(caller) {
            if bytes >= self.bytes {
                count.fetch_add(bytes - self.bytes, Ordering::Relaxed);
            } else {
                count.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
            }
        }
        self.bytes = bytes;
    }

    /// Count the bytes for this caller, who is now known.
    pub fn belongs_to(&mut self, caller: Option<Arc<Share>>) {
        let bytes = self.bytes;
        self.set(0);
        self.caller = caller;
        self.set(bytes);
    }

    /// Whether the call must be refused: its connection or caller holds more than is left for the others and the call
    /// itself is large, or all together hold more than the extended limit.
    pub fn is_too_much(&self) -> bool {
        let limits = &self.bounds.limits;
        let (held, own) = (self.bounds.held.load(Ordering::Relaxed), self.own());
        let is_beyond = |bytes: usize, limit: usize| bytes > limit + limit / SMALL_PART;
        (own > limits.connection_bytes || own > limits.budget_bytes.saturating_sub(held))
            && self.bytes > SMALL_BYTES
            || (is_beyond(held, limits.budget_bytes) || is_beyond(own, limits.connection_bytes))
                && self.bytes > 0
    }

    /// Whether a new call must be refused, because its connection or caller already holds more than is left.
    pub fn may_not_begin(&self) -> bool {
        let limits = &self.bounds.limits;
        let (held, own) = (self.bounds.held.load(Ordering::Relaxed), self.own());
        let is_over = held > limits.budget_bytes + limits.budget_bytes / SMALL_PART;
        is_over
            || own > SMALL_BYTES
                && (own > limits.connection_bytes || own > limits.budget_bytes.saturating_sub(held))
    }

    /// Bytes of its connection or of its caller, whichever is larger.
    fn own(&self) -> usize {
        let caller = self.caller.as_ref().map_or(0, |caller| caller.bytes.load(Ordering::Relaxed));
        self.own.bytes.load(Ordering::Relaxed).max(caller)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// A reply that counts as held until it is written to the socket or dropped.
pub fn counted(reply: Bytes, bounds: &Arc<Bounds>, own: &Arc<Share>) -> Bytes {
    struct Counted {
        reply: Bytes,
        _held: Held,
    }
    impl AsRef<[u8]> for Counted {
        fn as_ref(&self) -> &[u8] {
            &self.reply
        }
    }
    let held = Held::new(bounds, own, None, reply.len());
    Bytes::from_owner(Counted { reply, _held: held })
}

/// The place of a call, until this is dropped.
#[derive(Debug)]
pub struct CallPlace {
    bounds: Arc<Bounds>,
    /// Share of its connection.
    own: Arc<Share>,
    /// Share of its caller, if known.
    caller: Option<Arc<Share>>,
    pool: Pool,
}

impl CallPlace {
    /// Take a place. None: no place is left for this connection or caller.
    pub fn take(
        bounds: &Arc<Bounds>,
        own: &Arc<Share>,
        caller: Option<Arc<Share>>,
        pool: Pool,
    ) -> Option<Self> {
        let (limit, most) = pool.limits(&bounds.limits);
        let left = limit.saturating_sub(bounds.counts.calls.of(pool));
        let may_have_one = |share: &Share| {
            let own = share.places.of(pool);
            own < most && (own < left || own == 0 && left > 0)
        };
        if !may_have_one(own) || !caller.as_deref().is_none_or(may_have_one) {
            return None;
        }
        let place = CallPlace { bounds: bounds.clone(), own: own.clone(), caller, pool };
        place.each(|places| places.add(pool));
        Some(place)
    }

    /// Move to a place among the calls of known callers. Returns whether there was one.
    pub fn know(&mut self, caller: Option<Arc<Share>>) -> bool {
        if self.pool != Pool::Unknown {
            return true;
        }
        let found = CallPlace::take(&self.bounds, &self.own, caller, Pool::Known);
        found.map(|found| *self = found).is_some()
    }

    fn each(&self, change: impl Fn(&Places)) {
        change(&self.bounds.counts.calls);
        change(&self.own.places);
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
    #[test]
    fn a_reply_counts_until_its_last_part_is_dropped() {
        let bounds = Arc::new(Bounds::for_test());
        let peer = Arc::<Share>::default();
        let mut reply = counted(Bytes::from_static(b"0123456789"), &bounds, &peer);
        let part = reply.split_to(4);
        drop(reply);
        assert_eq!(bounds.held.load(Ordering::Relaxed), 10);
        assert_eq!(&part[..], b"0123");
        drop(part);
        assert_eq!(bounds.held.load(Ordering::Relaxed), 0);
        assert_eq!(peer.bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn large_calls_are_refused_first() {
        let bounds = Arc::new(Bounds::for_test());
        let (one, other) = (Arc::<Share>::default(), Arc::<Share>::default());
        let limit = bounds.limits.connection_bytes;
        let mut large = Held::new(&bounds, &one, None, limit);
        let small = Held::new(&bounds, &one, None, SMALL_BYTES);
        let elsewhere = Held::new(&bounds, &other, None, SMALL_BYTES + 1);
        assert!(large.is_too_much() && !small.is_too_much() && !elsewhere.is_too_much());
        assert!(small.may_not_begin() && !elsewhere.may_not_begin());
        large.set(2 * limit);
        assert!(small.is_too_much() && !elsewhere.is_too_much());
        drop(large);
        assert!(!small.is_too_much());
    }

    #[test]
    fn no_connection_holds_more_than_is_left_for_the_others() {
        let mut bounds = Bounds::for_test();
        bounds.limits.connection_bytes = usize::MAX / 2;
        let bounds = Arc::new(bounds);
        let budget = bounds.limits.budget_bytes;
        let peers: Vec<_> = (0..3).map(|_| Arc::<Share>::default()).collect();
        let mut first = Held::new(&bounds, &peers[0], None, budget / 2);
        assert!(!first.is_too_much());
        let second = Held::new(&bounds, &peers[1], None, budget / 4);
        assert!(first.is_too_much() && !second.is_too_much(), "the largest holder is refused first");
        first.set(budget / 4 * 3);
        let small = Held::new(&bounds, &peers[2], None, SMALL_BYTES);
        assert!(!small.is_too_much() && !small.may_not_begin());
        first.set(budget / 8 * 7);
        assert!(small.is_too_much() && small.may_not_begin(), "the extended limit applies to all");
    }

    #[test]
    fn a_caller_holds_the_bytes_of_all_its_connections() {
        let bounds = Arc::new(Bounds::for_test());
        let caller = Arc::<Share>::default();
        let peers: Vec<_> = (0..3).map(|_| Arc::<Share>::default()).collect();
        let half = bounds.limits.connection_bytes / 2 + 1;
        let mut one = Held::new(&bounds, &peers[0], None, half);
        let two = Held::new(&bounds, &peers[1], Some(caller.clone()), half);
        assert!(!one.is_too_much() && !two.is_too_much());
        one.belongs_to(Some(caller.clone()));
        assert!(one.is_too_much() && two.is_too_much());
        assert!(!Held::new(&bounds, &peers[2], Some(Arc::default()), half).is_too_much());
        drop((one, two));
        assert_eq!(caller.bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn slots_are_released() {
        let bounds = Arc::new(Bounds::for_test());
        let take = || Slot::take(&bounds, |counts| &counts.connections, 1, 2);
        let (first, second) = (take(), take());
        assert!(first.is_some() && second.is_some() && take().is_none());
        drop(first);
        assert!(take().is_some());
    }

    #[test]
    fn each_refusal_has_its_own_count() {
        let counts = Counts::default();
        for (why, name) in REFUSALS {
            counts.refuse(why);
            let found: Vec<_> = counts.refusals().into_iter().filter(|(_, count)| *count > 0).collect();
            assert_eq!(found.last(), Some(&(name, 1)));
        }
    }

    fn take(bounds: &Arc<Bounds>, own: &Arc<Share>, caller: Option<&Arc<Share>>) -> Option<CallPlace> {
        CallPlace::take(bounds, own, caller.cloned(), Pool::Known)
    }

    /// Take all places that a connection can get.
    fn fill(bounds: &Arc<Bounds>, own: &Arc<Share>, caller: Option<&Arc<Share>>) -> Vec<CallPlace> {
        std::iter::from_fn(|| take(bounds, own, caller)).collect()
    }

    #[test]
    fn no_connection_has_more_places_than_are_left_for_the_others() {
        let bounds = Arc::new(Bounds::for_test()); // 10 places
        let peers: Vec<_> = (0..4).map(|_| Arc::<Share>::default()).collect();
        let first = fill(&bounds, &peers[0], None);
        assert_eq!(first.len(), 5);
        let second = fill(&bounds, &peers[1], None);
        assert_eq!(second.len(), 3);
        assert!(take(&bounds, &peers[0], None).is_none(), "it is the largest holder");
        let one = take(&bounds, &peers[2], None);
        let last = take(&bounds, &peers[3], None);
        assert!(one.is_some() && last.is_some(), "connections without a place get one");
        assert!(take(&bounds, &peers[3], None).is_none(), "none is left");
        drop((first, second, one, last));
        assert_eq!((bounds.counts.calls.all(), peers[0].places.all()), (0, 0));
    }

    #[test]
    fn a_caller_has_one_share_for_all_its_connections() {
        let bounds = Arc::new(Bounds::for_test());
        let caller = Arc::default();
        let peers: Vec<_> = (0..5).map(|_| Arc::<Share>::default()).collect();
        let held: Vec<_> = peers.iter().flat_map(|peer| fill(&bounds, peer, Some(&caller))).collect();
        assert_eq!(held.len(), 5);
        assert!(take(&bounds, &Arc::<Share>::default(), Some(&Arc::default())).is_some(), "another caller");
    }

    #[test]
    fn a_call_changes_pools_when_its_caller_is_known() {
        let bounds = Arc::new(Bounds::for_test());
        let peer = Arc::<Share>::default();
        let unknown = || CallPlace::take(&bounds, &peer, None, Pool::Unknown);
        let mut place = unknown().unwrap();
        assert!(place.know(None));
        assert_eq!((bounds.counts.calls.of(Pool::Unknown), bounds.counts.calls.of(Pool::Known)), (0, 1));
        let _others = fill(&bounds, &peer, None);
        let mut late = unknown().unwrap();
        assert!(!late.know(None), "no place is left");
        drop(late);
        assert_eq!(bounds.counts.calls.of(Pool::Unknown), 0);
    }

    #[test]
    fn health_checks_have_places_when_calls_have_none() {
        let bounds = Arc::new(Bounds::for_test());
        let peer = Arc::<Share>::default();
        let _all = fill(&bounds, &peer, None);
        assert!(CallPlace::take(&bounds, &peer, None, Pool::Health).is_some());
    }
}
