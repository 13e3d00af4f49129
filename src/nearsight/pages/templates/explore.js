"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const H = data.image.height, W = data.image.width;
const MEAN = -1, ROLLOUT = -2;

function bytes(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let n = 0; n < raw.length; n++) out[n] = raw.charCodeAt(n);
  return out;
}
const floats = text => new Float32Array(bytes(text).buffer);
for (const layer of data.layers) {
  layer.weights = bytes(layer.weights);
  layer.largest = floats(layer.largest);
  for (const table of layer.tables) table.values = new Int8Array(bytes(table.values).buffer);
}
if (data.rollout) {
  data.rollout.weights = bytes(data.rollout.weights);
  data.rollout.largest = floats(data.rollout.largest);
}

// ------------------------------------------------------------------------------------------------------ the numbers

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const range = count => Array.from({length: count}, (_, n) => n);
const percent = share => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

/** The stored query of an axis whose own cell is nearest to the cell that covers a pixel. */
function nearest(cells, pixel, pixels, map) {
  const cell = Math.floor(pixel * map / pixels);
  let best = 0;
  cells.forEach((own, n) => { if (own <= cell || Math.abs(own - cell) < Math.abs(cells[best] - cell)) best = n; });
  return best > 0 && Math.abs(cells[best - 1] - cell) < Math.abs(cells[best] - cell) && cells[best] > cell ? best - 1 : best;
}

/** What a head looks at from a pixel: which cells of a map of what size, and the weight of each. */
function block(layer, head, y, x) {
  if (head === ROLLOUT) return rolled(layer, y, x);
  const [rows, columns] = layer.queries;
  const i = nearest(rows, y, H, layer.map[0]), j = nearest(columns, x, W, layer.map[1]);
  const count = layer.cells[0][0].length * layer.cells[1][0].length;
  const values = new Float32Array(count);
  const heads = head === MEAN ? range(layer.heads) : [head];
  for (const one of heads) {
    const row = (one * rows.length + i) * columns.length + j;
    const unit = layer.largest[row] / 255 / heads.length;
    for (let n = 0; n < count; n++) values[n] += unit * layer.weights[row * count + n];
  }
  return {map: layer.map, own: [rows[i], columns[j]], rows: layer.cells[0][i], columns: layer.cells[1][j], values};
}

function rolled(layer, y, x) {
  const {grid, size, weights, largest, layers} = data.rollout;
  const i = Math.floor(y * grid[0] / H), j = Math.floor(x * grid[1] / W);
  const row = (layers.indexOf(layer.name) * grid[0] + i) * grid[1] + j;
  const count = size[0] * size[1], values = new Float32Array(count), unit = largest[row] / 255;
  for (let n = 0; n < count; n++) values[n] = unit * weights[row * count + n];
  const start = [Math.floor((i + 0.5) * size[0] / grid[0]), Math.floor((j + 0.5) * size[1] / grid[1])];
  return {map: size, own: start, rows: range(size[0]), columns: range(size[1]), values};
}

function peak(shown) {
  let most = 0, at = 0;
  shown.values.forEach((value, n) => { if (value > most) { most = value; at = n; } });
  return {most, row: shown.rows[Math.floor(at / shown.columns.length)], column: shown.columns[at % shown.columns.length]};
}

// ------------------------------------------------------------------------------------------------------- the colours

// What each means is the package's palette, which the page's style brings along.
const meant = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const rgbOf = name => [1, 3, 5].map(at => parseInt(meant(name).slice(at, at + 2), 16));
const QUERY = meant("query"), BLOCK = meant("block"), FULL = Number(meant("full"));
const WEIGHT = rgbOf("weight"), POSITIVE = rgbOf("positive"), NEGATIVE = rgbOf("negative");
const COLOURS = range(256).map(step => `rgba(${WEIGHT.join(",")},${0.9 * step / 255})`);

/** The share of each cell of a block where nothing is preferred: 1/n. */
const alike = shown => 1 / Math.max(shown.rows.filter(cell => cell >= 0).length * shown.columns.filter(cell => cell >= 0).length, 1);

