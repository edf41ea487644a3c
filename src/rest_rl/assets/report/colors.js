// The colors of tokens: one hue per region, or a scale. A color is [red, green, blue, strength from 0 to 1].

const ORANGE = [224, 112, 16], BLUE = [43, 123, 186], VIOLET = [136, 84, 184], RED = [214, 64, 31], TEAL = [18, 148, 128], GREY = [128, 128, 128];
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const MODES = {
  region: { title: "Region" },
  weight: { title: "Weight", needs: "weights" },
  entropy: { title: "Entropy", needs: "entropies" },
  surprise: { title: "Surprise", needs: "surprises" },
  advantage: { title: "Advantage", needs: "weights" },
};
let regionNames = [], regionColors = [];
const scale = { weight: 1, entropy: 1, surprise: 1, advantage: 1 };

// Each scale ends at the 99th percentile over a sample of the tokens, so that one outlier does not make the others pale.
function setScales(responses) {
  regionNames = Object.keys(data.regions);
  regionColors = Object.values(data.regions).map(rgb);
  const found = { weight: [], entropy: [], surprise: [], advantage: [] };
  const stride = Math.max(1, Math.floor(responses.length / 300));
  for (let at = 0; at < responses.length; at += stride) {
    const tokens = tokensOf(responses[at]);
    for (let i = 0; i < tokens.words.length; i += 1) {
      if (tokens.weights[i] > 0) found.weight.push(Math.abs(Math.log2(tokens.weights[i])));
      found.entropy.push(tokens.entropies[i]);
      found.surprise.push(tokens.surprises[i]);
      found.advantage.push(Math.abs(credit(responses[at], tokens, i)));
    }
  }
  const least = { weight: 0.25, entropy: 0.1, surprise: 0.1, advantage: 0.1 };
  for (const [name, values] of Object.entries(found)) {
    const sorted = values.filter(isNumber).sort((a, b) => a - b);
    scale[name] = Math.max(least[name], sorted[Math.floor(0.99 * (sorted.length - 1))] ?? 0);
  }
}

// The factor by which the loss multiplies a token's log-probability: weight times advantage.
// In a rollout with several turns, every turn has an advantage of its own.
const turnOf = (response, i) => response.T?.find(([start, end]) => start <= i && i < end);
const credit = (response, tokens, i) => {
  const advantage = response.T ? turnOf(response, i)?.[3] : response.A;
  return typeof advantage === "number" ? tokens.weights[i] * advantage : NaN;
};

const blended = (hue, strength) => [...hue, Math.min(1, Math.max(0, strength))];

function colorOf(mode, response, tokens, i) {
  if (mode === "region") return [...(regionColors[tokens.regions[i]] ?? GREY), 0.8];
  if (mode === "weight") {
    const weight = tokens.weights[i];
    if (!isNumber(weight)) return [...GREY, 0.1];
    const height = weight > 0 ? Math.log2(weight) / scale.weight : -1;
    return blended(height > 0 ? ORANGE : BLUE, Math.abs(height));
  }
  if (mode === "advantage") {
    const value = credit(response, tokens, i);
    return isNumber(value) ? blended(value > 0 ? TEAL : RED, Math.abs(value) / scale.advantage) : [...GREY, 0.1];
  }
  const value = (mode === "entropy" ? tokens.entropies : tokens.surprises)[i];
  return isNumber(value) ? blended(VIOLET, Math.sqrt(value / scale[mode])) : [...GREY, 0.1];
}

const css = ([red, green, blue, strength], most = 1) => `rgb(${red} ${green} ${blue} / ${Math.round(100 * strength * most)}%)`;

// The legend of a mode: one swatch per region, or a ramp with the values at its ends.
function legendOf(mode) {
  if (mode === "region") {
    return regionNames.map((name, at) => make("span", { className: "key" }, swatch([...regionColors[at], 0.8]), name));
  }
  const ends = {
    weight: [(-scale.weight), scale.weight, `${(2 ** -scale.weight).toFixed(2)}×`, `${(2 ** scale.weight).toFixed(2)}×`, "gradient weight relative to the mean of 1 over the response"],
    entropy: [0, 1, "0", `${scale.entropy.toFixed(2)} nats`, "entropy of the policy before the token"],
    surprise: [0, 1, "0", `${scale.surprise.toFixed(2)} nats`, "−log p of the sampled token"],
    advantage: [-1, 1, `−${scale.advantage.toFixed(2)}`, `+${scale.advantage.toFixed(2)}`, "weight × advantage: how strongly the loss makes the token more likely (+) or less likely (−)"],
  }[mode];
  const ramp = make("span", { className: "ramp", "aria-hidden": "true" });
  for (let i = 0; i < 25; i += 1) {
    const at = i / 24;
    const height = ends[0] < 0 ? 2 * at - 1 : Math.sqrt(at);
    const hue = mode === "weight" ? (height > 0 ? ORANGE : BLUE) : mode === "advantage" ? (height > 0 ? TEAL : RED) : VIOLET;
    ramp.append(swatch(blended(hue, Math.abs(height))));
  }
  return [make("span", { className: "key" }, ends[2], ramp, ends[3]), make("span", { className: "faint" }, ends[4])];
}

function swatch(color) {
  const element = make("i", { className: "swatch" });
  element.style.backgroundColor = css(color);
  return element;
}
