// The whole page: its state, its address, its keyboard shortcuts.

let data = null, lastStep = 0, recordedSteps = [], total = 0;
const state = { step: null, run: -1, group: 0, mode: "region", query: "", flags: new Set(), order: "step", selected: null, open: new Set() };

function select(response) {
  state.selected = response;
  showDetail();
  markRow();
  keepAddress();
}

function setStep(step) {
  state.step = step === null ? null : Math.min(lastStep, Math.max(firstStep(), step));
  byId("step").value = String(state.step ?? lastStep);
  byId("all-steps").setAttribute("aria-pressed", String(state.step === null));
  byId("step-shown").textContent = state.step === null ? `all ${lastStep}` : `${state.step} / ${lastStep}`;
  markCharts();
  filterResponses();
  keepAddress();
}

const firstStep = () => recordedSteps[0] ?? 0;

// Moves to the next recorded step in a direction.
function stepBy(direction) {
  const now = state.step ?? (direction < 0 ? lastStep + 1 : -1);
  const steps = recordedSteps.length ? recordedSteps : Array.from({ length: lastStep + 1 }, (_, i) => i);
  const next = direction > 0 ? steps.find((step) => step > now) : steps.filter((step) => step < now).pop();
  if (next !== undefined) setStep(next);
}

function setMode(mode) {
  state.mode = mode;
  for (const button of byId("modes").children) {
    button.setAttribute("aria-checked", String(button.dataset.mode === mode));
    button.tabIndex = button.dataset.mode === mode ? 0 : -1;
  }
  repaint();
  const at = cursor;
  showDetail();
  if (at >= 0) setCursor(at);
  keepAddress();
}

function toggleFlag(flag) {
  if (!state.flags.delete(flag)) state.flags.add(flag);
  filterResponses();
  keepAddress();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("rest-rl-theme", theme);
  } catch {
    // A page opened from disk may have no storage. The theme then follows the system.
  }
}

function startTheme() {
  let kept = null;
  try {
    kept = localStorage.getItem("rest-rl-theme");
  } catch {
    kept = null;
  }
  document.documentElement.dataset.theme = kept ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

// The address stores the view, so that a link or a reload restores it.

let resting = 0;
function keepAddress() {
  clearTimeout(resting);
  resting = setTimeout(() => {
    const parts = new URLSearchParams();
    if (state.step !== null) parts.set("step", state.step);
    if (state.run >= 0) parts.set("run", state.run);
    if (state.mode !== "region") parts.set("color", state.mode);
    if (state.order !== "step") parts.set("order", state.order);
    if (state.flags.size) parts.set("only", [...state.flags].join(","));
    if (state.query) parts.set("search", state.query);
    if (state.selected && state.selected.at) parts.set("response", state.selected.at);
    try {
      history.replaceState(null, "", `#${parts}`);
    } catch {
      // Some browsers refuse this for local files.
    }
  }, 150);
}

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const whole = (name, below) => (/^\d+$/.test(parts.get(name) ?? "") && Number(parts.get(name)) < below ? Number(parts.get(name)) : null);
  state.run = whole("run", data.runs.length) ?? -1;
  if (Object.hasOwn(MODES, parts.get("color") ?? "")) state.mode = parts.get("color");
  if (Object.hasOwn(ORDERS, parts.get("order") ?? "")) state.order = parts.get("order");
  state.query = parts.get("search") ?? "";
  state.flags = new Set((parts.get("only") ?? "").split(",").filter((flag) => Object.hasOwn(data.flags, flag)));
  state.selected = data.responses[whole("response", data.responses.length) ?? 0] ?? null;
  return whole("step", lastStep + 1);
}

// Tables

function table(head, rows) {
  const cell = (content, at, isHead) => make(isHead ? "th" : "td", { className: at ? "number" : "" }, ...(Array.isArray(content) ? content : seen(String(content))));
  return make("table", {}, make("thead", {}, make("tr", {}, ...head.map((name, at) => cell(name, at, true)))), make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((value, at) => cell(value, at, false))))));
}

