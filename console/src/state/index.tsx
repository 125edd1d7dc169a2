/** The hidden state, drawn: what the pages show of it. */
import "./state.css";

export {Plane} from "./plane_view.tsx";
export {SessionState, type SessionStateProps} from "./session.tsx";
