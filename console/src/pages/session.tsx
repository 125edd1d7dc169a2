/** One session: its facts, its state, and what can be done to it. */
import {useEffect, useState} from "preact/hooks";
import {call, modelPath, sessionPath} from "../api.ts";
import {SessionState} from "../state/index.tsx";
import {showError} from "../store.ts";
import type {Model, Session} from "../types.ts";

export function SessionPage({id, other}: {id: string; other: string}) {
  const [session, setSession] = useState<Session | null>(null);
  const [model, setModel] = useState<Model | null>(null);
  useEffect(() => {
    const load = async () => {
      const found = await call<{session: Session}>("GET", sessionPath(id));
      setSession(found.session);
      const {model: name, model_version: version} = found.session;
      setModel((await call<{model: Model}>("GET", modelPath(version ? `${name}@${version}` : name))).model);
    };
    load().catch(showError);
  }, [id]);
  return (
    <>
      <h1>
        Session <span class="id">{id}</span>
      </h1>
      {session && (
        <dl class="facts">
          <div>
            <dt>Model</dt>
            <dd>{session.model}</dd>
          </div>
          <div>
            <dt>Revision</dt>
            <dd>{session.revision ?? "0"}</dd>
          </div>
        </dl>
      )}
      {model && <SessionState id={id} other={other} model={model} />}
    </>
  );
}
