/** The hidden state of a session over its revisions, while it is watched. */

import {useSignalEffect} from "@preact/signals";
import {useEffect, useMemo, useRef} from "preact/hooks";
import type {Model} from "../types.ts";
import {isDark} from "../theme.ts";
import {CompareForm, Distance} from "./compare.tsx";
import {Find} from "./find.tsx";
import {BY_ACTIVITY, BY_NUMBER, Choices, Live} from "./live.ts";
import {features} from "./data/order.ts";
import {digits, LEVELS, pixels} from "./palette.ts";
import type {Reel} from "./data/reel.ts";
import {Readout, Strip, STRIP_KEYS} from "./strip_view.tsx";
import {Units} from "./units.tsx";

export interface SessionStateProps {
  id: string;
  /** A session to compare it with; empty: none. */
  other: string;
  model: Model;
}

export function SessionState({id, other, model}: SessionStateProps) {
  const pair = other && other !== id ? other : "";
  // A fork is compared with what the page has seen of its session before.
  const earlier = useRef<Live | null>(null);
  const live = useMemo(() => (earlier.current = new Live(pair ? [id, pair] : [id], earlier.current)), [id, pair]);
  const choices = useMemo(() => new Choices(), [id]);
  useEffect(() => live.start(), [live]);
  return <StateView key={pair} id={id} other={pair} model={model} live={live} choices={choices} />;
}

/** The drawings of sessions that somebody watches. */
export function StateView(props: SessionStateProps & {live: Live; choices: Choices}) {
  const {id, other: pair, model, live, choices} = props;
  const reel = live.reel(id);
  useSignalEffect(() => {
    void [live.tick.value, choices.tensor.value, choices.row.value, choices.sort.value];
    choices.keepOrdered(reel);
  });
  return (
    <section class="state" aria-label="Hidden state">
      <h2>Hidden state</h2>
      {live.problem.value && <p class="bad">An event could not be read: {live.problem.value}</p>}
      <Controls reel={reel} live={live} choices={choices} model={model} />
      <p id="strip-keys" class="hidden">
        {STRIP_KEYS}
      </p>
      <div class={pair ? "strips pair" : "strips"}>
        {live.ids.map((each) => (
          <div key={each} class="strip-part">
            {pair && (
              <h3>
                <span class="id">{each}</span>
              </h3>
            )}
            <Strip id={each} live={live} choices={choices} />
            <Edges reel={live.reel(each)} live={live} choices={choices} />
            <Readout id={each} live={live} choices={choices} />
          </div>
        ))}
      </div>
      <Legend live={live} reel={reel} choices={choices} />
      <CompareForm key={pair} id={id} other={pair} />
      {pair && <Distance id={id} other={pair} live={live} choices={choices} />}
      <Units id={id} live={live} choices={choices} />
      <Find id={id} live={live} choices={choices} />
    </section>
  );
}

