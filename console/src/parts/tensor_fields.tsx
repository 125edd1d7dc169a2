/** Fields for the tensors of an action: a form from the model's signature, pasted JSON, or an uploaded .npy. */
import {useId, useState} from "preact/hooks";
import {pythonArray, pythonText} from "../actions/code.ts";
import {arrayOf, type Array as Npy} from "../actions/npy.ts";
import {byName, tensorOf, valuesOf, withRows} from "../actions/values.ts";
import {base64Of, shapeOf} from "../tensors.ts";
import type {Tensor, TensorSpec} from "../types.ts";

export type Way = "form" | "json" | "npy";
const MAX_FIELDS = 32;

interface Upload {
  name: string;
  array: Npy | null;
  problem: string;
}

/** What people have given so far. */
export interface Given {
  way: Way;
  /** By tensor: its numbers, one text each. */
  numbers: Record<string, string[]>;
  text: string;
  uploads: Record<string, Upload>;
}

/** Tensors, and the same in Python. */
export interface GivenTensors {
  tensors: Tensor[];
  python: string;
}

const size = (spec: TensorSpec, rows: number) => shapeOf(spec).reduce((product, one) => product * one, rows);

/** Whether a form has room for the tensors. */
export function fitsForm(specs: TensorSpec[], rows: number): boolean {
  return specs.reduce((sum, spec) => sum + size(spec, rows), 0) <= MAX_FIELDS;
}

export function useGiven(specs: TensorSpec[], rows: number): [Given, (given: Given) => void] {
  return useState<Given>(() => ({way: fitsForm(specs, rows) ? "form" : "json", numbers: {}, text: "", uploads: {}}));
}

/** Return what is given as tensors.
 *
 * @param mayHaveTime Whether an axis of time may follow the rows.
 * @throws Error that says what is missing or wrong.
 */
export function tensorsOf(given: Given, specs: TensorSpec[], rows: number, mayHaveTime: boolean): GivenTensors {
  if (given.way === "npy") return uploaded(given, specs);
  const found = given.way === "form" ? ofForm(given, specs, rows) : ofText(given, specs, rows, mayHaveTime);
  const tensors = found.map(({spec, values, shape}) => tensorOf(spec, {values, shape}));
  const arrays = found.map(({spec, values, shape}) => ({name: spec.name, text: pythonArray(values, shape), dtype: numpyType(spec.dtype)}));
  return {tensors, python: pythonOf(arrays.map(({name, text, dtype}) => ({name, text: `np.array(${text}, np.${dtype})`})))};
}

/** Return numpy's name of a type; it has no bfloat16, and the server casts floats. */
function numpyType(dtype: string): string {
  const name = dtype.replace("DATA_TYPE_", "").toLowerCase();
  return name === "bfloat16" ? "float32" : name === "bool" ? "bool_" : name;
}

function pythonOf(arrays: {name: string; text: string}[]): string {
  if (arrays.length === 1) return arrays[0]!.text;
  return `{${arrays.map(({name, text}) => `${pythonText(name)}: ${text}`).join(", ")}}`;
}

function ofForm(given: Given, specs: TensorSpec[], rows: number) {
  return specs.map((spec) => {
    const texts = Array.from({length: size(spec, rows)}, (_, index) => given.numbers[spec.name]?.[index] ?? "0");
    const values = texts.map((text, index) => {
      const number = Number(text);
      if (text.trim() === "" || !Number.isFinite(number)) {
        throw new Error(`${spec.name}, number ${index + 1}, must be a number; got ${JSON.stringify(text)}`);
      }
      return number;
    });
    return {spec, values, shape: [rows, ...shapeOf(spec)]};
  });
}

function ofText(given: Given, specs: TensorSpec[], rows: number, mayHaveTime: boolean) {
  if (!given.text.trim()) throw new Error("Paste the values as JSON.");
  const documents = byName(given.text, specs.map((spec) => spec.name));
  return specs.map((spec) => {
    const found = valuesOf(spec.name, documents.get(spec.name));
    return {spec, ...withRows(spec.name, found, shapeOf(spec), rows, mayHaveTime && spec.temporal !== false)};
  });
}

