"use strict";
// Attention over tokens, and lens tables.

Report.draw.attention = (body, told) => {
  const state = { prompt: 0, head: 0, token: null, from: true };
  const controls = Report.el("div", { class: "controls" });
  const words = Report.el("div", { class: "tokens", role: "listbox", "aria-label": "Tokens of the prompt", tabindex: 0 });
  const readout = Report.el("output", { class: "readout", "aria-live": "polite" }, "Point at a token, or move through them with the arrow keys.");
  body.append(controls, words, readout);
  body.append(Report.el("div", { class: "legend-box" }, Plot.legend({ color: { type: "linear", scheme: "Blues", domain: [0, 1], label: "attention (share)" }, width: 260, height: 44 })));
  const matrix = Report.chart(body, `${told.title}: pattern of the chosen head`);
  let pattern = null, spans = [];
  const tokens = () => told.prompts[state.prompt].tokens;
  const weight = (query, key) => pattern[query * tokens().length + key] / 255;

  const light = () => {
    if (!pattern) return;
    const n = tokens().length, at = state.token;
    spans.forEach((span, i) => {
      const w = at === null ? 0 : state.from ? weight(at, i) : weight(i, at);
      span.style.setProperty("--weight", w.toFixed(3));
      span.setAttribute("aria-selected", String(i === at));
    });
    if (at === null) return;
    const found = d3.range(n).map((i) => [i, state.from ? weight(at, i) : weight(i, at)]);
    const best = d3.sort(found, (d) => -d[1]).slice(0, 3).filter((d) => d[1] >= 0.005);
    const said = best.map(([i, w]) => `${i} ${tokens()[i]} ${Math.round(100 * w)} %`).join(", ");
    readout.textContent = `Head ${told.heads[state.head]}: ${at} ${tokens()[at]} ` +
      (state.from ? `looks at ${said || "nothing in particular"}` : `is looked at by ${said || "no token in particular"}`);
  };
  const draw = () => {
    if (!pattern) return;
    const n = tokens().length;
    const labels = tokens().map((t, i) => `${i} ${t}`);
    const size = Math.min(560, Math.max(220, 22 * n), (matrix.area.clientWidth || 600) - 130);
    const ticks = Report.thinned(n, size / 14);
    const svg = Plot.plot({
      width: size + 130, height: size + 130, marginLeft: 110, marginBottom: 120, marginTop: 10, marginRight: 20,
      x: { type: "linear", domain: [0, n], label: null }, y: { type: "linear", domain: [n, 0], label: null },
      color: { type: "sequential", scheme: "Blues", domain: [0, 1] },
      marks: [
        Plot.raster(pattern, { width: n, height: n, x1: 0, x2: n, y1: 0, y2: n, fill: (v) => v / 255, imageRendering: "pixelated" }),
        Plot.axisX(ticks.map((i) => i + 0.5), { tickFormat: (i) => Report.short(labels[i - 0.5]), tickRotate: -90, tickSize: 0, label: "key: what is looked at", labelArrow: "none", labelAnchor: "center", labelOffset: 114 }),
        Plot.axisY(ticks.map((i) => i + 0.5), { tickFormat: (i) => Report.short(labels[i - 0.5]), tickSize: 0, label: "query: who looks", labelArrow: "none", labelAnchor: "center", labelOffset: 104 }),
      ],
    });
    const sx = svg.scale("x"), sy = svg.scale("y");
    matrix.put({
      svg, columns: n, rows: n, downwards: true,
      place: (column, row) => ({ x: sx.apply(column), y: sy.apply(row), width: sx.apply(1) - sx.apply(0), height: sy.apply(1) - sy.apply(0) }),
      find: (x, y) => {
        const column = Math.floor(sx.invert(x)), row = Math.floor(sy.invert(y));
        return column >= 0 && column < n && row >= 0 && row < n ? { column, row } : null;
      },
      say: (column, row) => `${labels[row]} looks at ${labels[column]}: ${(100 * weight(row, column)).toFixed(1)} %`,
    });
  };
  const write = () => {
    spans = tokens().map((token, i) => Report.el("bdi", { class: "token", role: "option", "aria-label": `${i} ${token}`, "aria-selected": "false" }, token));
    spans.forEach((span, i) => span.addEventListener("pointerenter", () => { state.token = i; light(); }));
    words.replaceChildren(...spans);
  };
  const load = async () => {
    pattern = await Report.inflate(told.prompts[state.prompt].patterns[state.head]);
    draw();
    light();
    body.dataset.head = told.heads[state.head];
  };
  words.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const n = tokens().length;
    const to = event.key === "Home" ? 0 : event.key === "End" ? n - 1 : step ? (state.token ?? (step > 0 ? -1 : n)) + step : null;
    if (to === null) return;
    event.preventDefault();
    state.token = Math.min(n - 1, Math.max(0, to));
    spans[state.token].scrollIntoView({ block: "nearest" });
    light();
  });
  const turn = Report.choice("a token", ["looks at", "is looked at by"], (i) => { state.from = i === 0; light(); });
  controls.append(
    Report.choice("head", told.heads, (i) => { state.head = i; load(); }),
    Report.choice("prompt", told.prompts.map((p) => p.name), (i) => { state.prompt = i; state.token = null; write(); load(); }),
    turn,
  );
  write();
  load();
  Report.onWidth(matrix.area, draw);
  const rows = () => d3.range(tokens().length).flatMap((q) => {
    const found = d3.sort(d3.range(tokens().length).map((k) => [k, weight(q, k)]), (d) => -d[1]).slice(0, 3);
    return found.filter((d) => d[1] > 0).map(([k, w]) => [q, tokens()[q], k, tokens()[k], w]);
  });
  const table = Report.el("details", {}, Report.el("summary", {}, "The three strongest looks of every token as a table"));
  const fill = () => { if (table.open && pattern) table.replaceChildren(table.firstChild, Report.table(told.title, ["query", "token", "key", "looks at", "attention"], rows())); };
  table.addEventListener("toggle", fill);
  controls.addEventListener("change", () => setTimeout(fill, 300));
  body.append(table);
};

