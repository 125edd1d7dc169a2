//! A delegate of LiteRT that computes wide dense layers.
//!
//! LiteRT's own kernels compute seven rows at a time and read all weights for them, and each interpreter has its own copy
//! of the weights. This one reads the weights once per block of rows, wastes no row, and interpreters of one program
//! share the packed weights.

#![allow(unsafe_code)]

use super::dense::{Scratch, Weights};
use super::litert::{
    Context, Delegate, DelegateParams, FullyConnected, IntArray, Node, Registration, Status, Tensor,
    ALLOW_DYNAMIC_TENSORS, ERROR, FLOAT32, FULLY_CONNECTED, OK, READ_ONLY,
};
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use std::slice;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

/// Weights of the smallest layer for which it is worth leaving LiteRT's own kernels.
const MIN_WEIGHTS: usize = 1 << 15;

/// The delegate. It has no state: an address for `ModifyGraphWithDelegate`, valid for ever. None: the processor lacks
/// the instructions.
pub fn address() -> Option<usize> {
    /// Nobody writes to it.
    struct Shared(Delegate);
    // SAFETY: the pointers in it are null.
    unsafe impl Sync for Shared {}
    // SAFETY: as above.
    unsafe impl Send for Shared {}
    static DELEGATE: Shared = Shared(Delegate {
        data: null_mut(),
        prepare,
        copy_from: null(),
        copy_to: null(),
        free: null(),
        flags: ALLOW_DYNAMIC_TENSORS,
        builder: null_mut(),
    });
    super::kernel::is_available().then_some(&raw const DELEGATE.0 as usize)
}

/// A layer of the graph that this delegate can compute.
struct Layer {
    input: usize,
    output: usize,
    weights: Arc<Weights>,
    keeps_dims: bool,
}

/// Replace the layers of a graph. LiteRT calls it once per graph.
extern "C" fn prepare(context: *mut Context, delegate: *mut Delegate) -> Status {
    // SAFETY: LiteRT passes a valid context, whose functions return valid nodes.
    unsafe {
        let mut plan = null_mut();
        if ((*context).execution_plan)(context, &mut plan) != OK {
            return ERROR;
        }
        let mut chosen = vec![0];
        let mut results = Vec::new();
        for &index in numbers(plan) {
            if let Some(layer) = layer_of(context, index) {
                // the result of a layer has memory only if another kernel reads it
                if !results.contains(&layer.input) {
                    chosen.push(index);
                    results.push(layer.output);
                }
            }
        }
        if results.is_empty() {
            return OK;
        }
        chosen[0] = results.len() as c_int;
        let registration = Registration {
            init: Some(init),
            free: Some(free),
            prepare: Some(resize),
            invoke: Some(invoke),
            profiling: null(),
            code: 0,
            name: c"StepwellDense".as_ptr(),
            version: 1,
            others: [0; 8],
        };
        ((*context).replace_nodes)(context, registration, chosen.as_ptr().cast(), delegate)
    }
}

/// Make the kernel of some nodes: a boxed list of layers.
extern "C" fn init(context: *mut Context, params: *const c_char, _: usize) -> *mut c_void {
    // SAFETY: LiteRT passes the parameters of a delegate.
    let nodes = unsafe { numbers((*params.cast::<DelegateParams>()).nodes) };
    // SAFETY: as in `prepare`.
    let layers: Vec<_> = nodes.iter().filter_map(|&index| unsafe { layer_of(context, index) }).collect();
    Box::into_raw(Box::new((layers, Scratch::default()))).cast()
}

type Kernel = (Vec<Layer>, Scratch);

extern "C" fn free(_: *mut Context, kernel: *mut c_void) {
    // SAFETY: `init` made it.
    drop(unsafe { Box::from_raw(kernel.cast::<Kernel>()) });
}

/// Set the shapes of the results for those of the inputs.
extern "C" fn resize(context: *mut Context, node: *mut Node) -> Status {
    // SAFETY: `init` made the kernel, and its indexes are those of tensors of this graph.
    unsafe {
        let (layers, _) = &*(*node).user_data.cast::<Kernel>();
        for layer in layers {
            let input = (*context).tensors.add(layer.input);
            let mut dims = numbers((*input).dims).to_vec();
            if dims.last().map(|&last| last as usize) != Some(layer.weights.inputs()) {
                ((*context).report_error)(context, c"an input of a dense layer has another width".as_ptr());
                return ERROR;
            }
            if !layer.keeps_dims {
                dims = vec![dims[..dims.len() - 1].iter().product(), 0];
            }
            if let Some(last) = dims.last_mut() {
                *last = layer.weights.outputs() as c_int;
            }
            let output = (*context).tensors.add(layer.output);
            if ((*context).resize_tensor)(context, output, new_array(&dims)) != OK {
                return ERROR;
            }
        }
    }
    OK
}

extern "C" fn invoke(context: *mut Context, node: *mut Node) -> Status {
    // SAFETY: as in `resize`; one thread at a time uses an interpreter. LiteRT has allocated the tensors by their shapes.
    unsafe {
        let (layers, scratch) = &mut *(*node).user_data.cast::<Kernel>();
        for layer in layers {
            let (input, output) = (tensor(context, layer.input), tensor(context, layer.output));
            let rows = input.bytes / size_of::<f32>() / layer.weights.inputs();
            if rows == 0 {
                continue;
            }
            let size = rows * layer.weights.outputs() * size_of::<f32>();
            if input.data.is_null() || output.data.is_null() || output.bytes < size {
                ((*context).report_error)(context, c"a result of a dense layer has no memory".as_ptr());
                return ERROR;
            }
            let x = slice::from_raw_parts(input.data.cast(), rows * layer.weights.inputs());
            let out = slice::from_raw_parts_mut(output.data.cast(), rows * layer.weights.outputs());
            layer.weights.apply(x, out, scratch);
        }
    }
    OK
}

