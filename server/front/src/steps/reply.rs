//! Writes the answers to a batch as messages: `StepResponse`, or parts of `StepStreamResponse`.

use crate::messages::grpc::{put_prefix, Status};
use crate::messages::protobuf::{
    put_bytes, put_header, put_number, put_optional, put_packed, put_varint, varint_size,
};
use crate::steps::columns::{Batch, Entry};
use bytes::{BufMut, Bytes, BytesMut};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// One output of the answered members.
pub struct Output {
    pub name: String,
    pub dtype: u8,
    /// The shape without the rows.
    pub tail: Vec<u64>,
    pub row_bytes: usize,
    /// The rows, one after the other. Their owner keeps them alive, so they need not be copied.
    pub data: Box<dyn AsRef<[u8]> + Send + Sync>,
}

/// The result of some members of a batch, in ascending order. `members` None: all of them.
pub enum Answer {
    Applied {
        members: Option<Vec<u32>>,
        revisions: Vec<u64>,
        positions: Vec<u64>,
        outputs: Vec<Output>,
        replayed: bool,
        /// Version of the model that ran it; 0: omitted from answers of Stepwell's own protocol.
        model_version: u64,
    },
    Failed {
        members: Option<Vec<u32>>,
        status: Status,
        /// The error for streams: a serialized stepwell.v1.Error, or Triton's message.
        error: Bytes,
    },
}

impl Answer {
    /// Call `then` with each entry that has applied members, their part of the answer, and their indexes in the entry.
    fn for_each_part(&self, batch: &Batch, mut then: impl FnMut(&Entry, Part<'_>, &[u32])) {
        let Answer::Applied { members, revisions, positions, outputs, replayed, model_version } = self else {
            return;
        };
        let mut row = 0;
        for_each_entry(batch, members.as_deref(), |entry, own, places| {
            let rows: usize =
                own.clone().map(|member| batch.sizes[member_at(members, member)] as usize).sum();
            let part = Part {
                revisions: &revisions[own.clone()],
                positions: &positions[own],
                outputs,
                rows: row..row + rows,
                replayed: *replayed,
                model_version: *model_version,
            };
            row += rows;
            then(entry, part, places);
        });
    }
}

/// Writes the answers of one protocol, each with gRPC's prefix. Messages of streams have a `frame_id`, those of calls do
/// not.
pub trait Writer {
    /// Whether a stream's replies leave in the order of its messages, each of which then has one session.
    const IS_ORDERED: bool;

    /// The answer to applied sessions of a message.
    fn applied(&self, entry: &Entry, part: &Part<'_>, places: &[u32]) -> Bytes;

    /// The answer to failed sessions of a stream's message; `error` comes from Python.
    fn failed(&self, entry: &Entry, error: &[u8], places: &[u32]) -> Bytes;
}

/// Send an answer to the calls of its members.
pub fn deliver<W: Writer>(writer: &W, batch: &Batch, answer: &Answer) {
    match answer {
        Answer::Applied { .. } => answer.for_each_part(batch, |entry, part, places| {
            send::<W>(entry, writer.applied(entry, &part, places));
        }),
        Answer::Failed { members, status, error } => {
            for_each_entry(batch, members.as_deref(), |entry, _, places| match entry.frame_id {
                None => entry.call.end(status.clone()),
                Some(_) => send::<W>(entry, writer.failed(entry, error, places)),
            });
        }
    }
}

fn send<W: Writer>(entry: &Entry, message: Bytes) {
    match entry.frame_id {
        None => entry.call.finish(message),
        Some(number) if W::IS_ORDERED => entry.call.reply_in_order(number, message, Some(entry.held)),
        Some(id) if entry.is_answered() => entry.call.reply(message, Some(id), Some(entry.held)),
        Some(_) => entry.call.reply(message, None, Some(0)),
    }
}

/// `StepResponse` for calls, parts of `StepStreamResponse` for streams.
pub struct StepReplies;

impl Writer for StepReplies {
    const IS_ORDERED: bool = false;