/** The weight that has its full colour. */
const fullColour = shown => Math.max(peak(shown).most, FULL * alike(shown));

// ------------------------------------------------------------------------------------------------------ the drawing

const image = $("image"), stage = $("stage"), overlay = $("overlay");
const state = {layer: 0, head: MEAN, y: H >> 1, x: W >> 1, zoom: false, held: false};
const whole = {y: 0, x: 0, height: H, width: W};

/** Cells of a block over the part of the image that a view shows. */
function paint(context, view, shown, line) {
  const {width, height} = context.canvas;
  const cellH = H / shown.map[0], cellW = W / shown.map[1];
  const down = y => Math.round((y - view.y) * height / view.height), right = x => Math.round((x - view.x) * width / view.width);
  const top = fullColour(shown);
  shown.rows.forEach((row, a) => {
    if (row < 0) return;
    const upper = down(row * cellH), bottom = down((row + 1) * cellH);
    shown.columns.forEach((column, b) => {
      if (column < 0) return;
      const left = right(column * cellW), value = shown.values[a * shown.columns.length + b];
      context.fillStyle = COLOURS[Math.round(255 * value / top)];
      context.fillRect(left, upper, right((column + 1) * cellW) - left, bottom - upper);
    });
  });
  const frame = extent(shown);
  if (frame.height < H || frame.width < W) {
    context.setLineDash([4 * line, 3 * line]);
    outline(context, down(frame.y), right(frame.x), down(frame.y + frame.height), right(frame.x + frame.width), BLOCK, line);
    context.setLineDash([]);
  }
  const [y, x] = shown.own;
  const own = [down(y * cellH), right(x * cellW), down((y + 1) * cellH), right((x + 1) * cellW)];
  outline(context, ...own, "#ffffff", 2.4 * line);
  outline(context, ...own, QUERY, 1.3 * line);
}

function outline(context, top, left, bottom, right, colour, line) {
  context.strokeStyle = colour;
  context.lineWidth = line;
  context.strokeRect(left, top, Math.max(right - left, 2), Math.max(bottom - top, 2));
}

/** The rectangle around a block, in pixels of the image. */
function extent(shown) {
  const rows = shown.rows.filter(cell => cell >= 0), columns = shown.columns.filter(cell => cell >= 0);
  const cellH = H / shown.map[0], cellW = W / shown.map[1];
  const top = Math.min(...rows), left = Math.min(...columns);
  return {y: top * cellH, x: left * cellW, height: (Math.max(...rows) - top + 1) * cellH, width: (Math.max(...columns) - left + 1) * cellW};
}

/** A square part of the image around a block, or all of it. */
function viewOf(shown) {
  if (!state.zoom) return whole;
  const frame = extent(shown), cell = Math.max(H / shown.map[0], W / shown.map[1]);
  const side = Math.min(Math.max(frame.height, frame.width) + 2 * cell, Math.max(H, W));
  const height = Math.min(side, H), width = Math.min(side, W);
  return {y: clamp(frame.y + frame.height / 2 - height / 2, 0, H - height), x: clamp(frame.x + frame.width / 2 - width / 2, 0, W - width), height, width};
}

function fresh(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const wide = Math.max(1, Math.round(width * ratio)), high = Math.max(1, Math.round(height * ratio));
  if (canvas.width !== wide || canvas.height !== high) { canvas.width = wide; canvas.height = high; }
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, wide, high);
  return {context, ratio};
}

const tiles = [];       // {layer, head, button, canvas}
const visible = new Set();
const watch = "IntersectionObserver" in window ? new IntersectionObserver(entries => {
  for (const entry of entries) visible[entry.isIntersecting ? "add" : "delete"](entry.target);
  schedule();
}, {rootMargin: "200px"}) : null;

// On paper all are seen.
let printing = false;
window.addEventListener("beforeprint", () => { printing = true; draw(); });
window.addEventListener("afterprint", () => { printing = false; });

