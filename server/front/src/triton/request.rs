//! Parses Triton's fast-path requests: steps of sequences that have started.
//!
//! A `ModelInferRequest` is on the fast path if it names a sequence, neither starts nor ends it, and has its inputs as raw
//! contents of numbers. Anything else goes to Python as bytes.

use crate::limits::callers::SEPARATOR;
use crate::messages::protobuf::{Fields, SlowPath, Value};
use crate::steps::parse::{push as add, text, Request, Step, Tensor};
use bytes::Bytes;
use std::fmt::Write;

/// Limit of characters in a session id.
const MAX_ID: usize = 256;
/// Limit of bytes in a sequence id that is a text.
const MAX_SEQUENCE: usize = 128;
/// Limit of bytes in a request id. The reply contains it, and Python limits the reply.
const MAX_REQUEST_ID_BYTES: usize = 256;

/// Names of the element types by `DataType`, starting at 1.
const DATATYPES: [&str; 13] = [
    "FP32", "FP64", "FP16", "BF16", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64",
    "BOOL",
];

/// Triton's name of a `DataType`.
pub fn datatype(dtype: u8) -> &'static str {
    DATATYPES.get(usize::from(dtype).wrapping_sub(1)).copied().unwrap_or_default()
}

/// Parse a fast-path `ModelInferRequest`. `session_id` receives the id of its sequence's session.
pub fn read<'a>(message: &'a Bytes, session_id: &'a mut String) -> Result<Step<'a>, SlowPath> {
    let (mut model, mut version, mut id) = ("", "", "");
    let mut parameters = Parameters::default();
    let mut step = Step::default();
    let mut contents = Vec::new();
    let mut fields = Fields::new(message);
    while let Some((number, value)) = fields.next()? {
        match (number, value) {
            (1, Value::Bytes(bytes)) => model = text(bytes)?,
            (2, Value::Bytes(bytes)) => version = text(bytes)?,
            (3, Value::Bytes(bytes)) => id = text(bytes)?,
            (4, Value::Bytes(entry)) => parameters.add(entry)?,
            (5, Value::Bytes(input)) => step.add_tensor(input_of(input)?)?,
            (6, Value::Bytes(output)) => add(&mut step.output_names, output_of(output)?)?,
            (7, Value::Bytes(raw)) => add(&mut contents, raw)?,
            _ => return Err(SlowPath),
        }
    }
    if contents.len() != step.tensors.len() || id.len() > MAX_REQUEST_ID_BYTES {
        return Err(SlowPath);
    }
    for (tensor, data) in step.tensors.iter_mut().zip(contents) {
        tensor.data = data;
        tensor.require_size()?;
    }
    write_session_id(session_id, model, parameters.sequence.ok_or(SlowPath)?)?;
    step.session_ids.push(session_id);
    step.model = Some((model, version));
    step.expected.extend(parameters.revision);
    step.request_ids.extend(parameters.request_id);
    if parameters.request_id.is_some() && parameters.revision.is_none() {
        return Err(SlowPath);
    }
    step.sizes.push(u32::try_from(step.rows()?).map_err(|_| SlowPath)?);
    step.timeout_us = parameters.timeout_us;
    step.request = Some(Request { id: message.slice_ref(id.as_bytes()), message: message.clone() });
    step.checked()
}

/// A sequence's id.
#[derive(Clone, Copy, Debug)]
enum Sequence<'a> {
    Number(u64),
    Text(&'a str),
}

/// Write the id of a sequence's session, as `session_id_of` in rpc/triton/sequences.py does. If that function uses a
/// digest, the request is not on the fast path.
fn write_session_id(into: &mut String, model: &str, sequence: Sequence<'_>) -> Result<(), SlowPath> {
    into.clear();
    match sequence {
        Sequence::Number(number) => write!(into, "triton/{model}/{number}"),
        Sequence::Text(name) => write!(into, "triton/{model}/\"{name}\""),
    }
    .map_err(|_| SlowPath)?;
    if into.len() > MAX_ID || into.contains(SEPARATOR) {
        return Err(SlowPath);
    }
    Ok(())
}

