/** The server as a whole: what it does now, and over the last minutes. */
import type {ComponentChildren} from "preact";
import {errorsOf, history, type Point} from "../history.ts";
import {Chart} from "../parts/chart.tsx";
import {sessionHash} from "../route.ts";
import {figures, server} from "../store.ts";
import type {ModelActivity, ReplicaState, ServerActivity, ServerEvent, StageLatency} from "../types.ts";
import {ago, bytes, count, measure, seconds} from "../units.ts";

export function OverviewPage() {
  const now = figures.value;
  return (
    <>
      <h1>Overview</h1>
      {now === null && <p class="muted">Waiting for the first figures.</p>}
      {now !== null && now.server === undefined && (
        <p>
          The figures of the server are for admins{server.value.role && `; your role is ${server.value.role}`}. You see
          what is wrong, and the models.
        </p>
      )}
      {now && <Readiness now={now} />}
      {now?.server && <Now now={now} activity={now.server} />}
      {now?.server && <Curves />}
      {now && <Models models={now.models ?? []} detailed={now.server !== undefined} />}
      {now?.server && <Replicas now={now} activity={now.server} />}
      {now?.server && <Stages latencies={now.server.latencies ?? []} />}
      {now?.server && <Errors now={now} />}
      {now?.server && <Methods now={now} />}
      {now?.server && <Slow now={now} />}
      {now?.server && <ServerFacts activity={now.server} />}
    </>
  );
}

/** A fact in a box. */
export function Fact({name, children}: {name: string; children: ComponentChildren}) {
  return (
    <div>
      <dt>{name}</dt>
      <dd>{children}</dd>
    </div>
  );
}

function Readiness({now}: {now: ServerEvent}) {
  const problems = Object.keys(now.problems ?? {}).length;
  const warnings = Object.keys(now.warnings ?? {}).length;
  if (!now.ready) return <p class="bad">The server is not ready ({problems} problems, above).</p>;
  return (
    <p class={warnings ? "warn" : "good"}>
      The server is ready{warnings ? `, with ${warnings === 1 ? "a warning" : `${warnings} warnings`} (above)` : ""}.
    </p>
  );
}

function Now({now, activity}: {now: ServerEvent; activity: ServerActivity}) {
  const point = history.value.at(-1);
  const sessions = Number(activity.sessions ?? 0);
  const resident = Number(activity.resident_sessions ?? 0);
  return (
    <dl class="facts" aria-label="Now">
      <Fact name="Steps per second">{measure(activity.row_steps_per_second ?? 0)}</Fact>
      <Fact name="Rows per pass">{measure(point?.rowsPerPass ?? undefined)}</Fact>
      <Fact name="Latency p50 / p99">
        {seconds(point?.p50 ?? undefined)} / {seconds(point?.p99 ?? undefined)}
      </Fact>
      <Fact name="Sessions">{count(sessions)}</Fact>
      <Fact name="Resident / paged out">
        {count(resident)} / {count(Math.max(0, sessions - resident))}
      </Fact>
      <Fact name="Rows waiting">{count(activity.queued_rows)}</Fact>
      <Fact name="Errors per second">{measure(activity.errors_per_second ?? 0)}</Fact>
      <Fact name="Models">{count(now.models?.length)}</Fact>
    </dl>
  );
}

function Curves() {
  const points = history.value;
  const times = points.map((point) => point.time);
  const curve = (name: string, key: Exclude<keyof Point, "time" | "errorsBy">) => ({name, values: points.map((point) => point[key])});
  return (
    <section aria-labelledby="curves">
      <h2 id="curves">The last minutes</h2>
      <div class="charts">
        <Chart title="Steps per second" times={times} curves={[curve("steps", "steps")]} show={measure} />
        <Chart
          title="Latency"
          times={times}
          curves={[
            curve("p50", "p50"),
            curve("p99", "p99"),
            curve("wait p99", "waitP99"),
            curve("commit p99", "commitP99"),
          ]}
          show={seconds}
        />
        <Chart title="Rows per pass" times={times} curves={[curve("rows", "rowsPerPass")]} show={measure} />
        <Chart
          title="Sessions"
          times={times}
          curves={[curve("live", "sessions"), curve("resident", "resident")]}
          show={count}
        />
        <Chart title="Errors per second" times={times} curves={[curve("errors", "errors")]} show={measure} />
      </div>
    </section>
  );
}