function withError(scores) {
  if (!scores || !isNumber(scores.exact_match)) return "–";
  const error = isNumber(scores.exact_match_error) ? ` ± ${(100 * scores.exact_match_error).toFixed(1)}` : "";
  return `${(100 * scores.exact_match).toFixed(1)}${error}`;
}

// The number of finished steps, and the planned number unless the run has finished.
const stepsOf = (run) => (run.finished ? run.steps : `${run.steps} of ${run.planned ?? "?"}`);

// Never compares greedy scores with sampled ones.
function gainOf(before, after) {
  const pair = [before, after].every((scores) => isNumber(scores?.greedy?.exact_match)) ? [before.greedy, after.greedy] : [before, after];
  return pair.every((scores) => isNumber(scores?.exact_match)) ? signed(100 * (pair[1].exact_match - pair[0].exact_match), 1) : "–";
}

function showResults() {
  const all = data.runs.flatMap((run) => [run.before, run.after]), low = all.map((scores) => scores?.low_temperature).find((scores) => scores);
  const hasAnswers = data.runs.some((run) => run.answers), hasEntropy = all.some((scores) => isNumber(scores?.policy_entropy));
  const rows = data.runs.map((run) => {
    const dot = make("i", { className: "swatch dot" });
    dot.style.backgroundColor = data.series[run.group % data.series.length];
    const { before, after } = run;
    const scored = after?.greedy ?? after, sampled = [before, after].map(withError);
    const lows = low ? [before, after].map((scores) => withError(scores?.low_temperature)) : [], entropies = hasEntropy ? [before, after].map((scores) => shown(scores?.policy_entropy)) : [];
    return [[dot, ...seen(run.name)], data.groups[run.group], run.seed ?? "–", stepsOf(run), withError(before?.greedy), withError(after?.greedy), gainOf(before, after), ...sampled, ...lows, ...entropies, shown(scored?.s_acc), shown(scored?.s_format), ...(hasAnswers ? [withError(run.answers?.greedy ?? run.answers)] : [])];
  });
  const lowHead = low ? [`T = ${low.temperature ?? "low"} before`, "after"] : [], entropyHead = hasEntropy ? ["policy entropy before", "after"] : [];
  const head = ["run", "curve", "seed", "steps", "greedy exact match before, %", "after, %", "gain", "T = 1 before", "after", ...lowHead, ...entropyHead, "S_acc after", "S_format after", ...(hasAnswers ? ["answer turns after, %"] : [])];
  byId("result-table").replaceChildren(table(head, rows), make("p", { className: "faint" }, `Exact match on held-out ${data.turns}, greedy and sampled at temperature T, ± one standard error over prompts; policy entropy at T = 1 in nats. S_acc and S_format are greedy if recorded.`));
}

function showConfig() {
  const all = byId("config-all").checked || data.runs.length === 1;
  const rows = data.config.filter((row) => all || row.differs).map((row) => [[row.differs ? make("b", {}, row.key) : row.key], ...row.values.map((value) => [make("code", {}, ...(value === null ? ["–"] : seen(value)))])]);
  const nothing = make("p", { className: "faint" }, "All runs have the same configuration.");
  const environment = data.runs.map((run) => make("details", {}, make("summary", {}, ...seen(run.name), ": library versions and command"), make("pre", {}, ...passage([run.command, run.commit ?? "", ...Object.entries(run.libraries).map(([name, version]) => `${name} ${version}`)].filter(Boolean).join("\n")))));
  byId("config-table").replaceChildren(rows.length ? table(["key", ...data.runs.map((run) => run.name)], rows) : nothing, ...environment);
}

function showFindings() {
  byId("findings").hidden = !data.findings.length;
  byId("finding-list").replaceChildren(...data.findings.map((finding) => {
    const at = make("button", { type: "button", title: "Go to this step" }, `from step ${finding.step}`);
    at.addEventListener("click", () => setStep(finding.step));
    const run = data.runs.length > 1 ? seen(`${data.runs[finding.run].name}: `) : [];
    return make("li", {}, make("div", {}, make("b", {}, ...run, ...seen(finding.figure)), " ", at), make("p", {}, make("b", {}, "Likely cause: "), ...seen(finding.cause)), make("p", {}, make("b", {}, "Remedy: "), ...seen(finding.remedy)));
  }));
}

