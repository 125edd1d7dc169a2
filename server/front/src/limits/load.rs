//! The running work of a connection, and the tasks that wait until there is less of it.

use crate::limits::places::Share;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Waker};

/// The cost of a message that Python reads, in fast-path steps.
pub const GENERAL: usize = 8;

/// Tasks that wait for room, each at most once.
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
    /// Wake this task with the others. `place` belongs to the task and to this list only.
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

/// The running work of a connection.
#[derive(Debug)]
pub struct Load {
    /// Its calls, and bytes of messages and replies in memory.
    pub share: Arc<Share>,
    /// Steps that Python has not answered; each other message counts as `GENERAL` steps.
    steps: AtomicUsize,
    most_steps: usize,
    /// Whether the limit was reached and not half of the steps have ended since, so that new ones come in groups.
    is_full: AtomicBool,
    waiters: Waiters,
}

impl Load {
    pub fn new(most_steps: usize) -> Self {
        Load {
            share: Arc::default(),
            steps: AtomicUsize::new(0),
            most_steps,
            is_full: AtomicBool::new(false),
            waiters: Waiters::default(),
        }
    }

    /// Whether the connection may begin more. Otherwise the task is woken when it may.
    pub fn may_begin(&self, cx: &Context<'_>, place: &mut Place) -> bool {
        if !self.is_full.load(Ordering::SeqCst) {
            return true;
        }
        self.waiters.add(cx, place);
        // steps may have ended before the task was added
        !self.is_full.load(Ordering::SeqCst)
    }

    /// Whether so many steps run that the connection's calls should alternate.
    pub fn is_busy(&self) -> bool {
        self.steps.load(Ordering::Relaxed) > self.most_steps / 4
    }

    #[cfg(test)]
    pub fn running(&self) -> usize {
        self.steps.load(Ordering::SeqCst)
    }

    pub fn begin(&self, steps: usize) {
        if self.steps.fetch_add(steps, Ordering::SeqCst) + steps >= self.most_steps {
            self.is_full.store(true, Ordering::SeqCst);
            self.end(0); // other steps may have ended before the flag was set
        }
    }

    pub fn end(&self, steps: usize) {
        let left = self.steps.fetch_sub(steps, Ordering::SeqCst) - steps;
        if left <= self.most_steps / 2 && self.is_full.swap(false, Ordering::SeqCst) {
            self.waiters.wake();
        }
    }
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
    fn tasks_that_wait_for_room_are_woken_when_there_is_some() {
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
        assert!(!woken.0.load(Ordering::Relaxed), "more than half are running");
        load.end(1);
        assert!(woken.0.load(Ordering::Relaxed) && load.may_begin(&cx, &mut place));
    }
}
