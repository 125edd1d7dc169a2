//! What Python tells the wire of callers.

// pyo3's macros convert errors into themselves.
#![allow(clippy::useless_conversion)]

use crate::limits::callers::{Callers, Credential, Known};
use pyo3::prelude::*;
use std::sync::Arc;

/// Callers that are known by what their calls show. For any thread; one is given to a front.
#[pyclass(frozen)]
pub struct KnownCallers {
    pub callers: Arc<Callers>,
}

#[pymethods]
impl KnownCallers {
    #[new]
    fn new() -> Self {
        KnownCallers { callers: Arc::default() }
    }

    /// Take who shows this for a caller, until then on the monotonic clock: `who` is handed over with its plain steps,
    /// `prefix` put before the ids of its sessions, and `identity` tells it from all others. Without `may_step` no message of
    /// it is plain.
    ///
    /// `digest`: SHA-256 of its token, or empty: then `names` are those of its certificate.
    #[allow(clippy::too_many_arguments)]
    fn know(
        &self,
        digest: &[u8],
        names: Vec<String>,
        prefix: String,
        identity: String,
        may_step: bool,
        who: PyObject,
        until: f64,
    ) {
        if let Some(credential) = credential(digest, &names) {
            self.callers.know(credential, Known::new(prefix, identity, may_step, Some(Box::new(who)), until));
        }
    }

    /// Nobody is known by this any more.
    fn forget(&self, digest: &[u8], names: Vec<String>) {
        if let Some(credential) = credential(digest, &names) {
            self.callers.forget(credential);
        }
    }
}

/// None: there is no such credential, which nobody can show.
fn credential(digest: &[u8], names: &[String]) -> Option<Credential> {
    if digest.is_empty() {
        Credential::of_certificate(names)
    } else {
        Credential::of_digest(digest)
    }
}
