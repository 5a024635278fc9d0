"use strict";
// Grids, lines and waterfalls, drawn by Observable Plot.

Report.UP = "#D6604D"; // as the diverging scale of grids has positive and negative
Report.DOWN = "#4393C3";
Report.PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#888888"];

// One grid: values(row, column) as colours; NaN is grey with a cross.
Report.grid = (told) => {
  const { columns, rows, value, label, signed, marked, width, downwards, word } = told;
  const cells = [];
  let top = told.limit ?? 0;
  for (let row = 0; row < rows.length; row++) {
    for (let column = 0; column < columns.length; column++) {
      const v = value(row, column);
      cells.push({ row, column, v });
      if (told.limit === undefined && Number.isFinite(v)) top = Math.max(top, Math.abs(v));
    }
  }
  top = top || 1;
  const missing = cells.filter((c) => !Number.isFinite(c.v));
  const marginLeft = 34 + 6.2 * Math.min(14, d3.max(rows, (r) => r.length) ?? 1);
  const longest = Math.min(14, d3.max(columns, (c) => c.length) ?? 1);
  const each = word ? 62 : Math.min(46, Math.max(5, (width - marginLeft - 20) / columns.length));
  const inner = Math.max(each * columns.length, 60);
  const tall = word ? 22 : Math.min(26, Math.max(7, 420 / rows.length));
  const shownColumns = Report.thinned(columns.length, Math.floor(inner / (longest > 3 ? 15 : 22)));
  const turned = longest * 6.5 > (inner / shownColumns.length) * 0.95;
  const marginBottom = turned ? 28 + 6.2 * longest : 40;
  const gap = each > 9 && tall > 9 ? 0.5 : 0;
  const place = { x: "column", y: "row", inset: gap };
  const svg = Plot.plot({
    width: inner + marginLeft + 20,
    height: tall * rows.length + marginBottom + 12,
    marginLeft, marginBottom, marginTop: 12, marginRight: 20,
    x: { type: "band", domain: d3.range(columns.length), padding: 0, label: null },
    y: { type: "band", domain: downwards ? d3.range(rows.length) : d3.range(rows.length).reverse(), padding: 0, label: null },
    color: signed
      ? { type: "diverging", scheme: "RdBu", reverse: true, domain: [-top, top], pivot: 0 }
      : { type: "sequential", scheme: "Blues", domain: [0, top] },
    marks: [
      Plot.cell(cells.filter((c) => Number.isFinite(c.v)), { ...place, fill: "v" }),
      Plot.cell(missing, { ...place, fill: "var(--missing)" }),
      ...(missing.length && missing.length < 3000 ? [Plot.text(missing, { x: "column", y: "row", text: () => "×", fill: "var(--soft)" })] : []),
      ...(word ? [Plot.text(cells.filter((c) => Number.isFinite(c.v)), { x: "column", y: "row", text: (c) => Report.short(word(c.row, c.column), 9), fontSize: 10, fill: (c) => (Math.abs(c.v) > 0.6 * top ? "white" : "#222") })] : []),
      ...(marked ? [Plot.dot(cells.filter((c) => marked(c.row, c.column)), { x: "column", y: "row", r: Math.min(3, each / 4, tall / 4), fill: (c) => (Math.abs(c.v) > 0.6 * top ? "white" : "#222") })] : []),
      Plot.axisX(shownColumns, { tickFormat: (i) => Report.short(columns[i]), tickRotate: turned ? -90 : 0, tickSize: 0, label: told.columnName, labelArrow: "none", labelAnchor: "center", labelOffset: marginBottom - 6 }),
      Plot.axisY(Report.thinned(rows.length, (tall * rows.length) / 13), { tickFormat: (i) => Report.short(rows[i]), tickSize: 0, label: told.rowName, labelArrow: "none", labelAnchor: "center", labelOffset: marginLeft - 8 }),
    ],
  });
  const sx = svg.scale("x"), sy = svg.scale("y");
  const legend = svg.scale("color") && Plot.legend({ color: { ...svg.scale("color"), label }, width: 260, height: 44 });
  return {
    svg, legend, columns: columns.length, rows: rows.length, downwards,
    place: (column, row) => ({ x: sx.apply(column), y: sy.apply(row), width: sx.bandwidth, height: sy.bandwidth }),
    find: (x, y) => {
      const column = Math.floor((x - sx.apply(0)) / sx.step);
      const down = Math.floor((y - Math.min(sy.apply(0), sy.apply(rows.length - 1))) / sy.step);
      const row = downwards ? down : rows.length - 1 - down;
      return column >= 0 && column < columns.length && row >= 0 && row < rows.length ? { column, row } : null;
    },
    say: told.say,
  };
};

