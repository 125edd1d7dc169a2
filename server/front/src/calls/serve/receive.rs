//! Receives the messages of a call: once its caller is known, within a time limit, and inflated in slices.

use super::{too_late, unreadable, Early, Message, Served};
use crate::limits::load::{Place, GENERAL};
use crate::limits::refusals::Refusal;
use crate::limits::settings::Limits;
use crate::messages::grpc::{self, Status, Unreadable, Whole};
use crate::messages::inflate::{Inflation, Problem};
use crate::steps::columns::Arrival;
use bytes::Bytes;
use h2::server::SendResponse;
use std::future::{poll_fn, Future};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{sleep_until, Instant, Sleep};

/// Measures how long a message takes to arrive. It costs nothing without waiting.
#[derive(Default)]
pub struct Coming {
    /// Time at which the waiting started, and of the latest data.
    since: Option<(Instant, Instant)>,
    bytes: usize,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Coming {
    /// Some data has arrived.
    pub fn came(&mut self, bytes: usize) {
        if let Some((_, latest)) = &mut self.since {
            *latest = Instant::now();
            self.bytes += bytes;
        }
    }

    /// The message is complete, or nobody waits for it. The next one has its own time.
    pub fn restart(&mut self) {
        self.since = None;
        self.bytes = 0;
    }

    /// Ready when the message takes too long: no data for a time, or too little since its start.
    pub fn poll_late(&mut self, cx: &mut Context<'_>, limits: &Limits) -> Poll<()> {
        let (began, latest) = *self.since.get_or_insert_with(|| (Instant::now(), Instant::now()));
        let in_all = limits.receive + limits.receive_time(self.bytes);
        let end = (latest + limits.receive).min(began + in_all);
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(end)));
        if timer.deadline() != end {
            timer.as_mut().reset(end);
        }
        timer.as_mut().poll(cx)
    }
}

impl Limits {
    /// The time that this many bytes of a message may take.
    fn receive_time(&self, bytes: usize) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.receive_bytes_per_s as f64)
    }
}

impl Served {
    /// Return when the caller of a unary call is admitted. No message is read before.
    pub(super) async fn admit(&mut self, respond: &mut SendResponse<Bytes>) -> Result<(), Early> {
        if self.is_admitted {
            return Ok(());
        }
        self.await_judge(|cx| respond.poll_reset(cx).is_ready()).await?;
        poll_fn(|cx| self.poll_may_begin(cx, respond)).await?;
        self.place = Place::default();
        self.begin_general();
        self.service.queue.push(Arrival::Judge(self.call.clone()));
        poll_fn(|cx| self.poll_admitted(cx, respond)).await?;
        self.end_general();
        self.admitted()
    }

