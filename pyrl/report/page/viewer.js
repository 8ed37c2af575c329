// The viewer of a tree: a map of all of it, its text as rows of which only the visible ones are in
// the page, and the path to the segment that was chosen.

const ROW = 24, INDENT = 14, GUTTER = 34, DEEPEST = 12;

class Viewer {
  constructor() {
    this.measure = "entropy";
    this.hits = [];
    this.hit = -1;
    this.map = el("canvas", { class: "map", "aria-hidden": true, onclick: (event) => this.clicked(event) });
    this.mapHolder = el("div", { class: "map-holder card" }, this.map);
    this.space = el("div", { class: "rows" });
    this.list = el("div", { class: "list card", tabindex: 0, role: "tree", "aria-label": "Tree of responses" }, this.space);
    this.path = el("aside", { class: "path card", "aria-label": "Path" });
    this.legend = el("div", { class: "legend-row" });
    this.facts = el("div", { class: "tree-facts" });
    this.found = el("span", { class: "dim found", role: "status" });
    this.search = el("input", { type: "search", placeholder: "search text or answer  ( / )", "aria-label": "Search the tree", oninput: () => this.look() });
    this.toast = el("span", { class: "toast", role: "status" });
    const measures = Object.entries(MEASURES).map(([name, { label }]) => el("label", {},
      el("input", { type: "radio", name: "measure", value: name, checked: name === this.measure, onchange: () => this.paint(name) }),
      el("span", {}, label)));
    this.node = el("div", { class: "viewer" },
      this.facts,
      el("div", { class: "tools" },
        el("div", { class: "segmented", role: "radiogroup", "aria-label": "Colour of tokens" }, ...measures),
        el("span", { class: "search" }, this.search, this.found),
        el("button", { type: "button", onclick: () => this.fold(true) }, "collapse all"),
        el("button", { type: "button", onclick: () => this.fold(false) }, "expand all")),
      this.legend, this.mapHolder,
      el("div", { class: "text-and-path" }, this.list, this.path),
      el("p", { class: "dim keys" }, "Keys: ↑ ↓ move, ← → close and open, Enter copies the path's text, / searches, Esc ends the search."));
    this.list.addEventListener("scroll", () => this.schedule());
    this.list.addEventListener("keydown", (event) => this.keyed(event));
    this.list.addEventListener("click", (event) => this.chosen(event));
    this.space.addEventListener("pointerover", (event) => this.hover(event));
    this.space.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && tip.hide());
    this.search.addEventListener("keydown", (event) => this.searchKeyed(event));
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !/INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName) && this.node.offsetParent) {
        event.preventDefault();
        this.search.focus();
      }
    });
    dark.addEventListener("change", () => this.paint(this.measure));
    new ResizeObserver(() => this.layout()).observe(this.list);
  }

  show(data) {
    this.tree = new Tree(data);
    this.closed = new Set();
    const ends = this.tree.branch.filter(Boolean);
    this.selected = (ends.find((branch) => branch.elects) ?? ends[0]).segment;
    this.list.scrollTop = 0;
    this.describe();
    this.look(false);
    this.paint(this.measure);
  }

  describe() {
    const { data, tree } = { data: this.tree.data, tree: this.tree };
    const all = tree.leaves.filter(({ segment }) => segment !== null).reduce((sum, { segment }) => sum + data.segments[segment][1] + data.segments[segment][2], 0);
    const forks = tree.children.filter((below) => below.length > 1).length;
    const most = Math.max(...tree.answers.map((answer) => answer.weight));
    const votes = tree.answers.slice(0, 6).flatMap((answer) => [
      el("span", { class: "vote-bar" }, el("span", { class: answer.elects ? "elects" : "", style: { width: `${(100 * answer.weight) / most}%` } })),
      el("code", {}, answer.answer ?? "no answer"),
      el("span", { class: "dim" }, `${tree.weighs ? percent(answer.weight) : answer.leaves}${answer.elects ? " · the label" : ""}${answer.right === 1 ? " · true" : ""}`)]);
    if (tree.answers.length > 6) votes.push(el("span", { class: "dim rest" }, `and ${tree.answers.length - 6} other answers`));
    this.facts.replaceChildren(
      el("div", { class: "question card" },
        el("span", { class: "dim" }, "question"), el("pre", {}, plainly(data.text)),
        el("div", { class: "row-of-facts" },
          fact("label ", data.label ?? "none"), data.answer === null ? null : fact("true answer ", data.answer),
          fact("share ", percent(data.share)), fact("margin ", percent(data.margin)),
          fact("leaves ", String(tree.leaves.length)), fact("pruned ", String(tree.pruned)), fact("independent samples ", String(tree.roots.length)), fact("forks ", String(forks)),
          fact("tokens ", `${short(tree.tokens)}`), fact("leaves without sharing ", short(all))),
        tree.left ? el("p", { class: "dim" }, `The first ${tree.shownEnds} ends are shown, the other ${tree.left} do not fit in this page: they are in trees/${data.step}.safetensors.`) : null,
        data.spelled ? null : el("p", { class: "dim" }, "This tokenizer does not spell token by token: each token is shown as it reads alone.")),
      el("div", { class: "votes card" }, el("span", { class: "dim" }, tree.weighs ? "votes, by their mass" : "votes"), el("div", { class: "vote" }, ...votes)));
  }

  paint(measure) {
    this.measure = measure;
    this.scale = scaleOf(measure, this.tree.data[measure]);
    this.legend.replaceChildren(legendOf(measure, this.scale), el("span", { class: "marks-key dim" },
      "● elects the label  ○ another answer  ◇ no answer  × pruned  ∎ end"));
    this.layout();
  }

  color(u) {
    const value = this.tree.data[this.measure][u];
    return value === null ? null : this.scale.color(value);
  }

  layout() {
    if (!this.tree || !this.list.clientWidth) return;
    if (!this.cell) {
      const probe = el("span", { class: "probe" }, "0".repeat(50));
      this.space.append(probe);
      this.cell = probe.getBoundingClientRect().width / 50;
      probe.remove();
    }
    const width = this.list.clientWidth - GUTTER - 16;
    this.rows = this.tree.rows(this.closed, (depth) => Math.max(8, Math.floor((width - INDENT * Math.min(depth, DEEPEST)) / this.cell)));
    this.rowOf = new Map();
    this.rows.forEach((row, n) => row.first && this.rowOf.set(row.s, n));
    this.space.style.height = `${this.rows.length * ROW}px`;
    this.drawTokens();
    this.point();
  }

  // What depends on the chosen segment: its path in the rows, in the map and beside them.
  point() {
    this.live = new Map();
    this.space.replaceChildren();
    this.render();
    this.drawMap();
    this.showPath();
  }

  schedule() {
    if (this.due) return;
    this.due = requestAnimationFrame(() => {
      this.due = null;
      this.render();
    });
  }

  // Puts the rows that can be seen into the page, and takes out the others.
  render() {
    const from = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 6);
    const to = Math.min(this.rows.length, Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW) + 6);
    for (const [n, node] of this.live) {
      if (n >= from && n < to) continue;
      node.remove();
      this.live.delete(n);
    }
    for (let n = from; n < to; n += 1) {
      if (this.live.has(n)) continue;
      const node = this.row(n);
      this.live.set(n, node);
      this.space.append(node);
    }
    const here = this.rowOf.get(this.selected);
    if (this.live.has(here)) this.list.setAttribute("aria-activedescendant", `row-${here}`);
    else this.list.removeAttribute("aria-activedescendant");
  }

  row(n) {
    const { s, depth, from, to, first, end, closed } = this.rows[n];
    const tree = this.tree, deep = Math.min(depth, DEEPEST), branch = tree.branch[s];
    const node = el("div", { class: `row${first ? " first" : ""}${this.onPath.has(s) ? " on-path" : ""}${s === this.selected ? " selected" : ""}${branch?.pruned ? " pruned" : ""}`, id: `row-${n}`, "data-s": s });
    node.style.transform = `translateY(${n * ROW}px)`;
    node.style.paddingLeft = `${GUTTER + INDENT * deep}px`;
    for (let d = 0; d <= deep; d += 1) node.append(el("i", { class: "guide", style: { left: `${16 + INDENT * d}px` } }));
    if (first) {
      node.setAttribute("role", "treeitem");
      node.setAttribute("aria-level", depth + 1);
      node.setAttribute("aria-selected", String(s === this.selected));
      if (tree.children[s].length || tree.length(s) > 0) node.setAttribute("aria-expanded", String(!closed));
      const sign = closed ? "▸" : tree.children[s].length ? "▾" : "·";
      node.append(el("button", { class: "fold", type: "button", tabindex: -1, "data-fold": s, "aria-label": closed ? "open" : "close", style: { left: `${8 + INDENT * deep}px` } }, sign));
    } else node.setAttribute("role", "presentation");
    for (let u = from; u < to; u += 1) node.append(this.token(u));
    if (closed) node.append(el("span", { class: "chip" }, this.hidden(s, to)));
    if (end && !closed) node.append(...this.chips(branch));
    return node;
  }

  token(u) {
    const color = this.color(u);
    const classes = ["t", color ? "" : "unknown", this.marked.has(u) ? "hit" : "", this.now.has(u) ? "now" : ""];
    const node = el("span", { class: classes.filter(Boolean).join(" "), "data-u": u }, this.tree.shown(u));
    if (color) node.style.backgroundColor = color;
    return node;
  }

  hidden(s, to) {
    const tree = this.tree;
    const own = tree.first[s] + tree.length(s) - to;
    const below = tree.ends[s];
    return `… ${own ? `${own} tokens, ` : ""}${below} ${below === 1 ? "end" : "ends"}`;
  }

  chips(branch) {
    if (branch.pruned) return [el("span", { class: "chip cut" }, `× ${branch.pruned}`)];
    const sign = branch.answer === null ? "◇" : branch.elects ? "●" : "○";
    const chips = [el("span", { class: `chip ${branch.elects ? "elects" : ""}` }, `${sign} ${branch.answer ?? "no answer"}`)];
    if (branch.reward !== null) chips.push(el("span", { class: "chip" }, `reward ${short(branch.reward)}`));
    if (!branch.trains) chips.push(el("span", { class: "chip dim" }, "does not train"));
    return chips;
  }

  hover(event) {
    const u = event.target.dataset?.u;
    if (u === undefined) return tip.hide();
    const data = this.tree.data, logprob = data.logprob[u];
    const place = Number(event.target.parentNode.dataset.s);
    const position = data.segments[place][1] + Number(u) - this.tree.first[place];
    tip.show(event.clientX, event.clientY,
      el("div", {}, el("b", {}, JSON.stringify(data.words[data.word[u]])), el("span", { class: "dim" }, ` id ${data.id[u]}, token ${position + 1}`)),
      fact("probability ", logprob === null ? "–" : `${short(Math.exp(logprob))} (${short(logprob)} nats)`),
      ...Object.entries(MEASURES).map(([name, { label, signed: sign }]) => fact(`${label} `, data[name][u] === null ? "–" : sign ? signed(data[name][u]) : short(data[name][u]))),
      fact("ends below ", String(this.tree.ends[place])));
  }

  chosen(event) {
    const fold = event.target.dataset?.fold;
    const row = event.target.closest(".row");
    if (!row) return;
    if (fold !== undefined) this.toggle(Number(fold));
    else this.select(Number(row.dataset.s), false);
    this.hover(event);  // a finger shows what the mouse does
  }

  toggle(s, close = !this.closed.has(s)) {
    if (close) this.closed.add(s);
    else this.closed.delete(s);
    this.layout();
  }

  fold(close) {
    this.closed = new Set(close ? this.tree.roots : []);
    if (close && !this.rowOf.has(this.selected)) this.selected = this.tree.roots[0];
    this.layout();
  }

  // Chooses a segment; what is above it opens.
  select(s, scroll = true) {
    const hidden = this.tree.path(s).slice(0, -1).filter((above) => this.closed.delete(above));
    this.selected = s;
    if (hidden.length) this.layout();
    else this.point();
    if (scroll) this.reveal(s);
  }

  reveal(s) {
    const top = this.rowOf.get(s) * ROW, view = this.list;
    if (top < view.scrollTop + ROW || top > view.scrollTop + view.clientHeight - 2 * ROW) {
      view.scrollTop = Math.max(0, top - view.clientHeight / 3);
      this.render();
    }
  }

  keyed(event) {
    const order = this.tree.preorder((s) => !this.closed.has(s)), here = order.indexOf(this.selected);
    const step = { ArrowDown: 1, ArrowUp: -1, Home: -order.length, End: order.length, PageDown: 10, PageUp: -10 }[event.key];
    const below = this.tree.children[this.selected];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (step !== undefined) this.select(order[Math.min(order.length - 1, Math.max(0, here + step))]);
    else if (event.key === "ArrowLeft" && !this.closed.has(this.selected) && below.length) this.toggle(this.selected, true);
    else if (event.key === "ArrowLeft" && this.tree.parent(this.selected) >= 0) this.select(this.tree.parent(this.selected));
    else if (event.key === "ArrowRight" && this.closed.has(this.selected)) this.toggle(this.selected, false);
    else if (event.key === "ArrowRight" && below.length) this.select(below[0]);
    else if (event.key === " ") this.toggle(this.selected);
    else if (event.key === "Enter") this.copy();
    else if (event.key === "Escape") this.clear();
    else if (!/^Arrow/.test(event.key)) return;
    event.preventDefault();
  }

  searchKeyed(event) {
    if (event.key === "Enter" && this.hits.length) this.go(this.hit + (event.shiftKey ? -1 : 1));
    else if (event.key === "Escape") {
      this.clear();
      this.list.focus();
    } else return;
    event.preventDefault();
  }

  clear() {
    this.search.value = "";
    this.look();
  }

  look(draw = true) {
    this.hits = this.tree.find(this.search.value);
    this.marked = new Set(this.hits.flatMap((hit) => hit.tokens));
    this.hit = -1;
    this.now = new Set();
    this.found.textContent = this.search.value ? `${this.hits.length} found` : "";
    if (this.hits.length) this.go(0);
    else if (draw) this.layout();
  }

  go(n) {
    this.hit = (n + this.hits.length) % this.hits.length;
    const { s, tokens } = this.hits[this.hit];
    this.now = new Set(tokens);
    this.found.textContent = `${this.hit + 1} of ${this.hits.length}`;
    if (!this.scale) this.selected = s;
    else this.select(s);
    const row = this.rows?.findIndex((one) => one.s === s && one.from <= tokens[0] && tokens[0] < one.to) ?? -1;
    if (row >= 0) {
      this.list.scrollTop = Math.max(0, row * ROW - this.list.clientHeight / 3);
      this.render();
    }
  }

  get onPath() {
    if (this.pathOf !== this.selected || this.pathTree !== this.tree) {
      this.pathSet = new Set(this.tree.path(this.selected));
      [this.pathOf, this.pathTree] = [this.selected, this.tree];
    }
    return this.pathSet;
  }

  showPath() {
    const tree = this.tree, data = tree.data, s = this.selected, branch = tree.branch[s];
    const [, begin, length] = data.segments[s];
    const button = el("button", { type: "button", class: "primary", onclick: () => this.copy() }, "copy text");
    this.path.replaceChildren(
      el("div", { class: "path-head" }, el("b", {}, branch ? (branch.pruned ? "pruned branch" : "leaf") : "part of several paths"), button, this.toast),
      el("div", { class: "chips" }, ...(branch ? this.chips(branch) : [el("span", { class: "chip" }, `${tree.ends[s]} ends below`)]),
        branch?.right === 1 ? el("span", { class: "chip" }, "true") : null),
      el("div", { class: "row-of-facts" },
        fact("tokens ", short(begin + length)), fact("of these its own ", short(length)), fact("forks above ", short(tree.depth(s))),
        branch && branch.weight !== undefined ? fact("weight ", short(branch.weight)) : null,
        this.mean("entropy", s), branch ? fact("its mean advantage ", branch.advantage === null ? "–" : signed(branch.advantage)) : this.mean("advantage", s), this.mean("ratio", s)),
      el("pre", { tabindex: 0 }, plainly(tree.text(s))));
  }

  mean(measure, s) {
    const values = this.tree.path(s).flatMap((part) =>
      this.tree.data[measure].slice(this.tree.first[part], this.tree.first[part] + this.tree.length(part))).filter((value) => value !== null);
    const { label, signed: sign } = MEASURES[measure];
    if (!values.length) return null;
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    return fact(`mean ${label} `, sign ? signed(mean) : short(mean));
  }

  async copy() {
    const text = this.tree.text(this.selected);
    try {
      await navigator.clipboard.writeText(text);
      this.toast.textContent = "copied";
    } catch {
      // Where the page may not write it, the text is selected to be copied by hand.
      getSelection().selectAllChildren(this.path.querySelector("pre"));
      this.toast.textContent = "selected: copy it with Ctrl-C";
    }
    setTimeout(() => { this.toast.textContent = ""; }, 2500);
  }

  // The whole tree: positions from left to right, a line for each end, its mark behind it.
  drawTokens() {
    const tree = this.tree, ends = Math.max(1, tree.shownEnds), ratio = devicePixelRatio || 1;
    const width = this.mapHolder.clientWidth - 16, high = Math.min(15, Math.max(3, Math.floor(330 / ends)));
    const height = ends * high + 8, unit = (width - 24) / tree.longest;
    this.thick = Math.max(2, high - 3);
    Object.assign(this.map.style, { width: `${width}px`, height: `${height}px` });
    this.all = Object.assign(document.createElement("canvas"), { width: width * ratio, height: height * ratio });
    const pen = this.all.getContext("2d"), ink = this.ink("--ink");
    pen.scale(ratio, ratio);
    const middle = new Array(tree.children.length);
    let end = 0;
    for (const s of tree.order) if (!tree.children[s].length) middle[s] = 6 + high * (end++ + 0.5);
    for (const s of [...tree.order].reverse()) {
      const below = tree.children[s].map((child) => middle[child]);
      if (below.length) middle[s] = (Math.min(...below) + Math.max(...below)) / 2;
    }
    this.places = tree.order.map((s) => {
      const [parent, begin, length] = tree.data.segments[s];
      return { s, parent: middle[parent], from: 2 + begin * unit, to: 2 + (begin + length) * unit, y: middle[s] };
    });
    for (const place of this.places) {
      this.line(pen, place, this.ink("--edge"), 1);
      for (let n = 0; n < tree.length(place.s); n += 1) {
        const color = this.color(tree.first[place.s] + n);
        if (!color) continue;
        pen.fillStyle = color;
        pen.fillRect(place.from + n * unit, place.y - this.thick / 2, Math.max(unit - (unit > 5 ? 1 : 0), 0.5), this.thick);
      }
      const branch = tree.branch[place.s];
      if (branch) this.mark(pen, branch, place.to + 8, place.y, Math.min(4.5, high / 2.4), ink);
    }
  }

  // The map with the chosen path on it.
  drawMap() {
    const ratio = devicePixelRatio || 1;
    Object.assign(this.map, { width: this.all.width, height: this.all.height });
    const pen = this.map.getContext("2d");
    pen.drawImage(this.all, 0, 0);
    pen.scale(ratio, ratio);
    for (const place of this.places) if (this.onPath.has(place.s)) this.line(pen, place, this.ink("--line-0"), 2);
  }

  ink(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name);
  }

  line(pen, { parent, from, to, y }, color, wide) {
    pen.fillStyle = color;
    pen.fillRect(from, y + this.thick / 2 - wide / 2, to - from, wide);
    if (parent !== undefined) pen.fillRect(from - wide / 2, Math.min(parent, y), wide, Math.abs(parent - y) + this.thick / 2);
  }

  mark(pen, branch, x, y, size, ink) {
    pen.strokeStyle = pen.fillStyle = ink;
    pen.lineWidth = 1.2;
    pen.beginPath();
    if (branch.pruned) {
      pen.moveTo(x - size, y - size);
      pen.lineTo(x + size, y + size);
      pen.moveTo(x - size, y + size);
      pen.lineTo(x + size, y - size);
    } else if (branch.answer === null) {
      pen.moveTo(x - size, y);
      pen.lineTo(x, y - size);
      pen.lineTo(x + size, y);
      pen.lineTo(x, y + size);
      pen.closePath();
    } else pen.arc(x, y, size, 0, 2 * Math.PI);
    if (branch.elects) pen.fill();
    pen.stroke();
  }

  clicked(event) {
    const box = this.map.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const far = ({ from, to, y: at }) => Math.abs(at - y) * 3 + (x < from ? from - x : x > to ? x - to : 0);
    const nearest = this.places.reduce((best, place) => (far(place) < far(best) ? place : best));
    this.select(nearest.s);
  }
}
