//! Sets of sessions that a stream names by numbers. Python declares them; here they stand for the ids of plain frames.

use std::any::Any;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

/// Ids of sessions, one after the other.
#[derive(Debug, Default)]
pub struct Ids {
    text: String,
    /// Where each of them ends.
    ends: Vec<u32>,
}

impl Ids {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn push(&mut self, id: &str) {
        self.text.push_str(id);
        self.ends.push(self.text.len() as u32);
    }

    pub fn append(&mut self, others: &Ids) {
        let before = self.text.len() as u32;
        self.text.push_str(&others.text);
        self.ends.extend(others.ends.iter().map(|end| before + end));
    }

    /// In their order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        let mut start = 0;
        self.ends.iter().map(move |end| {
            let id = &self.text[start..*end as usize];
            start = *end as usize;
            id
        })
    }
}

/// The sessions of one number on one stream.
#[derive(Debug)]
pub struct SessionSet {
    pub ids: Ids,
    /// Rows of each; none if the client does not say.
    pub sizes: Vec<u32>,
    /// Python's own list of the ids.
    pub list: Option<Box<dyn Any + Send + Sync>>,
    _counted: Counted,
}

impl SessionSet {
    pub fn new(
        ids: Ids,
        sizes: Vec<u32>,
        list: Option<Box<dyn Any + Send + Sync>>,
        held: &Arc<AtomicUsize>,
        held_bytes: usize,
    ) -> Self {
        held.fetch_add(held_bytes, Ordering::Relaxed);
        SessionSet { ids, sizes, list, _counted: Counted { held: held.clone(), bytes: held_bytes } }
    }

    #[cfg(test)]
    pub fn for_test(ids: &[&str], sizes: &[u32]) -> Arc<Self> {
        let mut all = Ids::default();
        ids.iter().for_each(|id| all.push(id));
        Arc::new(SessionSet::new(all, sizes.to_vec(), None, &Arc::default(), 0))
    }
}

/// Bytes in the budget of all calls, for as long as it lives.
#[derive(Debug)]
struct Counted {
    held: Arc<AtomicUsize>,
    bytes: usize,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_taken_in_their_order() {
        let (mut some, mut more) = (Ids::default(), Ids::default());
        ["a", "", "\u{e9}t\u{e9}"].iter().for_each(|id| some.push(id));
        ["b", "cc"].iter().for_each(|id| more.push(id));
        some.append(&more);
        assert_eq!(some.iter().collect::<Vec<_>>(), ["a", "", "\u{e9}t\u{e9}", "b", "cc"]);
        assert_eq!(some.len(), 5);
    }

    #[test]
    fn a_set_is_in_the_budget_until_nobody_has_it() {
        let held = Arc::new(AtomicUsize::new(1));
        let set = Arc::new(SessionSet::new(Ids::default(), Vec::new(), None, &held, 9));
        let frame = set.clone();
        drop(set);
        assert_eq!(held.load(Ordering::Relaxed), 10);
        drop(frame);
        assert_eq!(held.load(Ordering::Relaxed), 1);
    }
}
