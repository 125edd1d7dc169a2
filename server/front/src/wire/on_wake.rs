//! A future that is rarely ready, in a task that others wake for each message.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Polls its future only after the future was woken. Otherwise a poll costs one read of a flag.
pub struct OnWake<F> {
    future: Pin<Box<F>>,
    woken: Arc<Woken>,
    /// Wakes `woken`.
    waker: Waker,
}

/// Whether the future must be polled, and the task that polls it.
struct Woken {
    is_woken: AtomicBool,
    task: Mutex<Option<Waker>>,
}

impl<F: Future> OnWake<F> {
    pub fn new(future: F) -> Self {
        let woken = Arc::new(Woken { is_woken: AtomicBool::new(true), task: Mutex::default() });
        OnWake { future: Box::pin(future), waker: Waker::from(woken.clone()), woken }
    }
}

impl<F: Future> Future for OnWake<F> {
    type Output = F::Output;

    /// Every poll must be of the same task.
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if !self.woken.is_woken.load(Ordering::Acquire) {
            return Poll::Pending;
        }
        *self.woken.task() = Some(cx.waker().clone());
        // from now on, a wake-up asks for one more poll
        self.woken.is_woken.store(false, Ordering::SeqCst);
        let OnWake { future, waker, .. } = &mut *self;
        future.as_mut().poll(&mut Context::from_waker(waker))
    }
}

impl Woken {
    fn task(&self) -> std::sync::MutexGuard<'_, Option<Waker>> {
        self.task.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_woken.store(true, Ordering::SeqCst);
        if let Some(task) = &*self.task() {
            task.wake_by_ref();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::sync::atomic::AtomicUsize;
    use tokio::sync::Notify;

    #[tokio::test]
    async fn a_future_is_polled_once_for_each_time_it_is_woken() {
        let (notify, polls) = (Notify::new(), AtomicUsize::new(0));
        let mut notified = Box::pin(notify.notified());
        let inner = poll_fn(|cx| {
            polls.fetch_add(1, Ordering::Relaxed);
            notified.as_mut().poll(cx)
        });
        let mut future = std::pin::pin!(OnWake::new(inner));
        for _ in 0..5 {
            let is_ready = poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_ready())).await;
            assert!(!is_ready);
        }
        assert_eq!(polls.load(Ordering::Relaxed), 1, "nobody woke it");
        notify.notify_one();
        future.await;
        assert_eq!(polls.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn a_wake_up_from_another_thread_wakes_the_task() {
        let notify = Arc::new(Notify::new());
        let other = notify.clone();
        let thread = std::thread::spawn(move || other.notify_one());
        OnWake::new(notify.notified()).await;
        thread.join().unwrap();
    }
}
