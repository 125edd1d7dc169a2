//! HTTP/2 on one thread: reads steps, wakes Python, sends replies.

use crate::messages::{frame, step, Messages};
use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response};
use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use tokio::net::TcpStream;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::{spawn_local, LocalSet};

const MAX_STREAMS: u32 = 100_000;
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 1 << 24;
const OK: HeaderValue = HeaderValue::from_static("0");
const NOT_FOUND: HeaderValue = HeaderValue::from_static("5");

/// Where the reply to a step goes; a stream has the id of its frame too.
pub enum Caller {
    Call(SendResponse<Bytes>),
    Stream(Arc<Mutex<SendStream<Bytes>>>, u64),
}

pub struct Step {
    pub handle: u32,
    pub input: Bytes,
    pub caller: Caller,
}

/// What the thread of the wire and Python share.
pub struct Wire {
    /// Readable while steps wait.
    pub eventfd: i32,
    handles: HashMap<Vec<u8>, u32>,
    waiting: Mutex<Vec<Step>>,
}

impl Wire {
    pub fn new(ids: Vec<Vec<u8>>) -> std::io::Result<Self> {
        let eventfd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if eventfd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let handles = ids.into_iter().zip(0..).collect();
        Ok(Self { eventfd, handles, waiting: Mutex::default() })
    }

    pub fn take(&self) -> Vec<Step> {
        let mut count = [0u8; 8];
        unsafe { libc::read(self.eventfd, count.as_mut_ptr().cast(), count.len()) };
        std::mem::take(&mut self.waiting.lock().unwrap())
    }

    fn put(&self, step: Step) {
        let mut waiting = self.waiting.lock().unwrap();
        waiting.push(step);
        if waiting.len() == 1 {
            drop(waiting);
            let one = 1u64.to_ne_bytes();
            unsafe { libc::write(self.eventfd, one.as_ptr().cast(), one.len()) };
        }
    }

    /// The handle and the input of a step of a known session.
    fn read(&self, message: Bytes) -> Option<(u32, Bytes)> {
        let (id, input) = step(message)?;
        Some((*self.handles.get(&id[..])?, input))
    }
}

/// Serve until the process ends.
pub fn serve(listener: TcpListener, wire: Arc<Wire>, to_send: UnboundedReceiver<Vec<(Caller, Bytes)>>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async move {
        spawn_local(send(to_send));
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        while let Ok((socket, _)) = listener.accept().await {
            let _ = socket.set_nodelay(true);
            spawn_local(connection(socket, wire.clone()));
        }
    });
}

async fn connection(socket: TcpStream, wire: Arc<Wire>) {
    let mut http2 = h2::server::Builder::new();
    http2
        .max_concurrent_streams(MAX_STREAMS)
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    let Ok(mut connection): Result<Connection<_, Bytes>, _> = http2.handshake(socket).await else { return };
    while let Some(Ok((request, respond))) = connection.accept().await {
        if request.uri().path().ends_with("StepStream") {
            spawn_local(stream(request, respond, wire.clone()));
        } else {
            spawn_local(call(request, respond, wire.clone()));
        }
    }
}

async fn call(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, wire: Arc<Wire>) {
    let mut body = request.into_body();
    let mut messages = Messages::default();
    while let Some(Ok(data)) = body.data().await {
        let _ = body.flow_control().release_capacity(data.len());
        messages.data.extend_from_slice(&data);
        let Some(message) = messages.next() else { continue };
        if let Some((handle, input)) = wire.read(message) {
            wire.put(Step { handle, input, caller: Caller::Call(respond) });
        } else if let Ok(mut stream) = respond.send_response(head(), false) {
            let _ = stream.send_trailers(status(NOT_FOUND));
        }
        return;
    }
}

async fn stream(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, wire: Arc<Wire>) {
    let Ok(replies) = respond.send_response(head(), false) else { return };
    let replies = Arc::new(Mutex::new(replies));
    let mut body = request.into_body();
    let mut messages = Messages::default();
    let mut end = OK;
    'data: while let Some(Ok(data)) = body.data().await {
        let _ = body.flow_control().release_capacity(data.len());
        messages.data.extend_from_slice(&data);
        for message in messages.by_ref() {
            let read = frame(message).and_then(|(id, step)| Some((id, wire.read(step)?)));
            let Some((id, (handle, input))) = read else {
                end = NOT_FOUND;
                break 'data;
            };
            wire.put(Step { handle, input, caller: Caller::Stream(replies.clone(), id) });
        }
    }
    let _ = replies.lock().unwrap().send_trailers(status(end));
}

async fn send(mut to_send: UnboundedReceiver<Vec<(Caller, Bytes)>>) {
    while let Some(replies) = to_send.recv().await {
        for (caller, bytes) in replies {
            match caller {
                Caller::Call(mut respond) => {
                    if let Ok(mut stream) = respond.send_response(head(), false) {
                        let _ = stream.send_data(bytes, false);
                        let _ = stream.send_trailers(status(OK));
                    }
                }
                Caller::Stream(stream, _) => {
                    let _ = stream.lock().unwrap().send_data(bytes, false);
                }
            }
        }
    }
}

fn head() -> Response<()> {
    let mut head = Response::new(());
    head.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    head
}

fn status(code: HeaderValue) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert("grpc-status", code);
    trailers
}
