// The numbers of a run, unpacked.

const TYPES = { f4: Float32Array, f8: Float64Array, i4: Int32Array, u1: Uint8Array };

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

async function readRun(article) {
  const told = JSON.parse(article.querySelector("script.data").textContent);
  const columns = {};
  for (const [name, { type, text }] of Object.entries(told.columns)) columns[name] = new TYPES[type](await unpacked(text));
  let heat = null;
  if (told.heat) {
    const bytes = new Uint8Array(await unpacked(told.heat.codes));
    const size = told.heat.rows * told.heat.columns;
    // Logarithms of the norms: -Infinity is 0, Infinity is not finite, NaN was not recorded.
    const logs = new Float32Array(size);
    for (let at = 0; at < size; at++) {
      const code = (bytes[at] << 8) | bytes[size + at];
      logs[at] = code === 0 ? NaN : code === 1 ? -Infinity : code === 65535 ? Infinity : told.heat.low + (code - 2) * told.heat.unit;
    }
    heat = { ...told.heat, logs };
  }
  const room = 14 + LETTER * Math.max(0, ...(heat?.labels || []).map(({ length }) => length));
  return { columns, heat, room, groups: told.groups, noun: told.noun, per: told.per, count: columns.step.length };
}
