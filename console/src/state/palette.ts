/** Colours of the drawings. Blue and orange differ for every kind of colour blindness, in dark and in light. */

type Rgb = readonly [number, number, number];

/** From the least value to zero to the greatest: the middle is near the page's background, the ends stand out. */
const STOPS: Record<"light" | "dark", readonly Rgb[]> = {
  light: [
    [8, 48, 107],
    [33, 113, 181],
    [150, 197, 230],
    [247, 247, 247],
    [253, 184, 99],
    [209, 94, 10],
    [110, 40, 4],
  ],
  dark: [
    [190, 226, 255],
    [78, 160, 240],
    [26, 78, 140],
    [28, 31, 36],
    [140, 74, 14],
    [240, 140, 40],
    [255, 224, 170],
  ],
};
const MISSING: Record<"light" | "dark", Rgb> = {light: [190, 190, 190], dark: [92, 96, 102]};

export const LEVELS = 513;

/** Colours as pixels of an ImageData read as Uint32 on a little-endian machine; the last one is for missing values. */
export function pixels(isDark: boolean): Uint32Array {
  const theme = isDark ? "dark" : "light";
  const stops = STOPS[theme];
  const found = new Uint32Array(LEVELS + 1);
  for (let level = 0; level < LEVELS; level++) {
    const place = (level / (LEVELS - 1)) * (stops.length - 1);
    const at = Math.min(stops.length - 2, Math.floor(place));
    const [low, high] = [stops[at] as Rgb, stops[at + 1] as Rgb];
    const mixed = low.map((each, i) => Math.round(each + ((high[i] as number) - each) * (place - at)));
    found[level] = packed(mixed as unknown as Rgb);
  }
  found[LEVELS] = packed(MISSING[theme]);
  return found;
}

function packed([red, green, blue]: Rgb): number {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

/** The level of a value: 0 at -limit, the middle at 0, the last at limit; LEVELS for NaN. */
export function levelOf(value: number, limit: number): number {
  if (Number.isNaN(value)) return LEVELS;
  const level = Math.round(((value / limit + 1) / 2) * (LEVELS - 1));
  return level < 0 ? 0 : level >= LEVELS ? LEVELS - 1 : level;
}

/** The least of 1, 2, 5, 10, 20, ... (and 0.5, 0.2, 0.1, ...) that a value does not exceed, so that it rarely changes. */
export function roundLimit(value: number): number {
  if (!(value > 0) || !Number.isFinite(value)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  const found = [1, 2, 5, 10].find((each) => each * power >= value * (1 - 1e-6)) ?? 10;
  return Number((found * power).toPrecision(1));
}

/** Okabe and Ito's colours, adjusted to either background: 3:1 at least. The last one is for the rest. */
export const CATEGORIES: Record<"light" | "dark", readonly string[]> = {
  light: ["#0072b2", "#c25700", "#00805b", "#a8518a", "#8a6d00", "#2b7fae", "#6b6f76"],
  dark: ["#56b4e9", "#ff9d3b", "#2fc798", "#e59ac8", "#f0e442", "#8fb7ff", "#9aa2ad"],
};
/** Marks differ too: a colour alone should not carry a meaning. */
export const SHAPES = ["circle", "square", "triangle", "diamond", "cross", "bar", "dot"] as const;
export type Shape = (typeof SHAPES)[number];

export function colours(isDark: boolean): readonly string[] {
  return CATEGORIES[isDark ? "dark" : "light"];
}

/** A number for people: at most four significant digits. */
export function digits(value: number): string {
  if (Number.isNaN(value)) return "missing";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}
