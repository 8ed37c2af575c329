// The map of a tree: positions from left to right, a line for each end, its mark behind it.

class TreeMap {
  // `choose` is called with the segment that was clicked.
  constructor(choose) {
    this.choose = choose;
    this.canvas = el("canvas", {
      class: "map",
      "aria-hidden": true,
      onclick: (event) => this.clicked(event),
    });
    this.node = el("div", { class: "map-holder card" }, this.canvas);
  }

  // All tokens, in the colours that `color` gives them.
  draw(tree, color) {
    const ends = Math.max(1, tree.shownEnds),
      ratio = devicePixelRatio || 1;
    const width = this.node.clientWidth - 16,
      high = Math.min(15, Math.max(3, Math.floor(330 / ends)));
    const height = ends * high + 8,
      unit = (width - 24) / tree.longest;
    this.thick = Math.max(2, high - 3);
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    this.all = Object.assign(document.createElement("canvas"), {
      width: width * ratio,
      height: height * ratio,
    });
    const pen = this.all.getContext("2d"),
      ink = this.ink("--ink");
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
      return {
        s,
        parent: middle[parent],
        from: 2 + begin * unit,
        to: 2 + (begin + length) * unit,
        y: middle[s],
      };
    });
    for (const place of this.places) {
      this.line(pen, place, this.ink("--edge"), 1);
      for (let n = 0; n < tree.length(place.s); n += 1) {
        const tinted = color(tree.first[place.s] + n);
        if (!tinted) continue;
        pen.fillStyle = tinted;
        pen.fillRect(
          place.from + n * unit,
          place.y - this.thick / 2,
          Math.max(unit - (unit > 5 ? 1 : 0), 0.5),
          this.thick,
        );
      }
      const branch = tree.branch[place.s];
      if (branch) this.mark(pen, branch, place.to + 8, place.y, Math.min(4.5, high / 2.4), ink);
    }
  }

  // The chosen path on it.
  point(onPath) {
    const ratio = devicePixelRatio || 1;
    Object.assign(this.canvas, { width: this.all.width, height: this.all.height });
    const pen = this.canvas.getContext("2d");
    pen.drawImage(this.all, 0, 0);
    pen.scale(ratio, ratio);
    for (const place of this.places)
      if (onPath.has(place.s)) this.line(pen, place, this.ink("--line-0"), 2);
  }

  ink(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name);
  }

  line(pen, { parent, from, to, y }, color, wide) {
    pen.fillStyle = color;
    pen.fillRect(from, y + this.thick / 2 - wide / 2, to - from, wide);
    if (parent !== undefined)
      pen.fillRect(
        from - wide / 2,
        Math.min(parent, y),
        wide,
        Math.abs(parent - y) + this.thick / 2,
      );
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
    const box = this.canvas.getBoundingClientRect(),
      x = event.clientX - box.left,
      y = event.clientY - box.top;
    const far = ({ from, to, y: at }) =>
      Math.abs(at - y) * 3 + (x < from ? from - x : x > to ? x - to : 0);
    const nearest = this.places.reduce((best, place) => (far(place) < far(best) ? place : best));
    this.choose(nearest.s);
  }
}
