//! Reads a JSON document. Its long lists of numbers become one piece of memory each, not a value for each number.

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use std::cell::Cell;
use std::fmt;

/// Lists of fewer numbers stay lists of values.
const MIN_NUMBERS: usize = 64;
/// A double represents every integer up to this one.
const MAX_EXACT: u64 = 1 << 53;
const NO_NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// A value.
#[derive(Debug, PartialEq)]
pub enum Node {
    Null,
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    /// A long list of numbers that doubles represent.
    Numbers(Vec<f64>),
    Object(Vec<(String, Node)>),
}

/// Why a document is refused.
#[derive(Debug, PartialEq)]
pub enum Refused {
    /// It is not JSON; the text says where and why.
    Syntax(String),
    /// An object has more fields than are allowed.
    Fields,
    /// An object has this field twice.
    Twice(String),
    /// It has this name instead of a number.
    NoNumber(&'static str),
}

/// Read a document whose objects have at most `max_fields` fields.
pub fn document(raw: &[u8], max_fields: usize) -> Result<Node, Refused> {
    let refused = Cell::new(None);
    let reading = Reading { max_fields, refused: &refused };
    let mut source = serde_json::Deserializer::from_slice(raw);
    let read = reading.deserialize(&mut source).and_then(|node| source.end().map(|()| node));
    read.map_err(|error| {
        let name = || no_number_at(raw, &error).map(Refused::NoNumber);
        refused.take().or_else(name).unwrap_or_else(|| Refused::Syntax(error.to_string()))
    })
}

/// JavaScript's name of a value that JSON does not have, if the document has one where it is wrong.
fn no_number_at(raw: &[u8], error: &serde_json::Error) -> Option<&'static str> {
    let line = raw.split(|&byte| byte == b'\n').nth(error.line().checked_sub(1)?)?;
    // the column is that of the first wrong byte, from 1 on
    let at = line.get(error.column().checked_sub(1)?..)?;
    let signed = line.get(error.column().saturating_sub(2)..)?;
    NO_NUMBERS.into_iter().find(|name| at.starts_with(name.as_bytes()) || signed.starts_with(name.as_bytes()))
}

#[derive(Clone, Copy)]
struct Reading<'a> {
    max_fields: usize,
    /// The reason where the document is JSON.
    refused: &'a Cell<Option<Refused>>,
}

impl Reading<'_> {
    fn refuse<E: serde::de::Error>(self, why: Refused) -> E {
        self.refused.set(Some(why));
        E::custom("refused")
    }
}

impl<'de> DeserializeSeed<'de> for Reading<'_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, source: D) -> Result<Node, D::Error> {
        source.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reading<'_> {
    type Value = Node;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Signed(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Unsigned(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(node) = entries.next_element_seed(self)? {
            list.push(node);
            if list.len() == MIN_NUMBERS {
                if let Some(numbers) = list.iter().map(number).collect() {
                    return self.numbers(numbers, entries);
                }
            }
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Node, A::Error> {
        let mut object: Vec<(String, Node)> = Vec::new();
        while let Some(name) = fields.next_key::<String>()? {
            if object.len() == self.max_fields {
                return Err(self.refuse(Refused::Fields));
            }
            object.push((name, fields.next_value_seed(self)?));
        }
        let mut names: Vec<&str> = object.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(self.refuse(Refused::Twice(pair[0].to_owned()))),
            None => Ok(Node::Object(object)),
        }
    }
}

impl Reading<'_> {
    /// The rest of a list that has begun with numbers.
    fn numbers<'de, A: SeqAccess<'de>>(self, mut begun: Vec<f64>, mut entries: A) -> Result<Node, A::Error> {
        while let Some(node) = entries.next_element_seed(self)? {
            if let Some(value) = number(&node) {
                begun.push(value);
                continue;
            }
            let mut list: Vec<Node> = begun.into_iter().map(Node::Float).collect();
            list.push(node);
            while let Some(node) = entries.next_element_seed(self)? {
                list.push(node);
            }
            return Ok(Node::List(list));
        }
        Ok(Node::Numbers(begun))
    }
}

