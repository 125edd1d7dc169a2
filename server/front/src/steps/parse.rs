//! Parses fast-path messages: steps of sessions whose tensors are exactly as declared.
//!
//! Anything else, such as an unknown field, a requested state or reset, or numbers that do not fit each other, goes to
//! Python as bytes, which has every rule and every message text.

use crate::limits::callers::{Known, SEPARATOR};
use crate::messages::protobuf::{Fields, SlowPath, Value};
use crate::messages::shape::FREE_BYTES;
use bytes::Bytes;
use std::sync::Arc;

/// Limit of sessions of a fast-path message.
pub const MAX_MEMBERS: usize = 65_536;
const MAX_RANK: usize = 32;
/// Limit of tensors of a fast-path message. Each is compared with the others.
const MAX_TENSORS: usize = 256;
/// Means "any revision" in Python's columns, so no session has it.
const ANY_REVISION: u64 = u64::MAX;

/// A tensor of a message, `data` within it.
#[derive(Debug)]
pub struct Tensor<'a> {
    pub name: &'a str,
    pub dtype: u8,
    pub shape: Vec<usize>,
    pub data: &'a [u8],
}

/// One of Triton's requests.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its id, which the reply repeats.
    pub id: Bytes,
    /// The whole message, since Python may serve the request itself.
    pub message: Bytes,
}

/// A step of one or many sessions.
#[derive(Debug, Default)]
pub struct Step<'a> {
    pub session_ids: Vec<&'a str>,
    pub tensors: Vec<Tensor<'a>>,
    /// One per session, or none.
    pub expected: Vec<u64>,
    /// One per session, or none.
    pub request_ids: Vec<u64>,
    /// Rows of each session, from the message or from the tensors.
    pub sizes: Vec<u32>,
    /// Whether the message contains them.
    pub has_sizes: bool,
    /// OutputSelection.
    pub select: u8,
    pub output_names: Vec<&'a str>,
    /// Longest wait in microseconds; 0: until its call's deadline.
    pub timeout_us: u64,
    /// Whether it has one number for all sessions, so that its sender accepts one for all in the answer.
    pub is_short: bool,
    /// Triton's request, if it is one.
    pub request: Option<Request>,
    /// Name and version of the model, if the message has them: see `triton`.
    pub model: Option<(&'a str, &'a str)>,
    /// The caller, in whose namespace `session_ids` are; None: no authentication.
    pub caller: Option<Arc<Known>>,
}

