// Elements, numbers as text, and the one tooltip. Every text of a run enters by textContent.

function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "g", "text", "circle", "rect"].includes(tag);
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.setAttribute("class", value);
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Three digits, all of a large number's before the point.
function short(value) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en-US");
  if (Number.isInteger(value)) return String(value).replace("-", "−");
  if (Math.abs(value) < 1e-4) return value.toExponential(1).replace(/-/g, "−");
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

// A number of an axis, in few signs.
function tick(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${short(value / 1e6)}M`;
  if (size >= 1e4) return `${short(value / 1e3)}k`;
  if (size && size < 1e-3) return value.toExponential(1).replace(".0e", "e").replace(/-/g, "−");
  return short(value);
}

function signed(value) {
  return value > 0 ? `+${short(value)}` : short(value);
}

function percent(value) {
  return value === null || value === undefined ? "–" : `${short(100 * value)}%`;
}

function duration(seconds) {
  if (seconds < 90) return `${short(Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const tip = {
  node: document.getElementById("tip"),

  // Shows `children` beside a point of the window, wherever there is room.
  show(x, y, ...children) {
    this.node.replaceChildren(...children);
    this.node.hidden = false;
    const box = this.node.getBoundingClientRect();
    const right = x + 14 + box.width > innerWidth ? Math.max(4, x - 14 - box.width) : x + 14;
    const below = y + 16 + box.height > innerHeight ? Math.max(4, y - 16 - box.height) : y + 16;
    this.node.style.transform = `translate(${right}px, ${below}px)`;
  },

  hide() {
    this.node.hidden = true;
  },
};

document.addEventListener("pointerdown", () => tip.hide(), { capture: true });

function fact(name, value) {
  return el("div", { class: "fact" }, el("span", { class: "dim" }, name), el("b", {}, value));
}
