// The norm of each parameter over the steps, by its ratio to what is usual for it.
//
// Steps are pooled to the width that is drawn before the medians are taken, and every pooled column
// is the largest of its steps: the largest of many is above the median of single ones, and medians of
// single ones would colour the whole map.

class HeatMap extends Frame {
  constructor(box, run, view) {
    super(box, run, view);
    this.compared = "both";
    this.pooled = new Map();
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("aria-hidden", "true");
    box.append(this.canvas);
  }

  // Logarithms of ratios, of columns that hold so many of the data's.
  ratios(factor) {
    const key = `${factor} ${this.compared}`;
    if (this.pooled.has(key)) return this.pooled.get(key);
    const { rows, columns, logs } = this.run.heat, count = Math.ceil(columns / factor);
    const ratios = new Float32Array(rows * count), medians = new Float32Array(rows);
    for (let row = 0; row < rows; row++) {
      for (let at = 0; at < count; at++) {
        let most = NaN;
        for (let from = at * factor; from < Math.min(columns, (at + 1) * factor); from++) {
          const value = logs[row * columns + from];
          if (!(value <= most) && !Number.isNaN(value)) most = value;
        }
        ratios[row * count + at] = most;
      }
      medians[row] = medianOf(ratios.subarray(row * count, (row + 1) * count));
      for (let at = 0; at < count; at++) ratios[row * count + at] -= medians[row];
    }
    if (this.compared === "both" && rows > 2)
      for (let at = 0; at < count; at++) {
        const column = new Float32Array(rows);
        for (let row = 0; row < rows; row++) column[row] = ratios[row * count + at];
        const median = medianOf(column);
        for (let row = 0; row < rows; row++) ratios[row * count + at] -= median;
      }
    const found = { ratios, count, factor, medians };
    this.pooled.set(key, found);
    return found;
  }

  // Which column of the data a step is in; each step is as wide as the next, half to each side.
  columnOf(step) {
    const { first, last } = this.view;
    return ((step - first + 0.5) / (last - first + 1)) * this.run.heat.columns;
  }

  draw() {
    this.begin(4);
    const { heat } = this.run, bottom = this.height - BOTTOM;
    this.y = (row) => this.top + ((row + 0.5) / heat.rows) * (bottom - this.top);
    this.rowAt = (y) => Math.max(0, Math.min(heat.rows - 1, Math.floor(((y - this.top) / (bottom - this.top)) * heat.rows)));
    this.paint(bottom);
    this.drawSteps();
    this.drawTicks();
    this.drawMakers();
    this.drawNames();
    this.drawFaults();
    this.end();
  }

  // What was not finite: dots, which are joined where rows are close to each other.
  drawFaults() {
    const [low, high] = this.view.range;
    let path = "", before = {};
    for (const [step, row] of this.run.heat.bad) {
      if (step < low || step > high) continue;
      const y = this.y(row), isJoined = before.step === step && y - before.y < 7;
      path += isJoined ? `V${y.toFixed(1)}` : `M${this.x(step).toFixed(1)},${y.toFixed(1)}v0.01`;
      before = { step, y };
    }
    if (path) svgElement("path", { class: "fault", d: path }, this.svg);
  }