impl<'a> Step<'a> {
    /// A `StepRequest`.
    pub fn of_request(message: &'a [u8]) -> Result<Self, SlowPath> {
        let mut step = Step::default();
        let mut fields = Fields::new(message);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (1, Value::Bytes(id)) => {
                    step.session_ids.clear(); // the last value counts
                    step.session_ids.push(id_of(id)?);
                }
                (2, Value::Bytes(tensor)) => step.add_tensor(Tensor::of(tensor)?)?,
                (3, Value::Varint(revision)) => {
                    step.expected.clear();
                    step.expected.push(revision);
                }
                (4, Value::Fixed64(id)) => {
                    step.request_ids.clear();
                    step.request_ids.push(id);
                }
                (5, Value::Varint(select)) => step.select = selection(select)?,
                (7, Value::Bytes(name)) => push(&mut step.output_names, text(name)?)?,
                _ => return Err(SlowPath),
            }
        }
        let rows = step.rows()?;
        step.sizes.push(u32::try_from(rows).map_err(|_| SlowPath)?);
        step.checked()
    }

    /// A `StepStreamRequest` and its frame id.
    pub fn of_frame(message: &'a [u8]) -> Result<(u64, Self), SlowPath> {
        let mut frame_id = 0;
        let mut frame = None;
        let mut fields = Fields::new(message);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (1, Value::Varint(id)) => frame_id = id,
                (2, Value::Bytes(bytes)) if frame.is_none() => frame = Some(bytes),
                _ => return Err(SlowPath),
            }
        }
        let step = Step::of_frame_body(frame.ok_or(SlowPath)?)?;
        Ok((frame_id, step))
    }

    /// Returns the id of a frame, on the fast path or not, if it can be read.
    pub fn frame_id(message: &[u8]) -> Option<u64> {
        let mut fields = Fields::new(message);
        let mut frame_id = 0;
        loop {
            match fields.next() {
                Ok(Some((1, Value::Varint(id)))) => frame_id = id,
                Ok(Some(_)) => {}
                Ok(None) => return Some(frame_id),
                Err(SlowPath) => return None,
            }
        }
    }

    fn of_frame_body(message: &'a [u8]) -> Result<Self, SlowPath> {
        let mut step = Step::default();
        let (mut expected, mut request_id_base, mut batch_size) = (None, 0, 0);
        let mut fields = Fields::new(message);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (1, Value::Bytes(id)) => push(&mut step.session_ids, id_of(id)?)?,
                (2, Value::Bytes(tensor)) => step.add_tensor(Tensor::of(tensor)?)?,
                (3, Value::Bytes(packed)) => unpack(packed, &mut step.expected)?,
                (4, Value::Bytes(packed)) => unpack_fixed(packed, &mut step.request_ids)?,
                (5, Value::Varint(select)) => step.select = selection(select)?,
                (6, Value::Varint(ms)) => {
                    step.timeout_us = 1000 * u64::from(u32::try_from(ms).map_err(|_| SlowPath)?)
                }
                (7, Value::Bytes(packed)) => {
                    let mut inner = Fields::new(packed);
                    while let Some(size) = inner.packed()? {
                        push(&mut step.sizes, u32::try_from(size).map_err(|_| SlowPath)?)?;
                    }
                }
                (9, Value::Bytes(name)) => push(&mut step.output_names, text(name)?)?,
                (14, Value::Varint(revision)) => expected = Some(revision),
                (15, Value::Fixed64(base)) => request_id_base = base,
                (17, Value::Varint(size)) => batch_size = u32::try_from(size).map_err(|_| SlowPath)?,
                _ => return Err(SlowPath),
            }
        }
        step.take_numbers(expected, request_id_base)?;
        if batch_size != 0 {
            if !step.sizes.is_empty() {
                return Err(SlowPath);
            }
            step.sizes.resize(step.count(), batch_size);
        }
        let rows = step.rows()?;
        step.has_sizes = !step.sizes.is_empty();
        if step.sizes.is_empty() && rows == step.count() {
            step.sizes.resize(rows, 1);
        } else if step.sizes.is_empty() && step.count() == 1 {
            step.sizes.push(u32::try_from(rows).map_err(|_| SlowPath)?);
        }
        step.checked()
    }

    /// One number that stands for one of each session.
    fn take_numbers(&mut self, expected: Option<u64>, request_id_base: u64) -> Result<(), SlowPath> {
        let count = self.count();
        self.is_short = expected.is_some() || request_id_base != 0;
        if let Some(revision) = expected {
            if !self.expected.is_empty() {
                return Err(SlowPath);
            }
            self.expected.resize(count, revision);
        }
        if request_id_base != 0 {
            let last = request_id_base.checked_add((count as u64).saturating_sub(1)).ok_or(SlowPath)?;
            if !self.request_ids.is_empty() {
                return Err(SlowPath);
            }
            self.request_ids.extend(request_id_base..=last);
        }
        Ok(())
    }

    /// Add a tensor, unless there are too many.
    pub fn add_tensor(&mut self, tensor: Tensor<'a>) -> Result<(), SlowPath> {
        if self.tensors.len() >= MAX_TENSORS {
            return Err(SlowPath);
        }
        self.tensors.push(tensor);
        Ok(())
    }

    /// Number of sessions.
    pub fn count(&self) -> usize {
        self.session_ids.len()
    }

    /// Call `then` with the server's id of each session.
    pub fn for_each_id(&self, mut then: impl FnMut(&str)) {
        let prefix = self.caller.as_ref().map_or("", |known| known.prefix.as_str());
        if prefix.is_empty() {
            return self.session_ids.iter().copied().for_each(then);
        }
        let mut name = prefix.to_owned();
        for id in &self.session_ids {
            name.truncate(prefix.len());
            name.push_str(id);
            then(&name);
        }
    }

    /// Returns the rows of its tensors.
    pub fn rows(&self) -> Result<usize, SlowPath> {
        let first = self.tensors.first().ok_or(SlowPath)?;
        first.shape.first().copied().ok_or(SlowPath)
    }

    fn names_a_tensor_twice(&self) -> bool {
        let tensors = &self.tensors;
        (1..tensors.len()).any(|at| tensors[..at].iter().any(|other| other.name == tensors[at].name))
    }

    /// Returns the step if its parts are consistent.
    pub fn checked(self) -> Result<Self, SlowPath> {
        let count = self.count();
        let rows = self.rows()?;
        let fits = |length: usize| length == 0 || length == count;
        if count == 0
            || count > MAX_MEMBERS
            || self.session_ids.iter().any(|id| id.is_empty())
            || self.sizes.len() != count
            || self.sizes.contains(&0)
            || self.sizes.iter().map(|size| *size as usize).sum::<usize>() != rows
            || self.tensors.iter().any(|tensor| tensor.shape.first() != Some(&rows))
            || self.names_a_tensor_twice()
            || !fits(self.expected.len())
            || !fits(self.request_ids.len())
            || self.expected.contains(&ANY_REVISION)
        {
            return Err(SlowPath);
        }
        Ok(self)
    }
}

