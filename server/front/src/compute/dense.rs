//! The product of a dense layer: rows times constant weights, plus a bias.
//!
//! A panel of weights stays in the processor's cache while all rows of a block pass it. So the weights, which do not fit,
//! are read once per block of rows.

#![allow(unsafe_code)]

use super::kernel::{self, DenormalsAreZero, Operands, COLUMNS, ROWS, ROWS_OF_TWO};

/// A cache line. Panels begin on one.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([f32; LINE]);

const LINE: usize = 16;
const LINE_BYTES: usize = 64;
/// Bytes of the rows of a block. They share the second-level cache, of a mebibyte or more, with a panel.
const BLOCK_BYTES: usize = 512 << 10;
/// Rows of a block, whatever their size.
const MAX_BLOCK_ROWS: usize = 10 * ROWS;

/// Weights and bias, packed for the kernel: panels of columns, the last one filled up with zeros.
pub struct Weights {
    inputs: usize,
    outputs: usize,
    panels: Vec<Line>,
}

impl Weights {
    /// Pack weights, which hold `inputs` numbers for each output. Without a bias it is zero. None: the processor lacks
    /// the instructions, or there is nothing to compute.
    pub fn new(weights: &[f32], bias: Option<&[f32]>, inputs: usize, outputs: usize) -> Option<Self> {
        let is_whole = inputs.checked_mul(outputs) == Some(weights.len()) && !weights.is_empty();
        if !is_whole || bias.is_some_and(|bias| bias.len() != outputs) || !kernel::is_available() {
            return None;
        }
        let lines = COLUMNS / LINE;
        let mut panels = vec![Line([0.0; LINE]); outputs.div_ceil(COLUMNS) * (inputs + 1) * lines];
        for (panel, columns) in
            panels.chunks_exact_mut((inputs + 1) * lines).zip((0..outputs).step_by(COLUMNS))
        {
            for column in 0..COLUMNS.min(outputs - columns) {
                let (line, place) = (column / LINE, column % LINE);
                let source = columns + column;
                panel[line].0[place] = bias.map_or(0.0, |bias| bias[source]);
                let row = &weights[source * inputs..(source + 1) * inputs];
                for (lines, weight) in panel[lines..].chunks_exact_mut(lines).zip(row) {
                    lines[line].0[place] = *weight;
                }
            }
        }
        Some(Weights { inputs, outputs, panels })
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Write the product of each row of `x` to `out`. Denormal numbers are zero.
    ///
    /// # Panics
    ///
    /// If the two do not have the same number of rows.
    pub fn apply(&self, x: &[f32], out: &mut [f32], scratch: &mut Scratch) {
        assert!(
            x.len() % self.inputs == 0 && x.len() / self.inputs * self.outputs == out.len(),
            "whole rows"
        );
        let _mode = DenormalsAreZero::new();
        let rows = x.len() / self.inputs;
        let limit =
            (BLOCK_BYTES / (self.inputs * size_of::<f32>()) / ROWS * ROWS).clamp(ROWS, MAX_BLOCK_ROWS);
        // blocks of about the same size: a small one would read all weights for a few rows
        let block = rows.div_ceil(rows.div_ceil(limit).max(1)).max(1);
        for (x, out) in x.chunks(block * self.inputs).zip(out.chunks_mut(block * self.outputs)) {
            self.apply_block(x, out, scratch);
        }
    }

    fn apply_block(&self, x: &[f32], out: &mut [f32], scratch: &mut Scratch) {
        let rows = x.len() / self.inputs;
        let stride = scratch.fill(x, self.inputs);
        let tiles = rows.div_ceil(ROWS);
        let tile_rows = rows.div_ceil(tiles);
        let mut columns = 0;
        while columns < self.outputs {
            let rest = self.outputs - columns;
            let panels = if tile_rows <= ROWS_OF_TWO && rest >= 2 * COLUMNS { 2 } else { 1 };
            for tile in 0..tiles {
                // tiles of about the same size: a kernel of few rows waits for its weights
                let (first, end) = (rows * tile / tiles, rows * (tile + 1) / tiles);
                let operands = Operands {
                    x: scratch.row(first, stride),
                    x_stride: stride * LINE_BYTES,
                    panel: self.panel(columns),
                    panels,
                    inputs: self.inputs,
                    out: out[first * self.outputs + columns..(end - 1) * self.outputs + columns + 1]
                        .as_mut_ptr(),
                    out_stride: self.outputs * size_of::<f32>(),
                };
                // SAFETY: `new` has checked the processor. The scratch holds `rows` rows of `inputs` numbers, a panel
                // `inputs + 1` times `COLUMNS`. `out` has room for whole panels in each row.
                unsafe {
                    if rest >= COLUMNS {
                        kernel::run(end - first, operands);
                    } else {
                        run_partial(end - first, operands, rest);
                    }
                }
            }
            columns += panels * COLUMNS;
        }
    }

    fn panel(&self, column: usize) -> *const f32 {
        self.panels[column / COLUMNS * (self.inputs + 1) * (COLUMNS / LINE)..].as_ptr().cast()
    }
}

/// Compute the first `columns` of a panel.
///
/// # Safety
///
/// As for `kernel::run`, but a row of results need not be longer than `columns`.
unsafe fn run_partial(rows: usize, operands: Operands, columns: usize) {
    let mut whole = [0.0; ROWS * COLUMNS];
    kernel::run(
        rows,
        Operands { out: whole.as_mut_ptr(), out_stride: COLUMNS * size_of::<f32>(), ..operands },
    );
    for (row, values) in whole.chunks_exact(COLUMNS).take(rows).enumerate() {
        let target = operands.out.byte_add(row * operands.out_stride);
        target.copy_from_nonoverlapping(values.as_ptr(), columns);
    }
}

/// A block of rows, placed so that they do not displace each other in the first-level cache, as rows whose distance is
/// a power of two would.
#[derive(Default)]
pub struct Scratch {
    lines: Vec<Line>,
}

impl Scratch {
    /// Copy rows of `inputs` numbers; returns their distance in lines.
    fn fill(&mut self, x: &[f32], inputs: usize) -> usize {
        let stride = inputs.div_ceil(LINE) | 1;
        self.lines.resize((x.len() / inputs * stride).max(self.lines.len()), Line([0.0; LINE]));
        for (lines, row) in self.lines.chunks_exact_mut(stride).zip(x.chunks_exact(inputs)) {
            // SAFETY: lines are numbers, and `stride` of them are at least as long as a row.
            unsafe { lines.as_mut_ptr().cast::<f32>().copy_from_nonoverlapping(row.as_ptr(), inputs) };
        }
        stride
    }

