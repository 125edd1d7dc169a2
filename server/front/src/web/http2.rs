//! Requests over HTTP/2. Connections and their limits are those of gRPC (`wire::server`).

use crate::calls::service::Service;
use crate::limits::peer::Peer;
use crate::limits::refusals::Refusal;
use crate::web::exchange::{answer, Body, BodyError, Replies};
use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, Request};
use std::future::{poll_fn, Future};
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::time::timeout;

/// A body, with the connection that it comes from.
struct Received {
    stream: RecvStream,
    size: Option<u64>,
    peer: Arc<Peer>,
}

impl Body for Received {
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>> {
        self.stream.poll_data(cx).map(|data| {
            data.map(|data| {
                let data = data.map_err(|_| BodyError::Gone)?; // h2 itself resets a malformed stream
                let _ = self.stream.flow_control().release_capacity(data.len());
                self.peer.quota.read(data.len());
                Ok(data)
            })
        })
    }

    fn announced(&self) -> Option<u64> {
        self.size
    }
}

/// Serve a request in its own task.
pub fn begin(
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
    peer: &Arc<Peer>,
    service: &Arc<Service>,
) {
    tokio::spawn(serve(request, respond, peer.clone(), service.clone()));
}

async fn serve(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    peer: Arc<Peer>,
    service: Arc<Service>,
) {
    let (head, stream) = request.into_parts();
    let mut body = Received { stream, size: size_of(&head.headers), peer: peer.clone() };
    let answered = {
        let mut answering = std::pin::pin!(answer(&head, &mut body, &peer, &service));
        poll_fn(|cx| match answering.as_mut().poll(cx) {
            Poll::Pending => respond.poll_reset(cx).map(|_| None),
            answered => answered,
        })
        .await
    };
    let Some((head, replies)) = answered else { return };
    let Ok(mut out) = respond.send_response(head, false) else { return };
    if let Err(reason) = write(&mut out, replies, &service).await {
        out.send_reset(reason);
    }
}

/// Write an answer as the client makes room for it. Err: it must be cut off.
async fn write(out: &mut SendStream<Bytes>, mut replies: Replies, service: &Service) -> Result<(), Reason> {
    loop {
        let next = poll_fn(|cx| match replies.poll_next(cx) {
            Poll::Pending => out.poll_reset(cx).map(|_| Err(Reason::CANCEL)),
            next => next.map(Ok),
        });
        match next.await? {
            Some(part) => write_part(out, part, service).await?,
            None => return out.send_data(Bytes::new(), true).map_err(|_| Reason::CANCEL),
        }
    }
}

async fn write_part(out: &mut SendStream<Bytes>, mut part: Bytes, service: &Service) -> Result<(), Reason> {
    while !part.is_empty() {
        out.reserve_capacity(part.len());
        if out.capacity() == 0 {
            let room = poll_fn(|cx| match out.poll_capacity(cx) {
                Poll::Pending => out.poll_reset(cx).map(|_| false),
                room => room.map(|room| matches!(room, Some(Ok(_)))),
            });
            match timeout(service.bounds.limits.unread, room).await {
                Ok(true) => {}
                Ok(false) => return Err(Reason::CANCEL),
                Err(_) => {
                    service.bounds.counts.refuse(Refusal::UnreadReplies);
                    return Err(Reason::ENHANCE_YOUR_CALM);
                }
            }
        }
        let size = out.capacity().min(part.len());
        out.send_data(part.split_to(size), false).map_err(|_| Reason::CANCEL)?;
    }
    Ok(())
}

fn size_of(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