function drawTile(tile) {
  if (watch && !printing && !visible.has(tile.button)) return;
  const shown = block(data.layers[tile.layer], tile.head, state.y, state.x), view = viewOf(shown);
  const scale = tile.canvas.clientWidth / view.width;
  tile.canvas.style.aspectRatio = `${view.width} / ${view.height}`;
  const {context, ratio} = fresh(tile.canvas, view.width * scale, view.height * scale);
  const {width, height} = tile.canvas;
  const sy = image.naturalHeight / H, sx = image.naturalWidth / W;
  context.imageSmoothingEnabled = Math.max(H, W) > 64 && !state.zoom;
  context.globalAlpha = 0.85;
  context.drawImage(image, view.x * sx, view.y * sy, view.width * sx, view.height * sy, 0, 0, width, height);
  context.globalAlpha = 1;
  paint(context, view, shown, ratio);
}

/** The colours from 0 to the full one, above on black and below on white, with a mark at 1/n. */
function drawScale(mark) {
  const scale = $("scale").getContext("2d");
  scale.fillStyle = "#000000";
  scale.fillRect(0, 0, 256, 1);
  scale.fillStyle = "#ffffff";
  scale.fillRect(0, 1, 256, 1);
  COLOURS.forEach((colour, n) => { scale.fillStyle = colour; scale.fillRect(n, 0, 1, 2); });
  scale.fillStyle = QUERY;
  scale.fillRect(Math.round(255 * mark) - 1, 0, 3, 2);
}

let pending = false;
function schedule() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => { pending = false; draw(); });
}

function draw() {
  const layer = data.layers[state.layer];
  const shown = block(layer, state.head, state.y, state.x);
  const {context, ratio} = fresh(overlay, stage.clientWidth, stage.clientHeight);
  paint(context, whole, shown, 1.6 * ratio);
  tiles.forEach(drawTile);
  readOut(layer, shown);
}

const headName = head => head === MEAN ? "mean of heads" : head === ROLLOUT ? "rollout" : `head ${head + 1}`;

function readOut(layer, shown) {
  const {most, row, column} = peak(shown);
  const top = fullColour(shown);
  $("most").textContent = percent(top);
  drawScale(alike(shown) / top);
  const sum = shown.values.reduce((total, value) => total + value, 0);
  let entropy = 0;
  for (const value of shown.values) if (value > 0) entropy -= value / sum * Math.log2(value / sum);
  const parts = [
    `${layer.name}, ${headName(state.head)}.`,
    `Query at row ${shown.own[0]}, column ${shown.own[1]} of ${shown.map.join(" × ")} cells.`,
    `Most weight, ${percent(most)}, on row ${row}, column ${column} (1/n is ${percent(alike(shown))}); entropy ${entropy.toFixed(2)} bits.`,
  ];
  if (sum < 0.98) parts.push(`${percent(1 - sum)} went to padding.`);
  if (state.held) parts.push("Held.");
  $("readout").textContent = parts.join(" ");
}

// -------------------------------------------------------------------------------------------------------- the choice

const headsOf = layer => [MEAN, ...range(layer.heads), ...(data.rollout ? [ROLLOUT] : [])];

function choose(layer, head) {
  const other = data.layers[layer];
  if (layer !== state.layer || !$("head").options.length) {
    $("head").replaceChildren(...headsOf(other).map(one => new Option(headName(one), one)));
    state.layer = layer;
    drawTables();
  }
  state.head = headsOf(other).includes(head) ? head : MEAN;
  $("layer").value = state.layer;
  $("head").value = state.head;
  for (const tile of tiles) tile.button.setAttribute("aria-pressed", tile.layer === state.layer && tile.head === state.head);
  document.querySelectorAll(".layer").forEach((card, n) => { card.classList.toggle("chosen", n === state.layer); });
  schedule();
}

function step(list, current, by) { return list[(list.indexOf(current) + by + list.length) % list.length]; }

function toggle(name, value) {
  state[name] = value;
  $(name === "held" ? "pin" : name).setAttribute("aria-pressed", value);
  schedule();
}

