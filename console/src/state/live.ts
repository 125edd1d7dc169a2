/** Reels of watched sessions, and what the page chose to see of them. */

import {batch, computed, signal, type Signal} from "@preact/signals";
import {watchSessions} from "../watch.ts";
import type {SessionEvent} from "../types.ts";
import {byActivity, byCorrelation, byNumber, features} from "./data/order.ts";
import {roundLimit} from "./palette.ts";
import {Reel, View} from "./data/reel.ts";

const SECOND_MS = 1000;

/** Sessions that are watched while the page shows them. */
export class Live {
  /** Counts the animation frames in which something changed. */
  readonly tick = signal(0);
  /** Counts the seconds in which something changed: for what costs more than a frame has. */
  readonly second = signal(0);
  /** Why an event could not be read; empty: all could. */
  readonly problem = signal("");
  private readonly reels = new Map<string, Reel>();
  private frame = 0;
  private timer: ReturnType<typeof setTimeout> | undefined;

  /** `earlier`: sessions that were watched before; what is known of them stays. */
  constructor(readonly ids: readonly string[], earlier: Live | null = null) {
    for (const id of ids) this.reels.set(id, earlier?.reels.get(id) ?? new Reel());
  }

  reel(id: string): Reel {
    return this.reels.get(id) as Reel;
  }

  /** Watches until the returned function is called. */
  start(): () => void {
    const stop = watchSessions({ids: this.ids, inputs: true, outputs: true, states: true}, (event) => this.take(event));
    return () => {
      stop();
      cancelAnimationFrame(this.frame);
      clearTimeout(this.timer);
    };
  }

  take(event: SessionEvent): void {
    try {
      this.reels.get(event.session_id)?.append(event);
    } catch (error) {
      this.problem.value = error instanceof Error ? error.message : String(error);
    }
    // However many events come, the page is drawn once a frame.
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.tick.value++;
    });
    this.timer ??= setTimeout(() => {
      this.timer = undefined;
      this.second.value++;
    }, this.second.peek() ? SECOND_MS : 0);
  }
}

/** A part of the strip, by revisions (both included) and by places in the order (bottom excluded). */
export interface Range {
  first: number;
  last: number;
  top: number;
  bottom: number;
}

export const BY_NUMBER = "number";
export const BY_ACTIVITY = "activity";

const SPANS = [60, 120, 250, 500, 1000, 2000];
export const AUTO_SPAN = 0;

/** What is chosen for the strips of a page; two strips side by side share it. */
export class Choices {
  readonly tensor = signal("");
  readonly row = signal(0);
  /** BY_NUMBER, BY_ACTIVITY, or the label of an input. */
  readonly sort = signal(BY_NUMBER);
  readonly order: Signal<Uint32Array> = signal(new Uint32Array(0));
  /** Revision up to which the order was computed. */
  readonly orderedAt = signal(0);
  /** Columns in view; AUTO_SPAN: all. */
  readonly span = signal(AUTO_SPAN);
  /** Revision at the right edge; null: the newest. */
  readonly until = signal<number | null>(null);
  readonly cursor = signal<{revision: number; unit: number} | null>(null);
  readonly range = signal<Range | null>(null);
  /** Units whose traces are drawn. */
  readonly pinned = signal<readonly number[]>([]);
  /** The value of the strongest colour, the same on all strips. */
  readonly limit = signal(0);
  readonly isLive = computed(() => this.until.value === null);
  private orderedColumns = 0;
  private orderedGeneration = -1;
  private orderedFor = "";
  private orderedTensor = "";

  view(reel: Reel): View | null {
    return View.of(reel, this.tensor.value, this.row.value);
  }

  /** Sorts again where the choice or the state changed, and each time the number of columns has doubled. */
  keepOrdered(reel: Reel): void {
    const view = this.view(reel);
    if (!view) return;
    const key = `${view.block.name} ${view.row} ${this.sort.value}`;
    const isOld = key !== this.orderedFor || reel.generation !== this.orderedGeneration;
    const isSorted = this.sort.value !== BY_NUMBER;
    // Units that somebody looks at, or has selected, stay where they are.
    const isIdle = this.isLive.value && !this.range.peek() && !this.cursor.peek();
    const mayMove = isSorted && isIdle && reel.length < reel.capacity;
    if (isOld || (mayMove && reel.length >= 2 * Math.max(4, this.orderedColumns))) this.sortAgain(reel);
  }

  sortAgain(reel: Reel): void {
    const view = this.view(reel);
    if (!view) return;
    const isAnother = reel.generation !== this.orderedGeneration;
    this.orderedFor = `${view.block.name} ${view.row} ${this.sort.value}`;
    this.orderedGeneration = reel.generation;
    this.orderedColumns = reel.length;
    if (view.block.name !== this.orderedTensor || isAnother) this.limit.value = 0;
    this.orderedTensor = view.block.name;
    const feature = features(reel.inputs).find(({label}) => label === this.sort.value);
    batch(() => {
      this.orderedAt.value = reel.revision(reel.end - 1);
      // Places mean other units now.
      this.range.value = null;
      if (feature) this.order.value = byCorrelation(view, feature);
      else this.order.value = this.sort.value === BY_ACTIVITY ? byActivity(view) : byNumber(view.units);
      const [first = 0] = this.order.value;
      const pinned = this.pinned.value.filter((unit) => unit < view.units);
      this.pinned.value = pinned.length ? pinned : [first];
    });
  }

  /** Makes room for a stronger value. All colours change then, so that it should be rare. */
  widen(greatest: number): void {
    if (greatest > this.limit.peek()) this.limit.value = roundLimit(greatest);
  }

  /** The columns in view, ends excluded. */
  window(reel: Reel): {from: number; to: number} {
    const until = this.until.value;
    const to = until === null ? reel.end : Math.max(reel.first + 1, reel.at(until) + 1);
    const span = this.span.value || (SPANS.find((each) => each >= reel.length) ?? reel.capacity);
    return {from: to - Math.max(1, Math.min(span, reel.capacity || span)), to};
  }

  /** Shows the selected revisions only. */
  zoom(reel: Reel): void {
    const range = this.range.value;
    if (!range) return;
    batch(() => {
      this.span.value = Math.max(2, reel.at(range.last) - reel.at(range.first) + 1);
      this.until.value = range.last;
    });
  }

  /** Shows half or twice as many revisions, about the cursor. */
  scale(reel: Reel, factor: number): void {
    const {from, to} = this.window(reel);
    const span = Math.round(Math.min(Math.max(8, (to - from) * factor), Math.max(8, reel.capacity)));
    const cursor = this.cursor.value;
    batch(() => {
      this.span.value = span;
      if (!cursor || this.isLive.value) return;
      const column = Math.min(reel.end - 1, reel.at(cursor.revision) + (span >> 1));
      this.until.value = reel.revision(Math.max(reel.first, column));
    });
  }

  follow(): void {
    batch(() => {
      this.until.value = null;
      this.span.value = AUTO_SPAN;
    });
  }

  pin(unit: number): void {
    const others = this.pinned.value.filter((each) => each !== unit);
    const isPinned = others.length < this.pinned.value.length;
    if (isPinned && !others.length) return;
    this.pinned.value = isPinned ? others : [...others, unit].slice(-MAX_PINNED);
  }
}

export const MAX_PINNED = 5;