    /// Return when Python may be asked to authenticate the call. Few calls ask at a time, per connection and in total.
    pub(super) async fn await_judge(
        &mut self,
        mut is_gone: impl FnMut(&mut Context<'_>) -> bool,
    ) -> Result<(), Early> {
        let (own, all) = (self.call.peer.judging.clone(), self.service.judging.clone());
        let mut places = Box::pin(async move { (own.acquire_owned().await, all.acquire_owned().await) });
        poll_fn(|cx| {
            if let Poll::Ready((own, all)) = places.as_mut().poll(cx) {
                self.judging = own.ok().zip(all.ok());
                return Poll::Ready(Ok(()));
            }
            if is_gone(cx) {
                return Poll::Ready(Err(Early::Gone));
            }
            self.poll_timer(cx).map(|()| Err(Early::Late))
        })
        .await
    }

    fn poll_admitted(
        &mut self,
        cx: &mut Context<'_>,
        respond: &mut SendResponse<Bytes>,
    ) -> Poll<Result<(), Early>> {
        {
            let mut state = self.call.state();
            if state.is_admitted {
                return Poll::Ready(Ok(()));
            }
            if let Some(status) = state.end.take() {
                return Poll::Ready(Err(Early::Status(status)));
            }
            super::keep_waker(&mut state.waker, cx);
        }
        if respond.poll_reset(cx).is_ready() {
            return Poll::Ready(Err(Early::Gone));
        }
        self.poll_timer(cx).map(|()| Err(Early::Late))
    }

    /// Ready when the connection may run one more step.
    pub(super) fn poll_may_begin(
        &mut self,
        cx: &mut Context<'_>,
        respond: &mut SendResponse<Bytes>,
    ) -> Poll<Result<(), Early>> {
        if self.call.peer.load.may_begin(cx, &mut self.place) {
            return Poll::Ready(Ok(()));
        }
        if respond.poll_reset(cx).is_ready() {
            return Poll::Ready(Err(Early::Gone));
        }
        self.poll_timer(cx).map(|()| Err(Early::Late))
    }

    /// Python has the call's only message until it has answered it.
    pub(super) fn begin_general(&mut self) {
        self.steps = GENERAL;
        self.call.peer.load.begin(GENERAL);
    }

    pub(super) fn end_general(&mut self) {
        self.call.peer.load.end(std::mem::take(&mut self.steps));
    }

    /// Its caller is known now.
    pub(super) fn admitted(&mut self) -> Result<(), Early> {
        self.is_admitted = true;
        self.judging = None;
        self.call.peer.know();
        let caller = self.call.caller.share();
        self.held.belongs_to(caller.clone());
        if self.call_place.know(caller) {
            return Ok(());
        }
        Err(self.overloaded(Refusal::Calls))
    }

    /// Returns the only message of the call; or its size, if it is larger than any may be.
    pub(super) async fn only_message(&mut self) -> Result<Result<Whole, usize>, Early> {
        let one = || Early::Status(Status::new(grpc::INTERNAL, "a unary call must have one request"));
        let mut found: Option<Whole> = None;
        while let Some(data) = poll_fn(|cx| self.poll_data(cx)).await? {
            self.messages.push(data);
            match self.messages.next() {
                Ok(Some(message)) if found.is_none() => found = Some(message),
                Ok(None) => {}
                Ok(Some(_)) => return Err(one()),
                Err(Unreadable::TooLarge(size)) => return Ok(Err(size)),
                Err(problem) => return Err(Early::Status(unreadable(&problem))),
            }
            let held = found.as_ref().map_or(0, |message| message.bytes.len()) + self.messages.size();
            self.require_room(held)?;
        }
        match found {
            Some(message) if !self.messages.is_cut_off() => Ok(Ok(message)),
            _ => Err(one()),
        }
    }

    /// Returns the next data of a call that is not answered; None at its end.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Early>> {
        match self.body.poll_data(cx) {
            Poll::Ready(Some(Ok(data))) => {
                self.came(&data);
                Poll::Ready(Ok(Some(data)))
            }
            Poll::Ready(Some(Err(_))) => Poll::Ready(Err(Early::Gone)),
            Poll::Ready(None) => Poll::Ready(Ok(None)),
            Poll::Pending => self.poll_coming(cx).map(Err),
        }
    }

    /// Data of a message has arrived, and makes room for more.
    pub(super) fn came(&mut self, data: &Bytes) {
        let _ = self.body.flow_control().release_capacity(data.len());
        self.call.peer.quota.read(data.len());
        self.coming.came(data.len());
    }

    /// Wait for more of a message.
    pub(super) fn poll_coming(&mut self, cx: &mut Context<'_>) -> Poll<Early> {
        if self.coming.poll_late(cx, &self.service.bounds.limits).is_ready() {
            self.service.bounds.counts.refuse(Refusal::SlowMessage);
            return Poll::Ready(Early::Status(slow(&self.service.bounds.limits)));
        }
        self.poll_timer(cx).map(|()| Early::Late)
    }

