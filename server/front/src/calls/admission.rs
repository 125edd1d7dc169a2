//! Admits a new call: its headers must be complete and not too large, and there must be room for it.

use crate::calls::service::Service;
use crate::clock;
use crate::limits::bounds::{CallPlace, Held};
use crate::limits::callers::Caller;
use crate::limits::peer::Peer;
use crate::limits::places::Pool;
use crate::limits::refusals::Refusal;
use crate::messages::grpc::{self, Encoding, NoTimeout, Status};
use crate::method::Method;
use bytes::Bytes;
use h2::server::SendResponse;
use h2::RecvStream;
use std::sync::Arc;

/// Approximate memory of a call, whatever its client sends.
const CALL_BYTES: usize = 4 << 10;
/// The same for a call that Python serves from its start.
const STREAM_BYTES: usize = 14 << 10;

/// The headers of a call, and its place among all calls.
pub struct Begun {
    pub method: Method,
    pub encoding: Encoding,
    /// Seconds on the monotonic clock.
    pub started: f64,
    /// The same; infinity if it has none.
    pub deadline: f64,
    pub caller: Caller,
    /// Whether Python need not authenticate its caller.
    pub is_admitted: bool,
    /// Bytes of its headers, and of what is made of it.
    pub held: Held,
    pub place: CallPlace,
}

/// Returns the call to serve; None: it was refused.
pub fn admitted(
    request: &http::Request<RecvStream>,
    respond: &mut SendResponse<Bytes>,
    peer: &Arc<Peer>,
    service: &Service,
) -> Option<Begun> {
    let (headers, bounds) = (request.headers(), &service.bounds);
    let limits = &bounds.limits;
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
        bounds.counts.refuse(Refusal::Headers);
        refuse(respond, &limits.headers_too_large);
        return None;
    }
    let Some(method) = service.methods.get(path).copied() else {
        refuse(respond, &Status::new(grpc::UNIMPLEMENTED, "Method not found!"));
        return None;
    };
    let caller = Caller::of_call(headers, peer.certificate(), service.callers.as_ref());
    let is_known = caller.is_known(service.callers.as_ref());
    let pool = Pool::of(method, is_known);
    let share = caller.share().filter(|_| is_known && pool == Pool::Known);
    let Some(place) = CallPlace::take(bounds, &peer.load.share, share.clone(), pool) else {
        bounds.counts.refuse(pool.refusal());
        refuse(respond, &limits.overloaded);
        return None;
    };
    let own_bytes = if method.streams { STREAM_BYTES } else { CALL_BYTES };
    let held = Held::new(bounds, &peer.load.share, share, header_bytes + own_bytes);
    if !method.is_open && held.may_not_begin() {
        bounds.counts.refuse(Refusal::Memory);
        refuse(respond, &limits.overloaded);
        return None;
    }
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
    let is_admitted = is_known || method.is_open;
    Some(Begun { method, encoding, started, deadline, caller, is_admitted, held, place })
}

/// End a call without a reply.
pub fn refuse(respond: &mut SendResponse<Bytes>, status: &Status) {
    let _ = respond.send_response(grpc::status_only(status), true);
}
