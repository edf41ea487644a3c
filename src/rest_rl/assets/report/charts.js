// Curves as SVG. All charts mark the same step: the one under the pointer, or else that of the slider.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 150, LEFT = 44, RIGHT = 10, TOP = 8, BOTTOM = 20;
const drawn = [];
let smoothing = 1, pointed = null;

function draw(tag, attributes, parent) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent?.append(element);
  return element;
}

// Centred running mean; windows are shorter at both ends.
function smoothed(values) {
  const half = Math.floor(smoothing / 2);
  if (!half) return values;
  const sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, i) => {
    const from = Math.max(0, i - half), to = Math.min(values.length, i + half + 1);
    return (sums[to] - sums[from]) / (to - from);
  });
}

function niceTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough) ?? 10 * power;
  const ticks = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + 1e-9 * step; at += 1) ticks.push(at * step);
  return ticks;
}

const tickText = (value, unit) => (unit === "%" ? String(+(100 * value).toPrecision(4)) : Math.abs(value) >= 10000 || (value && Math.abs(value) < 0.001) ? value.toExponential(0) : String(+value.toPrecision(4)));

// The color and the name of a line.
function lineOf(chart, series) {
  if (chart.kind === "region") return { color: data.regions[series.region], name: series.region };
  return { color: data.series[series.group % data.series.length], name: data.groups[series.group] };
}

const seriesOf = (chart) => (chart.kind === "region" ? chart.series.filter((series) => series.group === state.group) : chart.series);

function addChart(chart, parent) {
  const legend = make("div", { className: "legend" });
  const holder = make("div", { className: "plot" });
  const figure = make("figure", {}, make("figcaption", {}, make("b", {}, chart.title), chart.unit ? make("span", { className: "faint" }, ` ${chart.unit}`) : null), holder, legend);
  parent.append(figure);
  const one = { chart, holder, legend, width: 0 };
  drawn.push(one);
  holder.addEventListener("pointermove", (event) => pointAt(stepUnder(one, event)));
  holder.addEventListener("pointerleave", () => pointAt(null));
  holder.addEventListener("click", (event) => setStep(stepUnder(one, event)));
  redraw(one);
  new ResizeObserver(() => {
    if (holder.clientWidth && holder.clientWidth !== one.width) redraw(one);
  }).observe(holder);
}

function stepUnder(one, event) {
  const x = event.clientX - one.holder.getBoundingClientRect().left;
  const share = (x - LEFT) / (one.width - LEFT - RIGHT);
  return Math.round(one.x0 + Math.min(1, Math.max(0, share)) * (one.x1 - one.x0));
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

function redraw(one) {
  const { chart, holder } = one;
  const lines = seriesOf(chart);
  one.width = holder.clientWidth;
  holder.replaceChildren();
  one.marker = null;
  if (!lines.length || !one.width) return markChart(one);
  const ys = lines.flatMap((line) => [line.y, line.low ?? [], line.high ?? []].map(extent).filter(([low]) => low < Infinity));
  let [y0, y1] = [Math.min(...ys.map(([low]) => low)), Math.max(...ys.map(([, high]) => high))];
  if (y0 > 0 && y0 < 0.6 * y1) y0 = 0;
  if (chart.unit === "%") [y0, y1] = [Math.max(0, y0), Math.min(1, y1)];
  if (y1 - y0 < 1e-12) [y0, y1] = y0 === 0 ? [0, 1] : [y0 - 0.5 * Math.abs(y0), y1 + 0.5 * Math.abs(y1)];
  const pad = 0.04 * (y1 - y0);
  [y0, y1] = [y0 === 0 ? 0 : y0 - pad, y1 + pad];
  one.x0 = 0;
  one.x1 = Math.max(lastStep, ...lines.map((line) => line.x[line.x.length - 1]));
  one.toX = (step) => LEFT + ((step - one.x0) / (one.x1 - one.x0 || 1)) * (one.width - LEFT - RIGHT);
  one.toY = (value) => TOP + (1 - (value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const last = lines.map((line) => `${lineOf(chart, line).name} ${shown(line.y[placeOf(chart, line, null)], chart.unit)}`).join(", ");
  const svg = draw("svg", { width: one.width, height: HEIGHT, role: "img", "aria-label": `${chart.title}, at the end: ${last}` }, holder);
  axes(one, svg, y0, y1);
  for (const line of lines) drawLine(one, svg, line);
  one.marker = draw("line", { class: "marker", y1: TOP, y2: HEIGHT - BOTTOM }, svg);
  one.points = draw("g", {}, svg);
  return markChart(one);
}

function axes(one, svg, y0, y1) {
  for (const value of niceTicks(y0, y1, 4)) {
    draw("line", { class: "grid", x1: LEFT, x2: one.width - RIGHT, y1: one.toY(value), y2: one.toY(value) }, svg);
    draw("text", { class: "tick", x: LEFT - 6, y: one.toY(value) + 3.5, "text-anchor": "end" }, svg).textContent = tickText(value, one.chart.unit);
  }
  for (const step of niceTicks(one.x0, one.x1, 5)) {
    draw("text", { class: "tick", x: one.toX(step), y: HEIGHT - 5, "text-anchor": "middle" }, svg).textContent = tickText(step, "");
  }
}

// The line breaks where steps between two points have no value.
function pathOf(one, xs, ys) {
  const gaps = xs.slice(1).map((x, i) => x - xs[i]).sort((a, b) => a - b);
  const longest = 3 * (gaps[Math.floor(gaps.length / 2)] ?? 1);
  return xs.map((x, i) => `${i && x - xs[i - 1] <= longest ? "L" : "M"}${one.toX(x).toFixed(1)} ${one.toY(ys[i]).toFixed(1)}`).join("");
}

function drawLine(one, svg, line) {
  const { color } = lineOf(one.chart, line);
  if (line.low) {
    const back = line.x.map((x, i) => `L${one.toX(x).toFixed(1)} ${one.toY(line.low[i]).toFixed(1)}`).reverse().join("");
    const there = line.x.map((x, i) => `${i ? "L" : "M"}${one.toX(x).toFixed(1)} ${one.toY(line.high[i]).toFixed(1)}`).join("");
    draw("path", { d: `${there}${back}Z`, fill: color, "fill-opacity": 0.15 }, svg);
  }
  const isSmooth = smoothing > 1 && !one.chart.dots && line.y.length > 2;
  if (isSmooth) draw("path", { d: pathOf(one, line.x, line.y), stroke: color, "stroke-opacity": 0.25, class: "raw" }, svg);
  draw("path", { d: pathOf(one, line.x, isSmooth ? smoothed(line.y) : line.y), stroke: color, class: "curve" }, svg);
  if (one.chart.dots || line.x.length < 3) {
    line.x.forEach((x, i) => draw("circle", { cx: one.toX(x), cy: one.toY(line.y[i]), r: 2.6, fill: color }, svg));
  }
}

// The point of a line nearest to a step.
function nearest(xs, step) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= step) low = middle;
    else high = middle;
  }
  return Math.abs(xs[high] - step) < Math.abs(xs[low] - step) ? high : low;
}

