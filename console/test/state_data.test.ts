import assert from "node:assert/strict";
import {test} from "node:test";
import {activity, byActivity, byCorrelation, byNumber, correlation, features} from "../src/state/data/order.ts";
import {beginning, fitted, groups, loadings, projected} from "../src/state/data/plane.ts";
import {PRESENT, Reel, RESET, STEP, valuesAt, View} from "../src/state/data/reel.ts";
import {cosine, distances, distribution, euclidean, isBounded, saturation, trace} from "../src/state/data/stats.ts";
import {base64Of} from "../src/tensors.ts";
import type {SessionEvent, Tensor} from "../src/types.ts";

const random = () => Math.fround(Math.random() * 2 - 1);

function tensor(name: string, shape: number[], values: ArrayLike<number>): Tensor {
  const bytes = new Uint8Array(Float32Array.from(values).buffer);
  return {name, dtype: "DATA_TYPE_FLOAT32", shape: shape.map(String), data: base64Of(bytes)};
}

function event(revision: number, h: ArrayLike<number>, more: Partial<SessionEvent> = {}): SessionEvent {
  return {
    session_id: "s",
    kind: "SESSION_EVENT_KIND_STEP",
    revision: String(revision),
    position: String(revision),
    time: "2026-01-01T00:00:00Z",
    states: [tensor("lstm/h", [1, h.length], h)],
    ...more,
  };
}

/** A reel of random states whose revisions begin at 1. */
function reelOf(columns: number, units: number, input = false): Reel {
  const reel = new Reel();
  for (let revision = 1; revision <= columns; revision += 1) {
    const inputs = input ? {inputs: [tensor("x", [1, 2], [random(), random()])]} : {};
    reel.append(event(revision, Array.from({length: units}, random), inputs));
  }
  return reel;
}

const viewOf = (reel: Reel, name = "", row = 0): View => {
  const view = View.of(reel, name, row);
  assert.ok(view);
  return view;
};

test("a reel keeps what its events report", () => {
  const reel = new Reel();
  const states = Array.from({length: 5}, () => Array.from({length: 4}, random));
  states.forEach((h, i) => {
    const kind = (["PRESENT", "STEP", "RESET", "STEP", "STEP"] as const)[i];
    const more = {kind: `SESSION_EVENT_KIND_${kind}` as SessionEvent["kind"], uid: i ? undefined : "7", model: "forecast"};
    assert.ok(reel.append(event(10 + i, h, more as Partial<SessionEvent>)));
  });
  const view = viewOf(reel);
  assert.equal(reel.length, 5);
  states.forEach((h, i) => assert.deepEqual([...view.column(i)], h));
  assert.deepEqual([0, 1, 2].map((i) => reel.kind(i)), [PRESENT, STEP, RESET]);
  assert.deepEqual([9, 10, 12, 99].map((revision) => reel.at(revision)), [-1, 0, 2, 4]);
  assert.deepEqual([0, 1, 2, 3].map((i) => reel.breaks(i)), [true, false, true, false]);
});

test("a full reel forgets its oldest columns", () => {
  const reel = new Reel({maxColumns: 10});
  const states = Array.from({length: 37}, () => [random(), random()]);
  states.forEach((h, i) => reel.append(event(i + 1, h)));
  assert.deepEqual([reel.first, reel.end, reel.capacity], [27, 37, 10]);
  const view = viewOf(reel);
  for (let column = 27; column < 37; column += 1) {
    assert.deepEqual([...view.column(column)], states[column]);
    assert.equal(reel.revision(column), column + 1);
  }
});

test("bytes bound the columns", () => {
  const reel = new Reel({maxBytes: 4 * 100 * 20});
  reel.append(event(1, new Float32Array(100)));
  assert.equal(reel.capacity, 20);
});

test("inputs that are too large are not kept", () => {
  const reel = new Reel({maxBytes: 4 * 2 * 2000});
  reel.append(event(1, [1, 2], {inputs: [tensor("x", [1, 3], [1, 2, 3])]}));
  assert.ok(reel.oversized);
  assert.equal(reel.inputs, null);
  assert.equal(reel.length, 1);
});

test("missing changes are gaps", () => {
  const reel = new Reel();
  reel.append(event(3, [1], {kind: "SESSION_EVENT_KIND_PRESENT"}));
  reel.append(event(4, [2]));
  reel.append(event(9, [3], {kind: "SESSION_EVENT_KIND_PRESENT"}));
  assert.deepEqual([0, 1, 2].map((i) => reel.missedBefore(i)), [0, 0, 4]);
  assert.equal(reel.missedTotal, 4);
  assert.equal(trace(viewOf(reel), 0).values.join(), "1,2,,3");
});

test("a reopened stream repeats the present", () => {
  const reel = reelOf(3, 2);
  assert.ok(!reel.append(event(3, [0, 0], {kind: "SESSION_EVENT_KIND_PRESENT"})));
  assert.equal(reel.length, 3);
});

