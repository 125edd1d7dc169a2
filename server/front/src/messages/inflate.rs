//! Inflates compressed messages in short slices, so that the front's thread serves other calls in between.
//!
//! A message is one gzip member or one zlib stream, with nothing after it. Its size limit suits tensors.

use crate::messages::grpc::Encoding;
use bytes::Bytes;
use flate2::{Crc, Decompress, FlushDecompress, Status as Flate};
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::MutexGuard;
use tokio::time::sleep;

/// Limit of a small compressed message once inflated, and limit of the compression ratio of a larger one.
pub const MIN_INFLATED_BYTES: usize = 4 << 20;
pub const MAX_RATIO: usize = 8;
/// Limits of one piece. Input has one too, because input without output also takes time.
const PIECE_INPUT_BYTES: usize = 4 << 10;
const PIECE_OUTPUT_BYTES: usize = 64 << 10;
/// Duration of a slice, which inflates pieces one after the other.
const SLICE: Duration = Duration::from_micros(200);
const TRAILER_BYTES: usize = 8;
/// Limit of the name and of the comment in a gzip header.
const MAX_FIELD_BYTES: usize = 64 << 10;

/// Why a compressed message is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// It exceeds the message limit: it had this many bytes when inflating stopped.
    TooLarge(usize),
    /// It exceeds this limit for compressed messages of its size.
    Inflates(usize),
    CutOff,
    Trailing,
    Checksum,
    Malformed,
}

impl fmt::Display for Problem {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rule = "a compressed message must be one gzip or zlib stream";
        match self {
            Problem::TooLarge(size) => write!(out, "the message inflates to more than {size} bytes"),
            Problem::Inflates(limit) => write!(
                out,
                "a compressed message must inflate to at most {} bytes, or {MAX_RATIO} times its size; this one, to \
                 more than {limit}. Send it uncompressed",
                MIN_INFLATED_BYTES
            ),
            Problem::CutOff => write!(out, "{rule}; this one is cut off"),
            Problem::Trailing => write!(out, "{rule}; bytes stand behind this one"),
            Problem::Checksum => write!(out, "{rule}; the checksum of this one is wrong"),
            Problem::Malformed => write!(out, "{rule}; this one is malformed"),
        }
    }
}

/// A message that is being inflated.
pub struct Inflation {
    input: Bytes,
    /// Inflated bytes of the input.
    at: usize,
    /// Upper bound of the end of the deflated bytes.
    end: usize,
    output: Vec<u8>,
    limit: usize,
    is_over_message_limit: bool,
    decoder: Decompress,
    /// Checksum of the output, for gzip.
    crc: Option<Crc>,
}

impl Inflation {
    /// `message_limit`: limit of every message, in bytes.
    pub fn new(input: Bytes, encoding: Encoding, message_limit: usize) -> Result<Self, Problem> {
        let own = MIN_INFLATED_BYTES.max(input.len().saturating_mul(MAX_RATIO));
        let is_gzip = encoding == Encoding::Gzip;
        let (at, end) = if is_gzip {
            (gzip_header(&input)?, input.len().checked_sub(TRAILER_BYTES).ok_or(Problem::CutOff)?)
        } else {
            (0, input.len())
        };
        Ok(Inflation {
            at,
            end: end.max(at),
            input,
            output: Vec::new(),
            limit: own.min(message_limit),
            is_over_message_limit: own >= message_limit,
            decoder: Decompress::new(!is_gzip),
            crc: is_gzip.then(Crc::new),
        })
    }

    /// Bytes in memory.
    pub fn size(&self) -> usize {
        self.input.len() + self.output.capacity()
    }

    /// Inflate for a short time. Returns the message if it is complete.
    pub fn slice(&mut self) -> Result<Option<Bytes>, Problem> {
        let began = Instant::now();
        loop {
            if let Some(message) = self.piece()? {
                return Ok(Some(message));
            }
            if began.elapsed() >= SLICE {
                return Ok(None);
            }
        }
    }

    /// Inflate one piece. Returns the message if it is complete.
    pub fn piece(&mut self) -> Result<Option<Bytes>, Problem> {
        let old = self.output.len();
        let room = PIECE_OUTPUT_BYTES.min(self.limit + 1 - old);
        if self.output.capacity() < old + room {
            let wanted = (2 * old).max(PIECE_OUTPUT_BYTES).min(self.limit + 1);
            self.output.reserve_exact(wanted.max(old + room) - old);
        }
        self.output.resize(old + room, 0);
        let input = &self.input[self.at..self.end.min(self.at + PIECE_INPUT_BYTES)];
        let (read, written) = (self.decoder.total_in(), self.decoder.total_out());
        let found = self.decoder.decompress(input, &mut self.output[old..], FlushDecompress::None);
        let read = (self.decoder.total_in() - read) as usize;
        let written = (self.decoder.total_out() - written) as usize;
        self.output.truncate(old + written);
        self.at += read;
        if let Some(crc) = &mut self.crc {
            crc.update(&self.output[old..]);
        }
        let status = found.map_err(|_| Problem::Malformed)?;
        if self.output.len() > self.limit {
            let size = self.output.len();
            return Err(if self.is_over_message_limit {
                Problem::TooLarge(size)
            } else {
                Problem::Inflates(self.limit)
            });
        }
        match status {
            Flate::StreamEnd => self.end().map(Some),
            // no progress, although there is room for output
            _ if read == 0 && written == 0 => Err(Problem::CutOff),
            _ => Ok(None),
        }
    }