    fn applied(&self, entry: &Entry, part: &Part<'_>, places: &[u32]) -> Bytes {
        match entry.frame_id {
            None => part.as_response(),
            Some(frame_id) => part.as_frame_part(frame_id, entry, places),
        }
    }

    fn failed(&self, entry: &Entry, error: &[u8], places: &[u32]) -> Bytes {
        let mut member_error = BytesMut::new();
        if places.len() != entry.count as usize {
            put_indexes(&mut member_error, 1, places);
        }
        put_bytes(&mut member_error, 2, error);
        let mut out = BytesMut::with_capacity(member_error.len() + 32);
        put_prefix(&mut out, 0);
        put_number(&mut out, 1, entry.frame_id.unwrap_or(0));
        put_bytes(&mut out, 8, &member_error);
        put_number(&mut out, 9, u64::from(entry.is_answered()));
        with_prefix(out)
    }
}

fn member_at(members: &Option<Vec<u32>>, place: usize) -> usize {
    members.as_ref().map_or(place, |some| some[place] as usize)
}

/// Call `then` with each entry that has some of the members, their range in the answer, and their indexes in the entry.
fn for_each_entry(
    batch: &Batch,
    members: Option<&[u32]>,
    mut then: impl FnMut(&Entry, Range<usize>, &[u32]),
) {
    let Some(members) = members else {
        let mut start = 0;
        let all: Vec<u32> = (0..batch.entries.iter().map(|entry| entry.count).max().unwrap_or(0)).collect();
        for entry in &batch.entries {
            let end = start + entry.count as usize;
            answered(entry, end - start);
            then(entry, start..end, &all[..entry.count as usize]);
            start = end;
        }
        return;
    };
    let mut start = 0;
    while start < members.len() {
        let index = batch.entries.partition_point(|entry| entry.first <= members[start]) - 1;
        let entry = &batch.entries[index];
        let past = entry.first + entry.count;
        let end = start + members[start..].partition_point(|member| *member < past);
        let places: Vec<u32> = members[start..end].iter().map(|member| member - entry.first).collect();
        answered(entry, places.len());
        then(entry, start..end, &places);
        start = end;
    }
}

/// Count sessions of a message as answered.
fn answered(entry: &Entry, count: usize) {
    entry.left.fetch_sub(count as u32, Ordering::Relaxed);
    entry.call.peer.load.end(count);
}

/// The part of an answer for members of one entry.
pub struct Part<'a> {
    pub revisions: &'a [u64],
    pub positions: &'a [u64],
    pub outputs: &'a [Output],
    pub rows: Range<usize>,
    pub replayed: bool,
    pub model_version: u64,
}

impl Part<'_> {
    fn as_response(&self) -> Bytes {
        let mut out = self.buffer(48);
        self.put_outputs(&mut out, 1);
        put_number(&mut out, 2, self.revisions[0]);
        put_number(&mut out, 3, self.positions[0]);
        put_number(&mut out, 4, u64::from(self.replayed));
        put_number(&mut out, 6, self.model_version);
        with_prefix(out)
    }

    fn as_frame_part(&self, frame_id: u64, entry: &Entry, places: &[u32]) -> Bytes {
        let mut out = self.buffer(64 + places.len() * 24);
        put_number(&mut out, 1, frame_id);
        let is_whole = places.len() == entry.count as usize;
        let run = if is_whole || !entry.is_short { None } else { run_of(places) };
        if is_whole {
            put_number(&mut out, 3, 1);
        } else if run.is_none() {
            put_indexes(&mut out, 2, places);
        }
        let (revisions, positions) = (common(entry, self.revisions), common(entry, self.positions));
        if revisions.is_none() {
            put_packed(&mut out, 4, self.revisions);
        }
        if positions.is_none() {
            put_packed(&mut out, 5, self.positions);
        }
        self.put_outputs(&mut out, 6);
        if self.replayed {
            put_indexes(&mut out, 7, places);
        }
        put_number(&mut out, 9, u64::from(entry.is_answered()));
        put_optional(&mut out, 11, revisions);
        put_optional(&mut out, 12, positions);
        if let Some(run) = run {
            put_number(&mut out, 14, u64::from(run.start));
            put_number(&mut out, 15, run.len() as u64);
        }
        put_number(&mut out, 16, self.model_version);
        with_prefix(out)
    }

