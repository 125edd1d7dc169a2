/**
 * Draws units by revisions on one canvas, newest at the right.
 *
 * A second canvas, of one pixel a value, is a ring like the reel's: a new column is written there once. Each frame
 * copies the visible part of the ring to the page, in two pieces at most, and draws the marks on top.
 */

import {levelOf, pixels} from "./palette.ts";
import {RESET, type View} from "./data/reel.ts";

/** Rows of pixels; of larger states the first units of the order are drawn. */
export const MAX_UNITS = 2048;
/** Height of the lane of marks above the strip, in CSS pixels. */
export const LANE = 12;

/** A part of the strip: columns by their numbers in the reel, units by their places in the order; ends excluded. */
export interface Selection {
  from: number;
  to: number;
  top: number;
  bottom: number;
}

export interface Cell {
  column: number;
  /** Place in the order. */
  place: number;
}

export interface Frame {
  /** Columns to show; those before the first one or behind the newest are blank. */
  from: number;
  to: number;
  cursor: Cell | null;
  selection: Selection | null;
}

const INK = {
  light: {ink: "#16191d", gap: "#a40e26", select: "rgb(0 0 0 / 18%)", halo: "#ffffff"},
  dark: {ink: "#e6eaef", gap: "#ff8a80", select: "rgb(255 255 255 / 22%)", halo: "#000000"},
};

export class StripPainter {
  private readonly ring = document.createElement("canvas");
  private readonly ringContext = this.ring.getContext("2d") as CanvasRenderingContext2D;
  private readonly context: CanvasRenderingContext2D;
  private view: View | null = null;
  private order = new Uint32Array(0);
  private colours = pixels(false);
  private isDark = false;
  /** Columns before this one are in the ring, in the colours of this limit. */
  private written = 0;
  private limit = 0;

  constructor(private readonly canvas: HTMLCanvasElement) {
    this.context = canvas.getContext("2d", {alpha: true}) as CanvasRenderingContext2D;
  }

  /** Places of the order that are drawn. */
  get places(): number {
    return this.order.length;
  }

  unitAt(place: number): number {
    return this.order[place] ?? 0;
  }

  placeOf(unit: number): number {
    return this.order.indexOf(unit);
  }

  /** Chooses what is drawn, and in which order. Everything is drawn again at the next frame. */
  show(view: View, order: Uint32Array, isDark: boolean): void {
    this.view = view;
    this.order = order.slice(0, MAX_UNITS);
    if (isDark !== this.isDark) this.colours = pixels(isDark);
    this.isDark = isDark;
    this.ring.width = view.reel.capacity;
    this.ring.height = this.order.length;
    this.written = 0;
  }

  /** Whether the ring is that of a view: a reel that began again has another track. */
  shows(view: View): boolean {
    const {view: own} = this;
    return own?.track === view.track && own.block === view.block && own.row === view.row;
  }