function Controls({reel, live, choices, model}: {reel: Reel; live: Live; choices: Choices; model: Model}) {
  void live.second.value;
  const inputs = features(reel.inputs);
  const tensors = (model.state ?? []).map(({name}) => name);
  const range = choices.range.value;
  return (
    <div class="row">
      {tensors.length > 1 && (
        <label>
          Tensor
          <select value={choices.tensor.value} onChange={(event) => (choices.tensor.value = event.currentTarget.value)}>
            {tensors.map((name, i) => (
              <option key={name} value={i ? name : ""}>
                {name}
              </option>
            ))}
          </select>
        </label>
      )}
      {reel.rows > 1 && (
        <label>
          Row, of {reel.rows}
          <input
            type="number"
            min={0}
            max={reel.rows - 1}
            value={choices.row.value}
            onChange={(event) => {
              const row = Math.trunc(Number(event.currentTarget.value)) || 0;
              choices.row.value = Math.min(reel.rows - 1, Math.max(0, row));
            }}
          />
        </label>
      )}
      <label>
        Units sorted by
        <select value={choices.sort.value} onChange={(event) => (choices.sort.value = event.currentTarget.value)}>
          <option value={BY_NUMBER}>number</option>
          <option value={BY_ACTIVITY}>activity</option>
          {inputs.map(({label}) => (
            <option key={label} value={label}>
              correlation with {label}
            </option>
          ))}
        </select>
      </label>
      {choices.sort.value !== BY_NUMBER && (
        <button type="button" onClick={() => choices.sortAgain(reel)}>
          Sort again
        </button>
      )}
      <button type="button" aria-label="Show fewer revisions" onClick={() => choices.scale(reel, 0.5)}>
        +
      </button>
      <button type="button" aria-label="Show more revisions" onClick={() => choices.scale(reel, 2)}>
        −
      </button>
      <button type="button" disabled={!range} onClick={() => choices.zoom(reel)}>
        Zoom to selection
      </button>
      {choices.isLive.value ? (
        <button
          type="button"
          disabled={!reel.length}
          onClick={() => (choices.until.value = reel.revision(reel.end - 1))}
        >
          Pause
        </button>
      ) : (
        <button type="button" class="primary" onClick={() => choices.follow()}>
          Follow
        </button>
      )}
      <label>
        Shown up to revision
        <input
          type="range"
          min={reel.length ? reel.revision(reel.first) : 0}
          max={reel.length ? reel.revision(reel.end - 1) : 0}
          value={choices.until.value ?? (reel.length ? reel.revision(reel.end - 1) : 0)}
          disabled={reel.length < 2}
          onInput={(event) => {
            const revision = Number(event.currentTarget.value);
            choices.until.value = revision >= reel.revision(reel.end - 1) ? null : revision;
          }}
        />
      </label>
    </div>
  );
}

/** The revisions at both edges of a strip. */
function Edges({reel, live, choices}: {reel: Reel; live: Live; choices: Choices}) {
  void live.tick.value;
  if (reel.ended && !reel.length) return <p class="bad">{reel.ended.message}</p>;
  if (!reel.length) return <p class="muted">Waiting for the session's first event…</p>;
  const {from, to} = choices.window(reel);
  const first = Math.max(from, reel.first);
  return (
    <p class="edges muted">
      <span>{from < reel.first ? `from revision ${reel.revision(first)}` : `revision ${reel.revision(first)}`}</span>
      {reel.ended && <span class="bad">{reel.ended.message}</span>}
      <span>
        {choices.isLive.value ? "now: " : ""}revision {reel.revision(to - 1)}
      </span>
    </p>
  );
}

const LEGEND_WIDTH = 160;

/** The colours, and the marks above the strip. */
function Legend({live, reel, choices}: {live: Live; reel: Reel; choices: Choices}) {
  void live.second.value;
  const view = choices.view(reel);
  if (!view || !reel.length) return null;
  const limit = choices.limit.value;
  return (
    <p class="legend muted">
      {digits(-limit)}{" "}
      <canvas
        width={LEGEND_WIDTH}
        height={10}
        role="img"
        aria-label={`Colours: from ${digits(-limit)}, blue, over 0 to ${digits(limit)}, orange`}
        ref={(canvas) => {
          if (canvas) drawLegend(canvas, isDark.value);
        }}
      />{" "}
      {digits(limit)} · ▼ reset · <span class="bad">❙</span> changes missed ({reel.missedTotal} in all)
      {choices.sort.value !== BY_NUMBER && ` · units sorted at revision ${choices.orderedAt.value}`}
    </p>
  );
}

function drawLegend(canvas: HTMLCanvasElement, dark: boolean): void {
  const context = canvas.getContext("2d");
  if (!context) return;
  const image = context.createImageData(LEGEND_WIDTH, canvas.height);
  const target = new Uint32Array(image.data.buffer);
  const colours = pixels(dark);
  for (let at = 0; at < target.length; at++) {
    target[at] = colours[Math.floor(((at % LEGEND_WIDTH) / LEGEND_WIDTH) * LEVELS)] as number;
  }
  context.putImageData(image, 0, 0);
}
