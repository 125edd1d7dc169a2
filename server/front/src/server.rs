//! Connections: accepted, kept alive, ended; a task for each, and one for each of its calls.

use crate::call::Peer;
use crate::columns::{Arrival, Arrivals, MOST_IN_BATCH};
use crate::grpc::Status;
use crate::lifetime::{Age, Lifetime};
use crate::serve;
use crate::tls;
use bytes::Bytes;
use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

/// How the wire behaves.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Of a message, inflated or not.
    pub message_bytes: usize,
    /// Calls of one connection at the same time; more of them wait at the client.
    pub streams: u32,
    /// Of the headers of a call.
    pub header_bytes: u32,
    /// Bytes of messages and replies of all calls together; then those that hold much are refused.
    pub budget_bytes: usize,
    /// Bytes of plain messages that may wait for Python before streams are read no further.
    pub queued_bytes: usize,
    /// How they are refused.
    pub overloaded: Status,
    /// Plain frames of one stream that are not answered, before reading stops.
    pub frames: usize,
    /// The server asks so often whether a silent client is there.
    pub keepalive: Duration,
    /// And gives up after this.
    pub keepalive_timeout: Duration,
    /// A connection takes calls for about so long.
    pub age: Option<Duration>,
    /// And then has so long to finish them.
    pub age_grace: Duration,
}

/// A method that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    pub index: usize,
    pub streams: bool,
    pub plain: Plain,
}

/// Which of a method's messages may be plain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plain {
    No,
    Step,
    StepStream,
    Infer,
    InferStream,
}

/// What all of the wire shares with Python.
#[derive(Debug)]
pub struct Shared {
    pub limits: Limits,
    pub methods: HashMap<String, Method>,
    /// What new connections get; None: plain text.
    pub tls: Mutex<Option<Arc<rustls::ServerConfig>>>,
    /// The wire's thread has ended.
    pub is_dead: AtomicBool,
    /// Nothing is plain: Python wants to see every message.
    pub all_general: AtomicBool,
    /// Calls that ended before their answer, so that nobody need look for them while there are none.
    pub abandoned: AtomicU64,
    /// What Python has asked for and is not done.
    pub commands: AtomicUsize,
    /// Replies that are not on their way.
    pub unwritten: Arc<AtomicUsize>,
    /// Bytes of messages and replies in memory.
    pub held: Arc<AtomicUsize>,
    /// Bytes of plain messages that Python has not taken.
    pub queued: AtomicUsize,
    /// Streams that wait for it to take some.
    readers: Mutex<Vec<Waker>>,
    arrivals: Mutex<Arrivals>,
    wakeup: std::os::fd::OwnedFd,
    /// Connections so far: each has its number.
    connections: AtomicU64,
}

impl Shared {
    pub fn new(limits: Limits, methods: HashMap<String, Method>, wakeup: std::os::fd::OwnedFd) -> Self {
        Shared {
            limits,
            methods,
            tls: Mutex::default(),
            is_dead: AtomicBool::new(false),
            all_general: AtomicBool::new(false),
            abandoned: AtomicU64::new(0),
            commands: AtomicUsize::new(0),
            unwritten: Arc::default(),
            held: Arc::default(),
            queued: AtomicUsize::new(0),
            readers: Mutex::default(),
            arrivals: Mutex::new(Arrivals::default()),
            wakeup,
            connections: AtomicU64::new(0),
        }
    }

    pub fn fd(&self) -> i32 {
        self.wakeup.as_raw_fd()
    }

    /// Add to what has come, and wake Python's event loop if it does not know of anything yet.
    pub fn arrive(&self, add: impl FnOnce(&mut Arrivals)) {
        let was_empty = {
            let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            let was_empty = arrivals.is_empty();
            add(&mut arrivals);
            was_empty
        };
        if was_empty {
            ring(self.fd());
        }
    }

    /// Add it unless there is too much of its kind; whether it was added.
    pub fn arrive_unless(&self, too_much: impl Fn(&Arrivals) -> bool, arrival: Arrival) -> bool {
        let mut added = false;
        self.arrive(|arrivals| {
            if !too_much(arrivals) {
                arrivals.push(arrival);
                added = true;
            }
        });
        added
    }

