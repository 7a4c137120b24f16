// What is said of a step: one sentence in the bar, and a few lines beside the pointer.

function bounds(columns, name, at) {
  const value = columns[name][at], low = columns[`${name}_lo`], high = columns[`${name}_hi`];
  if (!low || low[at] === high[at] || Number.isNaN(value)) return format.short(value);
  return `${format.short(value)} (${format.short(low[at])} to ${format.short(high[at])})`;
}

function stepName({ columns, per, noun }, at) {
  if (per > 1) return `${noun[1]} ${format.whole(columns.step_lo[at])} to ${format.whole(columns.step_hi[at])}`;
  return `${noun[0]} ${format.whole(columns.step[at])}`;
}

// Pairs of what and how much, of those that are known.
function factsOf(run, at) {
  const { columns, per } = run, facts = [];
  const isKnown = (name) => name in columns && !Number.isNaN(columns[name][at]);
  if (isKnown("norm")) facts.push(["norm", bounds(columns, "norm", at)]);
  else if (columns.nonfinite[at]) facts.push(["norm", "not finite"]);
  if (isKnown("limit") && !Object.keys(run.groups).length) facts.push(["limit", bounds(columns, "limit", at)]);
  for (const [key, name] of Object.entries(run.groups)) if (isKnown(key)) facts.push([name, bounds(columns, key, at)]);
  if (isKnown("loss")) facts.push(["loss", bounds(columns, "loss", at)]);
  if (isKnown("rate")) facts.push(["rate", format.short(columns.rate[at])]);
  if (per > 1) {
    if (columns.clipped[at]) facts.push(["clipped", `${columns.clipped[at]} of ${per}`]);
    if (columns.skipped[at]) facts.push(["skipped", `${columns.skipped[at]} of ${per}`]);
  } else if (columns.skipped[at]) facts.push(["step", "skipped"]);
  else if (columns.clipped[at]) facts.push(["gradient", isKnown("kept") && columns.kept[at] < 1 ? `cut to ${format.percent(columns.kept[at])}` : "clipped"]);
  return facts;
}

function titleOf(run, at) {
  const name = stepName(run, at);
  return name[0].toUpperCase() + name.slice(1);
}

function sentenceOf(run, at) {
  const said = factsOf(run, at).map(([what, much]) => `${what} ${much}`).join(", ");
  return `${titleOf(run, at)}: ${said || "nothing is known"}`;
}

// Of a parameter at a step: its norm was kept with two digits, or the largest of a few steps was.
function cellFacts({ norm, usual, ratio }) {
  if (Number.isNaN(norm)) return [["norm", "not recorded"]];
  if (norm === Infinity) return [["norm", "not finite"]];
  const about = (value) => `about ${format.short(+value.toPrecision(2))}`;
  return [["norm", about(norm)], ["usual", about(usual)], ["ratio", about(ratio)]];
}

function sentenceOfCell(run, at, cell) {
  const said = cellFacts(cell).map(([what, much]) => `${what} ${much}`).join(", ");
  const pooled = cell.steps > 1 ? ` (largest of ${cell.steps})` : "";
  return `${titleOf(run, at)}${pooled}, ${cell.name}: ${said}`;
}

// The lines beside the pointer.
const hint = {
  box: document.getElementById("hint"),

  hide() { hint.box.hidden = true; },

  show(lines, title, event) {
    const rows = lines.map(([what, much]) => {
      const row = document.createElement("div"), label = document.createElement("i");
      label.textContent = what;
      row.append(label, ` ${much}`);
      return row;
    });
    const heading = document.createElement("b");
    heading.textContent = title;
    hint.box.replaceChildren(heading, ...rows);
    hint.box.hidden = false;
    const width = hint.box.offsetWidth, space = document.documentElement.clientWidth;
    const left = event.pageX + 16 + width > space ? event.pageX - width - 14 : event.pageX + 16;
    hint.box.style.left = `${Math.max(4, Math.min(left, space - width - 4))}px`;
    hint.box.style.top = `${event.pageY + 14}px`;
  },
};
