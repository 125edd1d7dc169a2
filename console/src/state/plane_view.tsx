/** Many sessions' states on a plane that moves with them: a sample, watched. */

import {computed, signal, useComputed, useSignal, useSignalEffect} from "@preact/signals";
import {useEffect, useMemo, useRef} from "preact/hooks";
import {sessionHash} from "../route.ts";
import {models, showError} from "../store.ts";
import {isDark} from "../theme.ts";
import type {SessionEvent} from "../types.ts";
import {count} from "../units.ts";
import {watchSessions} from "../watch.ts";
import {colours, digits, SHAPES} from "./palette.ts";
import {fitted, groupOf, type Grouping, groups, loadings, type Plane as PlaneAxes, projected} from "./data/plane.ts";
import {chosen, rowsOf, sourceText} from "./data/sample.ts";
import {type Bounds, boundsOf, hit, type Point, scatter, unscaled} from "./scatter.ts";

const SIZES = [100, 300, 1000];
const INTERVAL_S = 1;
const TRAIL = 200;
const MAX_FITTED = 300;
const SHOWN = 50;
const CLICK_PIXELS = 5;

interface Member {
  id: string;
  model: string;
  version: string;
  state: Float32Array;
  revision: number;
  /** Earlier places on the plane, x and y in turn; the newest last. */
  trail: number[];
}

interface Area {
  x0: number;
  y0: number;
  x1: number;
  y1: number;
}

/** The sample and its plane. */
class Cloud {
  private static count = 0;
  /** A component of another cloud is another component: effects follow the signals of their first one. */
  readonly key = Cloud.count++;
  readonly tick = signal(0);
  readonly source = signal<{among: number; total: number} | null>(null);
  readonly members = new Map<string, Member>();
  readonly plane = signal<PlaneAxes | null>(null);
  /** Sessions whose states have another size than those drawn. */
  readonly others = signal(0);
  readonly isBusy = signal(false);
  private frame = 0;
  private fittedAt = 0;
  private readonly unlike = new Set<string>();

  constructor(
    readonly model: string,
    readonly tensor: string,
    readonly prefix: string,
    readonly size: number,
  ) {}

  start(): () => void {
    const controller = new AbortController();
    let stop = () => {};
    this.isBusy.value = true;
    chosen(this.model, this.prefix, this.size, controller.signal)
      .then(({sessions, among, total}) => {
        if (controller.signal.aborted) return;
        this.source.value = {among, total};
        this.isBusy.value = false;
        const ids = sessions.map(({session_id}) => session_id);
        if (ids.length) stop = watchSessions({ids, states: true, intervalSeconds: INTERVAL_S}, (event) => this.take(event));
      })
      .catch((error: unknown) => {
        if (controller.signal.aborted) return;
        this.isBusy.value = false;
        showError(error);
      });
    return () => {
      controller.abort();
      stop();
      cancelAnimationFrame(this.frame);
    };
  }

  private take(event: SessionEvent): void {
    if (event.kind === "SESSION_EVENT_KIND_ENDED") this.members.delete(event.session_id);
    else {
      const state = rowsOf(event, this.tensor)?.[0];
      if (!state) return;
      const old = this.members.get(event.session_id);
      const size = this.plane.peek()?.mean.length ?? this.members.values().next().value?.state.length ?? state.length;
      if (state.length !== size) {
        this.unlike.add(event.session_id);
        this.others.value = this.unlike.size;
        return;
      }
      const member = old ?? {id: event.session_id, model: "", version: "", state, revision: 0, trail: []};
      if (event.model) member.model = event.model;
      member.version = String(event.model_version ?? member.version);
      member.state = state;
      member.revision = Number(event.revision ?? 0);
      this.members.set(member.id, member);
      this.place(member);
    }
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      // A plane of the first few points would be a poor one for the rest.
      if (!this.plane.peek() || (this.fittedAt < this.size && this.members.size >= 2 * this.fittedAt)) this.fit();
      this.tick.value++;
    });
  }

  private place(member: Member): void {
    const plane = this.plane.peek();
    if (!plane) return;
    member.trail.push(...projected(plane, member.state));
    if (member.trail.length > 2 * TRAIL) member.trail.splice(0, 2);
  }

  /** Fits the plane to the states as they are now. Earlier places are of the old plane: they are forgotten. */
  fit(): void {
    const members = [...this.members.values()];
    // A fit takes 0.2 ms a session of 512 units: a part of them will do, and the page does not stall.
    const every = Math.ceil(members.length / MAX_FITTED);
    this.plane.value = fitted(members.filter((_, at) => at % every === 0).map(({state}) => state));
    this.fittedAt = members.length;
    for (const member of members) {
      member.trail.length = 0;
      this.place(member);
    }
    this.tick.value++;
  }
}

