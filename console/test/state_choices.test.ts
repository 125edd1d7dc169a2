import assert from "node:assert/strict";
import {test} from "node:test";
import {matches, patternOf} from "../src/state/data/match.ts";
import {Reel, View} from "../src/state/data/reel.ts";
import {drawn} from "../src/state/data/sample.ts";
import {BY_ACTIVITY, Choices, MAX_PINNED} from "../src/state/live.ts";
import {digits, levelOf, LEVELS, pixels, roundLimit} from "../src/state/palette.ts";
import {boundsOf, hit, type Point, unscaled} from "../src/state/scatter.ts";
import {base64Of} from "../src/tensors.ts";

const random = () => Math.fround(Math.random() * 2 - 1);

function grow(reel: Reel, columns: number, value: (unit: number, column: number) => number, units = 4): void {
  for (let column = 0; column < columns; column += 1) {
    const values = Float32Array.from({length: units}, (_, unit) => value(unit, column));
    const revision = reel.length ? reel.revision(reel.end - 1) + 1 : 1;
    const state = {name: "h", dtype: "DATA_TYPE_FLOAT32", shape: ["1", String(units)], data: base64Of(new Uint8Array(values.buffer))};
    reel.append({session_id: "s", kind: "SESSION_EVENT_KIND_STEP", revision: String(revision), position: String(revision), states: [state]});
  }
}

test("the window follows the newest revision until it is paused", () => {
  const [reel, choices] = [new Reel({maxColumns: 500}), new Choices()];
  grow(reel, 70, random);
  assert.deepEqual(choices.window(reel), {from: -50, to: 70}, "the next greater span than 70 is 120");
  choices.until.value = reel.revision(reel.end - 1);
  grow(reel, 5, random);
  assert.equal(choices.window(reel).to, 70);
  choices.follow();
  assert.equal(choices.window(reel).to, 75);
});

test("a window whose revisions are forgotten stays within the reel", () => {
  const [reel, choices] = [new Reel({maxColumns: 20}), new Choices()];
  grow(reel, 10, random);
  choices.until.value = 5;
  grow(reel, 60, random);
  const {from, to} = choices.window(reel);
  assert.ok(from < to && to === reel.first + 1);
});

test("zoom shows the selected revisions", () => {
  const [reel, choices] = [new Reel(), new Choices()];
  grow(reel, 50, random);
  choices.range.value = {first: 11, last: 20, top: 0, bottom: 4};
  choices.zoom(reel);
  assert.deepEqual(choices.window(reel), {from: 10, to: 20});
});

test("units are sorted again when the columns have doubled, unless somebody looks", () => {
  const [reel, choices] = [new Reel(), new Choices()];
  choices.sort.value = BY_ACTIVITY;
  grow(reel, 8, (unit, column) => (unit === 1 && column % 2 ? 1 : 0));
  choices.keepOrdered(reel);
  assert.equal(choices.order.value[0], 1);
  grow(reel, 40, (unit, column) => (unit === 3 && column % 2 ? 1 : 0));
  choices.cursor.value = {revision: 3, unit: 1};
  choices.keepOrdered(reel);
  assert.equal(choices.order.value[0], 1);
  choices.cursor.value = null;
  choices.keepOrdered(reel);
  assert.equal(choices.order.value[0], 3);
  assert.equal(choices.orderedAt.value, 48);
});

test("another tensor begins with colours of its own", () => {
  const [reel, choices] = [new Reel(), new Choices()];
  grow(reel, 2, () => 3);
  choices.keepOrdered(reel);
  choices.widen(3);
  assert.equal(choices.limit.value, 5);
  choices.widen(1);
  assert.equal(choices.limit.value, 5);
  grow(reel, 1, () => 0.1, 6);
  choices.keepOrdered(reel);
  assert.equal(choices.limit.value, 0);
});

test("a few units are pinned, at least one", () => {
  const choices = new Choices();
  for (let unit = 0; unit < 9; unit += 1) choices.pin(unit);
  assert.equal(choices.pinned.value.length, MAX_PINNED);
  for (const unit of choices.pinned.value) choices.pin(unit);
  assert.equal(choices.pinned.value.length, 1);
});

