//! Writes the answers to a batch of Triton's requests: `ModelInferResponse`, in `ModelStreamInferResponse` on a stream.

use crate::messages::grpc::put_prefix;
use crate::messages::protobuf::{put_bytes, put_header, put_packed, put_varint, varint_size};
use crate::steps::columns::Entry;
use crate::steps::reply::{with_prefix, Part, Writer};
use crate::triton::request::datatype;
use bytes::{Bytes, BytesMut};

/// Writes replies for the model of this name.
pub struct InferReplies<'a> {
    pub model: &'a str,
}

impl Writer for InferReplies<'_> {
    const IS_ORDERED: bool = true;

    fn applied(&self, entry: &Entry, part: &Part<'_>, _places: &[u32]) -> Bytes {
        let rows = part.rows.len();
        let mut head = BytesMut::with_capacity(256);
        put_text(&mut head, 1, self.model.as_bytes());
        put_text(&mut head, 2, part.model_version.to_string().as_bytes());
        if let Some(request) = &entry.request {
            put_text(&mut head, 3, &request.id);
        }
        put_parameter(&mut head, b"stepwell_revision", 2, part.revisions[0]);
        put_parameter(&mut head, b"stepwell_position", 2, part.positions[0]);
        if part.replayed {
            put_parameter(&mut head, b"stepwell_replayed", 1, 1);
        }
        for output in part.outputs {
            let mut tensor = BytesMut::new();
            put_text(&mut tensor, 1, output.name.as_bytes());
            put_bytes(&mut tensor, 2, datatype(output.dtype).as_bytes());
            let shape: Vec<u64> = std::iter::once(rows as u64).chain(output.tail.iter().copied()).collect();
            put_packed(&mut tensor, 3, &shape);
            put_bytes(&mut head, 5, &tensor);
        }
        let size = head.len()
            + part
                .outputs
                .iter()
                .map(|output| rows * output.row_bytes)
                .map(|size| 1 + varint_size(size as u64) + size)
                .sum::<usize>();
        let mut out = BytesMut::with_capacity(size + 16);
        put_prefix(&mut out, 0);
        if entry.frame_id.is_some() {
            put_header(&mut out, 2, size);
        }
        out.extend_from_slice(&head);
        for output in part.outputs {
            put_bytes(&mut out, 6, part.data_of(output));
        }
        with_prefix(out)
    }

    fn failed(&self, entry: &Entry, error: &[u8], _places: &[u32]) -> Bytes {
        let mut response = BytesMut::new();
        if let Some(request) = &entry.request {
            put_text(&mut response, 3, &request.id);
        }
        let mut out = BytesMut::with_capacity(error.len() + response.len() + 32);
        put_prefix(&mut out, 0);
        put_text(&mut out, 1, error);
        put_bytes(&mut out, 2, &response);
        with_prefix(out)
    }
}

/// An entry of the map of parameters; `field` is that of `InferParameter`.
fn put_parameter(out: &mut BytesMut, name: &[u8], field: u32, value: u64) {
    let size = 1 + varint_size(value);
    put_header(out, 4, name.len() + size + 4);
    put_bytes(out, 1, name);
    put_header(out, 2, size);
    // a oneof field is written even if it is 0
    put_varint(out, u64::from(field << 3));
    put_varint(out, value);
}

