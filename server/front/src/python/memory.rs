//! The memory of Python's arrays.

#![allow(unsafe_code)]

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::c_int;

/// The memory of an array, whose bytes are one after the other. It stays where it is while this value lives.
///
/// Offsets are checked. All methods need Python's lock, so no other Python code runs meanwhile. Python's own threads may
/// write to other parts of it without the lock: they only touch rows of sessions that they have claimed.
pub struct Memory {
    view: Box<ffi::Py_buffer>,
}

// SAFETY: the pointers are only used with Python's lock, on whichever thread.
unsafe impl Send for Memory {}
// SAFETY: the same.
unsafe impl Sync for Memory {}

impl Memory {
    /// The memory of an array that is written to.
    pub fn writable(array: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::new(array, ffi::PyBUF_WRITABLE)
    }

    /// The memory of an array that is only read.
    pub fn readable(array: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::new(array, ffi::PyBUF_SIMPLE)
    }

    fn new(array: &Bound<'_, PyAny>, flags: c_int) -> PyResult<Self> {
        let mut view = Box::new(ffi::Py_buffer::new());
        // SAFETY: `array` is an object, and `view` is valid for the call. If it succeeds, the bytes from `buf` on belong to
        // the array and are one after the other: the flags ask for no strides. They stay there until `drop` releases them.
        let failed = unsafe { ffi::PyObject_GetBuffer(array.as_ptr(), &raw mut *view, flags) } != 0;
        if failed {
            return Err(PyErr::fetch(array.py()));
        }
        Ok(Memory { view })
    }

    pub fn len(&self) -> usize {
        usize::try_from(self.view.len).unwrap_or(0)
    }

    /// Returns an error if there are fewer bytes than these.
    pub fn require(&self, bytes: usize) -> PyResult<()> {
        if self.len() >= bytes {
            return Ok(());
        }
        Err(PyBufferError::new_err(format!("an array has {} bytes instead of {bytes}", self.len())))
    }

    fn at(&self, offset: usize, count: usize) -> *mut u8 {
        assert!(offset.checked_add(count).is_some_and(|end| end <= self.len()), "beyond the end of an array");
        // SAFETY: the offset is within the buffer, which is one object.
        unsafe { self.view.buf.cast::<u8>().add(offset) }
    }

    /// The bytes of an element of a column.
    pub fn get<const N: usize>(&self, py: Python<'_>, index: usize) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(py, index * N, &mut bytes);
        bytes
    }

    /// Read bytes from an offset.
    pub fn read(&self, _py: Python<'_>, offset: usize, into: &mut [u8]) {
        // SAFETY: `at` has checked the length. The bytes are Rust's own memory, which the array does not overlap.
        unsafe { self.at(offset, into.len()).copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
    }

    /// Set an element of a column.
    pub fn set<const N: usize>(&self, py: Python<'_>, index: usize, bytes: [u8; N]) {
        self.write(py, index * N, &bytes);
    }

    /// Write bytes at an offset.
    pub fn write(&self, _py: Python<'_>, offset: usize, bytes: &[u8]) {
        // SAFETY: `at` has checked the length. The bytes are Rust's own memory, which the array does not overlap.
        unsafe { self.at(offset, bytes.len()).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Copy `count` bytes from another array.
    pub fn copy(&self, _py: Python<'_>, offset: usize, from: &Memory, start: usize, count: usize) {
        // SAFETY: `at` has checked both ranges, which may overlap: `copy_from` allows that.
        unsafe { self.at(offset, count).copy_from(from.at(start, count), count) };
    }

    /// A copy of the first bytes.
    pub fn first(&self, py: Python<'_>, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.read(py, 0, &mut bytes);
        bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was filled by `PyObject_GetBuffer`, and is released once, with Python's lock.
        Python::with_gil(|_| unsafe { ffi::PyBuffer_Release(&raw mut *self.view) });
    }
}