test("another session of the same id begins the reel again", () => {
  const reel = new Reel();
  reel.append(event(5, [1], {kind: "SESSION_EVENT_KIND_PRESENT", uid: "1"}));
  reel.append({session_id: "s", kind: "SESSION_EVENT_KIND_ENDED", error: {message: "closed", reason: "SESSION_NOT_FOUND"}});
  assert.deepEqual(reel.ended, {message: "closed", reason: "SESSION_NOT_FOUND"});
  reel.append(event(6, [2], {kind: "SESSION_EVENT_KIND_PRESENT", uid: "2"}));
  assert.equal(reel.ended, null);
  assert.deepEqual([reel.length, reel.generation, reel.missedTotal], [1, 1, 0]);
  assert.equal(viewOf(reel).value(reel.first, 0), 2);
});

test("a state of another shape begins the reel again", () => {
  const reel = reelOf(3, 2);
  reel.append(event(4, [1, 2, 3]));
  assert.deepEqual([reel.length, viewOf(reel).units], [1, 3]);
});

test("several tensors and rows are kept apart", () => {
  const reel = new Reel();
  const h = Array.from({length: 6}, random);
  const c = Array.from({length: 12}, random);
  const x = [random()];
  const states = [tensor("a/h", [2, 3], h), tensor("b/c", [2, 3, 2], c)];
  reel.append(event(1, [], {states, inputs: [tensor("x", [1, 1], x)], rows: [1]}));
  assert.deepEqual([...viewOf(reel, "a/h", 1).column(0)], h.slice(3));
  assert.deepEqual([...viewOf(reel, "b/c", 0).column(0)], c.slice(0, 6));
  assert.deepEqual([...viewOf(reel, "b/c", 9).column(0)], c.slice(6));
  assert.deepEqual(valuesAt(reel, reel.inputs, 0, 0), []);
  assert.deepEqual(valuesAt(reel, reel.inputs, 0, 1).map(([name, values]) => [name, ...values]), [["x", ...x]]);
});

test("a tensor whose data and shape disagree is refused and changes nothing", () => {
  const reel = reelOf(2, 2);
  const states = [tensor("lstm/h", [1, 3], [1, 2])];
  assert.throws(() => reel.append(event(3, [], {states})), /shape \[1, 3\] needs 3 values; got 2/);
  assert.equal(reel.length, 2);
});

test("active units come first, and ties keep their numbers", () => {
  const reel = new Reel();
  for (let revision = 1; revision <= 9; revision += 1) {
    const sign = revision % 2 ? 1 : -1;
    reel.append(event(revision, [0.5, 0.1 * sign, 0.5, 0.9 * sign]));
  }
  const view = viewOf(reel);
  assert.deepEqual([...byActivity(view)], [3, 1, 0, 2]);
  assert.deepEqual([...byNumber(3)], [0, 1, 2]);
  assert.ok(Math.abs((activity(view)[3] as number) - 1.8) < 1e-6);
});

test("activity does not count the jump of a reset", () => {
  const reel = new Reel();
  reel.append(event(1, [0, 0.5]));
  reel.append(event(2, [0, 0.4]));
  reel.append(event(3, [1, 0.4], {kind: "SESSION_EVENT_KIND_RESET"}));
  reel.append(event(4, [1, 0.5]));
  assert.deepEqual([...byActivity(viewOf(reel))], [1, 0]);
});

test("units are sorted by their correlation with an input", () => {
  const reel = new Reel();
  for (let revision = 1; revision <= 40; revision += 1) {
    const x = [random(), random()] as const;
    const inputs = [tensor("x", [1, 2], x)];
    reel.append(event(revision, [random(), 0.3, -x[1] / 2, x[1] + 0.7 * random()], {inputs}));
  }
  const view = viewOf(reel);
  const [, second] = features(reel.inputs);
  assert.ok(second);
  assert.equal(second.label, "x[1]");
  const found = correlation(view, second);
  assert.ok(Math.abs((found[2] as number) + 1) < 1e-5);
  assert.ok(Number.isNaN(found[1]));
  const order = byCorrelation(view, second);
  assert.equal(order[0], 2);
  assert.equal(order[3], 1);
});

test("a distribution counts every value", () => {
  const reel = reelOf(200, 3);
  const view = viewOf(reel);
  const found = distribution(view, 1, 10);
  assert.ok(found);
  const values = Array.from({length: 200}, (_, column) => view.value(column, 1));
  assert.equal(found.counts.reduce((a, b) => a + b), 200);
  assert.equal(found.low, Math.min(...values));
  assert.equal(found.high, Math.max(...values));
  const first = values.filter((value) => value < found.low + (found.high - found.low) / 10).length;
  assert.ok(Math.abs((found.counts[0] as number) - first) <= 1);
});

