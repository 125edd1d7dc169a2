/**
 * The plane of many states: their first two principal components.
 *
 * druidjs has this too. It is under the LGPL, which a minified bundle in a wheel cannot honour, and it compiles
 * WebAssembly, which the page's content security policy forbids.
 */

export interface Plane {
  readonly mean: Float64Array;
  /** Two unit vectors: the weight of each unit of the state in each component. */
  readonly axes: readonly [Float64Array, Float64Array];
  /** The share of the variance that each component has. */
  readonly shares: readonly [number, number];
}

const ITERATIONS = 100;
const TOLERANCE = 1e-8;

function dot(a: Float64Array, b: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += (a[i] as number) * (b[i] as number);
  return sum;
}

function normalised(vector: Float64Array): number {
  const norm = Math.sqrt(dot(vector, vector));
  if (norm > 0) for (let i = 0; i < vector.length; i++) (vector[i] as number) /= norm;
  return norm;
}

/** Fits the plane to points of the same length; null for fewer than two points or dimensions, or for equal points. */
export function fitted(points: readonly Float32Array[]): Plane | null {
  const known = points.filter((point) => point.every(Number.isFinite));
  const size = known[0]?.length ?? 0;
  if (known.length < 2 || size < 2 || known.some((point) => point.length !== size)) return null;
  const mean = new Float64Array(size);
  for (const point of known) for (let i = 0; i < size; i++) (mean[i] as number) += (point[i] as number) / known.length;
  const centred = known.map((point) => Float64Array.from(point, (value, i) => value - (mean[i] as number)));
  const variance = centred.reduce((sum, each) => sum + dot(each, each), 0);
  if (!(variance > 1e-12)) return null;
  const found: {axis: Float64Array; share: number}[] = [];
  for (let component = 0; component < 2; component++) {
    // Power iteration without the covariance matrix: two products with the points for each iteration. It begins with
    // the point that lies furthest out of the axes found so far, so that equal points give equal planes.
    const without = (vector: Float64Array): Float64Array => {
      for (const {axis} of found) {
        const along = dot(vector, axis);
        for (let i = 0; i < size; i++) (vector[i] as number) -= along * (axis[i] as number);
      }
      return vector;
    };
    let axis: Float64Array = new Float64Array(size);
    for (const each of centred) {
      const rest = without(each.slice());
      if (dot(rest, rest) > dot(axis, axis)) axis = rest;
    }
    if (dot(axis, axis) <= variance * 1e-12) {
      // The points lie on a line: any direction across it will do.
      axis = without(Float64Array.from({length: size}, (_, i) => ((i * 2654435761) % 97) + 1));
    }
    normalised(axis);
    let value = 0;
    for (let iteration = 0; iteration < ITERATIONS; iteration++) {
      const next: Float64Array = new Float64Array(size);
      for (const each of centred) {
        const along = dot(each, axis);
        for (let i = 0; i < size; i++) (next[i] as number) += along * (each[i] as number);
      }
      without(next);
      value = normalised(next);
      if (!(value > 0)) break;
      const change = 1 - Math.abs(dot(next, axis));
      axis = next;
      if (change < TOLERANCE) break;
    }
    // The sign of a component is arbitrary: its greatest weight becomes positive, as in stepwell.plot.pca.
    let greatest = 0;
    for (let i = 0; i < size; i++) if (Math.abs(axis[i] as number) > Math.abs(axis[greatest] as number)) greatest = i;
    if ((axis[greatest] as number) < 0) axis = axis.map((each) => -each);
    found.push({axis, share: value / variance});
  }
  const [first, second] = found as [(typeof found)[0], (typeof found)[0]];
  return {mean, axes: [first.axis, second.axis], shares: [first.share, second.share]};
}

/** Where a state is on the plane; a plane stays as it was fitted, so that new points do not move the old ones. */
export function projected(plane: Plane, point: Float32Array): [number, number] {
  let x = 0;
  let y = 0;
  for (let i = 0; i < plane.mean.length; i++) {
    const value = (point[i] as number) - (plane.mean[i] as number);
    x += value * (plane.axes[0][i] as number);
    y += value * (plane.axes[1][i] as number);
  }
  return [x, y];
}

/** The units with the greatest weights in a component. */
export function loadings(axis: Float64Array, count: number): {unit: number; weight: number}[] {
  return Array.from(axis, (weight, unit) => ({unit, weight}))
    .sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight) || a.unit - b.unit)
    .slice(0, count);
}

export type Grouping = "model" | "version" | "prefix";

export interface Member {
  id: string;
  model: string;
  version: string;
}

/** The beginning of an id: up to its first separator, else its first four characters. */
export function beginning(id: string): string {
  const [, start] = /^([^\-_:./@#]{1,24})[\-_:./@#]/u.exec(id) ?? [];
  return start ?? [...id].slice(0, 4).join("");
}

export function groupOf(member: Member, by: Grouping): string {
  if (by === "model") return member.model;
  if (by === "version") return `${member.model}@${member.version}`;
  return beginning(member.id);
}

/** Groups by size, at most `limit`; the rest share the last one. */
export function groups(members: readonly Member[], by: Grouping, limit: number): string[] {
  const counts = new Map<string, number>();
  for (const member of members) {
    const group = groupOf(member, by);
    counts.set(group, (counts.get(group) ?? 0) + 1);
  }
  return [...counts]
    .sort(([a, m], [b, n]) => n - m || (a < b ? -1 : 1))
    .slice(0, limit)
    .map(([group]) => group);
}