test("sessions in a selected state are found, the nearest first", () => {
  const reel = new Reel();
  grow(reel, 5, (unit, column) => (unit === 0 ? 1 : 0.5) + 0.01 * column);
  const view = View.of(reel);
  assert.ok(view);
  const pattern = patternOf(view, [0, 2], 1, 4);
  assert.ok(pattern);
  assert.equal(pattern.count, 3);
  assert.ok(Math.abs((pattern.mean[0] as number) - 1.02) < 1e-6);
  const like = Float32Array.of(1.02, 99, 0.52, -99);
  const far = Float32Array.of(-1, 0, -1, 0);
  const sample = [
    {id: "far", revision: 1, position: 1, rows: [far]},
    {id: "rows", revision: 1, position: 1, rows: [far, like]},
    {id: "small", revision: 1, position: 1, rows: [Float32Array.of(1, 2)]},
    {id: "missing", revision: 1, position: 1, rows: [Float32Array.of(NaN, 0, 0, 0)]},
  ];
  const found = matches(pattern, sample);
  assert.deepEqual(found.map(({id, row, isLike}) => [id, row, isLike]), [["rows", 1, true], ["far", 0, false]]);
  assert.equal(patternOf(view, [0], 7, 9), null);
});

test("a sample has the wanted size and no member twice", () => {
  const members = Array.from({length: 100}, (_, i) => i);
  for (const size of [0, 1, 30, 100, 500]) {
    const found = drawn(members, size);
    assert.equal(found.length, Math.min(size, 100));
    assert.equal(new Set(found).size, found.length);
  }
  const counts = new Array<number>(10).fill(0);
  for (let i = 0; i < 2000; i += 1) for (const member of drawn(members.slice(0, 10), 3)) (counts[member] as number) += 1;
  assert.ok(Math.min(...counts) > 400 && Math.max(...counts) < 800, counts.join());
});

test("levels are symmetrical, and missing values have a colour of their own", () => {
  assert.deepEqual([-9, -1, 0, 1, 9, NaN].map((value) => levelOf(value, 1)), [0, 0, (LEVELS - 1) / 2, LEVELS - 1, LEVELS - 1, LEVELS]);
  for (const isDark of [false, true]) {
    const found = pixels(isDark);
    const [blue, orange] = [found[0] as number, found[LEVELS - 1] as number];
    assert.ok((blue & 0xff) < ((blue >> 16) & 0xff) && (orange & 0xff) > ((orange >> 16) & 0xff));
    assert.ok(found.every((each) => each >>> 24 === 255));
    assert.notEqual(found[LEVELS], found[(LEVELS - 1) / 2]);
  }
});

test("limits are round and large enough", () => {
  assert.deepEqual([0, 1, 0.95, 1.01, 3, 7, 0.034, NaN].map(roundLimit), [1, 1, 1, 2, 5, 10, 0.05, 1]);
  for (let i = 0; i < 500; i += 1) {
    const value = Math.exp(20 * random());
    const limit = roundLimit(value);
    assert.ok(limit >= value * 0.999 && limit <= 2.51 * value, `${value}: ${limit}`);
  }
});

test("numbers are short", () => {
  assert.deepEqual([0, 0.123456, -1234.5678, 1e-9, NaN].map(digits), ["0", "0.1235", "-1235", "1.00e-9", "missing"]);
});

test("bounds stay while the points fit, and places are found again", () => {
  const points: Point[] = Array.from({length: 40}, (_, i) => ({id: String(i), x: 3 * random(), y: random(), group: 0}));
  const bounds = boundsOf(points, null);
  assert.ok(bounds);
  assert.equal(boundsOf(points, bounds), bounds);
  assert.notEqual(boundsOf([...points, {id: "far", x: 99, y: 0, group: 0}], bounds), bounds);
  const place = {x: 200, y: 150};
  const {x, y} = unscaled(bounds, 400, 300, place);
  const there: Point = {id: "there", x, y, group: 0};
  assert.equal(hit([...points.filter((each) => Math.hypot(each.x - x, each.y - y) > 0.2), there], bounds, 400, 300, place)?.id, "there");
  assert.equal(hit([], bounds, 400, 300, place), null);
});
