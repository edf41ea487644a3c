// What the page holds: unpacked once, the columns of a response when it is first shown.

const byId = (id) => document.getElementById(id);

// An element with properties, and children that are elements or plain text: no markup is ever parsed.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

async function unpacked(letters) {
  const bytes = decoded(letters.trim());
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function decoded(letters) {
  const text = atob(letters);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const MISSING = 65535;

function thousandths(letters) {
  const { buffer } = decoded(letters);
  const view = new DataView(buffer);
  return Float32Array.from({ length: buffer.byteLength / 2 }, (_, i) => {
    const value = view.getUint16(2 * i, true);
    return value === MISSING ? NaN : value / 1000;
  });
}

function places(letters) {
  const { buffer } = decoded(letters);
  const view = new DataView(buffer);
  return Uint32Array.from({ length: buffer.byteLength / 4 }, (_, i) => view.getUint32(4 * i, true));
}

// The tokens of a response: texts and regions always, numbers where the run recorded them.
function tokensOf(response) {
  if (!response.tokens) {
    response.tokens = {
      words: places(response.t),
      regions: decoded(response.z),
      weights: thousandths(response.w),
      entropies: thousandths(response.h),
      surprises: thousandths(response.l),
    };
  }
  return response.tokens;
}

const textOf = (response) => Array.from(tokensOf(response).words, (place) => data.words[place]).join("");

// Lower-case text that a search looks into, made when first searched.
function haystack(response) {
  if (response.hay === undefined) {
    const prompt = response.p >= 0 ? data.prompts[response.p] : "";
    response.hay = `${response.i}\n${textOf(response)}\n${prompt}`.toLowerCase();
  }
  return response.hay;
}

const NAMED = { 9: "⇥\t", 10: "↵\n", 13: "␍", 127: "␡" };
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff0-\uffff\ud800-\udfff]/u;

// Text with everything in it to be seen: controls, marks of direction, lone surrogates. In pieces: [text, is a stand-in].
function visible(text) {
  const pieces = [];
  let plain = "";
  for (const character of text) {
    const code = character.codePointAt(0);
    if (!UNSEEN.test(character) && code !== 0xfffd) {
      plain += character;
      continue;
    }
    if (plain) pieces.push([plain, false]);
    plain = "";
    const stand = NAMED[code] ?? (code < 32 ? String.fromCodePoint(0x2400 + code) : code === 0xfffd ? "\ufffd" : `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`);
    pieces.push([stand, true]);
  }
  if (plain) pieces.push([plain, false]);
  return pieces;
}

// Plain text as nodes, with what is not to be seen made visible.
const seen = (text) => visible(text).map(([piece, stands]) => (stands ? make("span", { className: "unseen" }, piece) : piece));

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

// Three digits that mean something: 0.123, 12.3, 1,234.
function shown(value, unit = "") {
  if (!isNumber(value)) return "–";
  if (unit === "%") return `${(100 * value).toFixed(1)} %`;
  const size = Math.abs(value);
  const text = size >= 1000 ? Math.round(value).toLocaleString("en") : size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : size >= 0.001 || size === 0 ? value.toFixed(3) : value.toExponential(1);
  return unit ? `${text} ${unit}` : text;
}

const signed = (value) => (isNumber(value) ? `${value > 0 ? "+" : ""}${value.toFixed(2)}`.replace("-", "−") : "–");
