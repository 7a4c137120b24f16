// Pointer, keys, slider and buttons: each changes the view, and all charts of the run follow.

class Controls {
  constructor(article, run, view, charts) {
    Object.assign(this, { article, run, view, charts });
    this.slider = article.querySelector(".step");
    this.reading = article.querySelector(".reading");
    this.range = article.querySelector(".range");
    this.slider.max = run.count - 1;
    this.slider.addEventListener("input", () => this.ask(+this.slider.value));
    const press = (name, act) => article.querySelector(name).addEventListener("click", act);
    press(".in", () => this.zoomBy(0.5));
    press(".out", () => this.zoomBy(2));
    press(".all", () => this.zoom(...view.whole));
    for (const button of article.querySelectorAll("[data-go]")) button.addEventListener("click", () => this.go(+button.dataset.go));
    article.querySelector(".compared")?.addEventListener("change", (event) => {
      const map = charts.find((chart) => chart instanceof HeatMap);
      map.compared = event.target.value;
      map.draw();
    });
    for (const chart of charts) this.listen(chart);
  }

  draw() {
    for (const chart of this.charts) chart.draw();
  }

  zoom(low, high) {
    this.view.zoom(low, high);
    this.tellRange();
    this.draw();
  }

  zoomBy(factor) {
    this.view.zoomBy(factor);
    this.tellRange();
    this.draw();
  }

  tellRange() {
    const [low, high] = this.view.range.map(format.whole);
    this.range.textContent = this.view.isWhole ? `all ${this.run.noun[1]}` : `${this.run.noun[1]} ${low} to ${high}`;
  }

  // Ask about the step at a place.
  ask(place, chart) {
    this.view.cursor = place;
    for (const each of this.charts) each.point();
    const cell = chart instanceof HeatMap ? chart.reading() : null;
    const said = cell ? sentenceOfCell(this.run, place, cell) : sentenceOf(this.run, place);
    this.reading.textContent = said;
    this.slider.value = place;
    this.slider.setAttribute("aria-valuetext", said);
  }

  go(step) {
    const around = Math.max(this.view.least * 4, (this.view.whole[1] - this.view.whole[0]) / 80);
    this.zoom(step - around, step + around);
    this.ask(this.view.nearest(step));
    this.article.querySelector(".chart").scrollIntoView({ block: "center" });
  }

  listen(chart) {
    const { box } = chart;
    let from = null;
    const at = (event) => Math.min(Math.max(event.clientX - box.getBoundingClientRect().left, LEFT), LEFT + chart.inner);
    const follow = (event) => {
      if (chart instanceof HeatMap) this.view.row = chart.rowAt(event.clientY - box.getBoundingClientRect().top);
      const place = this.view.nearest(chart.stepAt(at(event)));
      this.ask(place, chart);
      this.hint(chart, place, event);
      if (from !== null) chart.choose(from, at(event));
    };
    box.addEventListener("pointermove", follow);
    box.addEventListener("pointerdown", (event) => {
      follow(event);
      if (event.button || event.pointerType === "touch") return; // a finger moves the cursor
      box.setPointerCapture(event.pointerId);
      from = at(event);
    });
    box.addEventListener("pointerup", (event) => {
      if (from === null) return;
      const [low, high] = [from, at(event)].sort((a, b) => a - b).map((x) => chart.stepAt(x));
      const isDrag = Math.abs(at(event) - from) > 6;
      from = null;
      chart.choose(0, 0);
      if (isDrag) this.zoom(low, high);
    });
    box.addEventListener("pointercancel", () => { from = null; chart.choose(0, 0); });
    box.addEventListener("pointerleave", hint.hide);
    box.addEventListener("dblclick", () => this.zoom(...this.view.whole));
    box.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !this.press(event, chart)) return;
      event.preventDefault();
      hint.hide();
    });
  }

  hint(chart, place, event) {
    const cell = chart instanceof HeatMap ? chart.reading() : null;
    if (!cell) return hint.show(factsOf(this.run, place), titleOf(this.run, place), event);
    const pooled = cell.steps > 1 ? `, largest of ${cell.steps}` : "";
    hint.show([...cellFacts(cell), ["at", stepName(this.run, place) + pooled]], cell.name, event);
  }

  press(event, chart) {
    const span = this.view.range[1] - this.view.range[0];
    const [first, last] = this.view.places;
    const far = event.shiftKey ? Math.max(1, Math.round((last - first) / 50)) : 1;
    const row = this.view.row ?? 0;
    const isMap = chart instanceof HeatMap;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      if (this.view.move(event.key === "ArrowLeft" ? -far : far)) this.draw();
      this.tellRange();
      this.ask(this.view.cursor, chart);
    } else if (isMap && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
      this.view.row = Math.max(0, Math.min(this.run.heat.rows - 1, row + (event.key === "ArrowUp" ? -far : far)));
      this.ask(this.view.cursor ?? this.view.nearest(this.view.range[0] + span / 2), chart);
    } else if (event.key === "+" || event.key === "=") this.zoomBy(0.5);
    else if (event.key === "-") this.zoomBy(2);
    else if (event.key === "Escape" || event.key === "0") this.zoom(...this.view.whole);
    else return false;
    return true;
  }
}
