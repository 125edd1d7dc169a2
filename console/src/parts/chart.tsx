/** Curves over the last minutes. */
import {useEffect, useRef} from "preact/hooks";
import uPlot from "uplot";
import {isDark} from "../theme.ts";

export interface Curve {
  name: string;
  values: (number | null)[];
}

// told apart by people who confuse colours (Okabe and Ito), and by their dashes
const LIGHT = ["#0060a8", "#b34700", "#00725a", "#8a3a77"];
const DARK = ["#56b4e9", "#e69f00", "#2bd4a5", "#e08cc4"];
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];
const HEIGHT = 150;

function clock(time: number): string {
  return new Date(time * 1000).toTimeString().slice(0, 8);
}

export function Chart(props: {title: string; times: number[]; curves: Curve[]; show: (value: number) => string}) {
  const {title, times, curves, show} = props;
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const data: uPlot.AlignedData = [times, ...curves.map((curve) => curve.values)];
  const newest = useRef(data);
  newest.current = data;
  const dark = isDark.value;
  const names = curves.map((curve) => curve.name).join("\n");
  useEffect(() => {
    const element = place.current!;
    const style = getComputedStyle(element);
    const colours = dark ? DARK : LIGHT;
    const axis = {
      stroke: style.color,
      grid: {stroke: dark ? "#2c333c" : "#e3e7eb", width: 1},
      ticks: {show: false},
      font: `12px ${style.fontFamily}`,
    };
    const made = new uPlot(
      {
        width: element.clientWidth,
        height: HEIGHT,
        legend: {show: false},
        padding: [8, 8, 0, 0],
        cursor: {sync: {key: "overview"}, y: false},
        axes: [{...axis, size: 24, space: 64, values: (_: uPlot, ticks: number[]) => ticks.map(clock)}, {...axis, size: 64, values: (_: uPlot, ticks: number[]) => ticks.map(show)}],
        scales: {y: {range: (_: uPlot, low: number, high: number) => [Math.min(0, low || 0), (high || 0) > 0 ? high * 1.08 : 1]}},
        series: [
          {},
          ...names.split("\n").map((label, index) => ({
            label,
            stroke: colours[index]!,
            dash: DASHES[index]!,
            width: 2,
            points: {show: false},
          })),
        ],
      },
      newest.current,
      element,
    );
    plot.current = made;
    const observer = new ResizeObserver(() => made.setSize({width: element.clientWidth, height: HEIGHT}));
    observer.observe(element);
    return () => {
      observer.disconnect();
      made.destroy();
    };
  }, [dark, names]);
  useEffect(() => plot.current?.setData(data), [times]);
  const last = curves.map((curve) => {
    const value = curve.values.at(-1);
    return {name: curve.name, text: value === undefined || value === null ? "–" : show(value)};
  });
  const label = `${title}, now ${last.map((one) => `${one.name} ${one.text}`).join(", ")}`;
  return (
    <figure class="chart">
      <figcaption>
        <strong>{title}</strong>
        {last.map((one, index) => (
          <span key={one.name} class="key">
            <svg width="18" height="8" aria-hidden="true">
              <line
                x1="0"
                y1="4"
                x2="18"
                y2="4"
                stroke={(dark ? DARK : LIGHT)[index]}
                stroke-width="2"
                stroke-dasharray={DASHES[index]!.join(" ") || undefined}
              />
            </svg>
            {one.name} <b>{one.text}</b>
          </span>
        ))}
      </figcaption>
      <div class="plot" role="img" aria-label={label} ref={place} />
    </figure>
  );
}
