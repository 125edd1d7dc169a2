/** Opens a session. */
import {useState} from "preact/hooks";
import {pythonText} from "../actions/code.ts";
import {sessionHash} from "../route.ts";
import {models} from "../store.ts";
import type {Session} from "../types.ts";
import {Action} from "./action.tsx";

export function OpenSession() {
  const [model, setModel] = useState("");
  const [id, setId] = useState("");
  const [rows, setRows] = useState("1");
  const chosen = model || models.value[0]?.name || "";
  return (
    <details class="panel">
      <summary>Open a session</summary>
      <Action
        title="Open a session"
        button="Open"
        role="user"
        prepare={() => {
          if (!chosen) throw new Error("No model is loaded.");
          const batchSize = Number(rows);
          if (!(Number.isInteger(batchSize) && batchSize >= 1)) throw new Error("Rows must be a whole number, 1 or more.");
          const more = batchSize === 1 ? "" : `, batch_size=${batchSize}`;
          const named = id ? `, session_id=${pythonText(id)}` : "";
          return {
            request: {
              method: "POST",
              path: "v1/sessions",
              body: {model: chosen, must_be_new: true, ...(id ? {session_id: id} : {}), ...(more ? {batch_size: batchSize} : {})},
            },
            python: [`session = client.open_session(${pythonText(chosen)}${named}${more}, must_be_new=True)`],
          };
        }}
        done={(answer) => {
          const {session} = answer as {session: Session};
          location.hash = sessionHash(session.session_id);
          return `Opened ${session.session_id}.`;
        }}
      >
        <div class="row">
          <label>
            Model of the session
            <select value={chosen} onChange={(event) => setModel(event.currentTarget.value)}>
              {models.value.map((one) => (
                <option key={one.name} value={one.name}>
                  {one.name}
                </option>
              ))}
            </select>
          </label>
          <label>
            ID (empty: the server makes one)
            <input value={id} maxLength={256} onInput={(event) => setId(event.currentTarget.value)} />
          </label>
          <label>
            Rows
            <input type="number" min="1" value={rows} onInput={(event) => setRows(event.currentTarget.value)} />
          </label>
        </div>
      </Action>
    </details>
  );
}
