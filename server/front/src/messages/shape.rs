//! Limits of a message before Python parses it: of names, lists, and all other bytes.
//!
//! Python derives the rules of each method from its descriptors (`rpc/fronts/shape.py`) and writes the errors. The Python
//! front has a twin of `check` (`rpc/fronts/python.py`) with the same test cases. The check visits each field at most
//! once and stops at the first breach, so its time is bounded whatever a peer sends.

/// A message of at most this many bytes breaks no rule: no limit of `rpc/fronts/shape.py` is smaller.
pub const FREE_BYTES: usize = 1024;
/// Limit of a message's bytes outside its lists and large fields.
pub const MAX_SMALL_BYTES: usize = 1 << 20;
/// Values in place of a rule's index: the message exceeds `MAX_SMALL_BYTES`; the bytes are not a valid message.
pub const SMALL: i64 = -1;
pub const MALFORMED: i64 = -2;

/// The kind of a field. The numbers are those of `rpc/fronts/shape.py`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Text or bytes of limited size.
    Name,
    /// Bytes of any size: a tensor, a record, a part of a file.
    Large,
    /// A message with the rules of the node with this index.
    Message(usize),
    Varints,
    Fixed32,
    Fixed64,
}

/// A rule as Python gives it: field number, kind, limit of its bytes or index of its node, and entries (0: no list).
pub type Given = (u32, u8, usize, usize);

#[derive(Clone, Debug)]
struct Rule {
    number: u32,
    kind: Kind,
    max_bytes: usize,
    /// Limit of entries in the whole message; 0: not a list.
    max_entries: usize,
    /// Its index among all rules of the shape.
    index: usize,
}

/// The broken rule: its index or one of the values above, and the size of the name or of the invalid message; 0: a list
/// has too many entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breach {
    pub rule: i64,
    pub size: usize,
}

/// The rules of a method's requests; without nodes: no rules.
#[derive(Debug, Default)]
pub struct Shape {
    nodes: Vec<Vec<Rule>>,
    rules: usize,
}

impl Shape {
    /// None: the rules are inconsistent.
    pub fn new(given: Vec<Vec<Given>>) -> Option<Self> {
        let count = given.len();
        let mut rules = 0;
        let mut nodes = Vec::with_capacity(count);
        for node in given {
            let mut known = Vec::with_capacity(node.len());
            for (number, kind, limit, max_entries) in node {
                let kind = match kind {
                    0 => Kind::Name,
                    1 => Kind::Large,
                    // a child comes after its parent, so that a shape has no cycles
                    2 if nodes.len() < limit && limit < count => Kind::Message(limit),
                    3 => Kind::Varints,
                    4 => Kind::Fixed32,
                    5 => Kind::Fixed64,
                    _ => return None,
                };
                known.push(Rule { number, kind, max_bytes: limit, max_entries, index: rules });
                rules += 1;
            }
            nodes.push(known);
        }
        Some(Shape { nodes, rules })
    }

    /// Returns the first rule that a message breaks.
    pub fn check(&self, message: &[u8]) -> Option<Breach> {
        if message.len() <= FREE_BYTES || self.nodes.is_empty() {
            return None;
        }
        let broken = Scan { entries: vec![0; self.rules], small: 0 }.message(self, message, 0).err()?;
        let size = if broken.rule == MALFORMED { message.len() } else { broken.size };
        Some(Breach { size, ..broken })
    }
}

/// Counts of the visited part of a message.
struct Scan {
    /// Entries of each list, by the index of its rule.
    entries: Vec<usize>,
    /// Bytes outside lists and large fields.
    small: usize,
}

const NOT_A_MESSAGE: Breach = Breach { rule: MALFORMED, size: 0 };

