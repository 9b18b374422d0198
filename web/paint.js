/* Paint a label map, see the CT slice: the generator that export.py wrote, in the browser.

   A stroke makes a new map, the worker makes a slice of it, and the slice's HU are shown through a window: in a body
   that is drawn about the lungs, or in the CT slice that was opened with the map. Maps and slices are saved as the PNG
   files that data/slices.py describes. From top to bottom: the knobs; the page and its controls; the map and its
   history; painting; synthesis; what surrounds it; files, which formats.js reads and writes; what is shown; the worker,
   which is what Generator is in infer_onnx.py.

   Nothing is built and nothing leaves the browser. ONNX Runtime Web comes from web/vendor, where `make web` puts it, or
   else from a public copy of the same npm package; either way the browser holds it to the hashes below. */

"use strict";

const LABELS = ["background", "lung", "ground-glass opacity", "consolidation"];
const COLOURS = [[0, 0, 0], [255, 0, 0], [0, 0, 255], [0, 255, 0]]; // the paper's, Fig. 1, as in data/slices.py
const HU_OFFSET = 1024; // stored value = HU + 1024, clipped to 0..4095

const GENERATOR = "../models/covid-ct-256.onnx"; // opened at the start, if it is there
const EXAMPLES = ["P01_S008", "P02_S015", "P07_S020", "P15_S009", "P16_S008"]; // ../models/examples/P01_S008.png, ...
const START = EXAMPLES[0]; // shown first
const STEPS = 100; // that can be undone
const SIZE = 256; // pixels of the map, and
const WINDOW = { level: -600, width: 1500 }; // HU, before a generator says better
const AIR = -1000, FAT = -100, MUSCLE = 40, BONE = 300; // HU of the body that is drawn
const EDGE = 2; // pixels beside a lesion in which it fades into the slice that was opened

const RUNTIME = { // ONNX Runtime Web. A new version wants new hashes, and its number in index.html's policy
  places: ["vendor/", "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/"], // the first that has it, whole
  files: { // openssl dgst -sha384 -binary FILE | base64
    "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
  },
};

const $ = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// ---------------------------------------------------------------------------------------------- the page

async function main() {
  useMap({ name: "map", width: SIZE, height: SIZE, labels: new Uint8Array(SIZE ** 2) }, false);
  $("start").append(...EXAMPLES.map((name) => new Option(name, name)));
  wire();
  resetWindow();
  const start = async () => {
    const map = await getExample(START).catch(() => state.map); // opened from disk, the page cannot read it
    if (!state.past.length) useMap(map, false);
  };
  start();
  await openGenerator(GENERATOR.split("/").pop(), get(GENERATOR));
  if (state.generator && state.generator.size !== SIZE) start();
}

/** Join the controls with what they do. */
function wire() {
  const on = (target, events, action) => events.split(" ").forEach((event) => target.addEventListener(event, action));
  on($("map"), "pointerdown", beginStroke);
  on($("map"), "pointermove", moveStroke);
  on($("map"), "pointerup pointercancel", endStroke);
  on($("map"), "keydown", paintByKey);
  on($("ct"), "pointermove", (event) => showReadout(pointOn($("ct"), event)));
  on(document, "keydown", shortcut);
  on($("size"), "input", showSliders);
  for (const id of ["level", "width"]) on($(id), "input", () => { showSliders(); drawCt(); });
  for (const id of ["density", "detail"]) on($(id), "input", () => steer());
  on($("draw"), "click", drawAnother);
  on($("reset"), "click", resetWindow);
  on($("undo"), "click", undo);
  on($("redo"), "click", redo);
  on($("clear"), "click", () => edit((labels) => labels.fill(0)));
  on($("save-map"), "click", saveMap);
  on($("save-ct"), "click", () => saveAs(ctPng(state.slice), `${state.map.name}_ct.png`));
  on($("start"), "change", () => {
    startFrom($("start").value);
    $("start").selectedIndex = 0; // a menu: what was chosen may be chosen again
  });
  for (const what of ["map", "generator"]) {
    on($(`open-${what}`), "click", () => $(`${what}-file`).click());
    on($(`${what}-file`), "change", ({ target }) => {
      openFiles([...target.files]);
      target.value = ""; // so that the same file can be opened again
    });
  }
  on(document, "dragover dragleave drop", (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", event.type === "dragover");
    if (event.type === "drop") openFiles([...event.dataTransfer.files]);
  });
  on(window, "beforeunload", (event) => { // the browser asks, else the drawing would be lost
    if (state.map !== state.kept) event.returnValue = true; // older browsers want this way
  });
}