  paint(bottom) {
    const { heat } = this.run, { canvas } = this;
    const width = Math.max(1, Math.round(this.inner * Math.min(2, devicePixelRatio || 1)));
    canvas.width = width;
    canvas.height = heat.rows;
    canvas.style.left = `${(LEFT / this.width) * 100}%`;
    canvas.style.width = `${(this.inner / this.width) * 100}%`;
    canvas.style.top = `${(this.top / this.height) * 100}%`;
    canvas.style.height = `${((bottom - this.top) / this.height) * 100}%`;
    const [low, high] = this.view.range.map((step) => this.columnOf(step));
    const { ratios, count, factor } = this.ratios(Math.max(1, Math.round((high - low) / width)));
    const context = canvas.getContext("2d"), image = context.createImageData(width, heat.rows);
    const pixels = new Uint32Array(image.data.buffer);
    const edges = Array.from({ length: width + 1 }, (_, at) => Math.floor((low + ((high - low) * at) / width) / factor));
    for (let row = 0; row < heat.rows; row++)
      for (let at = 0; at < width; at++) {
        const from = Math.max(0, Math.min(count - 1, edges[at]));
        let most = ratios[row * count + from];
        for (let other = from + 1; other < Math.min(count, edges[at + 1]); other++)
          if (!(ratios[row * count + other] <= most)) most = ratios[row * count + other];
        pixels[row * width + at] = this.palette.of(most);
      }
    context.putImageData(image, 0, 0);
  }

  // Layers at the left, as many as fit.
  drawTicks() {
    const rowHeight = (this.height - BOTTOM - this.top) / this.run.heat.rows;
    const { ticks } = this.run.heat;
    if (!ticks.length || ticks.some(([, name]) => name.length * LETTER > LEFT + 6)) return;
    const apart = ticks.length > 1 ? ((ticks.at(-1)[0] - ticks[0][0]) / (ticks.length - 1)) * rowHeight : Infinity;
    const every = [1, 2, 4, 8, 16, 32, 64].find((each) => each * apart >= 16) || 64;
    let before = -Infinity;
    ticks.forEach(([row, name], at) => {
      const y = this.y(row);
      if (at % every || y - before < 14) return;
      before = y;
      svgElement("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, this.svg, name);
    });
  }

  // A bar beside the rows of the layer that makes the spikes: of few steps, these are thin.
  drawMakers() {
    const half = Math.max(1.5, (this.height - BOTTOM - this.top) / this.run.heat.rows / 2);
    const path = this.run.heat.makers.map((row) => `M${LEFT - 2},${(this.y(row) - half).toFixed(1)}v${(2 * half).toFixed(1)}`).join("");
    if (path) svgElement("path", { class: "maker", d: path }, this.svg);
  }

  // At the right the hottest rows, or all of them where they have room; on a phone, on the map.
  drawNames() {
    const { rows, names, labels, hot } = this.run.heat, rowHeight = (this.height - BOTTOM - this.top) / rows;
    const shown = rowHeight >= 14 ? names.map((_, row) => row) : hot;
    if (!this.isWide) {
      if (rowHeight >= 14) for (const row of shown) svgElement("text", { class: "halo name", x: LEFT + 4, y: this.y(row) + 4 }, this.svg, fitted(labels[row], this.inner - 10, labels));
      return;
    }
    const places = spread(shown.map(this.y), 13, this.top + 6, this.height - BOTTOM - 4);
    shown.forEach((row, at) => {
      const x = LEFT + this.inner;
      svgElement("path", { class: "leader", d: `M${x + 1},${this.y(row)}L${x + 8},${places[at]}` }, this.svg);
      const text = svgElement("text", { class: hot.includes(row) ? "name" : "", x: x + 11, y: places[at] + 4 }, this.svg, fitted(labels[row], this.right - 14, labels));
      svgElement("title", {}, text, names[row]);
    });
  }

  // What a row is at the cursor.
  reading() {
    const { heat, columns } = this.run, { row, cursor } = this.view;
    if (row === null || cursor === null) return null;
    const column = Math.max(0, Math.min(heat.columns - 1, Math.floor(this.columnOf(columns.step[cursor]))));
    const { ratios, medians } = this.ratios(1);
    return { name: heat.names[row], norm: 10 ** heat.logs[row * heat.columns + column], usual: 10 ** medians[row], ratio: 10 ** ratios[row * heat.columns + column], steps: Math.round(heat.perColumn) };
  }
}

// Of what is a number.
function medianOf(values) {
  const known = values.filter(Number.isFinite).sort();
  return known.length ? known[known.length >> 1] : 0;
}
