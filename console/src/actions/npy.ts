/** Reads .npy files, as numpy.save writes them. No DOM. */

export interface Array {
  dtype: string;
  shape: number[];
  data: Uint8Array;
}

const TYPES: Record<string, [string, number]> = {
  f2: ["DATA_TYPE_FLOAT16", 2],
  f4: ["DATA_TYPE_FLOAT32", 4],
  f8: ["DATA_TYPE_FLOAT64", 8],
  i1: ["DATA_TYPE_INT8", 1],
  i2: ["DATA_TYPE_INT16", 2],
  i4: ["DATA_TYPE_INT32", 4],
  i8: ["DATA_TYPE_INT64", 8],
  u1: ["DATA_TYPE_UINT8", 1],
  u2: ["DATA_TYPE_UINT16", 2],
  u4: ["DATA_TYPE_UINT32", 4],
  u8: ["DATA_TYPE_UINT64", 8],
  b1: ["DATA_TYPE_BOOL", 1],
};

/** Return the array of a file.
 *
 * @throws Error if it is no such file, or of a type that no model has.
 */
export function arrayOf(file: Uint8Array): Array {
  const magic = String.fromCharCode(...file.subarray(0, 6));
  if (magic !== "\x93NUMPY" || file.length < 12) throw new Error("the file must be .npy, as numpy.save writes it");
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const isLong = file[6]! >= 2;
  const begin = isLong ? 12 : 10;
  const end = begin + (isLong ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = new TextDecoder("latin1").decode(file.subarray(begin, end));
  const type = /'descr':\s*'([<>|=])(\w+)'/.exec(header);
  const order = /'fortran_order':\s*(True|False)/.exec(header);
  const sizes = /'shape':\s*\(([\d,\s]*)\)/.exec(header);
  if (!order || !sizes) throw new Error("the file's header cannot be read");
  const found = type && TYPES[type[2]!];
  if (!found || type[1] === ">") {
    throw new Error(`the array must have numbers in little-endian order; got ${/'descr':\s*([^,]*)/.exec(header)?.[1] ?? "?"}`);
  }
  const shape = sizes[1]!.split(",").map((size) => size.trim()).filter(Boolean).map(Number);
  if (order[1] === "True" && shape.length > 1) {
    throw new Error("the array must be in C order: numpy.save(path, numpy.ascontiguousarray(x))");
  }
  const [dtype, itemBytes] = found;
  const data = file.subarray(end);
  const wanted = shape.reduce((product, size) => product * size, itemBytes);
  if (data.length !== wanted) throw new Error(`the file must have ${wanted} bytes of elements; got ${data.length}`);
  return {dtype, shape, data};
}
