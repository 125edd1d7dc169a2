/** The frame of every action: its button, its confirmation, the role that it needs, and its code. */
import type {ComponentChildren} from "preact";
import {useId, useRef, useState} from "preact/hooks";
import {curl, type Place, python, type Request} from "../actions/code.ts";
import {address, call, hasToken, tenant} from "../api.ts";
import {server, showDone, showError} from "../store.ts";

/** What an action would send now, and the same in Python. */
export interface Prepared {
  request: Request;
  /** Lines that use `client`. */
  python: string[];
  /** Modules that the lines need. */
  imports?: string[];
}

export type Role = "viewer" | "user" | "admin";

export interface ActionProps {
  title: string;
  /** Words of the button. */
  button: string;
  role: Role;
  /** Return what would be sent; it may throw an Error that says what is missing. */
  prepare: () => Prepared;
  /** Send it; absent: as `prepare` says. */
  run?: (prepared: Prepared) => Promise<unknown>;
  /** Called with the answer. Returns what to show. */
  done: (answer: unknown) => string;
  /** What is destroyed, for the confirmation; absent: nothing is. */
  destroys?: string;
  children?: ComponentChildren;
}

const RANKS = ["viewer", "user", "admin"];

/** Return why the caller may not act in this role; empty: the caller may. */
export function refusalOf(role: Role): string {
  const own = server.value.role;
  if (!own || RANKS.indexOf(own) >= RANKS.indexOf(role)) return "";
  return `This needs the role ${role}; yours is ${own}.`;
}

/** Return where the server is, for code. */
export function placeOfServer(): Place {
  const http = address(".").replace(/\/$/, "");
  const {hostname} = new URL(http);
  const grpc = (server.value.address || `${hostname}:50051`).replace(/^(0\.0\.0\.0|\[::\])(?=:)/, hostname);
  return {http, grpc, hasToken: hasToken.value, tenant: tenant.value};
}

export function Action(props: ActionProps) {
  const {title, button, role, prepare, run, done, destroys, children} = props;
  const [busy, setBusy] = useState(false);
  const dialog = useRef<HTMLDialogElement>(null);
  const id = useId();
  const refusal = refusalOf(role);
  let prepared: Prepared | null = null;
  let problem = "";
  try {
    prepared = prepare();
  } catch (error) {
    problem = error instanceof Error ? error.message : String(error);
  }
  const send = async () => {
    if (!prepared) return;
    const {request} = prepared;
    setBusy(true);
    try {
      showDone(done(await (run ? run(prepared) : call(request.method, request.path, request.body))));
    } catch (error) {
      showError(error);
    } finally {
      setBusy(false);
    }
  };
  return (
    <form
      class="action"
      aria-label={title}
      onSubmit={(event) => {
        event.preventDefault();
        if (destroys) dialog.current?.showModal();
        else void send();
      }}
    >
      <h3>{title}</h3>
      {children}
      <div class="row">
        <button
          type="submit"
          class={destroys ? "danger" : "primary"}
          disabled={busy || !prepared || refusal !== ""}
          aria-describedby={refusal || problem ? `${id}-why` : undefined}
        >
          {busy ? "Working…" : button}
        </button>
        {(refusal || problem) && (
          <span id={`${id}-why`} class={refusal ? "warn" : "muted"}>
            {refusal || problem}
          </span>
        )}
      </div>
      {prepared && <Code prepared={prepared} title={title} />}
      {destroys && (
        <dialog ref={dialog} aria-labelledby={`${id}-title`}>
          <h2 id={`${id}-title`}>{title}?</h2>
          <p>{destroys}</p>
          <div class="buttons">
            <button type="button" onClick={() => dialog.current?.close()}>
              Cancel
            </button>
            <button type="button" class="danger" onClick={() => (dialog.current?.close(), void send())}>
              {button}
            </button>
          </div>
        </dialog>
      )}
    </form>
  );
}

/** The action as Python and as curl. */
function Code({prepared, title}: {prepared: Prepared; title: string}) {
  const place = placeOfServer();
  return (
    <details>
      <summary>Python and curl</summary>
      <Copied name="Python" title={title} text={python(place, prepared.python, prepared.imports)} />
      <Copied name="curl" title={title} text={curl(prepared.request, place)} />
    </details>
  );
}

function Copied({name, title, text}: {name: string; title: string; text: string}) {
  const [copied, setCopied] = useState(false);
  const area = useRef<HTMLPreElement>(null);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      setCopied(true);
    } catch {
      // no clipboard without TLS beyond this machine: select the text instead
      getSelection()?.selectAllChildren(area.current!);
    }
  };
  return (
    <div class="code">
      <div class="row">
        <strong>{name}</strong>
        <button type="button" aria-label={`Copy the ${name} of: ${title}`} onClick={() => void copy()}>
          {copied ? "Copied" : "Copy"}
        </button>
      </div>
      <pre ref={area} tabIndex={0} role="region" aria-label={`${name} of: ${title}`}>
        {text}
      </pre>
    </div>
  );
}
