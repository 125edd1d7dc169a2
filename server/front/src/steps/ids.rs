//! Ids of sessions as one text.

/// Ids of sessions, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    text: String,
    /// Where each of them ends.
    ends: Vec<u32>,
}

impl Ids {
    pub fn push(&mut self, id: &str) {
        self.text.push_str(id);
        self.ends.push(self.text.len() as u32);
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// In their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        let mut start = 0;
        self.ends.iter().map(move |end| {
            let id = &self.text[start..*end as usize];
            start = *end as usize;
            id
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_taken_in_their_order() {
        let mut ids = Ids::default();
        ["a", "", "\u{e9}t\u{e9}", "b"].iter().for_each(|id| ids.push(id));
        assert_eq!(ids.iter().collect::<Vec<_>>(), ["a", "", "\u{e9}t\u{e9}", "b"]);
        assert_eq!((ids.len(), ids.iter().len()), (4, 4));
    }

    #[test]
    fn ids_of_the_same_text_differ_if_they_are_divided_differently() {
        let of = |all: &[&str]| {
            let mut ids = Ids::default();
            all.iter().for_each(|id| ids.push(id));
            ids
        };
        assert_eq!(of(&["a", "bc"]), of(&["a", "bc"]));
        assert_ne!(of(&["a", "bc"]), of(&["ab", "c"]));
    }
}