    fn end(&mut self) -> Result<Bytes, Problem> {
        if self.at != self.end {
            return Err(Problem::Trailing);
        }
        if let Some(crc) = &self.crc {
            let trailer = &self.input[self.end..];
            let number = |at: usize| trailer.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
            if trailer.len() != TRAILER_BYTES {
                return Err(Problem::CutOff);
            }
            if number(0) != Some(crc.sum()) || number(4) != Some(crc.amount()) {
                return Err(Problem::Checksum);
            }
        }
        self.output.shrink_to_fit();
        Ok(std::mem::take(&mut self.output).into())
    }
}

/// Length of a gzip member's header.
fn gzip_header(input: &[u8]) -> Result<usize, Problem> {
    const FIXED_BYTES: usize = 10;
    const CHECKSUM: u8 = 2;
    const EXTRA: u8 = 4;
    const NAME: u8 = 8;
    const COMMENT: u8 = 16;
    const RESERVED: u8 = 0xe0;
    if input.len() < FIXED_BYTES {
        return Err(Problem::CutOff);
    }
    let flags = input[3];
    if input[..3] != [0x1f, 0x8b, 8] || flags & RESERVED != 0 {
        return Err(Problem::Malformed);
    }
    let mut at = FIXED_BYTES;
    if flags & EXTRA != 0 {
        let size = input.get(at..at + 2).ok_or(Problem::CutOff)?;
        at += 2 + usize::from(u16::from_le_bytes([size[0], size[1]]));
    }
    for field in [NAME, COMMENT] {
        if flags & field != 0 {
            let rest = input.get(at..).ok_or(Problem::CutOff)?;
            let found = rest.iter().take(MAX_FIELD_BYTES).position(|byte| *byte == 0);
            at += found.ok_or(Problem::Malformed)? + 1;
        }
    }
    if flags & CHECKSUM != 0 {
        let mut crc = Crc::new();
        crc.update(input.get(..at).ok_or(Problem::CutOff)?);
        let given = input.get(at..at + 2).ok_or(Problem::CutOff)?;
        if given != &crc.sum().to_le_bytes()[..2] {
            return Err(Problem::Checksum);
        }
        at += 2;
    }
    if at > input.len() {
        return Err(Problem::CutOff);
    }
    Ok(at)
}

/// Inflating may use one of this many parts of the wire's time.
const TIME_PARTS: u32 = 3;
/// Limit of the time that inflating can save up.
const MAX_SAVED: Duration = Duration::from_millis(50);
const PAUSE: Duration = Duration::from_millis(1);

/// Schedules slices: one at a time over all connections, in the order of requests, with a run of the other tasks between
/// them, within a fraction of the wire's time.
#[derive(Debug)]
pub struct Pace {
    lane: tokio::sync::Mutex<()>,
    saved: Mutex<Saved>,
}

#[derive(Debug)]
struct Saved {
    /// Time up to which the budget is spent; in the future if it is exceeded.
    spent: Instant,
}

impl Default for Pace {
    fn default() -> Self {
        Pace { lane: tokio::sync::Mutex::default(), saved: Mutex::new(Saved { spent: Instant::now() }) }
    }
}

