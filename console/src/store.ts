/** What all pages share: models, the server, its figures. */
import {signal} from "@preact/signals";
import {ApiError, call} from "./api.ts";
import type {Model, ServerEvent, ServerIdentity} from "./types.ts";

export const models = signal<Model[]>([]);
export const server = signal<ServerIdentity>({});
/** The newest figures; null: none have come. */
export const figures = signal<ServerEvent | null>(null);
/** A message at the top of the page, for people. */
export const notice = signal<{text: string; isError: boolean} | null>(null);

let asked = 0;
let shown = 0;

/** Read the models again. An answer that comes after that of a later call is dropped: it is older. */
export async function loadModels(): Promise<void> {
  const own = ++asked;
  const found = await call<{models?: Model[]; server?: ServerIdentity}>("GET", "v1/models");
  if (own < shown) return;
  shown = own;
  models.value = found.models ?? [];
  server.value = found.server ?? {};
}

/** Show an error at the top of the page. */
export function showError(error: unknown): void {
  if (error instanceof DOMException && error.name === "AbortError") return;
  const text = error instanceof Error ? error.message : String(error);
  const reason = error instanceof ApiError && error.reason ? ` (${error.reason})` : "";
  notice.value = {text: text + reason, isError: true};
}

export function showDone(text: string): void {
  notice.value = {text, isError: false};
}
