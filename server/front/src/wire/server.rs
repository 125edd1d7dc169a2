//! Connections: accepted, kept alive, ended; a task for each, and one for each of its calls.

use crate::calls::serve;
use crate::limits::bounds::{Counts, Load, Place, Refusal, Slot, Waiters};
use crate::limits::callers::Callers;
use crate::limits::settings::Limits;
use crate::limits::tenancy::Connections;
use crate::limits::turn::{Gate, InTurns, Received, Turn};
use crate::messages::inflate::Pace;
use crate::messages::shape::{Breach, Shape};
use crate::steps::call::Peer;
use crate::steps::columns::{Arrival, Arrivals, MOST_IN_BATCH};
use crate::wakeup::Wakeup;
use crate::wire::doors::{Doors, Entry};
use crate::wire::lifetime::{Age, Lifetime};
use crate::wire::tls;
use bytes::Bytes;
use std::collections::HashMap;
use std::future::Future;
use std::net::{SocketAddr, TcpListener as StdTcpListener};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{watch, Semaphore};

/// A method that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    pub index: usize,
    pub streams: bool,
    pub plain: Plain,
    /// Anybody may call it: it says how the server is.
    pub is_open: bool,
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
    /// What their requests may hold, by `Method::index`.
    pub shapes: Vec<Shape>,
    /// What new connections get; None: plain text.
    pub tls: Mutex<Option<Arc<rustls::ServerConfig>>>,
    /// Who is known; None: nobody is asked who calls.
    pub callers: Option<Arc<Callers>>,
    /// The wire's thread has ended.
    pub is_dead: AtomicBool,
    /// Nothing is plain: Python wants to see every message.
    pub all_general: AtomicBool,
    /// Python makes traces: calls whose clients trace them are its own.
    pub traces: AtomicBool,
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
    readers: Waiters,
    pub counts: Counts,
    /// Of inflating.
    pub pace: Pace,
    /// Places of calls of which Python is asked who makes them.
    pub judging: Arc<Semaphore>,
    /// What connections have sent that is not done with.
    received: Arc<Received>,
    /// Of connections that no known caller has used.
    gate: Gate,
    arrivals: Mutex<Arrivals>,
    pub wakeup: Wakeup,
    /// Python's event loop is about to take what comes.
    pub is_taking: AtomicBool,
    /// Those that are there.
    pub open: Arc<Connections>,
    /// Connections so far: each has its number.
    connections: AtomicU64,
}

impl Shared {
    pub fn new(
        limits: Limits,
        methods: HashMap<String, Method>,
        shapes: Vec<Shape>,
        callers: Option<Arc<Callers>>,
        wakeup: Wakeup,
    ) -> Self {
        Shared {
            limits,
            methods,
            shapes,
            tls: Mutex::default(),
            callers,
            is_dead: AtomicBool::new(false),
            all_general: AtomicBool::new(false),
            traces: AtomicBool::new(false),
            abandoned: AtomicU64::new(0),
            commands: AtomicUsize::new(0),
            unwritten: Arc::default(),
            held: Arc::default(),
            queued: AtomicUsize::new(0),
            readers: Waiters::default(),
            counts: Counts::default(),
            pace: Pace::default(),
            judging: Arc::new(Semaphore::new(MAX_JUDGED)),
            received: Arc::default(),
            gate: Gate::default(),
            arrivals: Mutex::new(Arrivals::default()),
            wakeup,
            is_taking: AtomicBool::new(false),
            open: Arc::default(),
            connections: AtomicU64::new(0),
        }
    }

    /// The rule that a message breaks which Python is to parse.
    pub fn breach(&self, method: Method, message: &[u8]) -> Option<Breach> {
        self.shapes.get(method.index).and_then(|shape| shape.check(message))
    }

    /// Replies that are not on their way, wherever they wait.
    pub fn unwritten(&self) -> usize {
        self.unwritten.load(Ordering::Acquire) + self.commands.load(Ordering::Acquire)
    }

