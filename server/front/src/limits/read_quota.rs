//! A connection's read quota: the bytes read before other connections get a slot, and the control frames it may send.
//!
//! h2 reads a connection while it has data. A client with many small frames would occupy the front's thread, and frames
//! outside calls (pings, settings) would have no limit.

use crate::limits::write_through::write_through;
use fields::Fields;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::Arc;
use std::task::{ready, Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, ReadBuf};

mod fields;
mod gate;

pub use gate::Gate;

/// Largest and smallest quota in bytes. Each connection's quota adapts to what can be served in `QUOTA_TIME`, because
/// headers cost a hundred times as much as data.
const MAX_QUOTA_BYTES: usize = 64 << 10;
const MIN_QUOTA_BYTES: usize = 1 << 10;
const QUOTA_TIME: Duration = Duration::from_micros(100);
/// Limit of fields in one call's headers. It exceeds h2's own limit, since HTTP/2 counts 32 bytes for each field.
const MAX_FIELDS: usize = 2048;
/// Memory of incomplete headers: this many times their bytes, plus `FIELD_BYTES` per field.
const HEADER_COPIES: usize = 4;
const FIELD_BYTES: usize = 128;
/// Uncounted bytes of a connection's header table. A client that calls a dozen methods needs no more.
const FREE_TABLE_BYTES: usize = 128 << 10;
/// A data frame smaller than this uses more memory while it waits than its bytes, which flow control limits.
pub const SMALL_BYTES: usize = 256;
/// Limit of unread small frames per connection. The lower limit applies while all connections together have `MANY_SMALL`.
const MAX_SMALL: i64 = 16_384;
const MAX_SMALL_OF_MANY: i64 = 512;
const MANY_SMALL: i64 = 131_072;
/// Small frames of calls that ended unread stay counted. One is forgotten in each interval.
const FORGET_EVERY: Duration = Duration::from_millis(50);
/// Burst of frames outside calls. Each frame of a call allows one more.
const MAX_CONTROL: usize = 1000;
/// Interval at which one more is allowed.
const CONTROL_EVERY: Duration = Duration::from_millis(10);
/// Burst and interval of SETTINGS frames, each of which may affect every call of the connection.
const MAX_SETTINGS: usize = 100;
const SETTINGS_INTERVAL: Duration = Duration::from_millis(100);
const PREFACE_BYTES: usize = 24;
const HEAD_BYTES: usize = 9;

/// Shared by the socket and the task that serves the connection.
#[derive(Debug)]
pub struct ReadQuota {
    /// Bytes of a full quota, and bytes left of the current one.
    size: AtomicUsize,
    left: AtomicUsize,
    is_flooded: AtomicBool,
    /// Small data frames that wait to be read.
    small: AtomicI64,
    /// See `Control::kept`.
    kept: AtomicUsize,
    all: Arc<Received>,
}

/// Totals of unprocessed data of all connections.
#[derive(Debug, Default)]
pub struct Received {
    small: AtomicI64,
    kept: AtomicUsize,
}

impl Received {
    /// Bytes that h2 keeps for all connections, outside the flow-control windows.
    pub fn kept(&self) -> usize {
        self.kept.load(Ordering::Relaxed)
    }
}

impl Default for ReadQuota {
    fn default() -> Self {
        ReadQuota {
            size: AtomicUsize::new(MAX_QUOTA_BYTES),
            left: AtomicUsize::new(0),
            is_flooded: AtomicBool::new(false),
            small: AtomicI64::new(0),
            kept: AtomicUsize::new(0),
            all: Arc::default(),
        }
    }
}

impl Drop for ReadQuota {
    fn drop(&mut self) {
        self.all.small.fetch_sub(*self.small.get_mut(), Ordering::Relaxed);
        self.set_kept(0);
    }
}

impl ReadQuota {
    /// `all` is shared by all connections.
    pub fn new(all: Arc<Received>) -> Self {
        let mut quota = ReadQuota::default();
        quota.all = all;
        quota
    }

    /// Bytes that h2 keeps for the connection, outside the flow-control windows.
    pub fn kept(&self) -> usize {
        self.kept.load(Ordering::Relaxed)
    }

    /// Whether the connection is about to be closed.
    pub fn is_given_up(&self) -> bool {
        self.is_flooded.load(Ordering::Relaxed)
    }

    /// Mark the connection for closing. Its data no longer counts.
    pub fn give_up(&self) {
        self.is_flooded.store(true, Ordering::Relaxed);
        self.set_kept(0);
    }

