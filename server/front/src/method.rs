//! The served methods.

/// A served method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    pub index: usize,
    pub streams: bool,
    pub fast_path: FastPath,
    /// Whether anybody may call it, such as a health check.
    pub is_open: bool,
}

/// The fast path of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FastPath {
    No,
    Step,
    StepStream,
    Infer,
    InferStream,
}
