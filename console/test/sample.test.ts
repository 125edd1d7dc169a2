import assert from "node:assert/strict";
import {test} from "node:test";
import {chosen, sourceText} from "../src/state/data/sample.ts";

interface Page {
  sessions?: {session_id: string}[];
  total?: string;
  next_page_token?: string;
}

/** Answer with these pages, and return the queries that asked for them. */
function answering(pages: Page[]): URLSearchParams[] {
  const asked: URLSearchParams[] = [];
  Object.assign(globalThis, {
    document: {baseURI: "http://server/console"},
    fetch: (url: string) => {
      asked.push(new URL(url).searchParams);
      return Promise.resolve(Response.json(pages[asked.length - 1]));
    },
  });
  return asked;
}

test("a sample goes on where a page is empty and not the last", async () => {
  const asked = answering([{total: "2", next_page_token: "p"}, {sessions: [{session_id: "a"}, {session_id: "b"}]}]);
  const found = await chosen("rare", "", 200);
  assert.deepEqual(found.sessions.map(({session_id}) => session_id), ["a", "b"]);
  assert.equal(sourceText(found), "all 2 sessions that match");
  assert.deepEqual(asked.map((query) => query.get("page_token")), [null, "p"]);
  assert.deepEqual(asked.map((query) => query.get("skip_total")), [null, "true"]);
});

test("the sessions of a prefix are not counted", async () => {
  const asked = answering([{sessions: [{session_id: "a"}], next_page_token: "p"}]);
  assert.equal(sourceText(await chosen("", "a", 1)), "the first 1 by ID of the sessions that match");
  assert.deepEqual(asked.map((query) => query.get("skip_total")), ["true"]);
});

test("a sample names how many there are", async () => {
  answering([{sessions: [{session_id: "a"}], total: "9", next_page_token: "p"}]);
  assert.equal(sourceText(await chosen("", "", 1)), "the first 1 by ID of 9 sessions");
});
