//! Places of calls: each kind of call has a number of places, which connections and callers share.
//!
//! No holder may have more places than are left for the others. So the largest holder is refused first, and one without a
//! place gets one while any is left.

use crate::limits::refusals::Refusal;
use crate::limits::settings::Limits;
use crate::method::Method;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Kinds of calls that take no places from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// Calls of known callers; without authentication, all calls except health checks and watches.
    Known,
    /// Calls of callers that are not known yet.
    Unknown,
    /// Health checks, which every client may make and which are answered even under overload.
    Health,
    /// Health watches, which last as long as the client wants.
    Watch,
}

pub const POOLS: usize = 4;
/// Limits per connection. Health checkers need few calls.
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

    /// The limits of places in total, and per connection or caller.
    pub fn limits(self, limits: &Limits) -> (usize, usize) {
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

/// The number of places taken, by kind.
#[derive(Debug, Default)]
pub struct Places([AtomicUsize; POOLS]);

impl Places {
    pub fn of(&self, pool: Pool) -> usize {
        self.0[pool as usize].load(Ordering::Relaxed)
    }

    pub fn all(&self) -> usize {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    pub fn add(&self, pool: Pool) {
        self.0[pool as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn remove(&self, pool: Pool) {
        self.0[pool as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

/// The places and bytes of a connection, or of a caller over all of its connections.
#[derive(Debug, Default)]
pub struct Share {
    pub places: Places,
    /// Bytes of messages and replies in memory.
    pub bytes: AtomicUsize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::FastPath;

    #[test]
    fn health_has_places_of_its_own() {
        let method = |streams, is_open| Method { index: 0, streams, fast_path: FastPath::No, is_open };
        assert_eq!(Pool::of(method(false, true), false), Pool::Health);
        assert_eq!(Pool::of(method(true, true), true), Pool::Watch);
        assert_eq!(Pool::of(method(true, false), true), Pool::Known);
        assert_eq!(Pool::of(method(false, false), false), Pool::Unknown);
    }
}
