//! Runs single steps of one model on Python's arrays, except for the program itself.
//!
//! Its twin is `Direct` in `engine/passes/direct.py`. It declines whatever may be wrong or must wait; Python then decides.

// pyo3's macros convert errors into themselves.
#![allow(clippy::useless_conversion)]

use crate::python::batch::{BatchHandle, Ended};
use crate::python::memory::Memory;
use crate::steps::reply::{Answer, Output};
use crate::steps::single::{self, applies, Digests, Form, ReplyForm, Tensor};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Name, `stepwell.v1.DataType`, shape of a row, whether it has a time axis, bytes of a row and of a number, and the bits
/// of a float's exponent.
type Spec = (String, u8, Vec<usize>, bool, usize, usize, u64);

fn tensor((name, dtype, shape, is_temporal, row_bytes, number_bytes, exponent): Spec) -> Tensor {
    Tensor { name, dtype, shape, is_temporal, row_bytes, number_bytes, exponent }
}

/// The columns of the session table. See `SessionTable` in `core/sessions.py` for their meaning.
struct Table {
    model: Memory,
    batch_size: Memory,
    claimed: Memory,
    row: Memory,
    revision: Memory,
    position: Memory,
    request_id: Memory,
    digest: Memory,
    used: Memory,
    reply: Memory,
    watched: Memory,
}

/// A claimed session of the running batch.
struct Member {
    handle: usize,
    row: usize,
}

#[derive(Default)]
struct State {
    table: Option<Table>,
    /// The claimed sessions, in the order of the batch.
    members: Vec<Member>,
    /// Places and handles of the watched sessions of the last finished batch.
    watched: Vec<(usize, usize)>,
    form: Form,
}

/// Checks, claims and gathers the sessions of a batch, and later applies its steps. For the event loop's thread.
#[pyclass(frozen)]
pub struct StepKernel {
    /// Handles by session id.
    handles: Py<PyDict>,
    /// Number of the model in the table.
    model: i32,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    digests: Digests,
    /// Rows of the arena: each state, and each output.
    states: Vec<Rows>,
    kept: Vec<Rows>,
    state: Mutex<State>,
}

/// An array of the arena.
struct Rows {
    memory: Memory,
    row_bytes: usize,
}

impl Rows {
    fn new(array: &Bound<'_, PyAny>, row_bytes: usize) -> PyResult<Self> {
        Ok(Rows { memory: Memory::writable(array)?, row_bytes })
    }
}

