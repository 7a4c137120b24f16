// Numbers as text, and the ticks of axes.

const format = {
  // Three digits: 0.57, 12.1, 5.8e3.
  short(value) {
    if (Number.isNaN(value)) return "not a number";
    if (!Number.isFinite(value)) return value > 0 ? "infinite" : "-infinite";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3 || size >= 1e5) return String(value.toExponential(2)).replace(/\.?0*e\+?/, "e");
    return size >= 1000 ? (+value.toPrecision(3)).toLocaleString("en") : String(+value.toPrecision(3));
  },

  whole: (value) => Math.round(value).toLocaleString("en"),

  percent(share) {
    const number = 100 * share;
    if (number === 0 || number >= 10) return `${Math.round(number)} %`;
    return number < 0.01 ? "below 0.01 %" : `${+number.toPrecision(2)} %`;
  },
};

const ticks = {
  linear(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((digit) => digit * power >= rough);
    const found = [];
    for (let at = Math.ceil(low / step); at * step <= high * (1 + 1e-12); at++) found.push(+(at * step).toPrecision(12));
    return found;
  },

  // Steps are whole: no tick between two of them.
  steps(low, high, count) {
    return ticks.linear(low, high, Math.max(1, Math.min(count, high - low))).filter(Number.isInteger);
  },

  // Decades; where the axis has fewer than three of them, finer steps.
  log(low, high) {
    for (const digits of [[1], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8]]) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
        for (const digit of digits) {
          const value = +`${digit}e${power}`;
          if (value >= low && value <= high) found.push(value);
        }
      if (found.length >= 3) return found.filter((_, at) => at % Math.ceil(found.length / 8) === 0);
    }
    return ticks.linear(low, high, 4);
  },
};
