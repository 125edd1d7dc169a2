/** Draws points on a plane, each group with a colour and a shape of its own. */

import {SHAPES} from "./palette.ts";

export interface Point {
  id: string;
  x: number;
  y: number;
  group: number;
}

export interface Bounds {
  x0: number;
  x1: number;
  y0: number;
  y1: number;
}

const MARGIN = 16;
const RADIUS = 4.5;
const HIT_PIXELS = 12;

/** What all points lie in, with room around them. Bounds that still fit stay, so that the drawing does not jump. */
export function boundsOf(points: readonly Point[], old: Bounds | null): Bounds | null {
  if (!points.length) return old;
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const {x, y} of points) {
    [x0, x1] = [Math.min(x0, x), Math.max(x1, x)];
    [y0, y1] = [Math.min(y0, y), Math.max(y1, y)];
  }
  const fits = old && x0 >= old.x0 && x1 <= old.x1 && y0 >= old.y0 && y1 <= old.y1;
  // Half the width or less would waste the drawing.
  const uses = old && Math.max((x1 - x0) / (old.x1 - old.x0), (y1 - y0) / (old.y1 - old.y0)) > 0.5;
  if (old && fits && uses) return old;
  const size = Math.max(x1 - x0, y1 - y0, 1e-6);
  const room = 0.15 * size;
  return {x0: x0 - room, x1: x1 + room, y0: y0 - room, y1: y1 + room};
}

/** Pixels of one unit of the plane, the same across and up, and where the bounds begin. */
function scaling(bounds: Bounds, width: number, height: number): {scale: number; left: number; top: number} {
  const [wide, tall] = [bounds.x1 - bounds.x0, bounds.y1 - bounds.y0];
  const scale = Math.min((width - 2 * MARGIN) / wide, (height - 2 * MARGIN) / tall);
  return {scale, left: (width - scale * wide) / 2, top: (height - scale * tall) / 2};
}

function scaled(bounds: Bounds, width: number, height: number, x: number, y: number): [number, number] {
  const {scale, left, top} = scaling(bounds, width, height);
  return [left + (x - bounds.x0) * scale, top + (bounds.y1 - y) * scale];
}

/** The place on the plane of a place on the canvas, in CSS pixels. */
export function unscaled(bounds: Bounds, width: number, height: number, place: {x: number; y: number}): {x: number; y: number} {
  const {scale, left, top} = scaling(bounds, width, height);
  return {x: bounds.x0 + (place.x - left) / scale, y: bounds.y1 - (place.y - top) / scale};
}

/** The point nearest to a place, if it is near. */
export function hit(points: readonly Point[], bounds: Bounds, width: number, height: number, place: {x: number; y: number}): Point | null {
  let found: Point | null = null;
  let nearest = HIT_PIXELS;
  for (const point of points) {
    const [x, y] = scaled(bounds, width, height, point.x, point.y);
    const distance = Math.hypot(x - place.x, y - place.y);
    if (distance > nearest) continue;
    nearest = distance;
    found = point;
  }
  return found;
}

export interface Scatter {
  points: readonly Point[];
  bounds: Bounds | null;
  colours: readonly string[];
  isDark: boolean;
  /** x and y in turn. */
  path: readonly number[];
  /** IDs to draw with a ring. */
  marked: readonly string[];
  area: Bounds | null;
  width: number;
  height: number;
  ratio: number;
}

export function scatter(canvas: HTMLCanvasElement, drawing: Scatter): void {
  const {points, bounds, width, height, ratio, path, area} = drawing;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== h) canvas.height = h;
  const context = canvas.getContext("2d");
  if (!context) return;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  if (!bounds) return;
  const ink = drawing.isDark ? "#e6eaef" : "#16191d";
  for (const point of points) {
    const [x, y] = scaled(bounds, width, height, point.x, point.y);
    context.fillStyle = drawing.colours[point.group] ?? ink;
    outline(context, point.group, x, y);
    context.fill();
  }
  if (path.length > 2) {
    context.strokeStyle = ink;
    context.lineWidth = 1.5;
    context.beginPath();
    for (let at = 0; at + 1 < path.length; at += 2) {
      const [x, y] = scaled(bounds, width, height, path[at] as number, path[at + 1] as number);
      if (at) context.lineTo(x, y);
      else context.moveTo(x, y);
    }
    context.stroke();
  }
  context.strokeStyle = ink;
  context.lineWidth = 2;
  for (const point of points) {
    if (!drawing.marked.includes(point.id)) continue;
    const [x, y] = scaled(bounds, width, height, point.x, point.y);
    context.beginPath();
    context.arc(x, y, RADIUS + 3, 0, 2 * Math.PI);
    context.stroke();
  }
  if (area) {
    const [x0, y0] = scaled(bounds, width, height, area.x0, area.y1);
    const [x1, y1] = scaled(bounds, width, height, area.x1, area.y0);
    context.setLineDash([4, 3]);
    context.lineWidth = 1;
    context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    context.setLineDash([]);
  }
}

function outline(context: CanvasRenderingContext2D, group: number, x: number, y: number): void {
  context.beginPath();
  const r = RADIUS;
  switch (SHAPES[group]) {
    case "square":
      context.rect(x - 4, y - 4, 8, 8);
      break;
    case "triangle":
      context.moveTo(x, y - r);
      context.lineTo(x + r, y + r);
      context.lineTo(x - r, y + r);
      break;
    case "diamond":
      context.moveTo(x, y - r - 1);
      context.lineTo(x + r + 1, y);
      context.lineTo(x, y + r + 1);
      context.lineTo(x - r - 1, y);
      break;
    case "cross":
      context.rect(x - 1.5, y - r, 3, 2 * r);
      context.rect(x - r, y - 1.5, 2 * r, 3);
      break;
    case "bar":
      context.rect(x - r, y - 2, 2 * r, 4);
      break;
    case "dot":
      context.arc(x, y, 2.5, 0, 2 * Math.PI);
      break;
    default:
      context.arc(x, y, r, 0, 2 * Math.PI);
  }
}
