//! gRPC over HTTP/2 as bytes: message frames, compression, time limits, statuses, metadata.
//! The protocol: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use std::time::Duration;

pub const OK: u32 = 0;
pub const INVALID_ARGUMENT: u32 = 3;
pub const DEADLINE_EXCEEDED: u32 = 4;
pub const UNAVAILABLE: u32 = 14;
pub const UNIMPLEMENTED: u32 = 12;
pub const INTERNAL: u32 = 13;
const PREFIX: usize = 5;
/// Trailer that lets a proxy send the call to another server: see status.py.
const GO_ELSEWHERE: (&str, &str) = ("stepwell-retry", "other-replica");

static STATUS: HeaderName = HeaderName::from_static("grpc-status");
static ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
static TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// How a call ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub code: u32,
    pub message: String,
    /// A serialized google.rpc.Status; empty: none.
    pub details: Bytes,
    /// Whether the call had no effect and another server may serve it. Sent if the call ends without a reply.
    pub may_go_elsewhere: bool,
}

impl Status {
    pub fn ok() -> Self {
        Status::new(OK, "")
    }

    pub fn new(code: u32, message: &str) -> Self {
        Status { code, message: message.to_owned(), details: Bytes::new(), may_go_elsewhere: false }
    }

    /// Whether a stream ends at once with this status. Otherwise it ends when its frames are answered.
    pub fn is_at_once(&self) -> bool {
        !matches!(self.code, OK | UNAVAILABLE)
    }

    /// Returns the trailers of this status.
    pub fn trailers(&self) -> HeaderMap {
        let mut trailers = HeaderMap::with_capacity(3);
        let code = if self.code == OK { HeaderValue::from_static("0") } else { HeaderValue::from(self.code) };
        trailers.insert(STATUS.clone(), code);
        if !self.message.is_empty() {
            if let Ok(value) = HeaderValue::from_bytes(&percent_encoded(&self.message)) {
                trailers.insert("grpc-message", value);
            }
        }
        if !self.details.is_empty() {
            if let Ok(value) = HeaderValue::from_bytes(&base64(&self.details)) {
                trailers.insert("grpc-status-details-bin", value);
            }
        }
        trailers
    }
}

/// Why a message cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// The message exceeds the size limit.
    TooLarge(usize),
    /// The encoding was not announced or is unknown.
    Encoding,
    /// The data is not gRPC.
    Malformed,
}

/// How messages may be compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Identity,
    Gzip,
    Deflate,
}

impl Encoding {
    /// The encoding in `grpc-encoding`; None: unknown.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        match headers.get(&ENCODING).map(HeaderValue::as_bytes) {
            None | Some(b"identity") => Some(Encoding::Identity),
            Some(b"gzip") => Some(Encoding::Gzip),
            Some(b"deflate") => Some(Encoding::Deflate),
            Some(_) => None,
        }
    }
}

/// Assembles the data of a call into messages.
pub struct Messages {
    buffer: BytesMut,
    encoding: Encoding,
    limit: usize,
}

impl Messages {
    pub fn new(encoding: Encoding, limit: usize) -> Self {
        Messages { buffer: BytesMut::new(), encoding, limit }
    }

    pub fn push(&mut self, data: Bytes) {
        if self.buffer.is_empty() {
            // most messages arrive in one piece, which need not be copied
            self.buffer = BytesMut::from(data);
        } else {
            self.buffer.extend_from_slice(&data);
        }
        if let Some(&[_, a, b, c, d]) = self.buffer.first_chunk() {
            let size = PREFIX + u32::from_be_bytes([a, b, c, d]) as usize;
            if (self.buffer.len() + 1..=PREFIX + self.limit).contains(&size) {
                self.buffer.reserve(size - self.buffer.len());
            }
        }
        self.drop_too_large();
    }

    /// Keep only the prefix of a message that is too large: otherwise the call might lack room before it is refused.
    fn drop_too_large(&mut self) {
        let Some(&prefix @ [_, a, b, c, d]) = self.buffer.first_chunk() else { return };
        if u32::from_be_bytes([a, b, c, d]) as usize > self.limit {
            self.buffer = BytesMut::from(&prefix[..]);
        }
    }

    /// Bytes of incomplete messages.
    pub fn size(&self) -> usize {
        self.buffer.len()
    }