    pub(crate) fn set_kept(&self, bytes: usize) {
        let before = self.kept.swap(bytes, Ordering::Relaxed);
        if bytes >= before {
            self.all.kept.fetch_add(bytes - before, Ordering::Relaxed);
        } else {
            self.all.kept.fetch_sub(before - bytes, Ordering::Relaxed);
        }
    }

    /// Count data of a call as read.
    pub fn read(&self, bytes: usize) {
        if bytes < SMALL_BYTES {
            self.add_small(-1);
        }
    }

    /// Change the number of waiting small frames. Returns whether it is within the limit.
    fn add_small(&self, count: i64) -> bool {
        // never below 0: some of the frames that were read had been forgotten
        let add = |small: i64| Some((small + count).max(0));
        let before = self.small.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).unwrap_or(0);
        let now = (before + count).max(0);
        let all = self.all.small.fetch_add(now - before, Ordering::Relaxed) + now - before;
        now <= if all > MANY_SMALL { MAX_SMALL_OF_MANY } else { MAX_SMALL }
    }

    /// Bytes that may be read now.
    pub fn left(&self) -> usize {
        match self.is_given_up() {
            true => 0,
            false => self.left.load(Ordering::Relaxed),
        }
    }

    /// Count bytes of HTTP/1.1 as read, and as kept until they are known to be used.
    pub fn took(&self, bytes: usize) {
        self.left.fetch_sub(bytes, Ordering::Relaxed);
        self.set_kept(self.kept() + bytes);
    }

    /// Start a new quota, when the connection's task is polled.
    pub fn begin(&self) {
        self.left.store(self.size.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// End the poll, which took this long, and adapt the size of the next quota.
    pub fn end(&self, took: Duration) {
        let size = self.size.load(Ordering::Relaxed);
        let next = if took > QUOTA_TIME {
            (size / 2).max(MIN_QUOTA_BYTES)
        } else if self.left.load(Ordering::Relaxed) == 0 && took < QUOTA_TIME / 2 {
            (size * 2).min(MAX_QUOTA_BYTES)
        } else {
            return;
        };
        self.size.store(next, Ordering::Relaxed);
    }

    /// Ready when the peer has exceeded a limit.
    pub fn poll_flooded(&self) -> Poll<()> {
        if self.is_given_up() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}

/// A socket that is read within a quota.
pub struct QuotaSocket<S> {
    socket: S,
    quota: Arc<ReadQuota>,
    control: Control,
}

impl<S> QuotaSocket<S> {
    pub fn new(socket: S, quota: Arc<ReadQuota>) -> Self {
        QuotaSocket { socket, quota, control: Control::new(Instant::now()) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for QuotaSocket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let left = self.quota.left.load(Ordering::Relaxed);
        if left == 0 || self.quota.poll_flooded().is_ready() {
            // runs after all ready tasks and a poll of the sockets: if a task only wakes itself, tokio does not poll them
            // for 61 tasks
            let _ = std::pin::pin!(tokio::task::yield_now()).poll(cx);
            return Poll::Pending;
        }
        let before = buf.filled().len();
        if buf.remaining() <= left {
            ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        } else {
            let mut part = ReadBuf::new(buf.initialize_unfilled_to(left)); // zeroes the bytes, which costs time
            ready!(Pin::new(&mut self.socket).poll_read(cx, &mut part))?;
            let read = part.filled().len();
            buf.advance(read);
        }
        let read = buf.filled().len() - before;
        let mut may_send = self.control.may_send(&buf.filled()[before..], Instant::now);
        self.quota.left.store(left - read, Ordering::Relaxed);
        self.quota.set_kept(self.control.kept());
        let small = std::mem::take(&mut self.control.small);
        if small > 0 && !self.quota.add_small(small) {
            let forgotten = self.control.forget(Instant::now());
            may_send &= self.quota.add_small(-forgotten);
        }
        if !may_send {
            self.quota.give_up();
            buf.set_filled(before); // hidden from h2
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

write_through!(QuotaSocket);

/// Counts frames outside calls: pings, settings, priorities, empty data, and unknown types.
struct Control {
    /// Bytes before the next frame header.
    skip: usize,
    head: [u8; HEAD_BYTES],
    /// Received bytes of `head`.
    known: usize,
    control: Bucket,
    settings: Bucket,
    /// Fields and bytes of the headers being received; whether a frame has headers, and whether it ends them.
    fields: Fields,
    header_bytes: usize,
    is_in_headers: bool,
    ends_headers: bool,
    /// Small data frames that are not yet counted in the quota.
    small: i64,
    /// Time up to which small frames that ended unread are forgotten.
    forgotten: Instant,
}

impl Control {
    fn new(now: Instant) -> Self {
        Control {
            skip: PREFACE_BYTES,
            head: [0; HEAD_BYTES],
            known: 0,
            control: Bucket::new(MAX_CONTROL, CONTROL_EVERY, now),
            settings: Bucket::new(MAX_SETTINGS, SETTINGS_INTERVAL, now),
            fields: Fields::default(),
            header_bytes: 0,
            is_in_headers: false,
            ends_headers: false,
            small: 0,
            forgotten: now,
        }
    }

    /// Number of small frames to forget since the last call.
    fn forget(&mut self, now: Instant) -> i64 {
        let passed = now.saturating_duration_since(self.forgotten);
        self.forgotten = now;
        (passed.as_millis() / FORGET_EVERY.as_millis()) as i64
    }

    /// Whether a peer that sent these bytes is within its limits.
    fn may_send(&mut self, mut bytes: &[u8], now: impl Fn() -> Instant) -> bool {
        while !bytes.is_empty() {
            let skipped = self.skip.min(bytes.len());
            if self.is_in_headers && !self.may_send_fields(&bytes[..skipped]) {
                return false;
            }
            self.skip -= skipped;
            self.is_in_headers &= self.skip > 0 || !self.ends_headers;
            bytes = &bytes[skipped..];
            let taken = bytes.len().min(HEAD_BYTES - self.known);
            self.head[self.known..self.known + taken].copy_from_slice(&bytes[..taken]);
            self.known += taken;
            bytes = &bytes[taken..];
            if self.known == HEAD_BYTES {
                self.known = 0;
                if !self.may_send_frame(&now) {
                    return false;
                }
            }
        }
        true
    }

    /// Add bytes of headers. Returns whether the call's headers are within the limit of fields.
    fn may_send_fields(&mut self, bytes: &[u8]) -> bool {
        self.fields.push(bytes);
        self.header_bytes += bytes.len();
        self.fields.count() <= MAX_FIELDS
    }

    /// Upper bound of the bytes that h2 keeps: an incomplete frame or incomplete headers, and entries of its table.
    fn kept(&self) -> usize {
        let [high, mid, low, ..] = self.head;
        let size = u32::from_be_bytes([0, high, mid, low]) as usize;
        let unfinished = if self.is_in_headers {
            // h2 decodes each frame of headers as it arrives, and also keeps the bytes
            HEADER_COPIES * self.header_bytes + FIELD_BYTES * self.fields.count()
        } else if self.skip > 0 {
            size.saturating_sub(self.skip)
        } else {
            0
        };
        unfinished + self.fields.table_bytes().saturating_sub(FREE_TABLE_BYTES)
    }

    fn may_send_frame(&mut self, now: &impl Fn() -> Instant) -> bool {
        const DATA: u8 = 0;
        const HEADERS: u8 = 1;
        const SETTINGS: u8 = 4;
        const PUSH_PROMISE: u8 = 5;
        const CONTINUATION: u8 = 9;
        const END_STREAM: u8 = 1;
        const END_HEADERS: u8 = 4;
        let [high, mid, low, kind, flags, ..] = self.head;
        self.skip = u32::from_be_bytes([0, high, mid, low]) as usize;
        if kind == HEADERS {
            self.fields.begin(flags);
            self.header_bytes = 0;
        }
        self.is_in_headers = kind == HEADERS || kind == CONTINUATION;
        if self.is_in_headers {
            self.fields.add_frame(self.skip);
        }
        self.ends_headers = flags & END_HEADERS != 0;
        match kind {
            DATA if self.skip == 0 && flags & END_STREAM == 0 => {}
            // data and headers of calls; 3 and 8 (reset and window update) apply to existing streams
            DATA | HEADERS | CONTINUATION => {
                self.small += i64::from(kind == DATA && flags & END_STREAM == 0 && self.skip < SMALL_BYTES);
                self.control.give();
                return true;
            }
            3 | 8 => return true,
            PUSH_PROMISE => return false, // clients never send it
            SETTINGS => return self.settings.take(now),
            _ => {}
        }
        self.control.take(now)
    }
}

/// A token bucket: a burst, which refills as time passes.
pub struct Bucket {
    left: usize,
    max: usize,
    interval: Duration,
    refilled: Instant,
}

impl Bucket {
    pub fn new(max: usize, interval: Duration, now: Instant) -> Self {
        Bucket { left: max, max, interval, refilled: now }
    }

    /// Return a token.
    fn give(&mut self) {
        self.left = self.max.min(self.left + 1);
    }

    /// Take a token. Returns whether there was one.
    pub fn take(&mut self, now: &impl Fn() -> Instant) -> bool {
        if self.left == 0 {
            let passed = now().saturating_duration_since(self.refilled);
            let more = (passed.as_millis() / self.interval.as_millis()) as usize;
            if more == 0 {
                return false;
            }
            self.left = more.min(self.max);
            self.refilled += passed;
        }
        self.left -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PING: u8 = 6;

    fn frame(kind: u8, flags: u8, size: usize) -> Vec<u8> {
        let mut bytes = (size as u32).to_be_bytes()[1..].to_vec();
        bytes.extend_from_slice(&[kind, flags, 0, 0, 0, 1]);
        bytes.resize(HEAD_BYTES + size, PING); // the content is not parsed as a frame header
        bytes
    }

    fn hello() -> Vec<u8> {
        let mut bytes = vec![PING; PREFACE_BYTES];
        bytes.extend(frame(4, 0, 18));
        bytes
    }

    proptest! {
        #[test]
        fn frames_are_counted_in_pieces_of_any_size(sizes in prop::collection::vec(0usize..40, 0..50), piece in 1usize..30) {
            let start = Instant::now();
            let mut control = Control::new(start);
            let mut bytes = hello();
            sizes.iter().for_each(|size| bytes.extend(frame(PING, 0, *size)));
            for part in bytes.chunks(piece) {
                prop_assert!(control.may_send(part, || start));
            }
            prop_assert_eq!(control.control.left, MAX_CONTROL - sizes.len());
        }
    }

    #[test]
    fn a_flood_is_detected_and_calls_and_time_allow_more() {
        let start = Instant::now();
        let mut control = Control::new(start);
        assert!(control.may_send(&hello(), || start));
        for kind in [PING, 2, 200, 0] {
            control.control.left = 1;
            assert!(control.may_send(&frame(kind, 0, 0), || start), "{kind}");
            assert!(!control.may_send(&frame(kind, 0, 0), || start), "{kind}");
        }
        assert!(control.may_send(&frame(1, 4, 30), || start), "headers");
        assert!(control.may_send(&frame(0, 0, 1), || start), "data");
        assert!(control.may_send(&frame(0, 1, 0), || start), "the end of a call");
        assert_eq!(control.control.left, 3);
        control.control.left = 0;
        let later = start + 2 * CONTROL_EVERY;
        assert!(
            control.may_send(&frame(PING, 0, 8), || later) && control.may_send(&frame(PING, 0, 8), || later)
        );
        assert!(!control.may_send(&frame(PING, 0, 8), || later));
    }

    #[test]
    fn unread_small_frames_are_a_flood() {
        let start = Instant::now();
        let mut control = Control::new(start);
        assert!(control.may_send(&hello(), || start));
        for size in [1, SMALL_BYTES - 1, SMALL_BYTES] {
            assert!(control.may_send(&frame(0, 0, size), || start));
        }
        assert!(control.may_send(&frame(0, 1, 1), || start), "the last frame of a call");
        assert_eq!(control.small, 2);
        assert_eq!(control.forget(start + 3 * FORGET_EVERY), 3);
        let quota = ReadQuota::default();
        assert!(quota.add_small(MAX_SMALL) && !quota.add_small(1));
        quota.read(SMALL_BYTES);
        assert!(!quota.add_small(0), "it was a large frame");
        quota.read(1);
        assert!(quota.add_small(0));
        quota.add_small(-2 * MAX_SMALL);
        assert!(quota.add_small(MAX_SMALL));
    }

    #[test]
    fn a_quota_is_as_large_as_its_time_allows() {
        let quota = ReadQuota::default();
        let size_after = |took: Duration, left: usize| {
            quota.begin();
            quota.left.store(left, Ordering::Relaxed);
            quota.end(took);
            quota.begin();
            quota.left.load(Ordering::Relaxed)
        };
        assert_eq!(size_after(QUOTA_TIME, 0), MAX_QUOTA_BYTES);
        assert_eq!(size_after(2 * QUOTA_TIME, 0), MAX_QUOTA_BYTES / 2);
        assert_eq!(size_after(QUOTA_TIME / 4, 1), MAX_QUOTA_BYTES / 2, "it read less than its quota");
        assert_eq!(size_after(QUOTA_TIME / 4, 0), MAX_QUOTA_BYTES);
        for _ in 0..20 {
            size_after(2 * QUOTA_TIME, 0);
        }
        assert_eq!(size_after(2 * QUOTA_TIME, 0), MIN_QUOTA_BYTES);
    }

    #[tokio::test]
    async fn no_more_is_read_than_the_quota() {
        use tokio::io::AsyncReadExt;
        let sent = [hello(), frame(0, 0, MAX_QUOTA_BYTES)].concat();
        let quota = Arc::new(ReadQuota::default());
        let mut socket = QuotaSocket::new(&sent[..], quota.clone());
        let mut buffer = vec![0; 2 * MAX_QUOTA_BYTES];
        quota.begin();
        assert_eq!(socket.read(&mut buffer).await.unwrap(), MAX_QUOTA_BYTES);
        assert_eq!(quota.left.load(Ordering::Relaxed), 0);
        quota.begin();
        let rest = socket.read(&mut buffer).await.unwrap();
        assert_eq!(rest, sent.len() - MAX_QUOTA_BYTES);
        assert_eq!(buffer[..rest], sent[MAX_QUOTA_BYTES..]);
    }

    #[test]
    fn settings_have_their_own_limit() {
        let start = Instant::now();
        let mut control = Control::new(start);
        assert!(control.may_send(&hello(), || start));
        for _ in 1..MAX_SETTINGS {
            let both = [frame(1, 5, 30), frame(4, 0, 6)].concat();
            assert!(control.may_send(&both, || start));
        }
        assert!(!control.may_send(&frame(4, 0, 6), || start));
        assert!(control.may_send(&frame(4, 0, 6), || start + SETTINGS_INTERVAL));
    }

    #[test]
    fn headers_with_too_many_fields_are_a_flood() {
        let start = Instant::now();
        let of = |kind, flags, fields: usize| {
            let mut bytes = frame(kind, flags, fields);
            bytes[HEAD_BYTES..].fill(0xbe);
            bytes
        };
        let new = || {
            let mut control = Control::new(start);
            assert!(control.may_send(&hello(), || start));
            control
        };
        let mut control = new();
        assert!(control.may_send(&of(1, 5, MAX_FIELDS), || start));
        assert!(control.may_send(&of(1, 5, MAX_FIELDS), || start), "each call has its own");
        assert!(!control.may_send(&of(1, 5, MAX_FIELDS + 1), || start));
        let mut control = new();
        assert!(control.may_send(&of(1, 1, MAX_FIELDS / 2), || start));
        assert!(control.may_send(&of(9, 0, MAX_FIELDS / 2), || start));
        assert!(!control.may_send(&of(9, 4, 1), || start), "continuation frames count too");
        assert!(!new().may_send(&of(5, 4, 1), || start), "PUSH_PROMISE");
    }

    #[test]
    fn bytes_of_incomplete_frames_are_counted() {
        let start = Instant::now();
        let mut control = Control::new(start);
        assert!(control.may_send(&hello(), || start) && control.kept() == 0);
        let long = frame(0, 0, 1000);
        assert!(control.may_send(&long[..HEAD_BYTES + 600], || start));
        assert_eq!(control.kept(), 600);
        assert!(control.may_send(&long[HEAD_BYTES + 600..], || start) && control.kept() == 0);
        for (kind, flags, frames) in [(1, 0, 1), (9, 0, 2), (9, 4, 0), (0, 0, 0)] {
            assert!(control.may_send(&frame(kind, flags, 40), || start));
            assert_eq!(control.kept(), frames * (40 * HEADER_COPIES + 5 * FIELD_BYTES));
        }
        let mut path = frame(1, 4, 4000);
        path[HEAD_BYTES..HEAD_BYTES + 3].copy_from_slice(b"\x44\x01/");
        for _ in 0..8 {
            assert_eq!(control.kept(), 0);
            assert!(control.may_send(&path, || start));
        }
        assert!(control.may_send(&path, || start) && control.kept() > 0, "more bytes than are free");
        let all = Arc::<Received>::default();
        let quotas = [ReadQuota::new(all.clone()), ReadQuota::new(all.clone())];
        quotas.iter().for_each(|quota| quota.set_kept(600));
        quotas[0].set_kept(500);
        quotas[1].give_up();
        assert_eq!((all.kept(), quotas[1].poll_flooded().is_ready()), (500, true));
        drop(quotas);
        assert_eq!(all.kept(), 0);
    }

    #[test]
    fn each_connection_has_a_lower_limit_while_all_have_many_small_frames() {
        let all = Arc::<Received>::default();
        let quotas: Vec<_> = (0..8).map(|_| ReadQuota::new(all.clone())).collect();
        assert!(quotas.iter().all(|quota| quota.add_small(MAX_SMALL)));
        let last = ReadQuota::new(all.clone());
        assert!(last.add_small(MAX_SMALL_OF_MANY) && !last.add_small(1) && !quotas[0].add_small(0));
        drop((quotas, last));
        assert_eq!(all.small.load(Ordering::Relaxed), 0);
    }
}
