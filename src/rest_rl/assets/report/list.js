// The list of responses. Only the visible rows exist; each shows its tokens as a strip of colors.

const ROW = 46, SPARE = 4, MOST_STRIPES = 300;
const MOST_PIXELS = 8_000_000; // Browsers limit the height of an element. Beyond this limit, one pixel of the scroll bar moves the list by more than one.
let hits = [], usualLength = 1;
const live = new Map();

const listHeight = () => Math.min(MOST_PIXELS, hits.length * ROW);

// The index of the row at the top of the visible part; fractions are partly visible rows.
function firstInSight() {
  const list = byId("list");
  const room = Math.max(1, listHeight() - list.clientHeight);
  const rows = Math.max(0, hits.length - list.clientHeight / ROW);
  return hits.length * ROW <= MOST_PIXELS ? list.scrollTop / ROW : (list.scrollTop / room) * rows;
}

function showRows() {
  const list = byId("list");
  const first = firstInSight();
  const from = Math.max(0, Math.floor(first) - SPARE);
  const to = Math.min(hits.length, Math.ceil(first + list.clientHeight / ROW) + SPARE);
  for (const [at, row] of live) {
    if (at < from || at >= to || row.response !== hits[at]) {
      row.element.remove();
      live.delete(at);
    }
  }
  const base = list.scrollTop - first * ROW;
  for (let at = from; at < to; at += 1) {
    const row = live.get(at) ?? addRow(at);
    row.element.style.transform = `translateY(${Math.round(base + at * ROW)}px)`;
  }
  markRow();
}

function addRow(at) {
  const response = hits[at];
  const element = make("div", { className: "row", role: "option", id: `row-${at}`, "aria-posinset": at + 1, "aria-setsize": hits.length });
  const strip = make("div", { className: "strip", "aria-hidden": "true" });
  element.append(make("div", { className: "line" }, ...rowParts(response)), strip);
  element.addEventListener("click", () => select(response));
  byId("rows").append(element);
  const row = { element, response, strip };
  live.set(at, row);
  paint(strip, response);
  return row;
}

function rowParts(response) {
  const run = make("i", { className: "swatch dot", title: data.runs[response.r].name });
  run.style.backgroundColor = data.series[data.runs[response.r].group % data.series.length];
  return [
    data.runs.length > 1 ? run : null,
    make("span", { className: "step" }, String(response.s)),
    make("span", { className: "reward" }, shown(response.R)),
    make("span", { className: "flags" }, ...badges(response)),
    make("span", { className: "name" }, ...seen(response.i.slice(0, 60))),
  ];
}

const badges = (response) => response.k.map((flag) => make("span", { className: `badge ${flag === "exact" ? "good" : "bad"}` }, data.flags[flag]));

// One stripe per token, equally wide in all rows, so that lengths are comparable. A response that is too long for its row
// is compressed, and beyond MOST_STRIPES tokens some are left out. Equal neighbors are one stripe. A gradient as
// background is far cheaper for the browser than a canvas in each row.
function paint(strip, response) {
  const tokens = tokensOf(response), stride = Math.max(1, Math.ceil(response.m / MOST_STRIPES));
  const stops = [];
  let color = "";
  for (let i = 0; i < response.m; i += stride) {
    const next = css(colorOf(state.mode, response, tokens, i));
    if (next === color) continue;
    const at = `${((100 * i) / response.m).toFixed(2)}%`;
    stops.push(color ? `${color} ${at},${next} ${at}` : next);
    color = next;
  }
  strip.style.width = `${(100 * Math.min(1, response.m / usualLength)).toFixed(2)}%`;
  strip.style.backgroundImage = stops.length > 1 ? `linear-gradient(90deg,${stops.join(",")})` : "none";
  strip.style.backgroundColor = stops.length === 1 ? color : "transparent";
}

function repaint() {
  for (const row of live.values()) paint(row.strip, row.response);
}

function showList() {
  for (const row of live.values()) row.element.remove();
  live.clear();
  byId("space").style.height = `${listHeight()}px`;
  showRows();
}

function markRow() {
  const at = hits.indexOf(state.selected);
  for (const [place, row] of live) row.element.setAttribute("aria-selected", String(place === at));
  const list = byId("list");
  if (live.has(at)) list.setAttribute("aria-activedescendant", `row-${at}`);
  else list.removeAttribute("aria-activedescendant");
}

function scrollToSelected() {
  const list = byId("list"), at = hits.indexOf(state.selected);
  if (at < 0) return;
  const first = firstInSight(), visible = list.clientHeight / ROW;
  const wanted = at < first ? at : at + 1 > first + visible ? at + 1 - visible : first;
  if (wanted !== first) {
    const share = wanted / Math.max(1e-9, hits.length - visible);
    list.scrollTop = hits.length * ROW <= MOST_PIXELS ? wanted * ROW : share * (listHeight() - list.clientHeight);
  }
  showRows();
}

function move(by) {
  if (!hits.length) return;
  const at = hits.indexOf(state.selected);
  select(hits[Math.min(hits.length - 1, Math.max(0, at < 0 ? 0 : at + by))]);
  scrollToSelected();
}

// Filters

const ORDERS = {
  step: ["earliest step", (a, b) => a.s - b.s || a.at - b.at],
  latest: ["latest step", (a, b) => b.s - a.s || a.at - b.at],
  worst: ["lowest reward", (a, b) => (a.R ?? 0) - (b.R ?? 0) || a.at - b.at],
  best: ["highest reward", (a, b) => (b.R ?? 0) - (a.R ?? 0) || a.at - b.at],
  longest: ["longest response", (a, b) => b.n - a.n || a.at - b.at],
  push: ["largest absolute advantage", (a, b) => Math.abs(b.A ?? 0) - Math.abs(a.A ?? 0) || a.at - b.at],
};

// The recorded step to show for a step of the slider: the last one up to it, or else the first.
function recordedStep(step) {
  let found = recordedSteps[0] ?? 0;
  for (const one of recordedSteps) if (one <= step) found = one;
  return found;
}

function inScope(response, step) {
  return (step === null || response.s === step) && (state.run < 0 || response.r === state.run);
}

function filterResponses() {
  const step = state.step === null ? null : recordedStep(state.step);
  const query = state.query.toLowerCase();
  const found = data.responses.filter((response) => inScope(response, step) && (!query || haystack(response).includes(query)));
  countFlags(found);
  hits = found.filter((response) => [...state.flags].every((flag) => response.k.includes(flag))).sort(ORDERS[state.order][1]);
  const at = step === null ? "" : step === state.step ? ` at step ${step}` : ` at step ${step}, the last recorded step before`;
  const lost = total > data.responses.length ? ` (${total.toLocaleString("en")} recorded; this page contains evenly spaced steps only)` : "";
  byId("count").textContent = `${hits.length.toLocaleString("en")} of ${data.responses.length.toLocaleString("en")}${at}${lost}`;
  byId("list").scrollTop = 0;
  showList();
  if (hits.length && !hits.includes(state.selected)) select(hits[0]);
  else showDetail();
  scrollToSelected();
}

function countFlags(found) {
  for (const button of byId("filters").querySelectorAll("button[data-flag]")) {
    const count = found.reduce((sum, response) => sum + response.k.includes(button.dataset.flag), 0);
    button.querySelector("b").textContent = count.toLocaleString("en");
    button.setAttribute("aria-pressed", String(state.flags.has(button.dataset.flag)));
    button.classList.toggle("none", count === 0);
  }
}
