// Curves over steps: a small plot per panel, with one crosshair for all of them.

const LINES = [
  "var(--line-0)",
  "var(--line-1)",
  "var(--line-2)",
  "var(--line-3)",
  "var(--line-4)",
  "var(--line-5)",
];
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const plots = [];

// The metrics of a run that match "eval/*/greedy", or the one of that name.
function matching(pattern, curves) {
  if (!pattern.includes("*")) return pattern in curves ? [pattern] : [];
  const parts = pattern.split("*").map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const whole = new RegExp(`^${parts.join(".*")}$`);
  return Object.keys(curves).filter((name) => whole.test(name));
}

// What a panel draws: several runs differ by colour and their lines by dashes, one run's by colour.
function linesOf(panel, runs) {
  const found = [];
  runs.forEach((run, r) => {
    let order = 0;
    for (const [label, pattern] of panel.lines) {
      for (const name of matching(pattern, run.curves)) {
        const set = name.startsWith("eval/") ? name.split("/")[1] : null;
        const says = label || set;
        found.push({
          label: runs.length > 1 ? `${run.name}: ${says}` : says,
          curve: run.curves[name],
          color: LINES[(runs.length > 1 ? r : order) % LINES.length],
          dash:
            runs.length > 1
              ? DASHES[order % DASHES.length]
              : DASHES[Math.floor(order / LINES.length) % 4],
          dots: Boolean(set),
          shown: runs.length === 1 || order < 2,
        });
        order += 1;
      }
    }
  });
  return found;
}

// The mean of the neighbours on both sides, nearer ones counting more, over a tenth of the curve.
function smooth(values) {
  const reach = Math.max(1, Math.round(values.length / 20));
  return values.map((_, n) => {
    let sum = 0,
      weight = 0;
    for (let m = Math.max(0, n - reach); m <= Math.min(values.length - 1, n + reach); m += 1) {
      const near = reach + 1 - Math.abs(n - m);
      sum += near * values[m];
      weight += near;
    }
    return sum / weight;
  });
}

// Whether a curve needs no running mean to be read, such as a count or a schedule.
function isSmooth(values) {
  const range = Math.max(...values) - Math.min(...values);
  const bends = values.slice(2).map((value, n) => Math.abs(value - 2 * values[n + 1] + values[n]));
  return bends.reduce((sum, bend) => sum + bend, 0) / bends.length < 0.01 * range;
}

// Round numbers that divide [low, high] into about `count` parts.
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step)
    found.push(Number(value.toPrecision(12)));
  return found;
}

class Plot {
  constructor(panel, runs, { height = 180, alarms = [] } = {}) {
    this.panel = panel;
    this.lines = linesOf(panel, runs);
    this.height = height;
    this.alarms = alarms;
    this.last = Math.max(1, ...runs.map((run) => run.last));
    this.at = null;
    this.holder = el("div", { class: "plot" });
    const legend =
      this.lines.length > 1
        ? el("div", { class: "legend" }, ...this.lines.map((line) => this.key(line)))
        : null;
    this.figure = el(
      "figure",
      { class: "card" },
      el("figcaption", {}, panel.title),
      legend,
      this.holder,
    );
    if (!this.lines.length) return; // nothing to draw
    plots.push(this);
    new ResizeObserver(() => this.draw()).observe(this.holder);
  }

  // A key of the legend shows and hides its line.
  key(line) {
    const swatch = el(
      "svg",
      { width: 22, height: 8, "aria-hidden": true },
      el("line", {
        x1: 0,
        y1: 4,
        x2: 22,
        y2: 4,
        stroke: line.color,
        "stroke-width": 2.5,
        "stroke-dasharray": line.dash,
      }),
    );
    const button = el(
      "button",
      {
        type: "button",
        "aria-pressed": String(line.shown),
        onclick: () => {
          line.shown = !line.shown;
          button.setAttribute("aria-pressed", String(line.shown));
          this.draw();
        },
      },
      swatch,
      line.label,
    );
    return button;
  }

  range() {
    if (this.panel.share) return [0, 1];
    const shown = this.lines.filter((line) => line.shown);
    const all = shown.flatMap((line) => [
      ...line.curve.v,
      ...(line.curve.lo ?? []),
      ...(line.curve.hi ?? []),
    ]);
    const low = Math.min(0, ...all),
      high = Math.max(...all, low + 1e-9);
    return [low, high + (high - low) * 0.05];
  }

