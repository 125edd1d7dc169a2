/** The order of units on the strip. Each function returns unit numbers, the first on top; ties keep their numbers. */

import type {Track, View} from "./reel.ts";

export function byNumber(units: number): Uint32Array {
  return Uint32Array.from({length: units}, (_, unit) => unit);
}

function byScore(scores: Float64Array): Uint32Array {
  // NaN compares as nothing at all, which would leave the sort undefined: units without a score come last.
  const score = (unit: number): number => {
    const value = scores[unit] as number;
    return Number.isNaN(value) ? -Infinity : value;
  };
  return byNumber(scores.length).sort((a, b) => score(b) - score(a) || a - b);
}

/** Mean absolute change of each unit from one column to the next; changes across gaps and resets do not count. */
export function activity(view: View, from = view.reel.first, to = view.reel.end): Float64Array {
  const sums = new Float64Array(view.units);
  let count = 0;
  for (let column = from + 1; column < to; column++) {
    if (view.reel.breaks(column)) continue;
    const before = view.start(column - 1);
    const now = view.start(column);
    const {data} = view.track;
    for (let unit = 0; unit < sums.length; unit++) {
      (sums[unit] as number) += Math.abs((data[now + unit] as number) - (data[before + unit] as number));
    }
    count++;
  }
  return sums.map((sum) => (count ? sum / count : NaN));
}

export function byActivity(view: View, from?: number, to?: number): Uint32Array {
  return byScore(activity(view, from, to));
}

/** Where an input is: its tensor and its place among the tensor's values of one row. */
export interface Feature {
  readonly label: string;
  readonly block: number;
  readonly index: number;
}

/** The inputs of a row that units can be compared with, at most `limit`. */
export function features(track: Track | null, limit = 64): Feature[] {
  const found: Feature[] = [];
  track?.blocks.forEach(({name, units}, block) => {
    for (let index = 0; index < units && found.length < limit; index++) {
      found.push({label: units === 1 ? name || "input" : `${name || "input"}[${index}]`, block, index});
    }
  });
  return found;
}

/** Pearson's correlation of each unit with an input at the same revisions; NaN where either is constant. */
export function correlation(
  view: View,
  feature: Feature,
  from = view.reel.first,
  to = view.reel.end,
): Float64Array {
  const track = view.reel.inputs;
  const block = track?.blocks[feature.block];
  const result = new Float64Array(view.units).fill(NaN);
  if (!track || !block) return result;
  const at = block.offset + Math.min(view.row, block.rows - 1) * block.units + feature.index;
  const columns: number[] = [];
  const inputs: number[] = [];
  for (let column = from; column < to; column++) {
    const input = track.data[(column % view.reel.capacity) * track.width + at] as number;
    if (Number.isNaN(input)) continue;
    columns.push(column);
    inputs.push(input);
  }
  const count = columns.length;
  if (count < 3) return result;
  const meanInput = inputs.reduce((sum, each) => sum + each, 0) / count;
  const deviations = inputs.map((each) => each - meanInput);
  const spreadInput = Math.sqrt(deviations.reduce((sum, each) => sum + each * each, 0));
  const mean = new Float64Array(view.units);
  const squares = new Float64Array(view.units);
  const products = new Float64Array(view.units);
  for (const column of columns) {
    const values = view.column(column);
    for (let unit = 0; unit < mean.length; unit++) (mean[unit] as number) += (values[unit] as number) / count;
  }
  columns.forEach((column, i) => {
    const values = view.column(column);
    for (let unit = 0; unit < mean.length; unit++) {
      const deviation = (values[unit] as number) - (mean[unit] as number);
      (squares[unit] as number) += deviation * deviation;
      (products[unit] as number) += deviation * (deviations[i] as number);
    }
  });
  for (let unit = 0; unit < result.length; unit++) {
    const spread = Math.sqrt(squares[unit] as number) * spreadInput;
    result[unit] = spread > 1e-12 ? (products[unit] as number) / spread : NaN;
  }
  return result;
}

/** Units by the strength of their correlation with an input, whatever its sign. */
export function byCorrelation(view: View, feature: Feature, from?: number, to?: number): Uint32Array {
  return byScore(correlation(view, feature, from, to).map(Math.abs));
}
