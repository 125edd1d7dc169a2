//! One request and its answer, over either version of HTTP. Python serves the request as a call with headers and a body.

use crate::calls::answers::{Door, HttpAnswer};
use crate::calls::serve::keep_waker;
use crate::calls::serve::receive::Coming;
use crate::calls::service::Service;
use crate::clock;
use crate::limits::bounds::{CallPlace, Held};
use crate::limits::callers::Caller;
use crate::limits::load::{Place, GENERAL};
use crate::limits::peer::Peer;
use crate::limits::places::Pool;
use crate::limits::refusals::Refusal;
use crate::messages::grpc;
use crate::steps::call::Call;
use crate::steps::columns::{Arrival, Arrivals};
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, TRANSFER_ENCODING};
use http::request::Parts;
use http::Response;
use std::future::{poll_fn, Future};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{sleep, Sleep};

/// Approximate memory of a request, whatever its client sends.
const REQUEST_BYTES: usize = 8 << 10;

/// The body of a request.
pub trait Body {
    /// Returns the next data; None at the end.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>>;
    /// The size that the client has announced.
    fn announced(&self) -> Option<u64>;
}

/// Why a body cannot be read.
pub enum BodyError {
    /// The client has gone.
    Gone,
    /// It breaks the rules of HTTP.
    Malformed,
}

/// A request or an answer that cannot be completed.
#[derive(Debug)]
pub struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("the exchange was cut off")
    }
}

impl std::error::Error for Broken {}

/// Why a request has no answer from Python.
enum Early {
    Refused(Box<HttpAnswer>),
    /// The client has gone.
    Gone,
}

/// Serve a request. Returns the head of the answer, and its body; None: the client has gone.
///
/// If the client goes, drop the future or the body: Python's task is then cancelled.
pub async fn answer(
    head: &Parts,
    body: &mut impl Body,
    peer: &Arc<Peer>,
    service: &Arc<Service>,
) -> Option<(Response<()>, Replies)> {
    let door = service.door.get()?;
    let refused = match Exchange::new(head, peer, service, door) {
        Ok(mut exchange) => match exchange.run(body, door).await {
            Ok(head) => return Some((*head, Replies::Of(Box::new(exchange)))),
            Err(refused) => refused,
        },
        Err(refused) => refused,
    };
    match refused {
        Early::Refused(answer) => Some((answer.head, Replies::Whole(Some(answer.body)))),
        Early::Gone => None,
    }
}

/// A request that is served.
pub struct Exchange {
    call: Arc<Call>,
    service: Arc<Service>,
    held: Held,
    header_bytes: usize,
    call_place: CallPlace,
    /// Ends it at its deadline.
    timer: Option<Pin<Box<Sleep>>>,
    /// Its waiting place for the connection, and its share of the connection's running steps.
    place: Place,
    steps: usize,
    /// Its places among the requests that Python authenticates: of the connection, and of all.
    judging: Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)>,
    is_admitted: bool,
    /// Whether Python knows of it.
    is_known: bool,
    /// Whether its answer is complete.
    is_done: bool,
    /// Number of events in the answer so far, and whether it ended at its deadline.
    events: u64,
    is_late: bool,
    /// Size of a part of the answer that was handed out, of which Python has not been notified.
    unreported: usize,
}

