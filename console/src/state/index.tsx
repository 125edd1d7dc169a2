/** The hidden state, drawn: what the pages show of it. */
import "./state.css";

export {Choices, Live} from "./live.ts";
export {Plane} from "./plane_view.tsx";
export {SessionState, type SessionStateProps} from "./session.tsx";
export {Readout, Strip, STRIP_KEYS} from "./strip_view.tsx";
