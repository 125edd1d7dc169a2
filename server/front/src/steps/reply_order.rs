//! Sends the replies of a stream in the order of its messages, whatever the order of the answers.

use bytes::Bytes;
use std::collections::BTreeMap;

/// A framed reply, and the bytes of the message that are done with when it is written; None: Python's own.
pub type Reply = (Bytes, Option<usize>);

/// Replies that are answered too early.
#[derive(Debug, Default)]
pub struct ReplyOrder {
    /// Number of received messages.
    came: u64,
    /// Number of the next reply to send.
    next: u64,
    early: BTreeMap<u64, Reply>,
}

impl ReplyOrder {
    /// Returns the number of a received message.
    pub fn number(&mut self) -> u64 {
        self.came += 1;
        self.came - 1
    }

    /// Add the reply to a message.
    pub fn put(&mut self, number: u64, reply: Reply) {
        self.early.insert(number, reply);
    }

    /// Take the next reply, if it exists.
    pub fn pop(&mut self) -> Option<Reply> {
        let reply = self.early.remove(&self.next)?;
        self.next += 1;
        Some(reply)
    }

    /// Number of replies that wait for earlier ones.
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
            let mut ordered = ReplyOrder::default();
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