#[pymethods]
impl StepKernel {
    /// `handles`: of all sessions by their ids. `states` and `kept`: the arena's arrays, each with the bytes of a row.
    /// `weights`, `prefix` and `seeds` of digests: see `Digests`.
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        handles: Py<PyDict>,
        model: i32,
        inputs: Vec<Spec>,
        outputs: Vec<Spec>,
        states: Vec<(Bound<'_, PyAny>, usize)>,
        kept: Vec<(Bound<'_, PyAny>, usize)>,
        weights: Vec<u64>,
        prefix: u64,
        seeds: Vec<(u64, u64)>,
    ) -> PyResult<Self> {
        let rows = |arrays: Vec<(Bound<'_, PyAny>, usize)>| -> PyResult<Vec<Rows>> {
            arrays.iter().map(|(array, row_bytes)| Rows::new(array, *row_bytes)).collect()
        };
        Ok(StepKernel {
            handles,
            model,
            inputs: inputs.into_iter().map(tensor).collect(),
            outputs: outputs.into_iter().map(tensor).collect(),
            digests: Digests::new(weights, prefix, seeds),
            states: rows(states)?,
            kept: rows(kept)?,
            state: Mutex::default(),
        })
    }

    /// Use these columns of the table from now on, in the order of `Table`.
    fn attach(&self, columns: [Bound<'_, PyAny>; 11]) -> PyResult<()> {
        let [model, batch_size, claimed, row, revision, position, request_id, digest, used, reply, watched] =
            &columns;
        self.state().table = Some(Table {
            model: Memory::readable(model)?,
            batch_size: Memory::readable(batch_size)?,
            claimed: Memory::writable(claimed)?,
            row: Memory::readable(row)?,
            revision: Memory::writable(revision)?,
            position: Memory::writable(position)?,
            request_id: Memory::writable(request_id)?,
            digest: Memory::writable(digest)?,
            used: Memory::writable(used)?,
            reply: Memory::writable(reply)?,
            watched: Memory::readable(watched)?,
        });
        Ok(())
    }

    /// Claim the sessions of a batch of single steps, if all may run now. Returns whether they may; else nothing changed.
    fn claim(&self, py: Python<'_>, batch: &BatchHandle, now: f64) -> PyResult<bool> {
        let mut state = self.state();
        let columns = &*batch.batch;
        if columns.deadlines.iter().any(|deadline| *deadline <= now) || batch.has_gone() {
            return Ok(false);
        }
        let Some(form) = single::form_of(&self.inputs, columns) else { return Ok(false) };
        state.form = form;
        let State { table: Some(table), members, .. } = &mut *state else { return Ok(false) };
        debug_assert!(members.is_empty(), "a batch is finished or cancelled before the next one");
        let handles = self.handles.bind(py);
        for (place, id) in columns.session_ids().iter().enumerate() {
            let found = handles.get_item(PyString::new_bound(py, id))?;
            let handle = match found {
                Some(handle) => handle.extract::<usize>()?,
                None => return Ok(give_up(py, table, members)),
            };
            let request = columns.request_ids.get(place).copied().unwrap_or(0);
            let last = u64::from_ne_bytes(table.request_id.get(py, handle));
            let revision = u64::from_ne_bytes(table.revision.get(py, handle));
            let row = i64::from_ne_bytes(table.row.get(py, handle));
            let may_run = i32::from_ne_bytes(table.model.get(py, handle)) == self.model
                && i32::from_ne_bytes(table.batch_size.get(py, handle)) == 1
                && table.claimed.get(py, handle) == [0]
                && applies(revision, last, columns.expected.get(place).copied(), request);
            match usize::try_from(row) {
                Ok(row) if may_run => members.push(Member { handle, row }),
                _ => return Ok(give_up(py, table, members)),
            }
            table.claimed.set(py, handle, [1]); // a session that appears twice is claimed the second time
        }
        Ok(true)
    }

    /// The watched sessions of the batch that was just finished: their handles and their inputs as bytes.
    fn watched<'py>(&self, py: Python<'py>, batch: &BatchHandle) -> Vec<(usize, Vec<Bound<'py, PyBytes>>)> {
        let state = self.state();
        let inputs = |place: usize| {
            let row = |(column, input): (&usize, &Tensor)| {
                let data = &batch.batch.data[*column];
                PyBytes::new_bound(py, &data[place * input.row_bytes..(place + 1) * input.row_bytes])
            };
            state.form.columns.iter().zip(&self.inputs).map(row).collect()
        };
        state.watched.iter().map(|(place, handle)| (*handle, inputs(*place))).collect()
    }

    /// The handles of the claimed sessions.
    fn claimed(&self) -> Vec<usize> {
        self.state().members.iter().map(|member| member.handle).collect()
    }

    /// End the claims of a batch that is not finished.
    fn cancel(&self, py: Python<'_>) {
        let State { table: Some(table), members, .. } = &mut *self.state() else { return };
        give_up(py, table, members);
    }

    /// Copy the inputs of the claimed batch and the states of its sessions into the executor's arrays.
    fn gather(
        &self,
        py: Python<'_>,
        batch: &BatchHandle,
        inputs: Vec<Bound<'_, PyAny>>,
        states: Vec<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let state = self.state();
        for (array, column) in inputs.iter().zip(&state.form.columns) {
            let data = &batch.batch.data[*column];
            let array = Memory::writable(array)?;
            array.require(data.len())?;
            array.write(py, 0, data);
        }
        for (array, rows) in states.iter().zip(&self.states) {
            let array = Memory::writable(array)?;
            array.require(state.members.len() * rows.row_bytes)?;
            for (place, member) in state.members.iter().enumerate() {
                let size = rows.row_bytes;
                array.copy(py, place * size, &rows.memory, member.row * size, size);
            }
        }
        Ok(())
    }

    /// Write the executor's results to the arena and the table, end the claims, and answer. Nothing waits for a store.
    ///
    /// Returns the arrival times of the calls and messages that are answered.
    fn finish<'py>(
        &self,
        py: Python<'py>,
        batch: &BatchHandle,
        outputs: Vec<Bound<'py, PyAny>>,
        states: Vec<Bound<'py, PyAny>>,
        now: f64,
        model_version: u64,
    ) -> PyResult<Ended<'py>> {
        let mut state = self.state();
        let form = ReplyForm::of(batch.batch.signature.select, state.form.has_time);
        let State { table: Some(table), members, watched, form: Form { columns, has_time } } = &mut *state
        else {
            return Ok(batch.ended(py, None));
        };
        watched.clear();
        // whatever may fail comes before the first write
        let results = |arrays: Vec<Bound<'py, PyAny>>, rows: &[Rows]| -> PyResult<Vec<Memory>> {
            let of = |(array, rows): (&Bound<'py, PyAny>, &Rows)| {
                let array = Memory::readable(array)?;
                array.require(members.len() * rows.row_bytes)?;
                Ok(array)
            };
            arrays.iter().zip(rows).map(of).collect()
        };
        let (outputs, states) = (results(outputs, &self.kept)?, results(states, &self.states)?);
        let arrays = states.iter().zip(&self.states).chain(outputs.iter().zip(&self.kept));
        for (array, rows) in arrays {
            let size = rows.row_bytes;
            for (place, member) in members.iter().enumerate() {
                rows.memory.copy(py, member.row * size, array, place * size, size);
            }
        }
        let (mut revisions, mut positions) =
            (Vec::with_capacity(members.len()), Vec::with_capacity(members.len()));
        for (place, Member { handle, .. }) in members.iter().enumerate() {
            let request = batch.batch.request_ids.get(place).copied();
            let inputs = columns.iter().zip(&self.inputs).map(|(column, input)| {
                &batch.batch.data[*column][place * input.row_bytes..(place + 1) * input.row_bytes]
            });
            let digest = request
                .and_then(|_| self.digests.of(batch.batch.signature.select, *has_time, inputs))
                .unwrap_or(0);
            let revision = u64::from_ne_bytes(table.revision.get(py, *handle)) + 1;
            let position = u64::from_ne_bytes(table.position.get(py, *handle)) + 1;
            table.revision.set(py, *handle, revision.to_ne_bytes());
            table.position.set(py, *handle, position.to_ne_bytes());
            table.request_id.set(py, *handle, request.unwrap_or(0).to_ne_bytes());
            table.digest.set(py, *handle, digest.to_ne_bytes());
            table.used.set(py, *handle, now.to_ne_bytes());
            table.reply.set(py, *handle, [form as u8]);
            table.claimed.set(py, *handle, [0]);
            if table.watched.get(py, *handle) != [0] {
                watched.push((place, *handle));
            }
            revisions.push(revision);
            positions.push(position);
        }
        let outputs = if form == ReplyForm::Empty {
            Vec::new()
        } else {
            let copy = |(array, output)| self.output(py, array, output, members.len(), form);
            outputs.iter().zip(&self.outputs).map(copy).collect()
        };
        members.clear();
        let ended = batch.ended(py, None);
        batch.send(Answer::Applied {
            members: None,
            revisions,
            positions,
            outputs,
            replayed: false,
            model_version,
        });
        Ok(ended)
    }
}

impl StepKernel {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn output(
        &self,
        py: Python<'_>,
        array: &Memory,
        output: &Tensor,
        count: usize,
        form: ReplyForm,
    ) -> Output {
        let time = (form == ReplyForm::RowsWithTime && output.is_temporal).then_some(1);
        Output {
            name: output.name.clone(),
            dtype: output.dtype,
            tail: time.into_iter().chain(output.shape.iter().map(|axis| *axis as u64)).collect(),
            row_bytes: output.row_bytes,
            data: Box::new(array.first(py, count * output.row_bytes)),
        }
    }
}

/// End the claims of these sessions. Returns false: the batch does not run.
fn give_up(py: Python<'_>, table: &Table, members: &mut Vec<Member>) -> bool {
    for member in members.drain(..) {
        table.claimed.set(py, member.handle, [0]);
    }
    false
}
