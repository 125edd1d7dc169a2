//! One call: reads its messages, writes its replies, and reports its end.

use crate::calls::admission::{self, refuse};
use crate::calls::response::Response;
use crate::calls::service::Service;
use crate::clock;
use crate::limits::bounds::{counted, CallPlace, Held};
use crate::limits::load::{Place, GENERAL};
use crate::limits::peer::Peer;
use crate::limits::refusals::Refusal;
use crate::messages::grpc::{self, Messages, Status, Unreadable, Whole};
use crate::messages::protobuf::SlowPath;
use crate::method::{FastPath, Method};
use crate::steps::call::Call;
use crate::steps::columns::{Arrival, Arrivals};
use crate::steps::parse::Step;
use crate::triton::request;
use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use std::future::{poll_fn, Future};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{sleep, timeout, Sleep};

pub mod receive;

/// Limit of messages that Python has not read, at which reading pauses.
const MAX_UNREAD: usize = 16;

pub fn begin(
    request: http::Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    peer: &Arc<Peer>,
    service: &Arc<Service>,
) {
    let Some(begun) = admission::admitted(&request, &mut respond, peer, service) else { return };
    if begun.is_admitted && !begun.method.is_open {
        peer.know();
    }
    let (method, deadline, header_bytes) = (begun.method, begun.deadline, begun.held.bytes());
    let metadata = grpc::metadata(request.headers());
    let call = Arc::new(Call::new(
        peer.clone(),
        method,
        begun.started,
        deadline,
        metadata,
        begun.caller,
        service.unwritten.clone(),
    ));
    let served = Served {
        call,
        method,
        service: service.clone(),
        body: request.into_body(),
        messages: Messages::new(begun.encoding, service.bounds.limits.message_bytes_of(method)),
        timer: clock::until(deadline).map(|left| Box::pin(sleep(left))),
        coming: receive::Coming::default(),
        held: begun.held,
        header_bytes,
        steps: 0,
        place: Place::default(),
        reading: Place::default(),
        call_place: begun.place,
        judging: None,
        is_admitted: begun.is_admitted,
        must_begin: method.is_open,
        is_known: false,
        is_deaf: false,
        is_writing: false,
    };
    // two kinds of tasks: one for both would be as large as both
    if method.streams {
        tokio::spawn(served.stream(respond));
    } else {
        tokio::spawn(served.unary(respond));
    }
}

/// A call that is served.
struct Served {
    call: Arc<Call>,
    method: Method,
    service: Arc<Service>,
    body: RecvStream,
    messages: Messages,
    /// Ends the call at its deadline.
    timer: Option<std::pin::Pin<Box<Sleep>>>,
    /// Ends the call if a message takes too long to arrive.
    coming: receive::Coming,
    /// Bytes of the call in memory, from its start to its end.
    held: Held,
    header_bytes: usize,
    /// Its share of the connection's running steps, if Python has its whole message.
    steps: usize,
    /// Its waiting places for the connection, and for Python.
    place: Place,
    reading: Place,
    /// Among all calls.
    call_place: CallPlace,
    /// Its places among the calls that Python authenticates: of the connection, and of all.
    judging: Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)>,
    /// Whether its caller is admitted, or the method needs no authentication.
    is_admitted: bool,
    /// Whether its first message must arrive in time, because everybody may make such a call.
    must_begin: bool,
    /// Whether Python knows of the call.
    is_known: bool,
    /// Whether reading has ended, because Python is about to end the call.
    is_deaf: bool,
    /// A reply that is partly written.
    is_writing: bool,
}

/// The next event of a stream.
enum Next {
    Write(Bytes, Option<usize>),
    End(Status),
    Data(Bytes),
    /// A complete message.
    Message,
    HalfClosed,
}

/// The end of a call before its answer.
enum Early {
    Status(Status),
    Gone,
    Late,
}

