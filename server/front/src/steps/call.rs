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

/// A call on its way.
#[derive(Debug)]
pub struct Call {
    pub peer: Arc<Peer>,
    /// Index of its method; the last one is "no such method".
    pub method: usize,
    pub streams: bool,
    /// Seconds on the monotonic clock; infinity if it has none.
    pub deadline: f64,
    pub metadata: Vec<(String, Vec<u8>)>,
    pub whose: Caller,
    /// When it began, seconds on the monotonic clock.
    pub started: f64,
    is_over: AtomicBool,
    is_late: AtomicBool,
    state: Mutex<State>,
    /// Replies of all calls that are not on their way.
    unwritten: Arc<AtomicUsize>,
}

/// What the task that serves the call looks at when it is woken.
#[derive(Debug, Default)]
pub struct State {
    /// Framed replies, and how many bytes of fast-path frames are done with when they are written; None: Python's own.
    pub replies: VecDeque<Reply>,
    /// Those of a stream whose replies leave in the order of its messages.
    pub ordered: ReplyOrder,
    /// Bytes of replies that wait.
    pub reply_bytes: usize,
    pub end: Option<Status>,
    /// Nothing is sent any more: its task has ended.
    is_closed: bool,
    /// Ids of fast-path frames that are not answered.
    pub frames: HashSet<u64>,
    /// Ids of frames that Python was handed and has not answered.
    pub general_frames: HashSet<u64>,
    /// Bytes of fast-path frames that are not answered.
    pub held: usize,
    /// Sizes of messages that were handed to Python, which has not looked at them.
    pub unread: VecDeque<usize>,
    /// Python knows who makes it, and that this caller may.
    pub is_admitted: bool,
    pub waker: Option<Waker>,
}

impl State {
    /// Bytes of a stream's messages, from when they have come whole until they are done with.
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
        whose: Caller,
        unwritten: Arc<AtomicUsize>,
    ) -> Self {
        Call {
            peer,
            method: method.index,
            streams: method.streams,
            deadline,
            metadata,
            whose,
            started,
            is_over: AtomicBool::new(false),
            is_late: AtomicBool::new(false),
            state: Mutex::new(State::default()),
            unwritten,
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        // what a panic left behind is at worst a call of one client
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its client says that it is traced; None: it says nothing of it.
    ///
    /// That is the last bit of W3C's `traceparent`: version, trace, span and flags in hexadecimal, with dashes between.
    pub fn is_traced(&self) -> Option<bool> {
        let (_, said) = self.metadata.iter().rfind(|(key, _)| key == "traceparent")?;
        let flags = std::str::from_utf8(said.get(53..55)?).ok()?;
        Some(u8::from_str_radix(flags, 16).ok()? & 1 == 1)
    }

    /// Nobody waits for it any more.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// It is over because its time was.
    pub fn is_late(&self) -> bool {
        self.is_late.load(Ordering::Relaxed)
    }

    pub fn set_over(&self, late: bool) {
        self.is_late.store(late, Ordering::Relaxed);
        self.is_over.store(true, Ordering::Relaxed);
    }

    /// Send a framed reply; `frame_id` is that of the fast-path frame that it is the last part of.
    pub fn reply(&self, framed: Bytes, frame_id: Option<u64>, held: Option<usize>) {
        let waker = {
            let mut state = self.state();
            if let Some(id) = frame_id {
                state.frames.remove(&id);
            }
            if state.is_closed {
                return; // its client has left, and nobody shall wait until it is written
            }
            state.reply_bytes += framed.len();
            self.unwritten.fetch_add(1, Ordering::Relaxed);
            state.replies.push_back((framed, held));
            state.waker.take()
        };
        wake(waker);
    }

    /// Send the framed reply to a message when those before it have theirs.
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

    /// Python gets a message of a stream, and says when it has looked at it.
    pub fn hand_over(&self, state: &mut State, size: usize) {
        state.unread.push_back(size);
        self.peer.load.begin(GENERAL);
    }

    /// Send a reply that Python has made; `number` is that of the message which it is for, where their order counts.
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

    /// The only reply of a call that does not stream, and its end.
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

    /// Python knows who makes it.
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

    /// A reply is on its way, or nobody will have it.
    pub fn written(&self) {
        self.unwritten.fetch_sub(1, Ordering::Relaxed);
    }

    /// Its task has ended: what is not written is given up, and so is what comes.
    pub fn close(&self) {
        let mut state = self.state();
        state.is_closed = true;
        self.unwritten.fetch_sub(state.replies.len() + state.ordered.len(), Ordering::Relaxed);
        state.replies.clear();
        state.ordered.clear();
        state.reply_bytes = 0;
        let general = state.unread.len() + state.general_frames.len();
        self.peer.load.end(GENERAL * general);
        state.unread.clear();
        state.general_frames.clear();
    }

    /// Python has looked at so many messages.
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

/// The id of the frame that a `StepStreamResponse` is the last part for.
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
    fn a_client_says_in_the_last_flag_whether_a_call_is_traced() {
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
    fn nobody_waits_for_replies_to_who_has_gone() {
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