    /// Say that the wire serves no longer.
    pub fn end(&self) {
        self.is_dead.store(true, Ordering::Release);
        ring(self.fd());
    }

    /// Some of what has come; Python is woken again if there is more.
    pub fn take(&self) -> Vec<Arrival> {
        quiet(self.fd());
        let (taken, bytes, is_all) = {
            let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            let (taken, bytes) = arrivals.take(MOST_IN_BATCH);
            (taken, bytes, arrivals.is_empty())
        };
        if !is_all {
            ring(self.fd());
        }
        let left = self.queued.fetch_sub(bytes, Ordering::Relaxed) - bytes;
        if left < self.limits.queued_bytes {
            let waiting = std::mem::take(&mut *self.readers.lock().unwrap_or_else(PoisonError::into_inner));
            waiting.into_iter().for_each(Waker::wake);
        }
        taken
    }

    /// Whether a stream may be read: else it is woken when Python has taken enough of what waits.
    pub fn may_read(&self, cx: &Context<'_>) -> bool {
        if self.queued.load(Ordering::Relaxed) < self.limits.queued_bytes {
            return true;
        }
        self.readers.lock().unwrap_or_else(PoisonError::into_inner).push(cx.waker().clone());
        // Python may have taken it meanwhile, and have seen nobody waiting
        self.queued.load(Ordering::Relaxed) < self.limits.queued_bytes
    }
}

/// Make an eventfd readable.
#[allow(unsafe_code)]
fn ring(fd: i32) {
    let one: u64 = 1;
    // SAFETY: eight bytes of a number that lives until the call returns, written to an eventfd that is ours.
    // It cannot fail but for a counter that is full, and then it is readable already.
    let _ = unsafe { libc::write(fd, std::ptr::from_ref(&one).cast(), 8) };
}

/// Make an eventfd unreadable.
#[allow(unsafe_code)]
fn quiet(fd: i32) {
    let mut count: u64 = 0;
    // SAFETY: eight bytes into a number that lives until the call returns. Not readable is fine.
    let _ = unsafe { libc::read(fd, std::ptr::from_mut(&mut count).cast(), 8) };
}

/// Where connections come from.
#[derive(Debug)]
pub enum Listener {
    Tcp(StdTcpListener),
    Unix(StdUnixListener),
}

/// How far the server is in its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Serving,
    /// No new connections or calls; those that run go on.
    Draining,
    /// What still runs is cut off.
    Closed,
}

/// Serve listeners until the stage says that it is over.
pub async fn run(listeners: Vec<Listener>, shared: Arc<Shared>, stage: watch::Receiver<Stage>) {
    let (done, mut all_done) = tokio::sync::mpsc::channel::<()>(1);
    for listener in listeners {
        let (shared, stage, done) = (shared.clone(), stage.clone(), done.clone());
        tokio::spawn(async move {
            match listener {
                Listener::Tcp(listener) => accept_tcp(listener, shared, stage, done).await,
                Listener::Unix(listener) => accept_unix(listener, shared, stage, done).await,
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

/// Return when the server is at this stage, or nobody can say any more.
async fn reached(stage: &mut watch::Receiver<Stage>, wanted: Stage) {
    let _ = stage.wait_for(|stage| *stage >= wanted).await;
}

type Done = tokio::sync::mpsc::Sender<()>;

async fn accept_tcp(
    listener: StdTcpListener,
    shared: Arc<Shared>,
    mut stage: watch::Receiver<Stage>,
    done: Done,
) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = reached(&mut stage, Stage::Draining) => return,
        };
        match accepted {
            Ok((socket, address)) => {
                let _ = socket.set_nodelay(true);
                begin(socket, |_| tcp_name(address), &shared, &stage, &done);
            }
            Err(_) => out_of_descriptors().await,
        }
    }
}

async fn accept_unix(
    listener: StdUnixListener,
    shared: Arc<Shared>,
    mut stage: watch::Receiver<Stage>,
    done: Done,
) {
    let Ok(listener) = UnixListener::from_std(listener) else { return };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = reached(&mut stage, Stage::Draining) => return,
        };
        match accepted {
            Ok((socket, _)) => begin(socket, |number| format!("unix:{number}"), &shared, &stage, &done),
            Err(_) => out_of_descriptors().await,
        }
    }
}

