/** The states of the sessions that were used last, growing side by side. */
import {useSignalEffect} from "@preact/signals";
import {useEffect, useMemo, useState} from "preact/hooks";
import {call} from "../api.ts";
import {sessionHash} from "../route.ts";
import {Choices, Live, Readout, Strip, STRIP_KEYS} from "../state/index.tsx";
import {showError} from "../store.ts";
import type {Session} from "../types.ts";
import {count} from "../units.ts";

/** Sessions among which the last used ones are chosen: one page of the list. */
const SEEN = 1000;

export function LivePage() {
  const [number, setNumber] = useState(3);
  const [again, setAgain] = useState(0);
  const [found, setFound] = useState<Session[] | null>(null);
  useEffect(() => {
    const abort = new AbortController();
    const path = `v1/sessions?page_size=${SEEN}&skip_total=true`;
    call<{sessions?: Session[]}>("GET", path, undefined, abort.signal).then((answer) => {
      setFound([...(answer.sessions ?? [])].sort((a, b) => used(b) - used(a)));
    }, showError);
    return () => abort.abort();
  }, [again]);
  const shown = (found?.slice(0, number) ?? []).sort((a, b) => (a.session_id < b.session_id ? -1 : 1));
  const key = shown.map((session) => session.session_id).join("\n");
  return (
    <>
      <h1>Live</h1>
      <div class="row">
        <label>
          Sessions
          <select value={number} onChange={(event) => setNumber(Number(event.currentTarget.value))}>
            {[1, 3, 6, 12].map((one) => (
              <option key={one} value={one}>
                {one}
              </option>
            ))}
          </select>
        </label>
        <button type="button" onClick={() => setAgain(again + 1)}>
          Choose the last used again
        </button>
      </div>
      {found && !found.length && <p class="muted">There are no sessions yet. Step one, then choose again.</p>}
      {found && found.length > 0 && (
        <p class="muted">
          Hidden states by revision, the newest at the right: those used last of {count(found.length)} sessions
          {found.length === SEEN ? ", the first of the list" : ""}.
        </p>
      )}
      {shown.length > 0 && <Strips key={key} sessions={shown} />}
    </>
  );
}

function used(session: Session): number {
  return session.last_used_time ? Date.parse(session.last_used_time) : 0;
}

function Strips({sessions}: {sessions: Session[]}) {
  const live = useMemo(() => new Live(sessions.map((session) => session.session_id)), []);
  useEffect(() => live.start(), [live]);
  return (
    <>
      <p id="strip-keys" class="hidden">
        {STRIP_KEYS}
      </p>
      <div class="lives">
        {sessions.map((session) => (
          <One key={session.session_id} session={session} live={live} />
        ))}
      </div>
    </>
  );
}

function One({session, live}: {session: Session; live: Live}) {
  const id = session.session_id;
  const reel = live.reel(id);
  const choices = useMemo(() => new Choices(), []);
  useSignalEffect(() => {
    void live.tick.value;
    choices.keepOrdered(reel);
  });
  void live.second.value;
  const ended = reel.ended?.message;
  return (
    <section class="state" aria-label={`State of session ${id}`}>
      <h2>
        <a class="id" href={sessionHash(id)}>
          {id}
        </a>
      </h2>
      <p class="muted">
        {session.model}
        {reel.length > 0 && `, revision ${count(reel.revision(reel.end - 1))}`}
        {ended && <span class="bad"> {ended}</span>}
      </p>
      <Strip id={id} live={live} choices={choices} />
      <Readout id={id} live={live} choices={choices} />
    </section>
  );
}
