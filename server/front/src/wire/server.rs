//! Accepts, keeps alive and ends connections, with a task for each connection and for each of its calls.

use crate::calls::serve;
use crate::calls::service::Service;
use crate::limits::bounds::Slot;
use crate::limits::connections::Connections;
use crate::limits::lifetime::{Age, Lifetime};
use crate::limits::load::Load;
use crate::limits::peer::Peer;
use crate::limits::read_quota::{Bucket, Gate, QuotaSocket, ReadQuota, Received};
use crate::limits::refusals::Refusal;
use crate::limits::settings::Limits;
use crate::web;
use crate::web::socket::{Rewind, Socket};
use crate::wire::acceptor::{Acceptor, Entry};
use crate::wire::on_wake::OnWake;
use crate::wire::tls;
use bytes::Bytes;
use std::future::Future;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

/// What all connections share.
#[derive(Debug)]
pub struct Server {
    pub service: Arc<Service>,
    /// TLS configurations of new connections; None: plain text.
    tls: Mutex<Option<Configurations>>,
    /// Totals of unprocessed data of all connections.
    received: Arc<Received>,
    /// The gate for connections without a known caller.
    gate: Gate,
    /// The open connections.
    open: Arc<Connections>,
    /// Number of connections so far, from which each gets its number.
    connections: AtomicU64,
}

/// The TLS configuration of each protocol.
#[derive(Clone, Debug)]
struct Configurations {
    grpc: Arc<rustls::ServerConfig>,
    http: Arc<rustls::ServerConfig>,
}

/// What a listener's connections use HTTP for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Grpc,
    /// JSON, over HTTP/1.1 or HTTP/2.
    Http,
}

impl Server {
    pub fn new(service: Arc<Service>) -> Self {
        Server {
            service,
            tls: Mutex::default(),
            received: Arc::default(),
            gate: Gate::default(),
            open: Arc::default(),
            connections: AtomicU64::new(0),
        }
    }

    /// Use this TLS configuration for new connections.
    pub fn secure(&self, grpc: Arc<rustls::ServerConfig>) {
        let http = tls::with_http1(&grpc);
        *self.tls.lock().unwrap_or_else(PoisonError::into_inner) = Some(Configurations { grpc, http });
    }

    fn tls_of(&self, protocol: Protocol) -> Option<Arc<rustls::ServerConfig>> {
        let configurations = self.tls.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        Some(match protocol {
            Protocol::Grpc => configurations.grpc,
            Protocol::Http => configurations.http,
        })
    }

    fn doors(&self) -> Acceptor {
        let service = &self.service;
        Acceptor::new(
            service.bounds.clone(),
            service.queue.clone(),
            self.open.clone(),
            service.callers.is_some(),
        )
    }
}

/// Where connections come from.
#[derive(Debug)]
pub enum Listener {
    Tcp(StdTcpListener),
    Unix(StdUnixListener),
    Http(StdTcpListener),
}

impl Listener {
    /// A listening socket that Python created and handed over. The caller of `Front.start` names its kind.
    #[allow(unsafe_code)]
    pub fn given(fd: i32, kind: &str) -> Self {
        // SAFETY: the descriptor is open, and only this socket owns it.
        unsafe {
            match kind {
                "unix" => Listener::Unix(FromRawFd::from_raw_fd(fd)),
                "http" => Listener::Http(FromRawFd::from_raw_fd(fd)),
                _ => Listener::Tcp(FromRawFd::from_raw_fd(fd)),
            }
        }
    }
}

/// The stages of the server's shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Serving,
    /// No new connections or calls; running ones continue.
    Draining,
    /// Running calls are cut off.
    Closed,
}

/// Serve listeners until the last stage.
pub async fn run(listeners: Vec<Listener>, server: Arc<Server>, stage: watch::Receiver<Stage>) {
    let (done, mut all_done) = tokio::sync::mpsc::channel::<()>(1);
    for listener in listeners {
        let (server, stage, done) = (server.clone(), stage.clone(), done.clone());
        tokio::spawn(async move {
            match listener {
                Listener::Tcp(listener) => accept_tcp(listener, Protocol::Grpc, server, stage, done).await,
                Listener::Http(listener) => accept_tcp(listener, Protocol::Http, server, stage, done).await,
                Listener::Unix(listener) => accept_unix(listener, server, stage, done).await,
            }
        });
    }
    drop(done);
    let mut closed = stage;
    tokio::select! {
        _ = all_done.recv() => {}
        () = reached(&mut closed, Stage::Closed) => {}
    }
}

