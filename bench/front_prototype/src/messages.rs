//! Reads the fields of plain steps and writes replies. Malformed messages are `None`.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Cuts the messages of one call out of its data.
#[derive(Default)]
pub struct Messages {
    pub data: BytesMut,
}

impl Iterator for Messages {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let size = u32::from_be_bytes(self.data.get(1..5)?.try_into().ok()?) as usize;
        if self.data.len() < 5 + size {
            return None;
        }
        self.data.advance(5);
        Some(self.data.split_to(size).freeze())
    }
}

/// A field of a message: its number, and its value.
enum Value {
    Number(u64),
    Bytes(Bytes),
    Fixed,
}

/// The session's id and the input's bytes, of a StepRequest or a StepFrame: both have them in fields 1 and 2.
pub fn step(message: Bytes) -> Option<(Bytes, Bytes)> {
    let (mut id, mut input) = (None, None);
    fields(message, |number, value| match (number, value) {
        (1, Value::Bytes(bytes)) => id = Some(bytes),
        (2, Value::Bytes(tensor)) => input = data(tensor),
        _ => (),
    })?;
    Some((id?, input?))
}

/// The id of a frame, and its StepFrame.
pub fn frame(message: Bytes) -> Option<(u64, Bytes)> {
    let (mut id, mut step) = (0, None);
    fields(message, |number, value| match (number, value) {
        (1, Value::Number(number)) => id = number,
        (2, Value::Bytes(bytes)) => step = Some(bytes),
        _ => (),
    })?;
    Some((id, step?))
}

/// The bytes of a Tensor.
fn data(tensor: Bytes) -> Option<Bytes> {
    let mut found = None;
    fields(tensor, |number, value| {
        if let (4, Value::Bytes(bytes)) = (number, value) {
            found = Some(bytes);
        }
    })?;
    found
}

fn fields(mut message: Bytes, mut each: impl FnMut(u64, Value)) -> Option<()> {
    while message.has_remaining() {
        let tag = varint(&mut message)?;
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut message)?),
            2 => {
                let size = usize::try_from(varint(&mut message)?).ok()?;
                (size <= message.len()).then(|| Value::Bytes(message.split_to(size)))?
            }
            kind => {
                let size = if kind == 1 { 8 } else { 4 };
                (matches!(kind, 1 | 5) && size <= message.len()).then(|| message.advance(size))?;
                Value::Fixed
            }
        };
        each(tag >> 3, value);
    }
    Some(())
}

fn varint(message: &mut Bytes) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *message.first()?;
        message.advance(1);
        value |= u64::from(byte & 127) << shift;
        if byte < 128 {
            return Some(value);
        }
    }
    None
}

/// The reply to one step of one row at one time step.
pub struct Reply<'a> {
    pub output: &'a [u8],
    pub revision: u64,
}

impl Reply<'_> {
    /// A StepResponse, as gRPC frames it.
    pub fn of_call(&self) -> Bytes {
        framed(self.output.len(), |to| {
            self.put_output(to, 1);
            for field in [2, 3] {
                to.put_u8(field << 3);
                put_varint(to, self.revision);
            }
        })
    }

    /// A StepStreamResponse, as gRPC frames it: frame_id, all_members, revisions, positions, outputs, last.
    pub fn of_frame(&self, frame_id: u64) -> Bytes {
        framed(self.output.len(), |to| {
            to.put_u8(1 << 3);
            put_varint(to, frame_id);
            to.put_slice(&[3 << 3, 1]);
            let mut revision = BytesMut::with_capacity(10);
            put_varint(&mut revision, self.revision);
            for field in [4, 5] {
                put_bytes(to, field, &revision);
            }
            self.put_output(to, 6);
            to.put_slice(&[9 << 3, 1]);
        })
    }

    fn put_output(&self, to: &mut BytesMut, field: u8) {
        let mut tensor = BytesMut::with_capacity(self.output.len() + 32);
        tensor.put_slice(b"\x0a\x01Y\x10\x01\x1a\x02\x01"); // name "Y", float32, shape (1, ...)
        put_varint(&mut tensor, (self.output.len() / 4) as u64);
        put_bytes(&mut tensor, 4, self.output);
        put_bytes(to, field, &tensor);
    }
}

fn framed(output_size: usize, put: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut message = BytesMut::with_capacity(output_size + 64);
    message.put_slice(&[0; 5]);
    put(&mut message);
    let size = (message.len() - 5) as u32;
    message[1..5].copy_from_slice(&size.to_be_bytes());
    message.freeze()
}

fn put_bytes(to: &mut BytesMut, field: u8, bytes: &[u8]) {
    to.put_u8(field << 3 | 2);
    put_varint(to, bytes.len() as u64);
    to.put_slice(bytes);
}

fn put_varint(to: &mut BytesMut, mut value: u64) {
    while value > 127 {
        to.put_u8(value as u8 | 128);
        value >>= 7;
    }
    to.put_u8(value as u8);
}
