//! LiteRT's binary interface of delegates, as far as the dense layers need it: `c/common.h` and `c/builtin_op_data.h`.
//!
//! LiteRT's libraries export no functions for this, only these structures, to which versions have appended members.

use std::ffi::{c_char, c_int, c_void};

pub const OK: Status = 0;
pub const ERROR: Status = 1;
pub const FLOAT32: c_int = 1;
/// How a tensor is allocated: in the model's own memory, constant.
pub const READ_ONLY: c_int = 1;
/// The code of a dense layer.
pub const FULLY_CONNECTED: i32 = 9;
/// The delegate's flag that batches of any size may follow each other.
pub const ALLOW_DYNAMIC_TENSORS: i64 = 1;

pub type Status = c_int;

/// `TfLiteIntArray`: its length, which the numbers follow.
#[repr(C)]
pub struct IntArray {
    pub size: c_int,
    pub data: [c_int; 0],
}

#[repr(C)]
pub struct Tensor {
    pub kind: c_int,
    pub data: *mut c_void,
    pub dims: *mut IntArray,
    quantization_scale: f32,
    quantization_zero: i32,
    pub allocation: c_int,
    pub bytes: usize,
    memory: *const c_void,
    name: *const c_char,
    delegate: *mut c_void,
    buffer_handle: c_int,
    is_stale: bool,
    is_variable: bool,
    quantization_kind: c_int,
    quantization: *mut c_void,
    pub sparsity: *mut c_void,
    dims_signature: *const IntArray,
}

#[repr(C)]
pub struct Node {
    pub inputs: *mut IntArray,
    pub outputs: *mut IntArray,
    intermediates: *mut IntArray,
    temporaries: *mut IntArray,
    pub user_data: *mut c_void,
    /// For a dense layer `FullyConnected`.
    pub builtin: *mut c_void,
}

/// The options of a dense layer.
#[repr(C)]
pub struct FullyConnected {
    pub activation: c_int,
    pub format: c_int,
    pub keeps_dims: bool,
}

/// An operation, or the kernel of a delegate.
#[repr(C)]
pub struct Registration {
    pub init: Option<extern "C" fn(*mut Context, *const c_char, usize) -> *mut c_void>,
    pub free: Option<extern "C" fn(*mut Context, *mut c_void)>,
    pub prepare: Option<extern "C" fn(*mut Context, *mut Node) -> Status>,
    pub invoke: Option<extern "C" fn(*mut Context, *mut Node) -> Status>,
    pub profiling: *const c_void,
    pub code: i32,
    pub name: *const c_char,
    pub version: c_int,
    /// Members that this delegate leaves unset, and some that versions to come may append.
    pub others: [usize; 8],
}

#[repr(C)]
pub struct Context {
    pub tensor_count: usize,
    pub execution_plan: extern "C" fn(*mut Context, *mut *mut IntArray) -> Status,
    pub tensors: *mut Tensor,
    implementation: *mut c_void,
    pub resize_tensor: extern "C" fn(*mut Context, *mut Tensor, *mut IntArray) -> Status,
    pub report_error: unsafe extern "C" fn(*mut Context, *const c_char, ...),
    add_tensors: *const c_void,
    pub node_and_registration:
        extern "C" fn(*mut Context, c_int, *mut *mut Node, *mut *mut Registration) -> Status,
    pub replace_nodes: extern "C" fn(*mut Context, Registration, *const IntArray, *mut Delegate) -> Status,
}

#[repr(C)]
pub struct Delegate {
    pub data: *mut c_void,
    pub prepare: extern "C" fn(*mut Context, *mut Delegate) -> Status,
    pub copy_from: *const c_void,
    pub copy_to: *const c_void,
    pub free: *const c_void,
    pub flags: i64,
    pub builder: *mut c_void,
}

/// What `init` of a delegate's kernel gets.
#[repr(C)]
pub struct DelegateParams {
    delegate: *mut Delegate,
    pub nodes: *mut IntArray,
}