/// Return when the server reaches this stage, or the sender is dropped.
async fn reached(stage: &mut watch::Receiver<Stage>, wanted: Stage) {
    let _ = stage.wait_for(|stage| *stage >= wanted).await;
}

type Done = tokio::sync::mpsc::Sender<()>;

async fn accept_tcp(
    listener: StdTcpListener,
    protocol: Protocol,
    server: Arc<Server>,
    mut stage: watch::Receiver<Stage>,
    done: Done,
) {
    let _watched = server.service.queue.wakeup.watch(&listener);
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    let mut doors = server.doors();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = reached(&mut stage, Stage::Draining) => return,
        };
        let entered = doors.admit(accepted, |(_, address)| Some(address.ip())).await;
        if let Some(((socket, address), entry)) = entered {
            let _ = socket.set_nodelay(true);
            begin(socket, entry, |_| tcp_name(address), protocol, &server, &stage, &done);
        }
    }
}

async fn accept_unix(
    listener: StdUnixListener,
    server: Arc<Server>,
    mut stage: watch::Receiver<Stage>,
    done: Done,
) {
    let _watched = server.service.queue.wakeup.watch(&listener);
    let Ok(listener) = UnixListener::from_std(listener) else { return };
    let mut doors = server.doors();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = reached(&mut stage, Stage::Draining) => return,
        };
        if let Some(((socket, _), entry)) = doors.admit(accepted, |_| None).await {
            begin(socket, entry, |number| format!("unix:{number}"), Protocol::Grpc, &server, &stage, &done);
        }
    }
}

fn tcp_name(address: SocketAddr) -> String {
    match address {
        SocketAddr::V4(address) => format!("ipv4:{address}"),
        SocketAddr::V6(address) => format!("ipv6:%5B{}%5D:{}", address.ip(), address.port()),
    }
}

/// Serve a connection in its own task. `name` returns the connection's name for its number.
fn begin<S>(
    socket: S,
    entry: Entry,
    name: impl FnOnce(u64) -> String,
    protocol: Protocol,
    server: &Arc<Server>,
    stage: &watch::Receiver<Stage>,
    done: &Done,
) where
    S: AsyncRead + AsyncWrite + AsRawFd + Unpin + Send + 'static,
{
    let watched = server.service.queue.wakeup.watch(&socket);
    let bounds = &server.service.bounds;
    let number = server.connections.fetch_add(1, Ordering::Relaxed);
    let load = Load::new(bounds.limits.connection_steps);
    let quota = Arc::new(ReadQuota::new(server.received.clone()));
    let peer = Arc::new(Peer::new(name(number), number, load, quota.clone()));
    server.open.add(&peer);
    let own = peer.clone();
    let (server, mut stage, done) = (server.clone(), stage.clone(), done.clone());
    tokio::spawn(async move {
        let bounds = &server.service.bounds;
        let max_kept = bounds.limits.budget_bytes / KEPT_PART;
        let mut serving = std::pin::pin!(async {
            let Some(config) = server.tls_of(protocol) else {
                if protocol == Protocol::Http {
                    return http(socket, None, &quota, peer, &server.service, stage).await;
                }
                let socket = QuotaSocket::new(socket, quota.clone());
                return connection(socket, protocol, &quota, peer, &server.service, stage).await;
            };
            let secured = tokio::select! {
                secured = tls::accept(config, socket) => secured,
                () = reached(&mut stage, Stage::Draining) => return,
                () = peer.left() => return,
            };
            let secured = secured.filter(|secured| secured.is_http2 || protocol == Protocol::Http);
            let Some(secured) = secured else { return bounds.counts.refuse(Refusal::Handshake) };
            peer.show(secured.names);
            if protocol == Protocol::Http {
                let is_http2 = Some(secured.is_http2);
                return http(secured.socket, is_http2, &quota, peer, &server.service, stage).await;
            }
            let socket = QuotaSocket::new(secured.socket, quota.clone());
            connection(socket, protocol, &quota, peer, &server.service, stage).await;
        });
        loop {
            let pass = match own.is_known() {
                true => None,
                false => server.gate.pass(|| quota.is_given_up()).await,
            };
            quota.begin();
            let began = Instant::now();
            let served = std::future::poll_fn(|cx| Poll::Ready(serving.as_mut().poll(cx))).await;
            quota.end(began.elapsed());
            while server.received.kept() > max_kept && server.open.end_largest() {
                bounds.counts.refuse(Refusal::Evicted);
            }
            if served.is_ready() {
                break;
            }
            if let Some(pass) = pass {
                pass.end();
            }
            woken().await;
        }
        drop((entry, watched, done));
    });
}

