/** Joins what several components want to watch into one request. No DOM. */

/** What a component wants to know of sessions. */
export interface SessionsWant {
  ids: readonly string[];
  inputs?: boolean;
  outputs?: boolean;
  states?: boolean;
  /** Shortest time between two events of a session, in seconds, at least 0.01. Absent: every change. */
  intervalSeconds?: number;
}

export interface WatchBody {
  sessions?: {
    session_ids: string[];
    inputs: boolean;
    outputs: boolean;
    states: boolean;
    interval?: string;
  };
  server?: Record<string, never>;
}

/** Return one request that covers all wants; null: nothing is wanted. */
export function joined(wants: readonly SessionsWant[], server: boolean): WatchBody | null {
  const ids = [...new Set(wants.flatMap((want) => want.ids))].sort();
  const body: WatchBody = {};
  if (ids.length) {
    body.sessions = {
      session_ids: ids,
      inputs: wants.some((want) => want.inputs),
      outputs: wants.some((want) => want.outputs),
      states: wants.some((want) => want.states),
    };
    const relevant = wants.filter((want) => want.ids.length);
    const intervals = relevant.map((want) => want.intervalSeconds ?? 0);
    const shortest = Math.min(...intervals);
    if (shortest > 0) body.sessions.interval = `${shortest}s`;
  }
  if (server) body.server = {};
  return ids.length || server ? body : null;
}
