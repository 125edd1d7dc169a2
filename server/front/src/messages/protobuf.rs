//! The part of protobuf's encoding that fast-path messages need: varints and fields.

use bytes::{BufMut, BytesMut};

/// Invalid bytes, or a message that is not on the fast path: Python must handle it.
#[derive(Debug, PartialEq, Eq)]
pub struct SlowPath;

/// The value of a field.
#[derive(Debug, PartialEq, Eq)]
pub enum Value<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
}

/// Reads the fields of a message in order.
pub struct Fields<'a> {
    left: &'a [u8],
}

impl<'a> Fields<'a> {
    pub fn new(message: &'a [u8]) -> Self {
        Fields { left: message }
    }

    /// Returns the number and value of the next field; None at the end.
    ///
    /// Groups and 32-bit fields, which no message here has, are not on the fast path.
    pub fn next(&mut self) -> Result<Option<(u32, Value<'a>)>, SlowPath> {
        if self.left.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).map_err(|_| SlowPath)?;
        if number == 0 {
            return Err(SlowPath);
        }
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => {
                let bytes = self.take(8)?;
                Value::Fixed64(u64::from_le_bytes(bytes.try_into().map_err(|_| SlowPath)?))
            }
            2 => {
                let size = usize::try_from(self.varint()?).map_err(|_| SlowPath)?;
                Value::Bytes(self.take(size)?)
            }
            _ => return Err(SlowPath),
        };
        Ok(Some((number, value)))
    }

    /// Returns the next varint of a packed field; None at the end.
    pub fn packed(&mut self) -> Result<Option<u64>, SlowPath> {
        if self.left.is_empty() {
            return Ok(None);
        }
        self.varint().map(Some)
    }

    fn take(&mut self, size: usize) -> Result<&'a [u8], SlowPath> {
        let (taken, left) = self.left.split_at_checked(size).ok_or(SlowPath)?;
        self.left = left;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, SlowPath> {
        let mut value = 0u64;
        for (index, byte) in self.left.iter().copied().enumerate().take(10) {
            let part = u64::from(byte & 0x7f);
            if index == 9 && part > 1 {
                return Err(SlowPath); // more than 64 bits
            }
            value |= part << (7 * index);
            if byte < 0x80 {
                self.left = &self.left[index + 1..];
                return Ok(value);
            }
        }
        Err(SlowPath)
    }
}

/// Size of a varint in bytes.
pub fn varint_size(value: u64) -> usize {
    (70 - (value | 1).leading_zeros() as usize) / 7
}

pub fn put_varint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

/// Write a varint field, which proto3 omits if it is 0.
pub fn put_number(out: &mut BytesMut, field: u32, value: u64) {
    if value != 0 {
        put_varint(out, u64::from(field << 3));
        put_varint(out, value);
    }
}

/// Write an optional varint field, even if it is 0.
pub fn put_optional(out: &mut BytesMut, field: u32, value: Option<u64>) {
    if let Some(value) = value {
        put_varint(out, u64::from(field << 3));
        put_varint(out, value);
    }
}

/// Write the key and size of a bytes field.
pub fn put_header(out: &mut BytesMut, field: u32, size: usize) {
    put_varint(out, u64::from(field << 3 | 2));
    put_varint(out, size as u64);
}

pub fn put_bytes(out: &mut BytesMut, field: u32, bytes: &[u8]) {
    put_header(out, field, bytes.len());
    out.put_slice(bytes);
}

/// Write a packed field of numbers, which is omitted if it is empty.
pub fn put_packed(out: &mut BytesMut, field: u32, values: &[u64]) {
    if values.is_empty() {
        return;
    }
    put_header(out, field, values.iter().map(|value| varint_size(*value)).sum());
    for value in values {
        put_varint(out, *value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn varints_are_read_as_written(value: u64) {
            let mut out = BytesMut::new();
            put_varint(&mut out, value);
            prop_assert_eq!(out.len(), varint_size(value));
            prop_assert_eq!(Fields::new(&out).packed(), Ok(Some(value)));
        }

        #[test]
        fn fields_are_read_as_written(number in 1u32..1000, value: u64, bytes: Vec<u8>) {
            let mut out = BytesMut::new();
            put_number(&mut out, number, value);
            put_bytes(&mut out, number + 1, &bytes);
            let mut fields = Fields::new(&out);
            if value != 0 {
                prop_assert_eq!(fields.next(), Ok(Some((number, Value::Varint(value)))));
            }
            prop_assert_eq!(fields.next(), Ok(Some((number + 1, Value::Bytes(&bytes[..])))));
            prop_assert_eq!(fields.next(), Ok(None));
        }

        #[test]
        fn any_bytes_are_read_to_the_end(bytes: Vec<u8>) {
            let mut fields = Fields::new(&bytes);
            let mut count = 0;
            while let Ok(Some(_)) = fields.next() {
                count += 1;
            }
            prop_assert!(count <= bytes.len());
        }
    }

    #[test]
    fn truncated_fields_are_slow() {
        let mut out = BytesMut::new();
        put_bytes(&mut out, 1, b"session");
        for size in 1..out.len() {
            assert_eq!(Fields::new(&out[..size]).next(), Err(SlowPath), "{size} bytes");
        }
    }

    #[test]
    fn a_varint_of_more_than_64_bits_is_slow() {
        let bytes = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02];
        assert_eq!(Fields::new(&bytes).packed(), Err(SlowPath));
    }
}
