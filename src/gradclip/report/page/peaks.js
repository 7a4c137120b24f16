// Labels of the highest points of a line: of the highest, and of two more that are far above the usual.

const MOST_PEAKS = 3, FAR_ABOVE = 2;

function* highestFirst(heights, low, high) {
  const order = [];
  for (let at = low; at <= high; at++) if (Number.isFinite(heights[at]) && heights[at] > 0) order.push(at);
  if (order.length < 3) return;
  order.sort((a, b) => heights[b] - heights[a]);
  const usual = heights[order[order.length >> 1]];
  for (const at of order) {
    if (heights[at] < FAR_ABOVE * usual) return;
    yield at;
  }
}

// Each label stands beside its peak where it covers none of the others and stays in the plot.
function labelPeaks(chart, heights, y) {
  const { run, view } = chart, taken = [];
  const fits = (left, width, height) =>
    left >= LEFT && left + width <= LEFT + chart.inner + 8 &&
    taken.every((other) => left + width < other.left || left > other.right || Math.abs(height - other.height) > 16);
  let tried = 0;
  for (const at of highestFirst(heights, ...view.places)) {
    if (taken.length === MOST_PEAKS || tried++ === 200) break;
    const step = (run.columns.norm_at || run.columns.step)[at], x = chart.x(step), height = Math.max(chart.top + 6, y(heights[at]));
    if (x < LEFT || x > LEFT + chart.inner || taken.some((other) => Math.abs(other.x - x) < chart.inner / 25)) continue;
    const text = `${format.short(heights[at])} at ${run.noun[0]} ${format.whole(step)}`;
    const width = text.length * LETTER;
    const left = [x + 7, x - 7 - width].find((place) => fits(place, width, height));
    if (left === undefined) continue;
    taken.push({ x, height, left: Math.min(left, x - 6), right: Math.max(left + width, x + 6) });
    const isRight = left > x;
    svgElement("text", { class: "halo name", x: isRight ? x + 7 : x - 7, y: height + 4, "text-anchor": isRight ? "start" : "end" }, chart.svg, text);
    svgElement("circle", { class: "dot c-norm", cx: x, cy: y(heights[at]), r: 3 }, chart.svg);
  }
}