impl Exchange {
    fn new(head: &Parts, peer: &Arc<Peer>, service: &Arc<Service>, door: &Door) -> Result<Self, Early> {
        let (headers, bounds) = (&head.headers, &service.bounds);
        let target = head.uri.path_and_query().map_or("", |target| target.as_str());
        let header_bytes = grpc::size(target, headers);
        if header_bytes > bounds.limits.header_bytes {
            bounds.counts.refuse(Refusal::Headers);
            return Err(refused(&door.headers_too_large));
        }
        if headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH) {
            bounds.counts.refuse(Refusal::Protocol);
            return Err(refused(&door.two_lengths));
        }
        let caller = Caller::of_call(headers, peer.certificate(), service.callers.as_ref());
        let is_admitted = caller.is_known(service.callers.as_ref());
        let pool = if is_admitted { Pool::Known } else { Pool::Unknown };
        let share = caller.share().filter(|_| is_admitted);
        let Some(call_place) = CallPlace::take(bounds, &peer.load.share, share.clone(), pool) else {
            bounds.counts.refuse(pool.refusal());
            return Err(refused(&door.overloaded));
        };
        let held = Held::new(bounds, &peer.load.share, share, header_bytes + REQUEST_BYTES);
        if held.may_not_begin() {
            bounds.counts.refuse(Refusal::Memory);
            return Err(refused(&door.overloaded));
        }
        let started = clock::now();
        let Ok(left) = grpc::timeout(headers) else { return Err(refused(&door.bad_timeout)) };
        let deadline = left.map_or(f64::INFINITY, |left| started + left.as_secs_f64());
        if is_admitted {
            peer.know();
        }
        let unwritten = service.unwritten.clone();
        let call = Call::new(peer.clone(), door.method, started, deadline, metadata(head), caller, unwritten);
        Ok(Exchange {
            call: Arc::new(call),
            service: service.clone(),
            header_bytes: held.bytes(),
            held,
            call_place,
            timer: left.map(|left| Box::pin(sleep(left))),
            place: Place::default(),
            steps: 0,
            judging: None,
            is_admitted,
            is_known: false,
            is_done: false,
            events: 0,
            is_late: false,
            unreported: 0,
        })
    }

    /// Returns the head of Python's answer.
    async fn run(&mut self, body: &mut impl Body, door: &Door) -> Result<Box<Response<()>>, Early> {
        if !self.is_admitted {
            if let Some(head) = self.admit(door).await? {
                return Ok(head);
            }
        }
        let body = self.receive(body, door).await?;
        poll_fn(|cx| self.poll_may_begin(cx, door)).await?;
        self.begin_general();
        let arrival = Arrival::Call(self.call.clone(), Some(body));
        self.is_known = self.service.queue.push_unless(Arrivals::has_many_calls, arrival);
        if !self.is_known {
            return Err(self.overloaded(Refusal::Calls, door));
        }
        poll_fn(|cx| self.poll_head(cx, door)).await
    }

    /// Let Python authenticate the caller. Few requests ask at a time, per connection and in total. Returns the head of
    /// an answer if Python refuses the request.
    async fn admit(&mut self, door: &Door) -> Result<Option<Box<Response<()>>>, Early> {
        let (own, all) = (self.call.peer.judging.clone(), self.service.judging.clone());
        let mut places = Box::pin(async move { (own.acquire_owned().await, all.acquire_owned().await) });
        self.judging = poll_fn(|cx| {
            if let Poll::Ready((own, all)) = places.as_mut().poll(cx) {
                return Poll::Ready(Ok(own.ok().zip(all.ok())));
            }
            self.poll_timer(cx, door).map(Err)
        })
        .await?;
        poll_fn(|cx| self.poll_may_begin(cx, door)).await?;
        self.place = Place::default();
        self.begin_general();
        self.service.queue.push(Arrival::Judge(self.call.clone()));
        let head = poll_fn(|cx| {
            if std::mem::take(&mut self.call.state().is_admitted) {
                return Poll::Ready(Ok(None));
            }
            self.poll_head(cx, door).map_ok(Some)
        })
        .await?;
        if head.is_some() {
            return Ok(head);
        }
        self.call.peer.load.end(std::mem::take(&mut self.steps));
        self.judging = None;
        self.call.peer.know();
        let caller = self.call.caller.share();
        self.held.belongs_to(caller.clone());
        match self.call_place.know(caller) {
            true => Ok(None),
            false => Err(self.overloaded(Refusal::Calls, door)),
        }
    }

    /// Returns the whole body.
    async fn receive(&mut self, body: &mut impl Body, door: &Door) -> Result<Bytes, Early> {
        if body.announced().is_some_and(|size| size > door.body_bytes as u64) {
            return Err(refused(&door.body_too_large));
        }
        let (mut found, mut coming) = (BytesMut::new(), Coming::default());
        loop {
            let data = poll_fn(|cx| match body.poll_data(cx) {
                Poll::Ready(data) => Poll::Ready(Ok(data)),
                Poll::Pending => {
                    if coming.poll_late(cx, &self.service.bounds.limits).is_ready() {
                        self.service.bounds.counts.refuse(Refusal::SlowMessage);
                        return Poll::Ready(Err(refused(&door.slow)));
                    }
                    self.poll_timer(cx, door).map(Err)
                }
            });
            let Some(data) = data.await? else { return Ok(found.freeze()) };
            let data = data.map_err(|error| match error {
                BodyError::Gone => Early::Gone,
                BodyError::Malformed => {
                    self.service.bounds.counts.refuse(Refusal::Protocol);
                    refused(&door.malformed)
                }
            })?;
            coming.came(data.len());
            if found.len() + data.len() > door.body_bytes {
                return Err(refused(&door.body_too_large));
            }
            found.extend_from_slice(&data);
            self.held.set(self.header_bytes + found.len());
            if self.held.is_too_much() {
                return Err(self.overloaded(Refusal::Memory, door));
            }
        }
    }

    /// Python has the request until it has answered it.
    fn begin_general(&mut self) {
        self.steps = GENERAL;
        self.call.peer.load.begin(GENERAL);
    }

    fn overloaded(&self, why: Refusal, door: &Door) -> Early {
        self.service.bounds.counts.refuse(why);
        refused(&door.overloaded)
    }

    fn poll_may_begin(&mut self, cx: &mut Context<'_>, door: &Door) -> Poll<Result<(), Early>> {
        if self.call.peer.load.may_begin(cx, &mut self.place) {
            return Poll::Ready(Ok(()));
        }
        self.poll_timer(cx, door).map(Err)
    }

    fn poll_head(&mut self, cx: &mut Context<'_>, door: &Door) -> Poll<Result<Box<Response<()>>, Early>> {
        {
            let mut state = self.call.state();
            if let Some(head) = state.head.take() {
                if state.end.is_none() {
                    // an answer without an end in sight must not keep the connection's other requests waiting
                    self.call.peer.load.end(std::mem::take(&mut self.steps));
                    self.held.set(self.header_bytes);
                }
                return Poll::Ready(Ok(head));
            }
            if state.end.is_some() {
                return Poll::Ready(Err(refused(&door.failed)));
            }
            keep_waker(&mut state.waker, cx);
        }
        self.poll_timer(cx, door).map(Err)
    }

    /// Ready at the deadline.
    fn poll_timer(&mut self, cx: &mut Context<'_>, door: &Door) -> Poll<Early> {
        self.poll_deadline(cx).map(|()| refused(&door.late))
    }

    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(timer) = &mut self.timer else { return Poll::Pending };
        timer.as_mut().poll(cx).map(|()| self.call.set_over(true))
    }

    /// Returns the next part of the answer; None at its end. At the deadline, the last part is the error.
    fn poll_reply(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.is_late {
            return Poll::Ready(None);
        }
        let next = {
            let mut state = self.call.state();
            let next = state.replies.pop_front();
            if let Some((reply, _)) = &next {
                state.reply_bytes -= reply.len(); // from now on it is counted separately
                self.is_done = state.end.is_some() && state.replies.is_empty();
            } else if state.end.is_some() {
                self.is_done = true;
                return Poll::Ready(None);
            } else {
                keep_waker(&mut state.waker, cx);
            }
            next
        };
        if self.unreported > 0 {
            let size = std::mem::take(&mut self.unreported);
            self.service.queue.push(Arrival::Written(self.call.clone(), size));
        }
        let Some((reply, _)) = next else {
            std::task::ready!(self.poll_deadline(cx));
            self.is_late = true;
            return Poll::Ready(self.service.door.get().map(|door| door.late_event(self.events + 1)));
        };
        self.events += u64::from(!reply.starts_with(b":")); // others are comments
        self.unreported = reply.len();
        Poll::Ready(Some(Bytes::from_owner(Sent { reply, call: self.call.clone() })))
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.is_done {
            self.call.set_over(self.call.is_late());
            self.service.queue.abandon();
            if self.is_known {
                self.service.queue.push(Arrival::Ended(self.call.clone()));
            }
        }
        self.call.close();
        self.call.peer.load.end(self.steps);
    }
}