// Lines over places 0..n-1, each with its band; one place at a time under the cursor.
Report.lines = (told) => {
  const { labels, lines, label, width, logarithmic } = told;
  const points = [], bands = [];
  lines.forEach((line, k) => {
    for (let i = 0; i < labels.length; i++) {
      if (Number.isFinite(line.y[i])) points.push({ i, y: line.y[i], k, filled: !line.marked || line.marked(i) });
      if (line.low && Number.isFinite(line.low[i])) bands.push({ i, low: line.low[i], high: line.high[i], k });
    }
  });
  const colour = (d) => Report.PALETTE[d.k % Report.PALETTE.length];
  const longest = Math.min(14, d3.max(labels, (c) => c.length) ?? 1);
  const wide = Math.min(width, 190 + 34 * labels.length);
  const ticks = Report.thinned(labels.length, (wide - 80) / (longest > 3 ? 15 : 24));
  const turned = longest * 6.5 > ((wide - 80) / ticks.length) * 0.95;
  const marginBottom = turned ? 28 + 6.2 * longest : 42;
  const svg = Plot.plot({
    width: wide, height: 250 + marginBottom, marginLeft: 64, marginBottom, marginTop: 16,
    x: { type: "linear", domain: [-0.4, labels.length - 0.6], label: null },
    y: { type: logarithmic ? "log" : "linear", grid: true, label: null, nice: true },
    marks: [
      ...(logarithmic ? [] : [Plot.ruleY([0], { stroke: "var(--soft)" })]),
      ...lines.map((_, k) => (told.ordered && labels.length > 1
        ? Plot.areaY(bands.filter((b) => b.k === k), { x: "i", y1: "low", y2: "high", fill: colour({ k }), fillOpacity: 0.2 })
        : Plot.ruleX(bands.filter((b) => b.k === k), { x: "i", y1: "low", y2: "high", stroke: colour({ k }), strokeWidth: 1.5 }))),
      ...(told.ordered ? lines : []).map((_, k) => Plot.line(points.filter((p) => p.k === k), { x: "i", y: "y", stroke: colour({ k }), strokeWidth: 1.6 })),
      Plot.dot(points, { x: "i", y: "y", r: labels.length > 80 ? 1.5 : 3, stroke: colour, fill: (p) => (p.filled ? colour(p) : "var(--paper)") }),
      Plot.axisX(ticks, { tickFormat: (i) => Report.short(labels[i]), tickRotate: turned ? -90 : 0, label: told.axis, labelArrow: "none", labelAnchor: "center", labelOffset: marginBottom - 6 }),
      Plot.axisY({ label, labelArrow: "none", labelAnchor: "center", ticks: 6, tickFormat: logarithmic ? "~s" : undefined }),
    ],
  });
  const sx = svg.scale("x"), height = 250;
  const legend = lines.length > 1 ? Report.el("p", { class: "legend" }, ...lines.map((line, k) =>
    Report.el("span", {}, Report.swatch(colour({ k })), ` ${line.name} `))) : null;
  return {
    svg, legend, columns: labels.length, rows: 1,
    place: (i) => ({ x: sx.apply(i) - 1, y: 10, width: 2, height }),
    find: (x) => ({ column: Math.min(labels.length - 1, Math.max(0, Math.round(sx.invert(x)))), row: 0 }),
    say: (i) => `${told.axis} ${labels[i]}: ` + lines.map((line) => told.say(line, i)).join("; "),
  };
};
Report.swatch = (colour) => {
  const mark = Report.el("span", { class: "swatch", "aria-hidden": "true" });
  mark.style.background = colour;
  return mark;
};

