/** The sessions, page by page. */
import {useEffect, useState} from "preact/hooks";
import {call} from "../api.ts";
import {sessionHash} from "../route.ts";
import {showError} from "../store.ts";
import type {Session} from "../types.ts";

export function SessionsPage() {
  const [sessions, setSessions] = useState<Session[]>([]);
  useEffect(() => {
    call<{sessions?: Session[]}>("GET", "v1/sessions?page_size=50").then(
      (found) => setSessions(found.sessions ?? []),
      showError,
    );
  }, []);
  return (
    <>
      <h1>Sessions</h1>
      <ul>
        {sessions.map((session) => (
          <li key={session.session_id}>
            <a class="id" href={sessionHash(session.session_id)}>{session.session_id}</a>
          </li>
        ))}
      </ul>
    </>
  );
}
