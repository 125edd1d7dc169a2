//! The rules for single steps that run without a `Change`. Their twins in Python are `core/exactly_once.py` and
//! `engine/intake/validation.py`; tests hold both to the same cases.

use crate::steps::columns::Batch;

/// Selections of outputs in `stepwell.v1`.
const LAST: u8 = 2;
const NONE: u8 = 3;

/// An input or output of a program.
pub struct Tensor {
    pub name: String,
    /// A `stepwell.v1.DataType`.
    pub dtype: u8,
    /// The shape of a row at one time step.
    pub shape: Vec<usize>,
    pub is_temporal: bool,
    /// Bytes of a row.
    pub row_bytes: usize,
    /// Bytes of a number, and the exponent's bits of a float; 0: any bits are a finite number.
    pub number_bytes: usize,
    pub exponent: u64,
}

/// How the steps of a batch fit a program.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Form {
    /// The column of each input.
    pub columns: Vec<usize>,
    /// Whether the inputs have a time axis.
    pub has_time: bool,
}

/// Returns the form of a batch whose sessions all make one time step of one row; None: it has others, or may be wrong.
pub fn form_of(inputs: &[Tensor], batch: &Batch) -> Option<Form> {
    let signature = &batch.signature;
    let is_single = signature.model.is_none()
        && signature.output_names.is_empty()
        && signature.select <= NONE
        && signature.tensors.len() == inputs.len()
        && batch.sizes.iter().all(|size| *size == 1);
    if !is_single {
        return None;
    }
    let mut form = Form::default();
    let mut time = None;
    for input in inputs {
        let is_named = |name: &str| name == input.name || (name.is_empty() && inputs.len() == 1);
        let column = signature.tensors.iter().position(|tensor| is_named(&tensor.name))?;
        let (tensor, data) = (&signature.tensors[column], &batch.data[column]);
        let has_time = tensor.tail != input.shape;
        let fits = !has_time || (input.is_temporal && is_one_step_of(&tensor.tail, &input.shape));
        if !fits
            || tensor.dtype != input.dtype
            || data.len() != batch.sizes.len() * input.row_bytes
            || (input.is_temporal && *time.get_or_insert(has_time) != has_time)
            || !are_finite(data, input.number_bytes, input.exponent)
        {
            return None;
        }
        form.columns.push(column);
    }
    form.has_time = time.unwrap_or(false);
    Some(form)
}

fn is_one_step_of(tail: &[usize], shape: &[usize]) -> bool {
    tail.first() == Some(&1) && tail[1..] == *shape
}

/// Whether all numbers are finite: a float is not if all bits of its exponent are set.
fn are_finite(data: &[u8], number_bytes: usize, exponent: u64) -> bool {
    fn all<const N: usize>(data: &[u8], is_finite: impl Fn([u8; N]) -> bool) -> bool {
        // without a branch for each number, so that the loop becomes vector instructions
        data.chunks_exact(N)
            .filter_map(|bytes| bytes.try_into().ok())
            .fold(true, |finite, bytes| finite & is_finite(bytes))
    }
    match number_bytes {
        _ if exponent == 0 => true,
        2 => all(data, |bytes| u16::from_le_bytes(bytes) & exponent as u16 != exponent as u16),
        4 => all(data, |bytes| u32::from_le_bytes(bytes) & exponent as u32 != exponent as u32),
        8 => all(data, |bytes| u64::from_le_bytes(bytes) & exponent != exponent),
        _ => false,
    }
}

/// How the outputs of a reply are kept: `ReplyForm` in Python. `has_time`: of the inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyForm {
    Empty = 0,
    Rows = 1,
    RowsWithTime = 2,
}

impl ReplyForm {
    pub fn of(select: u8, has_time: bool) -> Self {
        match select {
            NONE => ReplyForm::Empty,
            LAST => ReplyForm::Rows,
            _ if has_time => ReplyForm::RowsWithTime,
            _ => ReplyForm::Rows,
        }
    }
}

