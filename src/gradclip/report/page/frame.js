// What all charts share: where the plot lies in its box, SVG elements, the axis of steps, the cursor.

const LEFT = 56, BOTTOM = 22, WIDE = 520, ROOM = 120, MOST_ROOM = 190, LETTER = 6.9;

function svgElement(name, attributes, parent, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

class Frame {
  static paper = null; // the width while the page is printed

  constructor(box, run, view) {
    Object.assign(this, { box, run, view });
    this.height = +box.dataset.height;
  }

  begin(top) {
    this.width = Frame.paper || this.box.clientWidth;
    this.isWide = this.width >= WIDE;
    this.right = this.isWide ? Math.max(ROOM, Math.min(MOST_ROOM, this.run.room, this.width / 5)) : 14;
    this.inner = this.width - LEFT - this.right;
    this.top = top;
    const label = this.box.getAttribute("aria-label");
    this.svg = svgElement("svg", { viewBox: `0 0 ${this.width} ${this.height}`, role: "img", "aria-label": label });
  }

  x(step) {
    const [low, high] = this.view.range;
    return LEFT + ((step - low) / (high - low)) * this.inner;
  }

  stepAt(x) {
    const [low, high] = this.view.range;
    return low + ((Math.min(Math.max(x, LEFT), LEFT + this.inner) - LEFT) / this.inner) * (high - low);
  }

  drawSteps() {
    for (const step of ticks.steps(...this.view.range, Math.max(3, this.inner / 130)))
      svgElement("text", { x: this.x(step), y: this.height - 5, "text-anchor": "middle" }, this.svg, format.whole(step));
  }

  // Put the drawing in the place of the one before.
  end() {
    this.line = svgElement("line", { class: "cursor", y1: this.top, y2: this.height - BOTTOM, display: "none" }, this.svg);
    this.chosen = svgElement("rect", { class: "chosen", y: this.top, height: this.height - BOTTOM - this.top, width: 0 }, this.svg);
    this.box.querySelector("svg")?.remove();
    this.box.append(this.svg);
    this.point();
  }

  point() {
    const isShown = this.view.cursorIsShown;
    this.line.setAttribute("display", isShown ? "inline" : "none");
    if (!isShown) return;
    const x = this.x(this.run.columns.step[this.view.cursor]);
    this.line.setAttribute("x1", x);
    this.line.setAttribute("x2", x);
  }

  choose(from, to) {
    this.chosen.setAttribute("x", Math.min(from, to));
    this.chosen.setAttribute("width", Math.abs(from - to));
  }
}

// A name cut to a width, so that it differs from the others: "\u2026in_proj.bias", "17\u2026k_proj".
// It keeps whole parts where they fit, and of its start no more than it needs.
function fitted(text, width, others) {
  const most = Math.max(3, Math.floor(width / LETTER)), end = text.length;
  if (end <= most) return text;
  const differs = ([head, tail]) => !others.some((other) => other !== text && other.length >= head + tail &&
    other.startsWith(text.slice(0, head)) && other.endsWith(text.slice(end - tail)));
  const whole = [], cut = [];
  for (let head = 0; head < most - 1; head++) {
    const tail = most - 1 - head, part = text.indexOf(".", end - tail - 1) + 1;
    cut.push([head, tail]);
    if ((!head || text[head] === ".") && part) whole.push([head, end - part]);
  }
  whole.sort((a, b) => b[0] + b[1] - a[0] - a[1]);
  const [head, tail] = [...whole, ...cut].find(differs) || cut[0];
  return text.slice(0, head) + "\u2026" + text.slice(end - tail);
}

// Places as close to the wanted ones as they can be without covering each other.
function spread(wanted, apart, low, high) {
  const clusters = [];
  for (const place of wanted) {
    let cluster = { sum: place, count: 1 };
    const start = (of) => Math.min(Math.max(of.sum / of.count - (apart * (of.count - 1)) / 2, low), high - apart * (of.count - 1));
    cluster.start = start(cluster);
    for (let before = clusters.at(-1); before && before.start + apart * before.count > cluster.start; before = clusters.at(-1)) {
      clusters.pop();
      cluster = { sum: before.sum + cluster.sum, count: before.count + cluster.count };
      cluster.start = start(cluster);
    }
    clusters.push(cluster);
  }
  return clusters.flatMap(({ start, count }) => Array.from({ length: count }, (_, at) => start + apart * at));
}
