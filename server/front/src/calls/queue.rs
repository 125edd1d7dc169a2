//! The queue of arrivals for Python, and the wake-up of Python's event loop.

use crate::limits::load::{Place, Waiters};
use crate::steps::call::Call;
use crate::steps::columns::{Arrival, Arrivals, MAX_IN_BATCH};
use crate::steps::parse::Step;
use crate::wakeup::Wakeup;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Context;
use std::time::{Duration, Instant};

/// The longest time for which arrivals are gathered.
const GATHERING: Duration = Duration::from_micros(200);

/// The front's thread adds to it, and Python's event loop takes from it.
#[derive(Debug)]
pub struct Queue {
    arrivals: Mutex<Arrivals>,
    pub wakeup: Wakeup,
    /// Python's event loop is about to take the arrivals.
    pub is_taking: AtomicBool,
    /// The front's thread drives, and calls `flush` before it blocks.
    gathers: AtomicBool,
    /// Arrivals wait for `flush`. Changed under the lock of `arrivals`.
    is_gathering: AtomicBool,
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
            gathers: AtomicBool::new(false),
            is_gathering: AtomicBool::new(false),
            is_dead: AtomicBool::new(false),
            abandoned: AtomicU64::new(0),
            bytes: AtomicUsize::new(0),
            max_bytes,
            readers: Waiters::default(),
        }
    }

    /// Add to the arrivals, and wake Python's event loop if it does not know of any yet.
    ///
    /// While the front's thread drives, the loop is woken once everything that had come is read, or after `GATHERING`.
    /// A pass costs the same whatever its rows, so it had better have all of them.
    pub fn add(&self, add: impl FnOnce(&mut Arrivals)) {
        let is_due = {
            let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            let was_empty = arrivals.is_empty();
            add(&mut arrivals);
            if was_empty && self.gathers.load(Ordering::Relaxed) {
                arrivals.began = Instant::now();
                self.is_gathering.store(true, Ordering::Relaxed);
                false
            } else if self.is_gathering.load(Ordering::Relaxed) {
                let is_over = arrivals.began.elapsed() > GATHERING;
                self.is_gathering.store(!is_over, Ordering::Relaxed);
                is_over
            } else {
                was_empty && !self.is_taking.load(Ordering::Relaxed)
            }
        };
        if is_due {
            self.wakeup.ring();
        }
    }

    /// Wake Python's event loop if arrivals wait for that.
    pub fn flush(&self) {
        if self.is_gathering.swap(false, Ordering::Relaxed) {
            self.wakeup.ring();
        }
    }

    /// `flush` if the first of the arrivals has waited for long: another connection may keep the thread from blocking.
    pub fn flush_old(&self) {
        if self.is_gathering.load(Ordering::Relaxed) {
            let began = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).began;
            if began.elapsed() > GATHERING {
                self.flush();
            }
        }
    }

    /// Gather from now on, or no more. For the front's thread, which calls `flush` before it blocks.
    pub fn gather(&self, gathers: bool) {
        self.gathers.store(gathers, Ordering::Relaxed);
        self.flush();
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
            self.is_gathering.store(false, Ordering::Relaxed);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn push(queue: &Queue) {
        queue.push(Arrival::HalfClosed(Arc::new(Call::for_test())));
    }

    #[test]
    fn arrivals_are_gathered_until_the_front_has_read_everything() {
        let queue = Queue::for_test();
        queue.gather(true);
        push(&queue);
        push(&queue);
        assert!(!queue.wakeup.has_rung());
        queue.flush();
        assert!(queue.wakeup.has_rung());
        assert_eq!(queue.take().len(), 2);
        queue.flush();
        assert!(!queue.wakeup.has_rung(), "they were taken");
    }

    #[test]
    fn arrivals_that_were_taken_meanwhile_wake_nobody() {
        let queue = Queue::for_test();
        queue.gather(true);
        push(&queue);
        assert_eq!(queue.take().len(), 1);
        queue.flush();
        assert!(!queue.wakeup.has_rung());
        push(&queue);
        queue.gather(false);
        assert!(queue.wakeup.has_rung(), "nobody else would wake it");
    }

    #[test]
    fn arrivals_are_gathered_for_a_limited_time() {
        let queue = Queue::for_test();
        queue.gather(true);
        push(&queue);
        let long_ago = Instant::now().checked_sub(2 * GATHERING);
        queue.arrivals.lock().unwrap().began = long_ago.expect("the machine runs for longer");
        push(&queue);
        assert!(queue.wakeup.has_rung());
        assert_eq!(queue.take().len(), 2);
        push(&queue);
        queue.flush_old();
        assert!(!queue.wakeup.has_rung());
        queue.arrivals.lock().unwrap().began = long_ago.expect("the machine runs for longer");
        queue.flush_old();
        assert!(queue.wakeup.has_rung());
    }

    #[test]
    fn the_loop_is_woken_at_once_while_it_drives() {
        let queue = Queue::for_test();
        push(&queue);
        assert!(queue.wakeup.has_rung());
    }
}