Report.interval = (mean, low, high, p) => {
  let said = Report.show(mean);
  if (Number.isFinite(low)) said += ` (95 % interval ${Report.show(low)} to ${Report.show(high)})`;
  if (Number.isFinite(p)) said += `, ${Report.showP(p)} corrected`;
  return said;
};

// Numbers on any axes: a grid of two, or a line over one; the others, the prompt and the unit
// are chosen.
Report.draw.cells = (body, told) => {
  const { axes, scales, prompts, signed } = told;
  const values = Object.fromEntries(Object.entries(told.values).map(([k, v]) => [k, Report.numbers(v)]));
  const single = Report.numbers(told.per_prompt);
  const sizes = axes.map((axis) => axis.labels.length);
  const strides = sizes.map((_, i) => sizes.slice(i + 1).reduce((a, b) => a * b, 1));
  const total = sizes.reduce((a, b) => a * b, 1);
  const state = { scale: 0, prompt: -1, at: sizes.map(() => 0), from: 0, to: Infinity };
  // Rows and columns: the last axis runs right, the first with several places upwards.
  const several = axes.map((_, i) => i).filter((i) => sizes[i] > 1 && axes[i].name !== "metric");
  const free = several.length ? several : [axes.length - 1];
  const right = free.find((i) => ["position", "receiver"].includes(axes[i].name)) ?? free[free.length - 1];
  const upwards = free.find((i) => i !== right && axes[i].name === "layer") ?? free.find((i) => i !== right);
  const fixed = axes.map((_, i) => i).filter((i) => i !== right && i !== upwards && sizes[i] > 1);
  // To begin with, show the part that has the largest number.
  const largest = d3.maxIndex(values.mean, (v) => (Number.isFinite(v) ? Math.abs(v) : -1));
  fixed.filter((i) => axes[i].name !== "metric").forEach((i) => { state.at[i] = Math.floor(largest / strides[i]) % sizes[i]; });
  const metric = fixed.find((i) => axes[i].name === "metric");
  const index = (column, row) => {
    let k = 0;
    axes.forEach((_, i) => { k += strides[i] * (i === right ? column : i === upwards ? row : state.at[i]); });
    return k;
  };
  const number = (what, k) => {
    if (what === "p") return values.p ? values.p[k] : NaN;
    const own = state.prompt >= 0 ? (what === "mean" ? single[state.prompt * total + k] : NaN) : values[what]?.[k] ?? NaN;
    return own * scales[state.scale][1];
  };
  const ends = (k) => [number("low", k), number("high", k)].sort((a, b) => a - b);
  const p = (k) => (state.prompt < 0 ? number("p", k) : NaN);

  const controls = Report.el("div", { class: "controls" });
  const legendBox = Report.el("div", { class: "legend-box" });
  body.append(controls, legendBox);
  const chart = Report.chart(body, told.title);
  const draw = () => {
    const label = metric === undefined ? scales[state.scale][0] : `${scales[state.scale][0]}: ${axes[metric].labels[state.at[metric]]}`;
    const width = Math.min(1100, chart.area.clientWidth || 700);
    const to = Math.min(sizes[right] - 1, state.to), from = Math.min(state.from, to);
    const columns = axes[right].labels.slice(from, to + 1);
    const where = fixed.map((i) => `${axes[i].name} ${axes[i].labels[state.at[i]]}, `).join("");
    let plot;
    if (upwards === undefined) {
      const k = (i) => index(i + from, 0);
      const take = (f) => Float64Array.from(columns, (_, i) => f(k(i)));
      const line = { y: take((j) => number("mean", j)), low: take((j) => ends(j)[0]), high: take((j) => ends(j)[1]) };
      if (values.p && state.prompt < 0) line.marked = (i) => p(k(i)) < 0.05;
      plot = Report.lines({
        labels: columns, lines: [line], label, width, axis: axes[right].name, ordered: axes[right].ordered,
        say: (_, i) => Report.interval(line.y[i], line.low[i], line.high[i], p(k(i))),
      });
    } else {
      plot = Report.grid({
        columns, rows: axes[upwards].labels, label, signed, width,
        columnName: axes[right].name, rowName: axes[upwards].name,
        value: (row, column) => number("mean", index(column + from, row)),
        marked: values.p ? (row, column) => p(index(column + from, row)) < 0.05 : null,
        say: (column, row) => {
          const k = index(column + from, row);
          return `${where}${axes[upwards].name} ${axes[upwards].labels[row]}, ${axes[right].name} ${columns[column]}: ` +
            Report.interval(number("mean", k), ...ends(k), p(k));
        },
      });
    }
    legendBox.replaceChildren(...(plot.legend ? [plot.legend] : []));
    chart.put(plot);
  };
  controls.append(
    Report.choice("shown", scales.map((s) => s[0]), (i) => { state.scale = i; draw(); }),
    Report.choice("over prompts", ["mean", ...prompts], (i) => { state.prompt = i - 1; draw(); }),
    ...fixed.map((i) => Report.choice(axes[i].name, axes[i].labels, (k) => { state.at[i] = k; draw(); }, state.at[i])),
  );
  if (sizes[right] > 40) {
    controls.append(
      Report.number(`${axes[right].name} from`, 0, 0, sizes[right] - 1, (x) => { state.from = x; draw(); }),
      Report.number("to", sizes[right] - 1, 0, sizes[right] - 1, (x) => { state.to = x; draw(); }),
    );
  }
  if (values.p) body.append(Report.el("p", { class: "note" }, (upwards === undefined ? "Filled points" : "Dots") + ": p < 0.05 after correction."));
  Report.onWidth(chart.area, draw);
  // Everything as a table, for those who cannot see the chart.
  const columns = [...axes.map((a) => a.name), "effect", ...(values.low ? ["low", "high"] : []), ...(values.p ? ["p corrected"] : [])];
  const rows = () => d3.range(total).map((k) => [
    ...axes.map((a, i) => a.labels[Math.floor(k / strides[i]) % sizes[i]]),
    ...["mean", ...(values.low ? ["low", "high"] : []), ...(values.p ? ["p"] : [])].map((name) => values[name][k]),
  ]);
  body.append(Report.asTable(told.title, columns, rows));
};