export function Plane() {
  const model = useSignal("");
  const tensor = useSignal("");
  const prefix = useSignal("");
  const size = useSignal(300);
  const by = useSignal<Grouping>("version");
  const drawnAgain = useSignal(0);
  const selected = useSignal("");
  const area = useSignal<Area | null>(null);
  const all = models.value;
  const current = all.find(({name}) => name === model.value);
  const tensors = (current?.state ?? []).map(({name}) => name);
  const name = tensors.includes(tensor.value) ? tensor.value : (tensors[0] ?? "");
  const cloud = useMemo(
    () => new Cloud(current?.name ?? "", name, prefix.value, size.value),
    [current?.name, name, prefix.value, size.value, drawnAgain.value],
  );
  useEffect(() => {
    selected.value = "";
    area.value = null;
    return cloud.start();
  }, [cloud]);
  return (
    <section aria-label="Plane of states">
      <div class="row">
        <label>
          Model
          <select value={current?.name ?? ""} onChange={(event) => (model.value = event.currentTarget.value)}>
            <option value="">all whose states have the same size</option>
            {all.map((each) => (
              <option key={each.name} value={each.name}>
                {each.name}
              </option>
            ))}
          </select>
        </label>
        {tensors.length > 1 && (
          <label>
            Tensor
            <select value={name} onChange={(event) => (tensor.value = event.currentTarget.value)}>
              {tensors.map((each) => (
                <option key={each} value={each}>
                  {each}
                </option>
              ))}
            </select>
          </label>
        )}
        <label>
          Beginning of the IDs
          <input
            value={prefix.value}
            maxLength={256}
            autocomplete="off"
            spellcheck={false}
            onChange={(event) => (prefix.value = event.currentTarget.value)}
          />
        </label>
        <label>
          Sessions to sample
          <select value={size.value} onChange={(event) => (size.value = Number(event.currentTarget.value))}>
            {SIZES.map((each) => (
              <option key={each} value={each}>
                {each}
              </option>
            ))}
          </select>
        </label>
        <label>
          Colours by
          <select value={by.value} onChange={(event) => (by.value = event.currentTarget.value as Grouping)}>
            <option value="version">version of the model</option>
            <option value="model">model</option>
            <option value="prefix">beginning of the ID</option>
          </select>
        </label>
        <button type="button" onClick={() => drawnAgain.value++}>
          New sample
        </button>
        <button type="button" onClick={() => cloud.fit()}>
          Fit the plane again
        </button>
      </div>
      <Facts cloud={cloud} />
      <Canvas key={cloud.key} cloud={cloud} by={by.value} selected={selected} area={area} />
      <Chosen cloud={cloud} selected={selected} area={area} />
    </section>
  );
}

function Facts({cloud}: {cloud: Cloud}) {
  void cloud.tick.value;
  const source = cloud.source.value;
  if (cloud.isBusy.value) return <p class="muted">Reading sessions…</p>;
  if (!source) return null;
  const plane = cloud.plane.value;
  const axes = plane?.axes.map((axis) =>
    loadings(axis, 3)
      .map(({unit, weight}) => `unit ${unit} ${digits(weight)}`)
      .join(", "),
  );
  return (
    <>
      <p class="muted">
        {count(cloud.members.size)} sampled sessions, random from {sourceText(source)}, watched once in {INTERVAL_S} s
        {cloud.others.value > 0 && `; ${count(cloud.others.value)} others have states of another size`}. A session
        of several rows is drawn by its first one.
      </p>
      {plane && axes ? (
        <p class="muted">
          Across: {(100 * plane.shares[0]).toFixed(0)} % of the variance ({axes[0]}, …). Up:{" "}
          {(100 * plane.shares[1]).toFixed(0)} % ({axes[1]}, …).
        </p>
      ) : (
        <p class="muted">A plane needs two sessions with different states of two units or more.</p>
      )}
    </>
  );
}

