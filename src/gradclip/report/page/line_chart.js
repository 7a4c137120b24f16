// Lines over steps: each step where there is room, the lowest and highest of each pixel where there
// is less, and where there are very many a pale band with the median in it.

const CROWDED = 20; // steps a pixel
const TALL = 3; // losses this many times further up than 98 % of them leave the plot by its top

class LineChart extends Frame {
  constructor(box, run, view) {
    super(box, run, view);
    this.series = box.dataset.series.split(",").filter((name) => name in run.columns);
    this.scale = box.dataset.scale;
    this.clip = `clip-${box.closest("article").id}-${this.series.join("-") || "none"}`;
  }

  lowest(name) { return this.run.columns[`${name}_lo`] || this.run.columns[name]; }
  highest(name) { return this.run.columns[`${name}_hi`] || this.run.columns[name]; }

  draw() {
    const { scale } = this, hasMarks = this.box.dataset.marks;
    this.begin(hasMarks ? 22 : 12);
    const [low, high, cut] = this.extent();
    const f = scale === "log" ? Math.log : (value) => value;
    const bottom = this.height - BOTTOM;
    this.y = (value) => this.top + ((f(high) - f(scale === "log" ? Math.max(value, low / 10) : value)) / (f(high) - f(low))) * (bottom - this.top);
    const clip = svgElement("clipPath", { id: this.clip }, svgElement("defs", {}, this.svg));
    svgElement("rect", { x: LEFT, y: this.top - 3, width: this.inner, height: bottom - this.top + 4 }, clip);
    this.drawValues(scale === "log" ? ticks.log(low, high) : ticks.linear(low, high, 4));
    this.drawSteps();
    const inside = svgElement("g", { "clip-path": `url(#${this.clip})` }, this.svg);
    for (const name of this.series) this.drawSeries(name, inside);
    this.labelEnds();
    if (hasMarks) this.drawCrosses(hasMarks);
    if (this.box.dataset.peaks && this.series.includes("norm")) labelPeaks(this, this.highest("norm"), this.y);
    if (cut) svgElement("text", { class: "halo name", x: this.x(cut.step) + (this.x(cut.step) > LEFT + this.inner / 2 ? -6 : 6), y: this.top + 6, "text-anchor": this.x(cut.step) > LEFT + this.inner / 2 ? "end" : "start" }, this.svg, `up to ${format.short(cut.value)} at ${this.run.noun[0]} ${format.whole(cut.step)}`);
    this.dots = this.series.map((name) => svgElement("circle", { class: `dot ${colourOf(name)}`, r: 3.5, display: "none" }, this.svg));
    this.end();
  }

  // Lowest and highest value of the axis; and a value that is left above it.
  extent() {
    const [first, last] = this.view.places;
    if (this.scale === "share") {
      let most = 0;
      for (let at = first; at <= last; at++) most = Math.max(most, this.run.columns.share[at]);
      return [0, most * 1.05 || 1, null];
    }
    const isLog = this.scale === "log";
    let low = Infinity, high = -Infinity, peak = first;
    for (const name of this.series) {
      const under = this.lowest(name), over = this.highest(name);
      for (let at = first; at <= last; at++) {
        if (Number.isFinite(under[at]) && (!isLog || under[at] > 0)) low = Math.min(low, under[at]);
        if (Number.isFinite(over[at]) && (!isLog || over[at] > 0) && over[at] > high) { high = over[at]; peak = at; }
      }
    }
    if (low > high) return isLog ? [0.1, 10, null] : [0, 1, null];
    if (isLog) return low * 1.05 < high ? [low / 1.15, high * 1.25, null] : [low / 2, high * 2, null];
    const sorted = Float64Array.from(this.highest(this.series[0]).slice(first, last + 1).filter(Number.isFinite)).sort();
    const usual = sorted[Math.ceil(0.98 * sorted.length) - 1];
    let cut = null;
    if (usual > low && high - low > TALL * (usual - low)) {
      cut = { value: high, step: this.run.columns.step[peak] };
      high = usual + 0.12 * (usual - low);
    }
    const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 0.1;
    return [low - margin, high + margin, cut];
  }

