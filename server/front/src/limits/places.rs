//! Places of calls: each kind of call has a number of places, which connections and callers share.
//!
//! Nobody may hold more places than are left for the others. So the largest holder is refused first, however many there
//! are, and one that holds nothing gets a place while there is any.

use crate::limits::refusals::Refusal;
use crate::limits::settings::Limits;
use crate::method::Method;
use std::sync::atomic::{AtomicUsize, Ordering};

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

    pub fn add(&self, pool: Pool) {
        self.0[pool as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn remove(&self, pool: Pool) {
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