/// Return when this task is woken, after one of its futures was polled.
async fn woken() {
    let mut is_polled = false;
    std::future::poll_fn(|_| {
        if std::mem::replace(&mut is_polled, true) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

/// Limit of headers that are refused with a status. h2 answers larger ones with HTTP 431, then closes the connection.
const LARGEST_HEADER_BYTES: u32 = 64 << 10;
/// Flow-control window of a connection: until its first admitted call, and afterwards if enough is left. All windows
/// together are limited to this part of the memory budget.
const FIRST_WINDOW_BYTES: u32 = 64 << 10;
const WINDOW_BYTES: u32 = 4 << 20;
const WINDOWS_PART: usize = 4;
/// Part of the memory budget for other data in h2 (incomplete frames and headers, table entries). Beyond it, connections
/// are closed.
const KEPT_PART: usize = 4;
/// Flow-control window of a call.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// Limit of a call's replies in h2's buffer before they are written to the socket.
const SEND_BUFFER_BYTES: usize = 256 << 10;
/// Burst of a connection's calls that were cancelled before they were accepted, as in a rapid-reset attack.
const MAX_RESET: usize = 1000;
/// Interval at which one more is allowed.
const RESET_INTERVAL: Duration = Duration::from_millis(10);
/// Limit of a connection's calls that break HTTP/2's rules.
const MAX_MISTAKES: usize = 1000;
/// Limit and duration of reset calls that h2 remembers. Data that clients sent before the reset is no error.
const REMEMBERED_RESETS: usize = 1000;
const REMEMBER_RESETS: Duration = Duration::from_secs(5);

/// The settings of HTTP/2. All limits of h2 are set here.
fn http2(limits: &Limits) -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(LARGEST_HEADER_BYTES)
        .max_frame_size(1 << 16)
        .initial_connection_window_size(FIRST_WINDOW_BYTES)
        .initial_window_size(STREAM_WINDOW_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_pending_accept_reset_streams(MAX_RESET)
        .max_local_error_reset_streams(Some(MAX_MISTAKES))
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .reset_stream_duration(REMEMBER_RESETS);
    builder
}

/// The first bytes of each connection of HTTP/2, and of no request of HTTP/1.1.
const HTTP2_BEGINS: &[u8] = b"PRI";

/// Serve a connection of either version of HTTP. `is_http2`: None, its first bytes show it.
async fn http<S>(
    mut socket: S,
    is_http2: Option<bool>,
    quota: &Arc<ReadQuota>,
    peer: Arc<Peer>,
    service: &Arc<Service>,
    stage: watch::Receiver<Stage>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut draining, mut closed) = (stage.clone(), stage.clone());
    let mut first = Vec::new();
    let is_http2 = match is_http2 {
        Some(is_http2) => is_http2,
        None => {
            let begun =
                tokio::time::timeout(service.bounds.limits.handshake, read_first(&mut socket, &mut first));
            tokio::select! {
                begun = begun => match begun {
                    Ok(true) => first == HTTP2_BEGINS,
                    Ok(false) => return,
                    Err(_) => return service.bounds.counts.refuse(Refusal::Handshake),
                },
                () = peer.left() => return,
                () = reached(&mut draining, Stage::Draining) => return,
            }
        }
    };
    if is_http2 {
        let socket = QuotaSocket::new(Rewind::new(socket, first), quota.clone());
        return connection(socket, Protocol::Http, quota, peer, service, stage).await;
    }
    let socket = Socket::new(Rewind::new(socket, first), quota.clone(), service.bounds.clone());
    let draining = reached(&mut draining, Stage::Draining);
    web::http1::connection(socket, quota, &peer, service, draining, reached(&mut closed, Stage::Closed))
        .await;
}

/// Read as many bytes as show the version of HTTP. Returns whether there were any.
async fn read_first(socket: &mut (impl AsyncRead + Unpin), first: &mut Vec<u8>) -> bool {
    while HTTP2_BEGINS.starts_with(first) && first.len() < HTTP2_BEGINS.len() {
        let mut byte = [0];
        match socket.read(&mut byte).await {
            Ok(1) => first.push(byte[0]),
            _ => return false,
        }
    }
    true
}

async fn connection<S>(
    socket: S,
    protocol: Protocol,
    quota: &ReadQuota,
    peer: Arc<Peer>,
    service: &Arc<Service>,
    mut stage: watch::Receiver<Stage>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let bounds = &service.bounds;
    let limits = &bounds.limits;
    let handshake = tokio::time::timeout(limits.handshake, http2(limits).handshake::<_, Bytes>(socket));
    let handshake = tokio::select! {
        handshake = handshake => handshake,
        () = peer.left() => return,
    };
    let mut connection = match handshake {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) if error.is_io() => return, // the client has gone
        _ => return bounds.counts.refuse(Refusal::Handshake),
    };
    let mut window = None;
    let mut pings = connection.ping_pong();
    let alive = async move {
        match pings.as_mut() {
            Some(pings) => keep_alive(pings, limits).await,
            None => std::future::pending().await,
        }
    };
    let mut alive = std::pin::pin!(OnWake::new(alive));
    let mut life = Lifetime::new(limits.age, limits.age_grace);
    let mut is_draining = false;
    let mut closed = stage.clone();
    // h2 limits those that wait to be accepted, so a client that sends few at a time never exceeds its limit
    let mut resets = Bucket::new(MAX_RESET, RESET_INTERVAL, Instant::now());
    loop {
        let event = {
            let event = next_event(&peer, &mut closed, &mut stage, &mut life, is_draining);
            let mut event = std::pin::pin!(OnWake::new(event));
            loop {
                let next = std::future::poll_fn(|cx| {
                    if let Poll::Ready(event) = event.as_mut().poll(cx) {
                        return Poll::Ready(Err(event));
                    }
                    if quota.poll_flooded().is_ready() {
                        return Poll::Ready(Err(Event::Flooded(Refusal::ControlFrames)));
                    }
                    if let Poll::Ready(mut accepted) = connection.poll_accept(cx) {
                        if let Some(Ok((_, respond))) = &mut accepted {
                            if respond.poll_reset(cx).is_ready() && !resets.take(&Instant::now) {
                                return Poll::Ready(Err(Event::Flooded(Refusal::Protocol)));
                            }
                        }
                        return Poll::Ready(Ok(accepted));
                    }
                    // after all frames are read: one of them may be the answer to a ping
                    alive.as_mut().poll(cx).map(|()| Err(Event::Silent))
                });
                match next.await {
                    Err(event) => break event,
                    Ok(Some(Ok((request, respond)))) => {
                        match protocol {
                            Protocol::Grpc => serve::begin(request, respond, &peer, service),
                            Protocol::Http => web::http2::begin(request, respond, &peer, service),
                        }
                        if window.is_none() && peer.is_known() {
                            let all = limits.budget_bytes / WINDOWS_PART;
                            let taken = bounds.counts.windows.load(Ordering::Relaxed);
                            let size = window_for(all.saturating_sub(taken));
                            window = Some(Slot::take(bounds, |counts| &counts.windows, size as usize, all));
                            if size > FIRST_WINDOW_BYTES && matches!(window, Some(Some(_))) {
                                connection.set_target_window_size(size);
                            }
                        }
                    }
                    Ok(Some(Err(error))) => {
                        if error.is_library() {
                            bounds.counts.refuse(Refusal::Protocol);
                        }
                        return;
                    }
                    Ok(None) => return,
                }
            }
        };
        match event {
            Event::Closed => return cut_off(&mut connection, h2::Reason::CANCEL).await,
            Event::Left | Event::Aged(Age::TooOld) => {
                return cut_off(&mut connection, h2::Reason::NO_ERROR).await
            }
            Event::Flooded(limit) => {
                bounds.counts.refuse(limit);
                return cut_off(&mut connection, h2::Reason::ENHANCE_YOUR_CALM).await;
            }
            Event::Aged(Age::Old) => connection.graceful_shutdown(),
            Event::Draining => {
                is_draining = true;
                connection.graceful_shutdown();
            }
            Event::Silent => return bounds.counts.refuse(Refusal::Silent),
        }
    }
}

/// What ends or changes a connection, apart from its client's frames.
enum Event {
    /// The server cuts off running calls.
    Closed,
    /// It is closed in favour of another connection.
    Left,
    /// Its client has exceeded a limit of frames or of reset calls.
    Flooded(Refusal),
    Aged(Age),
    /// The server accepts no more calls.
    Draining,
    /// Its client no longer answers.
    Silent,
}

/// Return the next event. May be dropped and called again.
async fn next_event(
    peer: &Peer,
    closed: &mut watch::Receiver<Stage>,
    stage: &mut watch::Receiver<Stage>,
    life: &mut Lifetime,
    is_draining: bool,
) -> Event {
    tokio::select! {
        biased;
        () = reached(closed, Stage::Closed) => Event::Closed,
        () = peer.left() => Event::Left,
        age = life.next() => Event::Aged(age),
        () = reached(stage, Stage::Draining), if !is_draining => Event::Draining,
    }
}

/// Returns a connection's window. It shrinks as less is left for all.
fn window_for(left: usize) -> u32 {
    (left / WINDOWS_PART).min(WINDOW_BYTES as usize) as u32
}

/// End a connection with a reason.
async fn cut_off<S>(connection: &mut h2::server::Connection<S, Bytes>, reason: h2::Reason)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    connection.abrupt_shutdown(reason);
    // poll once more, to send it
    let _ = tokio::time::timeout(Duration::from_millis(10), connection.accept()).await;
}

