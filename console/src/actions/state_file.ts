/** Files of saved states, the same that State.save of the Python SDK writes: safetensors with the model's names in the
 * metadata. No DOM. */
import {base64Of, bytesOf, shapeOf} from "../tensors.ts";
import type {Session, Tensor} from "../types.ts";

const FORMAT = "stepwell-state/2";
const TYPES = new Map([
  ["DATA_TYPE_FLOAT32", "F32"],
  ["DATA_TYPE_FLOAT64", "F64"],
  ["DATA_TYPE_FLOAT16", "F16"],
  ["DATA_TYPE_INT8", "I8"],
  ["DATA_TYPE_INT16", "I16"],
  ["DATA_TYPE_INT32", "I32"],
  ["DATA_TYPE_INT64", "I64"],
  ["DATA_TYPE_UINT8", "U8"],
  ["DATA_TYPE_UINT16", "U16"],
  ["DATA_TYPE_UINT32", "U32"],
  ["DATA_TYPE_UINT64", "U64"],
  ["DATA_TYPE_BOOL", "BOOL"],
]);
const DTYPES = new Map([...TYPES].map(([dtype, type]) => [type, dtype]));

export interface SavedState {
  tensors: Tensor[];
  model: string;
  fingerprint: string;
  structure: string;
  batchSize: number;
  position: string;
}

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

/** Return the file of a state that GetState answered with tensors as data.
 *
 * @throws Error if a tensor has a type that the file format lacks.
 */
export function fileOf(state: Tensor[], session: Session, structure: string): Uint8Array<ArrayBuffer> {
  const metadata: Record<string, string> = {
    format: FORMAT,
    names: JSON.stringify(state.map((tensor) => tensor.name)),
    model: session.model,
    fingerprint: session.model_fingerprint ?? "",
    batch_size: String(session.batch_size ?? 1),
    revision: session.revision ?? "0",
    position: session.position ?? "0",
    structure,
  };
  const entries: [string, Record<string, string> | Entry][] = [["__metadata__", metadata]];
  const parts: Uint8Array[] = [];
  let at = 0;
  for (const tensor of state) {
    const type = TYPES.get(tensor.dtype ?? "");
    if (!type) throw new Error(`a state of ${tensor.dtype} cannot be saved to a file`);
    const data = bytesOf(tensor.data ?? "");
    const end = at + data.length;
    entries.push([tensor.name ?? "", {dtype: type, shape: shapeOf(tensor), data_offsets: [at, end]}]);
    parts.push(data);
    at = end;
  }
  const text = new TextEncoder().encode(JSON.stringify(Object.fromEntries(entries)));
  const header = new Uint8Array(Math.ceil(text.length / 8) * 8).fill(0x20);
  header.set(text);
  const file = new Uint8Array(8 + header.length + at);
  new DataView(file.buffer).setBigUint64(0, BigInt(header.length), true);
  file.set(header, 8);
  let place = 8 + header.length;
  for (const part of parts) {
    file.set(part, place);
    place += part.length;
  }
  return file;
}

/** Return the state of a file.
 *
 * @throws Error if it is no saved state.
 */
export function stateOf(file: Uint8Array): SavedState {
  try {
    return read(file);
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    throw new Error(`the file must be a state saved by the console or State.save: ${why}`);
  }
}

function read(file: Uint8Array): SavedState {
  if (file.length < 8) throw new Error("it has no header");
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const length = Number(view.getBigUint64(0, true));
  if (length > file.length - 8) throw new Error("its header is longer than the file");
  const header = JSON.parse(new TextDecoder("utf-8", {fatal: true}).decode(file.subarray(8, 8 + length))) as {
    __metadata__?: Record<string, string>;
    [name: string]: unknown;
  };
  const metadata = header.__metadata__ ?? {};
  if (metadata["format"] !== FORMAT) throw new Error(`its format must be ${FORMAT}; got ${String(metadata["format"])}`);
  const names = JSON.parse(metadata["names"] ?? "[]") as string[];
  const elements = file.subarray(8 + length);
  const tensors = names.map((name) => {
    const entry = header[name] as Entry | undefined;
    const dtype = DTYPES.get(entry?.dtype ?? "");
    if (!entry || !dtype) throw new Error(`its tensor ${name} is missing, or of an unknown type`);
    const [begin, end] = entry.data_offsets;
    if (!(begin >= 0 && begin <= end && end <= elements.length)) throw new Error(`its tensor ${name} is cut off`);
    return {name, dtype, shape: entry.shape.map(String), data: base64Of(elements.subarray(begin, end))};
  });
  return {
    tensors,
    model: metadata["model"] ?? "",
    fingerprint: metadata["fingerprint"] ?? "",
    structure: metadata["structure"] ?? "",
    batchSize: Number(metadata["batch_size"] ?? 1),
    position: metadata["position"] ?? "0",
  };
}
