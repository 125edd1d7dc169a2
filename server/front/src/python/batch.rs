//! A batch of fast-path steps for Python.

// pyo3's macros convert errors into themselves.
#![allow(clippy::useless_conversion)]

use crate::clock;
use crate::python::commands::Command;
use crate::python::driver::Driver;
use crate::python::known_ids::KnownIds;
use crate::python::lists::{self, bytes_of, numbers_of, Peers, PyStatus};
use crate::steps::columns::{Batch, Entry};
use crate::steps::durations::Durations;
use crate::steps::reply::{Answer, Output};
use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyString, PyTuple};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

/// Fast-path steps that Python has taken.
#[pyclass(frozen)]
pub struct BatchHandle {
    pub batch: Arc<Batch>,
    pub driver: Arc<Driver>,
    pub seen: u64,
    pub known_ids: Arc<Mutex<KnownIds>>,
    pub durations: Arc<Mutex<AnswerDurations>>,
}

type OutputColumn = (String, u8, Vec<u64>, PyBackedBytes);
/// Of calls, and of messages on streams.
pub type AnswerDurations = [Durations; 2];
/// Arrival times of the calls and of the messages on streams that an answer completes: columns of seconds.
pub type Ended<'py> = (Bound<'py, PyBytes>, Bound<'py, PyBytes>);

#[pymethods]
impl BatchHandle {
    #[pyo3(signature = (members, revisions, positions, outputs, replayed, model_version))]
    /// Answer applied members: ascending, None for all, with their rows in order in `outputs`. The numbers are
    /// columns: members of u32, the others of u64.
    #[allow(clippy::too_many_arguments)]
    fn applied<'py>(
        &self,
        py: Python<'py>,
        members: Option<&[u8]>,
        revisions: &[u8],
        positions: &[u8],
        outputs: Vec<OutputColumn>,
        replayed: bool,
        model_version: u64,
    ) -> Ended<'py> {
        let members = members.map(|some| numbers_of(some, u32::from_ne_bytes));
        let ended = self.ended(py, members.as_deref());
        let revisions = numbers_of(revisions, u64::from_ne_bytes);
        let positions = numbers_of(positions, u64::from_ne_bytes);
        let count = members.as_ref().map_or(self.batch.sizes.len(), Vec::len);
        let rows = match &members {
            None => self.batch.sizes.iter().map(|size| *size as usize).sum(),
            Some(some) => {
                some.iter().map(|member| self.batch.sizes[*member as usize] as usize).sum::<usize>()
            }
        };
        debug_assert!(revisions.len() == count && positions.len() == count);
        let outputs = outputs
            .into_iter()
            .map(|(name, dtype, tail, data)| Output {
                name,
                dtype,
                tail,
                row_bytes: data.len() / rows.max(1),
                data: Box::new(data),
            })
            .collect();
        self.send(Answer::Applied { members, revisions, positions, outputs, replayed, model_version });
        ended
    }

    #[pyo3(signature = (members, status, error))]
    /// Answer failed members: the status for calls, and the error for streams.
    fn failed<'py>(
        &self,
        py: Python<'py>,
        members: Option<&[u8]>,
        status: PyStatus,
        error: &[u8],
    ) -> Ended<'py> {
        let members = members.map(|some| numbers_of(some, u32::from_ne_bytes));
        let ended = self.ended(py, members.as_deref());
        let error = Bytes::copy_from_slice(error);
        self.send(Answer::Failed { members, status: lists::status(status), error });
        ended
    }

    /// Return the columns: ids, connections and callers, one per session, or a single one for all; numbers of sessions by
    /// message, and rows, expected revisions, request ids and deadlines by session; what is asked for; tensors.
    fn columns<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let batch = &self.batch;
        let numbers = (
            bytes_of(py, &lists::counts_of(batch), |count| count.to_ne_bytes()),
            bytes_of(py, &batch.sizes, |size| size.to_ne_bytes()),
            bytes_of(py, &batch.expected, |revision| revision.to_ne_bytes()),
            bytes_of(py, &batch.request_ids, |id| id.to_ne_bytes()),
            bytes_of(py, &batch.deadlines, |at| at.to_ne_bytes()),
        );
        let signature = &batch.signature;
        let asked =
            (signature.select, signature.output_names.clone(), signature.has_sizes, signature.model.clone());
        let tensors: Vec<_> = signature
            .tensors
            .iter()
            .zip(&batch.data)
            .map(|(kind, data)| {
                (kind.name.as_str(), kind.dtype, kind.tail.clone(), PyBytes::new_bound(py, data))
            })
            .collect();
        let mut known_ids = self.known_ids.lock().unwrap_or_else(PoisonError::into_inner);
        let ids = known_ids.tuple_of(py, batch.session_ids());
        drop(known_ids);
        let callers = lists::callers_of(py, batch)?;
        let whos = lists::whos_of(py, batch)?;
        let tuple: PyObject = (ids, callers, whos, numbers, asked, tensors).into_py(py);
        Ok(tuple.into_bound(py).downcast_into::<PyTuple>()?)
    }

    /// Return the calls whose clients ask not to be traced.
    fn untraced(&self) -> Vec<usize> {
        let entries = self.batch.entries.iter().enumerate();
        entries
            .filter(|(_, entry)| entry.frame_id.is_none() && entry.call.is_traced() == Some(false))
            .map(|(place, _)| place)
            .collect()
    }

    /// Return the bytes of a member's Triton request.
    fn request<'py>(&self, py: Python<'py>, member: usize) -> Bound<'py, PyBytes> {
        let request = self.batch.entries[member].request.as_ref();
        PyBytes::new_bound(py, request.map_or(&[], |request| &request.message))
    }

    /// Return the members whose callers no longer wait.
    fn gone(&self) -> Vec<u32> {
        if self.driver.queue.abandoned.load(Ordering::Relaxed) == self.seen {
            return Vec::new();
        }
        self.batch
            .entries
            .iter()
            .filter(|entry| entry.call.is_over())
            .flat_map(|entry| entry.first..entry.first + entry.count)
            .collect()
    }
}

