"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const SVG = "http://www.w3.org/2000/svg";
  const DASHES = ["", "7 3", "2 2"];
  const COLOURS = 8;
  const hidden = new Set();
  const redraws = [];

  const colour = (run) => `var(--run-${run % COLOURS})`;
  const dash = (run) => DASHES[Math.floor(run / COLOURS) % DASHES.length];

  function element(name, attributes = {}, parent = null, text = null) {
    const svg = ["svg", "path", "line", "text", "g", "circle", "rect", "clipPath"].includes(name);
    const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }

  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size >= 10000) return Math.round(value).toLocaleString("en");
    if (size < 0.001) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  }

  function short(value) {
    const size = Math.abs(value);
    if (size >= 1e9) return `${Number((value / 1e9).toPrecision(3))}G`;
    if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
    if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
    if (size > 0 && size < 0.001) return Number(value.toPrecision(2)).toExponential();
    return String(Number(value.toPrecision(3)));
  }

  // Round numbers, about `count` of them, that cover low ... high.
  function ticks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  }

  function logTicks(low, high) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const m of [1, 2, 3, 5, 7]) {
        const value = m * 10 ** power;
        if (value >= low && value <= high) found.push(value);
      }
    }
    return found.length >= 3 ? found : ticks(low, high, 4);
  }

  // Index of the last step that is not after `step`; the first one before all.
  function at(steps, step) {
    let low = 0;
    let high = steps.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle - 1;
    }
    return low;
  }

  function showTip(event, title, rows) {
    tip.replaceChildren(element("div", {}, null, title));
    for (const [run, label, value] of rows) {
      const row = element("div", {}, tip);
      if (run !== null) row.append(key(run));
      row.append(label);
      element("b", {}, row, value);
    }
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 16 + box.width > window.innerWidth ? event.clientX - box.width - 16 : event.clientX + 16;
    tip.style.left = `${Math.max(4, Math.min(left, window.innerWidth - box.width - 4))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, window.innerHeight - box.height - 4))}px`;
  }

  function key(run) {
    const made = element("span", { class: "key" });
    made.style.borderTopColor = colour(run);
    made.style.borderTopStyle = ["solid", "dashed", "dotted"][Math.floor(run / COLOURS) % 3];
    return made;
  }

  // Pointer, touch and arrow keys over a plot: `inspect(event, step)` shows what is there.
  function listen(svg, frame, inspect, leave) {
    let step = null;
    const toStep = (x) => frame.first + ((x - frame.left) / frame.width) * (frame.last - frame.first);
    const move = (event) => {
      const box = svg.getBoundingClientRect();
      step = Math.round(Math.max(frame.first, Math.min(frame.last, toStep(event.clientX - box.left))));
      inspect(event, step, event.clientY - box.top);
    };
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerdown", move);
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const jump = Math.max(1, Math.round((frame.last - frame.first) / 100));
      step = Math.max(frame.first, Math.min(frame.last, (step ?? frame.first) + by * jump));
      const box = svg.getBoundingClientRect();
      const x = frame.left + ((step - frame.first) / (frame.last - frame.first)) * frame.width;
      inspect({ clientX: box.left + x, clientY: box.top + 20 }, step, null);
    });
  }

  const lastStep = Math.max(1, ...data.charts.flatMap((c) => c.series.flatMap((s) => s.steps.slice(-1))));

  function stepAxis(svg, frame, height) {
    const many = Math.max(4, Math.floor(frame.width / 75));
    for (const step of ticks(frame.first, frame.last, many).filter(Number.isInteger)) {
      const x = frame.left + ((step - frame.first) / (frame.last - frame.first)) * frame.width;
      element("text", { x, y: height - 6, "text-anchor": "middle" }, svg, short(step));
    }
  }

  function limits(chart, series) {
    const values = series.flatMap((s) => s.values).filter((v) => v !== null && (!chart.log || v > 0));
    let low = Math.min(...values);
    let high = Math.max(...values);
    if (chart.top !== null && chart.top > low) high = Math.min(high, chart.top);
    if (chart.floor !== null) low = Math.min(low, chart.floor);
    if (chart.reach !== null) high = Math.max(high, chart.reach);
    if (chart.log) return [low / 1.03, high * 1.03];
    if (high === low) return [low - (low ? Math.abs(low) * 0.1 : 0), high + (high ? Math.abs(high) * 0.1 : 1)];
    const room = (high - low) * 0.04;
    return [chart.floor !== null && low >= chart.floor ? low : low - room, high + room];
  }

  function describe(chart) {
    const ends = chart.series.filter((s) => s.style !== "raw" && s.style !== "band" && !(s.style === "mean" && chart.series.some((o) => o.run === s.run && o.style === "dots")));
    return `${chart.title}, ${chart.unit}, over ${number(lastStep)} steps. Last values: ` +
      ends.map((s) => `${data.runs[s.run]} ${s.label} ${number(s.values[s.values.length - 1])}`).join("; ");
  }

  function drawChart(plot, chart) {
    const width = plot.clientWidth;
    const height = chart.id === "loss" ? Math.min(380, Math.max(240, width * 0.4)) : 220;
    const series = chart.series.filter((s) => !hidden.has(s.run));
    const frame = { left: 52, top: 8, width: width - 52 - 12, height: height - 8 - 26, first: 0, last: lastStep };
    const svg = element("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": describe(chart) });
    plot.replaceChildren(svg);
    if (!series.length) {
      element("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, svg, "all runs are hidden");
      return;
    }
    const [low, high] = limits(chart, series);
    const scale = chart.log ? Math.log : (v) => v;
    const x = (step) => frame.left + (step / frame.last) * frame.width;
    const y = (value) => frame.top + frame.height * (1 - (scale(value) - scale(low)) / (scale(high) - scale(low)));
    for (const value of chart.log ? logTicks(low, high) : ticks(low, high, 5)) {
      element("line", { class: "grid", x1: frame.left, x2: frame.left + frame.width, y1: y(value), y2: y(value) }, svg);
      element("text", { x: frame.left - 6, y: y(value) + 4, "text-anchor": "end" }, svg, short(value));
    }
    element("line", { class: "axis", x1: frame.left, x2: frame.left + frame.width, y1: frame.top + frame.height, y2: frame.top + frame.height }, svg);
    stepAxis(svg, frame, height);
    const clip = `clip-${chart.id}`;
    element("rect", { x: frame.left, y: 0, width: frame.width + 8, height: frame.top + frame.height + 6 }, element("clipPath", { id: clip }, svg));
    const curves = element("g", { "clip-path": `url(#${clip})` }, svg);
    if (chart.reach !== null) element("line", { class: "cap", x1: frame.left, x2: frame.left + frame.width, y1: y(chart.reach), y2: y(chart.reach) }, svg);
    for (const s of series) {
      if (s.style === "band") {
        const points = s.steps.map((step, i) => [x(step), s.values[i], s.upper[i]]).filter((p) => p[1] !== null && p[2] !== null);
        const edge = (column) => points.map((p) => `${p[0].toFixed(1)} ${y(p[column]).toFixed(1)}`);
        element("path", { class: "band", d: `M${edge(1).concat(edge(2).reverse()).join("L")}Z`, style: `fill: ${colour(s.run)}` }, curves);
        continue;
      }
      const behind = s.style === "mean" && series.some((o) => o.run === s.run && o.style === "dots") && data.runs.length > 1;
      let path = "";
      let pen = "M";
      s.steps.forEach((step, i) => {
        if (s.values[i] === null) { pen = "M"; return; }
        path += `${pen}${x(step).toFixed(1)} ${y(s.values[i]).toFixed(1)}`;
        pen = "L";
      });
      const look = { class: s.style + (behind ? " faded" : ""), d: path, style: `stroke: ${lineColour(chart, s)}` };
      if (dash(s.run)) look["stroke-dasharray"] = dash(s.run);
      element("path", look, curves);
      if (s.style === "dots") {
        s.steps.forEach((step, i) => s.values[i] === null ||
          element("circle", { cx: x(step), cy: y(s.values[i]), r: 3.5, style: `fill: ${lineColour(chart, s)}` }, curves));
      }
    }
    const cursor = element("line", { class: "cursor", y1: frame.top, y2: frame.top + frame.height, visibility: "hidden" }, svg);
    listen(svg, frame, (event, step) => {
      cursor.setAttribute("x1", x(step));
      cursor.setAttribute("x2", x(step));
      cursor.setAttribute("visibility", "visible");
      showTip(event, `step ${number(step)}`, series.filter((s) => s.style !== "raw").map((s) => {
        const i = at(s.steps, step);
        const where = s.style === "dots" ? ` at ${number(s.steps[i])}` : "";
        const value = s.style === "band" ? `${number(s.values[i])} to ${number(s.upper[i])}` : number(s.values[i]);
        return [s.run, `${data.runs[s.run]} ${s.label}${where}`, value];
      }));
    }, () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); });
  }

  // A run that is alone has its validations in a colour of their own.
  function lineColour(chart, series) {
    return data.runs.length === 1 && series.style === "dots" ? "var(--run-1)" : colour(series.run);
  }

  function drawHeatmap(plot, map) {
    const width = plot.clientWidth;
    const row = map.rows.length > 20 ? 13 : 20;
    const widest = Math.max(...map.rows.map((name) => name.length));
    const left = Math.min(width * 0.3, widest * 7.2 + 12);
    const frame = { left, top: 4, width: width - left - 12, height: row * map.rows.length, first: 0, last: lastStep };
    const height = frame.top + frame.height + 26;
    const x = (step) => frame.left + (step / lastStep) * frame.width;
    const lowest = Math.min(...map.values.flat().filter((v) => v !== null));
    const label = `Momentum of ${data.runs[map.run]} by layer, over ${number(lastStep)} steps; lowest ${number(lowest)}, scale up to ${map.top}`;
    const canvas = element("canvas");
    const ratio = window.devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const paint = canvas.getContext("2d");
    paint.scale(ratio, ratio);
    map.values.forEach((values, i) => values.forEach((value, j) => {
      if (value === null) return;
      const shade = Math.min(data.shades.length - 1, Math.floor((value / (map.top || 1)) * data.shades.length));
      paint.fillStyle = data.shades[shade];
      paint.fillRect(x(map.edges[j]), frame.top + i * row, x(map.edges[j + 1]) - x(map.edges[j]) + 0.3, row - 1);
    }));
    const svg = element("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": label });
    plot.replaceChildren(canvas, svg);
    const letters = Math.floor((left - 10) / 6.4);
    map.rows.forEach((name, i) => element("text", { x: left - 6, y: frame.top + i * row + row / 2 + 4, "text-anchor": "end" }, svg,
      name.length > letters ? `…${name.slice(1 - letters)}` : name));
    stepAxis(svg, frame, height);
    listen(svg, frame, (event, step, where) => {
      const j = Math.max(0, Math.min(map.edges.length - 2, at(map.edges, step - 1)));
      const steps = map.width > 1 ? `steps ${number(map.edges[j] + 1)} to ${number(map.edges[j + 1])}, lowest` : `step ${number(map.edges[j + 1])}`;
      const only = where === null ? -1 : Math.floor((where - frame.top) / row);
      const rows = map.rows.map((name, i) => [null, name, number(map.values[i][j])]);
      showTip(event, steps, rows.length > 12 && rows[only] ? [rows[only]] : rows.slice(0, 24));
    }, () => { tip.hidden = true; });
  }

  function card(parent, title, unit, wide) {
    const figure = element("figure", { class: wide ? "chart wide" : "chart" }, parent);
    const head = element("figcaption", { class: "head" }, figure);
    element("h3", {}, head, title);
    element("span", {}, head, unit);
    return figure;
  }

  const charts = document.getElementById("charts");
  for (const chart of data.charts) {
    const figure = card(charts, chart.title, chart.unit, chart.id === "loss");
    if (chart.id === "loss") {
      const alone = data.runs.length === 1;
      element("div", { class: "styles" }, figure, `Dots: validation. ${alone ? "Thin: single training steps. " : ""}Without dots: training, running mean.` +
        (chart.top === null ? "" : " The first 5 % of the steps reach above the chart."));
    }
    const plot = element("div", { class: "plot" }, figure);
    redraws.push(() => drawChart(plot, chart));
  }
  const maps = document.getElementById("heatmaps");
  for (const map of data.heatmaps) {
    const figure = card(maps, data.runs[map.run], [map.by, map.width > 1 ? `${map.width} logged points in a column` : ""].filter(Boolean).join("; "), true);
    if (map.picture) {
      const alt = `Momentum of ${data.runs[map.run]}: layers from top to bottom, steps from left to right, as TensorBoard shows it`;
      element("img", { class: "layers", src: `data:image/png;base64,${map.picture}`, alt }, figure);
      redraws.push(() => { figure.hidden = hidden.has(map.run); });
      continue;
    }
    const scale = element("div", { class: "scale", "aria-hidden": "true" }, figure, "0");
    element("span", { class: "bar", style: `background: linear-gradient(to right, ${data.shades.join(", ")})` }, scale);
    scale.append(String(map.top));
    const plot = element("div", { class: "plot" }, figure);
    redraws.push(() => { figure.hidden = hidden.has(map.run); if (!figure.hidden) drawHeatmap(plot, map); });
  }

  const redraw = () => redraws.forEach((draw) => draw());
  const legend = document.getElementById("legend");
  data.runs.forEach((name, run) => {
    const button = element("button", { type: "button", "aria-pressed": "true" }, legend);
    button.append(key(run));
    element("span", {}, button, name);
    button.title = name;
    button.addEventListener("click", () => {
      if (hidden.has(run)) hidden.delete(run); else hidden.add(run);
      button.setAttribute("aria-pressed", String(!hidden.has(run)));
      redraw();
    });
  });
  legend.hidden = data.runs.length < 2;
  for (const place of document.querySelectorAll(".key[data-run]")) {
    const made = key(Number(place.dataset.run));
    place.style.cssText = made.style.cssText;
  }
  redraw();
  let last = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === last) return;
    last = window.innerWidth;
    redraw();
  });
  window.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