    /// Whether an incomplete message is left.
    pub fn is_cut_off(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Whether `next` has a result.
    pub fn has_next(&self) -> bool {
        let Some(&[flag, a, b, c, d]) = self.buffer.first_chunk() else { return false };
        let size = u32::from_be_bytes([a, b, c, d]) as usize;
        flag > 1 || size > self.limit || self.buffer.len() >= PREFIX + size
    }

    /// Returns the next complete message; None: none yet.
    pub fn next(&mut self) -> Result<Option<Whole>, Unreadable> {
        let Some(prefix) = self.buffer.get(..PREFIX) else {
            return Ok(None);
        };
        let is_compressed = match prefix[0] {
            0 => false,
            1 => true,
            _ => return Err(Unreadable::Malformed),
        };
        let size = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        if size > self.limit {
            return Err(Unreadable::TooLarge(size));
        }
        if self.buffer.len() < PREFIX + size {
            return Ok(None);
        }
        if is_compressed && self.encoding == Encoding::Identity {
            return Err(Unreadable::Encoding);
        }
        self.buffer.advance(PREFIX);
        let bytes = self.buffer.split_to(size).freeze();
        self.drop_too_large();
        let compressed = is_compressed.then_some(self.encoding);
        Ok(Some(Whole { bytes, compressed }))
    }
}

/// A complete message.
#[derive(Debug, PartialEq, Eq)]
pub struct Whole {
    pub bytes: Bytes,
    /// Its encoding; None: not compressed.
    pub compressed: Option<Encoding>,
}

/// A message with its prefix.
pub fn framed(message: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(PREFIX + message.len());
    out.put_u8(0);
    out.put_u32(message.len() as u32);
    out.put_slice(message);
    out.freeze()
}

/// The prefix of a message of this size.
pub fn put_prefix(out: &mut BytesMut, size: usize) {
    out.put_u8(0);
    out.put_u32(size as u32);
}

/// An invalid `grpc-timeout`.
#[derive(Debug, PartialEq, Eq)]
pub struct NoTimeout;

/// Limit of digits in a `grpc-timeout`.
const MAX_DIGITS: usize = 8;

/// Reads `grpc-timeout`; None: no limit.
pub fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, NoTimeout> {
    let Some(value) = headers.get(&TIMEOUT) else { return Ok(None) };
    let [number @ .., unit] = value.as_bytes() else { return Err(NoTimeout) };
    if number.is_empty() || !number.iter().all(u8::is_ascii_digit) || !b"HMSmun".contains(unit) {
        return Err(NoTimeout);
    }
    if number.len() > MAX_DIGITS {
        return Ok(None); // gRPC's own servers treat such times as no limit too
    }
    let number = number.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0'));
    Ok(Some(match unit {
        b'H' => Duration::from_secs(number * 3600),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        _ => Duration::from_nanos(number),
    }))
}

/// Returns the size of a call's headers as HTTP/2 counts it, without the short pseudo-headers.
pub fn size(path: &str, headers: &HeaderMap) -> usize {
    const EACH: usize = 32;
    let fields = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + EACH);
    path.len() + EACH + fields.sum::<usize>()
}

/// The metadata of a client, without the protocol's own headers.
pub fn metadata(headers: &HeaderMap) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for (name, value) in headers {
        let name = name.as_str();
        if matches!(name, "te" | "content-type") || (name.starts_with("grpc-") && !name.ends_with("-bin")) {
            continue;
        }
        if !name.ends_with("-bin") {
            found.push((name.to_owned(), value.as_bytes().to_vec()));
        } else if let Some(bytes) = from_base64(value.as_bytes()) {
            found.push((name.to_owned(), bytes));
        }
    }
    found
}

