//! The Python interface of the front, and the module with all classes.

// pyo3's macros convert errors into themselves.
#![allow(clippy::useless_conversion)]

use crate::calls::answers::{Door, HttpAnswer};
use crate::calls::queue::Queue;
use crate::calls::service::Service;
use crate::clock;
use crate::limits::bounds::{counted, Bounds};
use crate::limits::settings::Limits;
use crate::messages::shape::{Given, Shape};
use crate::method::{FastPath, Method};
use crate::python::batch::{AnswerDurations, BatchHandle};
use crate::python::commands::Command;
use crate::python::driver::Driver;
use crate::python::json::{numbers_as_json, read_json};
use crate::python::known_callers::KnownCallers;
use crate::python::known_ids::KnownIds;
use crate::python::lists::{self, key, status, Peers, PyStatus};
use crate::python::log_writer::LogWriter;
use crate::python::step_kernel::{StepArrays, StepKernel, StepWrite};
use crate::steps::call::Call;
use crate::steps::columns::Arrival;
use crate::steps::durations::Durations;
use crate::wakeup::Wakeup;
use crate::wire::server::{self, Listener, Server, Stage};
use crate::wire::tls::{self, Unusable};
use bytes::Bytes;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyList, PyTuple};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Version of the interface with Python. Raise it with every change, here and in `rpc/fronts/native.py`.
const INTERFACE: u32 = 18;

/// An answer to an HTTP request: status, headers, body.
type PyAnswer = (u16, Vec<(String, String)>, PyBackedBytes);
/// The limit of a body, and the answers to requests that the front refuses itself, by their names in `calls::answers::Door`.
type PyDoor = (usize, HashMap<String, PyAnswer>);

fn given((status, headers, body): PyAnswer) -> (u16, Vec<(String, String)>, Bytes) {
    (status, headers, Bytes::copy_from_slice(&body))
}

