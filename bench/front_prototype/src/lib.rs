//! The bare wire: the least that can answer plain steps. One thread reads all connections and gathers
//! steps; Python takes them as columns and answers each batch in one call.
//!
//! It marks how fast a server on this machine could be. It has no TLS, limits, errors, flow control of
//! replies or rules, and a fixed list of sessions. It serves loopback only.
#![allow(clippy::useless_conversion)] // of `PyResult`, in code that pyo3 generates

mod messages;
mod wire;

use bytes::Bytes;
use messages::Reply;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use tokio::sync::mpsc::{unbounded_channel, UnboundedSender};
use wire::{Caller, Wire};

/// The front that Python holds.
#[pyclass]
struct Front {
    wire: Arc<Wire>,
    port: u16,
    unanswered: Mutex<Vec<Caller>>,
    replies: UnboundedSender<Vec<(Caller, Bytes)>>,
}

#[pymethods]
impl Front {
    /// Listen on a free port. `ids`: the sessions; their places in the list are their handles.
    #[new]
    fn new(ids: Vec<Vec<u8>>) -> PyResult<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let (replies, to_send) = unbounded_channel();
        let wire = Arc::new(Wire::new(ids)?);
        let own = wire.clone();
        std::thread::Builder::new()
            .name("bare-front".to_owned())
            .spawn(move || wire::serve(listener, own, to_send))?;
        Ok(Self { wire, port, unanswered: Mutex::default(), replies })
    }

    /// The port.
    fn port(&self) -> u16 {
        self.port
    }

    /// A descriptor that is readable when steps wait.
    fn fd(&self) -> i32 {
        self.wire.eventfd
    }

    /// The handles of the waiting steps as u32, and their inputs one after another.
    fn take<'py>(&self, py: Python<'py>) -> (Bound<'py, PyBytes>, Bound<'py, PyBytes>) {
        let steps = self.wire.take();
        let mut handles = Vec::with_capacity(steps.len() * 4);
        let mut inputs = Vec::with_capacity(steps.len() * 32);
        let mut callers = Vec::with_capacity(steps.len());
        for step in steps {
            handles.extend_from_slice(&step.handle.to_le_bytes());
            inputs.extend_from_slice(&step.input);
            callers.push(step.caller);
        }
        *self.unanswered.lock().unwrap() = callers;
        (PyBytes::new_bound(py, &handles), PyBytes::new_bound(py, &inputs))
    }

    /// Answer the steps of the last `take`, in its order.
    fn reply(&self, outputs: &[u8], revisions: Vec<u64>) {
        let callers = std::mem::take(&mut *self.unanswered.lock().unwrap());
        let size = outputs.len() / callers.len().max(1);
        let mut replies = Vec::with_capacity(callers.len());
        for ((caller, output), revision) in callers.into_iter().zip(outputs.chunks(size)).zip(revisions) {
            let reply = Reply { output, revision };
            let bytes = match &caller {
                Caller::Call(_) => reply.of_call(),
                Caller::Stream(_, frame_id) => reply.of_frame(*frame_id),
            };
            replies.push((caller, bytes));
        }
        let _ = self.replies.send(replies);
    }
}

#[pymodule]
fn bare_front(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Front>()
}
