//! Runs single steps of one model on Python's arrays, except for the program itself.
//!
//! Its twin is `Direct` in `engine/passes/direct.py`. It declines whatever may be wrong or must wait; Python then decides.

// pyo3's macros convert errors into themselves.
#![allow(clippy::useless_conversion)]

use crate::python::batch::{BatchHandle, HeldAnswer};
use crate::python::lists::bytes_of;
use crate::python::memory::Memory;
use crate::steps::columns::Batch;
use crate::steps::record::{self, Numbers, Texts};
use crate::steps::reply::{Answer, Output};
use crate::steps::single::{self, applies, Digests, Form, ReplyForm, Tensor};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyDict, PyList, PyString};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    watch_revision: Memory,
    watch_at: Memory,
    opened_with: Memory,
    opened_digest: Memory,
    created: Memory,
    max_idle_ms: Memory,
    pinned: Memory,
}

/// A claimed session of the running batch.
struct Member {
    handle: usize,
    row: usize,
    id: Py<PyString>,
}

/// A session after its step, which the store may not have yet.
#[derive(Clone, Copy)]
struct Change {
    handle: usize,
    revision: u64,
    position: u64,
    request_id: u64,
    digest: u64,
}

/// How records of the store are made.
struct RecordForm {
    texts: Texts,
    /// Fields of some sessions, by handle, without that of their version.
    fields: Py<PyDict>,
    /// All fields of such a session, by its handle.
    fields_of: PyObject,
}

/// What the records of a batch share: the time, and the fields of sessions without others, not pinned and pinned.
type Shared = (f64, PyBackedBytes, PyBackedBytes);
/// Records of a batch: ids, sizes, ids as `encode_ids` returns them, the records and their checksums.
type Records = (Py<PyList>, Vec<usize>, Py<PyBytes>, Py<PyBytes>, Py<PyBytes>);

#[derive(Default)]
struct State {
    table: Option<Table>,
    /// The claimed sessions, in the order of the batch.
    members: Vec<Member>,
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
    /// Of each row: the steps since its rings were written as a whole.
    steps: Memory,
    form: RecordForm,
    state: Mutex<State>,
}

/// The memory of arrays of an executor: of inputs and states, or of outputs and states.
#[pyclass(frozen)]
pub struct StepArrays {
    tensors: Vec<Memory>,
    states: Vec<Memory>,
}

