// What is read and not seen: alarms, scores, questions, single metrics, settings.

function alarms() {
  const parts = runs.map((run) => {
    const name = many ? el("h4", {}, run.name) : null;
    if (run.alarms === null)
      return el(
        "div",
        {},
        name,
        el(
          "p",
          { class: "dim" },
          "This run has no alarms.jsonl: the version of pyrl that made it kept no record of its alarms.",
        ),
      );
    if (!run.alarms.length)
      return el("div", {}, name, el("p", { class: "dim" }, "No alarm spoke."));
    return el(
      "div",
      {},
      name,
      el(
        "ol",
        { class: "alarms" },
        ...run.alarms.map((row) =>
          el(
            "li",
            {},
            el("span", { class: "step" }, `step ${row.step}`),
            el("span", {}, row.alarm.replace(/^Step \d+[:,] /, "")),
          ),
        ),
      ),
    );
  });
  return el(
    "div",
    { id: "alarms", class: "card" },
    el("h3", {}, "What alarms said"),
    !many && runs[0].alarms?.length
      ? el("p", { class: "dim" }, "▲ below the curves marks these steps.")
      : null,
    ...parts,
  );
}

function scores() {
  const names = [...new Set(runs.flatMap((run) => matching("eval/*", run.curves)))];
  if (!names.length) return null;
  const sets = [...new Set(names.map((name) => name.split("/")[1]))];
  const score = (name) => name.split("/").slice(2).join("/");
  const kinds = [...new Set(names.map(score))];
  const rows = runs.flatMap((run) =>
    kinds.map((kind) =>
      el(
        "tr",
        {},
        many ? el("th", { scope: "row" }, run.name) : null,
        el("th", { scope: "row" }, kind.replace("/", ", ")),
        ...sets.map((set) => {
          const name = `eval/${set}/${kind}`,
            from = first(run, name),
            to = last(run, name);
          if (from === null) return el("td", {});
          const one = run.curves[name].v.length < 2;
          return el(
            "td",
            {},
            one ? from.toFixed(3) : `${from.toFixed(3)} → `,
            one ? null : el("b", {}, to.toFixed(3)),
          );
        }),
      ),
    ),
  );
  return el(
    "details",
    { class: "card" },
    el("summary", {}, "All scores, first and last"),
    el(
      "div",
      { class: "scroll" },
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            many ? el("th", {}, "run") : null,
            el("th", {}, ""),
            ...sets.map((set) => el("th", {}, set)),
          ),
        ),
        el("tbody", {}, ...rows),
      ),
    ),
  );
}