/// Counts so far.
type Count = (&'static str, u64);

/// The front. Started and stopped once.
#[pyclass(frozen)]
struct Front {
    server: Arc<Server>,
    stage: watch::Sender<Stage>,
    driver: Arc<Driver>,
    waiting: Mutex<Option<mpsc::UnboundedReceiver<Command>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Signals that the thread is about to end.
    ended: Mutex<std::sync::mpsc::Receiver<()>>,
    ending: Mutex<Option<std::sync::mpsc::Sender<()>>>,
    /// Calls abandoned until the last `take`.
    seen: AtomicU64,
    known_ids: Arc<Mutex<KnownIds>>,
    durations: Arc<Mutex<AnswerDurations>>,
}

#[pymethods]
impl Front {
    /// `methods`: path, whether it streams, its fast path ("step", "step_stream", "infer",
    /// "infer_stream" or ""), and whether anybody may call it. `shapes`: the rules of each method's requests. `limits`: the
    /// limits by their names in `limits::Limits`, times in seconds.
    #[new]
    /// `callers`: the known callers; None: no authentication. `door`: None, no HTTP but gRPC. Python's number of its method
    /// is the number of `methods`. `seconds`: the bounds of counted durations.
    #[pyo3(signature = (methods, shapes, limits, *, now, seconds, overloaded, headers_too_large, callers, door))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        methods: Vec<(String, bool, String, bool)>,
        shapes: Vec<Vec<Vec<Given>>>,
        limits: HashMap<String, f64>,
        now: &Bound<'_, PyAny>,
        seconds: Vec<f64>,
        overloaded: PyStatus,
        headers_too_large: PyStatus,
        callers: Option<&KnownCallers>,
        door: Option<PyDoor>,
    ) -> PyResult<Self> {
        clock::set(|| now.call0()?.extract())?;
        let limits = Limits::read(&limits, status(overloaded), status(headers_too_large))
            .map_err(|name| PyValueError::new_err(format!("the limit {name} is missing")))?;
        let index = methods.len();
        let methods = methods
            .into_iter()
            .enumerate()
            .map(|(index, (path, streams, fast_path, is_open))| {
                let fast_path = match fast_path.as_str() {
                    "step" => FastPath::Step,
                    "step_stream" => FastPath::StepStream,
                    "infer" => FastPath::Infer,
                    "infer_stream" => FastPath::InferStream,
                    _ => FastPath::No,
                };
                (path, Method { index, streams, fast_path, is_open })
            })
            .collect();
        let shapes: Option<Vec<Shape>> = shapes.into_iter().map(Shape::new).collect();
        let shapes = shapes.ok_or_else(|| PyValueError::new_err("the rules of a request make no sense"))?;
        let callers = callers.map(|known| known.callers.clone());
        let queue = Arc::new(Queue::new(Wakeup::new()?, limits.queued_bytes));
        let bounds = Arc::new(Bounds::new(limits));
        let (driver, waiting) = Driver::new(queue.clone());
        let service = Service::new(bounds, queue, methods, shapes, callers);
        if let Some((body_bytes, answers)) = door {
            let answers = answers.into_iter().map(|(name, answer)| (name, given(answer))).collect();
            let door = Door::read(index, body_bytes, answers).map_err(|name| {
                PyValueError::new_err(format!("the answer {name} is missing or no answer"))
            })?;
            let _ = service.door.set(door);
        }
        let (ending, ended) = std::sync::mpsc::channel();
        Ok(Front {
            server: Arc::new(Server::new(Arc::new(service))),
            stage: watch::Sender::new(Stage::Serving),
            driver: Arc::new(driver),
            waiting: Mutex::new(Some(waiting)),
            thread: Mutex::new(None),
            ended: Mutex::new(ended),
            ending: Mutex::new(Some(ending)),
            seen: AtomicU64::new(0),
            known_ids: Arc::default(),
            durations: Arc::new(Mutex::new([Durations::new(seconds.clone()), Durations::new(seconds)])),
        })
    }

    /// Use TLS for new connections, with this certificate chain and key in PEM. With `client_ca`,
    /// clients need a certificate that one of these CAs has signed.
    ///
    /// Raises ValueError(which, why) if "certificate", "key" or "client_ca" cannot be used. Nothing has changed.
    #[pyo3(signature = (chain, key, client_ca))]
    fn secure(&self, chain: &[u8], key: &[u8], client_ca: Option<&[u8]>) -> PyResult<()> {
        let config = tls::configuration(chain, key, client_ca).map_err(|problem| {
            PyValueError::new_err(match problem {
                Unusable::Certificate(why) => ("certificate", why),
                Unusable::Key(why) => ("key", why),
                Unusable::ClientCa(why) => ("client_ca", why),
            })
        })?;
        self.server.secure(config);
        Ok(())
    }

    /// Serve listening sockets and own them: file descriptors, each with its kind, "tcp", "unix" or "http".
    fn start(&self, listeners: Vec<(i32, String)>) -> PyResult<()> {
        let listeners: Vec<Listener> =
            listeners.into_iter().map(|(fd, kind)| Listener::given(fd, &kind)).collect();
        let Some(mut waiting) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return Err(PyRuntimeError::new_err("a front is started once"));
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (served, stage) = (self.server.clone(), self.stage.subscribe());
        let until = self.stage.subscribe();
        let (carrier, driver) = (self.driver.clone(), self.driver.clone());
        let ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner).take();
        let serving = async move {
            let mut carrying = tokio::spawn(async move {
                while let Some(command) = waiting.recv().await {
                    carrier.carry_out(command);
                }
            });
            tokio::select! {
                () = server::run(listeners, served, stage) => carrying.abort(),
                _ = &mut carrying => {} // it has panicked: nobody would be answered any more
            }
        };
        let thread = std::thread::Builder::new().name("stepwell-front".to_owned()).spawn(move || {
            driver.drive(runtime, serving);
            if *until.borrow() == Stage::Serving {
                driver.queue.end();
            }
            drop(ending);
        })?;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    /// A descriptor that is readable when there are arrivals.
    fn fd(&self) -> i32 {
        self.driver.queue.wakeup.fd()
    }

    /// Number of replies that are not written.
    fn unwritten(&self) -> usize {
        self.server.service.unwritten.load(Ordering::Acquire) + self.driver.waiting()
    }

    /// Current values, refusals by reason, and how often Python took arrivals, by driver of the
    /// sockets.
    fn counts(&self) -> (HashMap<&'static str, usize>, Vec<Count>, [Count; 2]) {
        let service = &self.server.service;
        let mut now = HashMap::from(service.now());
        now.insert("unwritten_replies", self.unwritten());
        (now, service.bounds.counts.refusals(), self.driver.takes())
    }

    /// The durations of the calls, and of the messages on streams, that compiled code has answered since the last call:
    /// counts by bound, and the sum.
    fn take_durations(&self) -> [(Vec<u64>, f64); 2] {
        let mut durations = self.durations.lock().unwrap_or_else(PoisonError::into_inner);
        durations.each_mut().map(Durations::take)
    }

    /// Turn the fast path off, so that Python gets every message as bytes, or on.
    fn set_general(&self, everything: bool) {
        self.server.service.all_general.store(everything, Ordering::Relaxed);
    }

    /// Set whether Python gets traced calls as bytes, with the trace in their metadata.
    fn set_traces(&self, traces: bool) {
        self.server.service.traces.store(traces, Ordering::Relaxed);
    }

    /// Take the arrivals in order: tuples that start with one of the numbers below.
    ///
    /// Raises RuntimeError if the front's thread has ended by itself.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        if self.driver.queue.is_dead.load(Ordering::Acquire) {
            return Err(PyRuntimeError::new_err("the wire's thread has ended"));
        }
        let seen = self.seen.swap(self.driver.queue.abandoned.load(Ordering::Relaxed), Ordering::Relaxed);
        let found = PyList::empty_bound(py);
        let mut peers = HashMap::new();
        let mut skipped = HashSet::new();
        for arrival in self.driver.take() {
            if lists::is_pointless(&arrival, &mut skipped) {
                continue;
            }
            found.append(self.tuple(py, arrival, seen, &mut peers)?)?;
        }
        Ok(found)
    }

    /// Accept no more connections and calls, and notify clients. Running calls continue.
    fn drain(&self) {
        self.driver.lend_no_more();
        self.stage.send_replace(Stage::Draining);
    }

    /// Return when all connections have ended, or after this time.
    fn wait(&self, py: Python<'_>, seconds: f64) {
        py.allow_threads(|| {
            let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = ended.recv_timeout(Duration::from_secs_f64(seconds));
        });
    }

    /// Cut off the running calls, and end the thread.
    fn close(&self, py: Python<'_>) {
        self.driver.lend_no_more();
        self.stage.send_replace(Stage::Closed);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            py.allow_threads(|| {
                let _ = thread.join(); // its panic has been printed
            });
        }
    }
}

