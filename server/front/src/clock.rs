//! The monotonic clock, as Python's `time.monotonic()` has it.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

static START: OnceLock<(Instant, f64)> = OnceLock::new();

/// Say what Python's clock shows now. Called once, before anything asks.
pub fn set(now: f64) {
    let _ = START.set((Instant::now(), now));
}

pub fn now() -> f64 {
    START.get().map_or(0.0, |(start, at)| at + start.elapsed().as_secs_f64())
}

/// The time left until then; None: for ever.
pub fn until(deadline: f64) -> Option<Duration> {
    (deadline.is_finite()).then(|| Duration::from_secs_f64((deadline - now()).max(0.0)))
}
