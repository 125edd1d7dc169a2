//! The descriptors that Python's event loop polls: an eventfd for arrivals and, while the loop drives the sockets
//! (`driver`), these sockets.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;

/// Limit of sockets in the set. While there are more, the loop does not drive.
const MAX_SOCKETS: usize = 64;

/// A descriptor that is readable from a ring until it is quieted. Any thread may ring.
#[derive(Debug)]
pub struct Event {
    event: OwnedFd,
    /// Whether it was rung and not quieted.
    is_rung: AtomicBool,
}

impl Event {
    pub fn new() -> io::Result<Self> {
        Ok(Event { event: eventfd()?, is_rung: AtomicBool::new(false) })
    }

    pub fn fd(&self) -> i32 {
        self.event.as_raw_fd()
    }

    #[allow(unsafe_code)]
    pub fn ring(&self) {
        if self.is_rung.swap(true, Ordering::SeqCst) {
            return; // the reader takes this arrival too, because it takes arrivals after `quiet`
        }
        let one: u64 = 1;
        // SAFETY: eight bytes of a number that lives until the call returns, written to an eventfd that is ours.
        // It can only fail if the counter is full, and then the eventfd is readable already.
        let _ = unsafe { libc::write(self.fd(), std::ptr::from_ref(&one).cast(), 8) };
    }

    /// Reset the signal, before the reader takes the arrivals.
    #[allow(unsafe_code)]
    pub fn quiet(&self) {
        if !self.is_rung.load(Ordering::SeqCst) {
            return;
        }
        let mut count: u64 = 0;
        // SAFETY: eight bytes into a number that lives until the call returns.
        let size = unsafe { libc::read(self.fd(), std::ptr::from_mut(&mut count).cast(), 8) };
        if size == 8 {
            self.is_rung.store(false, Ordering::SeqCst);
        } // otherwise a ringing thread is about to write it
    }
}

/// Wakes Python's event loop. Any thread may ring.
#[derive(Debug)]
pub struct Wakeup {
    event: Event,
    /// The epoll set of the sockets.
    sockets: OwnedFd,
    /// The epoll set of the eventfd and, while the loop drives, of `sockets`: readable if one of them is.
    all: OwnedFd,
    counts: Arc<SocketCounts>,
}

#[derive(Debug, Default)]
struct SocketCounts {
    watched: AtomicUsize,
    unwatched: AtomicUsize,
}

impl Wakeup {
    pub fn new() -> io::Result<Self> {
        let wakeup =
            Wakeup { event: Event::new()?, sockets: epoll()?, all: epoll()?, counts: Arc::default() };
        control(&wakeup.all, libc::EPOLL_CTL_ADD, wakeup.event.fd())?;
        Ok(wakeup)
    }

    /// Readable when Python has something to do.
    pub fn fd(&self) -> i32 {
        self.all.as_raw_fd()
    }

    /// Wake the event loop.
    pub fn ring(&self) {
        self.event.ring();
    }

    /// Reset the signal, before the event loop takes the arrivals.
    pub fn quiet(&self) {
        self.event.quiet();
    }

    /// Count an open socket until the returned guard is dropped.
    pub fn watch(&self, socket: &impl AsRawFd) -> Watched {
        let is_watched = self.counts.watched.load(Ordering::Relaxed) < MAX_SOCKETS
            && control(&self.sockets, libc::EPOLL_CTL_ADD, socket.as_raw_fd()).is_ok();
        let watched = Watched { counts: self.counts.clone(), is_watched };
        watched.count().fetch_add(1, Ordering::Relaxed);
        watched
    }

    /// Whether the event loop would see all sockets.
    pub fn sees_all(&self) -> bool {
        self.counts.unwatched.load(Ordering::Relaxed) == 0
    }

    /// Wake the event loop for the sockets too. Returns whether that is possible.
    pub fn add_sockets(&self) -> bool {
        control(&self.all, libc::EPOLL_CTL_ADD, self.sockets.as_raw_fd()).is_ok()
    }

    /// Stop waking the event loop for the sockets.
    pub fn remove_sockets(&self) {
        let _ = control(&self.all, libc::EPOLL_CTL_DEL, self.sockets.as_raw_fd());
    }
}

/// A socket that counts while this guard lives. It leaves the set when it is closed.
#[derive(Debug)]
pub struct Watched {
    counts: Arc<SocketCounts>,
    is_watched: bool,
}

impl Watched {
    fn count(&self) -> &AtomicUsize {
        if self.is_watched {
            &self.counts.watched
        } else {
            &self.counts.unwatched
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.count().fetch_sub(1, Ordering::Relaxed);
    }
}

#[allow(unsafe_code)]
fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointer.
    owned(unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) })
}

#[allow(unsafe_code)]
fn epoll() -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointer.
    owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })
}

#[allow(unsafe_code)]
fn owned(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is new, and owned by nothing else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Change which descriptors are in a set: each is there for as long as there is something to read.
#[allow(unsafe_code)]
fn control(set: &OwnedFd, change: i32, fd: i32) -> io::Result<()> {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
    // SAFETY: an event that lives until the call returns; an invalid descriptor only causes an error.
    if unsafe { libc::epoll_ctl(set.as_raw_fd(), change, fd, std::ptr::from_mut(&mut event)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[allow(unsafe_code)]
    fn is_readable(wakeup: &Wakeup) -> bool {
        let mut polled = libc::pollfd { fd: wakeup.fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, which lives until the call returns.
        unsafe { libc::poll(std::ptr::from_mut(&mut polled), 1, 0) == 1 }
    }

    #[test]
    fn it_rings_until_it_is_quieted() {
        let wakeup = Wakeup::new().unwrap();
        assert!(!is_readable(&wakeup));
        for _ in 0..2 {
            wakeup.ring();
            wakeup.ring();
            assert!(is_readable(&wakeup));
            wakeup.quiet();
            assert!(!is_readable(&wakeup));
        }
    }

    #[test]
    fn sockets_wake_the_loop_only_while_they_are_in_the_set() {
        let wakeup = Wakeup::new().unwrap();
        let (mut here, mut there) = UnixStream::pair().unwrap();
        let watched = wakeup.watch(&here);
        there.write_all(b"x").unwrap();
        assert!(!is_readable(&wakeup));
        assert!(wakeup.add_sockets() && is_readable(&wakeup));
        here.read_exact(&mut [0]).unwrap();
        assert!(!is_readable(&wakeup), "all was read");
        there.write_all(b"x").unwrap();
        assert!(is_readable(&wakeup));
        wakeup.remove_sockets();
        assert!(!is_readable(&wakeup));
        drop((here, watched));
        assert!(wakeup.add_sockets() && !is_readable(&wakeup), "it is closed");
    }

    #[test]
    fn sockets_beyond_the_limit_are_counted() {
        let wakeup = Wakeup::new().unwrap();
        let pairs: Vec<_> = (0..=MAX_SOCKETS).map(|_| UnixStream::pair().unwrap()).collect();
        let mut watched: Vec<_> = pairs.iter().map(|(here, _)| wakeup.watch(here)).collect();
        assert!(!wakeup.sees_all());
        watched.pop();
        assert!(wakeup.sees_all());
        drop(watched);
        assert_eq!(wakeup.counts.watched.load(Ordering::Relaxed), 0);
    }
}