impl Served {
    async fn unary(mut self, mut respond: SendResponse<Bytes>) {
        let early = match self.answer(&mut respond).await {
            Ok(reply) => {
                let writing = Writing(self.call.clone());
                let mut out = Response::Silent(respond);
                self.held.set(0);
                match self.write(&mut out, reply, writing).await {
                    Ok(()) => out.end(&Status::ok()),
                    Err(early) => self.end_early(&mut out, early),
                }
                return;
            }
            Err(early) => early,
        };
        match early {
            Early::Status(status) => refuse(&mut respond, &status),
            Early::Gone => self.abandon(false),
            Early::Late => {
                self.abandon(true);
                refuse(&mut respond, &too_late());
            }
        }
    }

    async fn answer(&mut self, respond: &mut SendResponse<Bytes>) -> Result<Bytes, Early> {
        self.admit(respond).await?;
        let message = self.only_message().await?;
        poll_fn(|cx| self.poll_may_begin(cx, respond)).await?;
        let message = match message {
            Ok(Whole { bytes, compressed: None }) => Message::Whole(bytes),
            Err(size) => Message::TooLarge(size),
            // boxed: most calls need no room for it
            Ok(message) => Box::pin(self.inflated(message, |cx| respond.poll_reset(cx).is_ready())).await?,
        };
        self.submit(message)?;
        poll_fn(|cx| self.poll_answer(cx, respond)).await
    }

    fn submit(&mut self, message: Message) -> Result<(), Early> {
        match message {
            Message::Whole(message) if self.take_plain_call(&message) => Ok(()),
            Message::Whole(message) => {
                self.begin_general();
                self.announce(Some(message))
            }
            Message::TooLarge(size) => {
                self.begin_general();
                self.is_known = true;
                self.arrive(Arrival::TooLarge(self.call.clone(), size));
                Ok(())
            }
        }
    }

    /// Pass the call to Python.
    fn announce(&mut self, request: Option<Bytes>) -> Result<(), Early> {
        let call = self.call.clone();
        let arrival = match request.as_ref().and_then(|message| self.service.breach(self.method, message)) {
            Some(breach) => Arrival::Breach(call, breach),
            None => Arrival::Call(call, request),
        };
        self.is_known = self.service.queue.push_unless(Arrivals::has_many_calls, arrival);
        if self.is_known {
            return Ok(());
        }
        self.service.bounds.counts.refuse(Refusal::Calls);
        Err(Early::Status(self.service.bounds.limits.overloaded.clone()))
    }

    fn take_plain_call(&self, message: &Bytes) -> bool {
        if self.service.traces.load(Ordering::Relaxed) && self.call.is_traced() == Some(true) {
            return false;
        }
        let mut session_id = String::new();
        let step = match self.method.fast_path {
            FastPath::Step => self.parse(|| Step::of_request(message)),
            FastPath::Infer => self.parse(|| request::read(message, &mut session_id)),
            _ => Err(SlowPath),
        };
        let Ok(step) = step else { return false };
        self.put_into_columns(None, &step, message.len());
        true
    }

