/** Which sampled sessions are in a state like that of a selected part of the strip. */

import {euclidean} from "./stats.ts";
import type {View} from "./reel.ts";

export interface Pattern {
  readonly tensor: string;
  readonly units: readonly number[];
  readonly mean: Float32Array;
  /** States no further from the mean than this are like those selected. */
  readonly radius: number;
  /** Number of states that were selected. */
  readonly count: number;
}

const MIN_RADIUS_SHARE = 0.1;

/** The mean of some units over columns, and how far from it the selected states lie: at least a tenth of its length. */
export function patternOf(view: View, units: readonly number[], from: number, to: number): Pattern | null {
  const states: Float32Array[] = [];
  for (let column = Math.max(from, view.reel.first); column < Math.min(to, view.reel.end); column++) {
    const values = view.column(column);
    const state = Float32Array.from(units, (unit) => values[unit] ?? NaN);
    if (state.every(Number.isFinite)) states.push(state);
  }
  if (!states.length || !units.length) return null;
  const mean = new Float32Array(units.length);
  for (let i = 0; i < mean.length; i++) {
    mean[i] = states.reduce((sum, state) => sum + (state[i] as number), 0) / states.length;
  }
  const furthest = Math.max(...states.map((state) => euclidean(state, mean)));
  const length = euclidean(mean, new Float32Array(mean.length));
  return {
    tensor: view.block.name,
    units: [...units],
    mean,
    radius: Math.max(furthest, MIN_RADIUS_SHARE * length),
    count: states.length,
  };
}

export interface Sampled {
  id: string;
  revision: number;
  position: number;
  /** The tensor of the pattern, one array of values for each row. */
  rows: readonly Float32Array[];
}

export interface Match {
  id: string;
  row: number;
  revision: number;
  position: number;
  distance: number;
  isLike: boolean;
}

/** Sampled sessions by their distance from a pattern, each with its nearest row; those of other shapes are left out. */
export function matches(pattern: Pattern, sample: readonly Sampled[]): Match[] {
  const found: Match[] = [];
  const greatest = Math.max(...pattern.units);
  for (const {id, revision, position, rows} of sample) {
    let nearest: Match | null = null;
    rows.forEach((values, row) => {
      if (values.length <= greatest) return;
      const distance = euclidean(
        Float32Array.from(pattern.units, (unit) => values[unit] as number),
        pattern.mean,
      );
      if (Number.isNaN(distance) || (nearest && nearest.distance <= distance)) return;
      nearest = {id, row, revision, position, distance, isLike: distance <= pattern.radius};
    });
    if (nearest) found.push(nearest);
  }
  return found.sort((a, b) => a.distance - b.distance || (a.id < b.id ? -1 : 1));
}
