//! Writes to the server's write-ahead log and flushes, on a thread that never takes Python's lock.
//!
//! Python lays out what is written and keeps all rules of the log. One write runs at a time, and another one may wait
//! for it, so that the disk need not wait for Python. The end of a write makes a descriptor readable, which Python's
//! event loop polls.

use crate::wakeup::Event;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Data to write into a file.
pub struct Job<D> {
    /// The file, by the descriptor that Python knows.
    pub descriptor: RawFd,
    pub data: D,
    pub at: u64,
    /// The places that are overwritten with zeros if the write fails, and how many.
    pub heads: Vec<u64>,
    pub head_bytes: usize,
    /// Called on the writer's thread once the disk has the data, when `take` returns the write.
    pub then: Option<Box<dyn FnOnce() + Send>>,
}

/// A write that has ended.
pub struct Ended<D> {
    /// The job's data, which the caller drops.
    pub data: D,
    pub result: io::Result<()>,
    pub duration: Duration,
}

impl<D> Ended<D> {
    fn behind_a_failed_one(data: D) -> Self {
        Ended { data, result: Err(io::Error::from_raw_os_error(libc::ECANCELED)), duration: Duration::ZERO }
    }
}

/// The most writes that wait, run, or were not taken.
const MAX_UNDER_WAY: usize = 2;

struct State<D> {
    /// Writes that have not begun.
    waiting: VecDeque<Job<D>>,
    is_running: bool,
    /// Writes that have ended and were not taken.
    ended: VecDeque<Ended<D>>,
    is_closed: bool,
}

struct Shared<D> {
    state: Mutex<State<D>>,
    changed: Condvar,
    ended: Event,
    /// The writer's own duplicates: Python may close its descriptors during a write.
    files: HashMap<RawFd, File>,
    /// A pause instead of each flush, for benchmarks.
    pause: Option<Duration>,
}