/// Return when a silent client no longer answers.
async fn keep_alive(pings: &mut h2::PingPong, limits: &Limits) {
    loop {
        tokio::time::sleep(limits.keepalive).await;
        let answer = tokio::time::timeout(limits.keepalive_timeout, pings.ping(h2::Ping::opaque())).await;
        if !matches!(answer, Ok(Ok(_))) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read, Write};
    use std::os::unix::net::UnixStream as Client;
    use tokio::net::UnixStream;

    const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    const PING: &[u8] = b"\0\0\x08\x06\0\0\0\0\0pingpong";

    /// Returns the bytes that the server has sent, if any.
    fn received(client: &mut Client) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 16];
        match client.read(&mut bytes) {
            Ok(size) => bytes.truncate(size),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                bytes.clear();
            }
        }
        bytes
    }

    fn has_pong(client: &mut Client) -> bool {
        received(client).windows(8).any(|bytes| bytes == b"pingpong")
    }

    #[tokio::test]
    async fn a_known_connection_does_not_wait_for_unknown_ones() {
        let server = Arc::new(Server::new(Arc::new(Service::for_test())));
        let (_stage, watched) = watch::channel(Stage::Serving);
        let (done, _) = tokio::sync::mpsc::channel(1);
        let mut clients = Vec::new();
        for _ in 0..9 {
            let (mut client, socket) = Client::pair().unwrap();
            client.set_nonblocking(true).unwrap();
            socket.set_nonblocking(true).unwrap();
            client.write_all(HELLO).unwrap();
            let entered = server.doors().admit(UnixStream::from_std(socket), |_| None).await;
            let (socket, entry) = entered.unwrap();
            begin(socket, entry, |number| number.to_string(), Protocol::Grpc, &server, &watched, &done);
            clients.push(client);
        }
        for client in &mut clients {
            client.write_all(PING).unwrap();
            while !has_pong(client) {
                tokio::task::yield_now().await;
            }
        }
        let (known, strangers) = clients.split_last_mut().unwrap();
        server.open.know_last();
        strangers.iter_mut().for_each(|client| client.write_all(PING).unwrap());
        known.write_all(PING).unwrap();
        while !has_pong(known) {
            tokio::task::yield_now().await;
        }
        let answered = strangers.iter_mut().filter_map(|client| has_pong(client).then_some(())).count();
        assert!(answered <= 2, "{answered} strangers came first");
        for client in strangers.iter_mut().skip(answered) {
            while !has_pong(client) {
                tokio::task::yield_now().await;
            }
        }
    }
}