impl StepArrays {
    fn new(
        tensors: &[Bound<'_, PyAny>],
        states: &[Bound<'_, PyAny>],
        memory: impl Fn(&Bound<'_, PyAny>) -> PyResult<Memory>,
    ) -> PyResult<Self> {
        let of = |arrays: &[Bound<'_, PyAny>]| arrays.iter().map(&memory).collect::<PyResult<_>>();
        Ok(StepArrays { tensors: of(tensors)?, states: of(states)? })
    }
}

/// Steps of a batch that are in the arena, and are not committed yet. Their sessions are claimed.
#[pyclass(frozen)]
pub struct StepWrite {
    batch: Py<BatchHandle>,
    /// The column of each input.
    columns: Vec<usize>,
    changes: Vec<Change>,
    reply: ReplyForm,
    /// The answer, which is sent by `commit` or by the thread that has written the records.
    pub answer: Arc<HeldAnswer>,
    /// None: there is no store to keep them.
    records: Option<Records>,
}

#[pymethods]
impl StepWrite {
    /// The handles of its sessions, a column of 64-bit integers.
    fn handles<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        bytes_of(py, &self.changes, |change| change.handle.to_ne_bytes())
    }

    /// Never answer. Returns false if the answer was sent.
    fn withdraw(&self) -> bool {
        self.answer.withdraw()
    }

    /// The records for the store.
    fn records(&self, py: Python<'_>) -> Option<Records> {
        let (ids, sizes, encoded, together, checksums) = self.records.as_ref()?;
        let shared = |bytes: &Py<PyBytes>| bytes.clone_ref(py);
        Some((ids.clone_ref(py), sizes.clone(), shared(encoded), shared(together), shared(checksums)))
    }
}

/// A window of past values, of which a step reads some elements and replaces the oldest: see `engine/state/rings.py`.
#[derive(Clone, Copy)]
struct Ring {
    element_bytes: usize,
    length: usize,
    /// A step reads every so many elements, from the oldest on.
    gap: usize,
}

/// An array of the arena.
struct Rows {
    memory: Memory,
    row_bytes: usize,
    /// None: a step takes and returns all of it.
    ring: Option<Ring>,
}

/// An array of the arena, the bytes of a row, and of a ring its length and gap; else both are 0.
type Array<'py> = (Bound<'py, PyAny>, usize, usize, usize);

impl Rows {
    fn new((array, row_bytes, length, gap): &Array<'_>) -> PyResult<Self> {
        let ring = |element_bytes| (*gap > 0).then_some(Ring { element_bytes, length: *length, gap: *gap });
        let ring = row_bytes.checked_div(*length).and_then(ring);
        Ok(Rows { memory: Memory::writable(array)?, row_bytes: *row_bytes, ring })
    }

    /// The bytes that a step of a row takes.
    fn taken_bytes(&self) -> usize {
        self.ring.map_or(self.row_bytes, |ring| ring.length.div_ceil(ring.gap) * ring.element_bytes)
    }

    /// The bytes that it returns.
    fn returned_bytes(&self) -> usize {
        self.ring.map_or(self.row_bytes, |ring| ring.element_bytes)
    }

    /// Copy what a step of a row takes to the place of a member; `steps`: those of the row.
    fn take(&self, py: Python<'_>, row: usize, steps: usize, into: &Memory, place: usize) {
        let (start, mut at) = (row * self.row_bytes, place * self.taken_bytes());
        let Some(Ring { element_bytes, length, gap }) = self.ring else {
            into.copy(py, at, &self.memory, start, self.row_bytes);
            return;
        };
        for element in (0..length).step_by(gap) {
            let found = start + (steps + element) % length * element_bytes;
            into.copy(py, at, &self.memory, found, element_bytes);
            at += element_bytes;
        }
    }

    /// Write what a step returned for a member to its row.
    fn put(&self, py: Python<'_>, row: usize, steps: usize, from: &Memory, place: usize) {
        let size = self.returned_bytes();
        let at = row * self.row_bytes + self.ring.map_or(0, |ring| steps % ring.length * size);
        self.memory.copy(py, at, from, place * size, size);
    }

    /// Write the bytes of a row as they are once `put` has been called: rings are in the order of time.
    fn lay_out(
        &self,
        py: Python<'_>,
        row: usize,
        steps: usize,
        from: &Memory,
        place: usize,
        into: &mut [u8],
    ) {
        let size = self.returned_bytes();
        let mut rest = into;
        if let Some(Ring { length, .. }) = self.ring {
            let (start, oldest) = (row * self.row_bytes, steps % length * size);
            let (before, after) = rest.split_at_mut(self.row_bytes - size - oldest);
            self.memory.read(py, start + oldest + size, before);
            let (before, after) = after.split_at_mut(oldest);
            self.memory.read(py, start, before);
            rest = after;
        }
        from.read(py, place * size, rest);
    }
}

#[pymethods]
impl StepKernel {
    /// `handles`: of all sessions by their ids. `states` and `kept`: the arena's arrays. `steps`: see `Rings`.
    /// `weights`, `prefix` and `seeds` of digests: see `Digests`. `texts`: fingerprint and name of the model, and the bytes
    /// of the first. `fields` and `fields_of`: see `RecordForm`.
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        handles: Py<PyDict>,
        model: i32,
        inputs: Vec<Spec>,
        outputs: Vec<Spec>,
        states: Vec<Array<'_>>,
        kept: Vec<Array<'_>>,
        steps: Bound<'_, PyAny>,
        weights: Vec<u64>,
        prefix: u64,
        seeds: Vec<(u64, u64)>,
        texts: (Vec<u8>, u8),
        fields: Py<PyDict>,
        fields_of: PyObject,
    ) -> PyResult<Self> {
        let rows = |arrays: Vec<Array<'_>>| arrays.iter().map(Rows::new).collect::<PyResult<Vec<_>>>();
        Ok(StepKernel {
            handles,
            model,
            inputs: inputs.into_iter().map(tensor).collect(),
            outputs: outputs.into_iter().map(tensor).collect(),
            digests: Digests::new(weights, prefix, seeds),
            states: rows(states)?,
            kept: rows(kept)?,
            steps: Memory::writable(&steps)?,
            form: RecordForm {
                texts: Texts { data: texts.0, fingerprint_bytes: texts.1 },
                fields,
                fields_of,
            },
            state: Mutex::default(),
        })
    }

    /// Use these columns of the table from now on, in the order of `Table`.
    fn attach(&self, columns: [Bound<'_, PyAny>; 18]) -> PyResult<()> {
        let [model, batch_size, claimed, row, revision, position, request_id, digest, used, reply, more @ ..] =
            &columns;
        let [watched, watch_revision, watch_at, more @ ..] = more;
        let [opened_with, opened_digest, created, max_idle_ms, pinned] = more;
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
            watch_revision: Memory::readable(watch_revision)?,
            watch_at: Memory::readable(watch_at)?,
            opened_with: Memory::readable(opened_with)?,
            opened_digest: Memory::readable(opened_digest)?,
            created: Memory::readable(created)?,
            max_idle_ms: Memory::readable(max_idle_ms)?,
            pinned: Memory::readable(pinned)?,
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
        debug_assert!(members.is_empty(), "a batch is written or cancelled before the next one");
        let handles = self.handles.bind(py);
        for (place, id) in columns.session_ids().iter().enumerate() {
            let id = PyString::new_bound(py, id);
            let found = handles.get_item(&id)?;
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
                Ok(row) if may_run => members.push(Member { handle, row, id: id.unbind() }),
                _ => return Ok(give_up(py, table, members)),
            }
            table.claimed.set(py, handle, [1]); // a session that appears twice is claimed the second time
        }
        Ok(true)
    }

    /// The sessions of a batch whose watches may report it: their handles and their inputs as bytes. See
    /// `SessionTable.due_to_watches`.
    fn watched<'py>(
        &self,
        py: Python<'py>,
        write: &StepWrite,
        now: f64,
    ) -> Vec<(usize, Vec<Bound<'py, PyBytes>>)> {
        let State { table: Some(table), .. } = &*self.state() else { return Vec::new() };
        let inputs = |place: usize| {
            let row = |(column, input): (&usize, &Tensor)| {
                let data = &write.batch.get().batch.data[*column];
                PyBytes::new_bound(py, &data[place * input.row_bytes..(place + 1) * input.row_bytes])
            };
            write.columns.iter().zip(&self.inputs).map(row).collect()
        };
        let changes = write.changes.iter().enumerate();
        changes
            .filter(|(_, change)| {
                table.watched.get(py, change.handle) != [0]
                    && (change.revision >= u64::from_ne_bytes(table.watch_revision.get(py, change.handle))
                        || now >= f64::from_ne_bytes(table.watch_at.get(py, change.handle)))
            })
            .map(|(place, change)| (change.handle, inputs(place)))
            .collect()
    }

