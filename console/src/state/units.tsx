/** The chosen units: their traces, their distributions, how often they saturate. */

import {useComputed} from "@preact/signals";
import {Lines, type LinesData} from "./lines.tsx";
import {type Choices, type Live, MAX_PINNED} from "./live.ts";
import {digits} from "./palette.ts";
import {type Distribution, distribution, isBounded, SATURATED, saturation, trace} from "./data/stats.ts";

export function Units({id, live, choices}: {id: string; live: Live; choices: Choices}) {
  const reel = live.reel(id);
  const data = useComputed((): LinesData => {
    void live.tick.value;
    const view = choices.view(reel);
    if (!view) return {x: [], lines: []};
    const {from, to} = choices.window(reel);
    const traces = choices.pinned.value.map((unit) => ({unit, ...trace(view, unit, from, to)}));
    return {
      x: traces[0]?.revisions ?? [],
      lines: traces.map(({unit, values}) => ({name: `unit ${unit}`, values})),
    };
  });
  return (
    <section aria-label="Units">
      <h3>Units</h3>
      <Lines data={data} label={`Traces of the chosen units of session ${id}`} xName="revision" />
      <Table id={id} live={live} choices={choices} />
    </section>
  );
}

function Table({id, live, choices}: {id: string; live: Live; choices: Choices}) {
  // Once a second: these are sums over all columns.
  void live.second.value;
  const reel = live.reel(id);
  const view = choices.view(reel);
  if (!view || !reel.length) return null;
  const range = choices.range.value;
  const from = range ? Math.max(reel.first, reel.at(range.first - 1) + 1) : reel.first;
  const to = range ? reel.at(range.last) + 1 : reel.end;
  const bounded = isBounded(view);
  return (
    <>
      <p class="muted">
        {range ? `Revisions ${range.first} to ${range.last}` : `All ${reel.length} changes that the page holds`}. Click the
        strip, or press Enter there, to choose up to {MAX_PINNED} units.{" "}
        {bounded
          ? `A value is saturated beyond ±${SATURATED}.`
          : "This state has no bounds, so it cannot saturate: a cell state, or values beyond ±1."}
      </p>
      <div class="scroll" role="group" aria-label="Chosen units, scrollable" tabIndex={0}>
        <table aria-label="Chosen units">
          <thead>
            <tr>
              <th scope="col">Unit</th>
              <th scope="col" class="number">
                Now
              </th>
              <th scope="col" class="number">
                Mean ± deviation
              </th>
              <th scope="col">Distribution</th>
              <th scope="col" class="number">
                Saturated
              </th>
              <th scope="col">
                <span class="hidden">Remove</span>
              </th>
            </tr>
          </thead>
          <tbody>
            {choices.pinned.value.map((unit) => {
              const found = distribution(view, unit, 32, from, to);
              const share = bounded ? saturation(view, unit, from, to) : null;
              return (
                <tr key={unit}>
                  <th scope="row">{unit}</th>
                  <td class="number">{digits(view.value(reel.end - 1, unit))}</td>
                  <td class="number">{found ? `${digits(found.mean)} ± ${digits(found.deviation)}` : "–"}</td>
                  <td>{found && <Bars unit={unit} found={found} />}</td>
                  <td class="number">{share === null ? "–" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`}</td>
                  <td>
                    <button
                      type="button"
                      aria-label={`Remove unit ${unit}`}
                      disabled={choices.pinned.value.length === 1}
                      onClick={() => choices.pin(unit)}
                    >
                      ×
                    </button>
                  </td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
    </>
  );
}

function Bars({unit, found}: {unit: number; found: Distribution}) {
  const {counts, low, high} = found;
  const greatest = Math.max(...counts);
  return (
    <span class="bars">
      {digits(low)}{" "}
      <svg
        role="img"
        aria-label={`Distribution of unit ${unit}: ${found.count} values from ${digits(low)} to ${digits(high)}`}
        viewBox={`0 0 ${counts.length} 24`}
        preserveAspectRatio="none"
        width="128"
        height="24"
      >
        {counts.map((count, i) => {
          const height = (24 * count) / greatest;
          return <rect key={i} x={i + 0.05} y={24 - height} width={0.9} height={height} fill="currentColor" />;
        })}
      </svg>{" "}
      {digits(high)}
    </span>
  );
}
