/** Models and their versions, and what admins can do to them. */
import {useState} from "preact/hooks";
import {pythonText} from "../actions/code.ts";
import {modelPath} from "../api.ts";
import {Action, refusalOf} from "../parts/action.tsx";
import {loadModels, models, showError} from "../store.ts";
import type {Model, ModelVersion, TensorSpec} from "../types.ts";
import {bytes, count} from "../units.ts";
import {Fact} from "./overview.tsx";

const POLICIES = [
  ["keep", "stay on their version until they end"],
  ["carry", "keep their states, under the new weights"],
  ["migrate", "get a state that a registered function computes"],
  ["reset", "begin anew with the new version"],
] as const;
type Policy = (typeof POLICIES)[number][0];

const refresh = () => void loadModels().catch(showError);

export function ModelsPage() {
  return (
    <>
      <h1>Models</h1>
      <div class="row">
        <button type="button" onClick={refresh}>
          Refresh
        </button>
      </div>
      {models.value.map((model) => (
        <ModelPart key={model.name} model={model} />
      ))}
      <h2>Load</h2>
      <div class="actions">
        <LoadVersion />
      </div>
    </>
  );
}

function ModelPart({model}: {model: Model}) {
  const {proof} = model;
  const evidence = proof?.unproven
    ? `Trusted, not proven: ${proof.unproven}`
    : proof?.rows
      ? `Rows: ${proof.rows}`
      : proof
        ? `Proven; compared with Keras over ${proof.compared_steps ?? 0} time steps`
        : "–";
  return (
    <section aria-labelledby={`model-${model.name}`}>
      <h2 id={`model-${model.name}`}>{model.name}</h2>
      <dl class="facts" aria-label={`Facts of ${model.name}`}>
        <Fact name="Default version">{model.version}</Fact>
        <Fact name="Executor">
          {model.executor}
          {model.executor_reason && <span class="muted"> {model.executor_reason}</span>}
        </Fact>
        <Fact name="State of a row">{bytes(model.state_row_bytes)}</Fact>
        {model.provenance?.parameters && <Fact name="Parameters">{count(model.provenance.parameters)}</Fact>}
        <Fact name="Inputs">{specs(model.inputs)}</Fact>
        <Fact name="Outputs">{specs(model.outputs)}</Fact>
        <Fact name="State">{specs(model.state)}</Fact>
        <Fact name="Evidence">{evidence}</Fact>
      </dl>
      <div class="scroll" tabIndex={0} role="region" aria-label={`Versions of ${model.name}, table`}>
        <table aria-label={`Versions of ${model.name}`}>
          <thead>
            <tr>
              <th scope="col">Version</th>
              <th scope="col">State</th>
              <th scope="col">Labels</th>
              <th scope="col" class="number">Sessions in memory</th>
              <th scope="col">File</th>
            </tr>
          </thead>
          <tbody>
            {model.versions?.map((one) => (
              <tr key={one.version}>
                <td>
                  {one.version}
                  {one.is_default && " (default)"}
                </td>
                <td>
                  {stateOf(one)}
                  {one.reason && `: ${one.reason}`}
                </td>
                <td>{one.labels?.join(", ") || "–"}</td>
                <td class="number">{refusalOf("admin") ? "–" : count(one.sessions)}</td>
                <td>{one.path || "–"}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <details class="panel">
        <summary>Change {model.name}</summary>
        <div class="actions">
          <SetDefault model={model} />
          <SetLabel model={model} />
          <Unload model={model} />
        </div>
      </details>
    </section>
  );
}

function specs(all: TensorSpec[] | undefined): string {
  return all?.map((one) => `${one.name} (${one.shape?.join(" × ") || "one number"})`).join(", ") || "none";
}

function stateOf(one: ModelVersion): string {
  return one.state.replace("MODEL_STATE_", "").toLowerCase();
}

function policyBody(policy: Policy): string {
  return `SESSION_POLICY_${policy.toUpperCase()}`;
}

function PolicyField({policy, set}: {policy: Policy; set: (policy: Policy) => void}) {
  return (
    <label>
      Sessions that follow the default
      <select value={policy} onChange={(event) => set(event.currentTarget.value as Policy)}>
        {POLICIES.map(([name, text]) => (
          <option key={name} value={name}>
            {text}
          </option>
        ))}
      </select>
    </label>
  );
}

function VersionField({model, version, set}: {model: Model; version: string; set: (version: string) => void}) {
  return (
    <label>
      Version
      <select value={version} onChange={(event) => set(event.currentTarget.value)}>
        {model.versions?.map((one) => (
          <option key={one.version} value={one.version}>
            {one.version}
            {one.is_default ? " (default)" : ""}
          </option>
        ))}
      </select>
    </label>
  );
}

function LoadVersion() {
  const [name, setName] = useState("");
  const [path, setPath] = useState("");
  const [policy, setPolicy] = useState<Policy>("keep");
  const [isDefault, setIsDefault] = useState(true);
  const chosen = name || models.value[0]?.name || "";
  return (
    <Action
      title="Load a model version"
      button="Load"
      role="admin"
      prepare={() => {
        if (!chosen) throw new Error("Give the name of the model.");
        if (!path) throw new Error("Give the path of the file on the server's disk.");
        const keep = isDefault ? {} : {keep_default: true};
        return {
          request: {
            method: "POST",
            path: modelPath(chosen, ":load"),
            body: {path, sessions: policyBody(policy), ...keep},
          },
          python: [
            `client.load_model(${pythonText(chosen)}, ${pythonText(path)}, sessions="${policy}"${isDefault ? "" : ", default=False"}, upload=False)`,
          ],
        };
      }}
      done={(answer) => {
        refresh();
        const last = (answer as {version?: string; moved_sessions?: string}[]).at(-1);
        return `Loaded ${chosen}@${last?.version ?? "?"}; ${count(last?.moved_sessions)} sessions moved.`;
      }}
    >
      <div class="row">
        <label>
          Name
          <input value={name} list="model-names" placeholder={chosen} onInput={(event) => setName(event.currentTarget.value)} />
          <datalist id="model-names">
            {models.value.map((one) => (
              <option key={one.name} value={one.name} />
            ))}
          </datalist>
        </label>
        <label class="wide">
          Path of a .keras, .onnx or .stepwell file on the server's disk
          <input value={path} onInput={(event) => setPath(event.currentTarget.value)} />
        </label>
        <label class="inline">
          <input type="checkbox" checked={isDefault} onChange={(event) => setIsDefault(event.currentTarget.checked)} />
          Make it the default
        </label>
        <PolicyField policy={policy} set={setPolicy} />
      </div>
      <p class="muted">A browser cannot upload the file: the Python SDK and stepwell models load can.</p>
    </Action>
  );
}

function SetDefault({model}: {model: Model}) {
  const [version, setVersion] = useState("");
  const [policy, setPolicy] = useState<Policy>("keep");
  const others = model.versions?.filter((one) => !one.is_default) ?? [];
  const chosen = version || others.at(-1)?.version || model.version;
  return (
    <Action
      title={`Set the default of ${model.name}`}
      button="Set the default"
      role="admin"
      destroys={`New sessions of ${model.name} open on version ${chosen}; the sessions that follow the default ${POLICIES.find(([name]) => name === policy)![1]}.`}
      prepare={() => {
        if (chosen === model.version) throw new Error(`Version ${chosen} is the default.`);
        return {
          request: {
            method: "POST",
            path: modelPath(model.name, ":setDefault"),
            body: {version: chosen, sessions: policyBody(policy)},
          },
          python: [`client.set_default(${pythonText(model.name)}, ${chosen}, sessions="${policy}")`],
        };
      }}
      done={(answer) => {
        refresh();
        const found = answer as {moved_sessions?: string};
        return `The default of ${model.name} is ${chosen}; ${count(found.moved_sessions)} sessions moved.`;
      }}
    >
      <div class="row">
        <VersionField model={model} version={chosen} set={setVersion} />
        <PolicyField policy={policy} set={setPolicy} />
      </div>
    </Action>
  );
}

function SetLabel({model}: {model: Model}) {
  const [version, setVersion] = useState("");
  const [label, setLabel] = useState("");
  const chosen = version || model.version;
  return (
    <Action
      title={`Set a label of ${model.name}`}
      button="Set the label"
      role="admin"
      prepare={() => {
        if (!label) throw new Error("Give the label.");
        return {
          request: {method: "POST", path: modelPath(model.name, ":setLabel"), body: {label, version: chosen}},
          python: [`client.set_label(${pythonText(model.name)}, ${pythonText(label)}, ${chosen})`],
        };
      }}
      done={() => {
        refresh();
        return `${model.name}:${label} is version ${chosen}.`;
      }}
    >
      <div class="row">
        <label>
          Label
          <input value={label} maxLength={64} onInput={(event) => setLabel(event.currentTarget.value)} />
        </label>
        <VersionField model={model} version={chosen} set={setVersion} />
      </div>
    </Action>
  );
}

function Unload({model}: {model: Model}) {
  const [version, setVersion] = useState("");
  const chosen = version || model.versions?.find((one) => !one.is_default)?.version || model.version;
  return (
    <Action
      title={`Unload a version of ${model.name}`}
      button="Unload"
      role="admin"
      destroys={`The server stops serving ${model.name}@${chosen}. It refuses while the version has sessions or is the default.`}
      prepare={() => ({
        request: {method: "POST", path: modelPath(model.name, ":unload"), body: {version: chosen}},
        python: [`client.unload_model(${pythonText(model.name)}, ${chosen})`],
      })}
      done={() => {
        refresh();
        return `Unloaded ${model.name}@${chosen}.`;
      }}
    >
      <div class="row">
        <VersionField model={model} version={chosen} set={setVersion} />
      </div>
    </Action>
  );
}
