/** The page's one stream of events: whatever its components want to watch is joined into one request of /v1/watch. */
import {signal} from "@preact/signals";
import {ApiError, hasToken, send} from "./api.ts";
import {EventParser} from "./events.ts";
import {joined, type SessionsWant, type WatchBody} from "./wants.ts";
import type {SessionEvent, ServerEvent} from "./types.ts";

export type {SessionsWant} from "./wants.ts";

/** What the stream is doing: shown in the shell. */
export const watchStatus = signal<"off" | "connecting" | "live" | "lost">("off");
/** Why the stream was lost. */
export const watchProblem = signal("");
/** What the watching costs, over the last seconds. */
export const watchCost = signal({eventsPerSecond: 0, bytesPerSecond: 0, sessions: 0});

interface Subscription {
  want: SessionsWant | null;
  onSession: (event: SessionEvent) => void;
  onServer: (event: ServerEvent) => void;
}

const FIRST_RETRY_MS = 500;
const MAX_RETRY_MS = 10_000;
const COST_INTERVAL_MS = 2000;
const nothing = () => undefined;

const subscriptions = new Set<Subscription>();
let running: AbortController | null = null;
let current = "";
let scheduled = false;
let retryMs = FIRST_RETRY_MS;
let retryTimer: ReturnType<typeof setTimeout> | undefined;
let bytes = 0;
let events = 0;
let countedAt = 0;

/** Watch sessions until the returned function is called. Each (re)connection begins with an event of kind PRESENT for
 * each session; an event of kind ENDED is its last one. States come as `data` (base64). */
export function watchSessions(want: SessionsWant, onEvent: (event: SessionEvent) => void): () => void {
  return subscribe({want, onSession: onEvent, onServer: nothing});
}

/** Watch the server's figures, once a second, until the returned function is called. */
export function watchServer(onEvent: (event: ServerEvent) => void): () => void {
  return subscribe({want: null, onSession: nothing, onServer: onEvent});
}

/** Try again now, instead of after the pause. */
export function reconnect(): void {
  retryMs = FIRST_RETRY_MS;
  current = "";
  schedule();
}

function subscribe(one: Subscription): () => void {
  subscriptions.add(one);
  schedule();
  return () => {
    subscriptions.delete(one);
    schedule();
  };
}

/** Components come and go in one go: look at all of them once. */
function schedule(): void {
  if (scheduled) return;
  scheduled = true;
  setTimeout(() => {
    scheduled = false;
    apply();
  }, 20);
}

function apply(): void {
  const wanted = [...subscriptions];
  const body = joined(
    wanted.flatMap((one) => (one.want ? [one.want] : [])),
    wanted.some((one) => one.want === null),
  );
  const key = JSON.stringify(body);
  if (key === current) return;
  current = key;
  clearTimeout(retryTimer);
  running?.abort();
  running = null;
  watchCost.value = {eventsPerSecond: 0, bytesPerSecond: 0, sessions: body?.sessions?.session_ids.length ?? 0};
  if (body === null) {
    watchStatus.value = "off";
    return;
  }
  running = new AbortController();
  void run(body, running);
}

async function run(body: WatchBody, controller: AbortController): Promise<void> {
  watchStatus.value = "connecting";
  bytes = events = 0;
  countedAt = performance.now();
  let problem = "the stream ended";
  try {
    const response = await send("POST", "v1/watch", body, controller.signal);
    const reader = response.body!.getReader();
    watchStatus.value = "live";
    watchProblem.value = "";
    retryMs = FIRST_RETRY_MS;
    const decoder = new TextDecoder();
    const parser = new EventParser();
    for (;;) {
      const {done, value} = await reader.read();
      if (done || controller.signal.aborted) break;
      bytes += value.length;
      for (const event of parser.push(decoder.decode(value, {stream: true}))) {
        if (event.name === "error") problem = (JSON.parse(event.data) as {message: string}).message;
        else dispatch(event.name, event.data);
      }
      count();
    }
  } catch (error) {
    if (controller.signal.aborted) return;
    problem = error instanceof Error ? error.message : String(error);
    if (error instanceof ApiError && error.reason === "UNAUTHENTICATED" && !hasToken.value) {
      // the caller closed the dialog: ask again only when something else is wanted
      watchStatus.value = "lost";
      watchProblem.value = problem;
      return;
    }
  }
  if (controller.signal.aborted) return;
  watchStatus.value = "lost";
  watchProblem.value = problem;
  retryTimer = setTimeout(() => {
    current = "";
    schedule();
  }, retryMs);
  retryMs = Math.min(retryMs * 2, MAX_RETRY_MS);
}

function dispatch(name: string, data: string): void {
  if (name === "sessions") {
    const found = (JSON.parse(data) as {events?: SessionEvent[]}).events ?? [];
    events += found.length;
    for (const event of found) {
      for (const one of [...subscriptions]) {
        if (one.want?.ids.includes(event.session_id)) one.onSession(event);
      }
    }
  } else if (name === "server") {
    events += 1;
    const found = JSON.parse(data) as ServerEvent;
    for (const one of [...subscriptions]) one.onServer(found);
  }
}

function count(): void {
  const now = performance.now();
  const passed = now - countedAt;
  if (passed < COST_INTERVAL_MS) return;
  watchCost.value = {
    ...watchCost.value,
    eventsPerSecond: (events / passed) * 1000,
    bytesPerSecond: (bytes / passed) * 1000,
  };
  bytes = events = 0;
  countedAt = now;
}
