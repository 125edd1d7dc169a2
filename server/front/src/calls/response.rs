//! The response side of a call. Headers are sent with the first reply; a call without a reply ends in its headers.

use crate::calls::admission::refuse;
use crate::messages::grpc::{self, Status};
use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, SendStream};
use std::task::{Context, Poll};

pub enum Response {
    /// Nothing is sent yet.
    Silent(SendResponse<Bytes>),
    Begun(SendStream<Bytes>),
}

impl Response {
    /// Returns the stream for replies; None: the client has left.
    pub fn begin(&mut self) -> Option<&mut SendStream<Bytes>> {
        if let Response::Silent(respond) = self {
            *self = Response::Begun(respond.send_response(grpc::reply_headers(), false).ok()?);
        }
        match self {
            Response::Silent(_) => None,
            Response::Begun(out) => Some(out),
        }
    }

    /// Ready when the client has cancelled.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<Result<Reason, h2::Error>> {
        match self {
            Response::Silent(respond) => respond.poll_reset(cx),
            Response::Begun(out) => out.poll_reset(cx),
        }
    }

    /// Send the status that ends the call.
    pub fn end(&mut self, status: &Status) {
        match self {
            Response::Silent(respond) => refuse(respond, status),
            Response::Begun(out) => {
                let _ = out.send_trailers(status.trailers());
            }
        }
    }

    /// Cut it off.
    pub fn cut_off(&mut self, reason: Reason) {
        match self {
            Response::Silent(respond) => respond.send_reset(reason),
            Response::Begun(out) => out.send_reset(reason),
        }
    }
}
