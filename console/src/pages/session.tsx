/** One session: its facts, its state, and what can be done to it. */
import {useEffect, useState} from "preact/hooks";
import {ApiError, call, modelPath, sessionPath} from "../api.ts";
import {SessionActions} from "../parts/session_actions.tsx";
import {SessionState} from "../state/index.tsx";
import {sessionHash} from "../route.ts";
import {showError} from "../store.ts";
import {numbersOf} from "../tensors.ts";
import type {Model, Session, SessionEvent, Tensor} from "../types.ts";
import {ago, count, figure} from "../units.ts";
import {reconnect, watchSessions} from "../watch.ts";
import {Fact} from "./overview.tsx";

const SHOWN_NUMBERS = 12;

export function SessionPage({id, other}: {id: string; other: string}) {
  const [session, setSession] = useState<Session | null>(null);
  const [model, setModel] = useState<Model | null>(null);
  const [ended, setEnded] = useState("");
  const [again, setAgain] = useState(0);
  const [last, setLast] = useState<SessionEvent | null>(null);
  const [lastStep, setLastStep] = useState<SessionEvent | null>(null);
  const version = last?.model_version ?? session?.model_version;
  const name = session?.model;

  useEffect(() => {
    const abort = new AbortController();
    call<{session: Session}>("GET", sessionPath(id), undefined, abort.signal).then(
      (found) => setSession(found.session),
      (error) => (error instanceof ApiError && error.httpStatus === 404 ? setEnded(error.message) : showError(error)),
    );
    const stop = watchSessions({ids: [id], inputs: true, outputs: true}, (event) => {
      if (event.kind === "SESSION_EVENT_KIND_ENDED") {
        setEnded(event.error?.message ?? "the session has ended");
        return;
      }
      setEnded("");
      setLast(event);
      if (event.kind === "SESSION_EVENT_KIND_STEP") setLastStep(event);
    });
    return () => {
      abort.abort();
      stop();
    };
  }, [id, again]);

  useEffect(() => {
    if (!name) return undefined;
    const abort = new AbortController();
    const path = modelPath(version ? `${name}@${version}` : name);
    call<{model: Model}>("GET", path, undefined, abort.signal).then((found) => setModel(found.model), showError);
    return () => abort.abort();
  }, [name, version]);

  return (
    <>
      <h1>
        Session <span class="id">{id}</span>
      </h1>
      {ended && (
        <p class="bad" role="alert">
          This session has ended: {ended}{" "}
          <button type="button" onClick={() => (setAgain(again + 1), reconnect())}>
            Look again
          </button>
        </p>
      )}
      {other && (
        <p>
          Side by side with <a class="id" href={sessionHash(other)}>{other}</a>.{" "}
          <a href={sessionHash(id)}>Show this session alone</a>
        </p>
      )}
      {session && <Facts session={session} last={last} />}
      {session && <LastStep event={lastStep} />}
      {model && <SessionState key={id} id={id} other={other} model={model} />}
      {session && model && !ended && <SessionActions session={session} model={model} />}
    </>
  );
}

function Facts({session, last}: {session: Session; last: SessionEvent | null}) {
  const version = last?.model_version ?? session.model_version;
  return (
    <dl class="facts" aria-label="Facts">
      <Fact name="Model">
        {session.model}@{version ?? "?"}
        {session.model_version_pinned ? ", pinned" : ""}
      </Fact>
      <Fact name="Revision">{count(last?.revision ?? session.revision)}</Fact>
      <Fact name="Position">{count(last ? last.position : session.position)}</Fact>
      <Fact name="Rows">{session.batch_size ?? 1}</Fact>
      <Fact name="Opened">{ago(session.created_time)}</Fact>
      <Fact name="Last change seen">{last?.time ? new Date(last.time).toLocaleTimeString() : ago(session.last_used_time)}</Fact>
      <Fact name="Expires when idle for">{session.max_idle ?? "never"}</Fact>
      {session.tenant && <Fact name="Tenant">{session.tenant}</Fact>}
    </dl>
  );
}

/** The inputs and outputs of the last step, as it was watched. */
function LastStep({event}: {event: SessionEvent | null}) {
  if (!event) return <p class="muted">The last inputs and outputs appear with the next step.</p>;
  const missed = Number(event.skipped_revisions ?? 0) + Number(event.dropped_revisions ?? 0);
  return (
    <dl class="facts" aria-label="Last step">
      {event.inputs?.map((tensor) => (
        <Fact key={`i${tensor.name}`} name={`Last input ${tensor.name ?? ""}`}>
          <Numbers tensor={tensor} />
        </Fact>
      ))}
      {event.outputs?.map((tensor) => (
        <Fact key={`o${tensor.name}`} name={`Last output ${tensor.name ?? ""}`}>
          <Numbers tensor={tensor} />
        </Fact>
      ))}
      {(event.time_steps ?? 1) > 1 && <Fact name="Time steps of the last step">{event.time_steps}</Fact>}
      {missed > 0 && <Fact name="Changes not shown">{count(missed)}</Fact>}
    </dl>
  );
}

function Numbers({tensor}: {tensor: Tensor}) {
  const numbers = numbersOf(tensor);
  const shown = Array.from(numbers.subarray(0, SHOWN_NUMBERS), figure).join(", ");
  return (
    <>
      {shown}
      {numbers.length > SHOWN_NUMBERS && ` … (${count(numbers.length)} numbers)`}
    </>
  );
}