impl BatchHandle {
    /// The arrival for Python: the handle, the numbers of sessions and messages, the first session's id, the connections, the caller on each of
    /// them, or None without authentication, and whether all messages have one caller.
    pub fn into_tuple<'py>(self, py: Python<'py>, peers: &mut Peers<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let batch = &self.batch;
        let (connections, callers) = lists::connections_of(py, batch, peers)?;
        let (count, messages) = (batch.sizes.len(), batch.entries.len());
        let has_one_caller = lists::has_one_caller(batch);
        let first = PyString::new_bound(py, batch.session_ids().iter().next().unwrap_or_default());
        let tuple: PyObject =
            (0, self, count, messages, first, connections, callers, has_one_caller).into_py(py);
        Ok(tuple.into_bound(py).downcast_into::<PyTuple>()?)
    }

    /// Whether the caller of any message no longer waits.
    pub fn has_gone(&self) -> bool {
        self.driver.queue.abandoned.load(Ordering::Relaxed) != self.seen
            && self.batch.entries.iter().any(|entry| entry.call.is_over())
    }

    /// Count these members as answered. Returns the arrival times, in seconds on the monotonic clock, of the messages that
    /// are now complete: a column for calls, and one for messages on streams.
    fn ended<'py>(&self, py: Python<'py>, members: Option<&[u32]>) -> Ended<'py> {
        let (mut calls, mut messages) = (Vec::new(), Vec::new());
        self.answered(members, |entry| {
            let ended = if entry.frame_id.is_none() { &mut calls } else { &mut messages };
            ended.push(entry.arrived);
        });
        (bytes_of(py, &calls, |at| at.to_ne_bytes()), bytes_of(py, &messages, |at| at.to_ne_bytes()))
    }

    /// Count all members as answered, and how long their messages took.
    pub fn end_all(&self) {
        let now = clock::now();
        let mut durations = self.durations.lock().unwrap_or_else(PoisonError::into_inner);
        let [calls, messages] = &mut *durations;
        self.answered(None, |entry| {
            let of = if entry.frame_id.is_none() { &mut *calls } else { &mut *messages };
            of.observe(now - entry.arrived);
        });
    }

    /// Count these members as answered. `ended` gets the messages that are now complete.
    fn answered(&self, members: Option<&[u32]>, mut ended: impl FnMut(&Entry)) {
        let entries = &self.batch.entries;
        let mut answered = |entry: &Entry, count: u32| {
            if entry.unanswered.fetch_sub(count, Ordering::Relaxed) == count {
                ended(entry);
            }
        };
        match members {
            None => entries.iter().for_each(|entry| answered(entry, entry.count)),
            Some(some) => {
                for member in some {
                    answered(&entries[entries.partition_point(|entry| entry.first <= *member) - 1], 1);
                }
            }
        }
    }

    pub fn send(&self, answer: Answer) {
        self.driver.send(Command::Deliver(self.batch.clone(), answer));
    }
}

/// The answer to all members of a batch, which is sent once the store has their steps. For any thread.
pub struct HeldAnswer {
    batch: Arc<Batch>,
    driver: Arc<Driver>,
    /// None: it was sent or withdrawn.
    answer: Mutex<Option<Answer>>,
}

impl HeldAnswer {
    pub fn new(handle: &BatchHandle, answer: Answer) -> Arc<Self> {
        let (batch, driver) = (handle.batch.clone(), handle.driver.clone());
        Arc::new(HeldAnswer { batch, driver, answer: Mutex::new(Some(answer)) })
    }

    fn take(&self) -> Option<Answer> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Send it, unless it was sent or withdrawn.
    pub fn send(&self) {
        if let Some(answer) = self.take() {
            self.driver.send(Command::Deliver(self.batch.clone(), answer));
        }
    }

    /// Never send it. Returns false if it was sent.
    pub fn withdraw(&self) -> bool {
        self.take().is_some()
    }
}
