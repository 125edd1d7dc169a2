//! The records of stepped sessions, as the store keeps them. Their twin in Python is `encode` in `store/record.py`.

/// The schema version of all records: `SCHEMA_VERSION` in Python.
const SCHEMA: u16 = 4;
const HEADER_BYTES: usize = 96;
const CHECKSUM_BYTES: usize = 4;

/// The texts in the records of a model: its fingerprint, then its name.
pub struct Texts {
    pub data: Vec<u8>,
    pub fingerprint_bytes: u8,
}

/// The numbers in a session's record.
#[derive(Clone, Copy, Default)]
pub struct Numbers {
    pub reply: u8,
    pub revision: u64,
    pub position: u64,
    pub request_id: u64,
    pub opened_with: u64,
    pub created: f64,
    pub last_used: f64,
    pub digest: u64,
    pub opened_digest: u64,
    pub max_idle_ms: u64,
}

/// Returns the size of a record with this many bytes of rows and of fields.
pub fn size(texts: &Texts, row_bytes: usize, field_bytes: usize) -> usize {
    HEADER_BYTES + texts.data.len() + row_bytes + field_bytes
}

/// Where the row of a record begins.
pub fn row_at(texts: &Texts) -> usize {
    HEADER_BYTES + texts.data.len()
}

/// Complete a record of a session of one row, which the record has already. Returns the checksum; None: a part of it is
/// too large to be stored.
pub fn complete(
    record: &mut [u8],
    id: &str,
    texts: &Texts,
    numbers: &Numbers,
    fields: &[u8],
) -> Option<[u8; CHECKSUM_BYTES]> {
    let model_bytes = u16::try_from(texts.data.len() - usize::from(texts.fingerprint_bytes)).ok()?;
    let row_bytes = u32::try_from(record.len() - row_at(texts) - fields.len()).ok()?;
    let field_bytes = u16::try_from(fields.len()).ok()?;
    let (head, rest) = record.split_at_mut(HEADER_BYTES);
    let mut at = CHECKSUM_BYTES;
    let mut put = |bytes: &[u8]| {
        head[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&SCHEMA.to_le_bytes());
    put(&[numbers.reply, texts.fingerprint_bytes]);
    for number in [numbers.revision, numbers.position, numbers.request_id, numbers.opened_with] {
        put(&number.to_le_bytes());
    }
    put(&numbers.created.to_le_bytes());
    put(&numbers.last_used.to_le_bytes());
    for number in [numbers.digest, numbers.opened_digest, numbers.max_idle_ms] {
        put(&number.to_le_bytes());
    }
    for number in [1, row_bytes, 0] {
        put(&u32::to_le_bytes(number)); // the batch size, the rows and the extra
    }
    put(&model_bytes.to_le_bytes());
    put(&field_bytes.to_le_bytes());
    debug_assert_eq!(at, HEADER_BYTES);
    rest[..texts.data.len()].copy_from_slice(&texts.data);
    let fields_at = rest.len() - fields.len();
    rest[fields_at..].copy_from_slice(fields);
    let mut checksum = flate2::Crc::new();
    checksum.update(id.as_bytes()); // a record under another id counts as corrupt
    checksum.update(&record[CHECKSUM_BYTES..]);
    let checksum = checksum.sum().to_le_bytes();
    record[..CHECKSUM_BYTES].copy_from_slice(&checksum);
    Some(checksum)
}

/// Append an id as its length in bytes and its text: `encode_ids` in Python. Returns whether it fits.
pub fn push_id(into: &mut Vec<u8>, id: &str) -> bool {
    let Ok(length) = u16::try_from(id.len()) else { return false };
    into.extend_from_slice(&length.to_le_bytes());
    into.extend_from_slice(id.as_bytes());
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts() -> Texts {
        Texts { data: b"fingermodel".to_vec(), fingerprint_bytes: 6 }
    }

    #[test]
    fn a_record_has_header_texts_row_and_fields() {
        let texts = texts();
        let mut record = vec![0; size(&texts, 3, 2)];
        assert_eq!(record.len(), 96 + 11 + 3 + 2);
        let at = row_at(&texts);
        record[at..at + 3].copy_from_slice(b"row");
        let numbers = Numbers { reply: 2, revision: 7, max_idle_ms: 9, ..Numbers::default() };
        let checksum = complete(&mut record, "some id", &texts, &numbers, b"ff").unwrap();
        let mut whole = flate2::Crc::new();
        whole.update(b"some id");
        whole.update(&record[4..]);
        assert_eq!(checksum, whole.sum().to_le_bytes());
        assert_eq!(record[..4], checksum);
        assert_eq!(record[4..16], [4, 0, 2, 6, 7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(record[72..96], [9, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 5, 0, 2, 0]);
        assert_eq!(&record[96..], b"fingermodelrowff");
    }

    #[test]
    fn parts_that_are_too_large_are_refused() {
        let texts = texts();
        let fields = vec![0; 1 << 16];
        let mut record = vec![0; size(&texts, 0, fields.len())];
        assert!(complete(&mut record, "id", &texts, &Numbers::default(), &fields).is_none());
        let mut ids = Vec::new();
        assert!(push_id(&mut ids, "é"));
        assert_eq!(ids, [2, 0, 0xc3, 0xa9]);
        assert!(!push_id(&mut ids, &"x".repeat(1 << 16)));
    }
}
