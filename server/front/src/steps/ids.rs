//! Ids of sessions as one text.

/// Ids of sessions, one after the other.
#[derive(Debug, Default)]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_taken_in_their_order() {
        let mut ids = Ids::default();
        ["a", "", "\u{e9}t\u{e9}", "b"].iter().for_each(|id| ids.push(id));
        assert_eq!(ids.iter().collect::<Vec<_>>(), ["a", "", "\u{e9}t\u{e9}", "b"]);
    }
}