function uploaded(given: Given, specs: TensorSpec[]): GivenTensors {
  const found = specs.map((spec) => {
    const upload = given.uploads[spec.name];
    if (!upload) throw new Error(`Choose a .npy file for ${spec.name}.`);
    if (!upload.array) throw new Error(`${upload.name}: ${upload.problem}`);
    return {spec, upload, array: upload.array};
  });
  return {
    tensors: found.map(({spec, array}) => ({
      name: spec.name,
      dtype: array.dtype,
      shape: array.shape.map(String),
      data: base64Of(array.data),
    })),
    python: pythonOf(found.map(({spec, upload}) => ({name: spec.name, text: `np.load(${pythonText(upload.name)})`}))),
  };
}

export function TensorFields(props: {
  label: string;
  specs: TensorSpec[];
  rows: number;
  given: Given;
  set: (given: Given) => void;
  /** Values to begin with, by tensor. */
  example: string;
}) {
  const {label, specs, rows, given, set, example} = props;
  const hasForm = fitsForm(specs, rows);
  // radio buttons of one name are one group for the arrow keys
  const group = useId();
  const ways: [Way, string][] = [
    ...(hasForm ? ([["form", "Form"]] as [Way, string][]) : []),
    ["json", "JSON"],
    ["npy", ".npy file"],
  ];
  return (
    <fieldset>
      <legend>{label}</legend>
      <div class="row" role="radiogroup" aria-label={`How to give: ${label}`}>
        {ways.map(([way, name]) => (
          <label key={way} class="inline">
            <input type="radio" name={group} checked={given.way === way} onChange={() => set({...given, way})} />
            {name}
          </label>
        ))}
      </div>
      {given.way === "form" && specs.map((spec) => <Numbers key={spec.name} spec={spec} rows={rows} given={given} set={set} />)}
      {given.way === "json" && (
        <label class="wide">
          {specs.length === 1 ? `${specs[0]!.name} as nested lists` : "An object of nested lists by name"}
          <textarea
            rows={4}
            spellcheck={false}
            placeholder={example}
            value={given.text}
            onInput={(event) => set({...given, text: event.currentTarget.value})}
          />
        </label>
      )}
      {given.way === "npy" &&
        specs.map((spec) => (
          <label key={spec.name}>
            {spec.name}
            <input
              type="file"
              accept=".npy"
              onChange={(event) => void upload(event.currentTarget, spec, given, set)}
            />
          </label>
        ))}
    </fieldset>
  );
}

async function upload(field: HTMLInputElement, spec: TensorSpec, given: Given, set: (given: Given) => void) {
  const file = field.files?.[0];
  const uploads = {...given.uploads};
  delete uploads[spec.name];
  if (file) {
    try {
      uploads[spec.name] = {name: file.name, array: arrayOf(new Uint8Array(await file.arrayBuffer())), problem: ""};
    } catch (error) {
      uploads[spec.name] = {name: file.name, array: null, problem: error instanceof Error ? error.message : String(error)};
    }
  }
  set({...given, uploads});
}

function Numbers({spec, rows, given, set}: {spec: TensorSpec; rows: number; given: Given; set: (given: Given) => void}) {
  const count = size(spec, rows);
  const each = count / rows;
  const texts = Array.from({length: count}, (_, index) => given.numbers[spec.name]?.[index] ?? "0");
  return (
    <div class="numbers" role="group" aria-label={spec.name}>
      <span class="muted">{spec.name}</span>
      {texts.map((text, index) => (
        <input
          key={index}
          inputMode="decimal"
          aria-label={`${spec.name}${rows > 1 ? `, row ${Math.floor(index / each)}` : ""}, ${index % each}`}
          value={text}
          onInput={(event) => {
            const changed = texts.slice();
            changed[index] = event.currentTarget.value;
            set({...given, numbers: {...given.numbers, [spec.name]: changed}});
          }}
        />
      ))}
    </div>
  );
}

/** Return an example of what to paste. */
export function exampleOf(specs: TensorSpec[], rows: number): string {
  const zeros = (shape: number[]): unknown => {
    const [size, ...rest] = shape;
    return size === undefined ? 0 : Array.from({length: Math.min(size, 4)}, () => zeros(rest));
  };
  const one = (spec: TensorSpec) => zeros([rows, ...shapeOf(spec)]);
  if (specs.length === 1) return JSON.stringify(one(specs[0]!));
  return JSON.stringify(Object.fromEntries(specs.map((spec) => [spec.name, one(spec)])));
}