  /** Sets the size in CSS pixels. */
  resize(width: number, height: number, ratio: number): void {
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== w) this.canvas.width = w;
    if (this.canvas.height !== h) this.canvas.height = h;
  }

  /** Draws a frame. Values of the size of `limit` and beyond have the strongest colours. */
  draw(frame: Frame, limit: number): void {
    const {view, context, canvas} = this;
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!view || frame.to <= frame.from) return;
    this.writeNew(view, limit || 1);
    const lane = this.lane();
    const height = canvas.height - lane;
    const cell = canvas.width / (frame.to - frame.from);
    // Nearest-neighbour keeps cells sharp, but would drop columns where several share a pixel.
    context.imageSmoothingEnabled = cell < 1 || height < this.order.length;
    const {capacity, first, end} = view.reel;
    let column = Math.max(frame.from, first);
    const last = Math.min(frame.to, end);
    while (column < last) {
      const slot = column % capacity;
      const count = Math.min(last - column, capacity - slot);
      const x = (column - frame.from) * cell;
      context.drawImage(this.ring, slot, 0, count, this.order.length, x, lane, count * cell, height);
      column += count;
    }
    this.drawMarks(view, frame, cell, lane);
    if (frame.selection) this.drawSelection(frame.selection, frame, cell, lane);
    if (frame.cursor) this.drawCursor(frame.cursor, frame, cell, lane);
  }

  /** The cell under a point of the canvas, in CSS pixels; null outside of the columns that are known. */
  cellAt(x: number, y: number, width: number, height: number, frame: Frame): Cell | null {
    if (!this.view || width <= 0 || height <= LANE) return null;
    const column = frame.from + Math.floor((x / width) * (frame.to - frame.from));
    if (column < this.view.reel.first || column >= this.view.reel.end) return null;
    const place = Math.floor(((y - LANE) / (height - LANE)) * this.order.length);
    return {column, place: Math.min(this.order.length - 1, Math.max(0, place))};
  }

  private lane(): number {
    const ratio = this.canvas.clientHeight ? this.canvas.height / this.canvas.clientHeight : 1;
    return Math.round(LANE * ratio);
  }

  /** Writes the columns that came since the last frame into the ring; all of them in other colours. */
  private writeNew(view: View, limit: number): void {
    const {reel} = view;
    const from = limit === this.limit ? Math.max(this.written, reel.first) : reel.first;
    this.limit = limit;
    this.writeColumns(view, from, reel.end);
    this.written = reel.end;
  }

  private writeColumns(view: View, from: number, to: number): void {
    let column = from;
    while (column < to) {
      const slot = column % view.reel.capacity;
      const count = Math.min(to - column, view.reel.capacity - slot);
      const image = this.ringContext.createImageData(count, this.order.length);
      const target = new Uint32Array(image.data.buffer);
      for (let i = 0; i < count; i++) this.writeColumn(view, column + i, target, i, count);
      this.ringContext.putImageData(image, slot, 0);
      column += count;
    }
  }

  private writeColumn(view: View, column: number, target: Uint32Array, x: number, width: number): void {
    const {order, colours, limit} = this;
    const {data} = view.track;
    const start = view.start(column);
    for (let place = 0; place < order.length; place++) {
      const value = data[start + (order[place] as number)] as number;
      target[place * width + x] = colours[levelOf(value, limit)] as number;
    }
  }

  /** Resets are filled triangles, missing changes are dashes. Marks that would overlap share a pixel. */
  private drawMarks(view: View, frame: Frame, cell: number, lane: number): void {
    const {context} = this;
    const {ink, gap} = INK[this.isDark ? "dark" : "light"];
    const {reel} = view;
    let free = -Infinity;
    for (let column = Math.max(frame.from, reel.first); column < Math.min(frame.to, reel.end); column++) {
      const isReset = reel.kind(column) === RESET || (reel.position(column) === 0 && reel.revision(column) > 0);
      const missed = column > reel.first && reel.missedBefore(column) > 0;
      if (!isReset && !missed) continue;
      const x = (column - frame.from) * cell;
      if (x < free) continue;
      free = x + lane / 3;
      context.fillStyle = isReset ? ink : gap;
      if (isReset) {
        context.beginPath();
        context.moveTo(x - lane / 3, lane * 0.15);
        context.lineTo(x + lane / 3, lane * 0.15);
        context.lineTo(x, lane * 0.85);
        context.fill();
      } else context.fillRect(x - 1, lane * 0.15, 2, lane * 0.7);
    }
  }

  private drawSelection(selection: Selection, frame: Frame, cell: number, lane: number): void {
    const {context, canvas} = this;
    const {select, ink} = INK[this.isDark ? "dark" : "light"];
    const height = (canvas.height - lane) / this.order.length;
    const x = (selection.from - frame.from) * cell;
    const width = Math.max(2, (selection.to - selection.from) * cell);
    const y = lane + selection.top * height;
    const tall = (selection.bottom - selection.top) * height;
    context.fillStyle = select;
    context.fillRect(x, y, width, tall);
    context.strokeStyle = ink;
    context.lineWidth = 1;
    context.setLineDash([4, 3]);
    context.strokeRect(x + 0.5, y + 0.5, width - 1, tall - 1);
    context.setLineDash([]);
  }

  private drawCursor(cursor: Cell, frame: Frame, cell: number, lane: number): void {
    const {context, canvas} = this;
    const {ink, halo} = INK[this.isDark ? "dark" : "light"];
    const height = (canvas.height - lane) / this.order.length;
    const x = (cursor.column - frame.from) * cell;
    const y = lane + cursor.place * height;
    const wide = Math.max(cell, 3);
    const tall = Math.max(height, 3);
    context.lineWidth = 1;
    context.strokeStyle = ink;
    context.globalAlpha = 0.45;
    context.strokeRect(x, lane, wide, canvas.height - lane);
    context.strokeRect(0, y, canvas.width, tall);
    context.globalAlpha = 1;
    context.strokeStyle = halo;
    context.lineWidth = 3;
    context.strokeRect(x, y, wide, tall);
    context.strokeStyle = ink;
    context.lineWidth = 1.5;
    context.strokeRect(x, y, wide, tall);
  }
}
