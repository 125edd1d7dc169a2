/** Two sessions, such as a session and its fork: where they part, and how far. */

import {useComputed, useSignal} from "@preact/signals";
import {sessionHash} from "../route.ts";
import {Lines, type LinesData} from "./lines.tsx";
import type {Choices, Live} from "./live.ts";
import {digits} from "./palette.ts";
import {type Alignment, distances} from "./data/stats.ts";

interface CompareProps {
  id: string;
  other: string;
  live: Live;
  choices: Choices;
}

export function Distance({id, other, live, choices}: CompareProps) {
  const by = useSignal<Alignment>("revision");
  const found = useComputed(() => {
    // the sentence is read once a second, the first time before the first frame
    void [live.tick.value, live.second.value];
    const here = choices.view(live.reel(id));
    const there = choices.view(live.reel(other));
    return here && there ? distances(here, there, by.value) : null;
  });
  const data = useComputed((): LinesData => {
    const {at = [], euclidean = [], cosine = []} = found.value ?? {};
    return {
      x: at,
      lines: [
        {name: "Euclidean", values: euclidean},
        {name: "cosine", values: cosine.map((each) => (Number.isNaN(each) ? null : each)), isRight: true},
      ],
    };
  });
  void live.second.value;
  const here = choices.view(live.reel(id));
  const there = choices.view(live.reel(other));
  const isOther = here && there && (here.units !== there.units || here.block.name !== there.block.name);
  return (
    <section aria-label="Distance of the two sessions">
      <div class="row">
        <label>
          Align by
          <select value={by.value} onChange={(event) => (by.value = event.currentTarget.value as Alignment)}>
            <option value="revision">Revision: a session and its fork</option>
            <option value="position">Position: time steps since the last reset</option>
          </select>
        </label>
        <p role="status">{isOther ? "The two states have different shapes." : sentence(found.peek(), by.value)}</p>
      </div>
      <Lines data={data} label={`Distance of sessions ${id} and ${other}`} xName={by.value} />
    </section>
  );
}

function sentence(found: ReturnType<typeof distances> | null, by: Alignment): string {
  if (!found?.at.length) return `The page has seen no ${by} of both sessions yet.`;
  const parted = found.euclidean.findIndex((each) => each > 0);
  const now = `Distance at ${by} ${found.at.at(-1)}: ${digits(found.euclidean.at(-1) ?? NaN)} (Euclidean).`;
  if (parted < 0) return `${now} Equal wherever both are known.`;
  return parted === 0 ? now : `${now} Equal up to ${by} ${found.at[parted - 1]}, different from ${found.at[parted]} on.`;
}

/** Chooses the other session. */
export function CompareForm({id, other}: {id: string; other: string}) {
  return (
    <form
      class="row"
      onSubmit={(event) => {
        event.preventDefault();
        const chosen = new FormData(event.currentTarget).get("other");
        location.hash = sessionHash(id, typeof chosen === "string" ? chosen : "");
      }}
    >
      <label>
        Compare with session
        <input name="other" value={other} maxLength={256} autocomplete="off" spellcheck={false} placeholder="ID" />
      </label>
      <button type="submit">Compare</button>
    </form>
  );
}