// Controls

function fill(select, options, value, onChange) {
  select.replaceChildren(...options.map(([key, text]) => make("option", { value: key }, text)));
  select.value = value;
  select.addEventListener("change", () => onChange(select.value));
}

function startControls() {
  const names = Object.entries(MODES);
  byId("modes").replaceChildren(...names.map(([mode, { title }], at) => {
    const button = make("button", { type: "button", role: "radio", title: `Key ${at + 1}` }, title);
    button.dataset.mode = mode;
    button.addEventListener("click", () => setMode(mode));
    return button;
  }));
  byId("filters").replaceChildren(make("span", { className: "faint" }, "Show only"), ...Object.entries(data.flags).map(([flag, text]) => {
    const button = make("button", { type: "button", className: "filter" }, `${text} `, make("b", {}));
    button.dataset.flag = flag;
    button.addEventListener("click", () => toggleFlag(flag));
    return button;
  }));
  byId("run-choice").hidden = data.runs.length < 2;
  fill(byId("run"), [["-1", "all"], ...data.runs.map((run, at) => [String(at), run.name])], String(state.run), (value) => {
    state.run = Number(value);
    filterResponses();
    keepAddress();
  });
  fill(byId("order"), Object.entries(ORDERS).map(([key, [text]]) => [key, text]), state.order, (value) => {
    state.order = value;
    filterResponses();
    keepAddress();
  });
  byId("group-choice").hidden = data.groups.length < 2;
  fill(byId("group"), data.groups.map((label, at) => [String(at), label]), "0", (value) => {
    state.group = Number(value);
    redrawCharts();
  });
  startInputs();
}

function startInputs() {
  const step = byId("step"), smooth = byId("smooth"), query = byId("query");
  [step.min, step.max] = [String(firstStep()), String(lastStep)];
  step.addEventListener("input", () => setStep(Number(step.value)));
  byId("all-steps").addEventListener("click", () => setStep(state.step === null ? lastStep : null));
  byId("step-back").addEventListener("click", () => stepBy(-1));
  byId("step-on").addEventListener("click", () => stepBy(1));
  smooth.max = String(Math.max(1, Math.floor(lastStep / 8)));
  smooth.value = String(Math.min(Number(smooth.max), Math.round(lastStep / 40)));
  const onSmooth = () => {
    smoothing = 2 * Number(smooth.value) + 1;
    byId("smooth-shown").textContent = smoothing > 1 ? `mean of ${smoothing}` : "off";
    redrawCharts();
  };
  smooth.addEventListener("input", onSmooth);
  onSmooth();
  query.value = state.query;
  query.addEventListener("input", () => {
    state.query = query.value;
    filterResponses();
    keepAddress();
  });
  byId("list").addEventListener("scroll", showRows, { passive: true });
  new ResizeObserver(() => {
    showRows();
    repaint();
  }).observe(byId("list"));
  byId("theme").addEventListener("click", flipTheme);
  byId("keys").addEventListener("click", () => byId("help").showModal());
  byId("config-all").addEventListener("change", showConfig);
  byId("config-all").parentElement.hidden = data.runs.length === 1;
}

const flipTheme = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

// Keys

