// The selected response: its colored tokens, its mistakes and their costs, the gold turn, the prompt, its group.

const FIRST_TOKENS = 3000, LONG_TOKEN = 4000;
let cursor = -1;
const samePrompt = new Map();

function indexPrompts() {
  for (const response of data.responses) {
    if (samePrompt.has(response.i)) samePrompt.get(response.i).push(response);
    else samePrompt.set(response.i, [response]);
  }
}

function showDetail() {
  const response = state.selected, detail = byId("detail");
  cursor = -1;
  hideTip();
  if (!response || !hits.length) {
    detail.replaceChildren(make("p", { className: "faint" }, data.responses.length ? "No response matches the filters." : "These runs recorded no responses."));
    return;
  }
  const run = data.runs[response.r];
  detail.replaceChildren(
    make("div", { className: "title" }, make("b", {}, ...seen(run.name)), ` step ${response.s} `, make("code", {}, ...seen(response.i)), ...badges(response)),
    figures(response),
    make("div", { className: "legend", id: "legend" }, ...legendOf(state.mode)),
    notice(response) ?? "",
    tokenBlock(response),
    make("div", { className: "readout", id: "readout", role: "status" }, "Point at a token, or press ← and →."),
    response.T ? "" : losses(response),
    response.D?.length ? make("div", {}, make("h3", {}, "Changes of the state"), make("pre", { className: "target" }, ...passage(response.D.join("\n")))) : "",
    response.g >= 0 ? make("div", {}, make("h3", {}, "Gold turn"), make("pre", { className: "target" }, ...passage(data.golds[response.g]))) : "",
    group(response) ?? "",
    regionTable(response) ?? "",
    folded("Prompt", response.p >= 0 ? data.prompts[response.p] : ""),
  );
}