impl Front {
    fn tuple<'py>(
        &self,
        py: Python<'py>,
        arrival: Arrival,
        seen: u64,
        peers: &mut Peers<'py>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let tuple: PyObject = match arrival {
            Arrival::Batch(batch) => {
                let handle = BatchHandle {
                    batch: Arc::new(*batch),
                    driver: self.driver.clone(),
                    seen,
                    known_ids: self.known_ids.clone(),
                    durations: self.durations.clone(),
                };
                return handle.into_tuple(py, peers);
            }
            Arrival::Call(call, request) => {
                let request = request.map(|message| PyBytes::new_bound(py, &message));
                (1, key(&call), self.handle(call), request).into_py(py)
            }
            Arrival::Message(call, message, number) => {
                (2, key(&call), PyBytes::new_bound(py, &message), number).into_py(py)
            }
            Arrival::TooLarge(call, size) => (3, key(&call), self.handle(call), size).into_py(py),
            Arrival::Duplicate(call, frame_id) => (4, key(&call), self.handle(call), frame_id).into_py(py),
            Arrival::HalfClosed(call) => (5, key(&call)).into_py(py),
            Arrival::Written(call, size) => (6, key(&call), size).into_py(py),
            Arrival::Ended(call) => (7, key(&call)).into_py(py),
            Arrival::Refused(why) => (8, why.name()).into_py(py),
            Arrival::Judge(call) => (9, self.handle(call)).into_py(py),
            Arrival::Breach(call, breach) => {
                (10, key(&call), self.handle(call), breach.rule, breach.size).into_py(py)
            }
        };
        Ok(tuple.into_bound(py).downcast_into::<PyTuple>()?)
    }

    fn handle(&self, call: Arc<Call>) -> CallHandle {
        CallHandle { call, driver: self.driver.clone(), service: self.server.service.clone() }
    }
}

/// A call that Python serves.
#[pyclass(frozen)]
struct CallHandle {
    call: Arc<Call>,
    driver: Arc<Driver>,
    service: Arc<Service>,
}

#[pymethods]
impl CallHandle {
    #[getter]
    fn peer(&self) -> &str {
        &self.call.peer.name
    }

    #[getter]
    fn certificate_names(&self) -> Vec<String> {
        self.call.peer.certificate_names().to_vec()
    }

