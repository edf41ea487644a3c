// The data of the page, unpacked once. The columns of a response are read when it is first shown.

const byId = (id) => document.getElementById(id);

// Makes an element with properties, and children that are elements or plain text. No markup is ever parsed, so responses
// cannot inject any.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Decodes the content of a data element, the base64 text of a gzip stream, and empties the element.
async function unpacked(element) {
  const text = atob(element.textContent.trim());
  element.textContent = "";
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
}

const MISSING = 65535;
const columns = {};

// The columns over the tokens of all responses, in the order in which report/responses.py writes them.
function readColumns(buffer) {
  const count = buffer.byteLength / 11, view = new DataView(buffer);
  columns.words = new Uint32Array(count);
  for (let i = 0; i < count; i += 1) columns.words[i] = view.getUint32(4 * i, true);
  ["weights", "entropies", "surprises"].forEach((name, place) => {
    const values = new Float32Array(count), start = (4 + 2 * place) * count;
    for (let i = 0; i < count; i += 1) {
      const value = view.getUint16(start + 2 * i, true);
      values[i] = value === MISSING ? NaN : value / 1000;
    }
    columns[name] = values;
  });
  columns.regions = new Uint8Array(buffer, 10 * count, count);
}

// The tokens of a response: indices into the table of words, regions, and numbers (NaN if the run recorded none).
function tokensOf(response) {
  response.tokens ??= Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, column.subarray(response.o, response.o + response.m)]));
  return response.tokens;
}

function textOf(response) {
  let text = "";
  for (let i = response.o; i < response.o + response.m; i += 1) text += data.words[columns.words[i]];
  return text;
}

// The lower-case text that a search looks at, built on the first search.
function haystack(response) {
  if (response.hay === undefined) {
    const prompt = response.p >= 0 ? data.prompts[response.p] : "";
    response.hay = `${response.i}\n${textOf(response)}\n${prompt}`.toLowerCase();
  }
  return response.hay;
}

const NAMED = { 9: "⇥\t", 10: "↵\n", 13: "\\r" };
const PLAIN = { 9: "\t", 10: "\n" };
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202f\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff\u{1d173}-\u{1d17a}\u{e0000}-\u{e0fff}]/u;

// Splits text into pieces [text, is a placeholder], with placeholders for everything invisible: control characters, marks
// of direction, lone surrogates.
function visible(text, named) {
  const pieces = [];
  let plain = "";
  for (const character of text) {
    const code = character.codePointAt(0);
    if (named[code] === character || (!UNSEEN.test(character) && code !== 0xfffd)) {
      plain += character;
      continue;
    }
    if (plain) pieces.push([plain, false]);
    plain = "";
    const stand = named[code] ?? (code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : code === 0xfffd ? "\ufffd" : `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`);
    pieces.push([stand, true]);
  }
  if (plain) pieces.push([plain, false]);
  return pieces;
}

const nodes = (pieces) => pieces.map(([piece, stands]) => (stands ? make("span", { className: "unseen" }, piece) : piece));

// Text as nodes with placeholders for invisible characters: in tokens also for line breaks, which passages keep.
const seen = (text) => nodes(visible(text, NAMED));
const passage = (text) => nodes(visible(text, PLAIN));

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

// Three significant digits: 0.123, 12.3, 1,234.
function shown(value, unit = "") {
  if (!isNumber(value)) return "–";
  if (unit === "%") return `${(100 * value).toFixed(1)} %`;
  const size = Math.abs(value);
  const text = size >= 1000 ? Math.round(value).toLocaleString("en") : size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : size >= 0.001 || size === 0 ? value.toFixed(3) : value.toExponential(1);
  return unit ? `${text} ${unit}` : text;
}

const signed = (value, digits = 2) => (isNumber(value) ? `${value > 0 ? "+" : ""}${value.toFixed(digits)}`.replace("-", "−") : "–");