/// A part of an answer, until it is written or dropped.
struct Sent {
    reply: Bytes,
    call: Arc<Call>,
}

impl AsRef<[u8]> for Sent {
    fn as_ref(&self) -> &[u8] {
        &self.reply
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        self.call.written();
    }
}

/// The body of an answer.
pub enum Replies {
    /// One of the front's own; None: it was handed out.
    Whole(Option<Bytes>),
    Of(Box<Exchange>),
}

impl Replies {
    /// Returns the next part; None at the end.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        match self {
            Replies::Whole(body) => Poll::Ready(body.take().filter(|body| !body.is_empty())),
            Replies::Of(exchange) => exchange.poll_reply(cx),
        }
    }
}

fn refused(answer: &HttpAnswer) -> Early {
    Early::Refused(Box::new(answer.clone()))
}

/// The headers of a request for Python, with its method, its target and the host that it names.
fn metadata(head: &Parts) -> Vec<(String, Vec<u8>)> {
    let mut found = grpc::metadata(&head.headers);
    let mut add = |name: &str, value: &[u8]| found.push((name.to_owned(), value.to_vec()));
    add(":method", head.method.as_str().as_bytes());
    add(":path", head.uri.path_and_query().map_or("", |target| target.as_str()).as_bytes());
    if let Some(kind) = head.headers.get(CONTENT_TYPE) {
        add("content-type", kind.as_bytes());
    }
    match head.uri.authority() {
        Some(authority) => add(":authority", authority.as_str().as_bytes()),
        None => head.headers.get_all(HOST).iter().for_each(|host| add(":authority", host.as_bytes())),
    }
    found
}