/// Names of the parameters that a fast-path request may have.
const NAMES: [&str; 8] = [
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "priority",
    "timeout",
    "triton_enable_empty_final_response",
    "stepwell_revision",
    "stepwell_request_id",
];
// Fields of `InferParameter`.
const BOOL: u32 = 1;
const INT64: u32 = 2;
const STRING: u32 = 3;
const UINT64: u32 = 5;
const MAX_INT64: u64 = i64::MAX as u64;

#[derive(Default)]
struct Parameters<'a> {
    /// Which of `NAMES` were present.
    seen: [bool; NAMES.len()],
    sequence: Option<Sequence<'a>>,
    revision: Option<u64>,
    request_id: Option<u64>,
    timeout_us: u64,
}

impl<'a> Parameters<'a> {
    /// Read an entry of the map.
    fn add(&mut self, entry: &'a [u8]) -> Result<(), SlowPath> {
        let mut fields = Fields::new(entry);
        let (Some((1, Value::Bytes(name))), Some((2, Value::Bytes(parameter))), None) =
            (fields.next()?, fields.next()?, fields.next()?)
        else {
            return Err(SlowPath);
        };
        let place = NAMES.iter().position(|known| known.as_bytes() == name).ok_or(SlowPath)?;
        if std::mem::replace(&mut self.seen[place], true) {
            return Err(SlowPath);
        }
        let mut fields = Fields::new(parameter);
        let (Some((kind, value)), None) = (fields.next()?, fields.next()?) else { return Err(SlowPath) };
        match (NAMES[place], kind, value) {
            // a signed number stands for the unsigned number with the same bits
            ("sequence_id", INT64 | UINT64, Value::Varint(number)) if number != 0 => {
                self.sequence = Some(Sequence::Number(number));
            }
            ("sequence_id", STRING, Value::Bytes(name)) if is_plain_name(name) => {
                self.sequence = Some(Sequence::Text(text(name)?));
            }
            (
                "sequence_start" | "sequence_end" | "triton_enable_empty_final_response",
                BOOL,
                Value::Varint(0),
            ) => {}
            ("timeout", INT64, Value::Varint(us)) if us <= MAX_INT64 => self.timeout_us = us,
            // the others are integers and not negative
            ("priority" | "stepwell_revision" | "stepwell_request_id", INT64, Value::Varint(number))
                if number > MAX_INT64 =>
            {
                return Err(SlowPath);
            }
            ("priority", INT64 | UINT64, Value::Varint(_)) => {}
            ("stepwell_revision", INT64 | UINT64, Value::Varint(number)) => self.revision = Some(number),
            ("stepwell_request_id", INT64 | UINT64, Value::Varint(number)) if number != 0 => {
                self.request_id = Some(number);
            }
            _ => return Err(SlowPath),
        }
        Ok(())
    }
}

/// Whether a text can be part of a session id unchanged. Python accepts further texts.
fn is_plain_name(name: &[u8]) -> bool {
    !name.is_empty() && name.len() <= MAX_SEQUENCE && name.iter().all(|byte| (b' '..=b'~').contains(byte))
}

/// An `InferInputTensor`, without its data.
fn input_of(message: &[u8]) -> Result<Tensor<'_>, SlowPath> {
    let mut tensor = Tensor { name: "", dtype: 0, shape: Vec::new(), data: &[] };
    let mut fields = Fields::new(message);
    while let Some((number, value)) = fields.next()? {
        match (number, value) {
            (1, Value::Bytes(name)) => tensor.name = text(name)?,
            (2, Value::Bytes(name)) => tensor.dtype = dtype_of(name)?,
            (3, Value::Bytes(packed)) => tensor.add_axes(packed)?,
            _ => return Err(SlowPath),
        }
    }
    Ok(tensor)
}

/// The name of an `InferRequestedOutputTensor` without parameters.
fn output_of(message: &[u8]) -> Result<&str, SlowPath> {
    let mut fields = Fields::new(message);
    match (fields.next()?, fields.next()?) {
        (Some((1, Value::Bytes(name))), None) => text(name),
        _ => Err(SlowPath),
    }
}

