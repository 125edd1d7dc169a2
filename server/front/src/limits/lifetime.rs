//! The lifetime of a connection: clients are asked to reconnect, and cut off if they do not.

use std::collections::hash_map::RandomState;
use std::future::pending;
use std::hash::BuildHasher;
use std::pin::Pin;
use std::time::Duration;
use tokio::time::{sleep, Sleep};

/// The stages of a connection's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// It accepts no more calls; running ones continue.
    Old,
    /// It ends now.
    TooOld,
}

/// The life of one connection.
#[derive(Debug)]
pub struct Lifetime {
    /// What it will be next, and when.
    next: Option<(Age, Pin<Box<Sleep>>)>,
    grace: Duration,
}

impl Lifetime {
    /// It begins now. `age`: None, for ever; a tenth of it more or less, so that connections that were made together
    /// do not end together.
    pub fn new(age: Option<Duration>, grace: Duration) -> Self {
        let next = age.map(|age| (Age::Old, Box::pin(sleep(age.mul_f64(0.9 + 0.2 * random())))));
        Lifetime { next, grace }
    }

    /// Return what has become of it, each once. May be dropped and called again.
    pub async fn next(&mut self) -> Age {
        let Some((age, timer)) = &mut self.next else { return pending().await };
        let age = *age;
        timer.await;
        self.next = (age == Age::Old).then(|| (Age::TooOld, Box::pin(sleep(self.grace))));
        age
    }
}

/// From 0 to 1.
fn random() -> f64 {
    f64::from((RandomState::new().hash_one(0) >> 32) as u32) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{timeout, Instant};

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_old_near_its_age_and_ends_a_grace_later() {
        let (age, grace) = (Duration::from_secs(100), Duration::from_secs(7));
        let mut ages = Vec::new();
        for _ in 0..20 {
            let began = Instant::now();
            let mut life = Lifetime::new(Some(age), grace);
            assert_eq!(life.next().await, Age::Old);
            let old = Instant::now();
            ages.push(old - began);
            assert_eq!(life.next().await, Age::TooOld);
            assert_eq!((Instant::now() - old).as_millis(), grace.as_millis());
        }
        assert!(ages.iter().all(|was| was.abs_diff(age) <= age / 10 + Duration::from_millis(1)), "{ages:?}");
        ages.sort_unstable();
        ages.dedup();
        assert!(ages.len() > 10, "they would all end together");
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_may_be_broken_off_and_without_an_age_there_is_no_end() {
        let year = Duration::from_secs(365 * 86_400);
        let mut life = Lifetime::new(Some(Duration::from_secs(100)), year);
        assert!(timeout(Duration::from_secs(89), life.next()).await.is_err());
        assert_eq!(timeout(Duration::from_secs(22), life.next()).await, Ok(Age::Old));
        assert!(timeout(year, Lifetime::new(None, year).next()).await.is_err());
    }
}