/// The headers of a reply.
pub fn reply_headers() -> http::Response<()> {
    let mut response = http::Response::new(());
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// The headers of a call that ends without a reply.
pub fn status_only(status: &Status) -> http::Response<()> {
    let mut response = reply_headers();
    response.headers_mut().extend(
        status
            .trailers()
            .into_iter()
            .filter_map(|(name, value): (Option<HeaderName>, _)| Some((name?, value))),
    );
    if status.may_go_elsewhere {
        response.headers_mut().insert(GO_ELSEWHERE.0, HeaderValue::from_static(GO_ELSEWHERE.1));
    }
    response
}

fn percent_encoded(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    for byte in text.bytes() {
        if (b' '..=b'~').contains(&byte) && byte != b'%' {
            out.push(byte);
        } else {
            out.extend_from_slice(format!("%{byte:02X}").as_bytes());
        }
    }
    out
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Encode bytes as base64 without padding, as in gRPC's binary headers.
fn base64(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let mut group = [0u8; 3];
        group[..chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes([0, group[0], group[1], group[2]]);
        for index in 0..=chunk.len() {
            out.push(ALPHABET[(bits >> (18 - 6 * index)) as usize & 63]);
        }
    }
    out
}

/// Decode a binary header, padded or not; None: invalid.
fn from_base64(text: &[u8]) -> Option<Vec<u8>> {
    let text = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    if text.len() % 4 == 1 {
        return None;
    }
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for chunk in text.chunks(4) {
        let mut bits = 0u32;
        for (index, byte) in chunk.iter().enumerate() {
            let value = ALPHABET.iter().position(|letter| letter == byte)? as u32;
            bits |= value << (18 - 6 * index);
        }
        out.extend_from_slice(&bits.to_be_bytes()[1..chunk.len()]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut map = HeaderMap::new();
        map.insert(name, HeaderValue::from_str(value).unwrap());
        map
    }

    proptest! {
        #[test]
        fn binary_headers_are_decoded_as_encoded(bytes: Vec<u8>) {
            prop_assert_eq!(from_base64(&base64(&bytes)), Some(bytes));
        }

        #[test]
        fn any_text_is_decoded_or_rejected(text: Vec<u8>) {
            let _ = from_base64(&text);
        }

        #[test]
        fn messages_are_read_in_pieces_of_any_size(bodies: Vec<Vec<u8>>, size in 1usize..20) {
            let stream: Vec<u8> = bodies.iter().flat_map(|body| framed(body).to_vec()).collect();
            let mut messages = Messages::new(Encoding::Identity, 1 << 20);
            let mut found = Vec::new();
            for piece in stream.chunks(size) {
                messages.push(Bytes::copy_from_slice(piece));
                while messages.has_next() {
                    found.push(messages.next().unwrap().unwrap().bytes.to_vec());
                }
                prop_assert_eq!(messages.next(), Ok(None));
            }
            prop_assert!(!messages.is_cut_off());
            prop_assert_eq!(found, bodies);
        }

        #[test]
        fn a_message_is_ascii_on_the_wire(text: String) {
            let encoded = percent_encoded(&text);
            prop_assert!(encoded.iter().all(|byte| (b' '..=b'~').contains(byte)));
            prop_assert!(HeaderValue::from_bytes(&encoded).is_ok());
        }
    }

    #[test]
    fn the_retry_trailer_is_sent_only_without_a_reply() {
        let mut status = Status::new(UNAVAILABLE, "not now");
        assert!(!status_only(&status).headers().contains_key(GO_ELSEWHERE.0));
        status.may_go_elsewhere = true;
        assert_eq!(status_only(&status).headers()[GO_ELSEWHERE.0], GO_ELSEWHERE.1);
        assert!(!status.trailers().contains_key(GO_ELSEWHERE.0));
    }

    #[test]
    fn a_message_over_the_limit_is_refused_before_it_has_arrived() {
        let mut messages = Messages::new(Encoding::Identity, 10);
        messages.push(Bytes::from_static(&[0, 0, 0, 0, 11]));
        assert_eq!(messages.next(), Err(Unreadable::TooLarge(11)));
    }

    #[test]
    fn only_the_prefix_of_a_message_over_the_limit_is_kept() {
        let large = [&[0, 0, 0, 0, 100][..], &[7; 90]].concat();
        let small = [0, 0, 0, 0, 1, 7];
        let mut messages = Messages::new(Encoding::Identity, 10);
        messages.push(Bytes::from([&small[..], &large].concat()));
        assert_eq!(messages.next().unwrap().unwrap().bytes, small[PREFIX..]);
        assert_eq!((messages.size(), messages.has_next()), (PREFIX, true));
        assert_eq!(messages.next(), Err(Unreadable::TooLarge(100)));

        let mut messages = Messages::new(Encoding::Identity, 10);
        messages.push(Bytes::from(large));
        assert_eq!((messages.size(), messages.has_next()), (PREFIX, true));
        assert_eq!(messages.next(), Err(Unreadable::TooLarge(100)));
    }

    #[test]
    fn a_compressed_message_needs_an_encoding() {
        let mut messages = Messages::new(Encoding::Identity, 10);
        messages.push(Bytes::from_static(&[1, 0, 0, 0, 0]));
        assert_eq!(messages.next(), Err(Unreadable::Encoding));
    }

    #[test]
    fn timeouts_are_parsed() {
        for (text, wanted) in [
            ("5S", Ok(Duration::from_secs(5))),
            ("250m", Ok(Duration::from_millis(250))),
            ("99999999n", Ok(Duration::from_nanos(99_999_999))),
            ("1H", Ok(Duration::from_secs(3600))),
            ("5", Err(NoTimeout)),
            ("S", Err(NoTimeout)),
            ("", Err(NoTimeout)),
            ("-1S", Err(NoTimeout)),
            ("+1S", Err(NoTimeout)),
        ] {
            assert_eq!(timeout(&headers("grpc-timeout", text)), wanted.map(Some), "{text}");
        }
        assert_eq!(timeout(&HeaderMap::new()), Ok(None));
        assert_eq!(timeout(&headers("grpc-timeout", "123456789S")), Ok(None));
    }
}