    /// Parse a message as a step of the caller. Err: Python serves it.
    fn parse<'a>(&self, read: impl FnOnce() -> Result<Step<'a>, SlowPath>) -> Result<Step<'a>, SlowPath> {
        if self.service.all_general.load(Ordering::Relaxed) {
            return Err(SlowPath);
        }
        let caller = self.call.caller.taken(self.service.callers.as_ref())?;
        Ok(Step { caller, ..read()? })
    }

    fn put_into_columns(&self, frame_id: Option<u64>, step: &Step<'_>, size: usize) {
        let mut deadline = self.call.deadline;
        if step.timeout_us > 0 {
            deadline = deadline.min(clock::now() + step.timeout_us as f64 / 1e6);
        }
        self.service.queue.push_step(self.call.clone(), frame_id, step, deadline, size);
    }

    fn poll_answer(
        &mut self,
        cx: &mut Context<'_>,
        respond: &mut SendResponse<Bytes>,
    ) -> Poll<Result<Bytes, Early>> {
        {
            let mut state = self.call.state();
            if let Some(status) = state.end.take() {
                let reply = state.replies.pop_front();
                return Poll::Ready(reply.map(|(reply, _)| reply).ok_or(Early::Status(status)));
            }
            keep_waker(&mut state.waker, cx);
        }
        if respond.poll_reset(cx).is_ready() {
            return Poll::Ready(Err(Early::Gone));
        }
        self.poll_timer(cx).map(|()| Err(Early::Late))
    }

    async fn stream(mut self, mut respond: SendResponse<Bytes>) {
        if !self.is_admitted {
            match self.await_judge(|cx| respond.poll_reset(cx).is_ready()).await {
                Err(Early::Late) => return refuse(&mut respond, &too_late()),
                Err(_) => return,
                Ok(()) => {}
            }
        }
        if let Err(Early::Status(status)) = self.announce(None) {
            return refuse(&mut respond, &status);
        }
        let mut out = Response::Silent(respond);
        if let Err(early) = self.serve_stream(&mut out).await {
            self.end_early(&mut out, early);
        }
    }

    async fn serve_stream(&mut self, out: &mut Response) -> Result<(), Early> {
        let mut is_open = true;
        loop {
            match poll_fn(|cx| self.poll_stream(cx, out, is_open)).await? {
                Next::Write(reply, held) => {
                    let size = reply.len();
                    self.write(out, reply, Writing(self.call.clone())).await?;
                    self.coming.restart(); // reading was paused meanwhile
                    self.written(size, held);
                }
                Next::End(status) => {
                    if !self.call.state().frames.is_empty() {
                        self.drop_frames();
                    }
                    out.end(&status);
                    return Ok(());
                }
                Next::Data(data) => {
                    self.came(&data);
                    self.messages.push(data);
                }
                Next::Message => {
                    self.coming.restart();
                    self.take_next(out).await?;
                    if self.call.peer.load.is_busy() {
                        tokio::task::yield_now().await; // alternate between the connection's streams
                    }
                }
                Next::HalfClosed => {
                    is_open = false;
                    self.arrive(Arrival::HalfClosed(self.call.clone()));
                }
            }
            let held = self.messages.size() + self.call.state().held_bytes();
            self.require_room(held)?;
        }
    }

    fn end_early(&mut self, out: &mut Response, early: Early) {
        self.abandon(matches!(early, Early::Late));
        let status = match early {
            // trailers would wait behind the rest of the reply, for which there is no room
            Early::Status(_) if self.is_writing => return out.cut_off(h2::Reason::ENHANCE_YOUR_CALM),
            Early::Late if self.is_writing => return out.cut_off(h2::Reason::CANCEL),
            Early::Status(status) => status,
            Early::Gone => return,
            Early::Late => too_late(),
        };
        out.end(&status);
    }

    /// Count the bytes of the call in memory, and refuse it if calls like it hold too much.
    fn require_room(&mut self, bytes: usize) -> Result<(), Early> {
        self.held.set(self.header_bytes + bytes);
        if self.held.is_too_much() {
            self.service.bounds.counts.refuse(Refusal::Memory);
            return Err(Early::Status(self.service.bounds.limits.overloaded.clone()));
        }
        Ok(())
    }

    fn poll_stream(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut Response,
        is_open: bool,
    ) -> Poll<Result<Next, Early>> {
        if !self.is_admitted && self.call.state().is_admitted {
            if let Err(early) = self.admitted() {
                return Poll::Ready(Err(early));
            }
        }
        let may_read = {
            let mut state = self.call.state();
            if let Some((reply, held)) = state.replies.pop_front() {
                state.reply_bytes -= reply.len(); // from now on it is counted separately
                return Poll::Ready(Ok(Next::Write(reply, held)));
            }
            if state.frames.is_empty() || state.end.as_ref().is_some_and(Status::is_at_once) {
                if let Some(status) = state.end.take() {
                    return Poll::Ready(Ok(Next::End(status)));
                }
            }
            keep_waker(&mut state.waker, cx);
            let limits = &self.service.bounds.limits;
            is_open
                && !self.is_deaf
                && self.is_admitted
                && state.end.is_none()
                && state.unread.len() < MAX_UNREAD
                && state.frames.len() + state.ordered.len() < limits.frames
                && state.held_bytes() < limits.message_bytes
        };
        if may_read
            && self.call.peer.load.may_begin(cx, &mut self.place)
            && self.service.queue.may_read(cx, &mut self.reading)
        {
            if self.messages.has_next() {
                return Poll::Ready(Ok(Next::Message));
            }
            match self.body.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) => return Poll::Ready(Ok(Next::Data(data))),
                Poll::Ready(Some(Err(_))) => return Poll::Ready(Err(Early::Gone)),
                Poll::Ready(None) => return Poll::Ready(Ok(Next::HalfClosed)),
                // a stream may be silent for any time, but not within a message
                Poll::Pending if self.messages.is_cut_off() || self.must_begin => {
                    if let Poll::Ready(early) = self.poll_coming(cx) {
                        return Poll::Ready(Err(early));
                    }
                }
                Poll::Pending => {}
            }
        } else {
            self.coming.restart();
        }
        if out.poll_reset(cx).is_ready() {
            return Poll::Ready(Err(Early::Gone));
        }
        self.poll_timer(cx).map(|()| Err(Early::Late))
    }

    /// Pass on a complete message. Err: the call ends with this.
    async fn take_next(&mut self, out: &mut Response) -> Result<(), Early> {
        let found = match self.messages.next() {
            Ok(Some(Whole { bytes, compressed: None })) => Message::Whole(bytes),
            Ok(Some(message)) => Box::pin(self.inflated(message, |cx| out.poll_reset(cx).is_ready())).await?,
            Ok(None) => return Ok(()),
            Err(Unreadable::TooLarge(size)) => Message::TooLarge(size),
            Err(problem) => return Err(Early::Status(unreadable(&problem))),
        };
        self.must_begin = false;
        match found {
            Message::Whole(message) => self.take_message(message),
            Message::TooLarge(size) => {
                self.arrive(Arrival::TooLarge(self.call.clone(), size));
                self.is_deaf = true; // the rest of it follows
            }
        }
        Ok(())
    }

    fn take_message(&mut self, message: Bytes) {
        let is_ordered = self.method.fast_path == FastPath::InferStream;
        let number = is_ordered.then(|| self.call.state().ordered.number());
        if self.take_plain_message(&message, number) || self.refuse_breach(&message) {
            return;
        }
        if self.method.fast_path == FastPath::StepStream {
            if let Some(frame_id) = Step::frame_id(&message) {
                let mut state = self.call.state();
                if state.frames.contains(&frame_id) || !state.general_frames.insert(frame_id) {
                    drop(state);
                    return self.arrive(Arrival::Duplicate(self.call.clone(), frame_id));
                }
                self.call.peer.load.begin(GENERAL);
            }
        }
        self.call.hand_over(&mut self.call.state(), message.len());
        self.arrive(Arrival::Message(self.call.clone(), message, number));
    }

    /// End a stream if its message breaks a rule. Returns whether it does.
    fn refuse_breach(&mut self, message: &[u8]) -> bool {
        let Some(breach) = self.service.breach(self.method, message) else { return false };
        self.arrive(Arrival::Breach(self.call.clone(), breach));
        self.is_deaf = true;
        true
    }

    /// Put a fast-path message of a stream into columns. Returns whether it was one. `number`: of one of Triton's.
    fn take_plain_message(&self, message: &Bytes, number: Option<u64>) -> bool {
        let (mut session_id, mut frame_id) = (String::new(), 0);
        let step = match self.method.fast_path {
            FastPath::StepStream => self.parse(|| {
                let (id, step) = Step::of_frame(message)?;
                frame_id = id;
                Ok(step)
            }),
            FastPath::InferStream => self.parse(|| request::read(message, &mut session_id)),
            _ => Err(SlowPath),
        };
        let Ok(step) = step else { return false };
        let frame_id = number.unwrap_or(frame_id);
        {
            let mut state = self.call.state();
            if !state.unread.is_empty() || state.end.is_some() {
                return false; // earlier messages have not been read
            }
            if state.general_frames.contains(&frame_id) || !state.frames.insert(frame_id) {
                drop(state);
                self.arrive(Arrival::Duplicate(self.call.clone(), frame_id));
                return true;
            }
            state.held += message.len();
        }
        self.put_into_columns(Some(frame_id), &step, message.len());
        true
    }

    /// Write a reply as the client makes room for it.
    async fn write(&mut self, out: &mut Response, reply: Bytes, _writing: Writing) -> Result<(), Early> {
        let Some(out) = out.begin() else { return Err(Early::Gone) };
        self.is_writing = true;
        let reply = counted(reply, &self.service.bounds, &self.call.peer.load.share);
        self.write_all(out, reply).await?;
        self.is_writing = false;
        Ok(())
    }

    async fn write_all(&mut self, out: &mut SendStream<Bytes>, mut reply: Bytes) -> Result<(), Early> {
        out.reserve_capacity(reply.len());
        if out.capacity() >= reply.len() {
            return out.send_data(reply, false).map_err(|_| Early::Gone);
        }
        loop {
            let room = out.capacity().min(reply.len());
            out.send_data(reply.split_to(room), false).map_err(|_| Early::Gone)?;
            if reply.is_empty() {
                return Ok(());
            }
            out.reserve_capacity(reply.len());
            let unread = self.service.bounds.limits.unread;
            let Ok(room) = timeout(unread, poll_fn(|cx| self.poll_room(cx, out))).await else {
                self.service.bounds.counts.refuse(Refusal::UnreadReplies);
                return Err(Early::Status(self.service.bounds.limits.overloaded.clone()));
            };
            room?;
        }
    }

    fn poll_room(&mut self, cx: &mut Context<'_>, out: &mut SendStream<Bytes>) -> Poll<Result<(), Early>> {
        if out.poll_reset(cx).is_ready() {
            return Poll::Ready(Err(Early::Gone));
        }
        // other replies may come meanwhile
        let held = {
            let mut state = self.call.state();
            keep_waker(&mut state.waker, cx);
            state.held_bytes()
        };
        if let Err(early) = self.require_room(held) {
            return Poll::Ready(Err(early));
        }
        match out.poll_capacity(cx) {
            Poll::Ready(Some(Ok(_))) => Poll::Ready(Ok(())),
            Poll::Ready(_) => Poll::Ready(Err(Early::Gone)),
            Poll::Pending => self.poll_timer(cx).map(|()| Err(Early::Late)),
        }
    }

    fn written(&self, size: usize, held: Option<usize>) {
        {
            let mut state = self.call.state();
            state.held -= held.unwrap_or(0);
        }
        if held.is_none() {
            self.arrive(Arrival::Written(self.call.clone(), size));
        }
    }

    /// Nobody waits for the call's running work any more.
    fn drop_frames(&self) {
        self.call.set_over(false);
        self.service.queue.abandon();
    }

    /// Nobody waits for the call any more.
    fn abandon(&self, late: bool) {
        self.call.set_over(late);
        self.service.queue.abandon();
        if self.is_known {
            self.arrive(Arrival::Ended(self.call.clone()));
        }
    }

    fn arrive(&self, arrival: Arrival) {
        self.service.queue.push(arrival);
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.timer.as_mut().map_or(Poll::Pending, |timer| timer.as_mut().poll(cx))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.call.close();
        self.call.peer.load.end(self.steps);
    }
}

/// A reply that is being written.
struct Writing(Arc<Call>);

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.written();
    }
}

/// The only message of a call.
enum Message {
    Whole(Bytes),
    TooLarge(usize),
}

fn too_late() -> Status {
    Status::new(grpc::DEADLINE_EXCEEDED, "Deadline Exceeded")
}

pub fn keep_waker(kept: &mut Option<std::task::Waker>, cx: &Context<'_>) {
    if !kept.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
        *kept = Some(cx.waker().clone());
    }
}

fn unreadable(problem: &Unreadable) -> Status {
    match problem {
        Unreadable::Encoding => Status::new(grpc::INTERNAL, "a compressed message needs grpc-encoding"),
        _ => Status::new(grpc::INTERNAL, "the request is no gRPC message"),
    }
}
