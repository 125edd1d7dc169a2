//! A call, shared by the task that serves it and the side that answers it.

use crate::limits::callers::Caller;
use crate::limits::load::GENERAL;
use crate::limits::peer::Peer;
use crate::messages::grpc::{self, Status};
use crate::messages::protobuf::{Fields, Value};
use crate::method::Method;
use crate::steps::reply_order::{Reply, ReplyOrder};
use bytes::Bytes;
use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

/// A running call.
#[derive(Debug)]
pub struct Call {
    pub peer: Arc<Peer>,
    /// Index of its method; the last one is "no such method".
    pub method: usize,
    pub streams: bool,
    /// Seconds on the monotonic clock; infinity if it has none.
    pub deadline: f64,
    pub metadata: Vec<(String, Vec<u8>)>,
    pub caller: Caller,
    /// Start time, in seconds on the monotonic clock.
    pub started: f64,
    is_over: AtomicBool,
    is_late: AtomicBool,
    state: Mutex<State>,
    /// Number of unwritten replies of all calls.
    unwritten: Arc<AtomicUsize>,
}

/// The state that the call's task checks when it is woken.
#[derive(Debug, Default)]
pub struct State {
    /// Framed replies, each with the bytes of fast-path frames to release once it is written; None: Python's replies.
    pub replies: VecDeque<Reply>,
    /// Replies of a stream that must leave in the order of its messages.
    pub ordered: ReplyOrder,
    /// Bytes of waiting replies.
    pub reply_bytes: usize,
    pub end: Option<Status>,
    /// The head of the answer to an HTTP request.
    pub head: Option<Box<http::Response<()>>>,
    /// Whether the answer to an HTTP request comes in parts. A stopping server does not wait until they are written.
    pub is_in_parts: bool,
    /// Whether its task has ended, so that nothing more is sent.
    is_closed: bool,
    /// Ids of unanswered fast-path frames.
    pub frames: HashSet<u64>,
    /// Ids of unanswered frames that Python serves.
    pub general_frames: HashSet<u64>,
    /// Bytes of unanswered fast-path frames.
    pub held: usize,
    /// Sizes of messages in Python's queue that it has not read.
    pub unread: VecDeque<usize>,
    /// Whether Python has authenticated the caller and allows the call.
    pub is_admitted: bool,
    pub waker: Option<Waker>,
}

impl State {
    /// Bytes of a stream's complete messages and their replies, until the replies are written.
    pub fn held_bytes(&self) -> usize {
        self.held + self.reply_bytes + self.unread.iter().sum::<usize>()
    }
}

