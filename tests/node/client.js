// What a client made with grpc-js does against the server, as one scenario. Prints what came of it as JSON.
//
//     node client.js HOST:PORT PROTO_FOLDER MODEL FEATURES
"use strict";

const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const protobuf = require("protobufjs");

const [address, protos, model, features] = process.argv.slice(2);
const definition = loader.loadSync("stepwell/v1/sessions.proto", {
  includeDirs: [protos],
  longs: Number,
  enums: String,
});
const { SessionService } = grpc.loadPackageDefinition(definition).stepwell.v1;
const client = new SessionService(address, grpc.credentials.createInsecure());
const details = protobuf.parse(`syntax = "proto3"; package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }`).root;

function call(method, request, { metadata = new grpc.Metadata(), ...options } = {}) {
  return new Promise((resolve, reject) => {
    client[method](request, metadata, options, (error, reply) => (error ? reject(error) : resolve(reply)));
  });
}

function input(seed, rows = 1) {
  const x = new Float32Array(rows * Number(features)).map((_, index) => Math.sin(seed + index));
  return { dtype: "DATA_TYPE_FLOAT32", shape: [rows, Number(features)], data: Buffer.from(x.buffer) };
}

function output(tensor) {
  const data = tensor.data;
  return Array.from({ length: data.length / 4 }, (_, index) => data.readFloatLE(4 * index));
}

// How a call fails: its status, and the google.rpc.ErrorInfo in its details.
function failure(error) {
  const [raw] = error.metadata ? error.metadata.get("grpc-status-details-bin") : [];
  let info = {};
  if (raw) {
    const status = details.lookupType("google.rpc.Status").decode(raw);
    const found = status.details.find((one) => one.typeUrl.endsWith("google.rpc.ErrorInfo"));
    info = details.lookupType("google.rpc.ErrorInfo").toObject(details.lookupType("google.rpc.ErrorInfo").decode(found.value));
  }
  return { code: grpc.status[error.code], message: error.details, reason: info.reason, domain: info.domain };
}

const failed = (promise) => promise.then(() => ({ code: "OK" }), failure);

// Sends frames one after the other, each when the one before it was answered.
function stream(session, count) {
  return new Promise((resolve, reject) => {
    const replies = [];
    const frames = client.StepStream();
    const send = (id) => frames.write({ frameId: id, step: { sessionIds: [session], inputs: [input(id)] } });
    frames.on("data", (reply) => {
      replies.push({ id: reply.frameId, revisions: reply.revisions, y: output(reply.outputs[0]) });
      if (replies.length < count) send(replies.length + 1);
      else frames.end();
    });
    frames.on("error", reject);
    frames.on("end", () => resolve(replies));
    send(1);
  });
}

// A stream that is under way when `end` is called with it; how it ends.
function ended(session, options, end) {
  return new Promise((resolve) => {
    const frames = client.StepStream(new grpc.Metadata(), options);
    frames.on("data", () => end(frames));
    frames.on("error", (error) => resolve(failure(error)));
    frames.write({ frameId: 1, step: { sessionIds: [session], inputs: [input(1)] } });
  });
}

async function main() {
  const said = {};
  const { session } = await call("OpenSession", { model });
  const id = session.sessionId;
  said.opened = session.model;
  const step = await call("Step", { sessionId: id, inputs: [input(0)] });
  said.step = { revision: step.revision, y: output(step.outputs[0]) };
  said.stream = await stream(id, 3);
  said.missing = await failed(call("Step", { sessionId: "nobody", inputs: [input(0)] }));
  said.shape = await failed(call("Step", { sessionId: id, inputs: [input(0, 2)] }));
  said.cancelled = await ended(id, {}, (frames) => frames.cancel());
  said.late = await ended(id, { deadline: Date.now() + 500 }, () => {});
  const metadata = new grpc.Metadata();
  metadata.set("x-large", "v".repeat(20 << 10));
  said.headers = await failed(call("GetSession", { sessionId: id }, { metadata }));
  const many = Array.from({ length: 200 }, () => call("GetSession", { sessionId: id }));
  said.revisions = [...new Set((await Promise.all(many)).map((reply) => reply.session.revision))];
  await call("CloseSession", { sessionId: id });
  said.closed = await failed(call("GetSession", { sessionId: id }));
  console.log(JSON.stringify(said));
  client.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
