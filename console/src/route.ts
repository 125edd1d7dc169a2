/** Where the page is: the part of its address behind the #. */
import {computed, signal} from "@preact/signals";

export type Route =
  | {page: "overview"}
  | {page: "sessions"}
  | {page: "session"; id: string; other: string}
  | {page: "live"}
  | {page: "plane"}
  | {page: "models"}
  | {page: "unknown"};

/** Return the route of a hash such as "#/sessions/sensor-7". */
export function routeOf(hash: string): Route {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const [first = "", second, ...more] = path.split("/");
  if (more.length) return {page: "unknown"};
  if (first === "sessions" && second) {
    try {
      const other = new URLSearchParams(query).get("other") ?? "";
      return {page: "session", id: decodeURIComponent(second), other};
    } catch {
      return {page: "unknown"};
    }
  }
  if (second) return {page: "unknown"};
  switch (first) {
    case "":
      return {page: "overview"};
    case "sessions":
    case "live":
    case "plane":
    case "models":
      return {page: first};
    default:
      return {page: "unknown"};
  }
}

/** Return the hash of a session's page. `other`: a session to compare it with. */
export function sessionHash(id: string, other = ""): string {
  const query = other ? `?${new URLSearchParams({other}).toString()}` : "";
  return `#/sessions/${encodeURIComponent(id)}${query}`;
}

const hash = signal(typeof location === "undefined" ? "" : location.hash);
/** The route of the page. */
export const route = computed(() => routeOf(hash.value));

/** Follow the address. */
export function followAddress(): void {
  addEventListener("hashchange", () => {
    hash.value = location.hash;
  });
}
