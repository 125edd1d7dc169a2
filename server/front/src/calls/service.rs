//! The shared parts of all calls: methods and their rules, known callers, bounds, and the queue to Python.

use crate::calls::answers::Door;
use crate::calls::queue::Queue;
use crate::limits::bounds::Bounds;
use crate::limits::callers::Callers;
use crate::limits::places::Pool;
use crate::messages::inflate::Pace;
use crate::messages::shape::{Breach, Shape};
use crate::method::Method;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::Semaphore;

/// Limit of calls that Python authenticates concurrently, over all connections.
const MAX_JUDGED: usize = 32;

/// Shared by all calls, and by Python.
#[derive(Debug)]
pub struct Service {
    pub bounds: Arc<Bounds>,
    pub queue: Arc<Queue>,
    pub methods: HashMap<String, Method>,
    /// The rules of their requests, by `Method::index`.
    pub shapes: Vec<Shape>,
    /// The known callers; None: no authentication.
    pub callers: Option<Arc<Callers>>,
    /// Whether the fast path is off, and Python gets every message.
    pub all_general: AtomicBool,
    /// Whether tracing is on. Python then serves traced calls itself.
    pub traces: AtomicBool,
    /// Number of replies that are not written.
    pub unwritten: Arc<AtomicUsize>,
    /// The pace of inflating.
    pub pace: Pace,
    /// Places of calls that Python authenticates.
    pub judging: Arc<Semaphore>,
    /// Set if HTTP requests other than gRPC's are served.
    pub door: OnceLock<Door>,
}

impl Service {
    pub fn new(
        bounds: Arc<Bounds>,
        queue: Arc<Queue>,
        methods: HashMap<String, Method>,
        shapes: Vec<Shape>,
        callers: Option<Arc<Callers>>,
    ) -> Self {
        Service {
            bounds,
            queue,
            methods,
            shapes,
            callers,
            all_general: AtomicBool::new(false),
            traces: AtomicBool::new(false),
            unwritten: Arc::default(),
            pace: Pace::default(),
            judging: Arc::new(Semaphore::new(MAX_JUDGED)),
            door: OnceLock::new(),
        }
    }

    /// Returns the rule that a message for Python breaks.
    pub fn breach(&self, method: Method, message: &[u8]) -> Option<Breach> {
        self.shapes.get(method.index).and_then(|shape| shape.check(message))
    }

    /// Returns the current counts, for metrics.
    pub fn now(&self) -> [(&'static str, usize); 8] {
        let load = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        let counts = &self.bounds.counts;
        [
            ("connections", load(&counts.connections)),
            ("calls", counts.calls.all()),
            ("unknown_calls", counts.calls.of(Pool::Unknown)),
            ("health_calls", counts.calls.of(Pool::Health)),
            ("watches", counts.calls.of(Pool::Watch)),
            ("held_bytes", load(&self.bounds.held)),
            ("queued_bytes", load(&self.queue.bytes)),
            ("window_bytes", load(&counts.windows)),
        ]
    }
}

#[cfg(test)]
impl Service {
    pub fn for_test() -> Self {
        let bounds = Arc::new(Bounds::for_test());
        Service::new(bounds, Arc::new(Queue::for_test()), HashMap::new(), Vec::new(), None)
    }
}