  drawValues(values) {
    for (const value of values) {
      const y = this.y(value);
      svgElement("line", { class: "grid", x1: LEFT, x2: LEFT + this.inner, y1: y, y2: y }, this.svg);
      svgElement("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, this.svg, this.scale === "share" ? format.percent(value) : format.short(value));
    }
  }

  drawSeries(name, inside) {
    const [first, last] = this.view.places, style = `line ${colourOf(name)}${isLimit(name) ? " dashed" : ""}`;
    const hasBuckets = `${name}_lo` in this.run.columns, isCrowded = last - first > CROWDED * this.inner;
    let path, alone = "";
    if ((hasBuckets || isCrowded) && !isLimit(name) && name !== "share") {
      const { outline, median } = this.band(name, first, last);
      if (outline) svgElement("path", { class: `band ${colourOf(name)}`, d: outline }, inside);
      path = median;
    } else if (last - first < 2 * this.inner) ({ path, alone } = this.each(name, first, last));
    else path = this.perPixel(name, first, last);
    svgElement("path", { class: style, d: path }, inside);
    if (alone) svgElement("path", { class: `alone ${colourOf(name)}`, d: alone }, inside);
  }

  // A point of each step; one between two that are missing is no line, and drawn as a dot.
  each(name, first, last) {
    const values = this.run.columns[name], steps = this.run.columns.step;
    let path = "", alone = "", length = 0, point = "";
    for (let at = first; at <= last + 1; at++) {
      if (at > last || !this.canDraw(values[at])) {
        if (length === 1) alone += `M${point}h0.01`;
        length = 0;
      } else {
        point = `${this.x(steps[at]).toFixed(1)},${this.y(values[at]).toFixed(1)}`;
        path += (length ? "L" : "M") + point;
        length++;
      }
    }
    return { path, alone };
  }

  perPixel(name, first, last) {
    const values = this.run.columns[name], steps = this.run.columns.step;
    let path = "", isDown = false;
    for (let at = first; at <= last; ) {
      const x = Math.floor(this.x(steps[at]));
      let low = Infinity, high = -Infinity, begin = NaN, end = NaN;
      for (; at <= last && Math.floor(this.x(steps[at])) === x; at++) {
        const value = values[at];
        if (!this.canDraw(value)) continue;
        if (Number.isNaN(begin)) begin = value;
        end = value;
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
      if (low > high) { isDown = false; continue; }
      path += `${isDown ? "L" : "M"}${x},${this.y(begin).toFixed(1)}`;
      if (high > low) path += `V${this.y(high).toFixed(1)}V${this.y(low).toFixed(1)}V${this.y(end).toFixed(1)}`;
      isDown = true;
    }
    return path;
  }

  band(name, first, last) {
    const values = this.run.columns[name], steps = this.run.columns.step;
    const under = this.lowest(name), over = this.highest(name);
    const upper = [], lower = [], middle = [], perPixel = last - first >= this.inner;
    for (let at = first; at <= last; ) {
      const x = this.x(steps[at]), column = Math.floor(x), inColumn = [];
      let low = Infinity, high = -Infinity;
      do {
        if (this.canDraw(values[at])) inColumn.push(values[at]);
        if (this.canDraw(under[at])) low = Math.min(low, under[at]);
        if (this.canDraw(over[at])) high = Math.max(high, over[at]);
        at++;
      } while (perPixel && at <= last && Math.floor(this.x(steps[at])) === column);
      if (!inColumn.length) continue;
      inColumn.sort((a, b) => a - b);
      const place = (perPixel ? column : x).toFixed(1);
      upper.push(`${place},${this.y(high).toFixed(1)}`);
      lower.push(`${place},${this.y(low).toFixed(1)}`);
      middle.push(`${place},${this.y(inColumn[inColumn.length >> 1]).toFixed(1)}`);
    }
    if (!middle.length) return { outline: "", median: "" };
    return { outline: `M${upper.join("L")}L${lower.reverse().join("L")}Z`, median: `M${middle.join("L")}` };
  }

  canDraw(value) {
    return Number.isFinite(value) && (this.scale !== "log" || value > 0);
  }

  // The names of the lines, at their right ends, kept apart from each other.
  labelEnds() {
    const [first, last] = this.view.places, labels = [];
    for (const name of this.series) {
      let at = last;
      while (at > first && !this.canDraw(this.run.columns[name][at])) at--;
      const value = this.run.columns[name][at];
      if (!this.canDraw(value) || (isLimit(name) && name !== "limit")) continue;
      labels.push({ name, y: Math.min(Math.max(this.y(value), this.top), this.height - BOTTOM), text: labelOf(name, this.run, value) });
    }
    if (this.isWide) this.labelBeside(labels);
    else this.labelInside(labels);
  }

  // On a phone, in lines from the lower left corner of the plot.
  labelInside(labels) {
    const lines = [[]];
    let x = LEFT + 6;
    for (const { name, text } of labels) {
      const width = text.length * LETTER * 1.15 + 12;
      if (x + width > LEFT + this.inner && lines.at(-1).length) {
        lines.push([]);
        x = LEFT + 6;
      }
      lines.at(-1).push({ name, text, x });
      x += width;
    }
    lines.reverse().forEach((line, at) => {
      for (const { name, text, x } of line)
        svgElement("text", { class: `label halo ${colourOf(name)}`, x, y: this.height - BOTTOM - 8 - 15 * at }, this.svg, text);
    });
  }

  labelBeside(labels) {
    labels.sort((a, b) => a.y - b.y);
    const places = spread(labels.map(({ y }) => y), 15, this.top, this.height - BOTTOM);
    labels.forEach(({ name, text }, at) => {
      const label = svgElement("text", { class: `label ${colourOf(name)}`, x: LEFT + this.inner + 7, y: places[at] + 4 }, this.svg, fitted(text, this.right - 10, labels.map((other) => other.text)));
      svgElement("title", {}, label, text);
    });
  }

  // Over the plot, one a few pixels: of steps that were not made, or of losses that are not finite.
  drawCrosses(kind) {
    const { columns } = this.run, [first, last] = this.view.places;
    const is = kind === "loss" ? (at) => columns.lost?.[at] : (at) => columns.skipped[at] || columns.nonfinite[at];
    let before = -Infinity, path = "";
    for (let at = first; at <= last; at++) {
      const x = this.x(columns.step[at]);
      if (!is(at) || x < LEFT - 1 || x > LEFT + this.inner + 1 || x - before < 4) continue;
      before = x;
      path += `M${(x - 4).toFixed(1)},${this.top - 16}l8,8m0,-8l-8,8`;
    }
    if (path) svgElement("path", { class: "cross", d: path }, this.svg);
  }

  point() {
    super.point();
    this.dots.forEach((dot, place) => {
      const value = this.view.cursorIsShown ? this.run.columns[this.series[place]][this.view.cursor] : NaN;
      const isShown = this.canDraw(value) && this.y(value) >= this.top - 4;
      dot.setAttribute("display", isShown ? "inline" : "none");
      if (!isShown) return;
      dot.setAttribute("cx", this.x(this.run.columns.step[this.view.cursor]));
      dot.setAttribute("cy", this.y(value));
    });
  }
}

const isLimit = (name) => name === "limit" || name.endsWith("_limit");

function colourOf(name) {
  const group = /^group\d+/.exec(name);
  return group ? `c-${group[0]}` : `c-${name}`;
}

function labelOf(name, run, value) {
  if (name === "limit") return `limit ${format.short(value)}`;
  if (name === "share") return "clipped";
  return run.groups[name] || name;
}
