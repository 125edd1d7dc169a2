//! Replies of a stream that leave in the order of its messages, in whichever order these are answered.

use bytes::Bytes;
use std::collections::BTreeMap;

/// A framed reply, and the bytes of the message that are done with when it is written; None: Python's own.
pub type Reply = (Bytes, Option<usize>);

/// What is answered too early.
#[derive(Debug, Default)]
pub struct Ordered {
    /// Messages that have come.
    came: u64,
    /// The number of the next reply to leave.
    next: u64,
    early: BTreeMap<u64, Reply>,
}

impl Ordered {
    /// The number of a message that has come.
    pub fn number(&mut self) -> u64 {
        self.came += 1;
        self.came - 1
    }

    /// Add the reply to a message.
    pub fn put(&mut self, number: u64, reply: Reply) {
        self.early.insert(number, reply);
    }

    /// The next reply, if it is there.
    pub fn pop(&mut self) -> Option<Reply> {
        let reply = self.early.remove(&self.next)?;
        self.next += 1;
        Some(reply)
    }

    /// Replies that wait for earlier ones.
    pub fn len(&self) -> usize {
        self.early.len()
    }

    pub fn clear(&mut self) {
        self.early.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn replies_leave_in_the_order_of_the_messages(answered in Just((0u64..20).collect::<Vec<_>>()).prop_shuffle()) {
            let mut ordered = Ordered::default();
            for expected in 0..20 {
                prop_assert_eq!(ordered.number(), expected);
            }
            let mut left = Vec::new();
            for (count, number) in answered.iter().enumerate() {
                ordered.put(*number, (Bytes::from(vec![*number as u8]), None));
                while let Some((reply, _)) = ordered.pop() {
                    left.push(u64::from(reply[0]));
                }
                prop_assert_eq!(left.len() + ordered.len(), count + 1);
            }
            prop_assert_eq!(left, (0..20).collect::<Vec<_>>());
        }
    }
}
