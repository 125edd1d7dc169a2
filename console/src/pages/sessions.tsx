/** The sessions, page by page from the server: a million of them cost no more than one page. */
import {useEffect, useState} from "preact/hooks";
import {call, identity} from "../api.ts";
import {OpenSession} from "../parts/open_session.tsx";
import {sessionHash} from "../route.ts";
import {models, showError} from "../store.ts";
import type {Session} from "../types.ts";
import {ago, count} from "../units.ts";

const PAGE_SIZE = 50;
const TYPING_MS = 200;

interface Filters {
  prefix: string;
  model: string;
  version: string;
  idleSeconds: string;
}

interface Page {
  sessions: Session[];
  next: string;
  /** The search stopped before it found a session or the end of the list. */
  stopped: boolean;
}

/** Empty pages after which a search stops: each of them costs the server a search through many sessions. */
const MAX_EMPTY_PAGES = 20;

const NO_FILTERS: Filters = {prefix: "", model: "", version: "", idleSeconds: ""};

/** The rows of one visit of this page. The browser keeps them in its history, so "Back" from a session returns to them. */
interface Visit {
  filters: Filters;
  // tokens of the pages up to the shown one; the first page has none
  tokens: string[];
  // the load of the console, and the caller: tokens of another one may be worth nothing
  of: string;
}

function visitor(): string {
  return `${performance.timeOrigin}/${identity.value}`;
}

function visit(): Visit {
  const kept = history.state as Visit | null;
  return kept?.of === visitor() ? kept : {filters: NO_FILTERS, tokens: [""], of: visitor()};
}

