/** Actions as code to be copied: Python of the SDK, and curl. No DOM. */

/** What an action sends. */
export interface Request {
  method: "GET" | "POST" | "DELETE";
  path: string;
  body?: unknown;
}

/** Where the server is, for code. */
export interface Place {
  /** Address of JSON, without a slash at its end. */
  http: string;
  /** Address of gRPC. */
  grpc: string;
  /** Whether callers need a token. */
  hasToken: boolean;
  /** The tenant to act in; empty: the caller's own. */
  tenant?: string;
}

const MAX_BODY = 4000;

/** Return a text as a word of a POSIX shell. */
export function shellWord(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`;
}

/** Return a text as a string of Python. */
export function pythonText(text: string): string {
  return JSON.stringify(text).replace(/[\u007f-\u00a0\u00ad\u2028-\u202f\u2066-\u2069\u200b-\u200f\ufeff]/g, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** Return the command that sends a request. */
export function curl(request: Request, place: Place): string {
  const lines = ["curl -s --fail-with-body"];
  if (place.hasToken) lines.push(`-H "authorization: Bearer $STEPWELL_TOKEN"`);
  if (place.tenant) lines.push(`-H ${shellWord(`stepwell-tenant: ${place.tenant}`)}`);
  if (request.body !== undefined) {
    const body = JSON.stringify(request.body);
    lines.push(body.length > MAX_BODY ? "--json @body.json" : `--json ${shellWord(body)}`);
  } else if (request.method !== "GET") lines.push(`-X ${request.method}`);
  lines.push(shellWord(`${place.http}/${request.path}`));
  return lines.join(" \\\n  ");
}

/** Return a program of Python around some lines that use `client`. */
export function python(place: Place, lines: string[], imports: string[] = []): string {
  const token = place.hasToken ? `, token=os.environ["STEPWELL_TOKEN"]` : "";
  const tenant = place.tenant ? `, tenant=${pythonText(place.tenant)}` : "";
  const modules = [...imports.map((name) => (name === "numpy" ? "import numpy as np" : `import ${name}`))];
  if (place.hasToken) modules.unshift("import os");
  const head = [...modules, ...(modules.length ? [""] : []), "import stepwell", ""];
  return [...head, `client = stepwell.connect(${pythonText(place.grpc)}${token}${tenant})`, ...lines].join("\n");
}

/** Return the line of Python that takes up a session. */
export function pythonSession(id: string, model: string, batchSize: number): string {
  const rows = batchSize === 1 ? "" : `, batch_size=${batchSize}`;
  return `session = client.open_session(${pythonText(model)}, session_id=${pythonText(id)}${rows})`;
}

/** Return numbers in a shape as nested lists of Python, shortened if they are many. */
export function pythonArray(values: ArrayLike<number>, shape: number[]): string {
  const text = JSON.stringify(nested(values, shape, 0, values.length));
  return text.length > MAX_BODY ? "..." : text.replaceAll(",", ", ");
}

function nested(values: ArrayLike<number>, shape: number[], begin: number, end: number): unknown {
  const [size, ...rest] = shape;
  if (size === undefined) return values[begin];
  const step = size ? (end - begin) / size : 0;
  return Array.from({length: size}, (_, index) => nested(values, rest, begin + index * step, begin + (index + 1) * step));
}