function figures(response) {
  const scores = response.T
    ? [["turns", String(response.T.length)], ["end", response.E]]
    : [["advantage", signed(response.A)], ["S_format", shown(response.F?.[0])], ["S_acc", shown(response.F?.[1])]];
  const pairs = [["reward", shown(response.R)], ...scores, [response.u ? "tokens" : "words", String(response.n)]];
  return make("dl", { className: "figures" }, ...pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function notice(response) {
  if (response.u || state.mode === "region") return null;
  return make("p", { className: "notice" }, "This run recorded only the text of its responses. The regions come from parsing that text; weights, entropies and advantages are unknown.");
}

function tokenBlock(response) {
  const block = make("div", { className: `tokens mode-${state.mode}`, id: "tokens", tabIndex: 0, role: "group", dir: "ltr", "aria-label": "Tokens of the response; use the left and right arrow keys to move between them" });
  appendTokens(block, response, 0, FIRST_TOKENS);
  block.addEventListener("pointerover", (event) => pointToken(event.target.closest?.(".t")));
  block.addEventListener("pointerleave", hideTip);
  block.addEventListener("click", (event) => {
    const token = event.target.closest?.(".t");
    if (token) setCursor(Number(token.dataset.i));
  });
  return block;
}

function appendTokens(block, response, from, count) {
  const tokens = tokensOf(response), to = Math.min(tokens.words.length, from + count);
  const found = matches(response);
  for (let i = from; i < to; i += 1) {
    const turn = response.T?.findIndex(([start]) => start === i) ?? -1;
    if (turn >= 0) block.append(turnHeader(response.T[turn], turn));
    block.append(tokenElement(response, tokens, i, found.has(i)));
  }
  if (to < tokens.words.length) {
    const more = make("button", { type: "button" }, `Show ${Math.min(count, tokens.words.length - to).toLocaleString("en")} of ${(tokens.words.length - to).toLocaleString("en")} more tokens`);
    more.addEventListener("click", () => {
      more.remove();
      appendTokens(block, response, to, count);
    });
    block.append(more);
  } else if (response.m < response.n) {
    block.append(make("span", { className: "unseen" }, ` … ${(response.n - response.m).toLocaleString("en")} more in responses.jsonl`));
  }
}

// The line above a turn of a rollout.
function turnHeader([, , reward, advantage, weight, calls, errors], number) {
  const facts = [`turn ${number + 1}`, calls ? `calls ${calls}` : "answers"];
  if (isNumber(reward)) facts.push(`reward ${shown(reward)}`);
  if (isNumber(advantage)) facts.push(`credit ${signed(advantage)}`);
  if (isNumber(weight)) facts.push(`mean weight ${shown(weight)}`);
  return make("div", { className: "turn" }, ...seen(facts.join(" · ")), errors.length ? make("b", {}, ...seen(` ${errors.join(", ")}`)) : "");
}

function tokenElement(response, tokens, i, isHit) {
  const text = data.words[tokens.words[i]];
  const element = make("span", { className: isHit ? "t hit" : "t" });
  element.dataset.i = i;
  const isEnd = !text && i === tokens.words.length - 1;
  if (!text) element.append(make("span", { className: "unseen", title: "token without characters" }, isEnd ? "end" : "·"));
  else element.append(...seen(text.slice(0, LONG_TOKEN)));
  if (text.length > LONG_TOKEN) element.append(make("span", { className: "unseen" }, `… ${(text.length - LONG_TOKEN).toLocaleString("en")} more characters`));
  if (response.T && !turnOf(response, i)) {
    element.classList.add("result"); // what a tool returned, and the template around it
    return element;
  }
  element.style.backgroundColor = css(colorOf(state.mode, response, tokens, i), state.mode === "region" ? 0.45 : 0.75);
  element.style.borderBottomColor = css([...(regionColors[tokens.regions[i]] ?? GREY), 1]);
  if (tokens.weights[i] === 0) element.classList.add("dropped");
  return element;
}

// The indices of the tokens that match the search.
function matches(response) {
  const found = new Set(), query = state.query.toLowerCase();
  if (!query) return found;
  const tokens = tokensOf(response);
  const ends = [];
  let length = 0;
  for (const place of tokens.words) ends.push((length += data.words[place].toLowerCase().length));
  const text = textOf(response).toLowerCase();
  for (let at = text.indexOf(query), i = 0; at >= 0; at = text.indexOf(query, at + query.length)) {
    while (i < ends.length && ends[i] <= at) i += 1;
    for (let j = i; j < ends.length && (j === i || ends[j - 1] < at + query.length); j += 1) found.add(j);
  }
  return found;
}

// The numbers of one token, in the order of the tooltip.
function factsOf(response, i) {
  const tokens = tokensOf(response);
  const probability = Math.exp(-tokens.surprises[i]);
  return [
    ["region", regionNames[tokens.regions[i]] ?? "?"],
    ["weight", shown(tokens.weights[i])],
    ["entropy", shown(tokens.entropies[i], "nats")],
    ["probability", isNumber(probability) ? (probability < 0.001 ? probability.toExponential(1) : probability.toFixed(3)) : "–"],
    ["weight × advantage", signed(credit(response, tokens, i))],
  ];
}

function pointToken(element) {
  if (!element) return hideTip();
  const i = Number(element.dataset.i), response = state.selected, tip = byId("tip");
  const text = data.words[tokensOf(response).words[i]];
  tip.replaceChildren(
    make("div", { className: "word" }, ...(text ? seen(text.slice(0, 80)) : ["(no characters)"])),
    make("dl", {}, ...factsOf(response, i).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
    make("div", { className: "faint" }, `${response.u ? "token" : "word"} ${i + 1} of ${response.n}`),
  );
  tip.hidden = false;
  const box = element.getClientRects()[0] ?? element.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const left = Math.min(box.left, window.innerWidth - size.width - 8);
  const top = box.bottom + size.height + 10 > window.innerHeight ? box.top - size.height - 6 : box.bottom + 6;
  tip.style.transform = `translate(${Math.max(8, Math.round(left))}px, ${Math.max(8, Math.round(top))}px)`;
  return undefined;
}

function hideTip() {
  byId("tip").hidden = true;
}

function setCursor(at) {
  const response = state.selected, block = byId("tokens");
  if (!response || !block) return;
  const count = Math.min(block.querySelectorAll(".t").length, response.m);
  if (!count) return;
  cursor = Math.min(count - 1, Math.max(0, at));
  block.querySelector(".t.here")?.classList.remove("here");
  const element = block.querySelector(`.t[data-i="${cursor}"]`);
  element.classList.add("here");
  element.scrollIntoView({ block: "nearest" });
  const text = data.words[tokensOf(response).words[cursor]];
  const facts = factsOf(response, cursor).filter(([, value]) => value !== "–").map(([name, value]) => `${name} ${value}`);
  byId("readout").replaceChildren(make("b", {}, ...(text ? seen(text.slice(0, 80)) : ["(no characters)"])), ` ${cursor + 1} of ${response.n} · ${facts.join(" · ")}`);
}

const KINDS = { format: "S_format", unneeded_call: "S_acc", names: "S_acc", missing_call: "S_acc", keys: "S_acc", missing_argument: "S_acc", value: "S_acc" };

function losses(response) {
  if (!response.F) return make("p", { className: "faint" }, "The tool format of this run is not available, so the page cannot explain its scores.");
  if (!response.e.length) return make("p", { className: "good-line" }, "Both scores are perfect.");
  const rows = response.e.map(([kind, message, cost]) => {
    const bar = make("i", { className: "cost" });
    bar.style.width = `${Math.max(2, 60 * cost).toFixed(1)}px`;
    return make("tr", {}, make("td", {}, KINDS[kind] ?? kind), make("td", { className: "number" }, `−${cost.toFixed(3)}`), make("td", {}, bar), make("td", {}, ...seen(message)));
  });
  return make("div", { className: "wide" }, make("table", { className: "losses" }, make("caption", {}, "Mistakes and their costs"), make("tbody", {}, ...rows)));
}

function regionTable(response) {
  const tokens = tokensOf(response);
  if (!response.u) return null;
  const sampled = [...tokens.regions.keys()].filter((i) => !response.T || turnOf(response, i));
  const rows = regionNames.map((name, region) => {
    const own = sampled.filter((i) => tokens.regions[i] === region);
    if (!own.length) return null;
    const mean = (values) => own.reduce((sum, i) => sum + values[i], 0) / own.length;
    const weight = own.reduce((sum, i) => sum + tokens.weights[i], 0), all = tokens.weights.reduce((sum, value) => sum + value, 0);
    const cells = [String(own.length), shown(own.length / sampled.length, "%"), shown(mean(tokens.weights)), shown(weight / all, "%"), shown(mean(tokens.entropies))];
    return make("tr", {}, make("th", { scope: "row" }, swatch([...regionColors[region], 0.9]), name), ...cells.map((cell) => make("td", { className: "number" }, cell)));
  });
  const head = ["region", "tokens", "share of tokens", "mean weight", "share of weight", "mean entropy"];
  return make("div", { className: "wide" }, make("table", {}, make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rows.filter(Boolean))));
}

// Other responses to the same prompt: first those of the group, then those of other steps and runs.
function group(response) {
  const same = samePrompt.get(response.i);
  const own = same.filter((other) => other.s === response.s && other.r === response.r);
  const others = same.filter((other) => !own.includes(other)).slice(0, 60);
  if (same.length < 2) return null;
  const parts = [];
  if (own.length > 1) parts.push(make("h3", {}, `Group: ${own.length} responses to this prompt at this step`), siblings(own, response, () => ""));
  if (others.length) parts.push(make("h3", {}, "The same prompt at other steps" + (data.runs.length > 1 ? " and in other runs" : "")), siblings(others, response, (other) => `${data.runs.length > 1 ? `${data.runs[other.r].name} ` : ""}step ${other.s} `));
  return make("div", {}, ...parts);
}

function siblings(list, response, label) {
  const buttons = list.map((other) => {
    const button = make("button", { type: "button", className: other.k.includes("exact") ? "sibling good" : "sibling", "aria-pressed": String(other === response) }, label(other), make("b", {}, shown(other.R)), isNumber(other.A) ? make("span", { className: "faint" }, ` ${signed(other.A)}`) : null);
    button.addEventListener("click", () => {
      select(other);
      scrollToSelected();
    });
    return button;
  });
  return make("div", { className: "siblings" }, ...buttons);
}

function folded(title, text) {
  if (!text) return "";
  const details = make("details", { open: state.open.has(title) }, make("summary", {}, title), make("pre", {}, ...passage(text)));
  details.addEventListener("toggle", () => (details.open ? state.open.add(title) : state.open.delete(title)));
  return details;
}
