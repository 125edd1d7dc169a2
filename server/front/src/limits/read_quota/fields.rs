//! Counts the fields of a header block before h2 decodes it, since one byte can stand for a field of 4 KiB. Also counts
//! the memory of h2's table of fields.

use std::collections::VecDeque;

/// Walks header blocks (RFC 7541, section 6) in pieces of any size. It decodes no text.
///
/// The count of a malformed block may be wrong: h2 closes the connection for it.
#[derive(Debug, Default)]
pub struct Fields {
    part: Part,
    /// Bytes before the next part: a string, or padding and priority before the block.
    skip: usize,
    /// Strings of the field that are still missing.
    strings: u8,
    /// Whether the field is added to the table.
    is_inserted: bool,
    /// Fields of the block so far.
    count: usize,
    /// Bytes of the block's frames, and how many of them are already counted for table entries.
    size: usize,
    kept: usize,
    table: Table,
}

#[derive(Clone, Copy, Debug, Default)]
enum Part {
    #[default]
    Field,
    /// Further bytes of the index of a field or name.
    Index {
        index: usize,
        shift: u32,
    },
    /// The size of a string, and further bytes of one.
    Size,
    MoreSize {
        size: usize,
        shift: u32,
        is_huffman: bool,
    },
    /// The first byte of a name that is added to the table.
    Name {
        size: usize,
        is_huffman: bool,
    },
}

const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// Index of a request's last pseudo-header in the static table, and the last index of that table.
const LAST_PSEUDO: usize = 7;
const LAST_STATIC: usize = 61;
/// Limit of entries in a table of 4 KiB, in which each takes at least 33 bytes.
const TABLE_ENTRIES: u64 = 128;
/// Size of the buffer that h2 allocates to read the next frame.
const READ_BUFFER_BYTES: usize = 8 << 10;

/// h2 copies the fields in its table, except the values of pseudo-headers: such an entry keeps the whole buffer that it
/// was read into.
#[derive(Debug, Default)]
struct Table {
    /// Number of insertions so far.
    inserted: u64,
    /// Pseudo-headers that may still be in the table: their insertion numbers and the bytes that they keep.
    pseudo: VecDeque<(u64, usize)>,
    bytes: usize,
}

impl Table {
    fn insert(&mut self, is_pseudo: bool, bytes: usize) {
        self.inserted += 1;
        while let Some(&(number, old)) = self.pseudo.front() {
            if number + TABLE_ENTRIES > self.inserted {
                break;
            }
            self.pseudo.pop_front();
            self.bytes -= old;
        }
        if is_pseudo {
            self.pseudo.push_back((self.inserted, bytes));
            self.bytes += bytes;
        }
    }

    /// Whether the name at this index is a pseudo-header's.
    fn is_pseudo(&self, index: usize) -> bool {
        if index <= LAST_STATIC {
            return index <= LAST_PSEUDO;
        }
        let number = self.inserted.checked_sub((index - LAST_STATIC - 1) as u64);
        number.is_some_and(|number| self.pseudo.binary_search_by_key(&number, |entry| entry.0).is_ok())
    }
}

impl Fields {
    /// Begin a block; `flags` are those of its first frame.
    pub fn begin(&mut self, flags: u8) {
        let padding = usize::from(flags & PADDED != 0);
        let priority = if flags & PRIORITY == 0 { 0 } else { 5 };
        let table = std::mem::take(&mut self.table);
        *self = Fields { skip: padding + priority, table, ..Fields::default() };
    }

    /// Count a frame of the block.
    pub fn add_frame(&mut self, size: usize) {
        self.size += size;
    }

    /// Fields of the block so far.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Upper bound of the bytes that entries of h2's table keep.
    pub fn table_bytes(&self) -> usize {
        self.table.bytes
    }

