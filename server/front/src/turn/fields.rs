//! How many fields a block of headers has, counted before h2 decodes it: one byte may stand for a field of 4 KiB.

/// Walks blocks of headers (RFC 7541, 6) in whatever pieces they come. It decodes no text.
///
/// Where a block is malformed the count may be wrong: h2 ends the connection for it.
#[derive(Debug, Default)]
pub struct Fields {
    part: Part,
    /// Bytes before the next part: a string, or what stands before the block.
    skip: usize,
    /// Strings of the field that are still to come.
    strings: u8,
    /// Of the block so far.
    count: usize,
}

#[derive(Clone, Copy, Debug, Default)]
enum Part {
    #[default]
    Field,
    /// More bytes of a number that nothing depends on.
    Index,
    /// The size of a string, and more bytes of one.
    Size,
    MoreSize {
        size: usize,
        shift: u32,
    },
}

const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

impl Fields {
    /// A frame begins a block; `flags` are its own.
    pub fn begin(&mut self, flags: u8) {
        let padding = usize::from(flags & PADDED != 0);
        let priority = if flags & PRIORITY == 0 { 0 } else { 5 };
        *self = Fields { skip: padding + priority, ..Fields::default() };
    }

    /// Fields of the block so far.
    pub fn count(&self) -> usize {
        self.count
    }

    /// More of the block. Padding behind it counts as fields, a third of its bytes at most.
    pub fn push(&mut self, mut bytes: &[u8]) {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let Some((&byte, rest)) = bytes.split_first() else { return };
            bytes = rest;
            match self.part {
                Part::Field => self.field(byte),
                Part::Index if byte < 0x80 => self.part = self.next(),
                Part::Index => {}
                Part::Size if byte & 0x7f == 0x7f => self.part = Part::MoreSize { size: 0x7f, shift: 0 },
                Part::Size => self.string(usize::from(byte & 0x7f)),
                Part::MoreSize { size, shift } => {
                    let size = size + (usize::from(byte & 0x7f) << shift.min(28));
                    if byte < 0x80 {
                        self.string(size);
                    } else {
                        self.part = Part::MoreSize { size, shift: shift + 7 };
                    }
                }
            }
        }
    }

    fn field(&mut self, byte: u8) {
        self.count += 1;
        let (mask, has_strings) = match byte {
            0x80.. => (0x7f, false),
            0x40.. => (0x3f, true),
            0x20.. => (0x1f, false), // a new size of the table
            _ => (0x0f, true),
        };
        let index = byte & mask;
        self.strings = if has_strings { 1 + u8::from(index == 0) } else { 0 };
        self.part = if index == mask { Part::Index } else { self.next() };
    }

    fn string(&mut self, size: usize) {
        self.skip = size;
        self.strings = self.strings.saturating_sub(1);
        self.part = self.next();
    }

    fn next(&self) -> Part {
        if self.strings == 0 {
            Part::Field
        } else {
            Part::Size
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A literal field with a name and a value of these sizes; `first` says what becomes of it.
    fn literal(first: u8, name: usize, value: usize) -> Vec<u8> {
        let mut block = vec![first];
        for size in [name, value] {
            if size < 127 {
                block.push(size as u8);
            } else {
                block.extend([127, ((size - 127) % 128) as u8 | 128, ((size - 127) / 128) as u8]);
            }
            block.extend(vec![0xbe; size]); // as bytes of their own they would be fields
        }
        block
    }

    proptest! {
        #[test]
        fn fields_are_counted_in_whatever_pieces(
            sizes in prop::collection::vec((0usize..300, 0usize..9000, 0usize..3), 0..20),
            indexed in 0usize..50,
            piece in 1usize..100,
        ) {
            let mut block: Vec<u8> =
                sizes.iter().flat_map(|(name, value, kind)| literal([0x40, 0x00, 0x10][*kind], *name, *value)).collect();
            (0..indexed).for_each(|_| block.push(0xbe));
            block.extend([0xff, 0x80, 0x00]); // an index of three bytes
            block.extend([0x3f, 0xe1, 0x1f]); // a size of the table
            block.extend([0x41, 0x01, b'v', 0x0f, 0x10, 0x01, b'v']); // names by their index
            let mut fields = Fields::default();
            for (flags, before) in [(0, 0), (PADDED, 1), (PRIORITY, 5), (PADDED | PRIORITY, 6)] {
                fields.begin(flags);
                fields.push(&vec![0xbe; before]);
                block.chunks(piece).for_each(|part| fields.push(part));
                prop_assert_eq!(fields.count(), sizes.len() + indexed + 4);
            }
        }

        #[test]
        fn any_bytes_end(bytes: Vec<u8>) {
            let mut fields = Fields::default();
            fields.push(&bytes);
            prop_assert!(fields.count() <= bytes.len());
        }
    }
}