function questions() {
  const rows = runs.flatMap((run) => run.completions.rows.map((row) => ({ run, row })));
  rows.reverse();
  const all = runs.reduce((sum, run) => sum + run.completions.all, 0);
  if (!rows.length)
    return section(
      "questions",
      "Questions",
      el("p", { class: "card dim" }, "This run has no completions.jsonl with responses."),
    );
  const body = el("tbody"),
    said = el("p", { class: "dim", role: "status" });
  let most = 50;
  const truth = rows.some(({ row }) => typeof row.truth === "string");
  const line = ({ run, row }) => {
    const same = row.truth === row.label;
    const more = el(
      "tr",
      { class: "more", hidden: true },
      el(
        "td",
        { colspan: 6 + (many ? 1 : 0) },
        el("h4", {}, "question"),
        el("pre", {}, row.prompt ?? ""),
        el("h4", {}, "response"),
        el("pre", {}, row.completion ?? ""),
      ),
    );
    const at = (report.shown ?? []).findIndex(
      ({ run: its, tree }) => its === run && tree.step === row.step && tree.text === row.prompt,
    );
    const open = el(
      "button",
      {
        type: "button",
        class: "fold",
        "aria-expanded": "false",
        "aria-label": "show the response",
        onclick: () => {
          more.hidden = !more.hidden;
          open.textContent = more.hidden ? "▸" : "▾";
          open.setAttribute("aria-expanded", String(!more.hidden));
        },
      },
      "▸",
    );
    return [
      el(
        "tr",
        {},
        many ? el("td", {}, run.name) : null,
        el(
          "td",
          { class: "nowrap" },
          open,
          ` ${row.step}`,
          at < 0
            ? null
            : el(
                "button",
                { type: "button", class: "link", onclick: () => report.open(at) },
                "tree",
              ),
        ),
        el("td", { class: "cut" }, row.prompt ?? ""),
        el("td", { class: "cut" }, el("code", {}, row.label ?? "–")),
        truth
          ? el(
              "td",
              { class: "cut" },
              el("code", {}, row.truth ?? "–"),
              same
                ? el("span", { class: "good", title: "the label is the true answer" }, " ✓")
                : null,
            )
          : null,
        el("td", { class: "cut" }, el("code", {}, row.answer ?? "none read")),
        el("td", {}, short(row.reward)),
      ),
      more,
    ];
  };
  const filter = el("input", {
    type: "search",
    placeholder: "filter",
    "aria-label": "Filter the questions",
    oninput: () => {
      most = 50;
      draw();
    },
  });
  const button = el(
    "button",
    {
      type: "button",
      onclick: () => {
        most += 200;
        draw();
      },
    },
    "show more",
  );
  const draw = () => {
    const wanted = filter.value.toLowerCase();
    const found = rows.filter(
      ({ row }) =>
        !wanted ||
        ["prompt", "completion", "answer", "label", "truth"].some((name) =>
          String(row[name] ?? "")
            .toLowerCase()
            .includes(wanted),
        ),
    );
    body.replaceChildren(...found.slice(0, most).flatMap(line));
    button.hidden = found.length <= most;
    said.textContent = `${Math.min(most, found.length)} of ${found.length} responses${rows.length < all ? `; ${rows.length} of the ${all} in completions.jsonl are in this page` : ""}, the newest first.`;
  };
  draw();
  const columns = [
    many ? "run" : null,
    "step",
    "question",
    "label",
    truth ? "true answer" : null,
    "answer of a response",
    "its reward",
  ].filter(Boolean);
  return section(
    "questions",
    "Questions",
    el("div", { class: "tools" }, filter, said),
    el(
      "div",
      { class: "scroll card" },
      el(
        "table",
        {},
        el("thead", {}, el("tr", {}, ...columns.map((name) => el("th", { scope: "col" }, name)))),
        body,
      ),
    ),
    button,
  );
}

function metrics() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].sort();
  const about = el("p", { class: "dim" }),
    holder = el("div");
  const select = el(
    "select",
    { "aria-label": "Metric", onchange: () => draw() },
    ...names.map((name) => el("option", { value: name }, name)),
  );
  const draw = () => {
    const name = select.value;
    plots.splice(
      0,
      plots.length,
      ...plots.filter((plot) => plot.figure.isConnected && !holder.contains(plot.figure)),
    );
    about.textContent =
      report.meaning[name] ??
      (name.startsWith("vote/post_")
        ? `${report.meaning[name.replace("post_", "")] ?? name}: of the leaves that train`
        : "a score of an evaluation, or a metric of a choice");
    holder.replaceChildren(
      new Plot({ title: name, lines: [[name, name]] }, runs, { height: 260 }).figure,
    );
  };
  select.value = names.includes("loss") ? "loss" : names[0];
  requestAnimationFrame(draw);
  return section("metrics", "All metrics", el("div", { class: "tools" }, select), about, holder);
}

function settings() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const value = (run, name) => {
    const found = run.settings[name];
    return found === undefined ? "–" : found === null ? "none" : String(found);
  };
  const differ = names.filter((name) => new Set(runs.map((run) => value(run, name))).size > 1);
  const table = (which) =>
    el(
      "div",
      { class: "scroll" },
      el(
        "table",
        {},
        many
          ? el(
              "thead",
              {},
              el("tr", {}, el("th", {}, ""), ...runs.map((run) => el("th", {}, run.name))),
            )
          : null,
        el(
          "tbody",
          {},
          ...which.map((name) =>
            el(
              "tr",
              {},
              el("th", { scope: "row" }, name),
              ...runs.map((run) => el("td", { class: "cut" }, value(run, name))),
            ),
          ),
        ),
      ),
    );
  return section(
    "settings",
    "Settings",
    many ? el("div", { class: "card" }, el("h3", {}, "What differs"), table(differ)) : null,
    el("details", { class: "card" }, el("summary", {}, "All settings (run.yaml)"), table(names)),
  );
}