impl<'a> Tensor<'a> {
    fn of(message: &'a [u8]) -> Result<Self, SlowPath> {
        let mut tensor = Tensor { name: "", dtype: 0, shape: Vec::new(), data: &[] };
        let mut fields = Fields::new(message);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (1, Value::Bytes(name)) => tensor.name = text(name)?,
                (2, Value::Varint(dtype)) => tensor.dtype = u8::try_from(dtype).map_err(|_| SlowPath)?,
                (3, Value::Bytes(packed)) => tensor.add_axes(packed)?,
                (4, Value::Bytes(data)) => tensor.data = data,
                _ => return Err(SlowPath),
            }
        }
        tensor.require_size()?;
        Ok(tensor)
    }

    /// Add axes from a packed field, which may come in parts.
    pub fn add_axes(&mut self, packed: &[u8]) -> Result<(), SlowPath> {
        let mut axes = Fields::new(packed);
        while let Some(axis) = axes.packed()? {
            self.shape.push(usize::try_from(axis).map_err(|_| SlowPath)?);
            if self.shape.len() > MAX_RANK {
                return Err(SlowPath);
            }
        }
        Ok(())
    }

    /// Require data of the size that shape and dtype imply.
    pub fn require_size(&self) -> Result<(), SlowPath> {
        let size = self
            .shape
            .iter()
            .try_fold(element_size(self.dtype)?, |size, axis| size.checked_mul(*axis))
            .ok_or(SlowPath)?;
        if size != self.data.len() || size == 0 {
            return Err(SlowPath);
        }
        Ok(())
    }
}

/// Bytes per element of a `DataType`. Booleans are not on the fast path, because their values are restricted.
pub fn element_size(dtype: u8) -> Result<usize, SlowPath> {
    match dtype {
        5 | 9 => Ok(1),
        3 | 4 | 6 | 10 => Ok(2),
        1 | 7 | 11 => Ok(4),
        2 | 8 | 12 => Ok(8),
        _ => Err(SlowPath),
    }
}

/// Reads a name. Longer ones go to Python, which refuses them.
pub fn text(bytes: &[u8]) -> Result<&str, SlowPath> {
    if bytes.len() > FREE_BYTES {
        return Err(SlowPath);
    }
    std::str::from_utf8(bytes).map_err(|_| SlowPath)
}

/// Add to a list that has at most one entry for each session.
pub fn push<T>(list: &mut Vec<T>, entry: T) -> Result<(), SlowPath> {
    if list.len() >= MAX_MEMBERS {
        return Err(SlowPath);
    }
    list.push(entry);
    Ok(())
}

/// Reads a session id, as its client wrote it.
fn id_of(bytes: &[u8]) -> Result<&str, SlowPath> {
    text(bytes).and_then(|id| if id.contains(SEPARATOR) { Err(SlowPath) } else { Ok(id) })
}

/// ALL (also if absent), LAST or NONE.
fn selection(value: u64) -> Result<u8, SlowPath> {
    match value {
        0 | 1 => Ok(0),
        2 | 3 => Ok(value as u8),
        _ => Err(SlowPath),
    }
}

fn unpack(packed: &[u8], into: &mut Vec<u64>) -> Result<(), SlowPath> {
    let mut values = Fields::new(packed);
    while let Some(value) = values.packed()? {
        push(into, value)?;
    }
    Ok(())
}