Report.draw.lines = (body, told) => {
  const controls = Report.el("div", { class: "controls" });
  const legendBox = Report.el("div", { class: "legend-box" });
  body.append(controls, legendBox);
  const chart = Report.chart(body, told.title);
  const charts = told.charts.map((c) => ({ ...c, lines: c.lines.map((line) => ({
    name: line.name, y: Report.numbers(line.y), low: Report.numbers(line.low), high: Report.numbers(line.high) })) }));
  let chosen = 0;
  const draw = () => {
    const { name, lines, logarithmic } = charts[chosen];
    const plot = Report.lines({
      labels: told.x.labels, lines, label: name, logarithmic, axis: told.x.name, ordered: told.x.ordered,
      width: Math.min(900, chart.area.clientWidth || 700),
      say: (line, i) => `${line.name} ${Report.interval(line.y[i], line.low?.[i], line.high?.[i])}`,
    });
    legendBox.replaceChildren(...(plot.legend ? [plot.legend] : []));
    chart.put(plot);
  };
  controls.append(Report.choice("shown", charts.map((c) => c.name), (i) => { chosen = i; draw(); }));
  Report.onWidth(chart.area, draw);
  const rows = () => charts.flatMap((c) => c.lines.flatMap((line) => told.x.labels.map((label, i) =>
    [c.name, line.name, label, line.y[i], line.low?.[i] ?? NaN, line.high?.[i] ?? NaN])));
  body.append(Report.asTable(told.title, ["shown", "line", told.x.name, "value", "low", "high"], rows));
};

