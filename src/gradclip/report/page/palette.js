// The colours of the heat map: blue below the usual, then the page's grey, orange, and dark.

const LEVELS = 256, COLDEST = -1, HOTTEST = 2; // log10 of the ratio

class Palette {
  constructor() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => {
      const text = style.getPropertyValue(`--${name}`).trim().slice(1);
      return [0, 2, 4].map((at) => parseInt(text.slice(at, at + 2), 16));
    };
    const [cold, usual, warm, hot, bad, page] = ["cold", "usual", "warm", "hot", "bad", "page"].map(read);
    const mixed = (from, to, part) => Palette.pixel(from.map((each, at) => each + (to[at] - each) * part));
    this.colours = new Uint32Array(LEVELS);
    for (let at = 0; at < LEVELS; at++) {
      const ratio = COLDEST + ((HOTTEST - COLDEST) * at) / (LEVELS - 1);
      this.colours[at] = ratio < 0 ? mixed(usual, cold, -ratio) : ratio < 1 ? mixed(usual, warm, ratio) : mixed(warm, hot, ratio - 1);
    }
    this.bad = Palette.pixel(bad);
    this.absent = Palette.pixel(page);
  }

  static pixel(parts) {
    const [red, green, blue] = parts.map(Math.round);
    return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  }

  of(ratio) {
    if (Number.isNaN(ratio)) return this.absent;
    if (ratio === Infinity) return this.bad;
    const place = ((ratio - COLDEST) / (HOTTEST - COLDEST)) * (LEVELS - 1);
    return this.colours[Math.max(0, Math.min(LEVELS - 1, Math.round(place)))];
  }

  drawScale(canvas) {
    const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, 1);
    const pixels = new Uint32Array(image.data.buffer);
    for (let at = 0; at < canvas.width; at++) pixels[at] = this.of(COLDEST + ((HOTTEST - COLDEST) * at) / (canvas.width - 1));
    context.putImageData(image, 0, 0);
  }
}