    /// Returns an inflated message. `is_gone`: nobody waits for it any more.
    pub(super) async fn inflated(
        &mut self,
        message: Whole,
        mut is_gone: impl FnMut(&mut Context<'_>) -> bool,
    ) -> Result<Message, Early> {
        let Some(encoding) = message.compressed else { return Ok(Message::Whole(message.bytes)) };
        let begun =
            Inflation::new(message.bytes, encoding, self.service.bounds.limits.message_bytes_of(self.method));
        let mut inflation = match begun {
            Ok(inflation) => inflation,
            Err(problem) => return self.refuse_inflation(problem),
        };
        let (service, peer) = (self.service.clone(), self.call.peer.clone());
        // a small one is inflated at once, while there is time
        let mut found = Ok(None);
        if service.pace.has_time() {
            found = service.pace.spending(|| inflation.piece());
        }
        // one message of a connection at a time, one slice of all of them at a time
        let own = if matches!(found, Ok(None)) { Some(peer.inflating.lock().await) } else { None };
        loop {
            match found {
                Ok(None) => {}
                Ok(Some(message)) => return Ok(Message::Whole(message)),
                Err(problem) => {
                    drop(own);
                    return self.refuse_inflation(problem);
                }
            }
            let others = self.messages.size() + self.call.state().held_bytes();
            self.require_room(others + inflation.size())?;
            let early = poll_fn(|cx| {
                if is_gone(cx) {
                    return Poll::Ready(Some(Early::Gone));
                }
                Poll::Ready(self.poll_timer(cx).is_ready().then_some(Early::Late))
            });
            if let Some(early) = early.await {
                return Err(early);
            }
            let lane = service.pace.slot().await;
            found = service.pace.spending(|| inflation.slice());
            drop(lane);
        }
    }

    fn refuse_inflation(&self, problem: Problem) -> Result<Message, Early> {
        self.service.bounds.counts.refuse(Refusal::Compressed);
        match problem {
            Problem::TooLarge(size) => Ok(Message::TooLarge(size)),
            problem => Err(Early::Status(Status::new(grpc::INVALID_ARGUMENT, &problem.to_string()))),
        }
    }

    fn overloaded(&self, why: Refusal) -> Early {
        self.service.bounds.counts.refuse(why);
        Early::Status(self.service.bounds.limits.overloaded.clone())
    }
}

fn slow(limits: &Limits) -> Status {
    let text = format!(
        "a message must come without a pause of more than {} s, and at {} bytes a second or faster after the first {} s",
        limits.receive.as_secs_f64(),
        limits.receive_bytes_per_s,
        limits.receive.as_secs_f64(),
    );
    Status { message: text, ..too_late() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{advance, timeout};

    async fn is_late(coming: &mut Coming, limits: &Limits) -> bool {
        timeout(Duration::ZERO, poll_fn(|cx| coming.poll_late(cx, limits))).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_may_not_pause_for_long() {
        let limits = Limits::for_test(); // 1 s, 1024 bytes a second
        let mut coming = Coming::default();
        coming.came(1 << 30);
        assert!(!is_late(&mut coming, &limits).await);
        coming.came(1 << 30);
        advance(Duration::from_millis(900)).await;
        assert!(!is_late(&mut coming, &limits).await);
        advance(Duration::from_millis(200)).await;
        assert!(is_late(&mut coming, &limits).await);
        coming.restart();
        assert!(!is_late(&mut coming, &limits).await, "the next one has its own time");
    }

    #[tokio::test(start_paused = true)]
    async fn a_drip_ends_and_a_slow_client_goes_on() {
        let limits = Limits::for_test();
        for (bytes, most) in [(1, Some(2)), (1024, None)] {
            let mut coming = Coming::default();
            assert!(!is_late(&mut coming, &limits).await);
            let mut late = None;
            for half in 1..100 {
                advance(Duration::from_millis(500)).await;
                if is_late(&mut coming, &limits).await {
                    late = Some(half);
                    break;
                }
                coming.came(bytes / 2 + 1);
            }
            assert_eq!(
                late.map(|half| half <= most.unwrap_or(0) + 1),
                most.map(|_| true),
                "{bytes}: {late:?}"
            );
        }
    }
}
