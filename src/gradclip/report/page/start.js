// Each run of the page, drawn now, and drawn again for another width, other colours, or paper.

const PAPER = 720;
const CHARTS = { lines: LineChart, heat: HeatMap };

async function start(article) {
  const run = await readRun(article), view = new View(run);
  const boxes = [...article.querySelectorAll("[data-chart]")];
  return new Controls(article, run, view, boxes.map((box) => new CHARTS[box.dataset.chart](box, run, view)));
}

function colour(all) {
  const palette = new Palette();
  for (const controls of all)
    for (const chart of controls.charts) chart.palette = palette;
  for (const canvas of document.querySelectorAll(".scale")) palette.drawScale(canvas);
}

async function startAll() {
  const all = await Promise.all([...document.querySelectorAll("article")].map(start));
  const draw = () => { for (const controls of all) controls.draw(); };
  colour(all);
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { colour(all); draw(); });
  let waiting = 0, width = document.querySelector("main").clientWidth;
  new ResizeObserver(([entry]) => {
    if (Frame.paper || entry.contentRect.width === width) return;
    width = entry.contentRect.width;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(draw);
  }).observe(document.querySelector("main"));
  const print = (isPaper) => {
    Frame.paper = isPaper ? PAPER : null;
    document.documentElement.classList.toggle("paper", isPaper);
    colour(all);
    draw();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  document.documentElement.dataset.ready = Math.round(performance.now());
}

startAll();