// The usual number of steps between points of a line; the first point counts from step 0.
function gapOf(line) {
  line.gap ??= line.x.map((x, i) => x - (line.x[i - 1] ?? 0)).sort((a, b) => a - b)[Math.floor(line.x.length / 2)];
  return line.gap;
}

// The index of a line's point at a step, or at the end of its runs (null); -1 where the line has no point but the chart does.
function placeOf(chart, line, step) {
  const sought = step ?? Math.max(...data.runs.filter((run) => run.group === line.group).map((run) => run.steps));
  const gap = Math.min(...chart.series.filter((other) => other.group === line.group).map(gapOf));
  const at = nearest(line.x, sought);
  return Math.abs(line.x[at] - sought) < Math.max(2, gap) ? at : -1;
}

function markChart(one) {
  const step = pointed ?? state.step;
  const lines = seriesOf(one.chart);
  const entries = lines.map((line) => {
    const { color, name } = lineOf(one.chart, line);
    const at = placeOf(one.chart, line, step);
    const key = make("span", { className: "key" }, make("i", { className: "swatch" }), `${name} `, make("b", {}, shown(line.y[at], one.chart.unit === "%" ? "%" : "")));
    key.firstChild.style.backgroundColor = color;
    return { key, line, at, color };
  });
  const when = step === null ? "at the end" : `at step ${step}`, nothing = entries.some(({ at }) => at < 0) ? " (–: no value)" : "";
  one.legend.replaceChildren(...entries.map(({ key }) => key), make("span", { className: "faint" }, when + nothing));
  if (!one.marker) return;
  one.marker.style.display = step === null ? "none" : "";
  one.points.replaceChildren();
  if (step === null) return;
  one.marker.setAttribute("x1", one.toX(step));
  one.marker.setAttribute("x2", one.toX(step));
  for (const { line, at, color } of entries.filter((entry) => entry.at >= 0)) {
    draw("circle", { cx: one.toX(line.x[at]), cy: one.toY(line.y[at]), r: 3.2, fill: color, class: "point" }, one.points);
  }
}

function pointAt(step) {
  if (step === pointed) return;
  pointed = step;
  drawn.filter((one) => one.width).forEach(markChart);
}

const redrawCharts = () => drawn.filter((one) => one.holder.clientWidth).forEach(redraw);
const markCharts = () => drawn.filter((one) => one.width).forEach(markChart);