/// The layer of a node; None: it is none, or LiteRT's own kernels should compute it.
///
/// # Safety
///
/// The context and the index must be valid.
unsafe fn layer_of(context: *mut Context, index: c_int) -> Option<Layer> {
    let (mut node, mut registration) = (null_mut(), null_mut());
    if ((*context).node_and_registration)(context, index, &mut node, &mut registration) != OK
        || (*registration).code != FULLY_CONNECTED
        || (*node).builtin.is_null()
    {
        return None;
    }
    let options = &*(*node).builtin.cast::<FullyConnected>();
    let ([input, weights, others @ ..], [output]) = (numbers((*node).inputs), numbers((*node).outputs))
    else {
        return None;
    };
    if [input, weights, output].iter().any(|&&index| index as usize >= (*context).tensor_count) {
        return None;
    }
    let (x, kernel) = (tensor(context, *input as usize), tensor(context, *weights as usize));
    let &[outputs, inputs] = numbers(kernel.dims) else { return None };
    let (inputs, outputs) = (inputs as usize, outputs as usize);
    let is_ours = options.activation == 0
        && options.format == 0
        && x.kind == FLOAT32
        && numbers(x.dims).last().map(|&last| last as usize) == Some(inputs)
        && inputs * outputs >= MIN_WEIGHTS;
    if !is_ours {
        return None;
    }
    let bias = match others {
        [] | [-1] => None,
        [bias] => Some(constants(tensor(context, *bias as usize))?),
        _ => return None,
    };
    let weights = packed(constants(kernel)?, bias, inputs, outputs)?;
    Some(Layer { input: *input as usize, output: *output as usize, weights, keeps_dims: options.keeps_dims })
}

/// Where constants are: those of a layer, by their addresses and numbers.
type Place = (usize, usize, usize, usize);

/// The packed weights of a layer, shared with other interpreters of the program. These keep the constants where they are,
/// and none of them outlives those.
fn packed(weights: &[f32], bias: Option<&[f32]>, inputs: usize, outputs: usize) -> Option<Arc<Weights>> {
    static SHARED: LazyLock<Mutex<HashMap<Place, Weak<Weights>>>> = LazyLock::new(Mutex::default);
    let place = (weights.as_ptr() as usize, bias.map_or(0, |bias| bias.as_ptr() as usize), inputs, outputs);
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.retain(|_, weights| weights.strong_count() > 0);
    if let Some(found) = shared.get(&place).and_then(Weak::upgrade) {
        return Some(found);
    }
    let made = Arc::new(Weights::new(weights, bias, inputs, outputs)?);
    shared.insert(place, Arc::downgrade(&made));
    Some(made)
}

/// The numbers of a constant tensor; None: it is not constant, or not of plain numbers.
unsafe fn constants(tensor: &Tensor) -> Option<&[f32]> {
    let count = numbers(tensor.dims).iter().map(|&size| size as usize).product::<usize>();
    let is_plain = tensor.kind == FLOAT32
        && tensor.allocation == READ_ONLY
        && tensor.sparsity.is_null()
        && !tensor.data.is_null()
        && tensor.data.cast::<f32>().is_aligned()
        && tensor.bytes == count * size_of::<f32>();
    is_plain.then(|| slice::from_raw_parts(tensor.data.cast(), count))
}

unsafe fn tensor<'a>(context: *mut Context, index: usize) -> &'a Tensor {
    &*(*context).tensors.add(index)
}

unsafe fn numbers<'a>(array: *const IntArray) -> &'a [c_int] {
    match array.as_ref() {
        Some(found) if found.size > 0 => slice::from_raw_parts(found.data.as_ptr(), found.size as usize),
        _ => &[],
    }
}

/// An array that LiteRT frees.
fn new_array(values: &[c_int]) -> *mut IntArray {
    // SAFETY: the memory has room for the length and the numbers, and LiteRT frees with the same allocator.
    unsafe {
        let array = libc::malloc(size_of::<c_int>() * (values.len() + 1)).cast::<c_int>();
        if array.is_null() {
            std::process::abort();
        }
        *array = values.len() as c_int;
        array.add(1).copy_from_nonoverlapping(values.as_ptr(), values.len());
        array.cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interpreters_share_the_weights_of_a_layer_until_the_last_one_ends() {
        let (weights, bias, other) = (vec![1.0; 64], vec![0.5; 4], vec![2.0; 4]);
        let Some(first) = packed(&weights, Some(&bias), 16, 4) else { return };
        let same = packed(&weights, Some(&bias), 16, 4).unwrap();
        assert!(Arc::ptr_eq(&first, &same));
        for (bias, inputs) in [(Some(&other[..]), 16), (None, 16), (None, 8)] {
            assert!(!Arc::ptr_eq(&first, &packed(&weights, bias, inputs, 64 / inputs).unwrap()));
        }
        let ended = Arc::downgrade(&first);
        drop((first, same));
        assert!(ended.upgrade().is_none());
        assert!(packed(&weights, Some(&bias), 16, 4).is_some());
    }
}
