/** The server's figures of the last minutes, while the page is open. */
import {signal} from "@preact/signals";
import type {ServerEvent} from "./types.ts";

const MAX_POINTS = 600;

export interface Point {
  /** Unix time in seconds. */
  time: number;
  steps: number;
  rowsPerPass: number | null;
  p50: number | null;
  p99: number | null;
  waitP99: number | null;
  commitP99: number | null;
  sessions: number;
  resident: number;
  errors: number;
  /** Errors in the interval, by reason and model. */
  errorsBy: Record<string, number>;
}

/** Return the errors of all points, by reason and model, most frequent first. */
export function errorsOf(points: readonly Point[]): {reason: string; model: string; count: number}[] {
  const sums = new Map<string, number>();
  for (const point of points) {
    for (const [key, errors] of Object.entries(point.errorsBy)) sums.set(key, (sums.get(key) ?? 0) + errors);
  }
  return [...sums]
    .map(([key, errors]) => {
      const [reason = "", model = ""] = key.split("\n");
      return {reason, model, count: Math.round(errors)};
    })
    .sort((a, b) => b.count - a.count);
}

export const history = signal<Point[]>([]);

/** Return a point of the curves; null: the figures have none of them. */
export function pointOf(event: ServerEvent): Point | null {
  const {server, models = []} = event;
  if (!server) return null;
  const stage = (name: string) => server.latencies?.find((one) => one.stage === name);
  let passes = 0;
  let rows = 0;
  for (const model of models) {
    if (model.rows_per_pass === undefined) continue;
    passes += model.passes_per_second ?? 0;
    rows += model.rows_per_pass * (model.passes_per_second ?? 0);
  }
  return {
    time: event.time ? Date.parse(event.time) / 1000 : Date.now() / 1000,
    steps: server.row_steps_per_second ?? 0,
    rowsPerPass: passes ? rows / passes : null,
    p50: stage("total")?.p50_seconds ?? null,
    p99: stage("total")?.p99_seconds ?? null,
    waitP99: stage("wait")?.p99_seconds ?? null,
    commitP99: stage("commit")?.p99_seconds ?? null,
    sessions: Number(server.sessions ?? 0),
    resident: Number(server.resident_sessions ?? 0),
    errors: server.errors_per_second ?? 0,
    errorsBy: Object.fromEntries(
      (event.errors ?? []).map((one) => [
        `${one.reason}\n${one.model ?? ""}`,
        (one.per_second ?? 0) * (event.interval_seconds ?? 0),
      ]),
    ),
  };
}

/** Add the figures of an event that covers an interval. */
export function remember(event: ServerEvent): void {
  const point = event.interval_seconds ? pointOf(event) : null;
  if (point) history.value = [...history.value.slice(1 - MAX_POINTS), point];
}
