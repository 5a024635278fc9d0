"use strict";
// What all panels share: elements, numbers, choices, a chart with a cursor, and the start.
// Text from results is only ever set as text, never as markup.
const Report = { draw: {} };

Report.el = (name, attributes = {}, ...children) => {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
};

// Numbers come as base64 of little-endian arrays.
Report.numbers = (packed) => {
  if (!packed) return null;
  const bytes = Report.bytes(packed.float32 ?? packed.int32);
  return packed.float32 !== undefined ? new Float32Array(bytes.buffer) : new Int32Array(bytes.buffer);
};
Report.bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
Report.inflate = async (text) => {
  const stream = new Blob([Report.bytes(text)]).stream();
  const whole = new Response(stream.pipeThrough(new DecompressionStream("deflate")));
  return new Uint8Array(await whole.arrayBuffer());
};

Report.show = (value) => {
  if (value === null || value === undefined || Number.isNaN(value)) return "not measured";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size >= 0.01 && size < 1e5 ? value.toPrecision(3) : value.toExponential(1);
};
Report.showP = (p) => (p < 0.001 ? "p < 0.001" : `p = ${p.toFixed(3)}`);

// A labelled <select>; calls change(index) and is left out where there is nothing to choose.
Report.choice = (name, labels, change, chosen = 0) => {
  const select = Report.el("select", { onchange: () => change(select.selectedIndex) });
  labels.forEach((label) => select.append(Report.el("option", {}, label)));
  select.selectedIndex = chosen;
  const label = Report.el("label", {}, `${name} `, select);
  label.hidden = labels.length < 2;
  return label;
};

Report.number = (name, value, low, high, change) => {
  const input = Report.el("input", { type: "number", value, min: low, max: high });
  input.addEventListener("change", () => {
    const asked = Math.round(Number(input.value));
    input.value = Math.min(high, Math.max(low, Number.isFinite(asked) ? asked : value));
    change(Number(input.value));
  });
  return Report.el("label", {}, `${name} `, input);
};

// At most `most` of the places 0..n-1, evenly thinned.
Report.thinned = (n, most) => {
  const step = Math.max(1, Math.ceil(n / Math.max(1, most)));
  return Array.from({ length: Math.ceil(n / step) }, (_, i) => i * step);
};
Report.short = (label, most = 14) => {
  const letters = Array.from(label);
  return letters.length > most ? letters.slice(0, most - 1).join("") + "…" : label;
};

// A chart of cells (columns by rows; one row for a line) with a cursor: the pointer or the
// arrow keys move it, and what stands there is written below and read out.
Report.chart = (body, described) => {
  const area = Report.el("div", {
    class: "chart",
    tabindex: 0,
    role: "group",
    "aria-roledescription": "chart",
    "aria-label": `${described}. Arrow keys move from number to number.`,
  });
  const readout = Report.el("output", { class: "readout", "aria-live": "polite" });
  readout.textContent = "Point at the chart, or move through it with the arrow keys.";
  body.append(area, readout);
  let now = null;
  let at = { column: 0, row: 0 };
  const point = (column, row) => {
    at = { column, row };
    readout.textContent = now.say(column, row);
    const box = now.place(column, row);
    const mark = d3.select(now.svg).selectAll("rect.cursor").data([box]);
    mark.join("rect").attr("class", "cursor").attr("x", (b) => b.x).attr("y", (b) => b.y)
      .attr("width", (b) => b.width).attr("height", (b) => b.height);
  };
  area.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!move || !now) return;
    event.preventDefault();
    const up = now.downwards ? -1 : 1;
    const within = (x, n) => Math.min(n - 1, Math.max(0, x));
    point(within(at.column + move[0], now.columns), within(at.row + up * move[1], now.rows));
  });
  return {
    area,
    // plot: {svg, columns, rows, place(column, row), find(x, y), say(column, row)}
    put(plot) {
      now = plot;
      at = { column: Math.min(at.column, plot.columns - 1), row: Math.min(at.row, plot.rows - 1) };
      const drawn = plot.svg;
      now.svg = drawn.tagName.toLowerCase() === "svg" ? drawn : drawn.querySelector("svg:last-of-type");
      now.svg.setAttribute("aria-hidden", "true");
      now.svg.addEventListener("pointermove", (event) => {
        const found = now.find(...d3.pointer(event, now.svg));
        if (found) point(found.column, found.row);
      });
      area.replaceChildren(drawn);
    },
  };
};

// Draws again when the width changes.
Report.onWidth = (node, draw) => {
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(node.clientWidth - width) < 8) return;
    width = node.clientWidth;
    draw();
  }).observe(node);
};

Report.start = () => {
  const drawn = new Set();
  const begin = (panel) => {
    if (drawn.has(panel)) return;
    drawn.add(panel);
    const told = JSON.parse(document.getElementById(panel.dataset.panel).textContent);
    Report.draw[told.kind](panel.querySelector(".body"), told);
    panel.dataset.drawn = "";
  };
  const panels = document.querySelectorAll("[data-panel]");
  const seen = new IntersectionObserver(
    (entries) => entries.filter((e) => e.isIntersecting).forEach((e) => begin(e.target)),
    { rootMargin: "600px" },
  );
  panels.forEach((panel) => seen.observe(panel));
  window.addEventListener("beforeprint", () => panels.forEach(begin));

  const button = document.getElementById("theme");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const set = (on) => {
    document.documentElement.dataset.theme = on ? "dark" : "light";
    button.setAttribute("aria-pressed", String(on));
  };
  set(dark.matches);
  dark.addEventListener("change", (event) => set(event.matches));
  button.addEventListener("click", () => set(document.documentElement.dataset.theme !== "dark"));
};
document.addEventListener("DOMContentLoaded", Report.start);
