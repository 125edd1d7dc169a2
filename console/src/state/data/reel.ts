/**
 * The watched changes of one session: a ring of columns, one for each change, oldest first.
 *
 * A column has a number that counts up for as long as the reel lives; `first` and `end` bound those that are still
 * here. Memory is bounded: when the ring is full, each new column replaces the oldest.
 */

import {numbersOf} from "../../tensors.ts";
import type {SessionEvent, Tensor as TensorMessage} from "../../types.ts";

/** A tensor in 32-bit floats: integers beyond 2^24 and doubles are rounded, since these values are only drawn. */
export interface Tensor {
  readonly name: string;
  /** Rows first. */
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

/** Return a tensor of the protocol, or throw if its shape and its data disagree. */
export function decoded(tensor: TensorMessage): Tensor {
  const numbers = numbersOf(tensor);
  const values = numbers instanceof Float32Array ? numbers : Float32Array.from(numbers);
  const name = tensor.name ?? "";
  const shape = tensor.shape ? tensor.shape.map(Number) : [1, values.length];
  const count = shape.reduce((product, size) => product * size, 1);
  if (count !== values.length) {
    throw new RangeError(`tensor ${name}: shape [${shape.join(", ")}] needs ${count} values; got ${values.length}`);
  }
  return {name, shape, values};
}

export const PRESENT = 1;
export const STEP = 2;
export const RESET = 3;
const KINDS: Record<string, number> = {
  SESSION_EVENT_KIND_PRESENT: PRESENT,
  SESSION_EVENT_KIND_STEP: STEP,
  SESSION_EVENT_KIND_RESET: RESET,
};

/** One tensor within a column: the values of row r start at offset + r * units. */
export interface Block {
  readonly name: string;
  readonly shape: readonly number[];
  readonly rows: number;
  readonly units: number;
  readonly offset: number;
}

/** The tensors of one kind (states, inputs or outputs) of every column. */
export class Track {
  readonly data: Float32Array;
  /** The greatest size that a value of each block ever had. */
  readonly greatest: Float64Array;
  private constructor(
    readonly blocks: readonly Block[],
    readonly width: number,
    readonly capacity: number,
  ) {
    this.data = new Float32Array(capacity * width).fill(NaN);
    this.greatest = new Float64Array(blocks.length);
  }

  static of(tensors: readonly Tensor[], rows: number, capacity: number): Track {
    const blocks: Block[] = [];
    let offset = 0;
    for (const {name, shape} of tensors) {
      const units = shape.slice(1).reduce((product, size) => product * size, 1);
      blocks.push({name, shape: shape.slice(1), rows, units, offset});
      offset += rows * units;
    }
    return new Track(blocks, offset, capacity);
  }

  fits(tensors: readonly Tensor[]): boolean {
    return (
      tensors.length === this.blocks.length &&
      tensors.every(({name, shape}, i) => {
        const block = this.blocks[i];
        return block?.name === name && block.shape.join() === shape.slice(1).join();
      })
    );
  }

  /** Writes a column. Tensors of some rows only leave the others missing. */
  write(slot: number, tensors: readonly Tensor[], rows: readonly number[]): void {
    const start = slot * this.width;
    this.data.fill(NaN, start, start + this.width);
    tensors.forEach((tensor, i) => {
      const block = this.blocks[i] as Block;
      for (const value of tensor.values) {
        const size = Math.abs(value);
        if (size > (this.greatest[i] as number) && size < Infinity) this.greatest[i] = size;
      }
      const partial = rows.length > 0 && tensor.shape[0] === rows.length;
      const count = partial ? rows.length : Math.min(block.rows, tensor.shape[0] ?? 0);
      for (let r = 0; r < count; r++) {
        const row = partial ? (rows[r] as number) : r;
        if (row >= block.rows) continue;
        const values = tensor.values.subarray(r * block.units, (r + 1) * block.units);
        this.data.set(values, start + block.offset + row * block.units);
      }
    });
  }
}

export interface ReelLimits {
  maxColumns?: number;
  /** Bounds the states. Inputs and outputs have as much together; those that need more are not kept. */
  maxBytes?: number;
}

const MIN_COLUMNS = 8;

export class Reel {
  first = 0;
  end = 0;
  states: Track | null = null;
  inputs: Track | null = null;
  outputs: Track | null = null;
  rows = 1;
  capacity = 0;
  model = "";
  uid = "";
  /** Why the session ended; null while it lives. */
  ended: {message: string; reason: string} | null = null;
  /** Counts the times at which everything before was discarded: another session, or a state of another shape. */
  generation = 0;
  /** Changes that happened while the page watched, and that it did not see. */
  missedTotal = 0;
  /** Whether inputs or outputs are too large to be kept. */
  oversized = false;