/// Write a text, which proto3 omits if it is empty.
fn put_text(out: &mut BytesMut, field: u32, text: &[u8]) {
    if !text.is_empty() {
        put_bytes(out, field, text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPLIES: InferReplies<'_> = InferReplies { model: "lstm" };

    use crate::messages::grpc::Status;
    use crate::messages::protobuf::{Fields, Value};
    use crate::steps::call::Call;
    use crate::steps::columns::Batch;
    use crate::steps::columns::{Arrival, Arrivals};
    use crate::steps::reply::{deliver, Answer, Output};
    use crate::triton::request::{read, tests::request as message_of};
    use std::sync::Arc;

    /// Requests with two rows each: two of a stream, and a unary one.
    fn batch() -> (Batch, Arc<Call>, Arc<Call>) {
        let (stream, unary) = (Arc::new(Call::for_test()), Arc::new(Call::for_test()));
        let mut arrivals = Arrivals::default();
        for (call, sequence) in [(&stream, 1), (&stream, 2), (&unary, 3)] {
            let message = message_of(sequence).freeze();
            let mut name = String::new();
            let step = read(&message, &mut name).unwrap();
            let number = Arc::ptr_eq(call, &stream).then(|| call.state().ordered.number());
            arrivals.push_step(call.clone(), number, &step, f64::INFINITY, message.len());
        }
        let Some(Arrival::Batch(batch)) = arrivals.take(usize::MAX).0.pop() else { unreachable!() };
        (*batch, stream, unary)
    }

    fn applied(members: Option<Vec<u32>>, revisions: Vec<u64>, rows: Vec<u8>) -> Answer {
        let outputs =
            vec![Output { name: "y".to_owned(), dtype: 9, tail: vec![], row_bytes: 1, data: Box::new(rows) }];
        Answer::Applied {
            members,
            positions: revisions.clone(),
            revisions,
            outputs,
            replayed: true,
            model_version: 1,
        }
    }

    /// The numbers and bytes of a message's fields.
    fn fields(message: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut left = Fields::new(message);
        let mut found = Vec::new();
        while let Some((number, value)) = left.next().unwrap() {
            let Value::Bytes(bytes) = value else { panic!("a number") };
            found.push((number, bytes.to_vec()));
        }
        found
    }

    fn replies(call: &Call) -> Vec<Vec<(u32, Vec<u8>)>> {
        let replies: Vec<_> = call.state().replies.drain(..).collect();
        replies.iter().map(|(framed, _)| fields(&framed[5..])).collect()
    }

    fn whole(revision: u8, rows: [u8; 2]) -> Vec<(u32, Vec<u8>)> {
        let parameter = |name: &str, value: [u8; 2]| {
            let mut entry = vec![0x0a, name.len() as u8];
            entry.extend_from_slice(name.as_bytes());
            entry.extend_from_slice(&[0x12, 2, value[0], value[1]]);
            (4, entry)
        };
        vec![
            (1, b"lstm".to_vec()),
            (2, b"1".to_vec()),
            (3, b"r1".to_vec()),
            parameter("stepwell_revision", [0x10, revision]),
            parameter("stepwell_position", [0x10, revision]),
            parameter("stepwell_replayed", [0x08, 1]),
            (5, vec![0x0a, 1, b'y', 0x12, 5, b'U', b'I', b'N', b'T', b'8', 0x1a, 1, 2]),
            (6, rows.to_vec()),
        ]
    }

    #[test]
    fn each_request_is_answered_with_its_own_rows() {
        let (batch, stream, unary) = batch();
        deliver(&REPLIES, &batch, &applied(None, vec![4, 0, 6], (10..16).collect()));
        let streamed: Vec<_> = replies(&stream)
            .into_iter()
            .map(|found| {
                assert_eq!(found.len(), 1);
                assert_eq!(found[0].0, 2);
                fields(&found[0].1)
            })
            .collect();
        assert_eq!(streamed, [whole(4, [10, 11]), whole(0, [12, 13])]);
        assert_eq!(replies(&unary), [whole(6, [14, 15])]);
        assert_eq!(unary.state().end, Some(Status::ok()));
    }

    #[test]
    fn a_stream_is_answered_in_the_order_of_its_requests() {
        let (batch, stream, unary) = batch();
        deliver(&REPLIES, &batch, &applied(Some(vec![1]), vec![5], vec![12, 13]));
        assert!(replies(&stream).is_empty(), "the first request has no answer yet");
        let status = Status::new(3, "no good");
        let error = Bytes::from_static(b"no good");
        deliver(
            &REPLIES,
            &batch,
            &Answer::Failed { members: Some(vec![0, 2]), status: status.clone(), error },
        );
        let found = replies(&stream);
        assert_eq!(found[0], [(1, b"no good".to_vec()), (2, b"\x1a\x02r1".to_vec())]);
        assert_eq!(fields(&found[1][0].1), whole(5, [12, 13]));
        assert_eq!(unary.state().end, Some(status));
    }
}