Report.draw.lens = (body, told) => {
  const WINDOW = 24;
  const names = Object.keys(told.labels);
  const state = { prompt: 0, value: 0, from: 0 };
  const controls = Report.el("div", { class: "controls" });
  const legendBox = Report.el("div", { class: "legend-box" });
  body.append(controls, legendBox);
  const chart = Report.chart(body, told.title);
  const read = told.prompts.map((prompt) => ({
    tokens: prompt.tokens, words: Report.numbers(prompt.words),
    values: Object.fromEntries(Object.entries(prompt.values).map(([k, v]) => [k, Report.numbers(v)])),
  }));
  const word = (k) => told.vocabulary[read[state.prompt].words[k]] ?? "";
  const draw = () => {
    const prompt = read[state.prompt], n = prompt.tokens.length, name = names[state.value];
    const columns = prompt.tokens.slice(state.from, state.from + WINDOW);
    const at = (row, column) => row * n + column + state.from;
    const plot = Report.grid({
      columns, rows: told.layers, label: told.labels[name], signed: false,
      limit: name === "top_prob" || name === "prob" ? 1 : undefined,
      columnName: "token read", rowName: "layer", width: chart.area.clientWidth || 700,
      value: (row, column) => prompt.values[name][at(row, column)],
      word: (row, column) => word(at(row, column)),
      say: (column, row) => `layer ${told.layers[row]}, ${columns[column]}: first choice ${word(at(row, column))}; ` +
        names.map((each) => `${told.labels[each]} ${Report.show(prompt.values[each][at(row, column)])}`).join(", "),
    });
    legendBox.replaceChildren(...(plot.legend ? [plot.legend] : []));
    chart.put(plot);
  };
  const fromBox = Report.el("span");
  const place = () => {
    const n = read[state.prompt].tokens.length;
    state.from = 0;
    fromBox.replaceChildren(...(n > WINDOW ? [Report.number(`tokens from (of ${n})`, 0, 0, n - 1, (x) => { state.from = x; draw(); })] : []));
  };
  place();
  controls.append(
    Report.choice("coloured by", names.map((name) => told.labels[name]), (i) => { state.value = i; draw(); }),
    Report.choice("prompt", told.prompts.map((p) => p.name), (i) => { state.prompt = i; place(); draw(); }),
    fromBox,
  );
  Report.onWidth(chart.area, draw);
  const rows = () => {
    const prompt = read[state.prompt], n = prompt.tokens.length;
    return told.layers.flatMap((layer, row) => prompt.tokens.map((token, i) =>
      [layer, i, token, word(row * n + i), ...names.map((name) => prompt.values[name][row * n + i])]));
  };
  body.append(Report.asTable(told.title, ["layer", "position", "token", "first choice", ...names.map((n) => told.labels[n])], rows));
};
