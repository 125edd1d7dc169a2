/** Arrays that people type: JSON as nested lists. No DOM. */
import type {Tensor, TensorSpec} from "../types.ts";

export interface Values {
  shape: number[];
  values: number[];
}

/** Return the numbers of nested lists and their shape.
 *
 * @throws Error if the lists are ragged, or hold anything but finite numbers.
 */
export function valuesOf(name: string, document: unknown): Values {
  const shape: number[] = [];
  for (let at = document; Array.isArray(at); at = at[0]) {
    if (!at.length) throw new Error(`${name} must not be empty`);
    shape.push(at.length);
  }
  const values: number[] = [];
  const collect = (at: unknown, depth: number) => {
    if (depth === shape.length) {
      const number = at === true ? 1 : at === false ? 0 : at;
      if (typeof number !== "number") throw new Error(`${name} must be lists of numbers; got ${shown(at)}`);
      values.push(number);
      return;
    }
    if (!Array.isArray(at) || at.length !== shape[depth]) {
      throw new Error(`${name} must be lists of equal length: ${shape.join(" × ")}; got ${shown(at)}`);
    }
    for (const one of at) collect(one, depth + 1);
  };
  collect(document, 0);
  return {shape, values};
}

/** Return values with the axes of batch and time in front that were left out, as the server wants them.
 *
 * @param features Shape of one row at one time step.
 * @param batchSize Rows.
 * @param mayHaveTime Whether an axis of time may follow that of the rows.
 * @throws Error if the shape does not fit.
 */
export function withRows(
  name: string,
  {shape, values}: Values,
  features: number[],
  batchSize: number,
  mayHaveTime: boolean,
): Values {
  const missing = features.length + 1 - shape.length;
  const full = missing === 1 && batchSize === 1 ? [1, ...shape] : shape;
  const extra = full.length - features.length;
  const fits =
    (extra === 1 || (extra === 2 && mayHaveTime)) &&
    full[0] === batchSize &&
    features.every((size, axis) => full[axis + extra] === size);
  if (!fits) {
    const wanted = [String(batchSize), ...features].join(" × ");
    const long = mayHaveTime ? ` or ${[String(batchSize), "time", ...features].join(" × ")}` : "";
    throw new Error(`${name} must have the shape ${wanted}${long}; got ${shape.join(" × ") || "a number"}`);
  }
  return {shape: full, values};
}

/** Return the tensor of the protocol. The server reads whole numbers as integers, but as booleans only if told.
 *
 * @throws Error if an integer is one that a number of JSON does not represent.
 */
export function tensorOf({name, dtype}: TensorSpec, {shape, values}: Values): Tensor {
  const wrong = dtype.includes("INT") ? values.find((value) => !Number.isSafeInteger(value)) : undefined;
  if (wrong !== undefined) {
    throw new Error(`${name} must have whole numbers below 2^53; got ${wrong}. A .npy file may have larger ones.`);
  }
  const typed = dtype === "DATA_TYPE_BOOL" ? {dtype} : {};
  return {name, values, shape: shape.map(String), ...typed};
}

/** Read what is pasted for several tensors: an object by name, or the value of the only one.
 *
 * @throws Error if it is no JSON, or has other names.
 */
export function byName(text: string, names: string[]): Map<string, unknown> {
  let document: unknown;
  try {
    document = JSON.parse(text);
  } catch (error) {
    throw new Error(`the text must be JSON: ${error instanceof Error ? error.message : String(error)}`);
  }
  if (document !== null && typeof document === "object" && !Array.isArray(document)) {
    const given = Object.keys(document);
    if (given.length === names.length && names.every((name) => given.includes(name))) {
      return new Map(Object.entries(document));
    }
    throw new Error(`the names must be ${names.join(", ")}; got ${given.join(", ").slice(0, 200) || "none"}`);
  }
  if (names.length !== 1) throw new Error(`the text must be an object with the names ${names.join(", ")}`);
  return new Map([[names[0]!, document]]);
}

function shown(value: unknown): string {
  return (JSON.stringify(value) ?? String(value)).slice(0, 60);
}
