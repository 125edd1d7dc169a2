//! What peers may make the server hold: counted for each connection and for all, and waited for or refused beyond.

use crate::limits::places::{Places, Pool, Share};
use crate::steps::call::Peer;
use crate::steps::columns::Entry;
use crate::wire::server::Shared;
use bytes::Bytes;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Waker};

/// What a message counts that Python reads, in plain steps: about as many cost the same.
pub const GENERAL: usize = 8;

/// Why a peer was refused something. The names are those of the metric's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A connection: there are as many as may be.
    Connections,
    /// The same, from its address.
    AddressConnections,
    /// A connection that did nothing, or whose callers were not known, for a new one.
    Evicted,
    /// A connection could not be accepted, because file descriptors had run out.
    OpenFiles,
    /// A connection did not begin to speak HTTP/2 in time.
    Handshake,
    /// A connection did not answer a ping in time.
    Silent,
    /// A connection sent very many frames that carry no call.
    ControlFrames,
    /// A connection broke HTTP/2's rules, or h2's own limits.
    Protocol,
    /// A call: there are as many as may be, of all or of this caller, or Python has not looked at many.
    Calls,
    /// A call whose caller is not known: there are as many of these as may be.
    UnknownCalls,
    /// A call that asks how the server is, likewise.
    HealthCalls,
    /// The same, for as long as the client likes.
    Watches,
    /// A message that took too long to come.
    SlowMessage,
    /// A compressed message that is not one stream, or becomes too large.
    Compressed,
    /// A call whose headers are too large.
    Headers,
    /// A call, because too many bytes are in memory.
    Memory,
    /// A call whose replies nobody took for too long.
    UnreadReplies,
}

const REFUSALS: [(Refusal, &str); 17] = [
    (Refusal::Connections, "connections"),
    (Refusal::AddressConnections, "address_connections"),
    (Refusal::Evicted, "evicted"),
    (Refusal::OpenFiles, "open_files"),
    (Refusal::Handshake, "handshake"),
    (Refusal::Silent, "silent"),
    (Refusal::ControlFrames, "control_frames"),
    (Refusal::Protocol, "protocol"),
    (Refusal::Calls, "calls"),
    (Refusal::UnknownCalls, "unknown_calls"),
    (Refusal::HealthCalls, "health_calls"),
    (Refusal::Watches, "watches"),
    (Refusal::SlowMessage, "slow_message"),
    (Refusal::Compressed, "compressed"),
    (Refusal::Headers, "headers"),
    (Refusal::Memory, "memory"),
    (Refusal::UnreadReplies, "unread_replies"),
];

impl Refusal {
    pub fn name(self) -> &'static str {
        REFUSALS.iter().find(|(why, _)| *why == self).map_or("", |(_, name)| name)
    }
}

/// How much there is now, and how often something was refused.
#[derive(Debug, Default)]
pub struct Counts {
    pub connections: AtomicUsize,
    pub calls: Places,
    /// Bytes that peers may send before they are read: the windows of all connections.
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

/// How much there is, for metrics.
pub fn now(shared: &Shared) -> [(&'static str, usize); 9] {
    let load = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    [
        ("connections", load(&shared.counts.connections)),
        ("calls", shared.counts.calls.all()),
        ("unknown_calls", shared.counts.calls.of(Pool::Unknown)),
        ("health_calls", shared.counts.calls.of(Pool::Health)),
        ("watches", shared.counts.calls.of(Pool::Watch)),
        ("held_bytes", load(&shared.held)),
        ("queued_bytes", load(&shared.queued)),
        ("window_bytes", load(&shared.counts.windows)),
        ("unwritten_replies", shared.unwritten()),
    ]
}

/// So much of a count is taken until this is dropped.
#[derive(Debug)]
pub struct Slot {
    shared: Arc<Shared>,
    of: fn(&Counts) -> &AtomicUsize,
    size: usize,
}

impl Slot {
    /// Take so much of a count, if it stays within the limit.
    pub fn take(
        shared: &Arc<Shared>,
        of: fn(&Counts) -> &AtomicUsize,
        size: usize,
        limit: usize,
    ) -> Option<Self> {
        let count = of(&shared.counts);
        if count.fetch_add(size, Ordering::Relaxed) + size > limit {
            count.fetch_sub(size, Ordering::Relaxed);
            return None;
        }
        Some(Slot { shared: shared.clone(), of, size })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        (self.of)(&self.shared.counts).fetch_sub(self.size, Ordering::Relaxed);
    }
}

/// Tasks that wait for room, each of them once.
#[derive(Debug, Default)]
pub struct Waiters(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    round: u64,
    wakers: Vec<Waker>,
}

/// Where a task stands in a list of waiters.
#[derive(Debug, Default)]
pub struct Place(Option<u64>);

impl Waiters {
    /// Be woken with the others; `place` is the task's own, and not to be shared with another list.
    pub fn add(&self, cx: &Context<'_>, place: &mut Place) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if place.0 != Some(waiting.round) {
            place.0 = Some(waiting.round);
            waiting.wakers.push(cx.waker().clone());
        }
    }

    pub fn wake(&self) {
        let woken = {
            let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.wakers.is_empty() {
                return;
            }
            waiting.round += 1;
            std::mem::take(&mut waiting.wakers)
        };
        woken.into_iter().for_each(Waker::wake);
    }
}

/// What a connection has under way.
#[derive(Debug)]
pub struct Load {
    /// Its calls, and bytes of messages and replies in memory.
    pub share: Share,
    /// Steps that Python was handed and has not answered; what is no plain step counts `GENERAL`.
    steps: AtomicUsize,
    most_steps: usize,
    /// They were as many as may be, and not half of them have ended: what is let in comes in numbers, not one by one.
    is_full: AtomicBool,
    waiters: Waiters,
}

impl Load {
    pub fn new(most_steps: usize) -> Self {
        Load {
            share: Share::default(),
            steps: AtomicUsize::new(0),
            most_steps,
            is_full: AtomicBool::new(false),
            waiters: Waiters::default(),
        }
    }

