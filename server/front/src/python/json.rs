//! JSON for Python. Its lock is free while a document is read or numbers are written.

// pyo3's macros convert errors into themselves.
#![allow(clippy::useless_conversion)]

use crate::json::read::{document, Node, Refused};
use crate::json::write;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString};

/// Number of values that are created without letting other threads have Python's lock.
const PART: usize = 256;
const DOUBLE_BYTES: usize = std::mem::size_of::<f64>();

/// Read a document. A long list of numbers is `bytes` of doubles.
///
/// Raises ValueError with the kind of problem (syntax, fields, twice or number), and a text.
#[pyfunction]
pub fn read_json(py: Python<'_>, raw: &[u8], max_fields: usize) -> PyResult<PyObject> {
    let read = py.allow_threads(|| document(raw, max_fields));
    let node = read.map_err(|why| {
        PyValueError::new_err(match why {
            Refused::Syntax(text) => ("syntax", text),
            Refused::Fields => ("fields", String::new()),
            Refused::Twice(name) => ("twice", name),
            Refused::NoNumber(name) => ("number", name.to_owned()),
        })
    })?;
    Creation { left: PART }.create(py, node)
}

/// Write `bytes` of doubles as the entries of a JSON list, without its brackets.
#[pyfunction]
pub fn numbers_as_json(py: Python<'_>, doubles: &[u8]) -> String {
    py.allow_threads(|| {
        let values: Vec<f64> = doubles
            .chunks_exact(DOUBLE_BYTES)
            .map(|one| f64::from_ne_bytes(one.try_into().unwrap_or_default()))
            .collect();
        write::numbers(&values)
    })
}

/// Creates Python's objects of a document.
struct Creation {
    /// Until others may have the lock.
    left: usize,
}

impl Creation {
    fn create(&mut self, py: Python<'_>, node: Node) -> PyResult<PyObject> {
        self.left -= 1;
        if self.left == 0 {
            self.left = PART;
            py.allow_threads(|| ());
        }
        Ok(match node {
            Node::Null => py.None(),
            Node::Bool(value) => value.into_py(py),
            Node::Signed(value) => value.into_py(py),
            Node::Unsigned(value) => value.into_py(py),
            Node::Float(value) => value.into_py(py),
            Node::Text(text) => PyString::new_bound(py, &text).into_py(py),
            Node::Numbers(values) => PyBytes::new_bound_with(py, values.len() * DOUBLE_BYTES, |out| {
                let places = out.chunks_exact_mut(DOUBLE_BYTES);
                places.zip(values).for_each(|(place, value)| place.copy_from_slice(&value.to_ne_bytes()));
                Ok(())
            })?
            .into_py(py),
            Node::List(nodes) => {
                let list = PyList::empty_bound(py);
                for node in nodes {
                    list.append(self.create(py, node)?)?;
                }
                list.into_py(py)
            }
            Node::Object(fields) => {
                let object = PyDict::new_bound(py);
                for (name, node) in fields {
                    object.set_item(name, self.create(py, node)?)?;
                }
                object.into_py(py)
            }
        })
    }
}