    fn row(&self, row: usize, stride: usize) -> *const f32 {
        self.lines[row * stride..].as_ptr().cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Numbers that repeat neither by row nor by column.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(next).collect()
    }

    /// What the kernel promises, one value at a time.
    fn expected(x: &[f32], weights: &[f32], bias: Option<&[f32]>, inputs: usize) -> Vec<f32> {
        let mut all = Vec::new();
        for row in x.chunks_exact(inputs) {
            for (column, weights) in weights.chunks_exact(inputs).enumerate() {
                let bias = bias.map_or(0.0, |bias| bias[column]);
                all.push(row.iter().zip(weights).fold(bias, |sum, (x, w)| x.mul_add(*w, sum)));
            }
        }
        all
    }

    proptest! {
        #[test]
        fn any_shape_gives_the_bits_of_the_plain_loop(
            rows in 1..150_usize, inputs in 1..70_usize, outputs in 1..100_usize, has_bias: bool, seed: u32,
        ) {
            let (weights, x) = (numbers(inputs * outputs, seed), numbers(rows * inputs, !seed));
            let bias = has_bias.then(|| numbers(outputs, seed ^ 0x5555));
            let Some(packed) = Weights::new(&weights, bias.as_deref(), inputs, outputs) else {
                prop_assert!(!kernel::is_available());
                return Ok(());
            };
            let mut out = vec![f32::NAN; rows * outputs];
            packed.apply(&x, &mut out, &mut Scratch::default());
            prop_assert_eq!(out, expected(&x, &weights, bias.as_deref(), inputs));
        }
    }

    #[test]
    fn a_scratch_serves_blocks_of_other_shapes() {
        let mut scratch = Scratch::default();
        for (rows, inputs) in [(61, 9000), (3, 5), (130, 1024)] {
            let (weights, x) = (numbers(inputs * 33, 1), numbers(rows * inputs, 2));
            let Some(packed) = Weights::new(&weights, None, inputs, 33) else { return };
            let mut out = vec![f32::NAN; rows * 33];
            packed.apply(&x, &mut out, &mut scratch);
            assert_eq!(out, expected(&x, &weights, None, inputs));
        }
    }

    #[test]
    fn infinity_and_nan_stay_what_they_are() {
        let Some(packed) = Weights::new(&[1.0, 0.0], None, 2, 1) else { return };
        let mut out = [0.0; 2];
        packed.apply(&[f32::INFINITY, 1.0, f32::NAN, 1.0], &mut out, &mut Scratch::default());
        assert!(out[0] == f32::INFINITY && out[1].is_nan());
    }

    #[test]
    fn denormal_numbers_are_zero_only_meanwhile() {
        // the sum of the first row would be denormal, the second one has a denormal input
        let Some(packed) = Weights::new(&[0.5, 1e30], None, 2, 1) else { return };
        let (smallest, denormal) = (std::hint::black_box(f32::MIN_POSITIVE), f32::from_bits(1 << 20));
        let mut out = [f32::NAN; 2];
        packed.apply(&[smallest, 0.0, 0.0, denormal], &mut out, &mut Scratch::default());
        assert_eq!(out, [0.0; 2]);
        assert!(smallest / 2.0 > 0.0, "the mode has ended");
    }

    #[test]
    fn wrong_lengths_are_refused() {
        assert!(Weights::new(&[1.0; 5], None, 2, 3).is_none());
        assert!(Weights::new(&[1.0; 6], Some(&[1.0; 2]), 2, 3).is_none());
        assert!(Weights::new(&[], None, 0, 3).is_none());
    }
}
