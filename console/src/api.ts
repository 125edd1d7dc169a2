/** Calls of the server's public JSON. The token stays in this module's memory: a reload of the page forgets it. */
import {signal} from "@preact/signals";

/** An error of the server, or of the way to it (reason UNREACHABLE). */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly reason: string,
    readonly httpStatus: number,
  ) {
    super(message);
  }
}

export interface TokenRequest {
  /** Why the last token was refused; empty: the server only asks for one. */
  problem: string;
  give: (token: string) => void;
  cancel: () => void;
}

/** Set while the server asks for a token: the shell shows a dialog. */
export const tokenRequest = signal<TokenRequest | null>(null);
/** Whether a token is held. */
export const hasToken = signal(false);
/** The tenant that an admin acts in; empty: the caller's own. */
export const tenant = signal("");
/** Counts the changes of token and tenant: everything that was read before is of another caller. */
export const identity = signal(0);

let token = "";
let asking: Promise<void> | null = null;

export function forgetToken(): void {
  token = "";
  hasToken.value = false;
}

function headers(): Record<string, string> {
  const found: Record<string, string> = {"content-type": "application/json"};
  if (token) found["authorization"] = `Bearer ${token}`;
  // a header has no characters beyond ASCII
  if (tenant.value) found["stepwell-tenant"] = tenant.value;
  return found;
}

/** Ask for a token, once for all callers that need one. */
function askForToken(problem: string): Promise<void> {
  asking ??= new Promise<void>((resolve, reject) => {
    const close = () => {
      asking = null;
      tokenRequest.value = null;
    };
    tokenRequest.value = {
      problem,
      give: (given) => {
        const isOther = token !== "";
        token = given;
        hasToken.value = true;
        close();
        if (isOther) identity.value += 1;
        resolve();
      },
      cancel: () => {
        token = "";
        hasToken.value = false;
        close();
        reject(new ApiError("the server needs a token", "UNAUTHENTICATED", 401));
      },
    };
  });
  return asking;
}

/** Act in another tenant, as an admin. Empty: the caller's own. */
export function actIn(name: string): void {
  if (name === tenant.value) return;
  tenant.value = name;
  identity.value += 1;
}

/** Return the address of a path such as "v1/models", beside the page. */
export function address(path: string): string {
  return new URL(path, document.baseURI).href;
}

/** Send a request; ask for a token where the server wants one. */
export async function send(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<Response> {
  for (;;) {
    const sent = token;
    let response: Response;
    try {
      response = await fetch(address(path), {
        method,
        headers: headers(),
        credentials: "omit",
        cache: "no-store",
        ...(body === undefined ? {} : {body: JSON.stringify(body)}),
        ...(signal ? {signal} : {}),
      });
    } catch (error) {
      if (error instanceof DOMException && error.name === "AbortError") throw error;
      throw new ApiError("the server cannot be reached", "UNREACHABLE", 0);
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401) throw error;
    // another call may have asked for a token meanwhile
    if (sent === token) await askForToken(sent ? error.message : "");
  }
}

/** Call a method of the server, and return its answer. */
export async function call<Answer>(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<Answer> {
  const response = await send(method, path, body, signal);
  return (await response.json()) as Answer;
}

async function errorOf(response: Response): Promise<ApiError> {
  try {
    const found = (await response.json()) as {message?: string; details?: {reason?: string}[]};
    const reason = found.details?.find((detail) => detail.reason)?.reason ?? "";
    return new ApiError(found.message ?? response.statusText, reason, response.status);
  } catch {
    return new ApiError(`HTTP ${response.status}`, "", response.status);
  }
}

/** Return the path of a session or of a method of it: ":step", "/state". */
export function sessionPath(id: string, rest = ""): string {
  return `v1/sessions/${encodeURIComponent(id)}${rest}`;
}

/** Return the path of a model or of a method of it: ":load". */
export function modelPath(name: string, rest = ""): string {
  return `v1/models/${encodeURIComponent(name)}${rest}`;
}
