//! Drives the sockets: by a thread of the front, or by Python's event loop while a single client steps back to back.
//!
//! Passing a lone step from one thread to the other, and its answer back, takes two wake-ups, which last longer than the
//! step itself. The threads could do nothing concurrently anyway, because the client waits. So the front's
//! thread lends the runtime to the event loop, which is woken by the sockets themselves, reads, steps, and writes.
//! Once others send, or something may take long, or nothing more arrives, the front's thread takes it back.

use crate::calls::queue::Queue;
use crate::python::commands::{carry_out, Command};
use crate::steps::columns::{Arrival, LARGE};
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, Notify};

/// Interval at which the front's thread checks whether the event loop still drives.
const LOOK: Duration = Duration::from_millis(10);
/// Lone steps that follow each other within this are back to back.
const QUICK: Duration = Duration::from_millis(2);
/// Number of such steps in a row after which the loop drives.
const LONE: u32 = 16;
/// Number of wake-ups without an arrival for Python (room for replies, pings) after which it stops.
const EMPTY: u32 = 8;
/// Number of checks for new input before reading, and before writing a reply.
const READING: usize = 2;
const WRITING: usize = 1;

/// `send` is for any thread; all others but `drive` are for the event loop's.
pub struct Driver {
    pub queue: Arc<Queue>,
    /// Commands of Python that have not run.
    commands: AtomicUsize,
    sender: mpsc::UnboundedSender<Command>,
    state: Mutex<State>,
    /// Asks the front's thread to lend the runtime.
    asked: Notify,
    given_back: Condvar,
}

struct State {
    /// The runtime of the front's thread, while it serves.
    runtime: Option<Arc<Runtime>>,
    /// Whether the event loop drives. The driver holds this lock.
    is_lent: bool,
    may_lend: bool,
    /// How often the event loop took arrivals while it drove, and while the front's thread drove.
    loop_takes: u64,
    thread_takes: u64,
    pace: Pace,
}