interface CanvasProps {
  cloud: Cloud;
  by: Grouping;
  selected: {value: string};
  area: {value: Area | null};
}

function Canvas({cloud, by, selected, area}: CanvasProps) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const size = useSignal({width: 0, height: 0});
  const hover = useSignal("");
  const grouping = useSignal(by);
  grouping.value = by;
  const drag = useRef<{x: number; y: number} | null>(null);
  const bounds = useRef<Bounds | null>(null);
  const drawn = useComputed(() => {
    void cloud.tick.value;
    return cloud.members.size;
  });
  const shown = useComputed(() => {
    void cloud.tick.value;
    const members = [...cloud.members.values()];
    return groups(members, grouping.value, SHAPES.length - 1);
  });

  useEffect(() => {
    const element = canvas.current as HTMLCanvasElement;
    const observer = new ResizeObserver(() => {
      size.value = {width: element.clientWidth, height: element.clientHeight};
    });
    observer.observe(element);
    return () => observer.disconnect();
  }, []);

  function points(): Point[] {
    const found: Point[] = [];
    const names = shown.peek();
    for (const member of cloud.members.values()) {
      const {trail} = member;
      if (trail.length < 2) continue;
      const at = names.indexOf(groupOf(member, grouping.peek()));
      const group = at < 0 ? SHAPES.length - 1 : at;
      found.push({id: member.id, x: trail.at(-2) as number, y: trail.at(-1) as number, group});
    }
    return found;
  }

  useSignalEffect(() => {
    void [cloud.tick.value, shown.value, grouping.value];
    const element = canvas.current;
    const {width, height} = size.value;
    if (!element || !width) return;
    const found = points();
    bounds.current = boundsOf(found, bounds.current);
    const chosenMember = cloud.members.get(selected.value);
    scatter(element, {
      points: found,
      bounds: bounds.current,
      colours: colours(isDark.value),
      isDark: isDark.value,
      path: chosenMember?.trail ?? [],
      marked: [selected.value, hover.value],
      area: area.value,
      width,
      height,
      ratio: devicePixelRatio,
    });
  });

  // Another sample has other bounds.
  useEffect(() => {
    bounds.current = null;
  }, [cloud]);

  function placeOf(event: PointerEvent): {x: number; y: number} {
    const box = (event.currentTarget as HTMLCanvasElement).getBoundingClientRect();
    return {x: event.clientX - box.left, y: event.clientY - box.top};
  }

  function step(by: number): void {
    const ids = [...cloud.members.keys()].sort();
    if (!ids.length) return;
    const at = ids.indexOf(selected.value);
    selected.value = ids[(at + by + ids.length) % ids.length] ?? "";
  }

  return (
    <>
      <div
        class="plane"
        role="application"
        tabIndex={0}
        aria-label="Plane: arrow keys choose a session, Escape clears"
        onKeyDown={(event) => {
          if (event.ctrlKey || event.metaKey || event.altKey) return;
          if (event.key === "ArrowRight" || event.key === "ArrowDown") step(1);
          else if (event.key === "ArrowLeft" || event.key === "ArrowUp") step(-1);
          else if (event.key === "Escape") {
            selected.value = "";
            area.value = null;
          } else return;
          event.preventDefault();
        }}
      >
        <canvas
          ref={canvas}
          role="img"
          aria-label={`${drawn.value} sessions on the plane of ${cloud.tensor || "their first state tensor"}${selected.value ? `; chosen: ${selected.value}` : ""}`}
          onPointerDown={(event) => {
            event.currentTarget.setPointerCapture(event.pointerId);
            drag.current = placeOf(event);
          }}
          onPointerMove={(event) => {
            const place = placeOf(event);
            const {width, height} = size.peek();
            if (!bounds.current) return;
            const start = drag.current;
            if (!start) {
              hover.value = hit(points(), bounds.current, width, height, place)?.id ?? "";
              return;
            }
            if (Math.hypot(place.x - start.x, place.y - start.y) <= CLICK_PIXELS) return;
            const a = unscaled(bounds.current, width, height, start);
            const b = unscaled(bounds.current, width, height, place);
            area.value = {
              x0: Math.min(a.x, b.x),
              x1: Math.max(a.x, b.x),
              y0: Math.min(a.y, b.y),
              y1: Math.max(a.y, b.y),
            };
          }}
          onPointerUp={(event) => {
            const place = placeOf(event);
            const start = drag.current;
            drag.current = null;
            const {width, height} = size.peek();
            if (!start || !bounds.current || Math.hypot(place.x - start.x, place.y - start.y) > CLICK_PIXELS) return;
            selected.value = hit(points(), bounds.current, width, height, place)?.id ?? "";
            area.value = null;
          }}
          onPointerCancel={() => {
            drag.current = null;
          }}
          onPointerLeave={() => {
            hover.value = "";
          }}
        />
      </div>
      <GroupLegend names={shown.value} cloud={cloud} by={by} />
      <p class="readout">
        {hover.value ? (
          <span class="id">{hover.value}</span>
        ) : (
          <span class="muted">Click a session for its path. Drag to select a region.</span>
        )}
      </p>
    </>
  );
}