    /// Add to what has come, and wake Python's event loop if it does not know of anything yet.
    pub fn arrive(&self, add: impl FnOnce(&mut Arrivals)) {
        let was_empty = {
            let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            let was_empty = arrivals.is_empty();
            add(&mut arrivals);
            was_empty
        };
        if was_empty && !self.is_taking.load(Ordering::Relaxed) {
            self.wakeup.ring();
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
        self.wakeup.ring();
    }

    /// Some of what has come; Python is woken again if there is more.
    pub fn take(&self) -> Vec<Arrival> {
        self.wakeup.quiet();
        let (taken, bytes, is_all) = {
            let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            let (taken, bytes) = arrivals.take(MOST_IN_BATCH);
            (taken, bytes, arrivals.is_empty())
        };
        if !is_all {
            self.wakeup.ring();
        }
        let left = self.queued.fetch_sub(bytes, Ordering::Relaxed) - bytes;
        if left < self.limits.queued_bytes {
            self.readers.wake();
        }
        taken
    }

    /// Whether a stream may be read: else it is woken when Python has taken enough of what waits.
    pub fn may_read(&self, cx: &Context<'_>, place: &mut Place) -> bool {
        if self.queued.load(Ordering::Relaxed) < self.limits.queued_bytes {
            return true;
        }
        self.readers.add(cx, place);
        // Python may have taken it meanwhile, and have seen nobody waiting
        self.queued.load(Ordering::Relaxed) < self.limits.queued_bytes
    }
}

/// Where connections come from.
#[derive(Debug)]
pub enum Listener {
    Tcp(StdTcpListener),
    Unix(StdUnixListener),
}

impl Listener {
    /// A listening socket that Python has made and given away: `Front.start`'s caller says of which kind it is.
    #[allow(unsafe_code)]
    pub fn given(fd: i32, is_unix: bool) -> Self {
        // SAFETY: it is open, and nobody else's any more.
        unsafe {
            if is_unix {
                Listener::Unix(FromRawFd::from_raw_fd(fd))
            } else {
                Listener::Tcp(FromRawFd::from_raw_fd(fd))
            }
        }
    }
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
    let _watched = shared.wakeup.watch(&listener);
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    let mut doors = Doors::new(shared.clone());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = reached(&mut stage, Stage::Draining) => return,
        };
        let entered = doors.admit(accepted, |(_, address)| Some(address.ip())).await;
        if let Some(((socket, address), entry)) = entered {
            let _ = socket.set_nodelay(true);
            begin(socket, entry, |_| tcp_name(address), &shared, &stage, &done);
        }
    }
}

