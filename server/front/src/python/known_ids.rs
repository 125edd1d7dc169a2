//! The session ids of batches as Python has them.

use crate::steps::ids::Ids;
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};
use std::collections::VecDeque;
use std::ops::RangeInclusive;

/// Numbers of sessions whose tuple is kept: creating a small one costs little, and a large one is one of few.
const KEPT_SIZES: RangeInclusive<usize> = 64..=2048;
/// Limit of the kept tuples.
const MAX_KEPT: usize = 64;

/// Tuples of the latest large batches. A group is stepped again and again, and gets the same tuple each time. So its
/// strings are not created again, and Python recognizes the group by its tuple.
#[derive(Debug, Default)]
pub struct KnownIds {
    /// The latest first.
    kept: VecDeque<(Ids, Py<PyTuple>)>,
}

impl KnownIds {
    /// The ids as a tuple.
    pub fn tuple_of<'py>(&mut self, py: Python<'py>, ids: &Ids) -> Bound<'py, PyTuple> {
        if !KEPT_SIZES.contains(&ids.len()) {
            return new_tuple(py, ids);
        }
        let found = self.kept.iter().position(|(known, _)| known == ids);
        let (ids, tuple) = match found.and_then(|at| self.kept.remove(at)) {
            Some(known) => known,
            None => (ids.clone(), new_tuple(py, ids).unbind()),
        };
        let given = tuple.clone_ref(py).into_bound(py);
        self.kept.truncate(MAX_KEPT - 1);
        self.kept.push_front((ids, tuple));
        given
    }
}

fn new_tuple<'py>(py: Python<'py>, ids: &Ids) -> Bound<'py, PyTuple> {
    PyTuple::new_bound(py, ids.iter().map(|id| PyString::new_bound(py, id)))
}
