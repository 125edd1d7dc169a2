/** Figures of units and of pairs of sessions. */

import {RESET, type Reel, type View} from "./reel.ts";

export interface Trace {
  revisions: number[];
  /** null where the line is interrupted: before a column that does not continue the one before. */
  values: (number | null)[];
}

/** A unit over the revisions. */
export function trace(view: View, unit: number, from = view.reel.first, to = view.reel.end): Trace {
  const revisions: number[] = [];
  const values: (number | null)[] = [];
  for (let column = Math.max(from, view.reel.first); column < to; column++) {
    const revision = view.reel.revision(column);
    if (revisions.length && view.reel.breaks(column)) {
      revisions.push(revision - 0.5);
      values.push(null);
    }
    const value = view.value(column, unit);
    revisions.push(revision);
    values.push(Number.isNaN(value) ? null : value);
  }
  return {revisions, values};
}

export interface Distribution {
  low: number;
  high: number;
  counts: number[];
  count: number;
  mean: number;
  deviation: number;
}

/** A histogram of a unit's values, from the least to the greatest; null if there are none. */
export function distribution(
  view: View,
  unit: number,
  bins = 24,
  from = view.reel.first,
  to = view.reel.end,
): Distribution | null {
  const values: number[] = [];
  for (let column = from; column < to; column++) {
    const value = view.value(column, unit);
    if (Number.isFinite(value)) values.push(value);
  }
  if (!values.length) return null;
  let low = Infinity;
  let high = -Infinity;
  let sum = 0;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
    sum += value;
  }
  const mean = sum / values.length;
  const counts = new Array<number>(bins).fill(0);
  let squares = 0;
  for (const value of values) {
    squares += (value - mean) ** 2;
    const bin = high > low ? Math.min(bins - 1, Math.floor(((value - low) / (high - low)) * bins)) : bins >> 1;
    (counts[bin] as number)++;
  }
  return {low, high, counts, count: values.length, mean, deviation: Math.sqrt(squares / values.length)};
}

export const SATURATED = 0.95;

/** Whether a state can saturate: it never had a value beyond 1, and it is no cell state, which has no bound. */
export function isBounded(view: View): boolean {
  return view.greatest <= 1 && !/(^|\/)c(_\d+)?$/.test(view.block.name);
}

/** Share of a unit's values beyond 0.95 in either direction; null for a state without bounds. */
export function saturation(
  view: View,
  unit: number,
  from = view.reel.first,
  to = view.reel.end,
): number | null {
  if (!isBounded(view)) return null;
  let beyond = 0;
  let count = 0;
  for (let column = from; column < to; column++) {
    const value = view.value(column, unit);
    if (Number.isNaN(value)) continue;
    count++;
    if (Math.abs(value) > SATURATED) beyond++;
  }
  return count ? beyond / count : null;
}

export function euclidean(a: Float32Array, b: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += ((a[i] as number) - (b[i] as number)) ** 2;
  return Math.sqrt(sum);
}

/** 1 minus the cosine of the angle: 0 for equal directions, 2 for opposite ones; NaN if a state is zero. */
export function cosine(a: Float32Array, b: Float32Array): number {
  let dot = 0;
  let first = 0;
  let second = 0;
  for (let i = 0; i < a.length; i++) {
    dot += (a[i] as number) * (b[i] as number);
    first += (a[i] as number) ** 2;
    second += (b[i] as number) ** 2;
  }
  const norm = Math.sqrt(first * second);
  return norm > 0 ? Math.max(0, 1 - dot / norm) : NaN;
}

export type Alignment = "revision" | "position";

export interface Distances {
  at: number[];
  euclidean: number[];
  cosine: number[];
}

/** The columns since the last reset: only there, positions rise. */
function since(reel: Reel, by: Alignment): number {
  if (by === "revision") return reel.first;
  for (let column = reel.end - 1; column > reel.first; column--) {
    if (reel.kind(column) === RESET || reel.position(column) <= reel.position(column - 1)) return column;
  }
  return reel.first;
}

/**
 * The distance of two states wherever both are known: at the same revision (a session and its fork), or at the same
 * position (two sessions since their last reset).
 */
export function distances(here: View, there: View, by: Alignment): Distances {
  const result: Distances = {at: [], euclidean: [], cosine: []};
  if (here.units !== there.units) return result;
  const keyOf = (view: View, column: number): number =>
    by === "revision" ? view.reel.revision(column) : view.reel.position(column);
  let i = since(here.reel, by);
  let j = since(there.reel, by);
  while (i < here.reel.end && j < there.reel.end) {
    const a = keyOf(here, i);
    const b = keyOf(there, j);
    if (a === b) {
      const distance = euclidean(here.column(i), there.column(j));
      if (!Number.isNaN(distance)) {
        result.at.push(a);
        result.euclidean.push(distance);
        result.cosine.push(cosine(here.column(i), there.column(j)));
      }
    }
    if (a <= b) i++;
    if (b <= a) j++;
  }
  return result;
}
