/** What can be done to a session. */
import {useState} from "preact/hooks";
import {pythonSession, pythonText} from "../actions/code.ts";
import {fileOf, type SavedState, stateOf} from "../actions/state_file.ts";
import {call, sessionPath} from "../api.ts";
import {sessionHash} from "../route.ts";
import {showError} from "../store.ts";
import {numbersOf} from "../tensors.ts";
import type {Model, Session, Tensor} from "../types.ts";
import {Action, type Prepared} from "./action.tsx";
import {exampleOf, TensorFields, tensorsOf, useGiven} from "./tensor_fields.tsx";

interface Props {
  session: Session;
  model: Model;
}

export function SessionActions({session, model}: Props) {
  const props = {session, model};
  return (
    <section aria-labelledby="act">
      <h2 id="act">Act</h2>
      <div class="actions">
        <Step {...props} />
        <Reset {...props} />
        <Fork {...props} />
        <SaveState {...props} />
        <LoadState {...props} />
        <Close {...props} />
      </div>
    </section>
  );
}

const taken = ({session}: Props) => pythonSession(session.session_id, session.model, session.batch_size ?? 1);

/** Return the chosen rows, such as "0, 3".
 *
 * @throws Error if they are no rows of the session.
 */
function rowsOf(text: string, batchSize: number): number[] {
  const rows = text.split(/[\s,]+/).filter(Boolean).map(Number);
  if (!rows.every((row) => Number.isInteger(row) && row >= 0 && row < batchSize) || new Set(rows).size < rows.length) {
    throw new Error(`The rows must be numbers from 0 to ${batchSize - 1}, each once.`);
  }
  return rows;
}

function Step(props: Props) {
  const {session, model} = props;
  const rows = session.batch_size ?? 1;
  const [given, set] = useGiven(model.inputs, rows);
  const [outputs, setOutputs] = useState<Tensor[]>([]);
  return (
    <Action
      title="Step"
      button="Step"
      role="user"
      prepare={() => {
        const {tensors, python} = tensorsOf(given, model.inputs, rows, true);
        return {
          request: {
            method: "POST",
            path: sessionPath(session.session_id, ":step"),
            body: {inputs: tensors, tensor_format: "TENSOR_FORMAT_VALUES"},
          },
          imports: ["numpy"],
          python: [taken(props), `outputs = session.step(${python})`],
        };
      }}
      done={(answer) => {
        const found = answer as {outputs?: Tensor[]; revision?: string};
        setOutputs(found.outputs ?? []);
        return `Stepped to revision ${found.revision}.`;
      }}
    >
      <TensorFields
        label="Inputs"
        specs={model.inputs}
        rows={rows}
        given={given}
        set={set}
        example={exampleOf(model.inputs, rows)}
      />
      {outputs.map((tensor) => (
        <p key={tensor.name} class="output">
          {tensor.name}: {Array.from(numbersOf(tensor).subarray(0, 64), (one) => one.toPrecision(5)).join(", ")}
        </p>
      ))}
    </Action>
  );
}

function Reset(props: Props) {
  const {session, model} = props;
  const batchSize = session.batch_size ?? 1;
  const [kind, setKind] = useState<"zeros" | "values">("zeros");
  const [text, setText] = useState("");
  let rows: number[] = [];
  let problem = "";
  try {
    rows = rowsOf(text, batchSize);
  } catch (error) {
    problem = (error as Error).message;
  }
  const count = rows.length || batchSize;
  const [given, set] = useGiven(model.state, count);
  const prepare = (): Prepared => {
    if (problem) throw new Error(problem);
    const path = sessionPath(session.session_id, ":reset");
    const values = kind === "values" ? tensorsOf(given, model.state, count, false) : null;
    const some = rows.length ? `rows=${JSON.stringify(rows).replaceAll(",", ", ")}` : "";
    return {
      request: {method: "POST", path, body: {...(values ? {state: values.tensors} : {}), ...(rows.length ? {rows} : {})}},
      imports: values ? ["numpy"] : [],
      python: [taken(props), `session.reset_states(${[values?.python ?? "", some].filter(Boolean).join(", ")})`],
    };
  };
  return (
    <Action
      title="Reset states"
      button="Reset"
      role="user"
      prepare={prepare}
      destroys={`The state of ${rows.length ? `rows ${rows.join(", ")}` : "all rows"} is replaced by ${kind === "zeros" ? "the model's initial state" : "the given values"}. Save the state or fork first if you may want it back.`}
      done={(answer) => `Reset at revision ${(answer as {revision?: string}).revision}.`}
    >
      <div class="row">
        <label>
          New state
          <select value={kind} onChange={(event) => setKind(event.currentTarget.value as "zeros" | "values")}>
            <option value="zeros">Initial state (zeros)</option>
            <option value="values">Values</option>
          </select>
        </label>
        {batchSize > 1 && (
          <label>
            Rows (empty: all)
            <input value={text} placeholder="0, 3" onInput={(event) => setText(event.currentTarget.value)} />
          </label>
        )}
      </div>
      {kind === "values" && (
        <TensorFields
          label="State"
          specs={model.state}
          rows={count}
          given={given}
          set={set}
          example={exampleOf(model.state, count)}
        />
      )}
    </Action>
  );
}

