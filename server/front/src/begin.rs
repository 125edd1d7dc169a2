//! Whether a call that begins is served: its headers say enough, and not too much, and there is room for it.

use crate::bounds::{Refusal, Slot};
use crate::clock;
use crate::grpc::{self, Encoding, NoTimeout, Status};
use crate::server::{Method, Shared};
use bytes::Bytes;
use h2::server::SendResponse;
use h2::RecvStream;
use std::sync::Arc;

/// What the headers of a call say, and its place among all calls.
pub struct Begun {
    pub method: Method,
    pub encoding: Encoding,
    /// Seconds on the monotonic clock.
    pub started: f64,
    /// The same; infinity if it has none.
    pub deadline: f64,
    pub header_bytes: usize,
    pub slot: Slot,
}

/// A call that is served; None: it has had its answer.
pub fn admitted(
    request: &http::Request<RecvStream>,
    respond: &mut SendResponse<Bytes>,
    shared: &Arc<Shared>,
) -> Option<Begun> {
    let (headers, limits) = (request.headers(), &shared.limits);
    let is_grpc = headers
        .get(http::header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    if request.method() != http::Method::POST || !is_grpc {
        let mut response = http::Response::new(());
        *response.status_mut() = http::StatusCode::UNSUPPORTED_MEDIA_TYPE;
        let _ = respond.send_response(response, true);
        return None;
    }
    let path = request.uri().path_and_query().map_or("", |path| path.as_str());
    let header_bytes = grpc::size(path, headers);
    if header_bytes > limits.header_bytes {
        shared.counts.refuse(Refusal::Headers);
        refuse(respond, &limits.headers_too_large);
        return None;
    }
    let Some(slot) = Slot::take(shared, |counts| &counts.calls, 1, limits.calls) else {
        shared.counts.refuse(Refusal::Calls);
        refuse(respond, &limits.overloaded);
        return None;
    };
    let Some(method) = shared.methods.get(path).copied() else {
        refuse(respond, &Status::new(grpc::UNIMPLEMENTED, "Method not found!"));
        return None;
    };
    let Some(encoding) = Encoding::of(headers) else {
        let status = Status::new(grpc::UNIMPLEMENTED, "grpc-encoding must be identity, gzip or deflate");
        let mut response = grpc::status_only(&status);
        let known = http::HeaderValue::from_static("identity,gzip,deflate");
        response.headers_mut().insert("grpc-accept-encoding", known);
        let _ = respond.send_response(response, true);
        return None;
    };
    let started = clock::now();
    let deadline = match grpc::timeout(headers) {
        Ok(left) => left.map_or(f64::INFINITY, |left| started + left.as_secs_f64()),
        Err(NoTimeout) => {
            refuse(respond, &Status::new(grpc::INTERNAL, "Error parsing 'grpc-timeout' metadata"));
            return None;
        }
    };
    Some(Begun { method, encoding, started, deadline, header_bytes, slot })
}

/// End a call without a reply.
pub fn refuse(respond: &mut SendResponse<Bytes>, status: &Status) {
    let _ = respond.send_response(grpc::status_only(status), true);
}