/// A value as a double, if it is a number and the double is the same number.
fn number(node: &Node) -> Option<f64> {
    match *node {
        Node::Float(value) => Some(value),
        Node::Signed(value) if value.unsigned_abs() <= MAX_EXACT => Some(value as f64),
        Node::Unsigned(value) if value <= MAX_EXACT => Some(value as f64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Result<Node, Refused> {
        document(text.as_bytes(), 3)
    }

    fn field(value: Node) -> Result<Node, Refused> {
        Ok(Node::Object(vec![("a".to_owned(), value)]))
    }

    #[test]
    fn each_kind_of_value_is_read() {
        let cases = [
            ("null", Node::Null),
            ("true", Node::Bool(true)),
            ("-5", Node::Signed(-5)),
            ("18446744073709551615", Node::Unsigned(u64::MAX)),
            ("1e3", Node::Float(1000.0)),
            ("\"\\u65e5 \\n\"", Node::Text("\u{65e5} \n".to_owned())),
            ("[1, {}]", Node::List(vec![Node::Unsigned(1), Node::Object(vec![])])),
        ];
        for (text, node) in cases {
            assert_eq!(read(&format!(" {{\"a\": {text}}} ")), field(node));
        }
    }

    #[test]
    fn a_document_that_breaks_a_rule_is_refused() {
        let cases = [
            ("{\"a\": 1, \"b\": 2, \"a\": 3}", Refused::Twice("a".to_owned())),
            ("[{\"a\": 1, \"b\": 2, \"c\": 3, \"d\": 4}]", Refused::Fields),
            ("{\"a\": NaN}", Refused::NoNumber("NaN")),
            ("[1,\n Infinity]", Refused::NoNumber("Infinity")),
            ("[-Infinity]", Refused::NoNumber("-Infinity")),
            ("", Refused::Syntax("EOF while parsing a value at line 1 column 0".to_owned())),
            ("{}}", Refused::Syntax("trailing characters at line 1 column 3".to_owned())),
        ];
        for (text, why) in cases {
            assert_eq!(read(text), Err(why), "{text}");
        }
        let others =
            ["{'a': 1}", "[1,]", "[01]", "[1e999]", "\"\\ud800\"", "nul", "[\"NaN", &"[".repeat(1000)];
        for text in others {
            assert!(matches!(read(text), Err(Refused::Syntax(_))), "{text}");
        }
        assert!(matches!(document(b"\"\xff\"", 3), Err(Refused::Syntax(_))));
    }

    #[test]
    fn a_long_list_of_numbers_is_one_piece_unless_doubles_do_not_represent_them() {
        let list = |entries: &[&str]| read(&format!("[{}]", entries.join(", "))).unwrap();
        let mut entries = vec!["1"; MIN_NUMBERS];
        assert_eq!(list(&entries), Node::Numbers(vec![1.0; MIN_NUMBERS]));
        assert!(matches!(list(&entries[1..]), Node::List(_)));
        for other in ["9007199254740993", "\"NaN\"", "true", "[2]"] {
            entries[0] = other;
            let Node::List(found) = list(&entries) else { panic!("{other}") };
            assert_eq!(found.len(), MIN_NUMBERS);
            let later = [&["1"; 2 * MIN_NUMBERS][..], &[other, "3"]].concat();
            let Node::List(found) = list(&later) else { panic!("{other}") };
            assert_eq!((found.len(), &found[1]), (later.len(), &Node::Float(1.0)));
            assert_eq!(found.last(), Some(&Node::Unsigned(3)));
        }
    }

    proptest! {
        #[test]
        fn every_double_is_read_as_it_was_written(
            values in prop::collection::vec(prop::num::f64::NORMAL | prop::num::f64::SUBNORMAL, 64..99)
        ) {
            let text = crate::json::write::numbers(&values);
            prop_assert_eq!(read(&format!("[{text}]")), Ok(Node::Numbers(values)));
        }

        #[test]
        fn bytes_never_panic(raw: Vec<u8>) {
            let _ = document(&raw, 3);
        }
    }
}
