// The viewer of a tree: a map of all of it, its text as rows of which only the visible ones are in
// the page, and the path to the segment that was chosen.

const ROW = 24,
  INDENT = 14,
  GUTTER = 34,
  DEEPEST = 12;

class Viewer {
  constructor() {
    this.measure = "entropy";
    this.hits = [];
    this.hit = -1;
    this.marked = this.now = new Set();
    this.map = new TreeMap((s) => this.select(s));
    this.space = el("div", { class: "rows" });
    this.list = el(
      "div",
      { class: "list card", tabindex: 0, role: "tree", "aria-label": "Tree of responses" },
      this.space,
    );
    this.path = el("aside", { class: "path card", "aria-label": "Path" });
    this.legend = el("div", { class: "legend-row" });
    this.facts = el("div", { class: "tree-facts" });
    this.found = el("span", { class: "dim found", role: "status" });
    this.search = el("input", {
      type: "search",
      placeholder: "search text or answer  ( / )",
      "aria-label": "Search the tree",
      oninput: () => this.look(),
    });
    this.toast = el("span", { class: "toast", role: "status" });
    this.copies = el(
      "button",
      { type: "button", class: "primary", onclick: () => this.copy() },
      "copy text",
    );
    const measures = Object.entries(MEASURES).map(([name, { label }]) =>
      el(
        "label",
        {},
        el("input", {
          type: "radio",
          name: "measure",
          value: name,
          checked: name === this.measure,
          onchange: () => this.paint(name),
        }),
        el("span", {}, label),
      ),
    );
    this.node = el(
      "div",
      { class: "viewer" },
      this.facts,
      el(
        "div",
        { class: "tools" },
        el(
          "div",
          { class: "segmented", role: "radiogroup", "aria-label": "Colour of tokens" },
          ...measures,
        ),
        el("span", { class: "search" }, this.search, this.found),
        el("button", { type: "button", onclick: () => this.fold(true) }, "collapse all"),
        el("button", { type: "button", onclick: () => this.fold(false) }, "expand all"),
      ),
      this.legend,
      this.map.node,
      el("div", { class: "text-and-path" }, this.list, this.path),
      el(
        "p",
        { class: "dim keys" },
        "Keys: ↑ ↓ move, ← → close and open, Enter copies the path's text, / searches, Esc ends the search.",
      ),
    );
    this.list.addEventListener("scroll", () => this.schedule());
    this.list.addEventListener("keydown", (event) => this.keyed(event));
    this.list.addEventListener("click", (event) => this.chosen(event));
    this.space.addEventListener("pointerover", (event) => this.hover(event));
    this.space.addEventListener(
      "pointerleave",
      (event) => event.pointerType === "mouse" && tip.hide(),
    );
    this.search.addEventListener("keydown", (event) => this.searchKeyed(event));
    document.addEventListener("keydown", (event) => {
      if (
        event.key === "/" &&
        !/INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName) &&
        this.node.offsetParent
      ) {
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
    this.facts.replaceChildren(...questionFacts(this.tree));
    this.marked = this.now = new Set();
    this.paint(this.measure);
    if (this.search.value) this.look();
  }

  paint(measure) {
    this.measure = measure;
    this.scale = scaleOf(measure, this.tree.data[measure]);
    this.legend.replaceChildren(legendOf(measure, this.scale), el("span", { class: "dim" }, MARKS));
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
    this.rows = this.tree.rows(this.closed, (depth) =>
      Math.max(8, Math.floor((width - INDENT * Math.min(depth, DEEPEST)) / this.cell)),
    );
    this.rowOf = new Map();
    this.rows.forEach((row, n) => row.first && this.rowOf.set(row.s, n));
    this.space.style.height = `${this.rows.length * ROW}px`;
    this.map.draw(this.tree, (u) => this.color(u));
    this.point();
  }

  // What depends on the chosen segment: its path in the rows, in the map and beside them.
  point() {
    this.live = new Map();
    this.space.replaceChildren();
    this.render();
    this.map.point(this.onPath);
    this.path.replaceChildren(...pathFacts(this.tree, this.selected, this.copies, this.toast));
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
    const to = Math.min(
      this.rows.length,
      Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW) + 6,
    );
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
    const tree = this.tree,
      deep = Math.min(depth, DEEPEST),
      branch = tree.branch[s];
    const node = el("div", {
      class: `row${first ? " first" : ""}${this.onPath.has(s) ? " on-path" : ""}${s === this.selected ? " selected" : ""}${branch?.pruned ? " pruned" : ""}`,
      id: `row-${n}`,
      "data-s": s,
    });
    node.style.transform = `translateY(${n * ROW}px)`;
    node.style.paddingLeft = `${GUTTER + INDENT * deep}px`;
    for (let d = 0; d <= deep; d += 1)
      node.append(el("i", { class: "guide", style: { left: `${16 + INDENT * d}px` } }));
    if (first) {
      node.setAttribute("role", "treeitem");
      node.setAttribute("aria-level", depth + 1);
      node.setAttribute("aria-selected", String(s === this.selected));
      if (tree.children[s].length || tree.length(s) > 0)
        node.setAttribute("aria-expanded", String(!closed));
      const sign = closed ? "▸" : tree.children[s].length ? "▾" : "·";
      node.append(
        el(
          "button",
          {
            class: "fold",
            type: "button",
            tabindex: -1,
            "data-fold": s,
            "aria-label": closed ? "open" : "close",
            style: { left: `${8 + INDENT * deep}px` },
          },
          sign,
        ),
      );
    } else node.setAttribute("role", "presentation");
    for (let u = from; u < to; u += 1) node.append(this.token(u));
    if (closed) node.append(el("span", { class: "chip" }, hiddenBy(this.tree, s, to)));
    if (end && !closed) node.append(...chipsOf(branch));
    return node;
  }

  token(u) {
    const color = this.color(u);
    const classes = [
      "t",
      color ? "" : "unknown",
      this.marked.has(u) ? "hit" : "",
      this.now.has(u) ? "now" : "",
    ];
    const node = el(
      "span",
      { class: classes.filter(Boolean).join(" "), "data-u": u },
      this.tree.shown(u),
    );
    if (color) node.style.backgroundColor = color;
    return node;
  }

  hover(event) {
    const u = event.target.dataset?.u;
    if (u === undefined) return tip.hide();
    const s = Number(event.target.parentNode.dataset.s);
    tip.show(event.clientX, event.clientY, ...tokenFacts(this.tree, Number(u), s));
  }

  chosen(event) {
    const fold = event.target.dataset?.fold;
    const row = event.target.closest(".row");
    if (!row) return;
    if (fold !== undefined) this.toggle(Number(fold));
    else this.select(Number(row.dataset.s), false);
    this.hover(event); // a finger shows what the mouse does
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
    const hidden = this.tree
      .path(s)
      .slice(0, -1)
      .filter((above) => this.closed.delete(above));
    this.selected = s;
    if (hidden.length) this.layout();
    else this.point();
    if (scroll) this.reveal(s);
  }

  reveal(s) {
    const top = this.rowOf.get(s) * ROW,
      view = this.list;
    if (top < view.scrollTop + ROW || top > view.scrollTop + view.clientHeight - 2 * ROW) {
      view.scrollTop = Math.max(0, top - view.clientHeight / 3);
      this.render();
    }
  }

  keyed(event) {
    const order = this.tree.preorder((s) => !this.closed.has(s)),
      here = order.indexOf(this.selected);
    const step = {
      ArrowDown: 1,
      ArrowUp: -1,
      Home: -order.length,
      End: order.length,
      PageDown: 10,
      PageUp: -10,
    }[event.key];
    const below = this.tree.children[this.selected];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (step !== undefined)
      this.select(order[Math.min(order.length - 1, Math.max(0, here + step))]);
    else if (event.key === "ArrowLeft" && !this.closed.has(this.selected) && below.length)
      this.toggle(this.selected, true);
    else if (event.key === "ArrowLeft" && this.tree.parent(this.selected) >= 0)
      this.select(this.tree.parent(this.selected));
    else if (event.key === "ArrowRight" && this.closed.has(this.selected))
      this.toggle(this.selected, false);
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

  look() {
    this.hits = this.tree.find(this.search.value);
    this.marked = new Set(this.hits.flatMap((hit) => hit.tokens));
    this.hit = -1;
    this.now = new Set();
    this.found.textContent = this.search.value ? `${this.hits.length} found` : "";
    if (this.hits.length) this.go(0);
    else this.layout();
  }

  go(n) {
    this.hit = (n + this.hits.length) % this.hits.length;
    const { s, tokens } = this.hits[this.hit];
    this.now = new Set(tokens);
    this.found.textContent = `${this.hit + 1} of ${this.hits.length}`;
    this.select(s);
    const row = this.rows.findIndex(
      (one) => one.s === s && one.from <= tokens[0] && tokens[0] < one.to,
    );
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
    setTimeout(() => {
      this.toast.textContent = "";
    }, 2500);
  }
}
