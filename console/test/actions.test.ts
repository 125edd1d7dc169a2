import assert from "node:assert/strict";
import {execFileSync} from "node:child_process";
import {test} from "node:test";
import {curl, python, pythonArray, pythonSession, pythonText, shellWord} from "../src/actions/code.ts";
import {arrayOf} from "../src/actions/npy.ts";
import {fileOf, stateOf} from "../src/actions/state_file.ts";
import {byName, tensorOf, valuesOf, withRows} from "../src/actions/values.ts";
import {base64Of} from "../src/tensors.ts";

const HOSTILE = ["plain", "it's", '"', "$(id)", "`id`", "a\\b", "a b", "<b>", "日本", "x\ny", "!x", "\u202e"];

test("a shell reads each word as it was", () => {
  for (const text of HOSTILE) {
    assert.equal(execFileSync("sh", ["-c", `printf %s ${shellWord(text)}`], {encoding: "utf8"}), text);
  }
});

test("code names what it needs", () => {
  const place = {http: "http://h:1", grpc: "h:2", hasToken: true};
  const command = curl({method: "POST", path: "v1/sessions/it's:step", body: {a: "it's"}}, place);
  assert.match(command, /Bearer \$STEPWELL_TOKEN/);
  assert.match(command, /--json '\{"a":"it'"'"'s"\}'/);
  assert.match(curl({method: "DELETE", path: "x"}, place), /-X DELETE/);
  assert.doesNotMatch(curl({method: "GET", path: "x"}, {...place, hasToken: false}), /-X|authorization/);
  const program = python(place, [pythonSession('a"b', "m", 2)], ["numpy"]);
  assert.match(program, /token=os.environ\["STEPWELL_TOKEN"\]/);
  assert.match(program, /session_id="a\\"b", batch_size=2/);
  assert.match(curl({method: "POST", path: "x", body: "y".repeat(5000)}, place), /--json @body.json/);
  const other = {...place, tenant: "a'b"};
  assert.match(curl({method: "GET", path: "x"}, other), /-H 'stepwell-tenant: a'"'"'b'/);
  assert.match(python(other, []), /, tenant="a'b"\)/);
  assert.equal(pythonArray([1, 2, 3, 4], [2, 2]), "[[1, 2], [3, 4]]");
  assert.equal(pythonText("\u202e"), '"\\u202e"');
});

test("lists are read with their shape, and ragged ones are refused", () => {
  assert.deepEqual(valuesOf("x", [[1, 2], [3, 4]]), {shape: [2, 2], values: [1, 2, 3, 4]});
  for (const bad of [[[1], [2, 3]], [[1], 2], ["a"], [null], [], [[]], {}, "x"]) {
    assert.throws(() => valuesOf("x", bad), /x must/);
  }
});

test("axes that are left out are added", () => {
  const x = (shape: number[]) => withRows("x", {shape, values: []}, [3], shape[0] === 2 ? 2 : 1, true).shape;
  assert.deepEqual(x([3]), [1, 3]);
  assert.deepEqual(x([1, 3]), [1, 3]);
  assert.deepEqual(x([1, 5, 3]), [1, 5, 3]);
  assert.deepEqual(x([2, 3]), [2, 3]);
  assert.throws(() => x([4]), /shape 1 × 3 or 1 × time × 3; got 4/);
  assert.throws(() => withRows("h", {shape: [1, 5, 3], values: []}, [3], 1, false), /h must have the shape 1 × 3;/);
});

test("booleans have their type, and integers beyond JSON's numbers are refused", () => {
  const spec = (dtype: string) => ({name: "x", dtype, shape: [], temporal: true});
  const one = {shape: [1], values: [1]};
  assert.deepEqual(tensorOf(spec("DATA_TYPE_BOOL"), one), {name: "x", values: [1], shape: ["1"], dtype: "DATA_TYPE_BOOL"});
  for (const dtype of ["DATA_TYPE_FLOAT32", "DATA_TYPE_INT32"]) {
    assert.deepEqual(tensorOf(spec(dtype), one), {name: "x", values: [1], shape: ["1"]});
  }
  for (const wrong of [2 ** 53, -(2 ** 53), 0.5]) {
    assert.throws(() => tensorOf(spec("DATA_TYPE_INT64"), {shape: [1], values: [wrong]}), /x must have whole numbers below 2\^53/);
    tensorOf(spec("DATA_TYPE_FLOAT64"), {shape: [1], values: [wrong]});
  }
});

test("pasted text names its tensors", () => {
  assert.deepEqual([...byName("[1]", ["x"])], [["x", [1]]]);
  assert.deepEqual([...byName('{"b": 1, "a": 2}', ["a", "b"])].sort(), [["a", 2], ["b", 1]]);
  assert.throws(() => byName("[1]", ["a", "b"]), /object with the names a, b/);
  assert.throws(() => byName('{"c": 1}', ["a"]), /must be a; got c/);
  assert.throws(() => byName("[1", ["a"]), /must be JSON/);
});

function npy(descr: string, order: string, shape: string, data: Uint8Array): Uint8Array {
  const text = `{'descr': '${descr}', 'fortran_order': ${order}, 'shape': ${shape}, }`;
  const header = new TextEncoder().encode(text.padEnd(117) + "\n");
  const head = [0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, header.length & 255, header.length >> 8];
  return Uint8Array.from([...head, ...header, ...data]);
}

test(".npy files are read", () => {
  const data = new Uint8Array(new Float32Array([1, 2, 3]).buffer);
  const found = arrayOf(npy("<f4", "False", "(1, 3)", data));
  assert.deepEqual([found.dtype, found.shape, [...found.data]], ["DATA_TYPE_FLOAT32", [1, 3], [...data]]);
  assert.throws(() => arrayOf(npy("<f4", "True", "(1, 3)", data)), /C order/);
  assert.throws(() => arrayOf(npy(">f4", "False", "(1, 3)", data)), /little-endian/);
  assert.throws(() => arrayOf(npy("<f4", "False", "(1, 4)", data)), /16 bytes of elements; got 12/);
  assert.throws(() => arrayOf(npy("|O", "False", "(1,)", data)), /numbers/);
  assert.throws(() => arrayOf(new Uint8Array(5)), /must be .npy/);
});

test("a state comes back from its file", () => {
  const tensors = ["b/h", "a/c"].map((name) => ({
    name,
    dtype: "DATA_TYPE_FLOAT32",
    shape: ["1", "2"],
    data: base64Of(Uint8Array.from({length: 8}, () => Math.floor(Math.random() * 256))),
  }));
  const session = {session_id: "s", model: "m", model_fingerprint: "f", revision: "9", position: "4"};
  const file = fileOf(tensors, session, "t");
  assert.deepEqual(stateOf(file), {
    tensors, model: "m", fingerprint: "f", structure: "t", batchSize: 1, position: "4",
  });
  assert.throws(() => stateOf(file.subarray(0, file.length - 1)), /cut off/);
  assert.throws(() => stateOf(new Uint8Array(20)), /must be a state saved/);
  assert.throws(() => stateOf(new Uint8Array(2)), /it has no header/);
});
