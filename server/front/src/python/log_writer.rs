//! The log's writer for Python.

// pyo3's macros convert errors into themselves.
#![allow(clippy::useless_conversion)]

use crate::log_writer::{self, Ended, Job};
use crate::python::step_kernel::StepWrite;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use std::time::Duration;

/// Writes to the write-ahead log. Its methods are for the event loop, except `close`.
#[pyclass(frozen)]
pub struct LogWriter {
    writer: log_writer::LogWriter<PyBackedBytes>,
}

#[pymethods]
impl LogWriter {
    /// `descriptors`: the files of the log. `pause_s`: a pause instead of each flush, for benchmarks.
    #[new]
    #[pyo3(signature = (descriptors, *, pause_s=None))]
    fn new(descriptors: Vec<i32>, pause_s: Option<f64>) -> PyResult<Self> {
        let pause = pause_s.map(Duration::from_secs_f64);
        Ok(LogWriter { writer: log_writer::LogWriter::new(&descriptors, pause)? })
    }

    /// A descriptor that is readable when a write has ended.
    fn fd(&self) -> i32 {
        self.writer.fd()
    }

    /// Begin to write data into a file at an offset, and to flush it. If that fails, overwrite the first `head_bytes`
    /// at each of `heads` with zeros. If it succeeds, send the answers to `steps`, after `take` returns the write.
    ///
    /// Raises RuntimeError if the last write was not taken, or the writer is closed.
    fn write(
        &self,
        descriptor: i32,
        data: PyBackedBytes,
        at: u64,
        heads: Vec<u64>,
        head_bytes: usize,
        steps: Vec<Py<StepWrite>>,
    ) -> PyResult<()> {
        let answers: Vec<_> = steps.iter().map(|one| one.get().answer.clone()).collect();
        let then = move || answers.iter().for_each(|answer| answer.send());
        if self.writer.write(Job { descriptor, data, at, heads, head_bytes, then: Some(Box::new(then)) }) {
            return Ok(());
        }
        Err(PyRuntimeError::new_err("the writer of the log is closed or has another write"))
    }

    /// Take back the last write, which waits for another one. Returns false if it has begun.
    fn withdraw(&self) -> bool {
        self.writer.withdraw().is_some()
    }

    /// Take the first write that has ended: its errno, or 0, and its duration in seconds. None: none has ended.
    fn take(&self) -> Option<(i32, f64)> {
        let Ended { data, result, duration } = self.writer.take()?;
        drop(data); // here, with Python's lock
        let errno = result.err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
        Some((errno, duration.as_secs_f64()))
    }

    /// End after the running write. Returns whether it ended within `limit_s`.
    fn close(&self, py: Python<'_>, limit_s: f64) -> bool {
        py.allow_threads(|| self.writer.close(Duration::from_secs_f64(limit_s)))
    }
}