fn dtype_of(name: &[u8]) -> Result<u8, SlowPath> {
    let place = DATATYPES.iter().position(|known| known.as_bytes() == name).ok_or(SlowPath)?;
    Ok(place as u8 + 1)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::messages::protobuf::{put_bytes, put_header, put_number, put_packed, put_varint};
    use bytes::{BufMut, BytesMut};
    use proptest::prelude::*;

    /// Add a parameter with a number, even if it is 0.
    fn put_parameter(out: &mut BytesMut, name: &str, kind: u32, number: u64) {
        let mut parameter = BytesMut::new();
        put_varint(&mut parameter, u64::from(kind << 3));
        put_varint(&mut parameter, number);
        put_entry(out, name, &parameter);
    }

    fn put_entry(out: &mut BytesMut, name: &str, parameter: &[u8]) {
        let mut entry = BytesMut::new();
        put_bytes(&mut entry, 1, name.as_bytes());
        put_bytes(&mut entry, 2, parameter);
        put_bytes(out, 4, &entry);
    }

    fn input(name: &str, datatype: &str, shape: &[u64]) -> BytesMut {
        let mut out = BytesMut::new();
        put_bytes(&mut out, 1, name.as_bytes());
        put_bytes(&mut out, 2, datatype.as_bytes());
        put_packed(&mut out, 3, shape);
        out
    }

    /// A request without a sequence.
    fn body() -> BytesMut {
        let mut out = BytesMut::new();
        put_bytes(&mut out, 1, b"lstm");
        put_bytes(&mut out, 3, b"r1");
        put_bytes(&mut out, 5, &input("x", "FP32", &[2, 3]));
        put_bytes(&mut out, 7, &[7; 24]);
        out
    }

    pub fn request(sequence: u64) -> BytesMut {
        let mut out = body();
        put_parameter(&mut out, "sequence_id", INT64, sequence);
        put_parameter(&mut out, "sequence_start", BOOL, 0);
        put_parameter(&mut out, "sequence_end", BOOL, 0);
        out
    }

    fn is_plain(message: &[u8]) -> bool {
        read(&Bytes::copy_from_slice(message), &mut String::new()).is_ok()
    }

    #[test]
    fn a_request_is_parsed() {
        let mut message = request(5);
        put_bytes(&mut message, 2, b"1");
        put_bytes(&mut message, 6, &[0x0a, 1, b'y']);
        put_parameter(&mut message, "timeout", INT64, 2_000_000);
        put_parameter(&mut message, "priority", UINT64, 3);
        put_parameter(&mut message, "stepwell_revision", INT64, 9);
        put_parameter(&mut message, "stepwell_request_id", UINT64, u64::MAX);
        let mut name = String::new();
        let message = message.freeze();
        let step = read(&message, &mut name).unwrap();
        assert_eq!(step.request.as_ref().unwrap().id, "r1");
        assert_eq!(step.timeout_us, 2_000_000);
        assert_eq!(step.model, Some(("lstm", "1")));
        assert_eq!(step.session_ids, ["triton/lstm/5"]);
        assert_eq!((step.expected, step.request_ids, step.sizes), (vec![9], vec![u64::MAX], vec![2]));
        assert_eq!(step.output_names, ["y"]);
        assert_eq!((step.tensors[0].name, step.tensors[0].dtype), ("x", 1));
        assert_eq!((&step.tensors[0].shape, step.tensors[0].data.len()), (&vec![2, 3], 24));
    }

    #[test]
    fn numbers_and_texts_are_different_sequences() {
        let mut named = body();
        put_entry(&mut named, "sequence_id", b"\x1a\x015");
        for (message, expected) in [
            (request(5), "triton/lstm/5".to_owned()),
            (request(u64::MAX), format!("triton/lstm/{}", u64::MAX)), // -1
            (named, "triton/lstm/\"5\"".to_owned()),
        ] {
            let mut name = String::new();
            assert_eq!(read(&message.freeze(), &mut name).unwrap().session_ids, [expected]);
        }
    }

    #[test]
    fn requests_other_than_steps_of_a_sequence_are_slow() {
        assert!(is_plain(&request(5)));
        assert!(!is_plain(&body()), "no sequence");
        assert!(!is_plain(&request(0)), "0 is no sequence id");
        for (name, kind, number) in [
            ("sequence_start", BOOL, 1),
            ("sequence_start", BOOL, 0), // repeated, which protobuf resolves
            ("sequence_end", INT64, 0),
            ("triton_enable_empty_final_response", BOOL, 1),
            ("timeout", INT64, u64::MAX),
            ("timeout", UINT64, 1),
            ("priority", INT64, u64::MAX),
            ("stepwell_request_id", INT64, 4), // without a revision
            ("stepwell_revision", UINT64, u64::MAX),
            ("stepwell_stateless", BOOL, 0),
            ("temperature", INT64, 1),
        ] {
            let mut message = request(5);
            put_parameter(&mut message, name, kind, number);
            assert!(!is_plain(&message), "{name} {number}");
        }
        let long = "x".repeat(129);
        for text in ["", "a\nb", "\u{e9}", long.as_str()] {
            let mut message = body();
            let mut parameter = BytesMut::new();
            put_bytes(&mut parameter, 3, text.as_bytes());
            put_entry(&mut message, "sequence_id", &parameter);
            assert!(!is_plain(&message), "{text:?}");
        }
        for parameter in [&b""[..], b"\x08\x00\x08\x00", b"\x21"] {
            let mut message = request(5);
            put_entry(&mut message, "priority", parameter);
            assert!(!is_plain(&message), "{parameter:?}");
        }
    }

    #[test]
    fn inputs_other_than_raw_numbers_are_slow() {
        for (given, raw) in [
            (input("z", "BOOL", &[2, 3]), 6),
            (input("z", "BYTES", &[2, 3]), 6),
            (input("z", "FP32", &[1, 3]), 12), // other rows than x
            (input("z", "FP32", &[2, 3]), 20),
            (input("z", "FP32", &[2, u64::MAX]), 24),
            (input("z", "FP32", &[2, 0]), 0),
            (input("x", "FP32", &[2, 3]), 24),
        ] {
            let mut message = request(5);
            put_bytes(&mut message, 5, &given);
            put_bytes(&mut message, 7, &vec![0; raw]);
            assert!(!is_plain(&message), "{given:?}");
        }
        let mut typed = request(5);
        let mut given = input("z", "FP32", &[2, 3]);
        put_bytes(&mut given, 5, b"");
        put_bytes(&mut typed, 5, &given);
        put_bytes(&mut typed, 7, &[0; 24]);
        assert!(!is_plain(&typed), "it has contents, although they are empty");
        let mut more = request(5);
        put_bytes(&mut more, 7, &[0; 24]);
        assert!(!is_plain(&more), "contents without an input");
        let mut shared = request(5);
        put_bytes(&mut shared, 6, b"\x0a\x01y\x12\x00");
        assert!(!is_plain(&shared), "an output with a parameter");
    }

    #[test]
    fn a_model_with_the_tenant_separator_is_slow() {
        let mut message = request(5);
        put_bytes(&mut message, 1, b"lstm\x1fa"); // the last one counts
        assert!(!is_plain(&message));
    }

    #[test]
    fn an_unknown_field_is_slow() {
        let mut message = request(5);
        put_number(&mut message, 9, 1);
        assert!(!is_plain(&message));
        let mut message = request(5);
        put_header(&mut message, 1, 1);
        message.put_u8(0xff); // not UTF-8
        assert!(!is_plain(&message));
    }

    #[test]
    fn types_have_their_names() {
        for (dtype, name) in [(1, "FP32"), (4, "BF16"), (8, "INT64"), (12, "UINT64"), (13, "BOOL"), (0, "")] {
            assert_eq!(datatype(dtype), name);
        }
        assert_eq!(dtype_of(b"UINT8"), Ok(9));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_rejected(bytes: Vec<u8>) {
            let _ = is_plain(&bytes);
        }

        #[test]
        fn a_truncated_request_is_not_parsed_as_another(cut in 1usize..110) {
            let message = request(5);
            let kept = message.len().saturating_sub(cut);
            let mut name = String::new();
            let message = message.freeze().slice(..kept);
            if let Ok(step) = read(&message, &mut name) {
                // the parameters come last, and START and END are false if they are missing
                prop_assert_eq!(&step.session_ids, &["triton/lstm/5"]);
                prop_assert_eq!(step.tensors[0].data.len(), 24);
            }
        }
    }
}