test("saturation is the share beyond 0.95 of a bounded state", () => {
  const reel = new Reel();
  [0.99, -0.96, 0.5, 0].forEach((value, i) => reel.append(event(i + 1, [value])));
  assert.equal(saturation(viewOf(reel), 0), 0.5);
  reel.append(event(5, [1.2]));
  assert.ok(!isBounded(viewOf(reel)));
  assert.equal(saturation(viewOf(reel), 0), null);
  const cell = new Reel();
  cell.append(event(1, [], {states: [tensor("lstm/c", [1, 1], [0.5])]}));
  assert.equal(saturation(viewOf(cell), 0), null);
});

test("a session and its fork are compared by revision", () => {
  const here = new Reel();
  const there = new Reel();
  for (let revision = 1; revision <= 6; revision += 1) here.append(event(revision, [revision, 0]));
  for (const revision of [2, 3, 5, 6, 7]) there.append(event(revision, [revision, revision > 3 ? 2 : 0]));
  const found = distances(viewOf(here), viewOf(there), "revision");
  assert.deepEqual(found.at, [2, 3, 5, 6]);
  assert.deepEqual(found.euclidean, [0, 0, 2, 2]);
});

test("two sessions are compared by position since their last reset", () => {
  const here = new Reel();
  const there = new Reel();
  [1, 2, 3, 0, 1, 2].forEach((position, i) => here.append(event(i + 1, [i], {position: String(position)})));
  [1, 2, 3].forEach((position, i) => there.append(event(50 + i, [10], {position: String(position)})));
  const found = distances(viewOf(here), viewOf(there), "position");
  assert.deepEqual(found.at, [1, 2]);
  assert.deepEqual(found.euclidean, [6, 5]);
});

test("distances of known vectors", () => {
  assert.equal(euclidean(Float32Array.of(1, 2), Float32Array.of(4, 6)), 5);
  assert.equal(cosine(Float32Array.of(1, 0), Float32Array.of(0, 3)), 1);
  assert.equal(cosine(Float32Array.of(1, 0), Float32Array.of(-2, 0)), 2);
  assert.ok(Number.isNaN(cosine(Float32Array.of(0, 0), Float32Array.of(1, 0))));
});

test("the plane has the directions of the greatest variance", () => {
  const size = 20;
  const points = Array.from({length: 300}, () => {
    const point = Float32Array.from({length: size}, () => 5 + 0.01 * random());
    point[3] = 5 - 4 * random();
    point[7] = 5 + 1 * random();
    return point;
  });
  const plane = fitted(points);
  assert.ok(plane);
  assert.deepEqual(plane.axes.map((axis) => loadings(axis, 1)[0]?.unit), [3, 7]);
  assert.ok((plane.axes[0][3] as number) > 0.99, "the greatest weight is positive");
  const across = plane.axes[0].reduce((sum, each, i) => sum + each * (plane.axes[1][i] as number), 0);
  assert.ok(Math.abs(across) < 1e-9);
  assert.ok(plane.shares[0] > plane.shares[1] && plane.shares[0] + plane.shares[1] > 0.99);
  const projections = points.map((point) => projected(plane, point));
  const variance = (axis: 0 | 1) => projections.reduce((sum, each) => sum + each[axis] ** 2, 0);
  const total = points.reduce((sum, point) => sum + point.reduce((all, value, i) => all + (value - (plane.mean[i] as number)) ** 2, 0), 0);
  assert.ok(Math.abs(variance(0) / total - plane.shares[0]) < 1e-6);
  assert.deepEqual(fitted(points), plane, "the same points give the same plane");
});

test("points on a line have a plane, equal points have none", () => {
  const line = Array.from({length: 5}, (_, i) => Float32Array.of(i, 2 * i, 0));
  const plane = fitted(line);
  assert.ok(plane);
  assert.ok(Math.abs(plane.shares[0] - 1) < 1e-9 && plane.shares[1] < 1e-9);
  assert.equal(fitted([Float32Array.of(1, 1), Float32Array.of(1, 1)]), null);
  assert.equal(fitted([Float32Array.of(1, 1)]), null);
  assert.equal(fitted([Float32Array.of(1, NaN), Float32Array.of(1, 2)]), null);
});

test("sessions are grouped by the beginning of their ids", () => {
  assert.deepEqual(["user-42", "a/b/c", "sensor7", "<img src=x>", "😀😀😀😀😀"].map(beginning), ["user", "a", "sens", "<img", "😀😀😀😀"]);
  const members = ["a-1", "a-2", "b-1", "c-1"].map((id) => ({id, model: "m", version: "1"}));
  assert.deepEqual(groups(members, "prefix", 2), ["a", "b"]);
  assert.deepEqual(groups(members, "version", 2), ["m@1"]);
});