    #[getter]
    fn method(&self) -> usize {
        self.call.method
    }

    #[getter]
    fn streams(&self) -> bool {
        self.call.streams
    }

    /// Seconds on the monotonic clock; infinity if it has none.
    #[getter]
    fn deadline(&self) -> f64 {
        self.call.deadline
    }

    #[getter]
    fn metadata(&self, py: Python<'_>) -> Vec<(String, PyObject)> {
        self.call
            .metadata
            .iter()
            .map(|(name, value)| {
                let text = std::str::from_utf8(value).ok().filter(|_| !name.ends_with("-bin"));
                let value = match text {
                    Some(text) => text.into_py(py),
                    None => PyBytes::new_bound(py, value).into_py(py),
                };
                (name.clone(), value)
            })
            .collect()
    }

    /// With repetitions.
    #[getter]
    fn metadata_keys(&self) -> Vec<&str> {
        self.call.metadata.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// Python has authenticated the caller, whose identity in `KnownCallers` is this.
    fn identified(&self, identity: &str) {
        self.call.caller.identified(identity, self.service.callers.as_ref());
        // a call of one message is admitted by whoever judges it: its caller is known also where it is refused
        if self.call.streams && !self.call.state().is_admitted {
            self.admit();
        }
    }

    /// Its caller is admitted.
    fn admit(&self) {
        self.command(Command::Admit(self.call.clone()));
    }

    /// Answer an HTTP request. `has_more`: `send` adds to the body until `end`.
    ///
    /// Raises ValueError if the status or a header makes no sense.
    #[pyo3(signature = (answer, *, has_more = false))]
    fn respond(&self, answer: PyAnswer, has_more: bool) -> PyResult<()> {
        let (status, headers, body) = given(answer);
        let answer = HttpAnswer::new((status, headers, self.counted(body)), has_more)
            .ok_or_else(|| PyValueError::new_err("no answer of HTTP"))?;
        self.command(Command::Respond(self.call.clone(), Box::new(answer)));
        Ok(())
    }

    /// Send a part of the body of an answer that has more.
    fn send(&self, part: &[u8]) {
        let part = self.counted(Bytes::copy_from_slice(part));
        self.command(Command::Send(self.call.clone(), part));
    }

    /// Whether it ended at its deadline.
    #[getter]
    fn is_late(&self) -> bool {
        self.call.is_late()
    }

    /// Send the reply of a unary call.
    fn finish(&self, reply: &[u8]) {
        self.command(Command::Finish(self.call.clone(), Bytes::copy_from_slice(reply)));
    }

    /// Send a reply of a stream. `number` is that of its message, if that had one.
    #[pyo3(signature = (reply, number = None))]
    fn write(&self, reply: &[u8], number: Option<u64>) {
        self.command(Command::Write(self.call.clone(), Bytes::copy_from_slice(reply), number));
    }

    /// End the call after its replies.
    fn end(&self, status: PyStatus) {
        self.command(Command::End(self.call.clone(), self::status(status)));
    }

    /// Report that this many messages were read.
    fn read(&self, count: usize) {
        self.command(Command::Read(self.call.clone(), count));
    }
}

impl CallHandle {
    fn command(&self, command: Command) {
        self.driver.send(command);
    }

    /// A part of an answer, which counts from now on, because its client may be slow.
    fn counted(&self, part: Bytes) -> Bytes {
        counted(part, &self.service.bounds, &self.call.peer.load.share)
    }
}

/// The address of LiteRT's delegate for wide layers. None: it has no instructions for this processor.
#[pyfunction]
fn dense_delegate() -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    return crate::compute::delegate::address();
    #[cfg(not(target_arch = "x86_64"))]
    None
}

#[pymodule]
fn stepwell_front(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Front>()?;
    module.add_class::<KnownCallers>()?;
    module.add_class::<CallHandle>()?;
    module.add_class::<BatchHandle>()?;
    module.add_class::<StepKernel>()?;
    module.add_class::<StepArrays>()?;
    module.add_class::<StepWrite>()?;
    module.add_class::<LogWriter>()?;
    module.add_function(wrap_pyfunction!(dense_delegate, module)?)?;
    module.add_function(wrap_pyfunction!(read_json, module)?)?;
    module.add_function(wrap_pyfunction!(numbers_as_json, module)?)?;
    module.add("INTERFACE", INTERFACE)?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))
}
