// What runs came to at a glance: is it learning, is the vote healthy, what did it cost?

const report = JSON.parse(document.getElementById("data").textContent);
const runs = report.runs;
const many = runs.length > 1;

function section(id, title, ...children) {
  return el(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, title),
    ...children,
  );
}

function first(run, name) {
  return run.curves[name]?.v[0] ?? null;
}

function last(run, name) {
  return run.curves[name]?.v.at(-1) ?? null;
}

function mean(run, name) {
  const values = run.curves[name]?.v;
  return values ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

// Means of the first and of the last part of a curve, of at most five points each.
function ends(run, name) {
  const values = run.curves[name]?.v;
  if (!values) return null;
  const count = Math.max(1, Math.min(5, Math.floor(values.length / 2)));
  const of = (part) => part.reduce((sum, value) => sum + value, 0) / part.length;
  return [of(values.slice(0, count)), of(values.slice(-count))];
}

function seconds(run) {
  const curve = run.curves.step_time;
  return curve ? mean(run, "step_time") * run.last : null;
}

function change(label, [from, to], { share = false, better = null } = {}) {
  const say = share ? (value) => value.toFixed(3) : short;
  const gain = to - from;
  const good = better === null || Math.abs(gain) < 5e-4 ? "" : gain > 0 === better ? "good" : "bad";
  return el(
    "div",
    { class: "change" },
    el("span", { class: "dim" }, label),
    el(
      "span",
      {},
      say(from),
      " → ",
      el("b", {}, say(to)),
      " ",
      el(
        "span",
        { class: good },
        `${gain > 0 ? "+" : ""}${share ? gain.toFixed(3).replace("-", "−") : short(gain)}`,
      ),
    ),
  );
}

function learned(run) {
  const scores = matching("eval/*/greedy", run.curves);
  const rows = scores.map((name) =>
    change(`greedy, ${name.split("/")[1]}`, [first(run, name), last(run, name)], {
      share: true,
      better: true,
    }),
  );
  for (const [label, name] of [
    ["labels right", "vote/label_accuracy"],
    ["reward", "reward"],
  ]) {
    const found = ends(run, name);
    if (found) rows.push(change(label, found, { share: true, better: true }));
  }
  return rows;
}

function voted(run) {
  const rows = [];
  for (const [label, name] of [
    ["vote share", "vote/majority_ratio"],
    ["answered", "vote/answered"],
    ["distinct labels", "vote/distinct_labels"],
    ["entropy (nats)", "entropy"],
  ]) {
    const found = ends(run, name);
    if (found) rows.push(change(label, found, { share: name !== "entropy" }));
  }
  const count = run.alarms?.length ?? 0;
  rows.push(
    el(
      "div",
      { class: "change" },
      el("span", { class: "dim" }, "alarms"),
      run.alarms === null
        ? el("span", {}, "not recorded")
        : count
          ? el(
              "a",
              { href: "#alarms", class: "bad" },
              `${count}, the first at step ${run.alarms[0].step}`,
            )
          : el("b", { class: "good" }, "none"),
    ),
  );
  return rows;
}

function costs(run) {
  const parts = ["sampling", "scoring", "updating", "syncing", "waiting"].map((name) => [
    name,
    mean(run, `timing/${name}`) ?? 0,
  ]);
  const whole = parts.reduce((sum, [, value]) => sum + value, 0);
  const saved = mean(run, "tree/tokens_saved_ratio");
  const row = (label, ...value) =>
    el("div", { class: "change" }, el("span", { class: "dim" }, label), el("span", {}, ...value));
  return [
    row("sampled tokens", el("b", {}, short(last(run, "num_tokens")))),
    saved === null ? null : row("saved by sharing", el("b", {}, percent(saved))),
    row("time of all steps", el("b", {}, seconds(run) === null ? "–" : duration(seconds(run)))),
    whole
      ? el(
          "div",
          {
            class: "parts",
            role: "img",
            "aria-label": parts
              .map(([name, value]) => `${name} ${percent(value / whole)}`)
              .join(", "),
          },
          ...parts.map(([, value], n) =>
            el("span", { style: { width: `${(100 * value) / whole}%`, background: LINES[n] } }),
          ),
        )
      : null,
    whole
      ? el(
          "div",
          { class: "parts-key dim" },
          ...parts
            .filter(([, value]) => value / whole > 0.005)
            .map(([name, value]) =>
              el(
                "span",
                {},
                el("span", {
                  class: "swatch",
                  style: { background: LINES[parts.findIndex(([one]) => one === name)] },
                }),
                `${name} ${percent(value / whole)}`,
              ),
            ),
        )
      : null,
  ].filter(Boolean);
}

function state(run) {
  return run.finished
    ? el("span", { class: "pill" }, `finished, ${run.last} steps`)
    : el("span", { class: "pill open" }, `step ${run.last} of ${run.steps}: not finished`);
}

function head() {
  const title = many ? `${runs.length} runs side by side` : runs[0].title;
  document
    .getElementById("head")
    .append(
      el("h1", {}, title),
      ...(many ? [] : [el("p", { class: "dim under" }, state(runs[0]), ` ${runs[0].name}`)]),
    );
}

function glance() {
  const cards = (run) =>
    el(
      "div",
      { class: "glance" },
      el("div", { class: "card" }, el("h3", {}, "Is it learning?"), ...learned(run)),
      el("div", { class: "card" }, el("h3", {}, "Is the vote healthy?"), ...voted(run)),
      el("div", { class: "card" }, el("h3", {}, "What did it cost?"), ...costs(run)),
    );
  if (!many) return el("section", { id: "glance", "aria-label": "At a glance" }, cards(runs[0]));
  return el(
    "section",
    { id: "glance", "aria-label": "At a glance" },
    ...runs.map((run, r) =>
      el(
        "div",
        { class: "one-run" },
        el(
          "h3",
          {},
          el("span", { class: "swatch", style: { background: LINES[r % LINES.length] } }),
          run.name,
          el("span", { class: "dim" }, ` ${run.title} `),
          state(run),
        ),
        cards(run),
      ),
    ),
  );
}
