//! The queue of arrivals for Python, and the wake-up of Python's event loop.

use crate::limits::load::{Place, Waiters};
use crate::steps::call::Call;
use crate::steps::columns::{Arrival, Arrivals, MAX_IN_BATCH};
use crate::steps::parse::Step;
use crate::wakeup::Wakeup;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Context;

/// The front's thread adds to it, and Python's event loop takes from it.
#[derive(Debug)]
pub struct Queue {
    arrivals: Mutex<Arrivals>,
    pub wakeup: Wakeup,
    /// Python's event loop is about to take the arrivals.
    pub is_taking: AtomicBool,
    /// Whether the front's thread has ended.
    pub is_dead: AtomicBool,
    /// Number of calls that ended before their answer, so that nobody searches for them while there are none.
    pub abandoned: AtomicU64,
    /// Bytes of fast-path messages that Python has not taken, and the limit at which reading of streams pauses.
    pub bytes: AtomicUsize,
    max_bytes: usize,
    /// Streams that wait until Python has taken some.
    readers: Waiters,
}

impl Queue {
    pub fn new(wakeup: Wakeup, max_bytes: usize) -> Self {
        Queue {
            arrivals: Mutex::default(),
            wakeup,
            is_taking: AtomicBool::new(false),
            is_dead: AtomicBool::new(false),
            abandoned: AtomicU64::new(0),
            bytes: AtomicUsize::new(0),
            max_bytes,
            readers: Waiters::default(),
        }
    }

    /// Add to the arrivals, and wake Python's event loop if it does not know of any yet.
    pub fn add(&self, add: impl FnOnce(&mut Arrivals)) {
        let was_empty = {
            let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            let was_empty = arrivals.is_empty();
            add(&mut arrivals);
            was_empty
        };
        if was_empty && !self.is_taking.load(Ordering::Relaxed) {
            self.wakeup.ring();
        }
    }

    pub fn push(&self, arrival: Arrival) {
        self.add(|arrivals| arrivals.push(arrival));
    }

    /// Push it unless there is too much of its kind. Returns whether it was pushed.
    pub fn push_unless(&self, is_too_much: impl Fn(&Arrivals) -> bool, arrival: Arrival) -> bool {
        let mut added = false;
        self.add(|arrivals| {
            if !is_too_much(arrivals) {
                arrivals.push(arrival);
                added = true;
            }
        });
        added
    }

    /// Push a fast-path step, whose message has `held` bytes. See `Arrivals::push_step`.
    pub fn push_step(
        &self,
        call: Arc<Call>,
        frame_id: Option<u64>,
        step: &Step<'_>,
        deadline: f64,
        held: usize,
    ) {
        self.bytes.fetch_add(held, Ordering::Relaxed);
        self.add(|arrivals| arrivals.push_step(call, frame_id, step, deadline, held));
    }

    /// Announce that the front's thread has ended.
    pub fn end(&self) {
        self.is_dead.store(true, Ordering::Release);
        self.wakeup.ring();
    }

    /// Take some of the arrivals. Python is woken again if there are more.
    pub fn take(&self) -> Vec<Arrival> {
        self.wakeup.quiet();
        let (taken, bytes, is_all) = {
            let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            let (taken, bytes) = arrivals.take(MAX_IN_BATCH);
            (taken, bytes, arrivals.is_empty())
        };
        if !is_all {
            self.wakeup.ring();
        }
        let left = self.bytes.fetch_sub(bytes, Ordering::Relaxed) - bytes;
        if left < self.max_bytes {
            self.readers.wake();
        }
        taken
    }

    /// Whether a stream may be read. If not, it is woken when Python has taken enough.
    pub fn may_read(&self, cx: &Context<'_>, place: &mut Place) -> bool {
        if self.bytes.load(Ordering::Relaxed) < self.max_bytes {
            return true;
        }
        self.readers.add(cx, place);
        // Python may have taken it meanwhile, when nobody was waiting
        self.bytes.load(Ordering::Relaxed) < self.max_bytes
    }

    /// A call ended before its answer.
    pub fn abandon(&self) {
        self.abandoned.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
impl Queue {
    pub fn for_test() -> Self {
        Queue::new(Wakeup::new().unwrap_or_else(|_| unreachable!()), 1 << 20)
    }
}
