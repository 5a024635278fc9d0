"use strict";
// Tables: click a heading to sort, type to filter; long ones show their beginning first.
Report.SHOWN = 12;

Report.table = (title, columns, rows) => {
  const state = { by: -1, down: true, words: "", most: Report.SHOWN };
  const numeric = columns.map((_, i) => rows.some((row) => typeof row[i] === "number"));
  const head = Report.el("tr");
  const content = Report.el("tbody");
  const count = Report.el("p", { class: "soft", "aria-live": "polite" });
  const more = Report.el("button", { type: "button", onclick: () => { state.most = Infinity; draw(); } }, "Show all rows");
  const headings = columns.map((name, i) => {
    const arrow = Report.el("span", { "aria-hidden": "true" });
    const button = Report.el("button", { type: "button", onclick: () => {
      state.down = state.by === i ? !state.down : numeric[i];
      state.by = i;
      draw();
    } }, `${name} `, arrow);
    const heading = Report.el("th", { scope: "col", class: numeric[i] ? "number" : null }, button);
    head.append(heading);
    return { heading, arrow };
  });
  // What is missing goes last, whichever way the rest is sorted.
  const gone = (v) => v === null || v === undefined || Number.isNaN(v);
  const compare = (a, b) => {
    const x = a[state.by], y = b[state.by];
    if (gone(x) || gone(y)) return gone(x) - gone(y);
    return (state.down ? -1 : 1) * (numeric[state.by] ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true }));
  };
  const draw = () => {
    const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (row) => row.map((v) => Report.cellText(v)).join(" ").toLowerCase();
    let found = words.length ? rows.filter((row) => { const all = text(row); return words.every((w) => all.includes(w)); }) : rows;
    if (state.by >= 0) found = [...found].sort(compare);
    const shown = found.slice(0, state.most);
    content.replaceChildren(...shown.map((row) => Report.el("tr", {}, ...row.map((v, i) =>
      Report.el("td", { class: numeric[i] ? "number" : null, title: typeof v === "number" ? String(v) : null }, Report.el("bdi", {}, Report.cellText(v)))))));
    headings.forEach(({ heading, arrow }, i) => {
      heading.setAttribute("aria-sort", state.by !== i ? "none" : state.down ? "descending" : "ascending");
      arrow.textContent = state.by !== i ? "" : state.down ? "▾" : "▴";
    });
    count.textContent = `${shown.length} of ${rows.length} rows` + (found.length < rows.length ? `, ${found.length} match` : "");
    more.hidden = shown.length === found.length;
  };
  const filter = Report.el("input", { type: "search", placeholder: "words or numbers", oninput: () => { state.words = filter.value; draw(); } });
  draw();
  return Report.el("div", { class: "table" },
    Report.el("div", { class: "controls" }, Report.el("label", {}, "filter ", filter)),
    Report.el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title },
      Report.el("table", {}, Report.el("caption", { class: "unseen" }, title), Report.el("thead", {}, head), content)),
    count, more);
};
Report.cellText = (v) => (v === null || v === undefined || Number.isNaN(v) ? "–" : typeof v === "boolean" ? (v ? "yes" : "no") : Report.show(v));

// The numbers of a chart, made into a table when it is opened.
Report.asTable = (title, columns, rows) => {
  const details = Report.el("details", {}, Report.el("summary", {}, "These numbers as a table"));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(Report.table(title, columns, rows()));
  });
  return details;
};

Report.draw.table = (body, told) => body.append(Report.table(told.title, told.columns, told.rows));