    /// The handles of the claimed sessions.
    fn claimed(&self) -> Vec<usize> {
        self.state().members.iter().map(|member| member.handle).collect()
    }

    /// End the claims of a batch that is not written.
    fn cancel(&self, py: Python<'_>) {
        let State { table: Some(table), members, .. } = &mut *self.state() else { return };
        give_up(py, table, members);
    }

    /// The inputs and states of the executor for `gather`, in the order of the program's specs.
    #[staticmethod]
    fn given(inputs: Vec<Bound<'_, PyAny>>, states: Vec<Bound<'_, PyAny>>) -> PyResult<StepArrays> {
        StepArrays::new(&inputs, &states, Memory::writable)
    }

    /// The outputs and states of the executor for `write`.
    #[staticmethod]
    fn results(outputs: Vec<Bound<'_, PyAny>>, states: Vec<Bound<'_, PyAny>>) -> PyResult<StepArrays> {
        StepArrays::new(&outputs, &states, Memory::readable)
    }

    /// Copy the inputs of the claimed batch and the states of its sessions into the executor's arrays.
    fn gather(&self, py: Python<'_>, batch: &BatchHandle, given: &StepArrays) -> PyResult<()> {
        let state = self.state();
        for (array, column) in given.tensors.iter().zip(&state.form.columns) {
            let data = &batch.batch.data[*column];
            array.require(data.len())?;
            array.write(py, 0, data);
        }
        for (array, rows) in given.states.iter().zip(&self.states) {
            array.require(state.members.len() * rows.taken_bytes())?;
            for (place, member) in state.members.iter().enumerate() {
                rows.take(py, member.row, self.steps_of(py, member), array, place);
            }
        }
        Ok(())
    }