/// Accepting failed, which it does where file descriptors have run out: others' ends bring some back.
async fn out_of_descriptors() {
    tokio::time::sleep(Duration::from_millis(50)).await;
}

fn tcp_name(address: SocketAddr) -> String {
    match address {
        SocketAddr::V4(address) => format!("ipv4:{address}"),
        SocketAddr::V6(address) => format!("ipv6:%5B{}%5D:{}", address.ip(), address.port()),
    }
}

/// Serve a connection in a task of its own. `name` makes its name of its number.
fn begin<S>(
    socket: S,
    name: impl FnOnce(u64) -> String,
    shared: &Arc<Shared>,
    stage: &watch::Receiver<Stage>,
    done: &Done,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let number = shared.connections.fetch_add(1, Ordering::Relaxed);
    let mut peer = Peer { name: name(number), number, certificate_names: Vec::new() };
    let (shared, mut stage, done) = (shared.clone(), stage.clone(), done.clone());
    tokio::spawn(async move {
        let tls = shared.tls.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(config) = tls {
            let secured = tokio::select! {
                secured = tls::accept(config, socket) => secured,
                () = reached(&mut stage, Stage::Draining) => None,
            };
            if let Some((socket, names)) = secured {
                peer.certificate_names = names;
                connection(socket, Arc::new(peer), &shared, stage).await;
            }
        } else {
            connection(socket, Arc::new(peer), &shared, stage).await;
        }
        drop(done);
    });
}

async fn connection<S>(socket: S, peer: Arc<Peer>, shared: &Arc<Shared>, mut stage: watch::Receiver<Stage>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let limits = &shared.limits;
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(limits.streams)
        // an honest client may cancel all that it has under way at once
        .max_pending_accept_reset_streams(limits.streams as usize)
        .max_header_list_size(limits.header_bytes)
        .initial_window_size(1 << 20)
        .initial_connection_window_size(1 << 24)
        .max_frame_size(1 << 16);
    let handshake = tokio::time::timeout(limits.keepalive_timeout, builder.handshake::<_, Bytes>(socket));
    let Ok(Ok(mut connection)) = handshake.await else { return };
    let mut pings = connection.ping_pong();
    let alive = async move {
        match pings.as_mut() {
            Some(pings) => keep_alive(pings, limits).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(alive);
    let mut life = Lifetime::new(limits.age, limits.age_grace);
    let mut is_draining = false;
    let mut closed = stage.clone();
    loop {
        let accepted = tokio::select! {
            biased;
            () = reached(&mut closed, Stage::Closed) => {
                return cut_off(&mut connection, h2::Reason::CANCEL).await;
            }
            age = life.next() => match age {
                Age::Old => {
                    connection.graceful_shutdown();
                    continue;
                }
                Age::TooOld => return cut_off(&mut connection, h2::Reason::NO_ERROR).await,
            },
            () = reached(&mut stage, Stage::Draining), if !is_draining => {
                is_draining = true;
                connection.graceful_shutdown();
                continue;
            }
            accepted = connection.accept() => accepted,
            () = &mut alive => return,
        };
        match accepted {
            Some(Ok((request, respond))) => serve::begin(request, respond, &peer, shared),
            Some(Err(_)) | None => return,
        }
    }
}

async fn cut_off<S>(connection: &mut h2::server::Connection<S, Bytes>, reason: h2::Reason)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    connection.abrupt_shutdown(reason);
    // one look more, so that it is said
    let _ = tokio::time::timeout(Duration::from_millis(10), connection.accept()).await;
}

/// Return when a silent client does not answer any more.
async fn keep_alive(pings: &mut h2::PingPong, limits: &Limits) {
    loop {
        tokio::time::sleep(limits.keepalive).await;
        let answer = tokio::time::timeout(limits.keepalive_timeout, pings.ping(h2::Ping::opaque())).await;
        if !matches!(answer, Ok(Ok(_))) {
            return;
        }
    }
}
