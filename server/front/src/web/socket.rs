//! The socket of an HTTP/1.1 connection: it is read within the connection's quota, and ends if its client does not read.

use crate::limits::bounds::Bounds;
use crate::limits::read_quota::ReadQuota;
use crate::limits::refusals::Refusal;
use crate::limits::write_through::write_through;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{ready, Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{sleep, Sleep};

/// A socket, and the first bytes of it, which were read to see the version of HTTP. They are read again.
pub struct Rewind<S> {
    socket: S,
    first: Vec<u8>,
}

impl<S> Rewind<S> {
    pub fn new(socket: S, first: Vec<u8>) -> Self {
        Rewind { socket, first }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewind<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.socket).poll_read(cx, buf);
        }
        let size = self.first.len().min(buf.remaining());
        buf.put_slice(&self.first[..size]);
        self.first.drain(..size);
        Poll::Ready(Ok(()))
    }
}

write_through!(Rewind);

/// A socket with the limits of its connection.
pub struct Socket<S> {
    socket: S,
    quota: Arc<ReadQuota>,
    bounds: Arc<Bounds>,
    /// Set while the client makes no room.
    unread: Option<Pin<Box<Sleep>>>,
}

impl<S> Socket<S> {
    pub fn new(socket: S, quota: Arc<ReadQuota>, bounds: Arc<Bounds>) -> Self {
        Socket { socket, quota, bounds, unread: None }
    }

    /// Pass on the result of a write, or an error if the client has made no room for too long.
    fn in_time<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.unread = None;
            return written;
        }
        let unread = self.bounds.limits.unread;
        let timer = self.unread.get_or_insert_with(|| Box::pin(sleep(unread)));
        ready!(timer.as_mut().poll(cx));
        self.bounds.counts.refuse(Refusal::UnreadReplies);
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Socket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let left = self.quota.left();
        if left == 0 {
            // see `QuotaSocket`
            let _ = std::pin::pin!(tokio::task::yield_now()).poll(cx);
            return Poll::Pending;
        }
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(left.min(buf.remaining())));
        ready!(Pin::new(&mut self.socket).poll_read(cx, &mut part))?;
        let read = part.filled().len();
        buf.advance(read);
        self.quota.took(read);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, buf);
        self.in_time(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        self.in_time(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let written = Pin::new(&mut self.socket).poll_flush(cx);
        self.in_time(cx, written)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
