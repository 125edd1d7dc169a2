//! Methods that are served.

/// A method that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    pub index: usize,
    pub streams: bool,
    pub plain: Plain,
    /// Anybody may call it: it says how the server is.
    pub is_open: bool,
}

/// Which of a method's messages may be plain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plain {
    No,
    Step,
    StepStream,
    Infer,
    InferStream,
}
