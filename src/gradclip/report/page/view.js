// Which steps are shown, and which one is asked about: one for all charts of a run.

class View {
  constructor(run) {
    this.steps = run.columns.step;
    const first = (run.columns.step_lo || this.steps)[0], last = (run.columns.step_hi || this.steps)[run.count - 1];
    this.first = first;
    this.last = last;
    this.whole = first === last ? [first - 0.5, last + 0.5] : [first, last];
    this.least = Math.min(8 * (last - first) / Math.max(1, run.count - 1) || 1, this.whole[1] - this.whole[0]);
    this.range = this.whole;
    this.cursor = null;
    this.row = null;
  }

  get isWhole() {
    return this.range[0] <= this.whole[0] && this.range[1] >= this.whole[1];
  }

  // The place of the step that is nearest.
  nearest(step) {
    let low = 0, high = this.steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low > 0 && step - this.steps[low - 1] < this.steps[low] - step ? low - 1 : low;
  }

  // First and last place that are shown; with one more at each side, so that lines go on to the edge.
  get places() {
    return [Math.max(0, this.nearest(this.range[0]) - 1), Math.min(this.steps.length - 1, this.nearest(this.range[1]) + 1)];
  }

  get cursorIsShown() {
    const step = this.cursor === null ? NaN : this.steps[this.cursor];
    return step >= this.range[0] && step <= this.range[1];
  }

  zoom(low, high) {
    const [first, last] = this.whole;
    const span = Math.min(Math.max(high - low, this.least), last - first);
    const middle = Math.min(Math.max((low + high) / 2, first + span / 2), last - span / 2);
    this.range = [middle - span / 2, middle + span / 2];
  }

  // By a factor, around the cursor where it is shown.
  zoomBy(factor) {
    const [low, high] = this.range;
    const around = this.cursorIsShown ? this.steps[this.cursor] : (low + high) / 2;
    this.zoom(around - (around - low) * factor, around + (high - around) * factor);
  }

  move(places) {
    const from = this.cursor === null ? this.nearest(this.range[0]) : this.cursor + places;
    this.cursor = Math.min(this.steps.length - 1, Math.max(0, from));
    const step = this.steps[this.cursor], span = this.range[1] - this.range[0];
    if (!this.cursorIsShown) this.zoom(step - span / 2, step + span / 2);
    return !this.isWhole;
  }
}