const page = () => Math.max(1, Math.floor(byId("list").clientHeight / ROW) - 1);
const KEYS = [
  [["j", "ArrowDown"], "next response", () => move(1)],
  [["k", "ArrowUp"], "previous response", () => move(-1)],
  [["PageDown"], "one page down", () => move(page())],
  [["PageUp"], "one page up", () => move(-page())],
  [["Home"], "first response", () => move(-hits.length)],
  [["End"], "last response", () => move(hits.length)],
  [["ArrowRight"], "next token", () => setCursor(cursor + 1)],
  [["ArrowLeft"], "previous token", () => setCursor(cursor - 1)],
  [["]"], "next step", () => stepBy(1)],
  [["["], "previous step", () => stepBy(-1)],
  [["a"], "all steps", () => setStep(null)],
  ...Object.entries(MODES).map(([mode, { title }], at) => [[String(at + 1)], `color tokens by ${title.toLowerCase()}`, () => setMode(mode)]),
  [["/"], "search", () => byId("query").focus()],
  [["t"], "light or dark theme", flipTheme],
  [["?"], "keyboard shortcuts", () => byId("help").showModal()],
];
const SHOWN_KEYS = { ArrowDown: "↓", ArrowUp: "↑", ArrowRight: "→", ArrowLeft: "←", PageDown: "page down", PageUp: "page up" };
const IN_LIST = ["ArrowDown", "ArrowUp", "PageDown", "PageUp", "Home", "End"];

// Letters work wherever the reader is not typing. Arrow and page keys scroll the page unless the list or the tokens have
// the focus.
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const target = event.target, isBench = target.closest?.(".bench");
  if (target.matches?.("input[type=search], select, textarea")) {
    if (event.key === "Escape") byId("list").focus();
    return;
  }
  if ((IN_LIST.includes(event.key) || event.key.startsWith("Arrow")) && !isBench) return moveAmongModes(event);
  const found = KEYS.find(([keys]) => keys.includes(event.key));
  if (!found || (target.matches?.("input") && event.key.startsWith("Arrow"))) return undefined;
  event.preventDefault();
  found[2]();
  if (byId("responses").contains(target) === false && /^[jk]$/.test(event.key)) byId("responses").scrollIntoView();
  return undefined;
}

function moveAmongModes(event) {
  if (!event.target.matches?.("[role=radio]") || !/^Arrow(Left|Right)$/.test(event.key)) return;
  const buttons = [...byId("modes").children], at = buttons.indexOf(event.target);
  const next = buttons[(at + (event.key === "ArrowRight" ? 1 : buttons.length - 1)) % buttons.length];
  event.preventDefault();
  next.click();
  next.focus();
}

async function start() {
  startTheme();
  data = await (await unpacked(byId("data"))).json();
  readColumns(await (await unpacked(byId("token-data"))).arrayBuffer());
  indexPrompts();
  data.responses.forEach((response, at) => (response.at = at));
  recordedSteps = [...new Set(data.responses.map((response) => response.s))].sort((a, b) => a - b);
  lastStep = Math.max(0, ...data.runs.map((run) => run.steps), ...recordedSteps.slice(-1));
  total = data.runs.reduce((sum, run) => sum + run.recorded, 0);
  const step = readAddress();
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
  byId("subtitle").textContent = `${plural(data.runs.length, "run")}, ${plural(data.responses.length, "response")}`;
  setScales(data.responses);
  usualLength = data.responses.map((response) => response.m).sort((a, b) => a - b)[Math.floor(0.95 * (data.responses.length - 1))] || 1;
  byId("main").hidden = false;
  showFindings();
  showResults();
  showConfig();
  startControls();
  for (const chart of data.charts.filter((one) => !one.aside)) addChart(chart, byId("main-charts"));
  startOthers(data.charts.filter((one) => one.aside));
  byId("key-table").append(...KEYS.map(([keys, text]) => make("tr", {}, make("td", {}, ...keys.map((key) => make("kbd", {}, SHOWN_KEYS[key] ?? key))), make("td", {}, text))));
  document.addEventListener("keydown", onKey);
  setMode(state.mode);
  setStep(step);
  document.documentElement.dataset.ready = "yes";
}

function startOthers(others) {
  const details = byId("other");
  details.hidden = !others.length;
  details.addEventListener("toggle", () => others.splice(0).forEach((chart) => addChart(chart, byId("other-charts"))));
}

start().catch((error) => {
  byId("failure").textContent = `The page could not be displayed: ${error}. It needs a browser from 2023 or later.`;
  byId("failure").hidden = false;
});