function moveTo(event) {
  const box = stage.getBoundingClientRect();
  state.y = clamp(Math.floor((event.clientY - box.top) * H / box.height), 0, H - 1);
  state.x = clamp(Math.floor((event.clientX - box.left) * W / box.width), 0, W - 1);
  schedule();
}

stage.addEventListener("pointermove", event => {
  if (event.pointerType === "mouse" ? !state.held : event.buttons) moveTo(event);
});
stage.addEventListener("pointerdown", event => {
  if (event.pointerType !== "mouse") stage.setPointerCapture(event.pointerId);
  moveTo(event);
});
stage.addEventListener("click", event => { if (event.pointerType === "mouse" && event.detail) toggle("held", !state.held); });

/** Arrow keys go from query to query of the chosen layer, or from pixel to pixel of a rollout. */
function walk(rows, columns) {
  const layer = data.layers[state.layer];
  const along = (axis, pixel, pixels, by) => {
    if (!by) return pixel;
    if (state.head === ROLLOUT) {
      const count = data.rollout.grid[axis], at = clamp(Math.floor(pixel * count / pixels) + by, 0, count - 1);
      return Math.floor((at + 0.5) * pixels / count);
    }
    const own = layer.queries[axis], at = clamp(nearest(own, pixel, pixels, layer.map[axis]) + by, 0, own.length - 1);
    return Math.min(Math.floor((own[at] + 0.5) * pixels / layer.map[axis]), pixels - 1);
  };
  state.y = along(0, state.y, H, rows);
  state.x = along(1, state.x, W, columns);
  schedule();
}

const ARROWS = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, input, textarea")) return;
  const layer = data.layers[state.layer], key = event.key;
  if (key in ARROWS) {
    if (!event.target.closest("#stage")) return;
    walk(...ARROWS[key]);
  } else if (key === "l" || key === "L") choose(step(range(data.layers.length), state.layer, event.shiftKey ? -1 : 1), state.head);
  else if (key === "h" || key === "H") choose(state.layer, step(headsOf(layer), state.head, event.shiftKey ? -1 : 1));
  else if (key === "m") choose(state.layer, MEAN);
  else if (key === "r" && data.rollout) choose(state.layer, ROLLOUT);
  else if (key === "z") toggle("zoom", !state.zoom);
  else if (/^[1-9]$/.test(key) && Number(key) <= layer.heads) choose(state.layer, Number(key) - 1);
  else return;
  event.preventDefault();
});

$("layer").addEventListener("change", event => choose(Number(event.target.value), state.head));
$("head").addEventListener("change", event => choose(state.layer, Number(event.target.value)));
$("zoom").addEventListener("click", () => toggle("zoom", !state.zoom));
$("pin").addEventListener("click", () => toggle("held", !state.held));

// --------------------------------------------------------------------------------------------------- position tables

const SVG = "http://www.w3.org/2000/svg";
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "line", "circle", "rect", "text", "title", "g"].includes(name);
  const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") element.style.cssText = value;  // the page's policy refuses the attribute
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function drawTables() {
  const layer = data.layers[state.layer];
  $("tables-of").textContent = layer.name;
  $("save-tables").hidden = !layer.tables.length;
  $("tables").replaceChildren(...layer.tables.flatMap(table => {
    const [count, rows, columns] = table.shape;
    const side = clamp(Math.round(96 / Math.max(rows, columns)), 2, 14);
    const pictures = range(count).map(n => {
      const label = `${table.of} ${n + 1}`;
      const canvas = make("canvas", {width: columns, height: rows, role: "img", style: `width:${columns * side}px;height:${rows * side}px`,
        "aria-label": `${table.name} of ${label}: ${table.rows} down, ${table.columns} across`});
      const context = canvas.getContext("2d"), pixels = context.createImageData(columns, rows);
      for (let at = 0; at < rows * columns; at++) {
        const value = table.values[n * rows * columns + at] / 127;
        pixels.data.set([...(value < 0 ? NEGATIVE : POSITIVE), Math.round(255 * Math.abs(value))], 4 * at);
      }
      context.putImageData(pixels, 0, 0);
      return make("figure", {}, canvas, make("figcaption", {}, label));
    });
    const caption = `${table.name[0].toUpperCase()}${table.name.slice(1)}: ${table.rows} down, ${table.columns} across, ` +
      `between ±${table.largest.toPrecision(3)}`;
    return [make("p", {class: "note"}, caption), make("div", {class: "tables"}, ...pictures)];
  }));
  if (!layer.tables.length) $("tables").append(make("p", {class: "note"}, "This layer has no tables to show."));
}