    /// Read more of the block. Trailing padding counts as fields, at most one per three bytes.
    pub fn push(&mut self, mut bytes: &[u8]) {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let Some((&byte, rest)) = bytes.split_first() else { return };
            bytes = rest;
            let (low, is_last) = (usize::from(byte & 0x7f), byte < 0x80);
            match self.part {
                Part::Field => self.field(byte),
                Part::Index { index, shift } => {
                    let index = index + (low << shift.min(28));
                    if is_last {
                        self.indexed(index);
                    } else {
                        self.part = Part::Index { index, shift: shift + 7 };
                    }
                }
                Part::Size if low == 0x7f => {
                    self.part = Part::MoreSize { size: low, shift: 0, is_huffman: !is_last };
                }
                Part::Size => self.string(low, !is_last),
                Part::MoreSize { size, shift, is_huffman } => {
                    let size = size + (low << shift.min(28));
                    if is_last {
                        self.string(size, is_huffman);
                    } else {
                        self.part = Part::MoreSize { size, shift: shift + 7, is_huffman };
                    }
                }
                Part::Name { size, is_huffman } => {
                    // a colon; its Huffman code has seven bits
                    self.insert(if is_huffman { byte >> 1 == 0x5c } else { byte == b':' });
                    self.skip = size - 1;
                    self.part = Part::Size;
                }
            }
        }
    }

    fn field(&mut self, byte: u8) {
        self.count += 1;
        let (mask, has_strings) = match byte {
            0x80.. => (0x7f, false),
            0x40.. => (0x3f, true),
            0x20.. => (0x1f, false), // a table size update
            _ => (0x0f, true),
        };
        self.is_inserted = mask == 0x3f;
        let index = byte & mask;
        self.strings = if has_strings { 1 + u8::from(index == 0) } else { 0 };
        if index == mask {
            self.part = Part::Index { index: usize::from(index), shift: 0 };
        } else {
            self.indexed(usize::from(index));
        }
    }

    /// Handle the index of the field or of its name. 0: the name follows as a string.
    fn indexed(&mut self, index: usize) {
        if self.is_inserted && index > 0 {
            self.insert(self.table.is_pseudo(index));
        }
        self.part = self.next();
    }

    fn insert(&mut self, is_pseudo: bool) {
        // entries of a block share its buffers; the buffer of headers in several frames grows by doubling
        let bytes = if is_pseudo { READ_BUFFER_BYTES + 2 * self.size - self.kept } else { 0 };
        self.kept += bytes;
        self.table.insert(is_pseudo, bytes);
    }

    fn string(&mut self, size: usize, is_huffman: bool) {
        let is_name = self.strings == 2;
        self.strings = self.strings.saturating_sub(1);
        if is_name && self.is_inserted && size > 0 {
            self.part = Part::Name { size, is_huffman };
        } else {
            self.skip = size;
            self.part = self.next();
        }
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

    /// A literal field with a name and a value of these sizes; `first` sets its kind.
    fn literal(first: u8, name: usize, value: usize) -> Vec<u8> {
        let mut block = vec![first];
        for size in [name, value] {
            if size < 127 {
                block.push(size as u8);
            } else {
                block.extend([127, ((size - 127) % 128) as u8 | 128, ((size - 127) / 128) as u8]);
            }
            block.extend(vec![0xbe; size]); // parsed as fields, each of these bytes would count
        }
        block
    }

    proptest! {
        #[test]
        fn fields_are_counted_in_pieces_of_any_size(
            sizes in prop::collection::vec((0usize..300, 0usize..9000, 0usize..3), 0..20),
            indexed in 0usize..50,
            piece in 1usize..100,
        ) {
            let mut block: Vec<u8> =
                sizes.iter().flat_map(|(name, value, kind)| literal([0x40, 0x00, 0x10][*kind], *name, *value)).collect();
            (0..indexed).for_each(|_| block.push(0xbe));
            block.extend([0xff, 0x80, 0x00]); // an index of three bytes
            block.extend([0x3f, 0xe1, 0x1f]); // a table size update
            block.extend([0x41, 0x01, b'v', 0x0f, 0x10, 0x01, b'v']); // names by index
            let mut fields = Fields::default();
            for (flags, before) in [(0, 0), (PADDED, 1), (PRIORITY, 5), (PADDED | PRIORITY, 6)] {
                fields.begin(flags);
                fields.push(&vec![0xbe; before]);
                block.chunks(piece).for_each(|part| fields.push(part));
                prop_assert_eq!(fields.count(), sizes.len() + indexed + 4);
            }
        }

        #[test]
        fn pseudo_headers_in_the_table_are_counted_in_pieces_of_any_size(
            kinds in prop::collection::vec(0usize..8, 0..100),
            piece in 1usize..20,
        ) {
            // blocks and whether they add a pseudo-header: static names, literal names, plain and Huffman-coded
            let cases: [(&[u8], bool); 8] = [
                (b"\x44\x01/", true),
                (b"\x41\x01a", true),
                (b"\x40\x05:path\x01/", true),
                (b"\x40\x84\xb9\x58\x4d\xff\x01/", true),
                (b"\x50\x01a", false),
                (b"\x40\x01a\x01:", false),
                (b"\x40\x81\x1f\x01:", false),
                (b"\x04\x01/", false), // not added to the table
            ];
            let block: Vec<u8> = kinds.iter().flat_map(|kind| cases[*kind].0).copied().collect();
            let mut fields = Fields::default();
            fields.begin(0);
            block.chunks(piece).for_each(|part| fields.push(part));
            let count = kinds.iter().filter(|kind| cases[**kind].1).count();
            let bytes = count.min(1) * READ_BUFFER_BYTES; // they share it
            let found = (fields.count(), fields.table.pseudo.len(), fields.table_bytes());
            prop_assert_eq!(found, (kinds.len(), count, bytes));
        }

        #[test]
        fn any_bytes_are_read_to_the_end(bytes: Vec<u8>) {
            let mut fields = Fields::default();
            fields.push(&bytes);
            prop_assert!(fields.count() <= bytes.len());
        }
    }

    #[test]
    fn an_entry_keeps_the_frames_of_its_block_until_it_is_evicted() {
        let mut fields = Fields::default();
        let mut push = |block: &[u8], size| {
            fields.begin(0);
            fields.add_frame(size);
            fields.push(block);
            fields.table_bytes()
        };
        let one = READ_BUFFER_BYTES + 2 * 1000;
        assert_eq!(push(b"\x44\x01/", 1000), one);
        assert_eq!(push(b"\x40\x01a\x01b", 1000), one);
        assert_eq!(push(b"\x7e\x01b", 1000), one, "the name of the newest entry");
        assert_eq!(push(b"\x7f\x01\x01/", 1000), 2 * one, "the name of the oldest entry");
        let others: Vec<u8> = b"\x40\x01a\x01b".repeat(TABLE_ENTRIES as usize - 4);
        assert_eq!(push(&others, 1000), 2 * one);
        assert_eq!(push(b"\x40\x01a\x01b", 1000), one);
        assert_eq!(push(&others, 1000), 0);
    }
}
