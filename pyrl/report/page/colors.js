// Colours of numbers: one hue for sizes, blue and orange for signs, which every eye tells apart.
// They lie behind the text as a tint, so that it stays readable in light and in dark.

const dark = matchMedia("(prefers-color-scheme: dark)");

const MEASURES = {
  entropy: {
    label: "entropy",
    unit: "nats",
    about: "of the distribution that the token was drawn from",
  },
  confidence: {
    label: "confidence",
    unit: "",
    about: "mass of the five most probable tokens; low is dark",
  },
  advantage: {
    label: "advantage",
    unit: "",
    about: "mean over the leaves that the token is a part of",
    signed: true,
  },
  ratio: {
    label: "log-prob ratio",
    unit: "nats",
    about: "log-prob after the step's update less that at sampling",
    signed: true,
  },
};

function tint(share, [red, green, blue], most) {
  return `rgba(${red}, ${green}, ${blue}, ${(most * Math.min(1, Math.max(0, share))).toFixed(3)})`;
}

// The scale of a measure over these values: `color` of a value, `low` and `high`.
function scaleOf(measure, values) {
  const known = values.filter((value) => value !== null).sort((a, b) => a - b);
  const at = (share) => known[Math.min(known.length - 1, Math.floor(share * known.length))] ?? 0;
  const orange = dark.matches ? [214, 106, 10] : [230, 130, 0];
  const blue = dark.matches ? [40, 130, 205] : [0, 114, 178];
  const purple = dark.matches ? [160, 90, 190] : [145, 70, 170];
  const most = dark.matches ? 0.8 : 0.72;
  if (MEASURES[measure].signed) {
    const size = Math.max(Math.abs(at(0.01)), Math.abs(at(0.99)), 1e-6);
    return {
      low: -size,
      high: size,
      color: (v) => (v < 0 ? tint(-v / size, blue, most) : tint(v / size, orange, most)),
    };
  }
  if (measure === "confidence") {
    const low = Math.min(at(0.01), 0.999);
    return { low, high: 1, color: (v) => tint((1 - v) / (1 - low), purple, most) };
  }
  const high = Math.max(at(0.99), 1e-6);
  return { low: 0, high, color: (v) => tint(v / high, orange, most) };
}

function legendOf(measure, scale) {
  const stops = [0, 0.25, 0.5, 0.75, 1].map((share) =>
    scale.color(scale.low + share * (scale.high - scale.low)),
  );
  const { label, unit, about } = MEASURES[measure];
  const middle = MEASURES[measure].signed ? el("span", {}, "0") : null;
  return el(
    "div",
    { class: "scale" },
    el(
      "span",
      { class: "bar", style: { background: `linear-gradient(to right, ${stops.join(", ")})` } },
      el("span", {}, short(scale.low)),
      middle,
      el("span", {}, short(scale.high)),
    ),
    el("span", { class: "dim" }, `${label}${unit ? ` (${unit})` : ""}: ${about}`),
  );
}
