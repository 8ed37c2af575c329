// The page: what a run came to at a glance, then each part of it, then all of its numbers.

const report = JSON.parse(document.getElementById("data").textContent);
const runs = report.runs;
const many = runs.length > 1;

function section(id, title, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), ...children);
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
  return el("div", { class: "change" }, el("span", { class: "dim" }, label),
    el("span", {}, say(from), " → ", el("b", {}, say(to)), " ", el("span", { class: good }, `${gain > 0 ? "+" : ""}${share ? gain.toFixed(3).replace("-", "−") : short(gain)}`)));
}

function learned(run) {
  const scores = matching("eval/*/greedy", run.curves);
  const rows = scores.map((name) => change(`greedy, ${name.split("/")[1]}`, [first(run, name), last(run, name)], { share: true, better: true }));
  for (const [label, name] of [["labels right", "vote/label_accuracy"], ["reward", "reward"]]) {
    const found = ends(run, name);
    if (found) rows.push(change(label, found, { share: true, better: true }));
  }
  return rows;
}

function voted(run) {
  const rows = [];
  for (const [label, name] of [["vote share", "vote/majority_ratio"], ["answered", "vote/answered"], ["distinct labels", "vote/distinct_labels"], ["entropy (nats)", "entropy"]]) {
    const found = ends(run, name);
    if (found) rows.push(change(label, found));
  }
  const count = run.alarms?.length ?? 0;
  rows.push(el("div", { class: "change" }, el("span", { class: "dim" }, "alarms"),
    run.alarms === null ? el("span", {}, "not recorded")
      : count ? el("a", { href: "#alarms", class: "bad" }, `${count}, the first at step ${run.alarms[0].step}`) : el("b", { class: "good" }, "none")));
  return rows;
}

function costs(run) {
  const parts = ["sampling", "scoring", "updating", "syncing"].map((name) => [name, mean(run, `timing/${name}`) ?? 0]);
  const whole = parts.reduce((sum, [, value]) => sum + value, 0);
  const saved = mean(run, "tree/tokens_saved_ratio");
  const row = (label, ...value) => el("div", { class: "change" }, el("span", { class: "dim" }, label), el("span", {}, ...value));
  return [
    row("sampled tokens", el("b", {}, short(last(run, "num_tokens")))),
    saved === null ? null : row("saved by sharing", el("b", {}, percent(saved))),
    row("time of all steps", el("b", {}, seconds(run) === null ? "–" : duration(seconds(run)))),
    whole ? el("div", { class: "parts", role: "img", "aria-label": parts.map(([name, value]) => `${name} ${percent(value / whole)}`).join(", ") },
      ...parts.map(([, value], n) => el("span", { style: { width: `${(100 * value) / whole}%`, background: LINES[n] } }))) : null,
    whole ? el("div", { class: "parts-key dim" }, ...parts.filter(([, value]) => value / whole > 0.005).map(([name, value]) =>
      el("span", {}, el("span", { class: "swatch", style: { background: LINES[parts.findIndex(([one]) => one === name)] } }), `${name} ${percent(value / whole)}`))) : null,
  ].filter(Boolean);
}

function state(run) {
  return run.finished ? el("span", { class: "pill" }, `finished, ${run.last} steps`) : el("span", { class: "pill open" }, `step ${run.last} of ${run.steps}: not finished`);
}

function head() {
  const title = many ? `${runs.length} runs side by side` : runs[0].title;
  document.getElementById("head").append(
    el("h1", {}, title),
    ...(many ? [] : [el("p", { class: "dim under" }, state(runs[0]), ` ${runs[0].name}`)]));
}

function glance() {
  const cards = (run) => el("div", { class: "glance" },
    el("div", { class: "card" }, el("h3", {}, "Is it learning?"), ...learned(run)),
    el("div", { class: "card" }, el("h3", {}, "Is the vote healthy?"), ...voted(run)),
    el("div", { class: "card" }, el("h3", {}, "What did it cost?"), ...costs(run)));
  if (!many) return el("section", { id: "glance", "aria-label": "At a glance" }, cards(runs[0]));
  return el("section", { id: "glance", "aria-label": "At a glance" }, ...runs.map((run, r) => el("div", { class: "one-run" },
    el("h3", {}, el("span", { class: "swatch", style: { background: LINES[r % LINES.length] } }), run.name, el("span", { class: "dim" }, ` ${run.title} `), state(run)), cards(run))));
}

function panels(which) {
  const alarms = many ? [] : (runs[0].alarms ?? []).map((row) => row.step);
  const drawn = which.map((panel) => new Plot(panel, runs, { alarms }));
  const missing = drawn.filter((plot) => !plot.lines.length).map((plot) => plot.panel.title);
  return [el("div", { class: "grid" }, ...drawn.filter((plot) => plot.lines.length).map((plot) => plot.figure)),
    missing.length ? el("p", { class: "dim" }, `Not measured here: ${missing.join("; ")}.`) : null].filter(Boolean);
}