function shortcut(event) {
  const key = event.key.toLowerCase();
  if (event.ctrlKey || event.metaKey) {
    const action = { z: event.shiftKey ? redo : undo, y: redo }[key];
    if (action) { event.preventDefault(); action(); }
    return;
  }
  if (event.altKey || event.target.matches("select")) return;
  if (/^[0-3]$/.test(key)) choose("label", key);
  else if (key === "b") choose("tool", "brush");
  else if (key === "f") choose("tool", "fill");
  else if (key === "d") drawAnother();
  else if (key === "[" || key === "]") resizeBrush(key === "[" ? -2 : 2);
}

const chosen = (name) => document.querySelector(`[name=${name}]:checked`).value; // of label, tool
const choose = (name, value) => { document.querySelector(`[name=${name}][value="${value}"]`).checked = true; };

function resizeBrush(change) {
  $("size").value = Number($("size").value) + change;
  showSliders();
}

// ---------------------------------------------------------------------------------------------- the map, its history

const state = {
  map: null, // {name, width, height, labels uint8}; it never changes, an edit makes another. Of a file also `opened`,
             // its labels as the file has them, and `scan`, the slice that was opened with it, HU int16
  past: [], future: [], // maps
  kept: null, // the map that was saved, opened or started from last
  waiting: null, // {name, width, height, hu}, a slice that was opened before its map
  generator: null, // {labels, level, width, size, multiple, trained_labels, steering, licence} of the one that is open
  told: {}, // {density, detail, seed}: what the generator is told besides the map; never changes, as a map
  slice: null, // {map, told, hu int16, seconds}; out of date where map or told are not those above
};

/** Put a map in the place of the present one, which a step keeps so that it can be undone. */
function setMap(map, isStep = true) {
  const scan = state.map?.scan;
  if (isStep) Object.assign(state, { past: [...state.past, state.map].slice(-STEPS), future: [] });
  state.map = map;
  if (map.scan !== scan) resetSteering();
  mapChanged();
}

/** Go on with a map that need not be saved: it comes from a file, or is built in. */
function useMap(map, isStep = true) {
  setMap(map, isStep);
  state.kept = map;
}

/** Change a copy of the labels: as a step, or as a part of the step before. Returns whether anything changed. */
function edit(change, isStep = true) {
  const labels = state.map.labels.slice();
  change(labels);
  const changed = labels.some((label, i) => label !== state.map.labels[i]);
  if (changed) setMap({ ...state.map, labels }, isStep);
  return changed;
}

const undo = () => travel(state.past, state.future);
const redo = () => travel(state.future, state.past);

/** Go a step back or on: from one list of maps to the other. */
function travel(from, to) {
  if (!from.length) return;
  to.push(state.map);
  setMap(from.pop(), false);
}

// ---------------------------------------------------------------------------------------------- painting

let stroke = null; // {x, y, changed} while the pointer is down

function beginStroke(event) {
  if (!event.isPrimary || event.button !== 0) return;
  const point = pointOn($("map"), event);
  if (chosen("tool") === "fill") return useTool(point);
  $("map").setPointerCapture(event.pointerId);
  stroke = { ...point, changed: false };
  moveStroke(event);
}

function moveStroke(event) {
  const point = pointOn($("map"), event);
  showRing(point);
  showReadout(point);
  if (!stroke || !event.isPrimary) return;
  const changed = edit((labels) => paintLine(labels, stroke, point), !stroke.changed);
  stroke = { ...point, changed: stroke.changed || changed };
}

function endStroke(event) {
  if (!stroke || !event.isPrimary) return;
  if (!stroke.changed) sayWhyNot();
  stroke = null;
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };

/** Move the brush by an arrow key, and paint by the space bar. */
function paintByKey(event) {
  if (!(event.key in MOVES) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const { width, height } = state.map, pixels = event.shiftKey ? 10 : 1, [dx, dy] = MOVES[event.key];
  const point = {
    x: clamp(ring.x + pixels * dx, 0.5, width - 0.5),
    y: clamp(ring.y + pixels * dy, 0.5, height - 0.5),
  };
  showRing(point);
  showReadout(point);
  if (event.key === " ") useTool(point);
}

/** Paint once, by the tool that is chosen. */
function useTool(point) {
  const tool = chosen("tool") === "fill" ? fill : paintDisc;
  if (!edit((labels) => tool(labels, point))) sayWhyNot();
}

function sayWhyNot() {
  if (chosen("label") > 1 && $("inside").checked) say("Nothing changed. Lesions stay inside the lung.");
}

/** Whether the chosen label may replace this one: a lesion only where there is lung, if that is wanted. */
const mayReplace = (old) => old > 0 || chosen("label") < 2 || !$("inside").checked;

/** Paint a disc around a point of the map. */
function paintDisc(labels, { x, y }) {
  const { width, height } = state.map, radius = $("size").value / 2, value = chosen("label");
  const replaced = LABELS.map((_, old) => mayReplace(old));
  for (let j = Math.max(0, Math.floor(y - radius)); j <= Math.min(height - 1, y + radius); j++) {
    for (let i = Math.max(0, Math.floor(x - radius)); i <= Math.min(width - 1, x + radius); i++) {
      const at = j * width + i;
      if ((i + 0.5 - x) ** 2 + (j + 0.5 - y) ** 2 <= radius ** 2 && replaced[labels[at]]) labels[at] = value;
    }
  }
}

/** Paint along the way that the pointer came. */
function paintLine(labels, from, to) {
  const dx = to.x - from.x, dy = to.y - from.y, steps = Math.max(1, Math.ceil(Math.hypot(dx, dy)));
  const middle = (place) => Math.floor(place) + 0.5; // of the pixel: between pixels, a small brush paints none
  for (let k = 1; k <= steps; k++) {
    paintDisc(labels, { x: middle(from.x + (dx * k) / steps), y: middle(from.y + (dy * k) / steps) });
  }
}

/** Paint all pixels of one label that hang together with this one by their sides. */
function fill(labels, { x, y }) {
  const { width, height } = state.map, value = Number(chosen("label"));
  const stack = [Math.floor(y) * width + Math.floor(x)], old = labels[stack[0]];
  if (old === value || !mayReplace(old)) return;
  while (stack.length) {
    const i = stack.pop();
    if (labels[i] !== old) continue;
    labels[i] = value;
    if (i % width) stack.push(i - 1);
    if ((i + 1) % width) stack.push(i + 1);
    if (i >= width) stack.push(i - width);
    if (i < width * (height - 1)) stack.push(i + width);
  }
}

/** The middle of the pixel under the pointer, in pixels of the map. */
function pointOn(canvas, event) {
  const box = canvas.getBoundingClientRect();
  const middle = (part, pixels) => clamp(Math.floor(part * pixels), 0, pixels - 1) + 0.5;
  return {
    x: middle((event.clientX - box.left) / box.width, canvas.width),
    y: middle((event.clientY - box.top) / box.height, canvas.height),
  };
}

// ---------------------------------------------------------------------------------------------- synthesis

let busy = false; // the worker is at a slice
let wanted = null; // a promise of the bytes of the generator that was asked for last

/** Make the slice of the map. While one is being made the newest map waits; those between are dropped. */
async function synthesize() {
  if (busy || !state.generator) return;
  busy = true;
  let map, told;
  do {
    ({ map, told } = state);
    $("timing").textContent = "drawing …";
    try {
      const { hu, seconds } = await worker.ask("synthesize", { ...map, told });
      state.slice = { map, told, seconds, hu: map.scan ? intoScan(map, hu) : intoBody(map, hu) };
    } catch (error) {
      state.slice = null;
      complain(`No slice of ${map.width} x ${map.height} pixels: ${error.message}`);
    }
    drawCt();
    showButtons();
  } while (map !== state.map || told !== state.told);
  busy = false;
}

/** Whether the slice is that of the map as it is, and of what the generator is told now. */
const isCurrent = () => state.slice?.map === state.map && state.slice.told === state.told;

/** Tell the generator what its sliders say, and the seed of the draw that is wanted. */
function steer(seed = state.told.seed) {
  state.told = { density: Number($("density").value), detail: Number($("detail").value), seed };
  showSliders();
  showButtons();
  synthesize();
}

const drawAnother = () => $("draw").hidden || steer(state.told.seed + 1);

/** Show what the generator can be told, at the numbers of the slice that was opened or else at its defaults. */
function resetSteering() {
  const { generator, map } = state, steering = generator?.steering ?? {};
  const measured = map.scan && generator ? measure(map, map.scan, map.opened, generator) : {};
  for (const id of ["density", "detail"]) {
    $(id).parentElement.hidden = !steering[id];
    if (!steering[id]) continue;
    const { low, high, default: usual } = steering[id], value = Math.round(measured[id] || usual); // || for NaN
    const more = (high - low) / 5; // beyond what was usual in training
    $(id).min = Math.min(Math.floor(low - more), value);
    $(id).max = Math.max(Math.ceil(high + more), value);
    $(id).value = value;
  }
  $("draw").hidden = !steering.seed;
  steer(steering.seed?.default);
}

/** Open a generator from a promise of its bytes. The one before stays where the file is refused. */
async function openGenerator(name, content) {
  wanted = content;
  say(`Loading ${name} …`);
  try {
    const bytes = await content;
    if (content !== wanted) return; // of two, the one that was asked for last
    state.generator = await worker.ask("open", bytes);
  } catch (error) {
    return complain(`${name}: ${error.message}`);
  }
  state.slice = null; // it was the other generator's
  const { size, licence, trained_labels: trained } = state.generator;
  const unseen = LABELS.filter((_, label) => trained && label && !trained.includes(label)); // an older file tells none
  const warning = unseen.length ? ` It never saw ${unseen.join(" or ")}: what it draws there means nothing.` : "";
  $("about").textContent = `${name}, trained at ${size} x ${size} pixels.${warning} ${licence}`;
  resetWindow();
  resetSteering(); // and makes the slice
  say("Paint on the map: the slice follows. Everything runs in this browser, and nothing is uploaded.");
}

// ---------------------------------------------------------------------------------------------- what surrounds it

/** Put lungs, HU, into a body that is drawn about them, no patient's. A unit is a percent of their longer side. */
function intoBody({ width, labels }, lungs) {
  const inside = [...labels.keys()].filter((i) => labels[i]), x = (i) => i % width, y = (i) => Math.floor(i / width);
  if (!inside.length) return lungs;
  const ends = (of) => inside.reduce(([low, high], i) => [Math.min(low, of(i)), Math.max(high, of(i))], [1e9, 0]);
  const [left, right] = ends(x), [top, bottom] = ends(y), unit = (Math.max(right - left, bottom - top) + 1) / 100;
  const [cx, cy, rx, ry] = [left + right, top + bottom, right - left, bottom - top].map((sum) => sum / 2);
  const oval = (dx, dy, across, down) => (Math.abs(dx / across) ** 2.3 + Math.abs(dy / down) ** 2.3) ** (1 / 2.3);
  return lungs.map((lung, i) => {
    if (labels[i]) return lung;
    const dx = x(i) - cx, dy = y(i) - cy, radius = oval(dx, dy, rx + 16 * unit, ry + 16 * unit); // 1 on the skin
    const within = (edge) => clamp((edge - radius) * 60 * unit, 0, 1); // a border is a pixel wide
    const rib = (within(0.86) - within(0.82)) * (Math.sin(7 * Math.atan2(dy, dx) + 0.6) > 0);
    const vertebra = oval(dx, dy - ry + 9 * unit, 8 * unit, 7 * unit) < 1;
    const spine = vertebra || oval(dx, dy - ry - 3 * unit, 3 * unit, 8 * unit) < 1;
    const tissue = within(1) * (FAT - AIR) + within(0.93) * (MUSCLE - FAT) + Math.max(rib, spine) * (BONE - MUSCLE);
    const noise = Math.imul(i ^ (i << 7) ^ (i >>> 3), 0x9e3779b1); // a multiplication stirs the upper bits
    return AIR + tissue + (noise >> 26);
  });
}

/** Put what was painted, HU, into the slice that was opened; where the map is as it was opened, so is the slice. */
function intoScan(map, lungs) {
  const { labels, opened, scan } = map, steps = Array.from({ length: EDGE + 1 }, (_, k) => k);
  const painted = (i) => labels[i] && labels[i] !== opened[i]; // what was erased stays as it is too
  return scan.map((real, i) => {
    const step = labels[i] ? steps.findIndex((k) => around(i, map, k).some(painted)) : -1; // stays inside the lung
    return step < 0 ? real : Math.round(lungs[i] + (step / (EDGE + 1)) * (real - lungs[i]));
  });
}

/** Density and detail of a slice's healthy lung, HU, as steering in covidgan.py has them; NaN where there is none. */
function measure(map, hu, labels, { level, width }) {
  const seen = hu.map((value) => clamp(value, level - width / 2, level + width / 2));
  const mean = (pixels, value) => pixels.reduce((sum, i) => sum + value(i), 0) / pixels.length;
  const healthy = [...labels.keys()].filter((i) => labels[i] === 1);
  const inner = healthy.filter((i) => around(i, map, 1).every((j) => labels[j] === 1));
  const density = mean(healthy, (i) => seen[i]);
  const detail = mean(inner, (i) => (seen[i] - mean(around(i, map, 1), (j) => seen[j])) ** 2) ** 0.5;
  return { density, detail };
}

/** The pixels at most this many rows and columns from pixel i, itself too. */
function around(i, { width, height }, reach) {
  const found = [], x = i % width, y = Math.floor(i / width);
  for (let row = Math.max(0, y - reach); row <= Math.min(height - 1, y + reach); row++) {
    for (let column = Math.max(0, x - reach); column <= Math.min(width - 1, x + reach); column++) {
      found.push(row * width + column);
    }
  }
  return found;
}

// ---------------------------------------------------------------------------------------------- files

let number = null; // of the slice that was asked for last, of a volume

/** Open what was picked or dropped: a generator, or PNG or NIfTI files, of which a map and a slice are a pair. */
async function openFiles(files) {
  const found = {}, ask = (depth) => {
    found.number ??= Number(prompt(`Which slice, from the feet, of 1 to ${depth}?`, number ?? Math.ceil(depth / 2)));
    return (number = found.number);
  };
  for (const file of files) {
    if (/\.onnx$/i.test(file.name)) return openGenerator(file.name, file.arrayBuffer());
    try {
      const bytes = new Uint8Array(await file.arrayBuffer()), isNifti = /\.nii(\.gz)?$/i.test(file.name);
      const read = await (isNifti ? readNifti(bytes, ask) : readMapOrSlice(bytes));
      const ending = isNifti && found.number ? `_S${String(found.number).padStart(3, "0")}` : "";
      const name = file.name.replace(/(\.nii)?\.[^.]*$/i, "") + ending, kind = read.hu ? "slice" : "map";
      if (found[kind]) throw new Error(`a second ${kind}: open one map and one slice`);
      found[kind] = { name, opened: read.labels, ...read };
    } catch (error) {
      return complain(`${file.name}: ${error.message}`);
    }
  }
  if (files.length) useFiles(found.map ?? state.map, found.slice ?? state.waiting, found);
}

/** Go on with a map, a slice or both. A slice alone is that of the map that was opened before, or else of the next. */
function useFiles(map, slice, found) {
  const alike = slice && map.opened && !map.scan && slice.width === map.width && slice.height === map.height;
  const wrong = alike ? misfit(map, slice) : "", fits = alike && !wrong;
  const isKept = found.map || map === state.kept, size = ({ width, height }) => `${width} x ${height}`;
  state.waiting = (found.slice || wrong) && !fits ? slice : null;
  if (wrong) return complain(`${map.name}: not the map of ${slice.name}, or its labels mean something else: ${wrong}`);
  if (fits || found.map) setMap(fits ? { ...map, scan: slice.hu } : map);
  if (isKept) state.kept = state.map;
  const trained = state.generator?.size ?? map.width, told = ` The generator was trained at ${trained} x ${trained}.`;
  const note = map.width === trained && map.height === trained ? "" : told;
  if (fits) {
    say(`${slice.name}: lesions that you paint appear in this slice, all else in it stays as it is.${note}`);
  } else if (found.slice) {
    say(`${slice.name}: ${size(slice)} pixels. Now open its label map, of the same size.`);
  } else say(`${map.name}: ${size(map)} pixels.${note}`);
}

/** What tells that a map is not a slice's, by rules of data/check.py: "" where nothing does. */
function misfit(map, slice) {
  const apart = map.lies && slice.lies && map.lies.some((at, k) => Math.abs(at - slice.lies[k]) > 0.5);
  if (apart) return "by their headers they lie in different places";
  const means = [1, 2, 3].map((label) => { // HU, NaN where there is too little to tell
    const hu = slice.hu.filter((_, i) => map.opened[i] === label);
    return hu.length < 100 ? NaN : Math.round(hu.reduce((sum, value) => sum + value, 0) / hu.length);
  });
  const [lung] = means, there = means.filter((mean) => !isNaN(mean));
  const falls = there.some((mean, k) => mean <= there[k - 1]);
  return lung < -1000 || lung > -400 || falls ? `labels with means of ${there.join(", ")} HU` : "";
}

/** Start from an example. */
function startFrom(name) {
  getExample(name).then(useMap, (error) => complain(`${name}.png: ${error.message}`));
}

/** An example's map, of the generator's size. */
async function getExample(name) {
  const { width, labels } = await readMapOrSlice(new Uint8Array(await get(`../models/examples/${name}.png`)));
  const size = state.generator?.size ?? SIZE, from = (place) => Math.floor(((place + 0.5) * width) / size);
  const labelAt = (_, i) => labels[width * from(Math.floor(i / size)) + from(i % size)];
  return { name, width: size, height: size, labels: Uint8Array.from({ length: size ** 2 }, labelAt) };
}

/** The bytes of a file of the repository. */
async function get(path) {
  const reply = await fetch(path).catch(() => null); // null: no server, or the page was opened from disk
  if (!reply?.ok) throw new Error("cannot be read from here: drop a file onto the page, or open one by its button");
  return reply.arrayBuffer();
}

function saveMap() {
  saveAs(mapPng(state.map), `${state.map.name}_map.png`);
  state.kept = state.map;
}

/** Hand a file to the user, from a promise of it. */
async function saveAs(content, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// ---------------------------------------------------------------------------------------------- what is shown

let ring = { x: 0.5, y: 0.5 }; // where the brush is
let pointed = null; // what the line below the pictures tells of

function say(line) {
  $("message").textContent = line;
  $("message").className = "";
}

function complain(line) {
  say(line);
  $("message").className = "error";
}

function mapChanged() {
  drawMap();
  showButtons();
  synthesize();
}

function drawMap() {
  const { name, width, height, labels } = state.map;
  const colours = COLOURS.map(([r, g, b]) => 0xff000000 + (b << 16) + (g << 8) + r);
  draw($("map"), width, height, (i) => colours[labels[i]]);
  $("map-name").textContent = `${name}, ${width} x ${height}`;
}

/** Show the slice through the window, as windowed in data/slices.py. */
function drawCt() {
  if (!state.slice) {
    $("timing").textContent = "";
    return draw($("ct"), 1, 1, () => 0);
  }
  const { map, hu, seconds } = state.slice, level = Number($("level").value), span = Number($("width").value);
  draw($("ct"), map.width, map.height, (i) => {
    const grey = Math.floor(clamp((hu[i] - level) / span + 0.5, 0, 1) * 255 + 0.5);
    return 0xff000000 + grey * 0x010101;
  });
  $("timing").textContent = `${seconds.toFixed(2)} s`;
}

/** Fill a canvas with pixels 0xAABBGGRR, and give its frame their shape. */
function draw(canvas, width, height, pixelAt) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  canvas.parentElement.style.setProperty("--aspect", width / height);
  const image = new ImageData(width, height), pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = pixelAt(i);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Set the sliders to the generator's own window. */
function resetWindow() {
  const { level, width } = state.generator ?? WINDOW;
  $("level").value = level;
  $("width").value = width;
  showSliders();
  drawCt();
}

function showSliders() {
  for (const id of ["size", "level", "width", "density", "detail"]) {
    $(id).parentElement.querySelector("output").textContent = `${$(id).value} ${id === "size" ? "px" : "HU"}`;
  }
  showRing(ring);
}

function showButtons() {
  $("undo").disabled = !state.past.length;
  $("redo").disabled = !state.future.length;
  $("save-ct").disabled = !isCurrent();
  showReadout();
}

/** Show the brush: a circle of its size on the map. */
function showRing(point) {
  ring = point;
  const { width, height } = state.map, size = chosen("tool") === "fill" ? 1 : $("size").value;
  Object.assign($("ring").style, { left: `${(100 * point.x) / width}%`, top: `${(100 * point.y) / height}%` });
  Object.assign($("ring").style, { width: `${(100 * size) / width}%`, height: `${(100 * size) / height}%` });
}

/** Say what is at a point, or at the one before: its label and, of the slice of this very map, its HU as saved. */
function showReadout(point = pointed) {
  if (!point) return;
  pointed = point;
  const { map, slice } = state, row = Math.floor(point.y), column = Math.floor(point.x), at = row * map.width + column;
  const label = row < map.height && column < map.width ? LABELS[map.labels[at]] : "outside the map";
  const hu = isCurrent() && at in slice.hu ? `, ${stored(slice.hu[at]) - HU_OFFSET} HU` : "";
  $("readout").textContent = `Row ${row}, column ${column}: ${label}${hu}`;
}

// ---------------------------------------------------------------------------------------------- the worker

const worker = startWorker();

/** Start the worker: ask("open", bytes) and ask("synthesize", map) are promises of its answers, in their order. */
function startWorker() {
  const places = RUNTIME.places.map((place) => new URL(place, document.baseURI).href);
  const script = `(${generatorWorker})(${JSON.stringify({ ...RUNTIME, places })})`;
  const thread = new Worker(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
  const waiting = [];
  thread.onmessage = ({ data: { result, error } }) => {
    const { resolve, reject } = waiting.shift();
    if (result) resolve(result);
    else reject(new Error(error));
  };
  const ask = (task, given) => new Promise((resolve, reject) => {
    waiting.push({ resolve, reject });
    thread.postMessage({ task, given });
  });
  return { ask };
}

/* Holds one generator, and computes off the page's thread, so that painting never waits. It answers {task, given} with
   {result} or {error}.

   The worker's script is this function's own text, which therefore uses nothing from outside it: a page opened from
   disk may start no worker from a file. */
function generatorWorker({ places, files }) {
  const CONTRACTS = ["1", "2"]; // with export.py, whose head has the second in full; the first has no steering
  const runtime = loadRuntime();
  runtime.catch(() => {}); // told when a generator is opened
  let ort, session, info;

  const tasks = {
    /** Take another generator, and tell what it is. The one before stays where the file is refused. */
    async open(content) {
      const checked = check(readMetadata(new Uint8Array(content)));
      ort = await runtime;
      const opened = await ort.InferenceSession.create(content, { executionProviders: ["wasm"], logSeverityLevel: 4 });
      await session?.release();
      [session, info] = [opened, checked];
      return info;
    },

    /** HU int16 [height * width] of labels uint8: padded with background right and below, and cropped back. */
    async synthesize({ width, height, labels, told }) {
      const unknown = labels.some((label) => label >= info.labels.length);
      if (unknown) throw new Error(`the generator knows only ${info.labels.join(", ")}: erase the rest`);
      const [h, w] = [height, width].map((side) => Math.max(2, Math.ceil(side / info.multiple)) * info.multiple);
      const padded = new Uint8Array(h * w), hu = new Int16Array(height * width);
      for (let y = 0; y < height; y++) padded.set(labels.subarray(y * width, (y + 1) * width), y * w);
      const given = { map: new ort.Tensor("uint8", padded, [1, h, w]) };
      for (const [name, { default: usual }] of Object.entries(info.steering)) {
        const number = told[name] ?? usual; // what was told another generator may lack
        given[name] = name === "seed" ? new ort.Tensor("int64", [BigInt(number)]) : new ort.Tensor("float32", [number]);
      }
      const started = performance.now();
      const { ct } = await session.run(given, ["ct"]);
      const seconds = (performance.now() - started) / 1000;
      for (let y = 0; y < height; y++) hu.set(ct.data.subarray(y * w, y * w + width), y * width);
      return { hu, seconds };
    },
  };

  /** ONNX Runtime from the first place that has it, whole. */
  async function loadRuntime() {
    const [script, wasm] = await Promise.all(Object.entries(files).map(([name, hash]) => fetchWhole(name, hash)));
    const loaded = await import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
    Object.assign(loaded.env.wasm, { wasmBinary: wasm, numThreads: 1 }); // more want a server with headers of its own
    loaded.env.logLevel = "error";
    return loaded;
  }

  /** The bytes of a file of the runtime, from the first place where they have the right hash. */
  async function fetchWhole(name, integrity) {
    for (const place of places) {
      const reply = await fetch(place + name, { integrity }).catch(() => null); // null: not what was pinned
      if (reply?.ok) return reply.arrayBuffer();
    }
    throw new Error(`${name} of ONNX Runtime cannot be had: is there a network? make web fetches it once and for all`);
  }

  /** What the page needs of a generator's metadata. Throws where they are not this contract's. */
  function check({ kind, contract, licence = "", ...metadata }) {
    if (!kind) throw new Error("not a generator that export.py wrote: give its generator.onnx");
    if (kind !== "generator") throw new Error(`is a ${kind}, not a generator: give the other file`);
    if (!CONTRACTS.includes(contract)) throw new Error(`contract ${contract}, this page speaks ${CONTRACTS}`);
    const keys = ["labels", "level", "width", "size", "multiple", "trained_labels", "steering"];
    const parsed = Object.fromEntries(keys.map((key) => [key, JSON.parse(metadata[key] ?? null)]));
    return { licence, ...parsed, steering: parsed.steering ?? {} }; // contract 1 has none
  }

  /** An ONNX file's metadata, which ONNX Runtime Web does not hand out: pairs of key and value in field 14. */
  function readMetadata(bytes) {
    const metadata = {}, text = new TextDecoder();
    for (const [field, pair] of fields(bytes)) {
      if (field !== 14) continue;
      const [key, value] = [...fields(pair)].map(([, content]) => text.decode(content));
      metadata[key] = value;
    }
    return metadata;
  }

  /** The fields of a protobuf message that hold bytes: [number, bytes]. Ends where the message is none. */
  function* fields(bytes) {
    let at = 0;
    const varint = () => { // seven bits a byte, the lowest first
      for (let value = 0, scale = 1; ; scale *= 128) {
        value += (bytes[at] & 127) * scale;
        if (bytes[at++] < 128 || at > bytes.length) return value;
      }
    };
    while (at < bytes.length) {
      const tag = varint();
      const length = { 0: () => (varint(), 0), 1: () => 8, 2: varint, 5: () => 4 }[tag % 8]?.();
      if (length === undefined) return;
      if (tag % 8 === 2) yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
      at += length;
    }
  }

  async function answer({ task, given }) {
    try {
      postMessage({ result: await tasks[task](given) });
    } catch (error) {
      postMessage({ error: String(error?.message ?? error).split("\n")[0] });
    }
  }
  let last = Promise.resolve();
  onmessage = ({ data }) => { last = last.then(() => answer(data)); }; // one after the other
}

main();