    /// Returns a buffer for the message, with room for its prefix at the start.
    fn buffer(&self, more: usize) -> BytesMut {
        let size: usize = self
            .outputs
            .iter()
            .map(|output| self.rows.len() * output.row_bytes + output.name.len() + 64)
            .sum();
        let mut out = BytesMut::with_capacity(size + more);
        put_prefix(&mut out, 0);
        out
    }

    fn put_outputs(&self, out: &mut BytesMut, field: u32) {
        for output in self.outputs {
            put_tensor(out, field, output, self.rows.len() as u64, self.data_of(output));
        }
    }

    /// The rows of an output that belong to this part.
    pub fn data_of<'a>(&self, output: &'a Output) -> &'a [u8] {
        &(*output.data).as_ref()[self.rows.start * output.row_bytes..self.rows.end * output.row_bytes]
    }
}

fn put_tensor(out: &mut BytesMut, field: u32, output: &Output, rows: u64, data: &[u8]) {
    let name = output.name.as_bytes();
    let axes: usize = varint_size(rows) + output.tail.iter().map(|axis| varint_size(*axis)).sum::<usize>();
    let bytes_field = |size: usize| 1 + varint_size(size as u64) + size;
    let some = |size: usize| if size == 0 { 0 } else { bytes_field(size) };
    put_header(out, field, some(name.len()) + 2 + bytes_field(axes) + some(data.len()));
    if !name.is_empty() {
        put_bytes(out, 1, name);
    }
    put_number(out, 2, u64::from(output.dtype));
    put_header(out, 3, axes);
    put_varint(out, rows);
    for axis in &output.tail {
        put_varint(out, *axis);
    }
    if !data.is_empty() {
        put_bytes(out, 4, data);
    }
}

/// The range of ascending members, if it has no gaps.
fn run_of(members: &[u32]) -> Option<Range<u32>> {
    let run = *members.first()?..*members.last()? + 1;
    (run.len() == members.len()).then_some(run)
}

/// The one number that may stand for all, if they are equal and the entry accepts it.
fn common(entry: &Entry, numbers: &[u64]) -> Option<u64> {
    let first = *numbers.first()?;
    (entry.is_short && numbers.iter().all(|number| *number == first)).then_some(first)
}

fn put_indexes(out: &mut BytesMut, field: u32, indexes: &[u32]) {
    put_header(out, field, indexes.iter().map(|index| varint_size(u64::from(*index))).sum());
    for index in indexes {
        put_varint(out, u64::from(*index));
    }
}