// Bars from where the last one ended: the largest parts, the rest in one, and the total.
Report.draw.waterfall = (body, told) => {
  const shares = Report.numbers(told.shares), low = Report.numbers(told.low), high = Report.numbers(told.high);
  const n = told.parts.length, counts = [12, 24, 48].filter((c, i) => i === 0 || c < n * 2);
  const state = { prompt: -1, most: counts[0] };
  const value = (i) => (state.prompt >= 0 ? shares[state.prompt * n + i] : d3.mean(told.prompts, (_, k) => shares[k * n + i]));
  const controls = Report.el("div", { class: "controls" });
  body.append(controls);
  const chart = Report.chart(body, told.title);
  const draw = () => {
    const all = told.parts.map((name, i) => ({ name, v: value(i), i }));
    const order = d3.sort(all, (a) => -Math.abs(a.v));
    const kept = new Set(order.slice(0, state.most).map((a) => a.i));
    const bars = all.filter((a) => kept.has(a.i));
    const rest = all.filter((a) => !kept.has(a.i));
    if (rest.length) bars.push({ name: `${rest.length} others`, v: d3.sum(rest, (a) => a.v), i: -1 });
    let sum = 0;
    bars.forEach((bar) => { bar.start = sum; sum += bar.v || 0; bar.end = sum; }); // NaN: not measured
    bars.push({ name: "total", v: sum, start: 0, end: sum, i: -2 });
    const colour = (bar) => (bar.i === -2 ? "var(--soft)" : bar.v < 0 ? Report.DOWN : Report.UP);
    const marginLeft = 30 + 6.4 * Math.min(16, d3.max(bars, (b) => b.name.length));
    const svg = Plot.plot({
      width: Math.min(900, chart.area.clientWidth || 700), height: 21 * bars.length + 60,
      marginLeft, marginTop: 10, marginBottom: 42,
      x: { label: told.unit, labelArrow: "none", labelAnchor: "center", grid: true },
      y: { type: "band", domain: d3.range(bars.length), padding: 0.2, label: null, tickFormat: (i) => Report.short(bars[i].name, 16), tickSize: 0 },
      marks: [
        Plot.barX(bars, { y: (_, i) => i, x1: "start", x2: "end", fill: colour }),
        Plot.link(bars.slice(0, -1), { x1: "end", x2: "end", y1: (_, i) => i, y2: (_, i) => i + 1, stroke: "var(--soft)", strokeWidth: 0.7 }),
        ...(state.prompt < 0 ? [Plot.ruleY(bars.map((b, k) => ({ ...b, k })).filter((b) => b.i >= 0 && Number.isFinite(low[b.i])), { y: "k", x1: (b) => b.start + low[b.i], x2: (b) => b.start + high[b.i], stroke: "currentColor", strokeWidth: 1.4 })] : []),
        Plot.ruleX([0], { stroke: "var(--soft)" }),
      ],
    });
    const sy = svg.scale("y"), width = Number(svg.getAttribute("width"));
    chart.put({
      svg, columns: 1, rows: bars.length, downwards: true,
      place: (_, row) => ({ x: marginLeft, y: sy.apply(row) - 2, width: width - marginLeft - 20, height: sy.bandwidth + 4 }),
      find: (_, y) => {
        const row = Math.floor((y - sy.apply(0)) / sy.step);
        return row >= 0 && row < bars.length ? { column: 0, row } : null;
      },
      say: (_, row) => {
        const bar = bars[row];
        const inside = bar.i >= 0 && state.prompt < 0 ? [low[bar.i], high[bar.i]] : [];
        return `${bar.name}: ${Report.interval(bar.v, ...inside)}`;
      },
    });
  };
  controls.append(
    Report.choice("over prompts", told.prompts.length > 1 ? ["mean", ...told.prompts] : ["mean"], (i) => { state.prompt = i - 1; draw(); }),
    Report.choice("parts", counts.map((c) => `the ${c} largest`), (i) => { state.most = counts[i]; draw(); }),
  );
  Report.onWidth(chart.area, draw);
  const rows = () => told.parts.map((name, i) => [name, d3.mean(told.prompts, (_, k) => shares[k * n + i]), low[i], high[i]]);
  body.append(Report.asTable(told.title, ["part", "mean", "low", "high"], rows));
};