function Models({models, detailed}: {models: ModelActivity[]; detailed: boolean}) {
  return (
    <section aria-labelledby="models">
      <h2 id="models">Models</h2>
      <Table
        name="Models"
        heads={["Model", "Version", ...(detailed ? ["Executor", "Steps/s", "Rows/pass", "p99", "Busy", "Sessions", "Resident rows", "State memory"] : [])]}
        rows={models.map((model) => [
          <a href={`#/models`}>{model.name}</a>,
          model.versions?.length === 1 ? model.version : `${model.version ?? "–"}, default of ${model.versions?.length ?? 0}`,
          ...(detailed
            ? [
                model.executor,
                measure(model.row_steps_per_second ?? 0),
                measure(model.rows_per_pass),
                seconds(total(model.latencies)?.p99_seconds),
                `${measure((model.busy ?? 0) * 100)} %`,
                count(model.sessions),
                `${count(model.resident_rows)} of ${count(model.max_resident_rows)}`,
                bytes(model.resident_bytes),
              ]
            : []),
        ])}
        none="No model is loaded."
        texts={3}
      />
    </section>
  );
}

const STATES: Record<ReplicaState, [name: string, kind: string]> = {
  REPLICA_STATE_READY: ["ready", "good"],
  REPLICA_STATE_NOT_READY: ["not ready", "warn"],
  REPLICA_STATE_STOPPING: ["stopping", "warn"],
  REPLICA_STATE_MISSING: ["missing", "bad"],
};

/** Rows of replicas: to draw hundreds each second makes the page slow. */
const MOST_REPLICAS = 50;

function Replicas({now, activity}: {now: ServerEvent; activity: ServerActivity}) {
  const all = activity.replicas ?? [];
  const rank = (one: {id?: string; state?: ReplicaState}) =>
    one.id === activity.id ? 0 : one.state === "REPLICA_STATE_READY" ? 2 : 1;
  const shown =
    all.length > MOST_REPLICAS ? [...all].sort((a, b) => rank(a) - rank(b)).slice(0, MOST_REPLICAS) : all;
  // by the server's clock: the browser's may be wrong
  const time = now.time ? Date.parse(now.time) : Date.now();
  return (
    <section aria-labelledby="replicas">
      <h2 id="replicas">Replicas</h2>
      <Table
        name="Replicas"
        heads={["Server ID", "Host", "Address", "HTTP", "Version", "State", "Started", "Last seen", "Resident sessions"]}
        rows={shown.map((one) => {
          const [state, kind] = (one.state && STATES[one.state]) || ["not ready", "warn"];
          return [
            one.id === activity.id ? `${one.id} (this one)` : one.id,
            one.host,
            one.address,
            one.http_address || "–",
            one.version,
            <span class={kind}>{state}</span>,
            ago(one.started_time, time),
            ago(one.last_seen_time, time),
            count(one.resident_sessions),
          ];
        })}
        none="The server has not reported itself yet."
        texts={8}
      />
      {all.length > shown.length && (
        <p class="muted">
          {shown.length} of {all.length} replicas: first this one and those that are not ready, then the oldest.
          stepwell top --json lists all.
        </p>
      )}
      {all.length > 1 && (
        <p class="muted">
          The servers that share the store. They serve the same sessions; the other figures of this page are those of
          this one.
        </p>
      )}
    </section>
  );
}

function Stages({latencies}: {latencies: StageLatency[]}) {
  const names: Record<string, string> = {wait: "wait for a pass", commit: "commit to the store", total: "until the reply"};
  return (
    <section aria-labelledby="stages">
      <h2 id="stages">Latency by stage</h2>
      <Table
        name="Latency by stage"
        heads={["Stage", "p50", "p99"]}
        rows={latencies.map((one) => [names[one.stage] ?? one.stage, seconds(one.p50_seconds), seconds(one.p99_seconds)])}
        none="Nothing was stepped in the last second."
        texts={1}
      />
    </section>
  );
}

