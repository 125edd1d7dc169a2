/** Lines over revisions or positions: uPlot, in the page's colours. */

import {useSignalEffect, type ReadonlySignal} from "@preact/signals";
import {useEffect, useRef} from "preact/hooks";
import uPlot from "uplot";
import {isDark} from "../theme.ts";
import {colours, digits} from "./palette.ts";

export interface Line {
  name: string;
  values: (number | null)[];
  /** Whether it has the axis on the right. */
  isRight?: boolean;
}

export interface LinesData {
  x: number[];
  lines: Line[];
}

const INTERVAL_MS = 100;
const HEIGHT = 200;

/** Draws the data again when it changes, ten times a second at most. */
export function Lines({data, label, xName}: {data: ReadonlySignal<LinesData>; label: string; xName: string}) {
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<{chart: uPlot; key: string} | null>(null);
  const timer = useRef<ReturnType<typeof setTimeout> | undefined>(undefined);
  const drawn = useRef(0);

  function draw(): void {
    timer.current = undefined;
    drawn.current = performance.now();
    const {x, lines} = data.peek();
    const element = box.current;
    if (!element?.clientWidth) return;
    const key = JSON.stringify([isDark.peek(), lines.map(({name, isRight}) => [name, isRight])]);
    const content = [x, ...lines.map(({values}) => values)] as uPlot.AlignedData;
    if (plot.current?.key !== key) {
      plot.current?.chart.destroy();
      plot.current = {chart: new uPlot(options(lines, xName, element.clientWidth), content, element), key};
    } else plot.current.chart.setData(content);
    const latest = lines.map(({name, values}) => `${name} ${digits(lastOf(values))}`);
    element.setAttribute("aria-label", x.length ? `${label}. Last values: ${latest.join(", ")}` : `${label}: no values yet`);
  }

  useSignalEffect(() => {
    void [data.value, isDark.value];
    timer.current ??= setTimeout(draw, Math.max(0, INTERVAL_MS - (performance.now() - drawn.current)));
  });

  useEffect(() => {
    const element = box.current as HTMLDivElement;
    const observer = new ResizeObserver(() => {
      if (plot.current) plot.current.chart.setSize({width: element.clientWidth, height: HEIGHT});
      else draw();
    });
    observer.observe(element);
    return () => {
      observer.disconnect();
      clearTimeout(timer.current);
      plot.current?.chart.destroy();
      plot.current = null;
    };
  }, []);

  return <div ref={box} class="lines" role="img" aria-label={label} />;
}

function lastOf(values: readonly (number | null)[]): number {
  return values.findLast((value) => value !== null) ?? NaN;
}

function options(lines: readonly Line[], xName: string, width: number): uPlot.Options {
  const style = getComputedStyle(document.documentElement);
  const stroke = style.getPropertyValue("color") || (isDark.peek() ? "#e6eaef" : "#16191d");
  const grid = {stroke: isDark.peek() ? "#ffffff1c" : "#0000001c", width: 1};
  const palette = colours(isDark.peek());
  const axis = {stroke, grid, ticks: grid, font: "12px system-ui, sans-serif"};
  const value = (_: unknown, raw: number | null) => (raw === null ? "–" : digits(raw));
  const values = (_: unknown, splits: number[]) => splits.map(digits);
  return {
    width,
    height: HEIGHT,
    scales: {x: {time: false}, right: {auto: true}},
    axes: [
      {...axis, label: xName, labelSize: 18, labelFont: "12px system-ui, sans-serif", values: (_, splits) => splits.map(String)},
      {...axis, size: 56, values},
      ...(lines.some(({isRight}) => isRight) ? [{...axis, size: 56, values, side: 1 as const, scale: "right", grid: {show: false}}] : []),
    ],
    series: [
      {label: xName},
      ...lines.map(({name, isRight}, i) => ({
        label: name,
        stroke: palette[i % palette.length] as string,
        width: 1.5,
        dash: DASHES[Math.floor(i / 2) % DASHES.length] as number[],
        points: {show: false},
        value,
        ...(isRight ? {scale: "right"} : {}),
      })),
    ],
  };
}

/** Lines differ by more than their colour. */
const DASHES: number[][] = [[], [6, 3], [2, 3]];
