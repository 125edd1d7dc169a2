//! The callers that Python makes known to the front.

// pyo3's macros convert errors into themselves.
#![allow(clippy::useless_conversion)]

use crate::limits::callers::{Callers, Credential, Known};
use pyo3::prelude::*;
use std::sync::Arc;

/// The known callers, by their credentials. For any thread.
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

    /// Make a credential known until a time on the monotonic clock: `who` is passed on with its fast-path steps,
    /// `prefix` is put before the ids of its sessions, and `identity` identifies it. Without `may_step`, Python gets all of its
    /// messages.
    ///
    /// `digest`: SHA-256 of its token; or empty, and `names` are those of its certificate.
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

    /// Forget a credential.
    fn forget(&self, digest: &[u8], names: Vec<String>) {
        if let Some(credential) = credential(digest, &names) {
            self.callers.forget(credential);
        }
    }
}

/// None: not a possible credential.
fn credential(digest: &[u8], names: &[String]) -> Option<Credential> {
    if digest.is_empty() {
        Credential::of_certificate(names)
    } else {
        Credential::of_digest(digest)
    }
}