function Errors({now}: {now: ServerEvent}) {
  const found = errorsOf(history.value);
  const rate = (reason: string, model: string) =>
    now.errors?.find((one) => one.reason === reason && (one.model ?? "") === model)?.per_second ?? 0;
  return (
    <section aria-labelledby="errors">
      <h2 id="errors">Errors by reason</h2>
      <Table
        name="Errors by reason"
        heads={["Reason", "Model", "Per second now", "While you looked"]}
        rows={found.map((one) => [one.reason, one.model || "–", measure(rate(one.reason, one.model)), count(one.count)])}
        none="No errors while you looked."
        texts={2}
      />
    </section>
  );
}

function Methods({now}: {now: ServerEvent}) {
  return (
    <section aria-labelledby="methods">
      <h2 id="methods">Methods</h2>
      <Table
        name="Methods"
        heads={["Method", "Calls/s", "Messages/s", "p50", "p99"]}
        rows={(now.methods ?? []).map((one) => [
          one.method,
          measure(one.calls_per_second ?? 0),
          measure(one.messages_per_second ?? 0),
          seconds(one.p50_seconds),
          seconds(one.p99_seconds),
        ])}
        none="No calls in the last second."
        texts={1}
      />
    </section>
  );
}

function Slow({now}: {now: ServerEvent}) {
  return (
    <section aria-labelledby="slow">
      <h2 id="slow">Slowest sessions of the last minute</h2>
      <Table
        name="Slowest sessions of the last minute"
        heads={["Session", "Model", "Time of a step", "Ago"]}
        rows={(now.slow_sessions ?? []).map((one) => [
          <a class="id" href={sessionHash(one.session_id)}>
            {one.session_id}
          </a>,
          one.model,
          seconds(one.seconds),
          seconds(one.age_seconds ?? 0),
        ])}
        none="Nothing was stepped in the last minute."
        texts={2}
      />
    </section>
  );
}

function ServerFacts({activity}: {activity: ServerActivity}) {
  return (
    <section aria-labelledby="server">
      <h2 id="server">Server and store</h2>
      <dl class="facts" aria-label="Server">
        <Fact name="Version">{activity.version}</Fact>
        <Fact name="Server ID">{activity.id}</Fact>
        <Fact name="Front">{activity.front}</Fact>
        <Fact name="Uptime">{seconds(activity.uptime_seconds)}</Fact>
        <Fact name="Memory">
          {bytes(activity.memory_bytes)} of {bytes(activity.max_memory_bytes)}
        </Fact>
        <Fact name="Processors used">{measure(activity.cores ?? 0)}</Fact>
        <Fact name="Connections / streams">
          {count(activity.connections)} / {count(activity.streams)}
        </Fact>
        <Fact name="Sessions watched">{count(activity.watched_sessions)}</Fact>
        <Fact name="Store">
          {activity.store}, {activity.store_ready ? "ready" : "not ready"}
        </Fact>
        <Fact name="Store ID">{activity.store_id || "none"}</Fact>
      </dl>
    </section>
  );
}

function total(latencies: StageLatency[] | undefined): StageLatency | undefined {
  return latencies?.find((one) => one.stage === "total");
}

/** A table of figures: `texts` columns of words, then columns of numbers. */
function Table(props: {name: string; heads: string[]; rows: ComponentChildren[][]; none: string; texts: number}) {
  const {name, heads, rows, none, texts} = props;
  if (!rows.length) return <p class="muted">{none}</p>;
  const kind = (index: number) => (index < texts ? undefined : "number");
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label={`${name}, table`}>
      <table aria-label={name}>
        <thead>
          <tr>
            {heads.map((head, index) => (
              <th key={head} scope="col" class={kind(index)}>
                {head}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((cells, row) => (
            <tr key={row}>
              {cells.map((cell, index) => (
                <td key={index} class={kind(index)}>
                  {cell}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
