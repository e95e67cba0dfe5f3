"use strict";
// Shows the values of charts, under a pointer or by arrow keys. Without it, the pictures and tables of the page remain.

function size(chart) {
  return chart.kind === "heat" ? [chart.values[0].length, chart.values.length] : [chart.labels.length, 1];
}

// Return the column and row at a place in the picture, of which x and y are 0 to 1.
function at(chart, x, y) {
  const [columns, rows] = size(chart);
  const points = chart.kind === "lines" ? Math.round(x * (columns - 1)) : Math.floor(x * columns);
  return [Math.min(Math.max(points, 0), columns - 1), Math.min(Math.max(Math.floor(y * rows), 0), rows - 1)];
}

// Return where a column and a row are.
function place(chart, [column, row]) {
  const [columns, rows] = size(chart);
  const x = chart.kind === "lines" ? column / Math.max(columns - 1, 1) : (column + 0.5) / columns;
  return [x, chart.kind === "heat" ? (row + 0.5) / rows : 0.5];
}

function describe(chart, [column, row]) {
  if (chart.kind === "heat")
    return `${chart.rows} ${row}, ${chart.columns} ${column}: ${chart.values[row][column]} ${chart.unit}`;
  const known = Object.entries(chart.series).map(([name, values]) => `${name} ${values[column] ?? "not known"}`);
  return `${chart.columns} ${chart.labels[column]}: ${known.join("; ")}`;
}

function moved(chart, [column, row], key) {
  const [columns, rows] = size(chart);
  const far = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  if (key === "Home") return [0, row];
  if (key === "End") return [columns - 1, row];
  if (!far) return null;
  return [Math.min(Math.max(column + far[0], 0), columns - 1), Math.min(Math.max(row + far[1], 0), rows - 1)];
}

function watch(plot, chart) {
  const value = document.createElement("output");
  let cursor = [0, 0];
  value.className = "value";
  plot.append(value);
  function show(where) {
    cursor = where;
    value.textContent = describe(chart, cursor);
    const [x, y] = place(chart, cursor);
    const left = x * plot.clientWidth + (x < 0.5 ? 12 : -12 - value.offsetWidth);
    value.style.left = `${Math.max(Math.min(left, plot.clientWidth - value.offsetWidth), 0)}px`;
    value.style.top = `${Math.max(y * plot.clientHeight - 36, 0)}px`;
  }
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(at(chart, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height));
  });
  plot.addEventListener("focus", () => show(cursor));
  for (const name of ["pointerleave", "blur"]) plot.addEventListener(name, () => (value.textContent = ""));
  plot.addEventListener("keydown", (event) => {
    const next = event.key === "Escape" ? null : moved(chart, cursor, event.key);
    if (next) event.preventDefault(), show(next);
    else if (event.key === "Escape") value.textContent = "";
  });
}

if (typeof document === "object") {
  const charts = JSON.parse(document.getElementById("data").textContent);
  for (const plot of document.querySelectorAll("[data-chart]")) watch(plot, charts[plot.dataset.chart]);
}