// --------------------------------------------------------------------------------------------------------- statistics

const mean = values => values.reduce((sum, value) => sum + value, 0) / values.length;
const nice = most => { const unit = 10 ** Math.floor(Math.log10(most || 1)); return unit * [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find(n => n * unit >= most * 0.999); };

/** Layers across, one dot per head, a bar at their mean; a thin line at what could be at most. */
function plot(title, unit, rows, atMost) {
  const width = 330, height = 178, left = 38, bottom = 30, top = 10;
  const most = nice(Math.max(...rows.flatMap(row => [...row.values, row.limit || 0]), 1e-9));
  const top_ = atMost || most, slot = (width - left - 6) / rows.length;
  const yOf = value => top + (height - top - bottom) * (1 - value / top_), xOf = n => left + slot * (n + 0.5);
  const svg = make("svg", {viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${title}: ${rows.map(row => `${row.name} ${mean(row.values).toPrecision(3)}`).join(", ")} ${unit}`});
  for (const share of [0, 0.5, 1]) {
    const y = yOf(share * top_);
    svg.append(make("line", {x1: left, x2: width, y1: y, y2: y, stroke: "var(--line)"}),
      make("text", {x: left - 6, y: y + 4, "text-anchor": "end"}, String(Number((share * top_).toPrecision(2)))));
  }
  const every = Math.ceil(rows.length / 12);
  rows.forEach((row, n) => {
    const x = xOf(n), half = Math.min(slot * 0.32, 13);
    const group = make("g", {}, make("title", {}, `${row.name}: ${row.values.map(value => value.toPrecision(3)).join(", ")} ${unit}`));
    if (row.limit) group.append(make("line", {x1: x - half, x2: x + half, y1: yOf(row.limit), y2: yOf(row.limit), stroke: "var(--soft)", "stroke-width": 1, "stroke-dasharray": "3 2"}));
    if (row.values.length > 1) for (const value of row.values) group.append(make("circle", {cx: x, cy: yOf(value), r: 3, fill: "var(--accent)", "fill-opacity": 0.55}));
    group.append(make("line", {x1: x - half, x2: x + half, y1: yOf(mean(row.values)), y2: yOf(mean(row.values)), stroke: "var(--above)", "stroke-width": 2.5}));
    if (n % every === 0) group.append(make("text", {x, y: height - bottom + 16, "text-anchor": "middle"}, String(n + 1)));
    svg.append(group);
  });
  svg.append(make("text", {x: (left + width) / 2, y: height - 2, "text-anchor": "middle"}, "layer"));
  return make("figure", {class: "card"}, make("h3", {}, title), svg);
}

function drawStatistics() {
  const rows = (key, limit) => data.layers.map(layer => ({name: layer.name, values: [layer[key]].flat(), limit: limit && layer[limit]}));
  $("plots").replaceChildren(
    plot("Attention distance, pixels", "pixels", rows("distance")),
    plot("Entropy, bits (dashed: all cells alike)", "bits", rows("entropy", "uniform")),
    plot("Head diversity, 0 alike to 1 apart", "", rows("diversity"), nice(Math.max(...data.layers.map(layer => layer.diversity), 1e-3))));
  const cell = (name, text, more = {}) => make(name, more, text);
  $("numbers").replaceChildren(
    make("thead", {}, make("tr", {}, ...["layer", "heads", "distance, px", "entropy, bits", "at most", "diversity"].map(text => cell("th", text, {scope: "col"})))),
    make("tbody", {}, ...data.layers.map((layer, n) => make("tr", {}, cell("td", `${n + 1}  ${layer.name}`), cell("td", String(layer.heads)),
      cell("td", mean(layer.distance).toFixed(2)), cell("td", mean(layer.entropy).toFixed(2)), cell("td", layer.uniform.toFixed(2)),
      cell("td", layer.diversity.toFixed(3))))));
}

function drawPrediction() {
  $("prediction").hidden = !data.prediction.length;
  $("bars").replaceChildren(...data.prediction.flatMap(({name, probability}) => [
    make("dt", {}, name), make("dd", {"aria-hidden": "true"}, make("div", {class: "bar", style: `width:${100 * probability}%`})),
    make("dd", {}, percent(probability))]));
}

const PARTS = Object.fromEntries(["border", "stride", "encoding", "undivided"].map(part => [part, meant(part)]));

/** A bar per layer, its own error by cause, and a ring where the network as a whole has got to. */
function drawEquivariance() {
  $("equivariance").hidden = !data.equivariance;
  if (!data.equivariance) return;
  const {transform, rows} = data.equivariance, number = value => value === null ? "unknown" : value < 1e-5 ? "0" : value.toPrecision(2);
  $("transform").textContent = transform;
  const most = Math.max(...rows.flatMap(row => [row.own || 0, row.error || 0]), 1e-9);
  const partsOf = row => {
    const known = ["border", "stride", "encoding"].map(part => [part, row[part] || 0]);
    return [...known, ["undivided", Math.max(0, known.reduce((left, [, value]) => left - value, row.own || 0))]];
  };
  const told = row => partsOf(row).filter(([, value]) => value > 1e-5).map(([part, value]) => `${part} ${number(value)}`).join(", ");
  const worst = rows.reduce((most, row) => (row.own || 0) > (most.own || 0) ? row : most, rows[0]);
  $("worst").textContent = worst && worst.own > 1e-5 ? `${worst.layer} breaks it most: ${told(worst)}.` : "No layer breaks it.";
  $("errors").replaceChildren(...rows.flatMap(row => {
    const track = make("div", {class: "track", title: `${row.layer} (${row.kind}): ${told(row) || "nothing"}; network up to here ${number(row.error)}`});
    for (const [part, value] of partsOf(row)) track.append(make("b", {style: `width:${100 * value / most}%;background:${PARTS[part]}`}));
    if (row.error !== null) track.append(make("i", {style: `left:${100 * row.error / most}%`}));
    return [make("span", {}, row.layer), make("span", {class: "amount"}, number(row.own)), track];
  }));
  const used = Object.entries(PARTS).filter(([part]) => rows.some(row => partsOf(row).some(([name, value]) => name === part && value > 1e-5)));
  $("error-keys").replaceChildren(...used.map(([part, colour]) => make("span", {class: "key"}, make("i", {style: `background:${colour}`}), part)),
    make("span", {class: "key"}, "\u25cb the network, from the image to this layer"));
  const columns = ["own", "border", "stride", "encoding", "error", "interior"];
  $("error-numbers").replaceChildren(
    make("thead", {}, make("tr", {}, ...["layer", ...columns].map(text => make("th", {scope: "col"}, text === "error" ? "network" : text)))),
    make("tbody", {}, ...rows.map((row, n) => make("tr", {}, make("td", {}, `${n + 1}  ${row.layer}`), ...columns.map(key => make("td", {}, number(row[key])))))));
}

// ----------------------------------------------------------------------------------------------------------- CSV files

function csv(name, header, rows) {
  const isFormula = value => typeof value === "string" && Number.isNaN(Number(value)) && /^[=+\-@\t\r\n]/.test(value);  // to a spreadsheet
  const quoted = value => /[",\n\r]/.test(value) ? `"${String(value).replace(/"/g, '""')}"` : value;
  const text = [header, ...rows].map(row => `${row.map(value => quoted(isFormula(value) ? `'${value}` : value)).join(",")}\n`).join("");
  const address = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
  make("a", {download: name, href: address}).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

$("save-block").addEventListener("click", () => {
  const rows = [];
  for (const layer of data.layers) for (const head of headsOf(layer).filter(head => head !== MEAN)) {
    const shown = block(layer, head, state.y, state.x), [cellH, cellW] = [H / shown.map[0], W / shown.map[1]];
    for (const [a, row] of shown.rows.entries()) for (const [b, column] of shown.columns.entries()) {
      if (row < 0 || column < 0) continue;
      rows.push([layer.name, head === ROLLOUT ? "rollout" : head + 1, shown.own[0], shown.own[1], row, column,
        (row + 0.5) * cellH, (column + 0.5) * cellW, shown.values[a * shown.columns.length + b].toPrecision(4)]);
    }
  }
  csv(`attention-${state.y}-${state.x}.csv`, ["layer", "head", "query_row", "query_column", "key_row", "key_column", "key_y_pixels", "key_x_pixels", "weight"], rows);
});
$("save-statistics").addEventListener("click", () => csv("statistics.csv",
  ["layer", "head", "distance_pixels", "entropy_bits", "uniform_entropy_bits", "diversity"],
  data.layers.flatMap(layer => range(layer.heads).map(n => [layer.name, n + 1, layer.distance[n], layer.entropy[n], layer.uniform, layer.diversity]))));
$("save-tables").addEventListener("click", () => {
  const layer = data.layers[state.layer];
  csv("position-tables.csv", ["layer", "table", "of", "number", "row", "column", "value"], layer.tables.flatMap(table => {
    const [count, rows, columns] = table.shape;
    return range(count * rows * columns).map(at => [layer.name, table.name, table.of, Math.floor(at / rows / columns) + 1,
      Math.floor(at / columns) % rows, at % columns, (table.values[at] / 127 * table.largest).toPrecision(4)]);
  }));
});
$("save-equivariance").addEventListener("click", () => {
  const columns = ["layer", "kind", "own", "border", "stride", "encoding", "error", "interior"];
  csv("equivariance.csv", columns, data.equivariance.rows.map(row => columns.map(key => row[key] ?? "")));
});

// ------------------------------------------------------------------------------------------------------------- set up

function build() {
  stage.style.aspectRatio = `${W} / ${H}`;
  stage.style.maxWidth = `${80 * W / H}vh`;  // all of a tall image fits on the screen
  image.classList.toggle("smooth", Math.max(H, W) > 96);
  $("layer").replaceChildren(...data.layers.map((layer, n) => new Option(`${n + 1}  ${layer.name}`, n)));
  $("layers").replaceChildren(...data.layers.map((layer, index) => {
    const row = make("div", {class: "tiles", role: "group", "aria-label": layer.name, style: `--count: ${headsOf(layer).length}`});
    for (const head of headsOf(layer)) {
      const canvas = make("canvas", {"aria-hidden": "true", style: `aspect-ratio: ${W} / ${H}`});
      const label = head === MEAN ? "mean" : head === ROLLOUT ? "rollout" : String(head + 1);
      const button = make("button", {class: "tile", type: "button", "aria-label": `${layer.name}, ${headName(head)}`}, canvas, label);
      button.addEventListener("click", () => choose(index, head));
      tiles.push({layer: index, head, button, canvas});
      row.append(button);
      if (watch) watch.observe(button);
    }
    const facts = `${layer.kind}, ${layer.heads} head${layer.heads > 1 ? "s" : ""}, ${layer.block.join(" × ")} block on ${layer.map.join(" × ")} cells`;
    return make("article", {class: `layer card${layer.heads > 6 ? "" : " few"}`}, make("header", {}, make("h3", {}, `${index + 1}  ${layer.name}`), make("span", {class: "note"}, facts)), row);
  }));
  toggle("zoom", data.layers.some(layer => layer.block[0] / layer.map[0] < 0.3));
  drawPrediction();
  drawStatistics();
  drawEquivariance();
  choose(0, MEAN);
}

image.addEventListener("load", () => { build(); document.documentElement.dataset.ready = ""; });
image.src = data.image.source;
new ResizeObserver(schedule).observe(stage);
window.nearsight = {state, block, layers: data.layers};
})();