function Fork(props: Props) {
  const {session} = props;
  const [id, setId] = useState("");
  return (
    <Action
      title="Fork"
      button="Fork, and show both"
      role="user"
      prepare={() => ({
        request: {
          method: "POST",
          path: sessionPath(session.session_id, ":fork"),
          body: id ? {new_session_id: id} : {},
        },
        python: [taken(props), `twin = session.fork(${id ? pythonText(id) : ""})`],
      })}
      done={(answer) => {
        const twin = (answer as {session: Session}).session.session_id;
        location.hash = sessionHash(session.session_id, twin);
        return `Forked to ${twin}.`;
      }}
    >
      <label>
        ID of the fork (empty: the server makes one)
        <input value={id} maxLength={256} onInput={(event) => setId(event.currentTarget.value)} />
      </label>
    </Action>
  );
}

function Close(props: Props) {
  const {session} = props;
  return (
    <Action
      title="Close"
      button="Close the session"
      role="user"
      destroys="The session ends and its state is deleted, for everyone who uses it."
      prepare={() => ({
        request: {method: "DELETE", path: sessionPath(session.session_id)},
        python: [`client.close_session(${pythonText(session.session_id)})`],
      })}
      done={() => `Closed ${session.session_id}.`}
    />
  );
}

interface StateAnswer {
  state?: Tensor[];
  session: Session;
  model_structure?: string;
}

function SaveState(props: Props) {
  const {session} = props;
  const file = `${session.session_id.replace(/[^\w.-]+/g, "_").slice(0, 80)}.safetensors`;
  const save = async ({request}: Prepared) => {
    const answer = await call<StateAnswer>(request.method, request.path);
    const content = fileOf(answer.state ?? [], answer.session, answer.model_structure ?? "");
    const url = URL.createObjectURL(new Blob([content], {type: "application/octet-stream"}));
    const link = document.createElement("a");
    link.href = url;
    link.download = file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    return answer;
  };
  return (
    <Action
      title="Save the state"
      button="Save to a file"
      role="viewer"
      prepare={() => ({
        request: {method: "GET", path: sessionPath(session.session_id, "/state")},
        python: [taken(props), `session.get_state().save(${pythonText(file)})`],
      })}
      run={save}
      done={(answer) => `Saved revision ${(answer as StateAnswer).session.revision ?? "0"} to ${file}.`}
    >
      <p class="muted">The file is the one that State.save of the Python SDK writes.</p>
    </Action>
  );
}

function LoadState(props: Props) {
  const {session, model} = props;
  const [saved, setSaved] = useState<{name: string; state: SavedState} | null>(null);
  const choose = async (field: HTMLInputElement) => {
    setSaved(null);
    const file = field.files?.[0];
    if (!file) return;
    try {
      setSaved({name: file.name, state: stateOf(new Uint8Array(await file.arrayBuffer()))});
    } catch (error) {
      showError(error);
    }
  };
  return (
    <Action
      title="Load a state"
      button="Load into this session"
      role="user"
      destroys="The state of all rows is replaced by that of the file."
      prepare={() => {
        if (!saved) throw new Error("Choose a file of a saved state.");
        const {state, name} = saved;
        const fits =
          state.fingerprint === session.model_fingerprint ||
          state.fingerprint === model.fingerprint ||
          (state.structure !== "" && state.structure === model.structure);
        if (!fits) throw new Error(`The file is of another model, ${state.model}.`);
        if (state.batchSize !== (session.batch_size ?? 1)) {
          throw new Error(`The file has ${state.batchSize} rows, the session ${session.batch_size ?? 1}.`);
        }
        return {
          request: {
            method: "POST",
            path: sessionPath(session.session_id, ":reset"),
            body: {state: state.tensors, position: state.position},
          },
          python: [
            taken(props),
            `session.reset_states(stepwell.State.load(${pythonText(name)}), position=${state.position})`,
          ],
        };
      }}
      done={(answer) => `Loaded at revision ${(answer as {revision?: string}).revision}.`}
    >
      <label>
        File of a saved state
        <input type="file" accept=".safetensors" onChange={(event) => void choose(event.currentTarget)} />
      </label>
    </Action>
  );
}