  private readonly maxColumns: number;
  private readonly maxBytes: number;
  private revisions = new Float64Array(0);
  private positions = new Float64Array(0);
  private times = new Float64Array(0);
  private missed = new Float64Array(0);
  private kinds = new Uint8Array(0);
  private timeSteps = new Uint32Array(0);
  private versions = new Float64Array(0);

  constructor(limits: ReelLimits = {}) {
    this.maxColumns = limits.maxColumns ?? 2000;
    this.maxBytes = limits.maxBytes ?? 64 * 2 ** 20;
  }

  get length(): number {
    return this.end - this.first;
  }

  /** Adds what an event reports. Returns whether there is a new column. */
  append(event: SessionEvent): boolean {
    if (event.kind === "SESSION_EVENT_KIND_ENDED") {
      this.ended = {message: event.error?.message ?? "the session ended", reason: event.error?.reason ?? ""};
      return false;
    }
    const kind = KINDS[event.kind ?? ""];
    if (!kind) return false;
    const uid = String(event.uid ?? "");
    if (uid && uid !== this.uid) {
      if (this.uid) this.clear();
      this.uid = uid;
      this.ended = null;
    }
    if (event.model) this.model = event.model;
    const revision = Number(event.revision ?? 0);
    // A watch that reconnects reports the present again.
    if (this.length && revision <= this.revision(this.end - 1)) return false;
    const states = (event.states ?? []).map(decoded);
    if (!states.length) return false;
    if (!this.states?.fits(states) || states[0]?.shape[0] !== this.rows) this.begin(states);
    // Each change adds 1 to the revision. The event's own counts begin with its stream, which may have been reopened.
    const missed = this.length ? revision - this.revision(this.end - 1) - 1 : 0;
    const slot = this.end % this.capacity;
    if (this.length === this.capacity) this.first++;
    const rows = event.rows ?? [];
    this.states?.write(slot, states, []);
    this.inputs = this.kept(this.inputs, slot, (event.inputs ?? []).map(decoded), rows);
    this.outputs = this.kept(this.outputs, slot, (event.outputs ?? []).map(decoded), rows);
    this.missedTotal += missed;
    this.revisions[slot] = revision;
    this.positions[slot] = Number(event.position ?? 0);
    this.times[slot] = Date.parse(event.time ?? "");
    this.missed[slot] = missed;
    this.kinds[slot] = kind;
    this.timeSteps[slot] = event.time_steps ?? 0;
    this.versions[slot] = Number(event.model_version ?? 0);
    this.end++;
    return true;
  }

  /** Forgets the columns; their numbers continue. */
  clear(): void {
    this.first = this.end;
    this.states = this.inputs = this.outputs = null;
    this.oversized = false;
    this.missedTotal = 0;
    this.generation++;
  }

