//! Connections of HTTP/1.1, by hyper.

use crate::calls::service::Service;
use crate::limits::lifetime::{Age, Lifetime};
use crate::limits::peer::Peer;
use crate::limits::read_quota::ReadQuota;
use crate::limits::refusals::Refusal;
use crate::web::exchange::{answer, Body, BodyError, Broken, Replies};
use crate::web::socket::Socket;
use bytes::Bytes;
use http::header::{HeaderValue, CONNECTION, TRANSFER_ENCODING};
use hyper::body::{Body as HyperBody, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::error::Error;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite};

/// Limit of the bytes that hyper buffers of a connection. It answers larger headers with HTTP 431, and closes the
/// connection.
pub const BUFFER_BYTES: usize = 64 << 10;
/// Limit of a request's headers. hyper answers more with HTTP 431, too. With fewer, their bytes decide.
const MAX_HEADERS: usize = 512;

/// A body. hyper has no unread data of it once a part was taken.
struct Received<'a>(Incoming, &'a ReadQuota);

impl Body for Received<'_> {
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>> {
        loop {
            let frame = std::task::ready!(Pin::new(&mut self.0).poll_frame(cx));
            match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => {
                    self.1.set_kept(0);
                    return Poll::Ready(Some(Ok(data)));
                }
                Some(Ok(Err(_))) => {} // trailers
                Some(Err(error)) => return Poll::Ready(Some(Err(reason(&error)))),
                None => return Poll::Ready(None),
            }
        }
    }

    fn announced(&self) -> Option<u64> {
        self.0.size_hint().exact()
    }
}

fn reason(error: &hyper::Error) -> BodyError {
    let source = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    match source.map(io::Error::kind) {
        Some(io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) => BodyError::Malformed,
        _ => BodyError::Gone,
    }
}

impl HyperBody for Replies {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        self.poll_next(cx).map(|next| next.map(|part| Ok(Frame::data(part))))
    }
}