async fn accept_unix(
    listener: StdUnixListener,
    shared: Arc<Shared>,
    mut stage: watch::Receiver<Stage>,
    done: Done,
) {
    let _watched = shared.wakeup.watch(&listener);
    let Ok(listener) = UnixListener::from_std(listener) else { return };
    let mut doors = Doors::new(shared.clone());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = reached(&mut stage, Stage::Draining) => return,
        };
        if let Some(((socket, _), entry)) = doors.admit(accepted, |_| None).await {
            begin(socket, entry, |number| format!("unix:{number}"), &shared, &stage, &done);
        }
    }
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
    entry: Entry,
    name: impl FnOnce(u64) -> String,
    shared: &Arc<Shared>,
    stage: &watch::Receiver<Stage>,
    done: &Done,
) where
    S: AsyncRead + AsyncWrite + AsRawFd + Unpin + Send + 'static,
{
    let watched = shared.wakeup.watch(&socket);
    let number = shared.connections.fetch_add(1, Ordering::Relaxed);
    let load = Load::new(shared.limits.connection_steps);
    let turn = Arc::new(Turn::new(shared.received.clone()));
    let peer = Arc::new(Peer::new(name(number), number, load, turn.clone()));
    shared.open.add(&peer);
    let own = peer.clone();
    let (shared, mut stage, done) = (shared.clone(), stage.clone(), done.clone());
    tokio::spawn(async move {
        let max_kept = shared.limits.budget_bytes / KEPT_PART;
        let mut serving = std::pin::pin!(async {
            let tls = shared.tls.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let Some(config) = tls else {
                let socket = InTurns::new(socket, turn.clone());
                return connection(socket, &turn, peer, &shared, stage).await;
            };
            let secured = tokio::select! {
                secured = tls::accept(config, socket) => secured,
                () = reached(&mut stage, Stage::Draining) => return,
                () = peer.stay.left() => return,
            };
            let Some((socket, names)) = secured else { return shared.counts.refuse(Refusal::Handshake) };
            peer.show(names);
            let socket = InTurns::new(socket, turn.clone());
            connection(socket, &turn, peer, &shared, stage).await;
        });
        loop {
            let pass = match own.stay.is_known() {
                true => None,
                false => shared.gate.pass(|| turn.is_given_up()).await,
            };
            turn.begin();
            let began = Instant::now();
            let served = std::future::poll_fn(|cx| Poll::Ready(serving.as_mut().poll(cx))).await;
            turn.end(began.elapsed());
            while shared.received.kept() > max_kept && shared.open.end_largest() {
                shared.counts.refuse(Refusal::Evicted);
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

/// Return when this task, of which a future has just been polled, is woken.
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

/// Calls of all connections of which Python is asked at the same time who makes them.
const MAX_JUDGED: usize = 32;
/// Headers that are refused with a status. h2 answers larger ones with HTTP's 431, and ends connections that go on.
const LARGEST_HEADER_BYTES: u32 = 64 << 10;
/// What a connection may send that is not read: until its first call of a caller who may make it, and from then on if there
/// is enough for it. All of them have this part of the bytes that may be held.
const FIRST_WINDOW_BYTES: u32 = 64 << 10;
const WINDOW_BYTES: u32 = 4 << 20;
const WINDOWS_PART: usize = 4;
/// What h2 keeps beside that (frames and headers without an end, entries of tables) has this part of them: a connection ends
/// where it is more.
const KEPT_PART: usize = 4;
/// The same, of one call.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// What h2 takes of a call's replies, as the client makes room, before they are written to the socket.
const SEND_BUFFER_BYTES: usize = 256 << 10;
/// Calls of one connection that end before they were looked at: a client that begins and cancels them as fast as it can.
const MOST_RESET: usize = 1000;
/// Calls of one connection that break HTTP/2's rules.
const MOST_MISTAKES: usize = 1000;
/// Calls that we have ended, of which h2 still knows for a moment: what their clients had sent meanwhile is no mistake.
const REMEMBERED_RESETS: usize = 1000;
const REMEMBER_RESETS: Duration = Duration::from_secs(5);

/// How HTTP/2 is spoken. All that h2 bounds is said here, and nothing is left to its defaults.
fn http2(limits: &Limits) -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(LARGEST_HEADER_BYTES)
        .max_frame_size(1 << 16)
        .initial_connection_window_size(FIRST_WINDOW_BYTES)
        .initial_window_size(STREAM_WINDOW_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_pending_accept_reset_streams(MOST_RESET)
        .max_local_error_reset_streams(Some(MOST_MISTAKES))
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .reset_stream_duration(REMEMBER_RESETS);
    builder
}

async fn connection<S>(
    socket: S,
    turn: &Turn,
    peer: Arc<Peer>,
    shared: &Arc<Shared>,
    mut stage: watch::Receiver<Stage>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let limits = &shared.limits;
    let handshake = tokio::time::timeout(limits.handshake, http2(limits).handshake::<_, Bytes>(socket));
    let handshake = tokio::select! {
        handshake = handshake => handshake,
        () = peer.stay.left() => return,
    };
    let mut connection = match handshake {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) if error.is_io() => return, // it has gone
        _ => return shared.counts.refuse(Refusal::Handshake),
    };
    let mut window = None;
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
            () = peer.stay.left() => return cut_off(&mut connection, h2::Reason::NO_ERROR).await,
            () = std::future::poll_fn(|_| turn.poll_flooded()) => {
                shared.counts.refuse(Refusal::ControlFrames);
                return cut_off(&mut connection, h2::Reason::ENHANCE_YOUR_CALM).await;
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
            () = &mut alive => return shared.counts.refuse(Refusal::Silent),
        };
        match accepted {
            Some(Ok((request, respond))) => {
                serve::begin(request, respond, &peer, shared);
                if window.is_none() && peer.stay.is_known() {
                    let all = limits.budget_bytes / WINDOWS_PART;
                    let size = window_for(all.saturating_sub(shared.counts.windows.load(Ordering::Relaxed)));
                    window = Some(Slot::take(shared, |counts| &counts.windows, size as usize, all));
                    if size > FIRST_WINDOW_BYTES && matches!(window, Some(Some(_))) {
                        connection.set_target_window_size(size);
                    }
                }
            }
            Some(Err(error)) => {
                if error.is_library() {
                    shared.counts.refuse(Refusal::Protocol);
                }
                return;
            }
            None => return,
        }
    }
}

/// What a connection may send unread while this is left for all: the less there is left, the less it gets of it.
fn window_for(left: usize) -> u32 {
    (left / WINDOWS_PART).min(WINDOW_BYTES as usize) as u32
}

/// End a connection, and say why.
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

#[cfg(test)]
impl Shared {
    pub fn for_test() -> Self {
        let limits = Limits::for_test();
        Shared::new(
            limits,
            HashMap::new(),
            Vec::new(),
            None,
            Wakeup::new().unwrap_or_else(|_| unreachable!()),
        )
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

    /// What the server has sent, if anything.
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
    async fn a_known_connection_does_not_wait_for_all_strangers() {
        let shared = Arc::new(Shared::for_test());
        let (_stage, watched) = watch::channel(Stage::Serving);
        let (done, _) = tokio::sync::mpsc::channel(1);
        let mut clients = Vec::new();
        for _ in 0..9 {
            let (mut client, socket) = Client::pair().unwrap();
            client.set_nonblocking(true).unwrap();
            socket.set_nonblocking(true).unwrap();
            client.write_all(HELLO).unwrap();
            let entered = Doors::new(shared.clone()).admit(UnixStream::from_std(socket), |_| None).await;
            let (socket, entry) = entered.unwrap();
            begin(socket, entry, |number| number.to_string(), &shared, &watched, &done);
            clients.push(client);
        }
        for client in &mut clients {
            client.write_all(PING).unwrap();
            while !has_pong(client) {
                tokio::task::yield_now().await;
            }
        }
        let (known, strangers) = clients.split_last_mut().unwrap();
        shared.open.know_last();
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
