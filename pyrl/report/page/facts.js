// What is told of a tree: its question and votes, a path, a token.

const MARKS = "● elects the label  ○ another answer  ◇ no answer  × pruned  ∎ end";

function questionFacts(tree) {
  const data = tree.data;
  const all = tree.leaves
    .filter(({ segment }) => segment !== null)
    .reduce((sum, { segment }) => sum + data.segments[segment][1] + data.segments[segment][2], 0);
  const forks = tree.children.filter((below) => below.length > 1).length;
  const most = Math.max(...tree.answers.map((answer) => answer.weight));
  const votes = tree.answers.slice(0, 6).flatMap((answer) => [
    el(
      "span",
      { class: "vote-bar" },
      el("span", {
        class: answer.elects ? "elects" : "",
        style: { width: `${(100 * answer.weight) / most}%` },
      }),
    ),
    el("code", {}, answer.answer ?? "no answer"),
    el(
      "span",
      { class: "dim" },
      `${tree.weighs ? percent(answer.weight) : answer.leaves}${answer.elects ? " · the label" : ""}${answer.right === 1 ? " · true" : ""}`,
    ),
  ]);
  if (tree.answers.length > 6)
    votes.push(el("span", { class: "dim rest" }, `and ${tree.answers.length - 6} other answers`));
  return [
    el(
      "div",
      { class: "question card" },
      el("span", { class: "dim" }, "question"),
      el("pre", {}, plainly(data.text)),
      el(
        "div",
        { class: "row-of-facts" },
        fact("label ", data.label ?? "none"),
        data.answer === null ? null : fact("true answer ", data.answer),
        fact("share ", percent(data.share)),
        fact("margin ", percent(data.margin)),
        fact("leaves ", String(tree.leaves.length)),
        fact("pruned ", String(tree.pruned)),
        fact("independent samples ", String(tree.roots.length)),
        fact("forks ", String(forks)),
        fact("tokens ", `${short(tree.tokens)}`),
        fact("leaves without sharing ", short(all)),
      ),
      tree.left
        ? el(
            "p",
            { class: "dim" },
            `The first ${tree.shownEnds} ends are shown, the other ${tree.left} do not fit in this page: they are in trees/${data.step}.safetensors.`,
          )
        : null,
      data.spelled
        ? null
        : el(
            "p",
            { class: "dim" },
            "This tokenizer does not spell token by token: each token is shown as it reads alone.",
          ),
    ),
    el(
      "div",
      { class: "votes card" },
      el("span", { class: "dim" }, tree.weighs ? "votes, by their mass" : "votes"),
      el("div", { class: "vote" }, ...votes),
    ),
  ];
}

// What a branch came to.
function chipsOf(branch) {
  if (branch.pruned) return [el("span", { class: "chip cut" }, `× ${branch.pruned}`)];
  const sign = branch.answer === null ? "◇" : branch.elects ? "●" : "○";
  const chips = [
    el(
      "span",
      { class: `chip ${branch.elects ? "elects" : ""}` },
      `${sign} ${branch.answer ?? "no answer"}`,
    ),
  ];
  if (branch.reward !== null)
    chips.push(el("span", { class: "chip" }, `reward ${short(branch.reward)}`));
  if (!branch.trains) chips.push(el("span", { class: "chip dim" }, "does not train"));
  return chips;
}

// A token of a segment.
function tokenFacts(tree, u, s) {
  const data = tree.data,
    logprob = data.logprob[u];
  const position = data.segments[s][1] + u - tree.first[s];
  return [
    el(
      "div",
      {},
      el("b", {}, JSON.stringify(data.words[data.word[u]])),
      el("span", { class: "dim" }, ` id ${data.id[u]}, token ${position + 1}`),
    ),
    fact(
      "probability ",
      logprob === null ? "–" : `${short(Math.exp(logprob))} (${short(logprob)} nats)`,
    ),
    ...Object.entries(MEASURES).map(([name, { label, signed: sign }]) =>
      fact(
        `${label} `,
        data[name][u] === null ? "–" : sign ? signed(data[name][u]) : short(data[name][u]),
      ),
    ),
    fact("ends below ", String(tree.ends[s])),
  ];
}

// The path down to a segment, beside the means over it.
function pathFacts(tree, s, ...controls) {
  const data = tree.data,
    branch = tree.branch[s];
  const [, begin, length] = data.segments[s];
  return [
    el(
      "div",
      { class: "path-head" },
      el("b", {}, branch ? (branch.pruned ? "pruned branch" : "leaf") : "part of several paths"),
      ...controls,
    ),
    el(
      "div",
      { class: "chips" },
      ...(branch ? chipsOf(branch) : [el("span", { class: "chip" }, `${tree.ends[s]} ends below`)]),
      branch?.right === 1 ? el("span", { class: "chip" }, "true") : null,
    ),
    el(
      "div",
      { class: "row-of-facts" },
      fact("tokens ", short(begin + length)),
      fact("of these its own ", short(length)),
      fact("forks above ", short(tree.depth(s))),
      branch && branch.weight !== undefined ? fact("weight ", short(branch.weight)) : null,
      meanOf("entropy", tree, s),
      branch
        ? fact("its mean advantage ", branch.advantage === null ? "–" : signed(branch.advantage))
        : meanOf("advantage", tree, s),
      meanOf("ratio", tree, s),
    ),
    el("pre", { tabindex: 0 }, plainly(tree.text(s))),
  ];
}

function meanOf(measure, tree, s) {
  const values = tree
    .path(s)
    .flatMap((part) =>
      tree.data[measure].slice(tree.first[part], tree.first[part] + tree.length(part)),
    )
    .filter((value) => value !== null);
  const { label, signed: sign } = MEASURES[measure];
  if (!values.length) return null;
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return fact(`mean ${label} `, sign ? signed(mean) : short(mean));
}

// What a closed segment does not show.
function hiddenBy(tree, s, to) {
  const own = tree.first[s] + tree.length(s) - to;
  const below = tree.ends[s];
  return `… ${own ? `${own} tokens, ` : ""}${below} ${below === 1 ? "end" : "ends"}`;
}
