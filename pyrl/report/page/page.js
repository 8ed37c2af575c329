// The page: what a run came to at a glance, then each part of it, then all of its numbers.

function panels(which) {
  const alarms = many ? [] : (runs[0].alarms ?? []).map((row) => row.step);
  const drawn = which.map((panel) => new Plot(panel, runs, { alarms }));
  const missing = drawn.filter((plot) => !plot.lines.length).map((plot) => plot.panel.title);
  return [
    el(
      "div",
      { class: "grid" },
      ...drawn.filter((plot) => plot.lines.length).map((plot) => plot.figure),
    ),
    missing.length ? el("p", { class: "dim" }, `Not measured here: ${missing.join("; ")}.`) : null,
  ].filter(Boolean);
}

function trees() {
  const shown = runs.flatMap((run) => run.trees.shown.map((tree) => ({ run, tree })));
  if (!shown.length) {
    const found = runs.some((run) => run.trees.steps);
    return section(
      "trees",
      "Trees",
      el(
        "p",
        { class: "card dim" },
        found
          ? "The saved trees are empty."
          : "No trees were saved. A run with --save-trees N saves those of the first N questions of each step: pyrl train METHOD ... --save-trees 2",
      ),
    );
  }
  const viewer = new Viewer();
  const says = ({ run, tree }) =>
    `${many ? `${run.name}: ` : ""}step ${tree.step} · ${tree.text.replace(/\s+/g, " ").slice(0, 60)} · ${percent(tree.share)} for the label${tree.label_right === null ? "" : tree.label_right ? ", which is true" : ", which is false"}`;
  const select = el(
    "select",
    { "aria-label": "Tree", onchange: () => viewer.show(shown[select.value].tree) },
    ...shown.map((one, n) => el("option", { value: n }, says(one))),
  );
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
  const out = runs.filter(
    (run) => new Set(run.trees.shown.map((tree) => tree.step)).size < run.trees.steps,
  );
  const node = section(
    "trees",
    "Trees",
    el(
      "div",
      { class: "choose" },
      el("button", { type: "button", onclick: () => move(-1), "aria-label": "earlier tree" }, "‹"),
      select,
      el("button", { type: "button", onclick: () => move(1), "aria-label": "later tree" }, "›"),
    ),
    out.length
      ? el(
          "p",
          { class: "dim" },
          out
            .map(
              (run) =>
                `Trees of ${new Set(run.trees.shown.map((tree) => tree.step)).size} of ${run.trees.steps} saved steps${many ? ` of ${run.name}` : ""} are shown, spread over the run; the others are in its folder trees.`,
            )
            .join(" "),
        )
      : null,
    viewer.node,
  );
  requestAnimationFrame(() => viewer.show(shown[contested].tree));
  return node;
}

head();
document
  .getElementById("main")
  .append(
    glance(),
    ...report.sections.map(({ id, title, panels: which }) =>
      section(
        id,
        title,
        ...panels(which),
        ...(id === "vote" ? [alarms()] : id === "learning" ? [scores()] : []).filter(Boolean),
      ),
    ),
    trees(),
    questions(),
    metrics(),
    settings(),
  );
document
  .getElementById("nav")
  .append(
    ...[...document.querySelectorAll("section[id] > h2")].map((title) =>
      el("a", { href: `#${title.parentNode.id}` }, title.textContent),
    ),
  );
