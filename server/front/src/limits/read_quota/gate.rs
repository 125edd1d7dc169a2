//! A gate lets its connections read one at a time, so that many of them cost other connections no more than one.

use std::future::{poll_fn, Future};
use std::sync::Arc;
use std::task::Poll;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Grants permits in the order of the requests. Between two permits, the thread runs all other tasks.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Semaphore>);

impl Default for Gate {
    fn default() -> Self {
        Gate(Arc::new(Semaphore::new(1)))
    }
}

/// The permit of one connection.
#[derive(Debug)]
pub struct Pass {
    _permit: OwnedSemaphorePermit,
}

impl Gate {
    /// Wait for this connection's permit. None: the connection is about to be closed, so it need not wait.
    pub async fn pass(&self, is_leaving: impl Fn() -> bool) -> Option<Pass> {
        let mut permit = std::pin::pin!(self.0.clone().acquire_owned());
        poll_fn(|cx| {
            if is_leaving() {
                return Poll::Ready(None);
            }
            permit.as_mut().poll(cx).map(|permit| permit.ok().map(|permit| Pass { _permit: permit }))
        })
        .await
    }
}

impl Pass {
    /// Release the permit. The next one is granted after all ready tasks have run and the sockets were polled.
    pub fn end(self) {
        tokio::spawn(async move {
            tokio::task::yield_now().await;
            drop(self);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tokio::task::yield_now;

    #[tokio::test]
    async fn all_other_tasks_run_between_two_permits() {
        const BUSY: usize = 50;
        const ROUNDS: usize = 4;
        let (gate, order) = (Gate::default(), Arc::new(Mutex::new(Vec::new())));
        let mut tasks = Vec::new();
        for number in 0..BUSY {
            let (gate, order) = (gate.clone(), order.clone());
            tasks.push(tokio::spawn(async move {
                for _ in 0..ROUNDS {
                    let pass = gate.pass(|| false).await.unwrap();
                    order.lock().unwrap().push(Some(number));
                    pass.end();
                    yield_now().await;
                }
            }));
        }
        let noted = order.clone();
        let quiet = tokio::spawn(async move {
            loop {
                noted.lock().unwrap().push(None);
                yield_now().await;
            }
        });
        for task in tasks {
            task.await.unwrap();
        }
        quiet.abort();
        let order = order.lock().unwrap();
        assert!(order.windows(2).all(|two| two[0].is_none() || two[1].is_none()), "{order:?}");
        let busy: Vec<_> = order.iter().flatten().copied().collect();
        let in_order: Vec<_> = (0..ROUNDS).flat_map(|_| 0..BUSY).collect();
        assert_eq!(busy, in_order);
    }

    #[tokio::test]
    async fn a_connection_about_to_close_does_not_wait() {
        let gate = Gate::default();
        let first = gate.pass(|| false).await;
        assert!(first.is_some() && gate.pass(|| true).await.is_none());
        drop(first);
        assert!(gate.pass(|| false).await.is_some());
    }
}