impl Scan {
    /// Visit a message or a nested one, to the depth of the shape.
    fn message(&mut self, shape: &Shape, message: &[u8], node: usize) -> Result<(), Breach> {
        let rules = &shape.nodes[node];
        let mut left = message;
        while !left.is_empty() {
            let before = left.len();
            let key = varint(&mut left)?;
            let number = u32::try_from(key >> 3).unwrap_or(0);
            if number == 0 {
                return Err(NOT_A_MESSAGE);
            }
            let value = value(&mut left, key & 7)?;
            let size = before - left.len();
            let rule = rules.iter().find(|rule| rule.number == number);
            let Some(rule) = rule.filter(|rule| rule.takes(key & 7)) else {
                self.add_small(size)?;
                continue;
            };
            match rule.kind {
                Kind::Name => {
                    if value.len() > rule.max_bytes {
                        return Err(rule.breach(value.len()));
                    }
                    self.add(rule, 1, size)?;
                }
                Kind::Large => self.add(rule, 1, size - value.len())?,
                Kind::Message(child) => {
                    self.add(rule, 1, size - value.len())?;
                    self.message(shape, value, child)?;
                }
                Kind::Varints | Kind::Fixed32 | Kind::Fixed64 if key & 7 == 2 => {
                    self.add_small(size - value.len())?;
                    self.add(rule, rule.packed(value), 0)?;
                }
                Kind::Varints | Kind::Fixed32 | Kind::Fixed64 => self.add(rule, 1, 0)?,
            }
        }
        Ok(())
    }

    /// Count entries of a list, or bytes of another field.
    fn add(&mut self, rule: &Rule, entries: usize, bytes: usize) -> Result<(), Breach> {
        if rule.max_entries == 0 {
            return self.add_small(bytes);
        }
        let count = &mut self.entries[rule.index];
        *count += entries;
        if *count > rule.max_entries {
            return Err(rule.breach(0));
        }
        Ok(())
    }

    fn add_small(&mut self, bytes: usize) -> Result<(), Breach> {
        self.small += bytes;
        if self.small > MAX_SMALL_BYTES {
            return Err(Breach { rule: SMALL, size: 0 });
        }
        Ok(())
    }
}

impl Rule {
    fn breach(&self, size: usize) -> Breach {
        Breach { rule: self.index as i64, size }
    }

    /// Whether the field can have this wire type. Otherwise protobuf treats it as unknown.
    fn takes(&self, wire_type: u64) -> bool {
        match self.kind {
            Kind::Name | Kind::Large | Kind::Message(_) => wire_type == 2,
            Kind::Varints => matches!(wire_type, 0 | 2),
            Kind::Fixed32 => matches!(wire_type, 5 | 2),
            Kind::Fixed64 => matches!(wire_type, 1 | 2),
        }
    }

    /// Returns the entries of a packed list, or any number above the limit.
    fn packed(&self, value: &[u8]) -> usize {
        match self.kind {
            Kind::Fixed32 => value.len() / 4,
            Kind::Fixed64 => value.len() / 8,
            _ if value.len() > 10 * self.max_entries => value.len(), // a number has at most 10 bytes
            _ => value.iter().filter(|byte| **byte < 0x80).count(),
        }
    }
}

/// Returns the bytes of the next field's value.
fn value<'a>(left: &mut &'a [u8], wire_type: u64) -> Result<&'a [u8], Breach> {
    let size = match wire_type {
        0 => {
            varint(left)?;
            0
        }
        1 => 8,
        2 => usize::try_from(varint(left)?).map_err(|_| NOT_A_MESSAGE)?,
        5 => 4,
        _ => return Err(NOT_A_MESSAGE), // this protocol has no groups
    };
    let (value, rest) = left.split_at_checked(size).ok_or(NOT_A_MESSAGE)?;
    *left = rest;
    Ok(value)
}