export function SessionsPage() {
  const [begun] = useState(visit);
  const [filters, setFilters] = useState(begun.filters);
  const [applied, setApplied] = useState(begun.filters);
  const [tokens, setTokens] = useState(begun.tokens);
  const [page, setPage] = useState<Page | null>(null);
  const [busy, setBusy] = useState(true);
  const [total, setTotal] = useState<number | null>(null);
  const [again, setAgain] = useState(0);
  const change = (part: Partial<Filters>) => setFilters({...filters, ...part});

  useEffect(() => {
    if (filters === applied) return;
    const timer = setTimeout(() => {
      setApplied(filters);
      setTokens([""]);
    }, TYPING_MS);
    return () => clearTimeout(timer);
  }, [filters]);

  useEffect(() => {
    const now: Visit = {filters: applied, tokens, of: begun.of};
    history.replaceState(now, "");
  }, [applied, tokens]);

  const token = tokens.at(-1)!;
  useEffect(() => {
    const abort = new AbortController();
    setBusy(true);
    pageOf(applied, token, abort.signal)
      .then(setPage, showError)
      .finally(() => abort.signal.aborted || setBusy(false));
    return () => abort.abort();
  }, [applied, token, again]);

  useEffect(() => {
    const abort = new AbortController();
    setTotal(null);
    // The server would read every session to count those that are idle.
    if (applied.idleSeconds) return;
    const path = `v1/sessions?${query(applied, "", 1, true)}`;
    call<{total?: string}>("GET", path, undefined, abort.signal).then((found) => setTotal(Number(found.total ?? 0)), showError);
    return () => abort.abort();
  }, [applied, again]);

  const versions = models.value.find((model) => model.name === filters.model)?.versions ?? [];
  const begin = (tokens.length - 1) * PAGE_SIZE;
  return (
    <>
      <h1>Sessions</h1>
      <search class="row">
        <label>
          ID begins with
          <input type="search" value={filters.prefix} onInput={(event) => change({prefix: event.currentTarget.value})} />
        </label>
        <label>
          Model
          <select value={filters.model} onChange={(event) => change({model: event.currentTarget.value, version: ""})}>
            <option value="">All models</option>
            {models.value.map((model) => (
              <option key={model.name} value={model.name}>
                {model.name}
              </option>
            ))}
          </select>
        </label>
        <label>
          Version
          <select
            value={filters.version}
            disabled={!filters.model}
            onChange={(event) => change({version: event.currentTarget.value})}
          >
            <option value="">All versions</option>
            {versions.map((one) => (
              <option key={one.version} value={one.version}>
                {one.version}
              </option>
            ))}
          </select>
        </label>
        <label>
          Idle for
          <select value={filters.idleSeconds} onChange={(event) => change({idleSeconds: event.currentTarget.value})}>
            <option value="">Any time</option>
            <option value="60">1 minute or longer</option>
            <option value="3600">1 hour or longer</option>
            <option value="86400">1 day or longer</option>
          </select>
        </label>
        <button type="button" onClick={() => setAgain(again + 1)}>
          Refresh
        </button>
      </search>
      <OpenSession />
      <div class="scroll" tabIndex={0} role="region" aria-label="Sessions, table">
        <table aria-label="Sessions" aria-busy={busy}>
          <thead>
            <tr>
              <th scope="col">Session</th>
              <th scope="col">Model</th>
              <th scope="col" class="number">Rows</th>
              <th scope="col" class="number">Revision</th>
              <th scope="col" class="number">Position</th>
              <th scope="col">Last used</th>
              <th scope="col">State</th>
            </tr>
          </thead>
          <tbody>
            {page?.sessions.map((session) => (
              <tr key={`${session.tenant ?? ""}\n${session.session_id}`}>
                <td>
                  <a class="id" href={sessionHash(session.session_id)}>
                    {session.session_id}
                  </a>
                  {session.tenant && <span class="muted"> of {session.tenant}</span>}
                </td>
                <td>
                  {session.model}@{session.model_version ?? "?"}
                  {session.model_version_pinned && <span class="muted"> pinned</span>}
                </td>
                <td class="number">{session.batch_size ?? 1}</td>
                <td class="number">{count(session.revision)}</td>
                <td class="number">{count(session.position)}</td>
                <td>{ago(session.last_used_time)}</td>
                <td>{session.resident ? "resident" : "paged out"}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {page && !busy && !page.sessions.length && (
        <p class="muted">
          {page.stopped ? "No session matches so far. “Next page” searches on." : "No session matches."}
        </p>
      )}
      <div class="row" role="group" aria-label="Pages of sessions">
        <button type="button" disabled={tokens.length === 1} onClick={() => setTokens(tokens.slice(0, -1))}>
          Previous page
        </button>
        <button type="button" disabled={busy || !page?.next} onClick={() => page && setTokens([...tokens, page.next])}>
          Next page
        </button>
        <span class="muted" role="status">
          {busy
            ? "Searching…"
            : `${page?.sessions.length ? `${count(begin + 1)} to ${count(begin + page.sessions.length)}` : "None"}${applied.idleSeconds ? "" : ` of ${total === null ? "…" : count(total)}`}`}
        </span>
      </div>
    </>
  );
}

/** Ask for pages until there is one with sessions: a page may be empty and not the last. Stop after many empty ones. */
async function pageOf(filters: Filters, token: string, signal: AbortSignal): Promise<Page> {
  let next = token;
  for (let empty = 1; ; empty++) {
    const path = `v1/sessions?${query(filters, next, PAGE_SIZE, false)}`;
    const found = await call<{sessions?: Session[]; next_page_token?: string}>("GET", path, undefined, signal);
    next = found.next_page_token ?? "";
    const stopped = empty >= MAX_EMPTY_PAGES && !!next;
    if (found.sessions?.length || !next || stopped) return {sessions: found.sessions ?? [], next, stopped};
  }
}

function query(filters: Filters, token: string, size: number, counted: boolean): string {
  const parts = new URLSearchParams({page_size: String(size)});
  if (!counted) parts.set("skip_total", "true");
  if (token) parts.set("page_token", token);
  if (filters.prefix) parts.set("session_id_prefix", filters.prefix);
  if (filters.model) parts.set("model", filters.model + (filters.version && `@${filters.version}`));
  if (filters.idleSeconds) parts.set("idle_longer", `${filters.idleSeconds}s`);
  return parts.toString();
}
