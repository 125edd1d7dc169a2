/** The hidden state, drawn: what the pages show of it. */
import type {Model} from "../types.ts";

export interface SessionStateProps {
  id: string;
  /** A session to compare it with; empty: none. */
  other: string;
  model: Model;
}

/** The state of a session over its revisions, while it is watched. */
export function SessionState(props: SessionStateProps) {
  return <p class="muted">The states of {props.model.name} will be drawn here.</p>;
}

/** Many sessions' states on a plane. */
export function Plane() {
  return <p class="muted">The plane will be drawn here.</p>;
}
