import assert from "node:assert/strict";
import {test} from "node:test";
import {EventParser} from "../src/events.ts";
import {errorsOf, pointOf} from "../src/history.ts";
import {routeOf, sessionHash} from "../src/route.ts";
import {base64Of, numbersOf} from "../src/tensors.ts";
import {joined} from "../src/wants.ts";

test("a stream in pieces of any size gives the same events", () => {
  const text = 'event: sessions\nid: 1\ndata: {"a": 1}\n\n: keep-alive\n\nevent: server\nid: 2\ndata: {}\n\n';
  const wanted = [
    {name: "sessions", data: '{"a": 1}'},
    {name: "server", data: "{}"},
  ];
  for (let size = 1; size <= text.length; size += 1) {
    const parser = new EventParser();
    const found = [];
    for (let at = 0; at < text.length; at += size) found.push(...parser.push(text.slice(at, at + size)));
    assert.deepEqual(found, wanted);
  }
});

test("every id finds its page again", () => {
  for (const id of ["sensor-7", "a/b", "../x", "%41", "<img src=x>", "?other=z", "#", "日本", " x ", "a&b=c+d"]) {
    assert.deepEqual(routeOf(sessionHash(id)), {page: "session", id, other: ""});
    assert.deepEqual(routeOf(sessionHash("x", id)), {page: "session", id: "x", other: id});
  }
});

test("other addresses are unknown, and never an error", () => {
  for (const hash of ["#/nothing", "#/sessions/a/b", "#/sessions/%", "#/plane/x"]) {
    assert.deepEqual(routeOf(hash), {page: "unknown"});
  }
  assert.deepEqual(routeOf(""), {page: "overview"});
});

test("one request covers all wants", () => {
  assert.equal(joined([], false), null);
  assert.deepEqual(joined([], true), {server: {}});
  const body = joined([{ids: ["b", "a"], states: true, intervalSeconds: 1}, {ids: ["a"], inputs: true}], true);
  assert.deepEqual(body, {
    sessions: {session_ids: ["a", "b"], inputs: true, outputs: false, states: true},
    server: {},
  });
  const slow = joined([{ids: ["a"], intervalSeconds: 2}, {ids: ["b"], intervalSeconds: 0.5}], false);
  assert.equal(slow?.sessions?.interval, "0.5s");
});

test("tensors are read by their type", () => {
  const tensor = (dtype: string, bytes: ArrayLike<number>) =>
    [...numbersOf({dtype: `DATA_TYPE_${dtype}`, data: base64Of(Uint8Array.from(bytes))})];
  assert.deepEqual(tensor("FLOAT32", new Uint8Array(new Float32Array([1.5, -2]).buffer)), [1.5, -2]);
  assert.deepEqual(tensor("FLOAT16", [0x00, 0x3e, 0x00, 0xc0, 0x01, 0x00]), [1.5, -2, 2 ** -24]);
  assert.deepEqual(tensor("BFLOAT16", [0xc0, 0x3f]), [1.5]);
  assert.deepEqual(tensor("INT64", new Uint8Array(new BigInt64Array([-3n]).buffer)), [-3]);
  assert.deepEqual(tensor("BOOL", [0, 1]), [0, 1]);
  assert.deepEqual([...numbersOf({values: [1, "NaN"]})], [1, NaN]);
});

test("errors are summed by reason and model while the page looks", () => {
  const point = (per_second: number) =>
    pointOf({interval_seconds: 2, server: {}, errors: [{reason: "A", model: "m", per_second}, {reason: "B", per_second: 1}]})!;
  assert.deepEqual(errorsOf([point(3), point(0.5)]), [
    {reason: "A", model: "m", count: 7},
    {reason: "B", model: "", count: 4},
  ]);
  assert.equal(pointOf({interval_seconds: 2}), null);
});
