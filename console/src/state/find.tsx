/** Finds the sampled sessions that are now in a state like a selected part of the strip. */

import {useSignal} from "@preact/signals";
import {sessionHash} from "../route.ts";
import {showError} from "../store.ts";
import {count} from "../units.ts";
import type {Choices, Live} from "./live.ts";
import {type Match, matches, patternOf} from "./data/match.ts";
import {digits} from "./palette.ts";
import {chosen, present, sampled, sourceText} from "./data/sample.ts";

const SIZES = [50, 200, 1000];
const SHOWN = 20;

interface Result {
  found: Match[];
  size: number;
  among: number;
  total: number;
  text: string;
}

export function Find({id, live, choices}: {id: string; live: Live; choices: Choices}) {
  const size = useSignal(200);
  const result = useSignal<Result | null>(null);
  const isBusy = useSignal(false);
  const reel = live.reel(id);
  const range = choices.range.value;

  async function find(): Promise<void> {
    const view = choices.view(reel);
    if (!view || !range) return;
    const units = [...choices.order.value.slice(range.top, range.bottom)];
    const pattern = patternOf(view, units, reel.at(range.first - 1) + 1, reel.at(range.last) + 1);
    if (!pattern) return;
    isBusy.value = true;
    try {
      const choice = await chosen(reel.model, "", size.value);
      const states = await present(choice.sessions.map(({session_id}) => session_id));
      const sample = sampled(states, pattern.tensor).filter((each) => each.id !== id);
      result.value = {
        found: matches(pattern, sample),
        size: sample.length,
        among: choice.among,
        total: choice.total,
        text:
          `${units.length} units of ${pattern.tensor}, revisions ${range.first} to ${range.last}: like it is a state ` +
          `no further than ${digits(pattern.radius)} from its mean`,
      };
    } catch (error) {
      showError(error);
    } finally {
      isBusy.value = false;
    }
  }

  const found = result.value;
  return (
    <section aria-label="Sessions in a selected state">
      <h3>Who is in this state now?</h3>
      <div class="row">
        <label>
          Sessions to sample
          <select value={size.value} onChange={(event) => (size.value = Number(event.currentTarget.value))}>
            {SIZES.map((each) => (
              <option key={each} value={each}>
                {each}
              </option>
            ))}
          </select>
        </label>
        <button type="button" disabled={!range || isBusy.value} onClick={() => void find()}>
          Find sessions in the selected state
        </button>
        <p class="muted" role="status">
          {isBusy.value ? "Reading states…" : range ? selected(choices) : "Drag on the strip to select a range first."}
        </p>
      </div>
      {found && (
        <>
          <p role="status">
            {count(found.found.filter(({isLike}) => isLike).length)} of {count(found.size)} sampled sessions are in such a
            state. {found.text}. The sample is random, from {sourceText(found)}.
          </p>
          {found.found.length > 0 && <Matches found={found.found.slice(0, SHOWN)} />}
        </>
      )}
    </section>
  );
}

function selected(choices: Choices): string {
  const range = choices.range.value;
  if (!range) return "";
  return `Selected: revisions ${range.first} to ${range.last}, ${range.bottom - range.top} units.`;
}

function Matches({found}: {found: Match[]}) {
  return (
    <div class="scroll">
      <table>
        <caption>The nearest first, {found.length} at most.</caption>
        <thead>
          <tr>
            <th scope="col">Session</th>
            <th scope="col" class="number">
              Distance
            </th>
            <th scope="col">In such a state</th>
            <th scope="col" class="number">
              Revision
            </th>
            <th scope="col" class="number">
              Position
            </th>
            <th scope="col" class="number">
              Row
            </th>
          </tr>
        </thead>
        <tbody>
          {found.map((match) => (
            <tr key={match.id}>
              <td>
                <a class="id" href={sessionHash(match.id)}>
                  {match.id}
                </a>
              </td>
              <td class="number">{digits(match.distance)}</td>
              <td>{match.isLike ? "yes" : "no"}</td>
              <td class="number">{match.revision}</td>
              <td class="number">{match.position}</td>
              <td class="number">{match.row}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