  private begin(states: readonly Tensor[]): void {
    if (this.states) this.clear();
    this.rows = states[0]?.shape[0] ?? 1;
    const bytes = 4 * states.reduce((sum, {values}) => sum + values.length, 0);
    this.capacity = Math.max(MIN_COLUMNS, Math.min(this.maxColumns, Math.floor(this.maxBytes / Math.max(1, bytes))));
    this.states = Track.of(states, this.rows, this.capacity);
    this.revisions = new Float64Array(this.capacity);
    this.positions = new Float64Array(this.capacity);
    this.times = new Float64Array(this.capacity);
    this.missed = new Float64Array(this.capacity);
    this.kinds = new Uint8Array(this.capacity);
    this.timeSteps = new Uint32Array(this.capacity);
    this.versions = new Float64Array(this.capacity);
  }

  private kept(track: Track | null, slot: number, tensors: readonly Tensor[], rows: readonly number[]): Track | null {
    let keep = track;
    if (tensors.length && !keep?.fits(tensors)) {
      const width = tensors.reduce((sum, {shape}) => sum + shape.slice(1).reduce((a, b) => a * b, this.rows), 0);
      this.oversized ||= 4 * width * this.capacity > this.maxBytes / 2;
      keep = this.oversized ? null : Track.of(tensors, this.rows, this.capacity);
    }
    keep?.write(slot, tensors, rows);
    return keep;
  }

  revision(column: number): number {
    return this.revisions[column % this.capacity] as number;
  }

  position(column: number): number {
    return this.positions[column % this.capacity] as number;
  }

  /** Time of the change on the server, in milliseconds since 1970; NaN: not known. */
  time(column: number): number {
    return this.times[column % this.capacity] as number;
  }

  kind(column: number): number {
    return this.kinds[column % this.capacity] as number;
  }

  /** Changes between this column and the one before that the page did not see. */
  missedBefore(column: number): number {
    return this.missed[column % this.capacity] as number;
  }

  stepsOf(column: number): number {
    return this.timeSteps[column % this.capacity] as number;
  }

  version(column: number): number {
    return this.versions[column % this.capacity] as number;
  }

  /** Whether the column does not continue the one before it: changes are missing between them, or it is a reset. */
  breaks(column: number): boolean {
    return column === this.first || this.missedBefore(column) > 0 || this.kind(column) === RESET;
  }

  /** The last column whose revision is at most this one; first - 1: none. */
  at(revision: number): number {
    let low = this.first;
    let high = this.end;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.revision(middle) <= revision) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }
}

/** One row of one tensor over all columns: what the strip draws. */
export class View {
  constructor(
    readonly reel: Reel,
    readonly track: Track,
    readonly block: Block,
    readonly row: number,
  ) {}

  /** The named tensor of the states, or the first one; null while there is none. */
  static of(reel: Reel, name = "", row = 0): View | null {
    const track = reel.states;
    const block = track?.blocks.find((each) => each.name === name) ?? track?.blocks[0];
    return track && block ? new View(reel, track, block, Math.min(Math.max(0, row), block.rows - 1)) : null;
  }

  get units(): number {
    return this.block.units;
  }

  /** The greatest size that a value of the tensor ever had, in any row. */
  get greatest(): number {
    return this.track.greatest[this.track.blocks.indexOf(this.block)] ?? 0;
  }

  /** Where the values of a column begin in `track.data`. */
  start(column: number): number {
    return (column % this.reel.capacity) * this.track.width + this.block.offset + this.row * this.block.units;
  }

  value(column: number, unit: number): number {
    return this.track.data[this.start(column) + unit] as number;
  }

  /** The values of a column: a view on memory that later columns may overwrite. */
  column(column: number): Float32Array {
    const start = this.start(column);
    return this.track.data.subarray(start, start + this.units);
  }
}

/** The values of one row of the inputs or outputs of a column, by tensor; empty where there are none. */
export function valuesAt(reel: Reel, track: Track | null, column: number, row: number): [string, Float32Array][] {
  if (!track) return [];
  const start = (column % reel.capacity) * track.width;
  return track.blocks
    .map(({name, offset, units, rows}): [string, Float32Array] => {
      const at = start + offset + Math.min(row, rows - 1) * units;
      return [name, track.data.subarray(at, at + units)];
    })
    .filter(([, values]) => values.length > 0 && !values.every(Number.isNaN));
}
