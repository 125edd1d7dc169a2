//! How long answered calls and messages took, counted for metrics.

/// Counts of durations up to each bound, and their sum.
#[derive(Debug, Default)]
pub struct Durations {
    /// In seconds, ascending.
    bounds: Vec<f64>,
    /// By bound; the last one counts what exceeds all of them.
    counts: Vec<u64>,
    total: f64,
}

impl Durations {
    pub fn new(bounds: Vec<f64>) -> Self {
        let counts = vec![0; bounds.len() + 1];
        Durations { bounds, counts, total: 0.0 }
    }

    pub fn observe(&mut self, seconds: f64) {
        let place = self.bounds.partition_point(|bound| *bound < seconds);
        if let Some(count) = self.counts.get_mut(place) {
            *count += 1;
            self.total += seconds;
        }
    }

    /// The counts and the sum since the last call.
    pub fn take(&mut self) -> (Vec<u64>, f64) {
        let counts = std::mem::replace(&mut self.counts, vec![0; self.bounds.len() + 1]);
        (counts, std::mem::take(&mut self.total))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_counted_up_to_each_bound_until_they_are_taken() {
        let mut durations = Durations::new(vec![1.0, 2.0]);
        for seconds in [0.5, 1.0, 1.5, 2.5, 9.0] {
            durations.observe(seconds);
        }
        assert_eq!(durations.take(), (vec![2, 1, 2], 14.5));
        durations.observe(2.0);
        assert_eq!(durations.take(), (vec![0, 1, 0], 2.0));
    }
}
