/** The frame around all pages: navigation, theme, token, messages, and what the watching costs. */
import {computed} from "@preact/signals";
import {useEffect, useRef, useState} from "preact/hooks";
import {actIn, forgetToken, hasToken, identity, tenant} from "./api.ts";
import {remember} from "./history.ts";
import {LivePage} from "./pages/live.tsx";
import {ModelsPage} from "./pages/models.tsx";
import {OverviewPage} from "./pages/overview.tsx";
import {PlanePage} from "./pages/plane.tsx";
import {SessionPage} from "./pages/session.tsx";
import {SessionsPage} from "./pages/sessions.tsx";
import {TokenDialog} from "./parts/token_dialog.tsx";
import {route, type Route} from "./route.ts";
import {figures, loadModels, notice, server, showError} from "./store.ts";
import {isDark, theme} from "./theme.ts";
import {bytes, count, measure} from "./units.ts";
import {reconnect, watchCost, watchProblem, watchServer, watchStatus} from "./watch.ts";

/** Time that an event takes the server, in seconds: docs/guides/json.md has the measurement. */
const EVENT_SECONDS = 50e-6;
const PAGES = [
  ["overview", "#/", "Overview"],
  ["sessions", "#/sessions", "Sessions"],
  ["live", "#/live", "Live"],
  ["plane", "#/plane", "Plane"],
  ["models", "#/models", "Models"],
] as const;

export function App() {
  const where = route.value;
  const main = useRef<HTMLElement>(null);
  const isFirst = useRef(true);
  useEffect(
    () =>
      watchServer((event) => {
        figures.value = event;
        remember(event);
      }),
    [],
  );
  const caller = identity.value;
  const versions = served.value;
  // models come and go, and another caller may have another role
  useEffect(() => void loadModels().catch(showError), [caller, versions]);
  useEffect(() => {
    if (caller) reconnect();
  }, [caller]);
  const title = titleOf(where);
  useEffect(() => {
    document.title = `${title} · Stepwell`;
    if (notice.value?.isError) notice.value = null;
    // readers of the screen continue with the new page
    if (!isFirst.current) {
      main.current?.focus({preventScroll: true});
      scrollTo(0, 0);
    }
    isFirst.current = false;
  }, [title]);
  return (
    <>
      <a class="skip" href="#main" onClick={(event) => (event.preventDefault(), main.current?.focus())}>
        Skip to the page
      </a>
      <header class="top">
        <span class="brand">Stepwell</span>
        <nav aria-label="Pages">
          {PAGES.map(([page, hash, name]) => (
            <a key={page} href={hash} aria-current={isCurrent(where, page) ? "page" : undefined}>
              {name}
            </a>
          ))}
        </nav>
        <div class="tools">
          {hasToken.value && server.value.role === "admin" && <TenantField />}
          {hasToken.value && (
            <button type="button" onClick={() => (forgetToken(), location.reload())}>
              Forget token
            </button>
          )}
          <button type="button" onClick={() => (theme.value = isDark.value ? "light" : "dark")}>
            {isDark.value ? "Light" : "Dark"}
          </button>
        </div>
      </header>
      <Problems />
      <Notice />
      <main id="main" ref={main} tabIndex={-1}>
        <Page key={caller} where={where} />
      </main>
      <Cost />
      <TokenDialog />
    </>
  );
}

function Page({where}: {where: Route}) {
  switch (where.page) {
    case "overview":
      return <OverviewPage />;
    case "sessions":
      return <SessionsPage />;
    case "session":
      return <SessionPage key={where.id} id={where.id} other={where.other} />;
    case "live":
      return <LivePage />;
    case "plane":
      return <PlanePage />;
    case "models":
      return <ModelsPage />;
    case "unknown":
      return (
        <>
          <h1>No such page</h1>
          <p>
            <a href="#/">To the overview</a>
          </p>
        </>
      );
  }
}

/** An admin may act in every tenant. */
function TenantField() {
  const [name, setName] = useState(tenant.value);
  return (
    <form onSubmit={(event) => (event.preventDefault(), actIn(name.trim()))}>
      <label class="inline">
        Tenant
        <input
          size={10}
          placeholder="your own"
          pattern="[!-~]*"
          title="ASCII characters without spaces"
          value={name}
          onInput={(event) => setName(event.currentTarget.value)}
          onBlur={(event) => event.currentTarget.form?.requestSubmit()}
        />
      </label>
    </form>
  );
}

/** A text that changes when other versions are served, or another one is the default. */
const served = computed(() =>
  (figures.value?.models ?? [])
    .map((model) => {
      const versions = model.versions?.map((one) => `${one.version} ${one.state} ${one.labels?.join() ?? ""}`) ?? [];
      return `${model.name} ${model.version} ${versions.join(";")}`;
    })
    .join("\n"),
);

function isCurrent(where: Route, page: string): boolean {
  return where.page === page || (where.page === "session" && page === "sessions");
}

function titleOf(where: Route): string {
  if (where.page === "session") return `Session ${where.id}`;
  return PAGES.find(([page]) => page === where.page)?.[2] ?? "No such page";
}

/** What is wrong now, at the top of every page. */
function Problems() {
  const now = figures.value;
  const lines: [string, string, string][] = [];
  if (watchStatus.value === "lost") lines.push(["bad", "Not connected", watchProblem.value]);
  for (const [subject, reason] of Object.entries(now?.problems ?? {})) lines.push(["bad", subject, reason]);
  for (const [subject, reason] of Object.entries(now?.warnings ?? {})) lines.push(["warn", subject, reason]);
  if (!lines.length) return null;
  return (
    <div class="problems" role="alert" aria-label="Problems">
      {lines.map(([kind, subject, reason]) => (
        <p key={subject} class={kind}>
          <strong>{subject}</strong>
          {reason && `: ${reason}`}
          {subject === "Not connected" && (
            <button type="button" onClick={reconnect}>
              Connect now
            </button>
          )}
        </p>
      ))}
    </div>
  );
}

function Notice() {
  const found = notice.value;
  return (
    <div role="status" aria-live="polite">
      {found && (
        <p class={found.isError ? "notice bad" : "notice good"}>
          {found.text}{" "}
          <button type="button" aria-label="Close the message" onClick={() => (notice.value = null)}>
            Close
          </button>
        </p>
      )}
    </div>
  );
}

/** What the page's watching costs: its one stream. */
function Cost() {
  const cost = watchCost.value;
  const status = {off: "off", connecting: "connecting", live: "live", lost: "lost"}[watchStatus.value];
  return (
    <footer class="cost" aria-label="What this page's watching costs">
      Stream {status}: {cost.sessions === 1 ? "1 session" : `${count(cost.sessions)} sessions`} watched, {cost.eventsPerSecond.toFixed(1)} events/s,{" "}
      {bytes(cost.bytesPerSecond)}/s from the server, about {measure(cost.eventsPerSecond * EVENT_SECONDS * 100)} % of one
      of its processors
    </footer>
  );
}
