/** Samples of live sessions. Their states come by watches, which do not count as use and page nothing in. */

import {call, send} from "../../api.ts";
import {EventParser} from "../../events.ts";
import type {Session, SessionEvent} from "../../types.ts";
import {decoded, type Tensor} from "./reel.ts";
import type {Sampled} from "./match.ts";
import {count} from "../../units.ts";

/** Sessions from which a sample is drawn: the first ones by ID. */
const PAGE_SIZE = 2000;

export interface Choice {
  sessions: Session[];
  /** Sessions that the sample was drawn from. */
  among: number;
  /** Sessions that match; 0: not known. */
  total: number;
}

/** Return random sessions of a model (empty: of any), at most `size` of the first ones by ID, 2,000 if there are. */
export async function chosen(model: string, prefix: string, size: number, signal?: AbortSignal): Promise<Choice> {
  const query = new URLSearchParams({page_size: String(PAGE_SIZE)});
  if (model) query.set("model", model);
  if (prefix) query.set("session_id_prefix", prefix);
  // The server counts the sessions of a prefix one by one: that would take seconds.
  if (prefix) query.set("skip_total", "true");
  const sessions: Session[] = [];
  let total = 0;
  let next = "";
  do {
    type Page = {sessions?: Session[]; total?: string; next_page_token?: string};
    const page = await call<Page>("GET", `v1/sessions?${query.toString()}`, undefined, signal);
    sessions.push(...(page.sessions ?? []));
    total ||= Number(page.total ?? 0);
    next = page.next_page_token ?? "";
    query.set("page_token", next);
    query.set("skip_total", "true");
    // A page may be empty and not the last, where few of many sessions match.
  } while (next && sessions.length < size);
  return {sessions: drawn(sessions, size), among: sessions.length, total: next ? total : sessions.length};
}

/** Where a sample comes from. */
export function sourceText({among, total}: {among: number; total: number}): string {
  if (!total && among) return `the first ${count(among)} by ID of the sessions that match`;
  return total > among
    ? `the first ${count(among)} by ID of ${count(total)} sessions`
    : `all ${count(among)} sessions that match`;
}

/** Return `size` random members, in their order. */
export function drawn<T>(members: readonly T[], size: number, random: () => number = Math.random): T[] {
  const found: T[] = [];
  members.forEach((member, i) => {
    if (random() * (members.length - i) < size - found.length) found.push(member);
  });
  return found;
}

/** Return the states of sessions as they are now, by a watch that ends once it has reported each of them. */
export async function present(ids: readonly string[], signal?: AbortSignal): Promise<Map<string, SessionEvent>> {
  const found = new Map<string, SessionEvent>();
  if (!ids.length) return found;
  const controller = new AbortController();
  const abort = () => controller.abort(signal?.reason);
  signal?.addEventListener("abort", abort);
  try {
    const body = {sessions: {session_ids: ids, states: true, interval: "3600s"}};
    const response = await send("POST", "v1/watch", body, controller.signal);
    const reader = (response.body as ReadableStream<Uint8Array>).getReader();
    const decoder = new TextDecoder();
    const parser = new EventParser();
    const heard = new Set<string>();
    while (heard.size < ids.length) {
      const {done, value} = await reader.read();
      if (done) break;
      for (const event of parser.push(decoder.decode(value, {stream: true}))) {
        if (event.name !== "sessions") continue;
        for (const each of (JSON.parse(event.data) as {events?: SessionEvent[]}).events ?? []) {
          heard.add(each.session_id);
          if (each.states) found.set(each.session_id, each);
        }
      }
    }
    return found;
  } finally {
    signal?.removeEventListener("abort", abort);
    controller.abort();
  }
}

/** Return one tensor of an event's state, by rows (empty: the first one); null: the state has no such tensor. */
export function rowsOf(event: SessionEvent, tensor: string): Float32Array[] | null {
  const message = event.states?.find((each) => !tensor || each.name === tensor);
  if (!message) return null;
  const {shape, values}: Tensor = decoded(message);
  const rows = shape[0] ?? 0;
  const units = rows ? values.length / rows : 0;
  return Array.from({length: rows}, (_, row) => values.subarray(row * units, (row + 1) * units));
}

/** Return what a match needs of the sampled sessions; those without the tensor are left out. */
export function sampled(events: ReadonlyMap<string, SessionEvent>, tensor: string): Sampled[] {
  const found: Sampled[] = [];
  for (const [id, event] of events) {
    const rows = rowsOf(event, tensor);
    if (rows) found.push({id, revision: Number(event.revision ?? 0), position: Number(event.position ?? 0), rows});
  }
  return found;
}
