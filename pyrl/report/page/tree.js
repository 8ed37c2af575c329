// A tree of one question as numbers: segments, what is above and below them, and rows of text.

class Tree {
  constructor(data) {
    this.data = data;
    const count = data.segments.length;
    this.children = Array.from({ length: count }, () => []);
    this.roots = [];
    this.first = new Array(count);
    this.branch = new Array(count).fill(null);
    let tokens = 0;
    data.segments.forEach(([parent, , length], s) => {
      (parent < 0 ? this.roots : this.children[parent]).push(s);
      this.first[s] = tokens;
      tokens += length;
    });
    this.tokens = tokens;
    // A large tree is shown as far as it fits in the page; all of its leaves have voted.
    const shown = data.branches.filter((branch) => branch.segment !== null);
    for (const branch of shown) this.branch[branch.segment] = branch;
    this.left = data.branches.length - shown.length;
    this.shownEnds = shown.length;
    this.leaves = data.branches.filter((branch) => !branch.pruned);
    // Leaves drawn without replacement stand for what they weigh, others for one vote each.
    this.weighs = this.leaves.some((leaf) => leaf.log_mass !== null);
    this.pruned = data.branches.length - this.leaves.length;
    this.order = this.preorder(() => true);
    this.ends = new Array(count).fill(0);
    for (const s of [...this.order].reverse())
      this.ends[s] =
        (this.branch[s] ? 1 : 0) +
        this.children[s].reduce((sum, child) => sum + this.ends[child], 0);
    this.longest = Math.max(1, ...data.segments.map(([, begin, length]) => begin + length));
    // A key per answer, in the order of their shares: votes, and whether they elect the label.
    const answers = new Map();
    for (const leaf of this.leaves) {
      const key = leaf.answer ?? "";
      const seen = answers.get(key) ?? {
        answer: leaf.answer,
        leaves: 0,
        weight: 0,
        elects: leaf.elects,
        right: leaf.right,
      };
      seen.leaves += 1;
      seen.weight += this.weighs ? leaf.weight : 1 / this.leaves.length;
      answers.set(key, seen);
    }
    this.answers = [...answers.values()].sort((a, b) => b.weight - a.weight);
  }

  parent(s) {
    return this.data.segments[s][0];
  }

  length(s) {
    return this.data.segments[s][2];
  }

  depth(s) {
    let depth = 0;
    for (let at = this.parent(s); at >= 0; at = this.parent(at)) depth += 1;
    return depth;
  }

  // Segments depth first, without what is below those that are not `open`.
  preorder(open) {
    const found = [],
      todo = [...this.roots].reverse();
    while (todo.length) {
      const s = todo.pop();
      found.push(s);
      if (open(s)) todo.push(...[...this.children[s]].reverse());
    }
    return found;
  }

  // From the question down to a segment.
  path(s) {
    const found = [];
    for (let at = s; at >= 0; at = this.parent(at)) found.unshift(at);
    return found;
  }

  text(s) {
    return this.path(s)
      .map((part) => this.own(part))
      .join("");
  }

  own(s) {
    const { words, word } = this.data;
    return word
      .slice(this.first[s], this.first[s] + this.length(s))
      .map((w) => words[w])
      .join("");
  }

  // The token as it is shown: what one would not see has a sign.
  shown(u) {
    const word = this.data.words[this.data.word[u]];
    if (word === "") return "∎";
    return plainly(word.replace(/\n/g, "↵").replace(/\t/g, "→"));
  }

  // Segments and their tokens that a text is in, or that end with an answer that has it.
  find(query) {
    const wanted = query.toLowerCase(),
      hits = [];
    if (!wanted) return hits;
    for (const s of this.order) {
      const parent = this.parent(s);
      const before = parent < 0 ? "" : this.text(parent).slice(1 - wanted.length || Infinity);
      const own = this.own(s),
        text = (before + own).toLowerCase();
      for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + 1)) {
        const begin = Math.max(0, at - before.length),
          end = at + wanted.length - before.length;
        if (end > 0) hits.push({ s, tokens: this.covering(s, begin, end) });
      }
      const answer = this.branch[s]?.answer ?? this.branch[s]?.pruned;
      if (answer?.toLowerCase().includes(wanted) && hits.at(-1)?.s !== s)
        hits.push({ s, tokens: [] });
    }
    return hits;
  }

  // Tokens of a segment that have characters in [begin, end) of its text.
  covering(s, begin, end) {
    const found = [];
    let at = 0;
    for (let u = this.first[s]; u < this.first[s] + this.length(s); u += 1) {
      const next = at + this.data.words[this.data.word[u]].length;
      if (at < end && next > begin) found.push(u);
      at = next;
    }
    return found;
  }

  // Rows of text: `columns(depth)` characters fit in one. A row has a segment and tokens [from, to);
  // the first row of a segment opens and closes it, the last has what it came to.
  rows(closed, columns) {
    const rows = [];
    const depths = new Map();
    for (const s of this.preorder((one) => !closed.has(one))) {
      const parent = this.parent(s),
        depth = parent < 0 ? 0 : depths.get(parent) + 1;
      depths.set(s, depth);
      const room = columns(depth),
        stop = this.first[s] + this.length(s),
        start = rows.length;
      let from = this.first[s],
        used = 0;
      for (let u = from; u < stop; u += 1) {
        const wide = wideness(this.shown(u));
        if (used && used + wide > room) {
          rows.push({ s, depth, from, to: u });
          [from, used] = [u, 0];
        }
        used += wide;
        if (this.data.words[this.data.word[u]].endsWith("\n") && u + 1 < stop) {
          rows.push({ s, depth, from, to: u + 1 });
          [from, used] = [u + 1, 0];
        }
      }
      if (closed.has(s)) {
        rows.length = Math.min(rows.length, start + 1);
        if (rows.length === start) rows.push({ s, depth, from, to: stop });
        rows[start].closed = true;
      } else if (this.branch[s] && used && used + 30 > room) {
        rows.push({ s, depth, from, to: stop }, { s, depth, from: stop, to: stop, end: true });
      } else {
        rows.push({ s, depth, from, to: stop, end: Boolean(this.branch[s]) });
      }
      rows[start].first = true;
    }
    return rows;
  }
}

// The text with a dot for each sign that is not seen or that turns others around.
function plainly(text) {
  return text.replace(
    /[\u0000-\u0008\u000b-\u001f\u007f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g,
    "·",
  );
}

// Cells of a text in a fixed-width font: wide scripts and signs take two.
function wideness(text) {
  let cells = 0;
  for (const sign of text)
    cells +=
      /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\u{1f300}-\u{1faff}\u{20000}-\u{3fffd}]/u.test(
        sign,
      )
        ? 2
        : 1;
  return cells;
}
