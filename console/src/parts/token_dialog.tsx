/** Asks for a token at the first call that needs one. */
import {useEffect, useRef, useState} from "preact/hooks";
import {tokenRequest} from "../api.ts";

export function TokenDialog() {
  const request = tokenRequest.value;
  const dialog = useRef<HTMLDialogElement>(null);
  const [token, setToken] = useState("");
  useEffect(() => {
    if (request) dialog.current?.showModal();
    else dialog.current?.close();
  }, [request]);
  return (
    <dialog ref={dialog} aria-labelledby="token-title" onCancel={() => request?.cancel()}>
      {request && (
        <form
          method="dialog"
          onSubmit={(event) => {
            event.preventDefault();
            setToken("");
            request.give(token.trim());
          }}
        >
          <h2 id="token-title">This server needs a token</h2>
          {request.problem && <p class="bad">{request.problem}</p>}
          <p class="muted">The page keeps it in memory only: a reload forgets it.</p>
          <label>
            Token
            <input
              type="password"
              autocomplete="off"
              required
              value={token}
              onInput={(event) => setToken(event.currentTarget.value)}
            />
          </label>
          <div class="buttons">
            <button type="button" onClick={() => request.cancel()}>
              Cancel
            </button>
            <button type="submit" class="primary">
              Use token
            </button>
          </div>
        </form>
      )}
    </dialog>
  );
}