function alarms() {
  const parts = runs.map((run) => {
    const name = many ? el("h4", {}, run.name) : null;
    if (run.alarms === null) return el("div", {}, name, el("p", { class: "dim" }, "This run has no alarms.jsonl: the version of pyrl that made it kept no record of its alarms."));
    if (!run.alarms.length) return el("div", {}, name, el("p", { class: "dim" }, "No alarm spoke."));
    return el("div", {}, name, el("ol", { class: "alarms" }, ...run.alarms.map((row) =>
      el("li", {}, el("span", { class: "step" }, `step ${row.step}`), el("span", {}, row.alarm.replace(/^Step \d+[:,] /, ""))))));
  });
  return el("div", { id: "alarms", class: "card" }, el("h3", {}, "What alarms said"),
    !many && runs[0].alarms?.length ? el("p", { class: "dim" }, "▲ below the curves marks these steps.") : null, ...parts);
}

function scores() {
  const names = [...new Set(runs.flatMap((run) => matching("eval/*", run.curves)))];
  if (!names.length) return null;
  const sets = [...new Set(names.map((name) => name.split("/")[1]))];
  const score = (name) => name.split("/").slice(2).join("/");
  const kinds = [...new Set(names.map(score))];
  const rows = runs.flatMap((run) => kinds.map((kind) => el("tr", {}, many ? el("th", { scope: "row" }, run.name) : null, el("th", { scope: "row" }, kind.replace("/", ", ")),
    ...sets.map((set) => {
      const name = `eval/${set}/${kind}`, from = first(run, name), to = last(run, name);
      if (from === null) return el("td", {});
      const one = run.curves[name].v.length < 2;
      return el("td", {}, one ? from.toFixed(3) : `${from.toFixed(3)} → `, one ? null : el("b", {}, to.toFixed(3)));
    }))));
  return el("details", { class: "card" }, el("summary", {}, "All scores, first and last"),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, many ? el("th", {}, "run") : null, el("th", {}, ""), ...sets.map((set) => el("th", {}, set)))), el("tbody", {}, ...rows))));
}

function trees() {
  const shown = runs.flatMap((run) => run.trees.shown.map((tree) => ({ run, tree })));
  if (!shown.length) {
    const found = runs.some((run) => run.trees.steps);
    return section("trees", "Trees", el("p", { class: "card dim" }, found ? "The saved trees are empty."
      : "No trees were saved. A run with --save-trees N saves those of the first N questions of each step: pyrl train METHOD ... --save-trees 2"));
  }
  const viewer = new Viewer();
  const says = ({ run, tree }) => `${many ? `${run.name}: ` : ""}step ${tree.step} · ${tree.text.replace(/\s+/g, " ").slice(0, 60)} · ${percent(tree.share)} for the label${tree.label_right === null ? "" : tree.label_right ? ", which is true" : ", which is false"}`;
  const select = el("select", { "aria-label": "Tree", onchange: () => viewer.show(shown[select.value].tree) }, ...shown.map((one, n) => el("option", { value: n }, says(one))));
  const move = (by) => {
    select.value = Math.min(shown.length - 1, Math.max(0, Number(select.value) + by));
    viewer.show(shown[select.value].tree);
  };
  report.open = (n) => {
    select.value = n;
    viewer.show(shown[n].tree);
    document.getElementById("trees").scrollIntoView();
  };
  report.shown = shown;
  // A vote that is split in half shows the most; of equal ones the newest.
  const split = (n) => Math.abs(shown[n].tree.share - 0.5);
  const contested = shown.reduce((best, _, n) => (split(n) <= split(best) ? n : best), 0);
  select.value = contested;
  const out = runs.filter((run) => new Set(run.trees.shown.map((tree) => tree.step)).size < run.trees.steps);
  const node = section("trees", "Trees",
    el("div", { class: "choose" }, el("button", { type: "button", onclick: () => move(-1), "aria-label": "earlier tree" }, "‹"), select, el("button", { type: "button", onclick: () => move(1), "aria-label": "later tree" }, "›")),
    out.length ? el("p", { class: "dim" }, out.map((run) => `Trees of ${new Set(run.trees.shown.map((tree) => tree.step)).size} of ${run.trees.steps} saved steps${many ? ` of ${run.name}` : ""} are shown, spread over the run; the others are in its folder trees.`).join(" ")) : null,
    viewer.node);
  requestAnimationFrame(() => viewer.show(shown[contested].tree));
  return node;
}