    /// Write the executor's results to the arena, and lay out the records if a store keeps them. If it raises, nothing
    /// changed. The sessions stay claimed until `commit`, or until Python drops them because the store failed.
    #[pyo3(signature = (batch, results, model_version, shared))]
    fn write(
        &self,
        py: Python<'_>,
        batch: Py<BatchHandle>,
        results: &StepArrays,
        model_version: u64,
        shared: Option<Shared>,
    ) -> PyResult<StepWrite> {
        let mut state = self.state();
        let steps = &*batch.get().batch;
        let reply = ReplyForm::of(steps.signature.select, state.form.has_time);
        let State { table: Some(table), members, form } = &mut *state else {
            return Err(PyValueError::new_err("no columns are attached"));
        };
        // whatever may fail comes before the first write
        let StepArrays { tensors: outputs, states } = results;
        for (array, rows) in states.iter().zip(&self.states).chain(outputs.iter().zip(&self.kept)) {
            array.require(members.len() * rows.returned_bytes())?;
        }
        let changes: Vec<_> = members
            .iter()
            .enumerate()
            .map(|(place, member)| self.change(py, table, steps, form, place, member.handle))
            .collect();
        let arrays = || states.iter().zip(&self.states).chain(outputs.iter().zip(&self.kept));
        let records = match shared {
            None => None,
            Some(shared) => {
                let arrays: Vec<_> = arrays().collect();
                Some(self.records(py, table, members, &changes, reply, &arrays, &shared)?)
            }
        };
        for (array, rows) in arrays() {
            for (place, member) in members.iter().enumerate() {
                rows.put(py, member.row, self.steps_of(py, member), array, place);
            }
        }
        if self.has_rings() {
            for member in members.iter() {
                self.steps.set(py, member.row, (self.steps_of(py, member) + 1).to_ne_bytes());
            }
        }
        let copies = if reply == ReplyForm::Empty {
            Vec::new()
        } else {
            let copy = |(array, output)| self.output(py, array, output, members.len(), reply);
            outputs.iter().zip(&self.outputs).map(copy).collect()
        };
        members.clear();
        let answer = Answer::Applied {
            members: None,
            revisions: changes.iter().map(|change| change.revision).collect(),
            positions: changes.iter().map(|change| change.position).collect(),
            outputs: copies,
            replayed: false,
            model_version,
        };
        let answer = HeldAnswer::new(batch.get(), answer);
        Ok(StepWrite { batch, columns: form.columns.clone(), changes, reply, answer, records })
    }

    /// Write the steps to the table, end their claims, and answer unless that has happened.
    fn commit(&self, py: Python<'_>, write: &StepWrite, now: f64) -> PyResult<()> {
        let state = self.state();
        let Some(table) = &state.table else {
            return Err(PyValueError::new_err("no columns are attached"));
        };
        for change in &write.changes {
            table.revision.set(py, change.handle, change.revision.to_ne_bytes());
            table.position.set(py, change.handle, change.position.to_ne_bytes());
            table.request_id.set(py, change.handle, change.request_id.to_ne_bytes());
            table.digest.set(py, change.handle, change.digest.to_ne_bytes());
            table.used.set(py, change.handle, now.to_ne_bytes());
            table.reply.set(py, change.handle, [write.reply as u8]);
            table.claimed.set(py, change.handle, [0]);
        }
        write.batch.get().end_all();
        write.answer.send();
        Ok(())
    }
}

impl StepKernel {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_rings(&self) -> bool {
        self.states.iter().any(|rows| rows.ring.is_some())
    }

    /// The steps since the rings of a session were written as a whole; 0 without rings.
    fn steps_of(&self, py: Python<'_>, member: &Member) -> usize {
        if self.steps.len() == 0 {
            return 0;
        }
        usize::from_ne_bytes(self.steps.get(py, member.row))
    }

