/** The server as a whole. */
import {figures} from "../store.ts";
import {count, measure} from "../units.ts";

export function OverviewPage() {
  const now = figures.value?.server;
  return (
    <>
      <h1>Overview</h1>
      <dl class="facts">
        <div>
          <dt>Steps per second</dt>
          <dd>{measure(now?.row_steps_per_second ?? 0)}</dd>
        </div>
        <div>
          <dt>Sessions</dt>
          <dd>{count(now?.sessions)}</dd>
        </div>
      </dl>
    </>
  );
}
