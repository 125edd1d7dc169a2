//! The half of a call that answers it: headers leave with the first reply, so that what ends without one ends in them.

use crate::calls::begin::refuse;
use crate::messages::grpc::{self, Status};
use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, SendStream};
use std::task::{Context, Poll};

pub enum Answering {
    /// Nothing is said yet.
    Silent(SendResponse<Bytes>),
    Begun(SendStream<Bytes>),
}

impl Answering {
    /// Where replies are written; None: the client is gone.
    pub fn begin(&mut self) -> Option<&mut SendStream<Bytes>> {
        if let Answering::Silent(respond) = self {
            *self = Answering::Begun(respond.send_response(grpc::reply_headers(), false).ok()?);
        }
        match self {
            Answering::Silent(_) => None,
            Answering::Begun(out) => Some(out),
        }
    }

    /// Ready when the client has given up.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<Result<Reason, h2::Error>> {
        match self {
            Answering::Silent(respond) => respond.poll_reset(cx),
            Answering::Begun(out) => out.poll_reset(cx),
        }
    }

    /// Say how the call ends.
    pub fn end(&mut self, status: &Status) {
        match self {
            Answering::Silent(respond) => refuse(respond, status),
            Answering::Begun(out) => {
                let _ = out.send_trailers(status.trailers());
            }
        }
    }

    /// Cut it off.
    pub fn cut_off(&mut self, reason: Reason) {
        match self {
            Answering::Silent(respond) => respond.send_reset(reason),
            Answering::Begun(out) => out.send_reset(reason),
        }
    }
}