/// Whether a change is applied, ignoring its content: `exactly_once.applies`.
pub fn applies(revision: u64, last_request: u64, expected: Option<u64>, request: u64) -> bool {
    expected.is_none_or(|expected| expected == revision) && (request == 0 || request != last_request)
}

/// Computes the digests of changes: `exactly_once.digests`.
pub struct Digests {
    weights: Vec<u64>,
    prefix: u64,
    /// Seeds of steps, by their selection of outputs: without a time axis, and with one.
    seeds: Vec<(u64, u64)>,
}

const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;
const CONTENT_BITS: u32 = 44;

impl Digests {
    pub fn new(weights: Vec<u64>, prefix: u64, seeds: Vec<(u64, u64)>) -> Self {
        Digests { weights, prefix, seeds }
    }

    /// Returns the digest of a step with these rows of its inputs. None: `select` is unknown.
    pub fn of<'a>(&self, select: u8, has_time: bool, inputs: impl Iterator<Item = &'a [u8]>) -> Option<u64> {
        let (without, with) = self.seeds.get(usize::from(select))?;
        let seed = if has_time { with } else { without };
        let row = inputs.fold(0, |row, input| mixed(row).wrapping_add(self.number(input)));
        Some(mixed(row.wrapping_add(*seed)) >> (64 - CONTENT_BITS) | self.prefix)
    }

    /// A hash of a row: its words, each times the weight of its position, or its CRC-32.
    fn number(&self, row: &[u8]) -> u64 {
        let size = [8, 4, 2, 1].into_iter().find(|size| row.len() % size == 0).unwrap_or(1);
        if row.len() / size > self.weights.len() {
            let mut crc = flate2::Crc::new();
            crc.update(row);
            return u64::from(crc.sum());
        }
        let words = row.chunks_exact(size).map(|bytes| {
            let mut word = [0; 8];
            word[..size].copy_from_slice(bytes);
            let word = u64::from_le_bytes(word);
            if size == 8 {
                word ^ word >> 32
            } else {
                word
            }
        });
        words.zip(&self.weights).fold(0, |sum, (word, weight)| sum.wrapping_add(word.wrapping_mul(*weight)))
    }
}