/// Write the size of the message into its prefix.
pub fn with_prefix(mut out: BytesMut) -> Bytes {
    let size = out.len() - 5;
    let mut prefix = &mut out[..5];
    prefix.put_u8(0);
    prefix.put_u32(size as u32);
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::protobuf::{Fields, Value};
    use crate::steps::call::Call;
    use crate::steps::columns::{Arrival, Arrivals};
    use crate::steps::parse::{Step, Tensor};
    use std::sync::Arc;

    /// A batch of two frames with 3 and 2 sessions, and a call whose session has two rows.
    fn batch() -> (Batch, Vec<Arc<Call>>) {
        let mut arrivals = Arrivals::default();
        let calls: Vec<Arc<Call>> = (0..3).map(|_| Arc::new(Call::for_test())).collect();
        let frames: [(&[&str], Vec<u32>, Option<u64>); 3] = [
            (&["a", "b", "c"], vec![1, 1, 1], Some(7)),
            (&["d", "e"], vec![1, 1], Some(8)),
            (&["f"], vec![2], None),
        ];
        for (call, (ids, sizes, frame_id)) in calls.iter().zip(frames) {
            let rows = sizes.iter().sum::<u32>() as usize;
            let data = vec![0u8; rows];
            let step = Step {
                session_ids: ids.to_vec(),
                tensors: vec![Tensor { name: "x", dtype: 9, shape: vec![rows], data: &data }],
                sizes,
                ..Step::default()
            };
            arrivals.push_step(call.clone(), frame_id, &step, f64::INFINITY, 10);
        }
        let mut taken = arrivals.take(usize::MAX).0;
        assert_eq!(taken.len(), 1);
        match taken.pop() {
            Some(Arrival::Batch(batch)) => (*batch, calls),
            _ => unreachable!("one batch was taken"),
        }
    }

    fn applied(members: Option<Vec<u32>>, revisions: Vec<u64>, rows: Vec<u8>) -> Answer {
        let outputs =
            vec![Output { name: "y".to_owned(), dtype: 9, tail: vec![], row_bytes: 1, data: Box::new(rows) }];
        Answer::Applied {
            members,
            positions: revisions.clone(),
            revisions,
            outputs,
            replayed: false,
            model_version: 0,
        }
    }

    /// The fields of a call's replies: number, and value or bytes.
    fn replies(call: &Call) -> Vec<Vec<(u32, Vec<u8>)>> {
        let replies: Vec<_> = call.state().replies.drain(..).collect();
        replies
            .iter()
            .map(|(framed, _)| {
                assert_eq!(u32::from_be_bytes(framed[1..5].try_into().unwrap()) as usize, framed.len() - 5);
                let mut fields = Fields::new(&framed[5..]);
                let mut found = Vec::new();
                while let Some((number, value)) = fields.next().unwrap() {
                    found.push((
                        number,
                        match value {
                            Value::Bytes(bytes) => bytes.to_vec(),
                            Value::Varint(value) | Value::Fixed64(value) => vec![value as u8],
                        },
                    ));
                }
                found
            })
            .collect()
    }

    fn tensor_of(rows: &[u8]) -> Vec<u8> {
        let mut tensor = vec![0x0a, 1, b'y', 0x10, 9, 0x1a, 1, rows.len() as u8, 0x22, rows.len() as u8];
        tensor.extend_from_slice(rows);
        tensor
    }

    #[test]
    fn each_message_is_answered_with_its_own_rows() {
        let (batch, calls) = batch();
        deliver(&StepReplies, &batch, &applied(None, (1..=6).collect(), (10..17).collect()));
        let whole = |id, revisions: &[u8], rows: &[u8]| {
            vec![vec![
                (1, vec![id]),
                (3, vec![1]),
                (4, revisions.to_vec()),
                (5, revisions.to_vec()),
                (6, tensor_of(rows)),
                (9, vec![1]),
            ]]
        };
        assert_eq!(replies(&calls[0]), whole(7, &[1, 2, 3], &[10, 11, 12]));
        assert_eq!(replies(&calls[1]), whole(8, &[4, 5], &[13, 14]));
        assert_eq!(replies(&calls[2]), [vec![(1, tensor_of(&[15, 16])), (2, vec![6]), (3, vec![6])]]);
        assert_eq!(calls[2].state().end, Some(Status::ok()));
    }

    #[test]
    fn a_frame_is_answered_in_parts() {
        let (batch, calls) = batch();
        deliver(&StepReplies, &batch, &applied(Some(vec![1, 4, 5]), vec![1, 2, 3], vec![20, 21, 22, 23]));
        let part = |id, index, revision, row: u8, last: bool| {
            let mut fields = vec![
                (1, vec![id]),
                (2, vec![index]),
                (4, vec![revision]),
                (5, vec![revision]),
                (6, tensor_of(&[row])),
            ];
            fields.extend(last.then_some((9, vec![1])));
            fields
        };
        assert_eq!(replies(&calls[0]), [part(7, 1, 1, 20, false)]);
        assert_eq!(replies(&calls[1]), [part(8, 1, 2, 21, false)]);
        assert_eq!(replies(&calls[2]), [vec![(1, tensor_of(&[22, 23])), (2, vec![3]), (3, vec![3])]]);
        let failed = Answer::Failed {
            members: Some(vec![0, 2, 3]),
            status: Status::new(5, "gone"),
            error: Bytes::from_static(b"e"),
        };
        deliver(&StepReplies, &batch, &failed);
        assert_eq!(
            replies(&calls[0]),
            [vec![(1, vec![7]), (8, vec![0x0a, 2, 0, 2, 0x12, 1, b'e']), (9, vec![1])]]
        );
        assert_eq!(
            replies(&calls[1]),
            [vec![(1, vec![8]), (8, vec![0x0a, 1, 0, 0x12, 1, b'e']), (9, vec![1])]]
        );
    }

    #[test]
    fn answers_have_the_model_version() {
        let (batch, calls) = batch();
        let answers = [(vec![0, 1], 2), (vec![2, 3, 4, 5], 9)];
        for (members, number) in answers {
            let (revisions, rows) = (vec![1; members.len()], vec![0; members.len() + 1]);
            let mut answer = applied(Some(members), revisions, rows);
            let Answer::Applied { model_version, .. } = &mut answer else { unreachable!() };
            *model_version = number;
            deliver(&StepReplies, &batch, &answer);
        }
        let versions = |call, field| -> Vec<_> {
            let of_reply = |fields: Vec<(u32, Vec<u8>)>| {
                fields.into_iter().find(|(number, _)| *number == field).map(|(_, value)| value[0])
            };
            replies(call).into_iter().map(of_reply).collect()
        };
        assert_eq!(versions(&calls[0], 16), [Some(2), Some(9)]);
        assert_eq!(versions(&calls[1], 16), [Some(9)]);
        assert_eq!(versions(&calls[2], 6), [Some(9)]);
    }

    #[test]
    fn short_frames_are_answered_with_one_number_and_ranges_of_members() {
        let call = Arc::new(Call::for_test());
        let batch = || {
            let mut arrivals = Arrivals::default();
            let step = Step {
                session_ids: vec!["a", "b", "c", "d"],
                is_short: true,
                tensors: vec![Tensor { name: "x", dtype: 9, shape: vec![4], data: &[0; 4] }],
                sizes: vec![1; 4],
                ..Step::default()
            };
            arrivals.push_step(call.clone(), Some(7), &step, f64::INFINITY, 10);
            match arrivals.take(usize::MAX).0.pop() {
                Some(Arrival::Batch(batch)) => batch,
                _ => unreachable!("a batch was taken"),
            }
        };
        let answered = |members: Option<Vec<u32>>, revisions: Vec<u64>, positions: Vec<u64>| {
            let outputs = Vec::new();
            deliver(
                &StepReplies,
                &batch(),
                &Answer::Applied {
                    members,
                    revisions,
                    positions,
                    outputs,
                    replayed: false,
                    model_version: 0,
                },
            );
            replies(&call).pop().unwrap()
        };
        let last = (9, vec![1]);
        assert_eq!(
            answered(None, vec![3; 4], vec![0; 4]),
            [(1, vec![7]), (3, vec![1]), last.clone(), (11, vec![3]), (12, vec![0])]
        );
        assert_eq!(
            answered(None, vec![3, 3, 4, 3], vec![5; 4]),
            [(1, vec![7]), (3, vec![1]), (4, vec![3, 3, 4, 3]), last, (12, vec![5])]
        );
        assert_eq!(
            answered(Some(vec![1, 2]), vec![3; 2], vec![5, 6]),
            [(1, vec![7]), (5, vec![5, 6]), (11, vec![3]), (14, vec![1]), (15, vec![2])]
        );
        assert_eq!(
            answered(Some(vec![0, 2, 3]), vec![3; 3], vec![5; 3]),
            [(1, vec![7]), (2, vec![0, 2, 3]), (11, vec![3]), (12, vec![5])]
        );
    }

    #[test]
    fn a_failed_call_ends_with_the_status() {
        let (batch, calls) = batch();
        let status = Status::new(5, "gone");
        deliver(
            &StepReplies,
            &batch,
            &Answer::Failed { members: Some(vec![5]), status: status.clone(), error: Bytes::new() },
        );
        assert_eq!(calls[2].state().end, Some(status));
        assert!(replies(&calls[2]).is_empty());
    }
}