function questions() {
  const rows = runs.flatMap((run) => run.completions.rows.map((row) => ({ run, row })));
  rows.reverse();
  const all = runs.reduce((sum, run) => sum + run.completions.all, 0);
  if (!rows.length) return section("questions", "Questions", el("p", { class: "card dim" }, "This run has no completions.jsonl with responses."));
  const body = el("tbody"), said = el("p", { class: "dim", role: "status" });
  let most = 50;
  const truth = rows.some(({ row }) => typeof row.truth === "string");
  const line = ({ run, row }) => {
    const same = row.truth === row.label;
    const more = el("tr", { class: "more", hidden: true }, el("td", { colspan: 6 + (many ? 1 : 0) }, el("h4", {}, "question"), el("pre", {}, row.prompt ?? ""), el("h4", {}, "response"), el("pre", {}, row.completion ?? "")));
    const at = (report.shown ?? []).findIndex(({ run: its, tree }) => its === run && tree.step === row.step && tree.text === row.prompt);
    const open = el("button", { type: "button", class: "fold", "aria-expanded": "false", "aria-label": "show the response", onclick: () => {
      more.hidden = !more.hidden;
      open.textContent = more.hidden ? "▸" : "▾";
      open.setAttribute("aria-expanded", String(!more.hidden));
    } }, "▸");
    return [el("tr", {}, many ? el("td", {}, run.name) : null,
      el("td", { class: "nowrap" }, open, ` ${row.step}`, at < 0 ? null : el("button", { type: "button", class: "link", onclick: () => report.open(at) }, "tree")),
      el("td", { class: "cut" }, row.prompt ?? ""), el("td", { class: "cut" }, el("code", {}, row.label ?? "–")),
      truth ? el("td", { class: "cut" }, el("code", {}, row.truth ?? "–"), same ? el("span", { class: "good", title: "the label is the true answer" }, " ✓") : null) : null,
      el("td", { class: "cut" }, el("code", {}, row.answer ?? "none read")), el("td", {}, short(row.reward))), more];
  };
  const filter = el("input", { type: "search", placeholder: "filter", "aria-label": "Filter the questions", oninput: () => { most = 50; draw(); } });
  const button = el("button", { type: "button", onclick: () => { most += 200; draw(); } }, "show more");
  const draw = () => {
    const wanted = filter.value.toLowerCase();
    const found = rows.filter(({ row }) => !wanted || ["prompt", "completion", "answer", "label", "truth"].some((name) => String(row[name] ?? "").toLowerCase().includes(wanted)));
    body.replaceChildren(...found.slice(0, most).flatMap(line));
    button.hidden = found.length <= most;
    said.textContent = `${Math.min(most, found.length)} of ${found.length} responses${rows.length < all ? `; ${rows.length} of the ${all} in completions.jsonl are in this page` : ""}, the newest first.`;
  };
  draw();
  const columns = [many ? "run" : null, "step", "question", "label", truth ? "true answer" : null, "answer of a response", "its reward"].filter(Boolean);
  return section("questions", "Questions", el("div", { class: "tools" }, filter, said),
    el("div", { class: "scroll card" }, el("table", {}, el("thead", {}, el("tr", {}, ...columns.map((name) => el("th", { scope: "col" }, name)))), body)), button);
}

function metrics() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].sort();
  const about = el("p", { class: "dim" }), holder = el("div");
  const select = el("select", { "aria-label": "Metric", onchange: () => draw() }, ...names.map((name) => el("option", { value: name }, name)));
  const draw = () => {
    const name = select.value;
    plots.splice(0, plots.length, ...plots.filter((plot) => plot.figure.isConnected && !holder.contains(plot.figure)));
    about.textContent = report.meaning[name] ?? (name.startsWith("vote/post_") ? `${report.meaning[name.replace("post_", "")] ?? name}: of the leaves that train` : "a score of an evaluation, or a metric of a choice");
    holder.replaceChildren(new Plot({ title: name, lines: [[name, name]] }, runs, { height: 260 }).figure);
  };
  select.value = names.includes("loss") ? "loss" : names[0];
  requestAnimationFrame(draw);
  return section("metrics", "All metrics", el("div", { class: "tools" }, select), about, holder);
}

function settings() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const value = (run, name) => { const found = run.settings[name]; return found === undefined ? "–" : found === null ? "none" : String(found); };
  const differ = names.filter((name) => new Set(runs.map((run) => value(run, name))).size > 1);
  const table = (which) => el("div", { class: "scroll" }, el("table", {}, many ? el("thead", {}, el("tr", {}, el("th", {}, ""), ...runs.map((run) => el("th", {}, run.name)))) : null,
    el("tbody", {}, ...which.map((name) => el("tr", {}, el("th", { scope: "row" }, name), ...runs.map((run) => el("td", { class: "cut" }, value(run, name))))))));
  return section("settings", "Settings", many ? el("div", { class: "card" }, el("h3", {}, "What differs"), table(differ)) : null,
    el("details", { class: "card" }, el("summary", {}, "All settings (run.yaml)"), table(names)));
}

head();
document.getElementById("main").append(
  glance(),
  ...report.sections.map(({ id, title, panels: which }) => section(id, title, ...panels(which), ...(id === "vote" ? [alarms()] : id === "learning" ? [scores()] : []).filter(Boolean))),
  trees(), questions(), metrics(), settings());
document.getElementById("nav").append(...[...document.querySelectorAll("section[id] > h2")].map((title) =>
  el("a", { href: `#${title.parentNode.id}` }, title.textContent)));
