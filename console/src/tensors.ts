/** Tensors of the protocol as arrays of JavaScript. No DOM. */
import type {Tensor} from "./types.ts";

export type Numbers =
  | Float32Array
  | Float64Array
  | Int8Array
  | Int16Array
  | Int32Array
  | Uint8Array
  | Uint16Array
  | Uint32Array;

/** Return the bytes of base64. */
export function bytesOf(base64: string): Uint8Array<ArrayBuffer> {
  const text = atob(base64);
  const found = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index += 1) found[index] = text.charCodeAt(index);
  return found;
}

/** Return base64 of bytes. */
export function base64Of(bytes: Uint8Array): string {
  let text = "";
  for (let index = 0; index < bytes.length; index += 0x8000) {
    text += String.fromCharCode(...bytes.subarray(index, index + 0x8000));
  }
  return btoa(text);
}

/** Return the elements of a tensor, row by row. Integers of 64 bits become the nearest doubles. */
export function numbersOf(tensor: Tensor): Numbers {
  if (tensor.values) return Float64Array.from(tensor.values, Number);
  const bytes = bytesOf(tensor.data ?? "");
  const buffer = bytes.buffer;
  switch (tensor.dtype) {
    case "DATA_TYPE_FLOAT32":
      return new Float32Array(buffer);
    case "DATA_TYPE_FLOAT64":
      return new Float64Array(buffer);
    case "DATA_TYPE_FLOAT16":
      return Float32Array.from(new Uint16Array(buffer), halfOf);
    case "DATA_TYPE_BFLOAT16":
      return new Float32Array(Uint32Array.from(new Uint16Array(buffer), (bits) => bits << 16).buffer);
    case "DATA_TYPE_INT8":
      return new Int8Array(buffer);
    case "DATA_TYPE_INT16":
      return new Int16Array(buffer);
    case "DATA_TYPE_INT32":
      return new Int32Array(buffer);
    case "DATA_TYPE_INT64":
      return Float64Array.from(new BigInt64Array(buffer), Number);
    case "DATA_TYPE_UINT16":
      return new Uint16Array(buffer);
    case "DATA_TYPE_UINT32":
      return new Uint32Array(buffer);
    case "DATA_TYPE_UINT64":
      return Float64Array.from(new BigUint64Array(buffer), Number);
    default:
      return bytes;
  }
}

/** Return the shape of a tensor. */
export function shapeOf(tensor: {shape?: string[]}): number[] {
  return (tensor.shape ?? []).map(Number);
}

function halfOf(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 0x1f) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