impl Driver {
    /// Returns a driver, and the receiver of commands to run on the front's thread while that thread drives.
    pub fn new(queue: Arc<Queue>) -> (Self, mpsc::UnboundedReceiver<Command>) {
        let (sender, waiting) = mpsc::unbounded_channel();
        let state = State {
            runtime: None,
            is_lent: false,
            may_lend: true,
            loop_takes: 0,
            thread_takes: 0,
            pace: Pace::default(),
        };
        let driver = Driver {
            queue,
            commands: AtomicUsize::new(0),
            sender,
            state: Mutex::new(state),
            asked: Notify::new(),
            given_back: Condvar::new(),
        };
        (driver, waiting)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serve on this thread, the front's, until it ends.
    pub fn drive(&self, runtime: Runtime, serving: impl Future<Output = ()> + Send + 'static) {
        let runtime = Arc::new(runtime);
        self.state().runtime = Some(runtime.clone());
        let mut serving = runtime.spawn(serving);
        loop {
            let has_ended = runtime.block_on(async {
                tokio::select! {
                    _ = &mut serving => true, // its panic was printed
                    () = self.asked.notified() => false,
                }
            });
            if has_ended {
                break;
            }
            self.lend(&runtime);
        }
        self.state().runtime = None;
        if let Some(runtime) = Arc::into_inner(runtime) {
            runtime.shutdown_timeout(Duration::from_millis(100));
        }
    }

    /// Let the event loop drive, and return when it stops.
    fn lend(&self, runtime: &Runtime) {
        let mut state = self.state();
        if !state.may_lend || !state.pace.is_lone() || !self.queue.wakeup.add_sockets() {
            return;
        }
        state.is_lent = true;
        run_ready(runtime, || (), WRITING); // run pending requests
        while state.is_lent {
            let loop_takes = state.loop_takes;
            let waited = self.given_back.wait_timeout(state, LOOK);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if state.loop_takes == loop_takes {
                self.take_back(&mut state); // no more steps, or the loop is busy
            }
        }
    }

    fn take_back(&self, state: &mut State) {
        if state.is_lent {
            state.is_lent = false;
            state.pace = Pace::default();
            self.queue.wakeup.remove_sockets();
            self.given_back.notify_one();
        }
    }

    /// Let the front's thread drive from now on.
    pub fn lend_no_more(&self) {
        let mut state = self.state();
        state.may_lend = false;
        self.take_back(&mut state);
    }

    /// Take the arrivals for Python.
    pub fn take(&self) -> Vec<Arrival> {
        let mut state = self.state();
        if state.is_lent {
            state.loop_takes += 1;
            self.queue.is_taking.store(true, Ordering::Relaxed);
            state.run_ready(|| (), READING);
            self.queue.is_taking.store(false, Ordering::Relaxed);
        } else {
            state.thread_takes += 1;
        }
        let taken = self.queue.take();
        state.pace.took(&taken, Instant::now());
        if state.is_lent {
            if !state.pace.is_lone() {
                self.take_back(&mut state);
            }
        } else if state.pace.is_lone() && state.may_lend && self.queue.wakeup.sees_all() {
            self.asked.notify_one();
        }
        taken
    }

    /// Run the commands, on the front's thread.
    pub fn carry_out(&self, command: Command) {
        carry_out(command);
        self.commands.fetch_sub(1, Ordering::Release);
    }

    /// The number of commands that have not run.
    pub fn waiting(&self) -> usize {
        self.commands.load(Ordering::Acquire)
    }

    /// How often `take` was called, by the driving thread.
    pub fn takes(&self) -> [(&'static str, u64); 2] {
        let state = self.state();
        [("event_loop", state.loop_takes), ("thread", state.thread_takes)]
    }

    /// Run a command now if this thread drives. Otherwise send it, and count it until it has run.
    pub fn send(&self, command: Command) {
        let state = self.state();
        if state.is_lent {
            return state.run_ready(|| carry_out(command), WRITING);
        }
        self.commands.fetch_add(1, Ordering::Release);
        // fails only if the front's thread has ended, and then the command has no effect
        let _ = self.sender.send(command);
    }
}

impl State {
    fn run_ready(&self, work: impl FnOnce(), polls: usize) {
        if let Some(runtime) = &self.runtime {
            run_ready(runtime, work, polls);
        }
    }
}

/// Run some work, and everything that can then run without waiting.
fn run_ready(runtime: &Runtime, work: impl FnOnce(), polls: usize) {
    runtime.block_on(async {
        work();
        for _ in 0..polls {
            tokio::task::yield_now().await; // run tasks until none can continue, and poll the sockets
        }
    });
}

/// Whether steps arrive one by one, each after the previous reply.
#[derive(Debug, Default)]
struct Pace {
    lone: u32,
    empty: u32,
    latest: Option<Instant>,
}

impl Pace {
    fn is_lone(&self) -> bool {
        self.lone >= LONE
    }

    fn took(&mut self, taken: &[Arrival], now: Instant) {
        match taken {
            [] => {
                self.empty += 1;
                if self.empty > EMPTY {
                    self.lone = 0;
                }
                return;
            }
            [Arrival::Batch(batch)] if batch.entries.len() == 1 && batch.sizes.len() < LARGE => {
                let is_quick = self.latest.is_some_and(|latest| now.duration_since(latest) <= QUICK);
                self.lone = if is_quick { LONE.min(self.lone + 1) } else { 0 };
            }
            _ => self.lone = 0,
        }
        self.empty = 0;
        self.latest = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steps::call::Call;
    use crate::steps::columns::Arrivals;
    use crate::steps::parse::{Step, Tensor};
    use bytes::Bytes;
    use std::io::Write;
    use std::os::unix::net::UnixStream as StdUnixStream;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;

    /// A step of the session of this name.
    fn push(arrivals: &mut Arrivals, name: u8) {
        let id = [name];
        let step = Step {
            session_ids: vec![std::str::from_utf8(&id).unwrap()],
            tensors: vec![Tensor { name: "", dtype: 9, shape: vec![1], data: &[0] }],
            sizes: vec![1],
            ..Step::default()
        };
        arrivals.push_step(Arc::new(Call::for_test()), None, &step, f64::INFINITY, 0);
    }

    fn taken(names: &[u8]) -> Vec<Arrival> {
        let mut arrivals = Arrivals::default();
        names.iter().for_each(|name| push(&mut arrivals, *name));
        arrivals.take(usize::MAX).0
    }

    /// A driver of a wire whose messages are names of sessions to step, its client, and its server's socket.
    struct Wire {
        driver: Arc<Driver>,
        client: StdUnixStream,
        runtime: Runtime,
        served: StdUnixStream,
    }

    fn wire() -> Wire {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (driver, _) = Driver::new(Arc::new(Queue::for_test()));
        let (client, served) = StdUnixStream::pair().unwrap();
        served.set_nonblocking(true).unwrap();
        Wire { driver: Arc::new(driver), client, runtime, served }
    }

    async fn serve(queue: Arc<Queue>, served: StdUnixStream) {
        let _watched = queue.wakeup.watch(&served);
        let mut served = UnixStream::from_std(served).unwrap();
        let mut names = [0; 16];
        loop {
            let size = served.read(&mut names).await.unwrap();
            if size == 0 {
                return;
            }
            queue.add(|arrivals| names[..size].iter().for_each(|name| push(arrivals, *name)));
        }
    }

    /// Wait for the wire as Python's event loop does, and take the arrivals.
    #[allow(unsafe_code)]
    fn next(driver: &Driver) -> Vec<Arrival> {
        loop {
            let mut polled = libc::pollfd { fd: driver.queue.wakeup.fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one entry, which lives until the call returns.
            assert_eq!(unsafe { libc::poll(std::ptr::from_mut(&mut polled), 1, 60_000) }, 1, "no arrival");
            let found = driver.take();
            if !found.is_empty() {
                return found;
            }
        }
    }

    #[test]
    fn steps_are_lone_if_they_come_one_by_one_and_back_to_back() {
        let start = Instant::now();
        let lone = || {
            let mut pace = Pace::default();
            (0..=LONE).for_each(|_| pace.took(&taken(b"a"), start));
            pace
        };
        assert!(lone().is_lone());
        let mut pace = lone();
        pace.took(&taken(b"ab"), start);
        assert!(!pace.is_lone(), "two at a time");
        let mut pace = lone();
        pace.took(&[Arrival::HalfClosed(Arc::new(Call::for_test()))], start);
        assert!(!pace.is_lone(), "something else");
        let mut pace = lone();
        pace.took(&taken(b"a"), start + QUICK);
        assert!(pace.is_lone());
        pace.took(&taken(b"a"), start + 3 * QUICK);
        assert!(!pace.is_lone(), "too late");
        let mut pace = lone();
        (0..EMPTY).for_each(|_| pace.took(&[], start));
        assert!(pace.is_lone());
        pace.took(&taken(b"a"), start);
        (0..=EMPTY).for_each(|_| pace.took(&[], start));
        assert!(!pace.is_lone(), "no more steps");
    }

    #[test]
    fn the_event_loop_drives_until_another_client_sends() {
        let Wire { driver, mut client, runtime, served } = wire();
        drop(runtime.spawn(serve(driver.queue.clone(), served)));
        run_ready(&runtime, || (), READING);
        {
            let mut state = driver.state();
            state.runtime = Some(Arc::new(runtime));
            state.is_lent = true;
            state.pace.lone = LONE;
            state.pace.latest = Some(Instant::now() + Duration::from_secs(3600));
            // every step counts as quick
        }
        assert!(driver.queue.wakeup.add_sockets());
        client.write_all(b"a").unwrap();
        let found = next(&driver);
        assert!(matches!(&found[..], [Arrival::Batch(batch)] if batch.entries.len() == 1));
        assert!(driver.state().is_lent);
        let call = Arc::new(Call::for_test());
        driver.send(Command::Finish(call.clone(), Bytes::from_static(b"answered")));
        assert_eq!(call.state().replies.len(), 1, "it runs at once");
        client.write_all(b"bc").unwrap();
        assert!(matches!(&next(&driver)[..], [Arrival::Batch(batch)] if batch.entries.len() == 2));
        assert!(!driver.state().is_lent);
        let [(_, own), (_, others)] = driver.takes();
        assert!(own >= 2);
        assert_eq!(others, 0);
        driver.take();
        assert_eq!(driver.takes(), [("event_loop", own), ("thread", 1)]);
        driver.send(Command::Finish(call.clone(), Bytes::from_static(b"answered")));
        assert_eq!((call.state().replies.len(), driver.waiting()), (1, 1), "it waits for the other thread");
    }

    #[test]
    fn the_front_takes_the_runtime_back_when_no_more_steps_come() {
        let Wire { driver, mut client, runtime, served } = wire();
        let serving = serve(driver.queue.clone(), served);
        let own = driver.clone();
        let thread = std::thread::spawn(move || own.drive(runtime, serving));
        while !driver.state().is_lent {
            driver.state().pace.lone = LONE;
            driver.asked.notify_one();
            std::thread::yield_now();
        }
        while driver.state().is_lent {
            std::thread::yield_now();
        }
        client.write_all(b"a").unwrap();
        assert_eq!(next(&driver).len(), 1);
        driver.lend_no_more();
        driver.state().pace.lone = LONE;
        driver.asked.notify_one();
        client.write_all(b"b").unwrap();
        assert_eq!(next(&driver).len(), 1);
        assert!(!driver.state().is_lent);
        drop(client);
        thread.join().unwrap();
        assert!(driver.state().runtime.is_none());
    }
}