pub struct LogWriter<D> {
    shared: Arc<Shared<D>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl<D: AsRef<[u8]> + Send + 'static> LogWriter<D> {
    /// Start the thread. Python owns the descriptors.
    pub fn new(descriptors: &[RawFd], pause: Option<Duration>) -> io::Result<Self> {
        let files = descriptors.iter().map(|fd| Ok((*fd, duplicate(*fd)?))).collect::<io::Result<_>>()?;
        let state = Mutex::new(State {
            waiting: VecDeque::new(),
            is_running: false,
            ended: VecDeque::new(),
            is_closed: false,
        });
        let shared = Arc::new(Shared { state, changed: Condvar::new(), ended: Event::new()?, files, pause });
        let served = shared.clone();
        let thread = thread::Builder::new().name("stepwell-log".to_owned()).spawn(move || served.run())?;
        Ok(LogWriter { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Readable when a write has ended.
    pub fn fd(&self) -> RawFd {
        self.shared.ended.fd()
    }

    /// Begin a write, after the one that is under way. Returns whether that was possible: at most one was, and the
    /// writer is open. Behind one that failed and was not taken it fails too: it would be found behind a gap.
    pub fn write(&self, job: Job<D>) -> bool {
        let mut state = self.shared.state();
        let under_way = state.waiting.len() + usize::from(state.is_running) + state.ended.len();
        if state.is_closed || under_way >= MAX_UNDER_WAY {
            return false;
        }
        if state.ended.iter().any(|ended| ended.result.is_err()) {
            state.ended.push_back(Ended::behind_a_failed_one(job.data));
            drop(state);
            self.shared.ended.ring();
            return true;
        }
        state.waiting.push_back(job);
        drop(state); // the thread needs it when it wakes
        self.shared.changed.notify_all();
        true
    }

    /// Take back the last write, if it has not begun and another one is under way.
    pub fn withdraw(&self) -> Option<Job<D>> {
        let mut state = self.shared.state();
        let is_behind = state.is_running || state.waiting.len() > 1;
        is_behind.then(|| state.waiting.pop_back()).flatten()
    }

    /// The first write that has ended. Call it until there is none: the event is quiet then.
    pub fn take(&self) -> Option<Ended<D>> {
        let mut state = self.shared.state();
        self.shared.ended.quiet();
        state.ended.pop_front()
    }

    /// End the thread after the running write. Returns whether that took no longer than `limit`.
    pub fn close(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut state = self.shared.state();
        state.is_closed = true;
        self.shared.changed.notify_all();
        while state.is_running || !state.waiting.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            (state, _) =
                self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join(); // it only has to see that the writer is closed
        }
        true
    }
}

impl<D> Drop for LogWriter<D> {
    /// End the thread after the running write, without waiting for it.
    fn drop(&mut self) {
        self.shared.state().is_closed = true;
        self.shared.changed.notify_all();
    }
}

impl<D> Shared<D> {
    fn state(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: AsRef<[u8]>> Shared<D> {
    fn run(&self) {
        while let Some(mut job) = self.next() {
            let started = Instant::now();
            let result = self.write(&job);
            let then = if result.is_ok() { job.then.take() } else { None };
            self.end(Ended { data: job.data, result, duration: started.elapsed() });
            // before `then`: Python's bookkeeping takes longer, and the next step waits for it
            self.ended.ring();
            if let Some(then) = then {
                // whoever it notifies finds the write ended; after a panic, which was printed, Python notifies the rest
                let _ = panic::catch_unwind(AssertUnwindSafe(then));
            }
            if self.state().is_closed {
                self.changed.notify_all(); // `close` waits
            }
        }
    }

    /// Note the end of the running write. If it failed, the next one fails too: it would be found behind a gap.
    fn end(&self, ended: Ended<D>) {
        let mut state = self.state();
        let has_failed = ended.result.is_err();
        state.ended.push_back(ended);
        if has_failed {
            while let Some(job) = state.waiting.pop_front() {
                state.ended.push_back(Ended::behind_a_failed_one(job.data));
            }
        }
        state.is_running = false;
    }

    fn next(&self) -> Option<Job<D>> {
        let mut state = self.state();
        loop {
            if let Some(job) = state.waiting.pop_front() {
                state.is_running = true;
                return Some(job);
            }
            if state.is_closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Write and flush. After a failure nothing of it is found when the log is read.
    fn write(&self, job: &Job<D>) -> io::Result<()> {
        let file = self.files.get(&job.descriptor).ok_or(io::ErrorKind::NotFound)?;
        let result = file.write_all_at(job.data.as_ref(), job.at).and_then(|()| self.flush(file));
        if result.is_err() {
            let zeros = vec![0; job.head_bytes];
            for head in &job.heads {
                // if this fails too, a change that was reported as failed may be found later
                let _ = file.write_all_at(&zeros, *head);
            }
        }
        result
    }

    fn flush(&self, file: &File) -> io::Result<()> {
        match self.pause {
            None => file.sync_data(),
            Some(pause) => {
                thread::sleep(pause);
                Ok(())
            }
        }
    }
}

#[allow(unsafe_code)]
fn duplicate(fd: RawFd) -> io::Result<File> {
    // SAFETY: Python owns the descriptor and keeps it open during this call.
    Ok(File::from(unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, OpenOptions};
    use std::os::fd::AsRawFd;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    const LIMIT: Duration = Duration::from_secs(60);

    /// An empty file of this test.
    fn file(name: &str, writable: bool) -> (PathBuf, File) {
        let path = std::env::temp_dir().join(format!("stepwell-log-{}-{name}", std::process::id()));
        fs::write(&path, b"").unwrap();
        (path.clone(), OpenOptions::new().read(true).write(writable).open(path).unwrap())
    }

    fn job(file: &File, data: &'static [u8], at: u64) -> Job<&'static [u8]> {
        Job { descriptor: file.as_raw_fd(), data, at, heads: vec![at], head_bytes: 2, then: None }
    }

    fn ended<D: AsRef<[u8]> + Send + 'static>(writer: &LogWriter<D>) -> Ended<D> {
        let until = Instant::now() + LIMIT;
        loop {
            if let Some(ended) = writer.take() {
                return ended;
            }
            assert!(Instant::now() < until, "the write does not end");
            is_readable(writer, 1000);
        }
    }

    /// Whether its event is there, after this many milliseconds at most.
    #[allow(unsafe_code)]
    fn is_readable<D: AsRef<[u8]> + Send + 'static>(writer: &LogWriter<D>, limit_ms: i32) -> bool {
        let mut polled = libc::pollfd { fd: writer.fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, which lives until the call returns.
        unsafe { libc::poll(std::ptr::from_mut(&mut polled), 1, limit_ms) == 1 }
    }

    #[test]
    fn writes_are_made_one_after_the_other() {
        let (path, open) = file("order", true);
        let writer = LogWriter::new(&[open.as_raw_fd()], None).unwrap();
        assert!(writer.take().is_none());
        assert!(writer.write(job(&open, b"abc", 0)));
        assert!(writer.write(job(&open, b"d", 3)), "it may wait for the first one");
        assert!(!writer.write(job(&open, b"xyz", 0)), "neither was taken");
        assert_eq!(ended(&writer).data, b"abc");
        assert!(ended(&writer).result.is_ok());
        drop(open); // the writer has its own
        assert!(writer.take().is_none());
        assert_eq!(fs::read(&path).unwrap(), b"abcd");
        fs::remove_file(path).unwrap();
    }

    /// A writer whose `then` waits until the sender is dropped, and that has begun the next write after it.
    fn held(open: &File) -> (LogWriter<&'static [u8]>, mpsc::Sender<()>) {
        let writer = LogWriter::new(&[open.as_raw_fd()], None).unwrap();
        let (sender, released) = mpsc::channel::<()>();
        let (started, has_started) = mpsc::channel::<()>();
        let then: Box<dyn FnOnce() + Send> = Box::new(move || {
            drop(started);
            let _ = released.recv();
        });
        assert!(writer.write(Job { then: Some(then), ..job(open, b"a", 0) }));
        let _ = has_started.recv();
        assert!(is_readable(&writer, 0), "the event loop need not wait for the answers");
        assert!(ended(&writer).result.is_ok());
        (writer, sender)
    }

    #[test]
    fn a_write_that_waits_for_another_one_can_be_taken_back() {
        let (path, open) = file("withdrawn", true);
        let (writer, release) = held(&open);
        assert!(writer.write(job(&open, b"b", 1)));
        assert!(writer.withdraw().is_none(), "it waits for nothing");
        assert!(writer.write(job(&open, b"c", 2)));
        assert!(writer.withdraw().is_some_and(|job| job.data == b"c"));
        assert!(writer.write(job(&open, b"d", 2)));
        drop(release);
        assert!(writer.close(LIMIT));
        assert!(writer.withdraw().is_none(), "all have ended");
        assert_eq!(fs::read(&path).unwrap(), b"abd");
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_write_behind_a_failed_one_is_not_made() {
        let (path, open) = file("behind", true);
        let (writer, release) = held(&open);
        let unknown = Job { descriptor: -1, ..job(&open, b"b", 1) };
        assert!(writer.write(unknown) && writer.write(job(&open, b"c", 2)));
        drop(release);
        assert!(ended(&writer).result.is_err());
        let behind = ended(&writer);
        assert_eq!(behind.data, b"c");
        assert_eq!(behind.result.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
        assert!(writer.write(job(&open, b"d", 1)));
        assert!(ended(&writer).result.is_ok());
        assert_eq!(fs::read(&path).unwrap(), b"ad");
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_write_behind_a_failed_one_that_was_not_taken_is_not_made() {
        let (path, open) = file("untaken", true);
        let writer = LogWriter::new(&[open.as_raw_fd()], None).unwrap();
        assert!(writer.write(Job { descriptor: -1, ..job(&open, b"a", 0) }));
        assert!(is_readable(&writer, 60_000), "it has ended");
        assert!(writer.write(job(&open, b"b", 1)));
        assert!(ended(&writer).result.is_err());
        assert_eq!(ended(&writer).result.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
        assert!(writer.write(job(&open, b"c", 0)));
        assert!(ended(&writer).result.is_ok());
        assert_eq!(fs::read(&path).unwrap(), b"c");
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn it_writes_on_after_a_panic_of_whoever_is_called() {
        let (path, open) = file("panic", true);
        let writer = LogWriter::new(&[open.as_raw_fd()], None).unwrap();
        let then: Box<dyn FnOnce() + Send> = Box::new(|| panic!("a test's"));
        assert!(writer.write(Job { then: Some(then), ..job(&open, b"a", 0) }));
        assert!(ended(&writer).result.is_ok());
        assert!(writer.write(job(&open, b"b", 1)));
        assert!(ended(&writer).result.is_ok());
        assert!(writer.close(LIMIT));
        assert_eq!(fs::read(&path).unwrap(), b"ab");
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_failed_write_is_reported_with_its_data() {
        let (path, open) = file("failed", false);
        let writer = LogWriter::new(&[open.as_raw_fd()], None).unwrap();
        let is_called = Arc::new(AtomicBool::new(false));
        let seen = is_called.clone();
        let then: Box<dyn FnOnce() + Send> = Box::new(move || seen.store(true, Ordering::SeqCst));
        assert!(writer.write(Job { then: Some(then), ..job(&open, b"abc", 0) }));
        let ended = ended(&writer);
        assert_eq!(ended.data, b"abc");
        assert!(ended.result.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"");
        assert!(writer.close(LIMIT));
        assert!(!is_called.load(Ordering::SeqCst));
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn whoever_is_called_after_a_write_finds_it_ended() {
        let (path, open) = file("then", true);
        let writer = Arc::new(LogWriter::new(&[open.as_raw_fd()], None).unwrap());
        let (from, seen) = (writer.clone(), mpsc::channel());
        let sender = seen.0;
        let then: Box<dyn FnOnce() + Send> = Box::new(move || {
            let is_ended = from.take().is_some_and(|ended| ended.result.is_ok());
            drop(from);
            sender.send(is_ended).unwrap();
        });
        assert!(writer.write(Job { then: Some(then), ..job(&open, b"abc", 0) }));
        assert!(seen.1.recv_timeout(LIMIT).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"abc");
        assert!(writer.close(LIMIT));
        assert!(!is_readable(&writer, 0), "it was taken before");
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn it_closes_after_the_running_write() {
        let (path, open) = file("closed", true);
        let writer = LogWriter::new(&[open.as_raw_fd()], Some(Duration::from_millis(5))).unwrap();
        assert!(writer.write(job(&open, b"abc", 1)));
        assert!(writer.close(LIMIT));
        assert!(!writer.write(job(&open, b"xyz", 0)));
        assert_eq!(fs::read(&path).unwrap(), b"\0abc");
        fs::remove_file(path).unwrap();
    }
}