fn mixed(number: u64) -> u64 {
    (number ^ number >> 32).wrapping_mul(FACTOR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steps::call::Call;
    use crate::steps::columns::{Arrival, Arrivals};
    use crate::steps::parse::{self, Step};
    use std::sync::Arc;

    fn input(name: &str, shape: Vec<usize>, is_temporal: bool) -> Tensor {
        let row_bytes = 4 * shape.iter().product::<usize>();
        let (number_bytes, exponent) = (4, 0x7f80_0000);
        Tensor { name: name.to_owned(), dtype: 1, shape, is_temporal, row_bytes, number_bytes, exponent }
    }

    fn batch(step: &Step<'_>) -> Batch {
        let mut arrivals = Arrivals::default();
        arrivals.push_step(Arc::new(Call::for_test()), None, step, f64::INFINITY, 0);
        match arrivals.take(usize::MAX).0.pop() {
            Some(Arrival::Batch(batch)) => *batch,
            _ => unreachable!("one batch was taken"),
        }
    }

    fn form(
        inputs: &[Tensor],
        tensors: &[(&str, u8, &[usize], &[f32])],
        change: fn(&mut Step<'_>),
    ) -> Option<Form> {
        let data: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(.., numbers)| numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
            .collect();
        let mut step = Step { session_ids: vec!["a"], sizes: vec![1], ..Step::default() };
        for ((name, dtype, shape, _), data) in tensors.iter().zip(&data) {
            step.tensors.push(parse::Tensor { name, dtype: *dtype, shape: shape.to_vec(), data });
        }
        change(&mut step);
        form_of(inputs, &batch(&step))
    }

    #[test]
    fn steps_of_one_row_and_one_time_step_have_a_form() {
        let one = [input("x", vec![2], true)];
        let fits = |tensors: &[(&str, u8, &[usize], &[f32])]| form(&one, tensors, |_| ());
        let plain = Some(Form { columns: vec![0], has_time: false });
        assert_eq!(fits(&[("", 1, &[1, 2], &[1.0, 2.0])]), plain);
        assert_eq!(fits(&[("x", 1, &[1, 2], &[1.0, f32::MAX])]), plain);
        assert_eq!(
            fits(&[("x", 1, &[1, 1, 2], &[1.0, 2.0])]),
            Some(Form { columns: vec![0], has_time: true })
        );
        assert_eq!(fits(&[("y", 1, &[1, 2], &[1.0, 2.0])]), None, "the name");
        assert_eq!(fits(&[("x", 2, &[1, 2], &[1.0, 2.0])]), None, "the dtype");
        assert_eq!(fits(&[("x", 1, &[1, 1, 1, 2], &[1.0, 2.0])]), None, "the shape");
        assert_eq!(fits(&[("x", 1, &[1, 2, 2], &[1.0; 4])]), None, "two time steps");
        assert_eq!(fits(&[("x", 1, &[1, 2], &[1.0, f32::INFINITY])]), None, "infinity");
        assert_eq!(fits(&[("x", 1, &[1, 2], &[f32::NAN, 1.0])]), None, "NaN");
        let x: (&str, u8, &[usize], &[f32]) = ("x", 1, &[1, 2], &[1.0, 2.0]);
        assert_eq!(form(&one, &[x], |step| step.output_names = vec!["y"]), None, "names of outputs");
        assert_eq!(form(&one, &[x], |step| step.select = 4), None, "an unknown selection");
    }

    #[test]
    fn inputs_are_found_by_name_and_agree_on_the_time_axis() {
        let both = [input("x", vec![1], true), input("c", vec![2], false)];
        let x: (&str, u8, &[usize], &[f32]) = ("x", 1, &[1, 1, 1], &[1.0]);
        let c: (&str, u8, &[usize], &[f32]) = ("c", 1, &[1, 2], &[1.0, 2.0]);
        assert_eq!(form(&both, &[c, x], |_| ()), Some(Form { columns: vec![1, 0], has_time: true }));
        assert_eq!(form(&both, &[x], |_| ()), None, "one is missing");
        assert_eq!(form(&both, &[x, ("c", 1, &[1, 1, 2], &[1.0, 2.0])], |_| ()), None, "it has no time axis");
        let two = [input("x", vec![1], true), input("z", vec![1], true)];
        assert_eq!(form(&two, &[x, ("z", 1, &[1, 1], &[1.0])], |_| ()), None, "only one has a time axis");
    }

    #[test]
    fn floats_of_all_sizes_are_checked() {
        assert!(are_finite(&0x7bff_u16.to_le_bytes(), 2, 0x7c00));
        assert!(!are_finite(&0xfc00_u16.to_le_bytes(), 2, 0x7c00));
        assert!(!are_finite(&0x7fc0_u16.to_le_bytes(), 2, 0x7f80));
        assert!(are_finite(&f64::MAX.to_le_bytes(), 8, 0x7ff0 << 48));
        assert!(!are_finite(&f64::NAN.to_le_bytes(), 8, 0x7ff0 << 48));
        assert!(are_finite(&u64::MAX.to_le_bytes(), 8, 0), "an integer");
    }

    #[test]
    fn a_change_is_applied_once_and_at_its_revision() {
        assert!(applies(3, 7, None, 0));
        assert!(applies(3, 7, Some(3), 8));
        assert!(!applies(3, 7, Some(2), 8));
        assert!(!applies(3, 7, Some(3), 7));
        assert!(!applies(3, 7, None, 7));
        assert!(applies(3, 0, None, 0));
    }
}
