// The highest points of a line that are worth a label: the highest, and two more far above the usual.

function highestPeaks(heights, low, high, apart) {
  const order = [];
  for (let at = low; at <= high; at++) if (Number.isFinite(heights[at]) && heights[at] > 0) order.push(at);
  if (order.length < 3) return [];
  order.sort((a, b) => heights[b] - heights[a]);
  const usual = heights[order[order.length >> 1]];
  const found = [];
  for (const at of order) {
    if (found.length === 3 || heights[at] < 2 * usual) break;
    if (found.every((other) => Math.abs(other - at) >= apart)) found.push(at);
  }
  return found;
}

// Labels beside the peaks, each where it covers none of the others and stays in the plot.
function labelPeaks(chart, heights, y) {
  const { run, view } = chart, [low, high] = view.places, taken = [];
  for (const at of highestPeaks(heights, low, high, (high - low) / 25)) {
    const step = run.columns.step[at], x = chart.x(step);
    if (x < LEFT || x > LEFT + chart.inner) continue;
    const where = run.per > 1 ? "near step" : "at step";
    const text = `${format.short(heights[at])} ${where} ${format.whole(step)}`;
    const width = text.length * LETTER + 8;
    const place = [x + 7, x - 7 - width].find((left) =>
      left >= LEFT && left + width <= LEFT + chart.inner + (chart.isWide ? 0 : 8) &&
      taken.every((other) => left + width < other.left || left > other.right || Math.abs(y(heights[at]) - other.y) > 15));
    if (place === undefined) continue;
    taken.push({ left: Math.min(place, x - 6), right: Math.max(place + width, x + 6), y: y(heights[at]) });
    const isRight = place > x;
    svgElement("text", { class: "halo name", x: isRight ? x + 7 : x - 7, y: Math.max(chart.top + 8, y(heights[at])) + 4, "text-anchor": isRight ? "start" : "end" }, chart.svg, text);
    svgElement("circle", { class: "dot c-norm", cx: x, cy: y(heights[at]), r: 3 }, chart.svg);
  }
}