function GroupLegend({names, cloud, by}: {names: string[]; cloud: Cloud; by: Grouping}) {
  void cloud.tick.value;
  const palette = colours(isDark.value);
  const counts = new Map<string, number>();
  for (const member of cloud.members.values()) {
    const group = groupOf(member, by);
    counts.set(group, (counts.get(group) ?? 0) + 1);
  }
  const rest = [...counts].filter(([group]) => !names.includes(group)).reduce((sum, [, each]) => sum + each, 0);
  const rows: [string, number, number][] = names.map((each, i) => [each, i, counts.get(each) ?? 0]);
  if (rest) rows.push(["others", SHAPES.length - 1, rest]);
  return (
    <ul class="groups" aria-label="Colours">
      {rows.map(([group, at, size]) => (
        <li key={group}>
          <Swatch shape={at} colour={palette[at] ?? ""} /> <span class="id">{group}</span> {count(size)}
        </li>
      ))}
    </ul>
  );
}

const OUTLINES = [
  <circle cx="6" cy="6" r="4.5" />,
  <rect x="2" y="2" width="8" height="8" />,
  <path d="M6 1 11 10 1 10Z" />,
  <path d="M6 0.5 11.5 6 6 11.5 0.5 6Z" />,
  <path d="M4.5 1h3v3.5H11v3H7.5V11h-3V7.5H1v-3h3.5Z" />,
  <rect x="1" y="4" width="10" height="4" />,
  <circle cx="6" cy="6" r="2.5" />,
];

function Swatch({shape, colour}: {shape: number; colour: string}) {
  return (
    <svg width="12" height="12" viewBox="0 0 12 12" aria-hidden="true" fill={colour}>
      {OUTLINES[shape]}
    </svg>
  );
}

function Chosen({cloud, selected, area}: Omit<CanvasProps, "by">) {
  const inside = computed(() => {
    void cloud.tick.value;
    const bounds = area.value;
    if (!bounds) return [];
    return [...cloud.members.values()].filter(({trail}) => {
      const [x, y] = [trail.at(-2) ?? NaN, trail.at(-1) ?? NaN];
      return x >= bounds.x0 && x <= bounds.x1 && y >= bounds.y0 && y <= bounds.y1;
    });
  }).value;
  void cloud.tick.value;
  const member = cloud.members.get(selected.value);
  return (
    <>
      {member && (
        <p>
          <a class="id" href={sessionHash(member.id)}>
            {member.id}
          </a>{" "}
          is at revision {count(member.revision)}; the line joins its last {member.trail.length / 2} places.
        </p>
      )}
      {area.value && (
        <>
          <p role="status">{count(inside.length)} sampled sessions are in the selected region now.</p>
          <ul class="ids">
            {inside.slice(0, SHOWN).map(({id}) => (
              <li key={id}>
                <a class="id" href={sessionHash(id)}>
                  {id}
                </a>
              </li>
            ))}
          </ul>
          {inside.length > SHOWN && <p class="muted">The first {SHOWN} are listed.</p>}
        </>
      )}
    </>
  );
}