impl Pace {
    /// Wait for the next slot. It is held until the returned guard is dropped.
    pub async fn slot(&self) -> MutexGuard<'_, ()> {
        let lane = self.lane.lock().await;
        tokio::task::yield_now().await;
        while !self.has_time() {
            sleep(PAUSE).await;
        }
        lane
    }

    /// Whether a slice may run.
    pub fn has_time(&self) -> bool {
        let now = Instant::now();
        let mut saved = self.saved();
        if let Some(earliest) = now.checked_sub(MAX_SAVED * TIME_PARTS) {
            saved.spent = saved.spent.max(earliest);
        }
        saved.spent <= now
    }

    /// Run a slice, and count its time.
    pub fn spending<T>(&self, work: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let found = work();
        self.spend(began.elapsed());
        found
    }

    fn spend(&self, time: Duration) {
        self.saved().spent += time * TIME_PARTS;
    }

    fn saved(&self) -> std::sync::MutexGuard<'_, Saved> {
        self.saved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::write::{GzEncoder, ZlibEncoder};
    use flate2::{Compression, GzBuilder};
    use proptest::prelude::*;
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zlib(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn inflated(input: &[u8], encoding: Encoding, limit: usize) -> Result<Vec<u8>, Problem> {
        let mut inflation = Inflation::new(Bytes::copy_from_slice(input), encoding, limit)?;
        loop {
            if let Some(message) = inflation.slice()? {
                return Ok(message.to_vec());
            }
        }
    }

    const LIMIT: usize = 64 << 20;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn compressed_messages_are_restored(some in prop::collection::vec(0u8..4, 0..1000), times in 1usize..150) {
            let bytes = some.repeat(times);
            prop_assert_eq!(inflated(&gzip(&bytes), Encoding::Gzip, LIMIT), Ok(bytes.clone()));
            prop_assert_eq!(inflated(&zlib(&bytes), Encoding::Deflate, LIMIT), Ok(bytes));
        }

        #[test]
        fn streams_that_are_cut_off_or_too_long_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0usize..400) {
            for (whole, encoding) in [(gzip(&bytes), Encoding::Gzip), (zlib(&bytes), Encoding::Deflate)] {
                let cut = cut % whole.len();
                prop_assert!(inflated(&whole[..cut], encoding, LIMIT).is_err());
                let mut longer = whole.clone();
                longer.push(0);
                prop_assert!(inflated(&longer, encoding, LIMIT).is_err());
            }
        }

        #[test]
        fn any_bytes_are_read_to_the_end(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            for encoding in [Encoding::Gzip, Encoding::Deflate] {
                let _ = inflated(&bytes, encoding, LIMIT);
                let _ = inflated(&[&gzip(b"")[..10], &bytes].concat(), encoding, LIMIT);
            }
        }
    }

    #[test]
    fn only_one_member_is_accepted() {
        let two = [gzip(b"one"), gzip(b"two")].concat();
        assert_eq!(inflated(&two, Encoding::Gzip, LIMIT), Err(Problem::Trailing));
        let empty = gzip(b"").repeat(1000);
        assert_eq!(inflated(&empty, Encoding::Gzip, LIMIT), Err(Problem::Trailing));
        assert_eq!(inflated(&gzip(b""), Encoding::Gzip, LIMIT), Ok(Vec::new()));
    }

    #[test]
    fn checksum_and_size_must_match() {
        let whole = gzip(&[7; 1000]);
        for at in whole.len() - TRAILER_BYTES..whole.len() {
            let mut wrong = whole.clone();
            wrong[at] ^= 1;
            assert_eq!(inflated(&wrong, Encoding::Gzip, LIMIT), Err(Problem::Checksum), "{at}");
        }
        let mut wrong = zlib(&[7; 1000]);
        *wrong.last_mut().unwrap() ^= 1;
        assert!(inflated(&wrong, Encoding::Deflate, LIMIT).is_err());
    }

    #[test]
    fn a_header_may_have_optional_fields() {
        let mut encoder = GzBuilder::new()
            .filename("a name")
            .comment("a comment")
            .extra(b"extra".as_slice())
            .write(Vec::new(), Compression::fast());
        encoder.write_all(b"content").unwrap();
        let whole = encoder.finish().unwrap();
        assert_eq!(inflated(&whole, Encoding::Gzip, LIMIT), Ok(b"content".to_vec()));
        for cut in 0..whole.len() {
            assert!(inflated(&whole[..cut], Encoding::Gzip, LIMIT).is_err());
        }
    }

    #[test]
    fn the_compression_ratio_is_limited() {
        let most = MIN_INFLATED_BYTES;
        assert_eq!(inflated(&gzip(&vec![0; most]), Encoding::Gzip, LIMIT).unwrap().len(), most);
        let found = inflated(&zlib(&vec![0; most + 1]), Encoding::Deflate, LIMIT);
        assert_eq!(found, Err(Problem::Inflates(most)));
        let found = inflated(&gzip(&[0; 1001]), Encoding::Gzip, 1000);
        assert_eq!(found, Err(Problem::TooLarge(1001)));
    }

    #[test]
    fn a_piece_limits_its_input_too() {
        // empty stored blocks: much input, no output
        let mut input = gzip(b"")[..10].to_vec();
        input.extend([0, 0, 0, 0xff, 0xff].repeat(100_000));
        let mut inflation = Inflation::new(input.into(), Encoding::Gzip, LIMIT).unwrap();
        assert_eq!(inflation.piece(), Ok(None));
        assert!(inflation.at <= 10 + PIECE_INPUT_BYTES && inflation.size() < 1 << 20);
    }

    #[test]
    fn time_is_saved_and_spent() {
        let pace = Pace::default();
        assert!(pace.has_time());
        pace.spend(3600 * MAX_SAVED);
        assert!(!pace.has_time());
    }
}