    /// A session after its step.
    fn change(
        &self,
        py: Python<'_>,
        table: &Table,
        batch: &Batch,
        form: &Form,
        place: usize,
        handle: usize,
    ) -> Change {
        let request = batch.request_ids.get(place).copied();
        let inputs = form.columns.iter().zip(&self.inputs).map(|(column, input)| {
            &batch.data[*column][place * input.row_bytes..(place + 1) * input.row_bytes]
        });
        let digest = request.and_then(|_| self.digests.of(batch.signature.select, form.has_time, inputs));
        Change {
            handle,
            revision: u64::from_ne_bytes(table.revision.get(py, handle)) + 1,
            position: u64::from_ne_bytes(table.position.get(py, handle)) + 1,
            request_id: request.unwrap_or(0),
            digest: digest.unwrap_or(0),
        }
    }

    /// The records of changed sessions, whose rows are in `arrays`.
    #[allow(clippy::too_many_arguments)]
    fn records(
        &self,
        py: Python<'_>,
        table: &Table,
        members: &[Member],
        changes: &[Change],
        reply: ReplyForm,
        arrays: &[(&Memory, &Rows)],
        (last_used, unpinned, pinned): &Shared,
    ) -> PyResult<Records> {
        let texts = &self.form.texts;
        let others = self.form.fields.bind(py);
        let mut fields: Vec<PyBackedBytes> = Vec::new();
        if !others.is_empty() {
            for member in members {
                let own = if others.contains(member.handle)? {
                    self.form.fields_of.call1(py, (member.handle,))?.extract(py)?
                } else {
                    PyBackedBytes::from(PyBytes::new_bound(py, b""))
                };
                fields.push(own);
            }
        }
        let fields_of = |place: usize, handle: usize| -> &[u8] {
            match fields.get(place) {
                Some(own) if !own.is_empty() => own,
                _ if table.pinned.get(py, handle) == [0] => unpinned,
                _ => pinned,
            }
        };
        let row_bytes = arrays.iter().map(|(_, rows)| rows.row_bytes).sum();
        let sizes: Vec<_> = members
            .iter()
            .enumerate()
            .map(|(place, member)| record::size(texts, row_bytes, fields_of(place, member.handle).len()))
            .collect();
        let (mut encoded, mut checksums) = (Vec::new(), Vec::with_capacity(4 * members.len()));
        let too_large = || PyValueError::new_err("a part of a session is too large to be stored");
        let together = PyBytes::new_bound_with(py, sizes.iter().sum(), |mut left| {
            for (place, (member, change)) in members.iter().zip(changes).enumerate() {
                let record;
                (record, left) = left.split_at_mut(sizes[place]);
                let mut at = record::row_at(texts);
                let steps = self.steps_of(py, member);
                for (array, rows) in arrays {
                    let into = &mut record[at..at + rows.row_bytes];
                    rows.lay_out(py, member.row, steps, array, place, into);
                    at += rows.row_bytes;
                }
                let handle = change.handle;
                let numbers = Numbers {
                    reply: reply as u8,
                    revision: change.revision,
                    position: change.position,
                    request_id: change.request_id,
                    opened_with: u64::from_ne_bytes(table.opened_with.get(py, handle)),
                    created: f64::from_ne_bytes(table.created.get(py, handle)),
                    last_used: *last_used,
                    digest: change.digest,
                    opened_digest: u64::from_ne_bytes(table.opened_digest.get(py, handle)),
                    max_idle_ms: u64::from_ne_bytes(table.max_idle_ms.get(py, handle)),
                };
                let id = member.id.bind(py).to_cow()?;
                let checksum = record::complete(record, &id, texts, &numbers, fields_of(place, handle));
                checksums.extend_from_slice(&checksum.ok_or_else(too_large)?);
                if !record::push_id(&mut encoded, &id) {
                    return Err(too_large());
                }
            }
            Ok(())
        })?;
        let ids = PyList::new_bound(py, members.iter().map(|member| &member.id));
        Ok((
            ids.unbind(),
            sizes,
            PyBytes::new_bound(py, &encoded).unbind(),
            together.unbind(),
            PyBytes::new_bound(py, &checksums).unbind(),
        ))
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