fn unpack_fixed(packed: &[u8], into: &mut Vec<u64>) -> Result<(), SlowPath> {
    if packed.len() % 8 != 0 {
        return Err(SlowPath);
    }
    for bytes in packed.chunks_exact(8) {
        push(into, u64::from_le_bytes(bytes.try_into().map_err(|_| SlowPath)?))?;
    }
    Ok(())
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::messages::protobuf::{put_bytes, put_number, put_packed};
    use bytes::{BufMut, BytesMut};
    use proptest::prelude::*;

    pub fn tensor(rows: usize, features: usize, data: &[u8]) -> BytesMut {
        let mut out = BytesMut::new();
        put_number(&mut out, 2, 1);
        put_packed(&mut out, 3, &[rows as u64, features as u64]);
        put_bytes(&mut out, 4, data);
        out
    }

    fn request(id: &str, rows: usize, features: usize) -> BytesMut {
        let mut out = BytesMut::new();
        put_bytes(&mut out, 1, id.as_bytes());
        put_bytes(&mut out, 2, &tensor(rows, features, &vec![7; rows * features * 4]));
        out
    }

    #[test]
    fn a_request_is_parsed() {
        let mut message = request("user-1", 3, 2);
        put_number(&mut message, 3, 9);
        message.put_slice(&[0x21]);
        message.put_u64_le(77);
        put_number(&mut message, 5, 2);
        let step = Step::of_request(&message).unwrap();
        assert_eq!(step.session_ids, ["user-1"]);
        assert_eq!(step.expected, [9]);
        assert_eq!(step.request_ids, [77]);
        assert_eq!(step.sizes, [3]);
        assert_eq!(step.select, 2);
        assert_eq!(step.tensors[0].shape, [3, 2]);
        assert_eq!(step.tensors[0].data.len(), 24);
    }

    #[test]
    fn requests_for_more_than_a_step_are_slow() {
        for (field, value) in [(6, 1), (8, 2), (9, 1), (11, 2), (12, 1)] {
            let mut message = request("a", 1, 2);
            put_number(&mut message, field, value);
            assert_eq!(Step::of_request(&message).unwrap_err(), SlowPath, "field {field}");
        }
    }

    #[test]
    fn elements_as_numbers_are_slow() {
        let mut numbers = tensor(1, 2, &[0; 8]);
        put_bytes(&mut numbers, 5, &1f64.to_le_bytes());
        let mut message = BytesMut::new();
        put_bytes(&mut message, 1, b"a");
        put_bytes(&mut message, 2, &numbers);
        assert_eq!(Step::of_request(&message).unwrap_err(), SlowPath);
    }

    #[test]
    fn a_shape_may_come_in_parts_up_to_the_limit_of_axes() {
        let in_parts = |axes: usize| {
            let mut tensor = BytesMut::new();
            put_number(&mut tensor, 2, 1);
            put_packed(&mut tensor, 3, &[1]);
            put_packed(&mut tensor, 3, &vec![1; axes - 1]);
            put_bytes(&mut tensor, 4, &[0; 4]);
            tensor
        };
        assert_eq!(Tensor::of(&in_parts(MAX_RANK)).unwrap().shape, [1; MAX_RANK]);
        assert_eq!(Tensor::of(&in_parts(MAX_RANK + 1)).unwrap_err(), SlowPath);
    }

    #[test]
    fn two_tensors_of_one_name_are_slow() {
        let mut message = request("a", 1, 2);
        put_bytes(&mut message, 2, &tensor(1, 2, &[0; 8]));
        assert!(Step::of_request(&message).is_err());
    }

    #[test]
    fn a_missing_or_empty_part_is_slow() {
        assert!(Step::of_request(&[]).is_err());
        let mut no_tensor = BytesMut::new();
        put_bytes(&mut no_tensor, 1, b"a");
        assert!(Step::of_request(&no_tensor).is_err());
        assert!(Step::of_request(&request("", 1, 2)).is_err());
        assert!(Step::of_request(&request("acme\u{1f}a", 1, 2)).is_err(), "another tenant's, or none");
        assert!(Step::of_request(&request("a", 0, 2)).is_err());
        let mut any = request("a", 1, 2);
        put_number(&mut any, 3, u64::MAX);
        assert!(Step::of_request(&any).is_err());
    }

    fn frame(body: &BytesMut) -> BytesMut {
        let mut out = BytesMut::new();
        put_number(&mut out, 1, 5);
        put_bytes(&mut out, 2, body);
        out
    }

    #[test]
    fn a_frame_is_parsed() {
        let mut body = BytesMut::new();
        for id in ["a", "b", "c"] {
            put_bytes(&mut body, 1, id.as_bytes());
        }
        put_bytes(&mut body, 2, &tensor(4, 2, &[0; 32]));
        put_packed(&mut body, 3, &[1, 2, 300]);
        put_number(&mut body, 6, 250);
        put_packed(&mut body, 7, &[1, 2, 1]);
        let message = frame(&body);
        let (frame_id, step) = Step::of_frame(&message).unwrap();
        assert_eq!(frame_id, 5);
        assert_eq!(step.session_ids, ["a", "b", "c"]);
        assert_eq!(step.expected, [1, 2, 300]);
        assert_eq!(step.sizes, [1, 2, 1]);
        assert_eq!(step.timeout_us, 250_000);
    }

    #[test]
    fn an_id_with_the_tenant_separator_is_slow() {
        for (id, is_plain) in [("acme.a", true), ("acme\u{1f}a", false), ("\u{1f}", false)] {
            let mut body = BytesMut::new();
            put_bytes(&mut body, 1, b"b");
            put_bytes(&mut body, 1, id.as_bytes());
            put_bytes(&mut body, 2, &tensor(2, 2, &[0; 16]));
            assert_eq!(Step::of_frame(&frame(&body)).is_ok(), is_plain, "{id:?}");
        }
    }

    #[test]
    fn rows_that_fit_no_session_are_slow() {
        let mut body = BytesMut::new();
        for id in ["a", "b"] {
            put_bytes(&mut body, 1, id.as_bytes());
        }
        put_bytes(&mut body, 2, &tensor(3, 2, &[0; 24]));
        assert!(Step::of_frame(&frame(&body)).is_err());
    }

    #[test]
    fn lists_of_another_length_are_slow() {
        let mut body = BytesMut::new();
        for id in ["a", "b"] {
            put_bytes(&mut body, 1, id.as_bytes());
        }
        put_bytes(&mut body, 2, &tensor(2, 2, &[0; 16]));
        put_packed(&mut body, 3, &[1]);
        assert!(Step::of_frame(&frame(&body)).is_err());
    }

    /// A frame of the sessions "a" and "b", a row each.
    fn pair() -> BytesMut {
        let mut body = BytesMut::new();
        put_bytes(&mut body, 1, b"a");
        put_bytes(&mut body, 1, b"b");
        put_bytes(&mut body, 2, &tensor(2, 2, &[0; 16]));
        body
    }

    fn put_base(body: &mut BytesMut, base: u64) {
        body.put_slice(&[15 << 3 | 1]);
        body.put_u64_le(base);
    }

    #[test]
    fn one_number_stands_for_those_of_all_sessions() {
        let message = frame(&pair());
        assert!(!Step::of_frame(&message).unwrap().1.is_short);
        let mut body = pair();
        put_number(&mut body, 14, 9);
        put_base(&mut body, u64::MAX - 1);
        put_number(&mut body, 17, 1);
        let message = frame(&body);
        let (_, step) = Step::of_frame(&message).unwrap();
        assert_eq!((&step.sizes[..], step.has_sizes), (&[1, 1][..], true));
        assert_eq!(step.expected, [9, 9]);
        assert_eq!(step.request_ids, [u64::MAX - 1, u64::MAX]);
        assert!(step.is_short);
    }

    #[test]
    fn values_that_are_given_twice_are_slow() {
        let read = |change: &dyn Fn(&mut BytesMut)| {
            let mut body = pair();
            change(&mut body);
            Step::of_frame(&frame(&body)).map(|_| ())
        };
        assert_eq!(read(&|_| ()), Ok(()));
        let twice: [&dyn Fn(&mut BytesMut); 5] = [
            &|body| put_number(body, 17, 2), // those are more rows than the tensor has
            &|body| {
                put_number(body, 17, 1);
                put_packed(body, 7, &[1, 1]);
            },
            &|body| {
                put_number(body, 14, 1);
                put_packed(body, 3, &[1, 1]);
            },
            &|body| {
                put_base(body, 1);
                put_bytes(body, 4, &[1; 16]);
            },
            &|body| put_base(body, u64::MAX), // the second session's would be 2^64
        ];
        for change in twice {
            assert_eq!(read(change), Err(SlowPath));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_rejected(bytes: Vec<u8>) {
            let _ = Step::of_request(&bytes);
            let _ = Step::of_frame(&bytes);
        }

        #[test]
        fn a_truncated_request_is_not_parsed_as_another(cut in 1usize..40) {
            let message = request("user-1", 2, 2);
            let kept = message.len().saturating_sub(cut);
            prop_assert!(Step::of_request(&message[..kept]).is_err());
        }
    }
}