/// Serve a connection until it ends, or one of the futures that end it is ready. `draining`: no more requests.
pub async fn connection<S>(
    socket: Socket<S>,
    quota: &Arc<ReadQuota>,
    peer: &Arc<Peer>,
    service: &Arc<Service>,
    draining: impl Future<Output = ()>,
    closed: impl Future<Output = ()>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let bounds = &service.bounds;
    let limits = &bounds.limits;
    let has_begun = AtomicBool::new(false);
    let serve = service_fn(|request: http::Request<Incoming>| {
        quota.set_kept(0);
        has_begun.store(true, Ordering::Relaxed);
        async move {
            let (head, body) = request.into_parts();
            let is_chunked = head.headers.contains_key(TRANSFER_ENCODING);
            let (mut head, replies) =
                answer(&head, &mut Received(body, quota), peer, service).await.ok_or(Broken)?;
            if is_chunked {
                // a proxy may have seen another end of this request: what follows could be a request of its own to us
                head.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Broken>(head.map(|()| replies))
        }
    });
    let mut builder = http1::Builder::new();
    // an idle connection may wait as long as one of HTTP/2 that answers no ping
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.keepalive + limits.keepalive_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(BUFFER_BYTES);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(socket), serve));
    let (mut draining, mut closed) = (std::pin::pin!(draining), std::pin::pin!(closed));
    let mut begin = std::pin::pin!(tokio::time::sleep(limits.handshake));
    let mut life = Lifetime::new(limits.age, limits.age_grace);
    let (mut is_draining, mut is_waiting) = (false, true);
    loop {
        tokio::select! {
            biased;
            () = &mut closed => return,
            () = peer.left() => return,
            age = life.next() => match age {
                Age::Old => connection.as_mut().graceful_shutdown(),
                Age::TooOld => return,
            },
            () = &mut draining, if !is_draining => {
                is_draining = true;
                connection.as_mut().graceful_shutdown();
            }
            ended = connection.as_mut() => {
                match ended {
                    Err(error) if error.is_parse() => bounds.counts.refuse(Refusal::Protocol),
                    Err(error) if error.is_timeout() => bounds.counts.refuse(Refusal::Silent),
                    _ => {}
                }
                return;
            }
            () = &mut begin, if is_waiting => {
                is_waiting = false;
                if !has_begun.load(Ordering::Relaxed) {
                    return bounds.counts.refuse(Refusal::Handshake);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calls::answers::{Door, HttpAnswer};
    use crate::calls::service::Service;
    use crate::messages::grpc::Status;
    use crate::steps::call::Call;
    use crate::steps::columns::Arrival;
    use std::future::pending;
    use tokio::io::{duplex, AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::task::JoinHandle;

    const GET: &[u8] = b"GET /v1/models?a=b HTTP/1.1\r\nhost: here\r\nx-more: 1\r\n\r\n";

    /// A client of a connection that is served.
    struct Client {
        service: Arc<Service>,
        socket: DuplexStream,
        serving: JoinHandle<()>,
    }

    fn client(room: usize) -> Client {
        let service = Arc::new(Service::for_test());
        service.door.set(Door::for_test()).unwrap();
        let (peer, quota) = (Arc::new(Peer::numbered(0)), Arc::<ReadQuota>::default());
        let (socket, served) = duplex(room);
        let own = service.clone();
        let serving = tokio::spawn(async move {
            let served = Socket::new(served, quota.clone(), own.bounds.clone());
            let mut serving = std::pin::pin!(connection(served, &quota, &peer, &own, pending(), pending()));
            std::future::poll_fn(|cx| {
                quota.begin();
                serving.as_mut().poll(cx)
            })
            .await;
        });
        Client { service, socket, serving }
    }

    impl Client {
        async fn send(&mut self, bytes: &[u8]) {
            self.socket.write_all(bytes).await.unwrap();
        }

        /// The next arrival for Python.
        async fn arrival(&self) -> Arrival {
            loop {
                if let Some(arrival) = self.service.queue.take().pop() {
                    return arrival;
                }
                tokio::task::yield_now().await;
            }
        }

        async fn call(&self) -> (Arc<Call>, Bytes) {
            match self.arrival().await {
                Arrival::Call(call, Some(body)) => (call, body),
                other => panic!("{other:?}"),
            }
        }

        /// What the server sends until it closes the connection.
        async fn rest(mut self) -> (String, Arc<Service>) {
            let mut found = Vec::new();
            self.socket.read_to_end(&mut found).await.unwrap();
            self.serving.await.unwrap();
            (String::from_utf8(found).unwrap(), self.service)
        }
    }

    fn answered(call: &Call, body: &'static [u8]) {
        let headers = vec![("x-own".to_owned(), "yes".to_owned())];
        let answer = HttpAnswer::new((200, headers, Bytes::from_static(body)), false).unwrap();
        call.respond(answer.head, answer.body, false);
    }

    fn refusals(service: &Service, name: &str) -> u64 {
        service.bounds.counts.refusals().iter().find(|(found, _)| *found == name).unwrap().1
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_comes_with_its_headers_and_its_answer_leaves_as_it_is() {
        let mut client = client(1 << 16);
        client.send(GET).await;
        let (call, body) = client.call().await;
        assert!(body.is_empty());
        let value = |name: &str| {
            let found = call.metadata.iter().find(|(key, _)| key == name);
            String::from_utf8(found.unwrap().1.clone()).unwrap()
        };
        let names = [":method", ":path", ":authority", "x-more"];
        assert_eq!(names.map(value), ["GET", "/v1/models?a=b", "here", "1"]);
        answered(&call, b"{}");
        client
            .send(b"POST / HTTP/1.1\r\nhost: here\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi")
            .await;
        let (call, body) = client.call().await;
        assert_eq!(&body[..], b"hi");
        answered(&call, b"");
        let (found, service) = client.rest().await;
        assert_eq!(found.matches("x-own: yes").count(), 2);
        assert!(found.contains("content-length: 2\r\n") && found.contains("\r\n\r\n{}HTTP/1.1 200 OK"));
        assert_eq!(service.unwritten.load(Ordering::Relaxed), 0);
        assert_eq!(service.bounds.held.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_must_begin_and_its_body_must_come_in_time() {
        let mut waiting = client(1 << 16);
        waiting.send(b"GET / HT").await;
        let (found, service) = waiting.rest().await;
        assert_eq!((found.as_str(), refusals(&service, "handshake")), ("", 1));
        let mut client = client(1 << 16);
        client
            .send(b"POST / HTTP/1.1\r\nhost: here\r\nconnection: close\r\ncontent-length: 9\r\n\r\nhi")
            .await;
        let (found, service) = client.rest().await;
        assert!(found.starts_with("HTTP/1.1 408 ") && found.ends_with("slow"), "{found}");
        assert_eq!(refusals(&service, "slow_message"), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn too_much_and_too_late_have_their_answers() {
        let large =
            format!("GET / HTTP/1.1\r\nhost: here\r\nx: {}\r\nconnection: close\r\n\r\n", "x".repeat(20_000));
        let post = "POST / HTTP/1.1\r\nhost: here\r\nconnection: close\r\n";
        let announced = format!("{post}content-length: 101\r\n\r\n");
        let chunked =
            format!("{post}transfer-encoding: chunked\r\n\r\n65\r\n{}\r\n0\r\n\r\n", "x".repeat(101));
        let not_chunked = format!("{post}transfer-encoding: chunked\r\n\r\nsize\r\n");
        let two_lengths = format!("{post}content-length: 9\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n");
        let many =
            format!("GET / HTTP/1.1\r\nhost: here\r\nconnection: close\r\n{}\r\n", "x:y\r\n".repeat(500));
        let unread = format!("{post}grpc-timeout: soon\r\n\r\n");
        let late = format!("{post}grpc-timeout: 50m\r\n\r\n");
        let cases = [
            (large, "431 ", "headers_too_large"),
            (announced, "413 ", "body_too_large"),
            (chunked, "413 ", "body_too_large"),
            (not_chunked, "400 ", "malformed"),
            (two_lengths, "400 ", "two_lengths"),
            (many, "431 ", "headers_too_large"),
            (unread, "400 ", "bad_timeout"),
            (late, "504 ", "late"),
        ];
        for (request, status, body) in cases {
            let mut client = client(1 << 16);
            client.send(request.as_bytes()).await;
            let (found, _) = client.rest().await;
            assert!(found.starts_with(&format!("HTTP/1.1 {status}")) && found.ends_with(body), "{found}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_not_read_ends_the_connection() {
        let mut client = client(64);
        client.send(GET).await;
        let (call, _) = client.call().await;
        answered(&call, &[b'x'; 10_000]);
        client.serving.await.unwrap();
        assert_eq!(refusals(&client.service, "unread_replies"), 1);
    }

    fn begin(call: &Call) {
        let answer = HttpAnswer::new((200, Vec::new(), Bytes::from_static(b"first")), true).unwrap();
        call.respond(answer.head, answer.body, true);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_in_parts_leaves_part_by_part() {
        let mut client = client(1 << 16);
        client.send(GET).await;
        let (call, _) = client.call().await;
        begin(&call);
        assert!(matches!(client.arrival().await, Arrival::Written(_, 5)));
        let mut head = [0; 100];
        let size = client.socket.read(&mut head).await.unwrap();
        let head = std::str::from_utf8(&head[..size]).unwrap();
        assert!(
            head.contains("transfer-encoding: chunked\r\n") && head.ends_with("5\r\nfirst\r\n"),
            "{head}"
        );
        call.reply(Bytes::from_static(b"second"), None, None);
        assert!(matches!(client.arrival().await, Arrival::Written(_, 6)));
        call.reply(Bytes::from_static(b"third"), None, None);
        call.end(Status::ok());
        client.send(b"GET / HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n").await;
        let (call, _) = client.call().await;
        answered(&call, b"{}");
        let (found, service) = client.rest().await;
        assert!(found.starts_with("6\r\nsecond\r\n5\r\nthird\r\n0\r\n\r\nHTTP/1.1 200 OK"), "{found}");
        assert_eq!(service.unwritten.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_in_parts_ends_at_its_deadline_with_the_error() {
        let mut client = client(1 << 16);
        client.send(b"GET / HTTP/1.1\r\nhost: here\r\ngrpc-timeout: 50m\r\n\r\n").await;
        let (call, _) = client.call().await;
        begin(&call);
        assert!(matches!(client.arrival().await, Arrival::Written(_, 5)));
        tokio::time::advance(std::time::Duration::from_millis(50)).await;
        assert!(matches!(client.arrival().await, Arrival::Ended(_)));
        assert!(call.is_late());
        call.reply(Bytes::from_static(b"too late"), None, None);
        client.send(b"GET / HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n").await;
        let (next, _) = client.call().await;
        answered(&next, b"{}");
        let (found, service) = client.rest().await;
        let end = "5\r\nfirst\r\n1F\r\nevent: error\nid: 2\ndata: late\n\n\r\n0\r\n\r\nHTTP/1.1 200 OK";
        assert!(found.contains(end), "{found}");
        assert_eq!(service.unwritten.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_in_parts_takes_no_share_of_the_running_work() {
        let mut client = client(1 << 16);
        client.send(GET).await;
        let (call, _) = client.call().await;
        assert!(call.peer.load.running() > 0);
        begin(&call);
        assert!(matches!(client.arrival().await, Arrival::Written(_, 5)));
        assert_eq!(call.peer.load.running(), 0);
        drop(client.socket);
        client.serving.await.unwrap();
        assert_eq!(call.peer.load.running(), 0);
        assert!(call.is_over());
        call.reply(Bytes::from_static(b"too late"), None, None);
        assert_eq!(client.service.unwritten.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn parts_that_are_not_read_end_the_connection() {
        let mut client = client(64);
        client.send(GET).await;
        let (call, _) = client.call().await;
        begin(&call);
        for _ in 0..100 {
            call.reply(Bytes::from_static(&[b'x'; 1000]), None, None);
        }
        client.serving.await.unwrap();
        assert_eq!(refusals(&client.service, "unread_replies"), 1);
        assert_eq!(client.service.unwritten.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_in_chunks_is_the_last_of_its_connection() {
        let mut client = client(1 << 16);
        let lengths = "transfer-encoding: chunked\r\ncontent-length: 99";
        client.send(format!("POST / HTTP/1.1\r\nhost: here\r\n{lengths}\r\n\r\n0\r\n\r\n").as_bytes()).await;
        client.send(GET).await;
        let (call, body) = client.call().await;
        assert!(body.is_empty());
        answered(&call, b"{}");
        let (found, _) = client.rest().await;
        assert_eq!((found.matches("HTTP/1.1 200").count(), found.contains("connection: close")), (1, true));
    }

    #[tokio::test(start_paused = true)]
    async fn python_learns_that_a_client_has_left() {
        let mut client = client(1 << 16);
        client.send(GET).await;
        let (call, _) = client.call().await;
        drop(client.socket);
        client.serving.await.unwrap();
        assert!(call.is_over());
        assert!(matches!(client.service.queue.take().pop(), Some(Arrival::Ended(_))));
        answered(&call, b"too late");
        assert_eq!(client.service.unwritten.load(Ordering::Relaxed), 0);
    }
}