impl Call {
    pub fn new(
        peer: Arc<Peer>,
        method: Method,
        started: f64,
        deadline: f64,
        metadata: Vec<(String, Vec<u8>)>,
        caller: Caller,
        unwritten: Arc<AtomicUsize>,
    ) -> Self {
        Call {
            peer,
            method: method.index,
            streams: method.streams,
            deadline,
            metadata,
            caller,
            started,
            is_over: AtomicBool::new(false),
            is_late: AtomicBool::new(false),
            state: Mutex::new(State::default()),
            unwritten,
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        // after a panic, at worst one client's call is inconsistent
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the client traces the call; None: not stated.
    ///
    /// That is the last bit of W3C's `traceparent`: version, trace, span and flags in hexadecimal, with dashes between.
    pub fn is_traced(&self) -> Option<bool> {
        let (_, said) = self.metadata.iter().rfind(|(key, _)| key == "traceparent")?;
        let flags = std::str::from_utf8(said.get(53..55)?).ok()?;
        Some(u8::from_str_radix(flags, 16).ok()? & 1 == 1)
    }

    /// Whether the call has ended.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// Whether the call ended at its deadline.
    pub fn is_late(&self) -> bool {
        self.is_late.load(Ordering::Relaxed)
    }

    pub fn set_over(&self, late: bool) {
        self.is_late.store(late, Ordering::Relaxed);
        self.is_over.store(true, Ordering::Relaxed);
    }

    /// Send a framed reply, or a part of the answer to an HTTP request. `frame_id`: the fast-path frame that it completes.
    pub fn reply(&self, framed: Bytes, frame_id: Option<u64>, held: Option<usize>) {
        let waker = {
            let mut state = self.state();
            if let Some(id) = frame_id {
                state.frames.remove(&id);
            }
            if state.is_closed {
                return; // the client is gone, so nothing must wait for this reply
            }
            state.reply_bytes += framed.len();
            self.unwritten.fetch_add(usize::from(!state.is_in_parts), Ordering::Relaxed);
            state.replies.push_back((framed, held));
            state.waker.take()
        };
        wake(waker);
    }

    /// Send the framed reply to a message once all earlier messages are answered.
    pub fn reply_in_order(&self, number: u64, framed: Bytes, held: Option<usize>) {
        let waker = {
            let mut state = self.state();
            state.frames.remove(&number);
            if state.is_closed {
                return;
            }
            state.reply_bytes += framed.len();
            self.unwritten.fetch_add(1, Ordering::Relaxed);
            state.ordered.put(number, (framed, held));
            while let Some(reply) = state.ordered.pop() {
                state.replies.push_back(reply);
            }
            state.waker.take()
        };
        wake(waker);
    }

    /// Count a message for Python until Python has read it.
    pub fn hand_over(&self, state: &mut State, size: usize) {
        state.unread.push_back(size);
        self.peer.load.begin(GENERAL);
    }

    /// Send a reply from Python. `number`: that of its message, if replies are ordered.
    pub fn write(&self, message: &[u8], number: Option<u64>) {
        if let Some(number) = number {
            return self.reply_in_order(number, grpc::framed(message), None);
        }
        if let Some(frame_id) = answered_frame(message) {
            if self.state().general_frames.remove(&frame_id) {
                self.peer.load.end(GENERAL);
            }
        }
        self.reply(grpc::framed(message), None, None);
    }

    /// Send the reply of a unary call, and end it.
    pub fn finish(&self, framed: Bytes) {
        let waker = {
            let mut state = self.state();
            if state.is_closed {
                return;
            }
            self.unwritten.fetch_add(1, Ordering::Relaxed);
            state.replies.push_back((framed, None));
            state.end = Some(Status::ok());
            state.waker.take()
        };
        wake(waker);
    }

    /// Answer an HTTP request. `has_more`: parts of the body follow.
    pub fn respond(&self, head: http::Response<()>, body: Bytes, has_more: bool) {
        let waker = {
            let mut state = self.state();
            if state.is_closed || state.end.is_some() {
                return;
            }
            state.head = Some(Box::new(head));
            state.is_in_parts = has_more;
            if !body.is_empty() {
                self.unwritten.fetch_add(usize::from(!has_more), Ordering::Relaxed);
                state.reply_bytes += body.len();
                state.replies.push_back((body, None));
            }
            state.end = (!has_more).then(Status::ok);
            state.waker.take()
        };
        wake(waker);
    }

    /// Admit the call: Python has authenticated its caller.
    pub fn admit(&self) {
        let waker = {
            let mut state = self.state();
            state.is_admitted = true;
            state.waker.take()
        };
        wake(waker);
    }

    pub fn end(&self, status: Status) {
        let waker = {
            let mut state = self.state();
            state.end.get_or_insert(status);
            state.waker.take()
        };
        wake(waker);
    }

    /// Count a reply as written or dropped.
    pub fn written(&self) {
        self.unwritten.fetch_sub(usize::from(!self.state().is_in_parts), Ordering::Relaxed);
    }

    /// Drop the unwritten replies and all later ones, because the task has ended.
    pub fn close(&self) {
        let mut state = self.state();
        state.is_closed = true;
        if !state.is_in_parts {
            self.unwritten.fetch_sub(state.replies.len() + state.ordered.len(), Ordering::Relaxed);
        }
        state.replies.clear();
        state.ordered.clear();
        state.reply_bytes = 0;
        let general = state.unread.len() + state.general_frames.len();
        self.peer.load.end(GENERAL * general);
        state.unread.clear();
        state.general_frames.clear();
    }

    /// Count messages that Python has read.
    pub fn read(&self, count: usize) {
        let waker = {
            let mut state = self.state();
            let count = count.min(state.unread.len());
            state.unread.drain(..count);
            self.peer.load.end(GENERAL * count);
            state.waker.take()
        };
        wake(waker);
    }

    #[cfg(test)]
    pub fn for_test() -> Self {
        Self::of_connection(0)
    }

    #[cfg(test)]
    pub fn of_connection(number: u64) -> Self {
        let peer = Arc::new(Peer::numbered(number));
        let method =
            Method { index: 0, streams: false, fast_path: crate::method::FastPath::No, is_open: false };
        Call::new(peer, method, 0.0, f64::INFINITY, Vec::new(), Caller::Anybody, Arc::default())
    }
}

/// Returns the id of the frame that a `StepStreamResponse` completes, if any.
fn answered_frame(message: &[u8]) -> Option<u64> {
    let mut fields = Fields::new(message);
    let (mut frame_id, mut is_last) = (0, false);
    while let Ok(Some((number, value))) = fields.next() {
        match (number, value) {
            (1, Value::Varint(id)) => frame_id = id,
            (9, Value::Varint(last)) => is_last = last != 0,
            _ => {}
        }
    }
    is_last.then_some(frame_id)
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_flag_of_traceparent_shows_whether_a_call_is_traced() {
        let said = |value: &str| {
            let mut call = Call::for_test();
            call.metadata.push(("traceparent".to_owned(), value.as_bytes().to_vec()));
            call.is_traced()
        };
        let of = |flags| format!("00-{}-{}-{flags}", "a".repeat(32), "b".repeat(16));
        assert_eq!(said(&of("01")), Some(true));
        assert_eq!(said(&of("03")), Some(true));
        assert_eq!(said(&of("00")), Some(false));
        for nothing in ["", "00", &of("0"), &of("zz"), &of("\u{e9}")] {
            assert_eq!(said(nothing), None, "{nothing}");
        }
        assert_eq!(Call::for_test().is_traced(), None);
    }

    #[test]
    fn no_reply_waits_for_a_client_that_is_gone() {
        let call = Call::for_test();
        call.reply(Bytes::from_static(b"answered"), None, None);
        assert_eq!(call.unwritten.load(Ordering::Relaxed), 1);
        call.close();
        call.reply(Bytes::from_static(b"answered too late"), Some(3), Some(5));
        call.finish(Bytes::from_static(b"and so was this"));
        assert_eq!(call.unwritten.load(Ordering::Relaxed), 0);
        assert_eq!(call.state().held_bytes(), 0);
    }
}
