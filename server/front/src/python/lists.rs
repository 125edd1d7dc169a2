//! Converts statuses, lists and columns between Python and the front.

use crate::limits::callers::Known;
use crate::messages::grpc::Status;
use crate::steps::call::Call;
use crate::steps::columns::{Arrival, Batch, Entry};
use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyList, PyString};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// A status from Python: code, message, a serialized google.rpc.Status or nothing, and `may_go_elsewhere`.
pub type PyStatus = (u32, String, PyBackedBytes, bool);

pub fn status((code, message, details, may_go_elsewhere): PyStatus) -> Status {
    Status { code, message, details: Bytes::copy_from_slice(&details), may_go_elsewhere }
}

/// The names of connections, by their numbers.
pub type Peers<'py> = HashMap<u64, Bound<'py, PyString>>;

/// The connections of a batch, each once, and Python's objects of their callers; None: no authentication.
pub fn connections_of<'py>(
    py: Python<'py>,
    batch: &Batch,
    peers: &mut Peers<'py>,
) -> PyResult<(Bound<'py, PyList>, Option<Bound<'py, PyList>>)> {
    let connections = PyList::empty_bound(py);
    let callers =
        batch.entries.first().and_then(|entry| entry.caller.as_ref()).map(|_| PyList::empty_bound(py));
    let mut seen = HashSet::new();
    for entry in &batch.entries {
        let peer = &entry.call.peer;
        if !seen.insert(peer.number) {
            continue;
        }
        let name = peers.entry(peer.number).or_insert_with(|| PyString::new_bound(py, &peer.name));
        connections.append(&*name)?;
        if let (Some(callers), Some(known)) = (&callers, &entry.caller) {
            callers.append(who_of(known))?;
        }
    }
    Ok((connections, callers))
}

/// Whether all messages have the same caller, or there is no authentication.
pub fn has_one_caller(batch: &Batch) -> bool {
    let of = |entry: &Entry| entry.caller.as_ref().map(Arc::as_ptr);
    let first = batch.entries.first().and_then(of);
    batch.entries.iter().all(|entry| of(entry) == first)
}

/// The number of sessions of each message.
pub fn counts_of(batch: &Batch) -> Vec<u32> {
    batch.entries.iter().map(|entry| entry.count).collect()
}

/// The connections, one per session, or a single one for a single message.
pub fn callers_of<'py>(py: Python<'py>, batch: &Batch) -> PyResult<Bound<'py, PyList>> {
    let callers = PyList::empty_bound(py);
    let mut peers = Peers::new();
    for entry in &batch.entries {
        let peer = &entry.call.peer;
        let name = peers.entry(peer.number).or_insert_with(|| PyString::new_bound(py, &peer.name));
        let count = if batch.entries.len() == 1 { 1 } else { entry.count };
        for _ in 0..count {
            callers.append(&*name)?;
        }
    }
    Ok(callers)
}

fn who_of(known: &Known) -> Option<&PyObject> {
    known.who.as_ref().and_then(|who| who.downcast_ref::<PyObject>())
}

/// Python's objects of the callers, one per session, or a single one for all; None: no
/// authentication.
pub fn whos_of<'py>(py: Python<'py>, batch: &Batch) -> PyResult<Option<Bound<'py, PyList>>> {
    let entries = &batch.entries;
    let Some(first) = entries.first().and_then(|entry| entry.caller.as_ref()) else { return Ok(None) };
    let whos = PyList::empty_bound(py);
    let add = |known: &Arc<Known>, count: u32| -> PyResult<()> {
        let who = who_of(known);
        (0..count).try_for_each(|_| whos.append(who))
    };
    if has_one_caller(batch) {
        add(first, 1)?;
    } else {
        for (entry, known) in entries.iter().filter_map(|entry| Some((entry, entry.caller.as_ref()?))) {
            add(known, entry.count)?;
        }
    }
    Ok(Some(whos))
}

/// Numbers as one column of bytes.
pub fn bytes_of<'py, T: Copy, const N: usize>(
    py: Python<'py>,
    column: &[T],
    bytes: impl Fn(T) -> [u8; N],
) -> Bound<'py, PyBytes> {
    let mut flat = Vec::with_capacity(column.len() * N);
    column.iter().for_each(|value| flat.extend_from_slice(&bytes(*value)));
    PyBytes::new_bound(py, &flat)
}

/// The numbers in a column of bytes.
pub fn numbers_of<T, const N: usize>(column: &[u8], number: impl Fn([u8; N]) -> T) -> Vec<T> {
    column.chunks_exact(N).filter_map(|bytes| bytes.try_into().ok()).map(number).collect()
}

/// Identifies a call for Python.
pub fn key(call: &Arc<Call>) -> usize {
    Arc::as_ptr(call) as usize
}

/// Whether it belongs to a call that ended before Python knew of it.
pub fn is_pointless(arrival: &Arrival, skipped: &mut HashSet<usize>) -> bool {
    match arrival {
        Arrival::Batch(_) | Arrival::Refused(_) => false,
        Arrival::Call(call, _) => call.is_over() && skipped.insert(key(call)),
        Arrival::Judge(call) => call.is_over(),
        Arrival::Breach(call, ..) if !call.streams => call.is_over() && skipped.insert(key(call)),
        Arrival::Message(call, ..)
        | Arrival::TooLarge(call, _)
        | Arrival::Breach(call, ..)
        | Arrival::Duplicate(call, _)
        | Arrival::HalfClosed(call)
        | Arrival::Written(call, _)
        | Arrival::Ended(call) => !skipped.is_empty() && skipped.contains(&key(call)),
    }
}