  draw() {
    const width = this.holder.clientWidth;
    if (!width) return;
    const [low, high] = this.range();
    const marks = ticks(low, high, 4),
      right = width - 10,
      top = 8,
      bottom = this.height - 22;
    const left = 14 + 6.7 * Math.max(...marks.map((value) => tick(value).length));
    this.x = (step) => left + ((right - left) * step) / this.last;
    this.y = (value) => bottom - ((bottom - top) * (value - low)) / (high - low);
    this.step = (x) => ((x - left) / (right - left)) * this.last;
    const svg = el("svg", {
      width,
      height: this.height,
      tabindex: 0,
      role: "img",
      "aria-label": this.summary(),
    });
    for (const value of marks) {
      svg.append(
        el("line", { class: "grid", x1: left, x2: right, y1: this.y(value), y2: this.y(value) }),
        el(
          "text",
          { class: "tick", x: left - 6, y: this.y(value) + 3.5, "text-anchor": "end" },
          tick(value),
        ),
      );
    }
    for (const step of ticks(0, this.last, Math.max(3, Math.floor(width / 60))))
      svg.append(
        el(
          "text",
          {
            class: "tick",
            x: this.x(step),
            y: this.height - 6,
            "text-anchor": this.x(step) > right - 12 ? "end" : "middle",
          },
          tick(step),
        ),
      );
    for (const step of new Set(this.alarms))
      svg.append(el("path", { class: "alarm", d: `M${this.x(step)} ${bottom - 1}l-4 7h8z` }));
    for (const line of this.lines) if (line.shown) svg.append(...this.marks(line));
    this.cross = el("line", { class: "cross", y1: top, y2: bottom, visibility: "hidden" });
    svg.append(this.cross);
    for (const moved of ["pointermove", "pointerdown"])
      svg.addEventListener(moved, (event) => {
        this.point(
          this.nearest(this.step(event.clientX - svg.getBoundingClientRect().left)),
          event.clientX,
          event.clientY,
        );
      });
    svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.leave());
    svg.addEventListener("blur", () => this.leave());
    svg.addEventListener("keydown", (event) => this.keyed(event, svg));
    this.holder.replaceChildren(svg);
  }

  marks(line) {
    const { s, v, lo, hi } = line.curve;
    const draw = (values) =>
      values
        .map((value, n) => `${n ? "L" : "M"}${this.x(s[n]).toFixed(1)} ${this.y(value).toFixed(1)}`)
        .join("");
    const stroke = {
      fill: "none",
      stroke: line.color,
      "stroke-dasharray": line.dash,
      "stroke-linejoin": "round",
    };
    if (line.dots)
      return [
        el("path", { d: draw(v), ...stroke, "stroke-width": 1.8 }),
        ...(s.length < 60 ? s : []).map((step, n) =>
          el("circle", { cx: this.x(step), cy: this.y(v[n]), r: 2.6, fill: line.color }),
        ),
      ];
    const marks = [];
    if (lo) {
      const back = hi
        .map((value, n) => `L${this.x(s[n]).toFixed(1)} ${this.y(value).toFixed(1)}`)
        .reverse()
        .join("");
      marks.push(el("path", { d: `${draw(lo)}${back}Z`, fill: line.color, opacity: 0.16 }));
    }
    const rough = s.length > 24 && !isSmooth(v);
    if (rough) marks.push(el("path", { d: draw(v), ...stroke, "stroke-width": 0.9, opacity: 0.4 }));
    marks.push(el("path", { d: draw(rough ? smooth(v) : v), ...stroke, "stroke-width": 1.9 }));
    return marks;
  }

  nearest(step) {
    const steps = this.lines.filter((line) => line.shown).flatMap((line) => line.curve.s);
    return steps.reduce(
      (best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best),
      steps[0] ?? 0,
    );
  }

  point(step, x, y) {
    this.at = step;
    for (const plot of plots) plot.mark(step);
    const rows = this.lines
      .filter((line) => line.shown)
      .map((line) => {
        const n = line.curve.s.indexOf(step);
        if (n < 0) return null;
        const spread =
          line.curve.lo && line.curve.lo[n] !== line.curve.hi[n]
            ? ` (${short(line.curve.lo[n])} to ${short(line.curve.hi[n])})`
            : "";
        return el(
          "div",
          {},
          el("span", { class: "swatch", style: { background: line.color } }),
          `${line.label} `,
          el("b", {}, short(line.curve.v[n])),
          spread,
        );
      });
    tip.show(x, y, el("div", { class: "dim" }, `step ${step}`), ...rows.filter(Boolean));
  }

  mark(step) {
    if (!this.cross) return;
    this.cross.setAttribute("visibility", "visible");
    this.cross.setAttribute("x1", this.x(step));
    this.cross.setAttribute("x2", this.x(step));
  }

  leave() {
    tip.hide();
    for (const plot of plots) plot.cross?.setAttribute("visibility", "hidden");
  }

  keyed(event, svg) {
    const steps = [...new Set(this.lines.flatMap((line) => line.curve.s))].sort((a, b) => a - b);
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -steps.length, End: steps.length }[
      event.key
    ];
    if (event.key === "Escape") this.leave();
    if (move === undefined) return;
    event.preventDefault();
    const now = this.at === null ? (move > 0 ? -1 : steps.length) : steps.indexOf(this.at);
    const step = steps[Math.min(steps.length - 1, Math.max(0, now + move))];
    const box = svg.getBoundingClientRect();
    this.point(step, box.left + this.x(step), box.top + this.height / 3);
  }

  summary() {
    const said = this.lines.map(
      ({ label, curve: { s, v } }) =>
        `${label} ${short(v[0])} at step ${s[0]}, ${short(v.at(-1))} at step ${s.at(-1)}`,
    );
    return `${this.panel.title}: ${said.join("; ")}. Arrow keys read its steps.`;
  }
}
