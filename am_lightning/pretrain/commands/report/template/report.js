"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const hidden = new Set();
  const TOP = 8; // margins of a plot; the steps are BELOW it
  const RIGHT = 20;
  const BELOW = 26;
  const lastStep = Math.max(1, ...data.charts.flatMap((c) => c.series.flatMap((s) => s.steps.slice(-1))));
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

  function make(name, attributes, parent, text = "") {
    const made = document.createElementNS(name === "svg" ? "http://www.w3.org/2000/svg" : parent.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    parent.append(made);
    return made;
  }

  function number(value, large = (v) => Math.round(v).toLocaleString("en")) {
    if (value == null) return "–"; // also for a curve without points
    const size = Math.abs(value);
    if (size >= 10000) return large(value);
    return String(size && size < 0.001 ? Number(value.toPrecision(3)).toExponential() : Number(value.toPrecision(4)));
  }

  const short = (value) => number(value, compact.format);

  // Round numbers, about `count` of them, that cover low ... high.
  function ticks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  }

  // Ticks for perplexities, which are at least 1.
  function logTicks(low, high) {
    const powers = Array.from({ length: Math.ceil(Math.log10(high)) }, (_, i) => 10 ** i);
    const found = powers.flatMap((power) => [1, 2, 3, 5, 7].map((m) => m * power)).filter((v) => v >= low && v <= high);
    if (found.length < 3) return ticks(low, high, 4);
    const first = Number((low * 1.05).toPrecision(2)); // the end of the curve, if the first round number is far above it
    return Math.log(found[0] / first) > 0.1 * Math.log(high / low) ? [first, ...found] : found;
  }

  // Index of the last step that is not after `step`, or 0.
  const at = (steps, step) => Math.max(0, steps.findLastIndex((s) => s <= step));

  // A single run shows its validations in the second colour.
  const look = (s) => (data.runs.length === 1 && s.style === "dots" ? 1 : s.run);

  function showTip(x, y, title, rows) {
    tip.textContent = title;
    for (const [run, label, value] of rows) {
      const row = make("div", {}, tip);
      if (run !== null) make("span", { class: "key", "data-run": run }, row);
      row.append(label);
      make("b", {}, row, value);
    }
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = x + 16 + width > window.innerWidth ? x - width - 16 : x + 16;
    tip.style.left = `${Math.max(4, Math.min(left, window.innerWidth - width - 4))}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 14, window.innerHeight - height - 4))}px`;
  }

  function leave() {
    tip.hidden = true;
    document.querySelector(".cursor")?.remove();
  }

  // An empty chart with its axis of steps. Pointer, touch and arrow keys show `inspect(step, y)`: a title, and rows.
  function stage(plot, left, height, label, inspect) {
    const inner = plot.clientWidth - left - RIGHT;
    plot.replaceChildren();
    const svg = make("svg", { height: TOP + height + BELOW, role: "img", tabindex: 0, "aria-label": label }, plot);
    const x = (step) => left + (step / lastStep) * inner;
    for (const step of ticks(0, lastStep, Math.max(4, Math.floor(inner / 75))).filter(Number.isInteger)) {
      make("text", { x: x(step), y: TOP + height + BELOW - 6, "text-anchor": "middle" }, svg, short(step));
    }
    let step = 0;
    const show = (to, y = null) => {
      step = Math.round(Math.max(0, Math.min(lastStep, to)));
      leave();
      make("line", { class: "cursor", x1: x(step), x2: x(step), y1: TOP, y2: TOP + height }, svg);
      const box = svg.getBoundingClientRect();
      showTip(box.left + x(step), box.top + (y ?? 20), ...inspect(step, y));
    };
    const move = (event) => {
      const box = svg.getBoundingClientRect();
      show(((event.clientX - box.left - left) / inner) * lastStep, event.clientY - box.top);
    };
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerdown", move);
    svg.addEventListener("pointerleave", (event) => event.pointerType === "touch" || leave()); // the values of a tap stay
    svg.addEventListener("blur", () => svg.querySelector(".cursor") && leave()); // but keep what a tap elsewhere has shown
    svg.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      show(step + by * Math.max(1, Math.round(lastStep / 100)));
    });
    return { svg, x, right: left + inner };
  }

  function limits(chart, series) {
    const values = series.flatMap((s) => [...s.values, ...(s.upper ?? [])]).filter((v) => v !== null && (!chart.log || v > 0));
    const low = Math.min(chart.floor ?? Infinity, ...values);
    let high = Math.max(chart.reach ?? -Infinity, ...values);
    if (chart.top !== null && chart.top > low) high = Math.min(high, chart.top);
    if (chart.log) return [low / 1.03, high * 1.03];
    const room = (high - low) * 0.04 || Math.abs(high) * 0.1 || 1;
    return [low === chart.floor ? low : low - room, high + room];
  }

  function describe(chart) {
    const ends = chart.series.filter((s) => !["raw", "band"].includes(s.style));
    return `${chart.title}, ${chart.unit}, over ${number(lastStep)} steps. Last values: ` +
      ends.map((s) => `${data.runs[s.run]} ${s.label} ${number(s.values.at(-1))}`).join("; ");
  }

  function drawChart(plot, chart) {
    const height = chart.id === "loss" ? Math.min(346, Math.max(206, plot.clientWidth * 0.4 - 34)) : 186;
    const left = 52;
    const series = chart.series.filter((s) => !hidden.has(s.run));
    const { svg, x, right } = stage(plot, left, height, describe(chart), (step) => [
      `step ${number(step)}`,
      series.filter((s) => s.style !== "raw").map((s) => {
        const i = at(s.steps, step);
        const where = s.style === "dots" ? ` at ${number(s.steps[i])}` : "";
        const value = number(s.values[i]) + (s.style === "band" ? ` to ${number(s.upper[i])}` : "");
        return [look(s), `${data.runs[s.run]} ${s.label}${where}`, value];
      }),
    ]);
    if (!series.length) return make("text", { x: right / 2, y: height / 2, "text-anchor": "middle" }, svg, "all runs are hidden");
    const scale = chart.log ? Math.log : (v) => v;
    const [low, high] = limits(chart, series);
    const y = (value) => TOP + height * (1 - (scale(value) - scale(low)) / (scale(high) - scale(low)));
    const rule = (height, kind) => make("line", { class: kind, x1: left, x2: right, y1: height, y2: height }, svg);
    for (const value of chart.log ? logTicks(low, high) : ticks(low, high, 5)) {
      rule(y(value), "grid");
      make("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, svg, short(value));
    }
    rule(TOP + height, "axis");
    if (chart.reach !== null) rule(y(chart.reach), "cap");
    for (const s of series) {
      const points = (values) => s.steps.map((step, i) => values[i] !== null && `${x(step).toFixed(1)} ${y(values[i]).toFixed(1)}`);
      const line = points(s.values);
      const d = s.style === "band" ? `M${[...line, ...points(s.upper).reverse()].filter(Boolean).join("L")}Z`
        : line.map((point, i) => (point ? (line[i - 1] ? "L" : "M") + point : "")).join("");
      make("path", { class: s.style, d, "data-run": look(s) }, svg);
      if (s.style !== "dots") continue;
      for (const point of line.filter(Boolean)) {
        const [cx, cy] = point.split(" ");
        make("circle", { cx, cy, r: 3.5, "data-run": look(s) }, svg);
      }
    }
  }

  function drawHeatmap(plot, map) {
    const row = map.rows.length > 20 ? 13 : 20;
    const left = Math.min(plot.clientWidth * 0.3, Math.max(...map.rows.map((name) => name.length)) * 7.2 + 12);
    const lowest = Math.min(...map.values.flat().filter((v) => v !== null));
    const label = `Momentum of ${data.runs[map.run]} by layer, over ${number(lastStep)} steps; lowest ${number(lowest)}, scale up to ${map.top}`;
    const { svg, x } = stage(plot, left, row * map.rows.length, label, (step, y) => {
      const j = Math.min(map.edges.length - 2, at(map.edges, step - 1));
      const [first, last] = [map.edges[j] + 1, map.edges[j + 1]];
      const title = (first < last ? `steps ${number(first)} to ${number(last)}` : `step ${number(last)}`) + (map.width > 1 ? ", lowest" : "");
      const rows = map.rows.map((name, i) => [null, name, number(map.values[i][j])]);
      const only = y === null ? undefined : rows[Math.floor((y - TOP) / row)];
      return [title, rows.length > 12 && only ? [only] : rows.slice(0, 24)];
    });
    const letters = Math.floor((left - 10) / 6.4);
    const cells = data.shades.map(() => "");
    map.rows.forEach((name, i) => {
      make("text", { x: left - 6, y: TOP + i * row + row / 2 + 4, "text-anchor": "end" }, svg,
        name.length > letters ? `…${name.slice(1 - letters)}` : name);
      map.values[i].forEach((value, j) => {
        if (value === null) return;
        const shade = Math.min(cells.length - 1, Math.floor((value / (map.top || 1)) * cells.length));
        cells[shade] += `M${x(map.edges[j]).toFixed(1)} ${TOP + i * row}V${TOP + (i + 1) * row - 1}H${x(map.edges[j + 1]).toFixed(1)}v${1 - row}z`;
      });
    });
    cells.forEach((d, i) => d && make("path", { class: "cells", d, style: `fill: ${data.shades[i]}` }, svg));
  }

  function redraw() {
    leave();
    document.querySelectorAll("#charts .plot").forEach((plot, i) => drawChart(plot, data.charts[i]));
    document.querySelectorAll("#heatmaps .chart").forEach((figure, i) => {
      figure.hidden = hidden.has(data.heatmaps[i].run);
      const plot = figure.querySelector(".plot"); // none if the run has its own picture
      if (plot && !figure.hidden) drawHeatmap(plot, data.heatmaps[i]);
    });
  }

  const legend = document.getElementById("legend");
  legend.hidden = data.runs.length < 2;
  legend.querySelectorAll("button").forEach((button, run) => button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(hidden.delete(run) || !hidden.add(run)));
    redraw();
  }));
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone hides its address bar
    width = window.innerWidth;
    redraw();
  });
  window.addEventListener("scroll", leave, { passive: true });
  redraw();
})();