    /// Whether the connection may begin more: else the task is woken when it may.
    pub fn may_begin(&self, cx: &Context<'_>, place: &mut Place) -> bool {
        if !self.is_full.load(Ordering::SeqCst) {
            return true;
        }
        self.waiters.add(cx, place);
        // some may have ended meanwhile, and have seen nobody waiting
        !self.is_full.load(Ordering::SeqCst)
    }

    /// Whether so much is under way that the connection's calls had better take turns.
    pub fn is_busy(&self) -> bool {
        self.steps.load(Ordering::Relaxed) > self.most_steps / 4
    }

    pub fn begin(&self, steps: usize) {
        if self.steps.fetch_add(steps, Ordering::SeqCst) + steps >= self.most_steps {
            self.is_full.store(true, Ordering::SeqCst);
            self.end(0); // others may have ended theirs before that was seen
        }
    }

    pub fn end(&self, steps: usize) {
        let left = self.steps.fetch_sub(steps, Ordering::SeqCst) - steps;
        if left <= self.most_steps / 2 && self.is_full.swap(false, Ordering::SeqCst) {
            self.waiters.wake();
        }
    }
}

/// Steps that nobody will answer any more: the server ends, or they were dropped with their call.
impl Drop for Entry {
    fn drop(&mut self) {
        self.call.peer.load.end(*self.left.get_mut() as usize);
    }
}

/// Bytes in memory for a connection and a caller, counted while this lives.
#[derive(Debug)]
pub struct Held {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    /// None: nobody is asked, or it is not known.
    caller: Option<Arc<Share>>,
    bytes: usize,
}

/// A call that holds no more than this continues where its connection, or its caller, holds too much.
const SMALL_BYTES: usize = 64 << 10;
/// This part of a limit more is for calls that hold little.
const SMALL_PART: usize = 8;

impl Held {
    pub fn new(shared: &Arc<Shared>, peer: &Arc<Peer>, caller: Option<Arc<Share>>, bytes: usize) -> Self {
        let mut held = Held { shared: shared.clone(), peer: peer.clone(), caller, bytes: 0 };
        held.set(bytes);
        held
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// It is so many bytes now.
    pub fn set(&mut self, bytes: usize) {
        let caller = self.caller.as_ref().map(|caller| &caller.bytes);
        for count in [&*self.shared.held, &self.peer.load.share.bytes].into_iter().chain(caller) {
            if bytes >= self.bytes {
                count.fetch_add(bytes - self.bytes, Ordering::Relaxed);
            } else {
                count.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
            }
        }
        self.bytes = bytes;
    }

    /// It is of this caller, as is known now.
    pub fn belongs_to(&mut self, caller: Option<Arc<Share>>) {
        let bytes = self.bytes;
        self.set(0);
        self.caller = caller;
        self.set(bytes);
    }

    /// Whether it must be given up: its connection or its caller holds more than is left for the others, and this is one
    /// of those that hold much; or all together hold so much that nobody may hold more.
    pub fn is_too_much(&self) -> bool {
        let limits = &self.shared.limits;
        let (held, own) = (self.shared.held.load(Ordering::Relaxed), self.own());
        let is_beyond = |bytes: usize, limit: usize| bytes > limit + limit / SMALL_PART;
        (own > limits.connection_bytes || own > limits.budget_bytes.saturating_sub(held))
            && self.bytes > SMALL_BYTES
            || (is_beyond(held, limits.budget_bytes) || is_beyond(own, limits.connection_bytes))
                && self.bytes > 0
    }

    /// The same for a call that begins: beside others of its connection, which hold more than is left, there is no room.
    pub fn may_not_begin(&self) -> bool {
        let limits = &self.shared.limits;
        let (held, own) = (self.shared.held.load(Ordering::Relaxed), self.own());
        let is_over = held > limits.budget_bytes + limits.budget_bytes / SMALL_PART;
        is_over
            || own > SMALL_BYTES
                && (own > limits.connection_bytes || own > limits.budget_bytes.saturating_sub(held))
    }

    /// Bytes of its connection, or of its caller, whichever are more.
    fn own(&self) -> usize {
        let caller = self.caller.as_ref().map_or(0, |caller| caller.bytes.load(Ordering::Relaxed));
        self.peer.load.share.bytes.load(Ordering::Relaxed).max(caller)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// A reply that is counted until it is written to the socket or given up, wherever it waits.
pub fn counted(reply: Bytes, shared: &Arc<Shared>, peer: &Arc<Peer>) -> Bytes {
    struct Counted {
        reply: Bytes,
        _held: Held,
    }
    impl AsRef<[u8]> for Counted {
        fn as_ref(&self) -> &[u8] {
            &self.reply
        }
    }
    let held = Held::new(shared, peer, None, reply.len());
    Bytes::from_owner(Counted { reply, _held: held })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Wake;

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn who_waits_for_room_is_woken_when_there_is_some() {
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let cx = Context::from_waker(&waker);
        let (load, mut place) = (Load::new(10), Place::default());
        load.begin(9);
        assert!(load.may_begin(&cx, &mut place));
        load.begin(5);
        assert!(!load.may_begin(&cx, &mut place) && !load.may_begin(&cx, &mut place));
        assert_eq!(load.waiters.0.lock().unwrap().wakers.len(), 1, "each waits once");
        load.end(8);
        assert!(!woken.0.load(Ordering::Relaxed), "more than half are under way");
        load.end(1);
        assert!(woken.0.load(Ordering::Relaxed) && load.may_begin(&cx, &mut place));
    }

    #[test]
    fn a_reply_counts_until_the_last_part_of_it_is_dropped() {
        let shared = Arc::new(Shared::for_test());
        let peer = Arc::new(Peer::for_test());
        let mut reply = counted(Bytes::from_static(b"0123456789"), &shared, &peer);
        let part = reply.split_to(4);
        drop(reply);
        assert_eq!(shared.held.load(Ordering::Relaxed), 10);
        assert_eq!(&part[..], b"0123");
        drop(part);
        assert_eq!(shared.held.load(Ordering::Relaxed), 0);
        assert_eq!(peer.load.share.bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_holds_much_is_given_up_first() {
        let shared = Arc::new(Shared::for_test());
        let (one, other) = (Arc::new(Peer::for_test()), Arc::new(Peer::for_test()));
        let limit = shared.limits.connection_bytes;
        let mut large = Held::new(&shared, &one, None, limit);
        let small = Held::new(&shared, &one, None, SMALL_BYTES);
        let elsewhere = Held::new(&shared, &other, None, SMALL_BYTES + 1);
        assert!(large.is_too_much() && !small.is_too_much() && !elsewhere.is_too_much());
        assert!(small.may_not_begin() && !elsewhere.may_not_begin());
        large.set(2 * limit);
        assert!(small.is_too_much() && !elsewhere.is_too_much());
        drop(large);
        assert!(!small.is_too_much());
    }

    #[test]
    fn nobody_holds_more_than_is_left_for_the_others() {
        let mut shared = Shared::for_test();
        shared.limits.connection_bytes = usize::MAX / 2;
        let shared = Arc::new(shared);
        let budget = shared.limits.budget_bytes;
        let peers: Vec<_> = (0..3).map(|_| Arc::new(Peer::for_test())).collect();
        let mut first = Held::new(&shared, &peers[0], None, budget / 2);
        assert!(!first.is_too_much());
        let second = Held::new(&shared, &peers[1], None, budget / 4);
        assert!(first.is_too_much() && !second.is_too_much(), "who holds most is refused first");
        first.set(budget / 4 * 3);
        let small = Held::new(&shared, &peers[2], None, SMALL_BYTES);
        assert!(!small.is_too_much() && !small.may_not_begin());
        first.set(budget / 8 * 7);
        assert!(small.is_too_much() && small.may_not_begin(), "nobody may hold more");
    }

    #[test]
    fn a_caller_holds_what_all_of_its_connections_hold() {
        let shared = Arc::new(Shared::for_test());
        let caller = Arc::<Share>::default();
        let peers: Vec<_> = (0..3).map(|_| Arc::new(Peer::for_test())).collect();
        let half = shared.limits.connection_bytes / 2 + 1;
        let mut one = Held::new(&shared, &peers[0], None, half);
        let two = Held::new(&shared, &peers[1], Some(caller.clone()), half);
        assert!(!one.is_too_much() && !two.is_too_much());
        one.belongs_to(Some(caller.clone()));
        assert!(one.is_too_much() && two.is_too_much());
        assert!(!Held::new(&shared, &peers[2], Some(Arc::default()), half).is_too_much());
        drop((one, two));
        assert_eq!(caller.bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn slots_are_given_back() {
        let shared = Arc::new(Shared::for_test());
        let take = || Slot::take(&shared, |counts| &counts.connections, 1, 2);
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
}
