/** A page for `python -m bench.console`: it changes one thing in each frame. */
import {render} from "preact";
import {Choices, Live} from "../src/state/live.ts";
import {StateView} from "../src/state/session.tsx";
import {base64Of} from "../src/tensors.ts";
import type {Model, SessionEvent} from "../src/types.ts";
import "../src/style.css";
import "../src/state/state.css";

const ID = "bench";

/** An event as the server sends it: text. */
function text(revision: number, units: number): string {
  const tensor = (name: string, values: Float32Array) => ({
    name,
    dtype: "DATA_TYPE_FLOAT32",
    shape: ["1", String(values.length)],
    data: base64Of(new Uint8Array(values.buffer)),
  });
  const noise = (size: number) => Float32Array.from({length: size}, (_, i) => Math.tanh(Math.sin(revision / (9 + i)) + Math.random() - 0.5));
  const event: SessionEvent = {
    session_id: ID,
    kind: "SESSION_EVENT_KIND_STEP",
    revision: String(revision),
    position: String(revision),
    time: new Date(0).toISOString(),
    inputs: [tensor("x", noise(3))],
    outputs: [tensor("y", noise(2))],
    states: [tensor("lstm/h", noise(units))],
    time_steps: 1,
  };
  return JSON.stringify(event);
}

/** Do something in each of so many frames, and nothing else. */
async function frames(count: number, work: (at: number) => void): Promise<void> {
  for (let at = 0; at < count; at++) {
    await new Promise<void>((resolve) => {
      requestAnimationFrame(() => {
        work(at);
        resolve();
      });
    });
  }
}

const live = new Live([ID]);
const choices = new Choices();
let revision = 0;
let events: string[] = [];

/** Shows a state with so many revisions, the traces of five of its units, and makes events for what follows. */
async function prepare(units: number, revisions: number, count: number): Promise<void> {
  const model = {name: "bench", state: [{name: "lstm/h", dtype: "DATA_TYPE_FLOAT32"}]} as unknown as Model;
  const place = document.getElementById("app") as HTMLElement;
  render(<StateView id={ID} other="" model={model} live={live} choices={choices} />, place);
  for (; revision < revisions; revision++) live.reel(ID).append(JSON.parse(text(revision + 1, units)) as SessionEvent);
  for (let unit = 0; unit < 5; unit++) choices.pin(unit * 7);
  events = Array.from({length: count}, (_, at) => text(revision + 1 + at, units));
  await frames(60, () => live.tick.value++);
}

const cases: Record<string, (count: number) => Promise<void>> = {
  "a new revision": (count) => frames(count, (at) => live.take(JSON.parse(events[at] as string) as SessionEvent)),
  "the cursor": (count) =>
    frames(count, (at) => {
      choices.cursor.value = {revision: revision - (at % 1000), unit: at % choices.order.value.length};
    }),
  "the order of all units": (count) =>
    frames(count, () => {
      choices.order.value = choices.order.value.slice().reverse();
    }),
};

Object.assign(globalThis, {prepare, measure: (name: string, count: number) => cases[name]?.(count), names: Object.keys(cases)});
