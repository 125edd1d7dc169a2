//! The monotonic clock, in the units of Python's `time.monotonic()`.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

static START: OnceLock<(Instant, f64)> = OnceLock::new();

/// Readings of which the one that took the shortest counts: this thread may lose the processor between the two clocks.
const TRIES: usize = 5;

/// Learn what Python's clock shows, which `read` tells. Called before anything asks; what it says first holds.
pub fn set<E>(mut read: impl FnMut() -> Result<f64, E>) -> Result<(), E> {
    let mut best: Option<(Duration, Instant, f64)> = None;
    for _ in 0..TRIES {
        let before = Instant::now();
        let at = read()?;
        let took = before.elapsed();
        if best.is_none_or(|(least, ..)| took < least) {
            best = Some((took, before + took / 2, at));
        }
    }
    if let Some((_, when, at)) = best {
        let _ = START.set((when, at));
    }
    Ok(())
}

pub fn now() -> f64 {
    START.get().map_or(0.0, |(start, at)| at + start.elapsed().as_secs_f64())
}

/// The time left until then; None: for ever.
pub fn until(deadline: f64) -> Option<Duration> {
    (deadline.is_finite()).then(|| Duration::from_secs_f64((deadline - now()).max(0.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_between_the_clocks_does_not_count() {
        let python = Instant::now();
        let mut readings = 0;
        set(|| {
            readings += 1;
            let at = 100.0 + python.elapsed().as_secs_f64();
            if readings == 1 {
                std::thread::sleep(Duration::from_millis(200));
            }
            Ok::<f64, ()>(at)
        })
        .unwrap();
        let behind = 100.0 + python.elapsed().as_secs_f64() - now();
        assert!(behind.abs() < 0.1, "{behind}");
    }
}