fn varint(left: &mut &[u8]) -> Result<u64, Breach> {
    let mut value = 0u64;
    for (index, byte) in left.iter().copied().enumerate().take(10) {
        let part = u64::from(byte & 0x7f);
        if index == 9 && part > 1 {
            break; // more than 64 bits
        }
        value |= part << (7 * index);
        if byte < 0x80 {
            *left = &left[index + 1..];
            return Ok(value);
        }
    }
    Err(NOT_A_MESSAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::protobuf::{put_bytes, put_number, put_packed, put_varint};
    use bytes::BytesMut;
    use proptest::prelude::*;

    const MANY: usize = 2000;

    /// A name, names, data, tensors with name, data and shape, and numbers of each kind.
    fn shape() -> Shape {
        Shape::new(vec![
            vec![
                (1, 0, FREE_BYTES, 0),
                (2, 0, FREE_BYTES, MANY),
                (3, 1, 0, 0),
                (4, 2, 1, MANY),
                (5, 3, 0, MANY),
                (6, 4, 0, MANY),
                (7, 5, 0, MANY),
            ],
            vec![(1, 0, FREE_BYTES, 0), (2, 1, 0, 0), (3, 3, 0, MANY)],
        ])
        .unwrap()
    }

    fn check(message: &[u8]) -> Option<Breach> {
        shape().check(message)
    }

    fn rule(index: i64, size: usize) -> Option<Breach> {
        Some(Breach { rule: index, size })
    }

    #[test]
    fn large_data_within_the_limits_passes() {
        let mut out = BytesMut::new();
        put_bytes(&mut out, 1, &[b'a'; FREE_BYTES]);
        (0..MANY).for_each(|_| put_bytes(&mut out, 2, &[b'b'; FREE_BYTES]));
        put_bytes(&mut out, 3, &vec![0; 5 << 20]);
        let mut tensor = BytesMut::new();
        put_bytes(&mut tensor, 2, &vec![0; 5 << 20]);
        put_bytes(&mut out, 4, &tensor);
        put_packed(&mut out, 5, &[u64::MAX; MANY]);
        put_bytes(&mut out, 6, &[1; 4 * MANY]);
        put_bytes(&mut out, 7, &[1; 8 * MANY]);
        assert_eq!(check(&out), None);
    }

    #[test]
    fn a_long_name_is_found_at_any_depth() {
        let long = vec![b'a'; FREE_BYTES + 1];
        let mut tensor = BytesMut::new();
        put_bytes(&mut tensor, 1, &long);
        for (number, bytes, index) in [(1, &long[..], 0), (2, &long[..], 1), (4, &tensor[..], 7)] {
            let mut out = BytesMut::new();
            put_bytes(&mut out, number, bytes);
            assert_eq!(check(&out), rule(index, FREE_BYTES + 1), "field {number}");
        }
    }

    #[test]
    fn a_list_is_counted_over_the_whole_message() {
        let shaped = &b"\x1a\x02\x01\x02"[..];
        for (number, entry, index) in [(2, &b""[..], 1), (4, &b"\x0a\x01a"[..], 3), (4, shaped, 9)] {
            let mut out = BytesMut::new();
            (0..=MANY).for_each(|_| put_bytes(&mut out, number, entry));
            assert_eq!(check(&out), rule(index, 0), "field {number}");
        }
    }

    #[test]
    fn numbers_are_counted_packed_and_one_by_one() {
        for (number, width, wire_type, index) in [(5, 1, 0, 4), (6, 4, 5, 5), (7, 8, 1, 6)] {
            let mut packed = BytesMut::new();
            put_bytes(&mut packed, number, &vec![1; width * (MANY + 1)]);
            assert_eq!(check(&packed), rule(index, 0), "packed field {number}");
            let mut single = BytesMut::new();
            for _ in 0..=MANY {
                put_varint(&mut single, u64::from(number << 3 | wire_type));
                single.extend_from_slice(&vec![1; width]);
            }
            assert_eq!(check(&single), rule(index, 0), "field {number}");
        }
    }

    #[test]
    fn all_other_bytes_together_are_limited() {
        let mut unknown = BytesMut::new();
        put_bytes(&mut unknown, 99, &vec![0; MAX_SMALL_BYTES]);
        let mut again = BytesMut::new();
        (0..MAX_SMALL_BYTES / 2).for_each(|_| put_bytes(&mut again, 3, b""));
        put_number(&mut again, 8, 1);
        let mut empty = BytesMut::new();
        (0..=MAX_SMALL_BYTES / 2).for_each(|_| put_bytes(&mut empty, 5, b""));
        for (name, message) in [("unknown", unknown), ("again", again), ("empty", empty)] {
            assert_eq!(check(&message), rule(SMALL, 0), "{name}");
        }
    }

    #[test]
    fn invalid_messages_are_refused() {
        let zeros = vec![0; FREE_BYTES + 1];
        let group = [&b"\x9b\x06"[..], &zeros].concat();
        let cut_off = [&b"\x1a\xff\xff\x7f"[..], &zeros].concat();
        let wide = [&[0x28, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02][..], &zeros].concat();
        for message in [zeros, group, cut_off, wide] {
            assert_eq!(check(&message), rule(MALFORMED, message.len()));
        }
    }

    #[test]
    fn inconsistent_rules_are_refused() {
        for given in [vec![vec![(1, 9, 0, 0)]], vec![vec![(1, 2, 0, 0)]], vec![vec![(1, 2, 1, 0)]]] {
            assert!(Shape::new(given).is_none());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_checked_to_the_end(bytes in proptest::collection::vec(any::<u8>(), FREE_BYTES + 1..4096)) {
            let _ = check(&bytes);
        }
    }
}
