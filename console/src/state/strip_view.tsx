/** The strip of one session on the page: pointer, keyboard, and a text for those who do not see it. */

import {useSignal, useSignalEffect} from "@preact/signals";
import {useEffect, useRef} from "preact/hooks";
import {isDark} from "../theme.ts";
import type {Choices, Live} from "./live.ts";
import {digits} from "./palette.ts";
import {PRESENT, type Reel, RESET, valuesAt} from "./data/reel.ts";
import {type Cell, StripPainter} from "./strip.ts";

const DRAG_PIXELS = 5;
const SHOWN_VALUES = 6;

interface StripProps {
  id: string;
  live: Live;
  choices: Choices;
}

export function Strip({id, live, choices}: StripProps) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const painter = useRef<StripPainter | null>(null);
  const size = useSignal({width: 0, height: 0});
  const label = useSignal("");
  const drag = useRef<{x: number; y: number; cell: Cell} | null>(null);
  const reel = live.reel(id);

  useEffect(() => {
    const element = canvas.current;
    if (!element) return undefined;
    painter.current = new StripPainter(element);
    const observer = new ResizeObserver(() => {
      size.value = {width: element.clientWidth, height: element.clientHeight};
    });
    observer.observe(element);
    return () => observer.disconnect();
  }, []);

  // What is drawn: everything again.
  useSignalEffect(() => {
    const [order, dark] = [choices.order.value, isDark.value];
    const view = choices.view(reel);
    if (view && order.length === view.units) painter.current?.show(view, order, dark);
  });

  // A frame: what changed, and the marks.
  useSignalEffect(() => {
    void [live.tick.value, choices.order.value, isDark.value];
    const {width, height} = size.value;
    if (!width || !painter.current) return;
    const {current} = painter;
    const view = choices.view(reel);
    if (!view) return;
    if (!current.shows(view)) {
      if (choices.order.value.length !== view.units) return;
      current.show(view, choices.order.value, isDark.value);
    }
    current.resize(width, height, devicePixelRatio);
    choices.widen(view.greatest);
    const frame = {...choices.window(reel), cursor: cursorCell(), selection: selectionCells()};
    current.draw(frame, choices.limit.value);
  });

  // Once a second, also after the last change of many: a text that changes with each frame cannot be read.
  useSignalEffect(() => {
    void [live.second.value, choices.tensor.value, choices.row.value];
    label.value = facts(id, reel, choices);
  });

  function cursorCell(): Cell | null {
    const cursor = choices.cursor.value;
    if (!cursor || !painter.current || !reel.length) return null;
    const column = reel.at(cursor.revision);
    const place = painter.current.placeOf(cursor.unit);
    return column < reel.first || place < 0 ? null : {column, place};
  }

  function selectionCells() {
    const range = choices.range.value;
    if (!range) return null;
    const from = Math.max(reel.first, reel.at(range.first - 1) + 1);
    const to = reel.at(range.last) + 1;
    return to > from ? {from, to, top: range.top, bottom: range.bottom} : null;
  }

  function cellOf(event: PointerEvent): Cell | null {
    const element = canvas.current;
    if (!element || !painter.current) return null;
    const box = element.getBoundingClientRect();
    const frame = {...choices.window(reel), cursor: null, selection: null};
    return painter.current.cellAt(event.clientX - box.left, event.clientY - box.top, box.width, box.height, frame);
  }

  function point(cell: Cell | null): void {
    choices.cursor.value =
      cell && painter.current
        ? {revision: reel.revision(cell.column), unit: painter.current.unitAt(cell.place)}
        : null;
  }

  function select(a: Cell, b: Cell, isFlat: boolean): void {
    const places = painter.current?.places ?? 0;
    const [first, last] = [Math.min(a.column, b.column), Math.max(a.column, b.column)];
    choices.range.value = {
      first: reel.revision(Math.max(first, reel.first)),
      last: reel.revision(last),
      top: isFlat ? 0 : Math.min(a.place, b.place),
      bottom: isFlat ? places : Math.max(a.place, b.place) + 1,
    };
  }

  function move(columns: number, places: number): void {
    const {current} = painter;
    if (!current || !reel.length) return;
    const cell = cursorCell();
    // The first key only shows where the cursor is.
    if (!cell) return point({column: reel.end - 1, place: 0});
    const column = Math.min(reel.end - 1, Math.max(reel.first, cell.column + columns));
    const place = Math.min(current.places - 1, Math.max(0, cell.place + places));
    point({column, place});
    const {from, to} = choices.window(reel);
    if (column < from || column >= to) {
      const edge = column < from ? Math.min(reel.end - 1, column + (to - from) - 1) : column;
      choices.until.value = edge === reel.end - 1 ? null : reel.revision(edge);
    }
  }

  function onKeyDown(event: KeyboardEvent): void {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const far = event.shiftKey ? 10 : 1;
    const cell = cursorCell();
    const keys: Record<string, () => void> = {
      ArrowLeft: () => move(-far, 0),
      ArrowRight: () => move(far, 0),
      ArrowUp: () => move(0, -far),
      ArrowDown: () => move(0, far),
      Home: () => move(-Infinity, 0),
      End: () => move(Infinity, 0),
      Enter: () => cell && choices.pin(choices.order.value[cell.place] ?? 0),
      "[": () => cell && extend(cell, "first"),
      "]": () => cell && extend(cell, "last"),
      "+": () => choices.scale(reel, 0.5),
      "-": () => choices.scale(reel, 2),
      Escape: () => {
        choices.range.value = null;
        choices.cursor.value = null;
      },
    };
    const action = keys[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  /** Moves one end of the selection to the cursor. */
  function extend(cell: Cell, end: "first" | "last"): void {
    const range = choices.range.value;
    const revision = reel.revision(cell.column);
    const places = painter.current?.places ?? 0;
    const old = range ?? {first: revision, last: revision, top: 0, bottom: places};
    const next = {...old, [end]: revision};
    if (next.first > next.last) next[end === "first" ? "last" : "first"] = revision;
    choices.range.value = next;
  }

  return (
    <div
      class="strip"
      role="application"
      tabIndex={0}
      aria-label={`Strip of session ${id}: units by revisions`}
      aria-describedby="strip-keys"
      onKeyDown={onKeyDown}
    >
      <canvas
        ref={canvas}
        role="img"
        aria-label={label.value || `No states of session ${id} yet`}
        onPointerDown={(event) => {
          const cell = cellOf(event);
          if (!cell || event.button !== 0) return;
          event.currentTarget.setPointerCapture(event.pointerId);
          drag.current = {x: event.clientX, y: event.clientY, cell};
        }}
        onPointerMove={(event) => {
          const cell = cellOf(event);
          const start = drag.current;
          if (cell) point(cell);
          if (!start || !cell) return;
          const [dx, dy] = [Math.abs(event.clientX - start.x), Math.abs(event.clientY - start.y)];
          if (dx > DRAG_PIXELS || dy > 3 * DRAG_PIXELS) select(start.cell, cell, dy <= 3 * DRAG_PIXELS);
        }}
        onPointerUp={(event) => {
          const start = drag.current;
          drag.current = null;
          if (!start) return;
          const isClick = Math.abs(event.clientX - start.x) <= DRAG_PIXELS && Math.abs(event.clientY - start.y) <= DRAG_PIXELS;
          if (isClick) choices.pin(painter.current?.unitAt(start.cell.place) ?? 0);
        }}
        onPointerCancel={() => {
          drag.current = null;
        }}
        onPointerLeave={() => {
          if (!drag.current) choices.cursor.value = null;
        }}
      />
    </div>
  );
}

/** The strip in words. */
function facts(id: string, reel: Reel, choices: Choices): string {
  const view = choices.view(reel);
  if (!view) return "";
  const [first, last] = [reel.revision(reel.first), reel.revision(reel.end - 1)];
  const limit = choices.limit.peek();
  const gaps = reel.missedTotal ? `, ${reel.missedTotal} changes missed` : "";
  return (
    `State ${view.block.name} of session ${id}: ${view.units} units by ${reel.length} changes, ` +
    `revisions ${first} to ${last}${gaps}; colours from ${digits(-limit)} to ${digits(limit)}`
  );
}

/** What is under the cursor, in a line of text. */
export function Readout({id, live, choices}: StripProps) {
  const reel = live.reel(id);
  const cursor = choices.cursor.value;
  // The columns move while the cursor rests.
  void live.tick.value;
  const view = choices.view(reel);
  const column = cursor && view ? reel.at(cursor.revision) : -1;
  if (!cursor || !view || column < reel.first) {
    return <p class="readout muted">Point at the strip, or focus it and use the arrow keys.</p>;
  }
  const kind = reel.kind(column);
  const what = kind === RESET ? "reset" : kind === PRESENT ? "as found" : stepText(reel.stepsOf(column));
  const missed = reel.missedBefore(column);
  return (
    <p class="readout">
      <strong>
        Unit {cursor.unit}: {digits(view.value(column, cursor.unit))}
      </strong>{" "}
      at revision {reel.revision(column)}, position {reel.position(column)}, {what}
      {missed > 0 && column > reel.first && `, ${missed} changes missed before it`}
      <Values name="Input" values={valuesAt(reel, reel.inputs, column, view.row)} />
      <Values name="Output" values={valuesAt(reel, reel.outputs, column, view.row)} />
      {reel.oversized && " · Inputs or outputs are too large to be kept"}
    </p>
  );
}

function stepText(steps: number): string {
  return steps > 1 ? `step of ${steps} time steps: the last one's values` : "step";
}

function Values({name, values}: {name: string; values: [string, Float32Array][]}) {
  return (
    <>
      {values.map(([tensor, array]) => (
        <span key={tensor}>
          {" "}
          · {name} {tensor}: {Array.from(array.subarray(0, SHOWN_VALUES), digits).join(", ")}
          {array.length > SHOWN_VALUES && ` … ${array.length} values`}
        </span>
      ))}
    </>
  );
}

export const STRIP_KEYS =
  "Arrow keys move the cursor, with Shift by ten. Home and End go to the oldest and the newest revision. Enter draws " +
  "the unit's trace. [ and ] select from and to the cursor. + and - zoom. Escape clears.";
