/** Numbers for people. No DOM. */

/** Return a count such as 12,345. */
export function count(value: number | string | undefined): string {
  return Number(value ?? 0).toLocaleString("en-US", {maximumFractionDigits: 0});
}

/** Return a rate or another measured number with three digits. */
export function measure(value: number | undefined): string {
  if (value === undefined) return "–";
  if (value === 0) return "0";
  const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return value.toLocaleString("en-US", {maximumFractionDigits: digits});
}

/** Return an element of a tensor, with four digits. */
export function figure(value: number): string {
  return String(Number(value.toPrecision(4)));
}

/** Return a time such as 1.2 ms. */
export function seconds(value: number | undefined): string {
  if (value === undefined) return "–";
  if (value < 0.001) return `${measure(value * 1e6)} µs`;
  if (value < 1) return `${measure(value * 1e3)} ms`;
  if (value < 120) return `${measure(value)} s`;
  if (value < 7200) return `${measure(value / 60)} min`;
  if (value < 172_800) return `${measure(value / 3600)} h`;
  return `${measure(value / 86_400)} days`;
}

/** Return a size such as 1.2 MiB. */
export function bytes(value: number | string | undefined): string {
  let rest = Number(value ?? 0);
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (rest < 1024) return `${measure(rest)} ${unit}`;
    rest /= 1024;
  }
  return `${measure(rest)} TiB`;
}

/** Return how long ago a time of the protocol was. */
export function ago(time: string | undefined, now = Date.now()): string {
  if (!time) return "–";
  return `${seconds(Math.max(0, now - Date.parse(time)) / 1000)} ago`;
}
