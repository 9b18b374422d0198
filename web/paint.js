/* Paint a label map, see the CT slice: the generator that export.py wrote, in the browser.

   A stroke changes the map, the worker makes a slice of it, and the slice's HU are shown through a window. Maps and
   slices are saved as the PNG files that data/slices.py describes. From top to bottom: the knobs; the worker, which is
   what Generator is in infer_onnx.py; PNG; the map and its history; painting; synthesis; files; the page.

   Nothing is built and nothing leaves the browser. ONNX Runtime Web comes from web/vendor, where `make web` puts it, or
   else from a public copy of the same npm package; either way the browser holds it to the hashes below. */

"use strict";

const LABELS = ["background", "lung", "ground-glass opacity", "consolidation"];
const COLOURS = [[0, 0, 0], [255, 0, 0], [0, 0, 255], [0, 255, 0]]; // the paper's, Fig. 1, as in data/slices.py
const NEARLY = 120; // of 442 from black to white: a colour as near as this to one of COLOURS means it
const HU_OFFSET = 1024; // stored value = HU + 1024, clipped to 0..4095

const GENERATOR = "../models/covid-ct-256.onnx"; // opened at the start, if it is there
const EXAMPLES = ["P01_S008", "P02_S015", "P07_S020", "P15_S009", "P16_S008"]; // ../models/examples/P01_S008.png, ...
const LARGEST = 1024; // pixels of a map's longer side
const MOST = { map: 2 ** 25, generator: 2 ** 30 }; // bytes of a file: what is larger is not read
const STEPS = 100; // that can be undone
const SIZE = 256; // of the built-in map, pixels, and
const WINDOW = { level: -600, width: 1500 }; // HU, before a generator says better

const RUNTIME = { // ONNX Runtime Web. A new version wants new hashes, and its number in index.html's policy
  places: ["vendor/", "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/"], // the first that has it, whole
  files: { // openssl dgst -sha384 -binary FILE | base64
    "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
  },
};

const $ = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// ---------------------------------------------------------------------------------------------- the worker

/* Holds one generator, and computes off the page's thread, so that painting never waits. It answers {id, task, ...}
   with {id, result} or {id, error}.

   The worker's script is this function's own text, which therefore uses nothing from outside it: a page opened from
   disk may start no worker from a file. */
function generatorWorker() {
  const CONTRACT = "1"; // with export.py, whose head has it in full
  const TENSORS = { "input map": "uint8", "output ct": "int16", "output alpha": "float32" };
  const isSide = (value) => Number.isInteger(value) && value >= 1 && value <= 4096; // as LARGEST in data/slices.py
  const PARSED = { // metadata that is JSON, and what it must be, as in infer_onnx.py
    labels: (value) => Array.isArray(value) && value.length >= 1 && value.length <= 4
      && value.every((label) => typeof label === "string"),
    level: Number.isFinite,
    width: (value) => Number.isFinite(value) && value > 0,
    size: isSide,
    multiple: (value) => isSide(value) && value <= 2048,
  };
  const LONGEST = 1000; // letters of a metadata's key and value
  let ort, session, info;

  /** An error in the page's own words, whatever a file's name in them says of memory. */
  class Told extends Error {}

  const tasks = {
    /** Load ONNX Runtime from the first place that has it, whole. */
    async load({ places, files }) {
      const fetched = Object.entries(files).map(([name, hash]) => fetchWhole(places, name, hash));
      const [script, wasm] = await Promise.all(fetched);
      const url = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
      ort = await import(url);
      Object.assign(ort.env.wasm, { wasmBinary: wasm, numThreads: 1 }); // more want a server with headers of its own
      ort.env.logLevel = "error";
    },

    /** Take another generator, and tell what it is. The one before stays where the file is refused. */
    async open({ name, bytes }) {
      const metadata = readMetadata(name, new Uint8Array(bytes));
      if ((metadata.kind ?? "generator") !== "generator") {
        throw new Told(`${name}: is a ${short(metadata.kind)}, not a generator: give the other file`);
      }
      const opened = await start(name, bytes);
      try {
        info = check(name, metadata, opened);
      } catch (error) {
        await opened.release();
        throw error;
      }
      await session?.release();
      session = opened;
      return info;
    },

    /** HU int16 [height * width] of labels uint8: padded with background right and below, and cropped back. */
    async synthesize({ width, height, labels }) {
      const unknown = labels.find((label) => label >= info.labels.length);
      if (unknown !== undefined) throw new Told(`${info.name} knows only ${info.labels.join(", ")}: erase the rest`);
      const [h, w] = canvas(height, width);
      const padded = new Uint8Array(h * w);
      for (let y = 0; y < height; y++) padded.set(labels.subarray(y * width, (y + 1) * width), y * w);
      const started = performance.now();
      const { ct } = await session.run({ map: new ort.Tensor("uint8", padded, [1, h, w]) }, ["ct"]);
      const seconds = (performance.now() - started) / 1000;
      const hu = new Int16Array(height * width);
      for (let y = 0; y < height; y++) hu.set(ct.data.subarray(y * w, y * w + width), y * width);
      return { width, height, hu, seconds };
    },
  };

  /** The bytes of a file of the runtime, from the first place where they have the right hash. */
  async function fetchWhole(places, name, integrity) {
    for (const place of places) {
      try {
        const reply = await fetch(place + name, { integrity });
        if (reply.ok) return await reply.arrayBuffer();
      } catch { /* not there, or not what was pinned: the next place may do */ }
    }
    throw new Told(`${name} of ONNX Runtime cannot be had: is there a network? make web fetches it once and for all`);
  }

  /** A session of a model's bytes. */
  async function start(name, bytes) {
    try {
      return await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"], logSeverityLevel: 4 });
    } catch (error) {
      if (isMemory(error)) throw error;
      throw new Told(`${name}: not a usable ONNX file (${firstLine(error)}): export it again`);
    }
  }

  /** The metadata of a generator, parsed, with the shape of its input. Throws by what it lacks of the contract. */
  function check(name, metadata, opened) {
    for (const [key, value] of Object.entries(metadata)) {
      if (/[\p{C}\p{Z}]/u.test((key + value).replaceAll(" ", "")) || (key + value).length > LONGEST) {
        throw new Told(`${name}: metadata ${short(key)} is no plain line: export it again`);
      }
    }
    const tensors = {};
    for (const value of opened.inputMetadata) tensors[`input ${value.name}`] = value.type;
    for (const value of opened.outputMetadata) tensors[`output ${value.name}`] = value.type;
    const lacks = [
      ...["kind", "contract", ...Object.keys(PARSED)].filter((key) => !(key in metadata)).map((key) => `metadata ${key}`),
      ...Object.keys(TENSORS).filter((key) => tensors[key] !== TENSORS[key]).map((key) => `${key}, ${TENSORS[key]}`),
    ];
    const foreign = `${name}: not a generator that export.py wrote`;
    if (lacks.length) throw new Told(`${foreign}: it lacks ${lacks.join("; ")}`);
    if (metadata.contract !== CONTRACT) {
      throw new Told(`${name}: contract ${short(metadata.contract)}, this page speaks ${CONTRACT}: export it again`);
    }
    const parsed = Object.fromEntries(Object.keys(PARSED).map((key) => [key, parse(name, key, metadata[key])]));
    if (Math.abs(parsed.level) + parsed.width / 2 > 2 ** 15 - 1) {
      const told = `a window of level ${parsed.level} and width ${parsed.width} HU, which its output cannot hold`;
      throw new Told(`${name}: ${told}: export it again`);
    }
    const fixed = opened.inputMetadata[0].shape.map((side) => (typeof side === "number" ? side : null));
    if (fixed.length !== 3 || fixed.some((side) => side !== null && !isSide(side))) {
      throw new Told(`${name}: its map is of shape ${fixed}, not [N, H, W]: export it again`);
    }
    return { name, licence: "", ...metadata, ...parsed, fixed };
  }

  /** A value of the metadata, held to what PARSED says of it. */
  function parse(name, key, text) {
    let value;
    try {
      value = JSON.parse(text);
    } catch { /* no JSON: nothing */ }
    if (!PARSED[key](value)) {
      throw new Told(`${name}: metadata ${key} is ${JSON.stringify(text.slice(0, 80))}: export it again`);
    }
    return value;
  }

  /** Height and width that the generator takes a map in: two multiples at least, as in infer_onnx.py. */
  function canvas(height, width) {
    return [height, width].map((side, i) => {
      const taken = info.fixed[i + 1] ?? Math.max(2, Math.ceil(side / info.multiple)) * info.multiple;
      if (side > taken) throw new Told(`${height} x ${width} pixels are more than ${info.name} takes: shrink the map`);
      return taken;
    });
  }

  /** An ONNX file's metadata, which ONNX Runtime Web does not hand out: pairs of key and value in field 14. */
  function readMetadata(name, bytes) {
    const metadata = {}, text = new TextDecoder();
    try {
      for (const [field, pair] of fields(bytes)) {
        if (field !== 14) continue;
        const [key, value = ""] = [...fields(pair)].map(([, content]) => text.decode(content));
        metadata[key] = value;
      }
    } catch {
      throw new Told(`${name}: not a usable ONNX file: give the generator.onnx that export.py wrote`);
    }
    return metadata;
  }

  /** The fields of a protobuf message that hold bytes: [number, bytes]. Throws where the message is none. */
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
      const length = { 0: () => (varint(), 0), 1: () => 8, 2: varint, 5: () => 4 }[tag % 8]();
      if (at + length > bytes.length) throw new Told("cut short");
      if (tag % 8 === 2) yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
      at += length;
    }
  }

  const short = (text) => text.slice(0, 80).replace(/\p{C}/gu, "?"); // a file's own word, fit to be shown
  const firstLine = (error) => String(error?.message ?? error).split("\n")[0].slice(0, 500);
  const isMemory = (error) => !(error instanceof Told) && /memory|bad_alloc|allocat|Aborted/i.test(firstLine(error));

  async function answer({ id, task, ...given }) {
    try {
      const result = await tasks[task](given);
      postMessage({ id, result }, result?.hu ? [result.hu.buffer] : []);
    } catch (error) {
      postMessage({ id, error: firstLine(error), memory: isMemory(error) });
    }
  }
  let last = Promise.resolve();
  onmessage = ({ data }) => { last = last.then(() => answer(data)); }; // one after the other
}

/** A worker's tasks as functions: ask("open", {...}) is a promise of its result, or of an Error with one line. */
function startWorker() {
  const url = URL.createObjectURL(new Blob([`(${generatorWorker})()`], { type: "text/javascript" }));
  const worker = new Worker(url), waiting = new Map();
  let asked = 0;
  worker.onmessage = ({ data: { id, result, error, memory } }) => {
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (error) reject(Object.assign(new Error(error), { memory }));
    else resolve(result);
  };
  worker.onerror = ({ message }) => {
    const error = new Error(`the worker stopped (${message}): reload the page`);
    for (const { reject } of waiting.values()) reject(error);
  };
  const ask = (task, given, transfer = []) => new Promise((resolve, reject) => {
    waiting.set(++asked, { resolve, reject });
    worker.postMessage({ id: asked, task, ...given }, transfer);
  });
  const { files } = RUNTIME;
  const places = RUNTIME.places.map((place) => new URL(place, document.baseURI).href);
  return { ask, ready: ask("load", { places, files }), stop: () => worker.terminate() };
}

// ---------------------------------------------------------------------------------------------- PNG
// By hand in both directions: a canvas writes no 16-bit PNG, and on reading it mixes colours and forgets palettes.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const CHANNELS = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 }; // by colour type: grey, RGB, palette, grey and alpha, RGBA
const KINDS = { 0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA" };

/** Send bytes through a CompressionStream or DecompressionStream of zlib's format, which is PNG's. Throws where more
    than `most` bytes come out: a small file may unpack to any size. */
async function through(stream, bytes, most = Infinity) {
  const parts = [];
  let length = 0;
  for (const reader = new Blob([bytes]).stream().pipeThrough(stream).getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    length += value.length;
    if (length > most) {
      await reader.cancel();
      throw new Error("it holds more than its header says");
    }
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** The CRC-32 that closes each chunk of a PNG. */
function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (0xedb88320 & -(crc & 1));
  }
  return ~crc >>> 0;
}

/** One chunk of a PNG: length, type, content, CRC. */
function chunk(type, content) {
  const bytes = new Uint8Array(12 + content.length), view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(content, 8);
  view.setUint32(8 + content.length, crc32(bytes.subarray(4, 8 + content.length)));
  return bytes;
}

/** A PNG of raw rows, one channel of 8 or 16 bits, with a palette or grey. */
async function writePng(width, height, depth, raw, palette = null) {
  const header = new DataView(new ArrayBuffer(13)), stride = (width * depth) / 8;
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, depth);
  header.setUint8(9, palette ? 3 : 0);
  const rows = new Uint8Array(height * (stride + 1)); // each begins with its filter: 0, none
  for (let y = 0; y < height; y++) rows.set(raw.subarray(y * stride, (y + 1) * stride), y * (stride + 1) + 1);
  const content = await through(new CompressionStream("deflate"), rows);
  const colours = palette ? [chunk("PLTE", new Uint8Array(palette.flat()))] : [];
  const chunks = [chunk("IHDR", new Uint8Array(header.buffer)), ...colours, chunk("IDAT", content), chunk("IEND", [])];
  return new Blob([new Uint8Array(SIGNATURE), ...chunks], { type: "image/png" });
}

/** A PNG's header, samples [height * width * channels], palette [[r, g, b]] and opacities. Throws where it is none. */
async function readPng(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset), found = { IDAT: [] };
  if (!SIGNATURE.every((byte, i) => bytes[i] === byte)) throw new Error("it does not begin like a PNG");
  for (let at = 8, length; !found.IEND; at += 12 + length) {
    length = at + 12 <= bytes.length ? view.getUint32(at) : Infinity;
    if (at + 12 + length > bytes.length) throw new Error("it is cut short");
    const whole = bytes.subarray(at + 4, at + 8 + length), content = whole.subarray(4);
    const type = String.fromCharCode(...whole.subarray(0, 4));
    const told = /^[A-Za-z]{4}$/.test(type) ? type : "part of no known kind";
    if (crc32(whole) !== view.getUint32(at + 8 + length)) throw new Error(`its ${told} is damaged`);
    const twice = found[type] || found.IDAT.length; // of two, readers differ in which they take
    if (["IHDR", "PLTE", "tRNS"].includes(type) && twice) throw new Error(`its ${type} stands where none may`);
    if (type === "IDAT") found.IDAT.push(content);
    else found[type] = content;
  }
  if (found.IHDR?.length !== 13) throw new Error("it has no header");
  const header = new DataView(found.IHDR.slice().buffer);
  const png = { width: header.getUint32(0), height: header.getUint32(4), depth: found.IHDR[8], type: found.IHDR[9] };
  const { width, height } = png;
  if (found.PLTE?.length > 768) throw new Error("its palette has more than 256 colours");
  if (!width || !height || Math.max(width, height) > LARGEST) throw new Error(`not 1 to ${LARGEST} pixels a side`);
  const depths = { 0: [1, 2, 4, 8, 16], 2: [8, 16], 3: [1, 2, 4, 8], 4: [8, 16], 6: [8, 16] }[png.type];
  if (!depths?.includes(png.depth)) throw new Error("its pixel format is not valid in PNG");
  if (found.IHDR[12]) throw new Error("it is interlaced");
  const most = height * (width * 8 + 1); // of RGBA in 16 bits
  const raw = await through(new DecompressionStream("deflate"), await new Blob(found.IDAT).arrayBuffer(), most);
  const palette = [];
  for (let i = 0; i < (found.PLTE?.length ?? 0); i += 3) palette.push([...found.PLTE.subarray(i, i + 3)]);
  return { ...png, samples: unpack(unfilter(raw, png), png), palette, opacities: found.tRNS ?? [] };
}

/** Undo PNG's filters: each byte was written less a guess from those at its left, above, and above left. */
function unfilter(raw, { width, height, depth, type }) {
  const bits = depth * CHANNELS[type], step = Math.ceil(bits / 8), stride = Math.ceil((width * bits) / 8);
  if (raw.length < height * (stride + 1)) throw new Error("it is cut short");
  const rows = new Uint8Array(height * stride);
  for (let y = 0; y < height; y++) {
    const filter = raw[y * (stride + 1)];
    if (filter > 4) throw new Error(`its row ${y} has an unknown filter`);
    for (let x = 0; x < stride; x++) {
      const at = y * stride + x;
      const left = x >= step ? rows[at - step] : 0;
      const above = y ? rows[at - stride] : 0;
      const corner = x >= step && y ? rows[at - stride - step] : 0;
      const guess = [0, left, above, (left + above) >> 1, paeth(left, above, corner)][filter];
      rows[at] = raw[y * (stride + 1) + 1 + x] + guess;
    }
  }
  return rows;
}

/** PNG's Paeth predictor: whichever is nearest to left + above - corner. */
function paeth(left, above, corner) {
  const [a, b, c] = [above - corner, left - corner, left + above - 2 * corner].map(Math.abs);
  if (a <= b && a <= c) return left;
  return b <= c ? above : corner;
}

/** Samples of less than a byte, which a palette of few colours has, to one byte each; rows begin with a byte. */
function unpack(rows, { width, height, depth }) {
  if (depth >= 8) return rows;
  const samples = new Uint8Array(height * width), stride = Math.ceil((width * depth) / 8);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const bit = x * depth;
      samples[y * width + x] = (rows[y * stride + (bit >> 3)] >> (8 - depth - (bit & 7))) & (2 ** depth - 1);
    }
  }
  return samples;
}

/** The labels in a PNG as read_map in data/slices.py reads it: by colour where the paper's are, else by value. */
async function readMap(name, bytes) {
  let png;
  try {
    png = await readPng(bytes);
  } catch (error) {
    throw new Error(`${name}: not a readable PNG (${error.message}): write it again`);
  }
  const { width, height, depth, type, samples, palette, opacities } = png;
  if (type === 4 || (type !== 3 && depth !== 8)) {
    throw new Error(`${name}: a ${depth}-bit ${KINDS[type]} PNG is no label map: give 8-bit grey, palette or RGB`);
  }
  const channels = CHANNELS[type], labels = new Uint8Array(width * height);
  const colours = Array.from({ length: 256 }, (_, i) => (opacities[i] === 0 ? COLOURS[0] : palette[i] ?? COLOURS[0]));
  const byColour = type !== 0 && (type !== 3 || decides(colours, samples) || contradicts(colours, samples));
  for (let i = 0; i < labels.length; i++) {
    const sample = samples.subarray(i * channels, (i + 1) * channels);
    const colour = type === 3 ? colours[sample[0]] : sample[3] === 0 ? COLOURS[0] : sample;
    labels[i] = byColour ? labelOf(colour) : sample[0];
    if (labels[i] >= LABELS.length) {
      const found = byColour ? `colour ${[...colour].slice(0, 3)}` : `label ${labels[i]}`;
      const allowed = byColour ? `none of ${COLOURS.map((known) => `(${known})`).join(", ")}` : "not one of 0, 1, 2, 3";
      throw new Error(`${name}: ${found} at row ${Math.floor(i / width)}, column ${i % width} is ${allowed}`);
    }
  }
  return { width, height, labels };
}

const sameColour = (a, b) => a[0] === b[0] && a[1] === b[1] && a[2] === b[2];

/** The label of a colour, 255 for none. */
function labelOf(colour) {
  const label = COLOURS.findIndex((known) => sameColour(known, colour));
  return label < 0 ? 255 : label;
}

/** Whether a palette tells the label: it holds one of the paper's colours, or the whole map is plain black. */
function decides(palette, samples) {
  const empty = samples.every((sample) => sample === samples[0]) && sameColour(palette[samples[0]], COLOURS[0]);
  return empty || palette.some((colour) => labelOf(colour) % 255 > 0);
}

/** Whether the colours used are nearly the paper's, each its own, and mean other labels than their indices. */
function contradicts(palette, samples) {
  const used = [...new Set(samples)];
  const nearest = used.map((sample) => {
    const distances = COLOURS.map((known) => Math.hypot(...known.map((value, k) => value - palette[sample][k])));
    const distance = Math.min(...distances);
    return { sample, distance, meant: distances.indexOf(distance) };
  });
  const apart = new Set(nearest.map(({ meant }) => meant)).size === used.length;
  return apart && nearest.every(({ distance }) => distance <= NEARLY)
    && nearest.some(({ sample, meant }) => meant > 0 && meant !== sample);
}

const mapPng = ({ width, height, labels }) => writePng(width, height, 8, labels, COLOURS);

/** The 16-bit grey PNG of HU + 1024 that data/slices.py reads, high byte first. */
function ctPng({ width, height, hu }) {
  const stored = new DataView(new ArrayBuffer(2 * hu.length));
  hu.forEach((value, i) => stored.setUint16(2 * i, clamp(value + HU_OFFSET, 0, 4095)));
  return writePng(width, height, 16, new Uint8Array(stored.buffer));
}

// ---------------------------------------------------------------------------------------------- the map, its history

const state = {
  map: null, // {name, width, height, labels uint8}; a step begins with a copy, so that those before can be kept
  past: [], future: [], // maps
  kept: null, // the map that was saved, opened or started from last
  generator: null, // the metadata of the one that is open
  ct: null, // {width, height, hu int16, seconds} of a map
  stale: true, // the map has changed since the slice was asked for
  busy: false, // the worker is at a slice
};

/** Two lungs, the simplest map that a generator makes something of. */
function drawLungs(size) {
  const labels = new Uint8Array(size * size);
  const ellipse = (x, y, rx, ry) => (x / rx) ** 2 + (y / ry) ** 2 < 1; // around 0
  for (let i = 0; i < labels.length; i++) {
    const x = (2 * (i % size) + 1) / size - 1, y = (2 * Math.floor(i / size) + 1) / size - 1; // -1 to 1
    const lungs = ellipse(Math.abs(x) - 0.42, y, 0.35 + 0.08 * y, 0.66);
    const heart = ellipse(x - 0.14, y + 0.2, 0.36, 0.3), spine = ellipse(x, y - 0.4, 0.2, 0.5);
    labels[i] = lungs && !heart && !spine ? 1 : 0;
  }
  return { name: "lungs", width: size, height: size, labels };
}

/** Put another map in the place of the present one, as a step that can be undone. */
function replaceMap(map) {
  finishStroke();
  state.past.push(state.map);
  Object.assign(state, { map, future: [] });
  state.past.splice(0, state.past.length - STEPS);
  mapChanged();
}

/** Change labels in a copy of the map; the step counts only where it changes something. */
function step(edit) {
  finishStroke();
  const before = state.map;
  state.map = { ...before, labels: before.labels.slice() };
  edit();
  keepStep(before);
}

/** Enter the map as it is now into the history, if it differs from the one before. */
function keepStep(before) {
  const after = state.map;
  state.map = before;
  if (after.labels.some((label, i) => label !== before.labels[i])) replaceMap(after);
  else if (chosen("label") > 1 && $("inside").checked) say("Nothing changed. Lesions stay inside the lung.");
}

/** Go a step back or on: from one list of maps to the other. */
function travel(from, to) {
  if (!from.length || stroke) return;
  to.push(state.map);
  state.map = from.pop();
  mapChanged();
}

// ---------------------------------------------------------------------------------------------- painting

let stroke = null; // {before, x, y} while the pointer is down
const chosen = (name) => document.querySelector(`[name=${name}]:checked`).value; // of label, tool

/** A function that sets one pixel to the chosen label: a lesion only where there is lung, if that is wanted. */
function painter() {
  const { labels } = state.map, value = Number(chosen("label")), anywhere = value < 2 || !$("inside").checked;
  return (i) => { if (anywhere || labels[i]) labels[i] = value; };
}

/** Paint a disc around a point of the map. */
function paintDisc(x, y) {
  const { width, height } = state.map, radius = $("size").value / 2, paint = painter();
  for (let j = Math.max(0, Math.floor(y - radius)); j <= Math.min(height - 1, y + radius); j++) {
    for (let i = Math.max(0, Math.floor(x - radius)); i <= Math.min(width - 1, x + radius); i++) {
      if ((i + 0.5 - x) ** 2 + (j + 0.5 - y) ** 2 <= radius ** 2) paint(j * width + i);
    }
  }
}

/** Paint along the way that the pointer came. */
function paintLine(from, to) {
  const dx = to.x - from.x, dy = to.y - from.y, steps = Math.max(1, Math.ceil(Math.hypot(dx, dy)));
  const middle = (place) => Math.floor(place) + 0.5; // of the pixel: between pixels, a small brush paints none
  for (let k = 1; k <= steps; k++) paintDisc(middle(from.x + (dx * k) / steps), middle(from.y + (dy * k) / steps));
}

/** Paint all pixels of one label that hang together with this one by their sides. */
function fill(x, y) {
  const { width, height, labels } = state.map, paint = painter();
  const stack = [Math.floor(y) * width + Math.floor(x)], old = labels[stack[0]];
  while (stack.length) {
    const i = stack.pop();
    if (labels[i] !== old) continue;
    paint(i);
    if (labels[i] === old) return; // it is of that label, or may not be painted; and so is all the rest
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

function beginStroke(event) {
  if (!event.isPrimary || event.button !== 0) return;
  const point = pointOn($("map"), event);
  if (chosen("tool") === "fill") return void step(() => fill(point.x, point.y));
  $("map").setPointerCapture(event.pointerId);
  stroke = { before: state.map, ...point };
  state.map = { ...state.map, labels: state.map.labels.slice() };
  moveStroke(event);
}

function moveStroke(event) {
  const point = pointOn($("map"), event);
  showRing(point);
  showReadout(point);
  if (!stroke || !event.isPrimary) return;
  paintLine(stroke, point);
  Object.assign(stroke, point);
  drawMap();
  synthesize();
}

function endStroke(event) {
  if (event.isPrimary) finishStroke();
}

/** Enter the stroke that is being painted, if any, as a step of its own. */
function finishStroke() {
  if (!stroke) return;
  const { before } = stroke;
  stroke = null;
  keepStep(before);
  drawMap();
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };

/** Move the brush by an arrow key, and paint by the space bar. */
function paintByKey(event) {
  if (!(event.key in MOVES) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const { width, height } = state.map, pixels = event.shiftKey ? 10 : 1, [dx, dy] = MOVES[event.key];
  const x = clamp(ring.x + pixels * dx, 0.5, width - 0.5), y = clamp(ring.y + pixels * dy, 0.5, height - 0.5);
  showRing({ x, y });
  showReadout({ x, y });
  if (event.key === " ") step(() => (chosen("tool") === "fill" ? fill(x, y) : paintDisc(x, y)));
}

// ---------------------------------------------------------------------------------------------- synthesis

let worker = null;
const turns = { map: 0, generator: 0, opened: 0 }; // how often a file was asked for, and which generator it then was

/** Ask for the slice of the map as it is. While one is being made the newest map waits; those between are dropped. */
async function synthesize() {
  state.stale = true;
  showButtons();
  if (state.busy || !state.generator) return;
  state.busy = true;
  while (state.stale && state.generator) {
    state.stale = false;
    $("timing").textContent = "drawing …";
    const { width, height, labels } = state.map;
    try {
      state.ct = await worker.ask("synthesize", { width, height, labels });
      drawCt();
    } catch (error) {
      failed(error, `${width} x ${height}`);
    }
  }
  state.busy = false;
  showButtons();
}

/** Say why there is no slice. A runtime that has run out of memory is of no more use: it starts anew. */
function failed(error, size) {
  state.ct = null;
  $("timing").textContent = "";
  $("ct").getContext("2d").clearRect(0, 0, $("ct").width, $("ct").height);
  complain(error.message);
  if (!error.memory) return;
  complain(`Not enough memory for ${size} pixels (${error.message}): shrink the map, and open the generator again`);
  $("about").textContent = "No generator.";
  state.generator = null;
  worker.stop();
  worker = startWorker();
}

/** Open a generator from a promise of its bytes. The one before stays where the file is refused, and a later one where
    this comes late. */
async function openGenerator(name, content) {
  const turn = ++turns.generator, before = turns.opened;
  say(`Loading ${name} …`);
  try {
    const [bytes] = await Promise.all([content, worker.ready]);
    if (turns.opened > turn) return;
    turns.opened = turn;
    state.generator = await worker.ask("open", { name, bytes }, [bytes]);
  } catch (error) {
    if (turns.opened > turn) return;
    turns.opened = before;
    return void complain(error.memory ? `${name}: not enough memory to load it: ${error.message}` : error.message);
  }
  const { size, licence } = state.generator;
  $("about").textContent = `${name}, trained at ${size} x ${size} pixels. ${licence}`;
  if (!state.past.length && !state.future.length && !stroke) state.map = drawLungs(size); // nobody has touched it
  resetWindow();
  mapChanged();
  say("Paint on the map: the slice follows. Everything runs in this browser, and nothing is uploaded.");
}

/** The bytes of the generator that comes with the repository. */
async function shippedGenerator() {
  const mend = 'drop onto the page a generator.onnx that export.py wrote, or press "Open a generator"';
  if (location.protocol === "file:") throw new Error(`Opened from disk, the page cannot read files by itself: ${mend}`);
  return get(GENERATOR, mend);
}

// ---------------------------------------------------------------------------------------------- files

/** The bytes of a file of the repository. */
async function get(path, mend) {
  const reply = await fetch(path).catch(() => null); // no server, or opened from disk
  if (!reply?.ok) throw new Error(`There is no ${path.replace("../", "")} here: ${mend}`);
  return reply.arrayBuffer();
}

/** Open what was picked or dropped, by its ending. */
async function openFile(file) {
  const kind = /\.onnx$/i.test(file.name) ? "generator" : /\.png$/i.test(file.name) ? "map" : null;
  if (!kind) complain(`${file.name}: neither a label map, .png, nor a generator, .onnx`);
  else if (file.size > MOST[kind]) complain(`${file.name}: ${file.size} bytes, more than any ${kind} has`);
  else if (kind === "map") await openMap(file.name, file.arrayBuffer());
  else await openGenerator(file.name, file.arrayBuffer());
}

/** Open a label map from a promise of its bytes, with a word where it has not the size that the generator knows. One
    that comes late gives way to the one asked for last. */
async function openMap(file, content) {
  const turn = ++turns.map;
  try {
    const map = await readMap(file, new Uint8Array(await content));
    if (turn < turns.map) return;
    replaceMap({ name: file.replace(/\.[^.]*$/, ""), ...map });
    state.kept = state.map;
    const { width, height } = map, size = state.generator?.size ?? width;
    const note = width === size && height === size ? "" : ` The generator was trained at ${size} x ${size}.`;
    say(`${file}: ${width} x ${height} pixels.${note}`);
  } catch (error) {
    if (turn === turns.map) complain(error.message);
  }
}

/** Start from the built-in map, "", or an example. */
async function startFrom(name) {
  if (!name && ++turns.map) {
    replaceMap(drawLungs(state.generator?.size ?? SIZE));
    state.kept = state.map;
  } else await openMap(`${name}.png`, get(`../models/examples/${name}.png`, "press \"Open a map\" instead"));
}

/** Hand a file to the user, from a promise of it: by then the map may be another, and so its name. */
async function saveAs(content, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// ---------------------------------------------------------------------------------------------- the page

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
  synthesize();
}

/** Fill a canvas with pixels 0xAABBGGRR, and give its frame their shape. */
function draw(canvas, width, height, pixel) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  canvas.parentElement.style.setProperty("--aspect", width / height);
  const image = new ImageData(width, height), pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = pixel(i);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function drawMap() {
  const { name, width, height, labels } = state.map;
  const colours = COLOURS.map(([r, g, b]) => (0xff000000 | (b << 16) | (g << 8) | r) >>> 0);
  draw($("map"), width, height, (i) => colours[labels[i]]);
  $("map-name").textContent = `${name}, ${width} x ${height}`;
  showButtons();
}

/** Show the slice through the window, as windowed in data/slices.py. */
function drawCt() {
  if (!state.ct) return;
  const { width, height, hu, seconds } = state.ct, level = Number($("level").value), span = Number($("width").value);
  draw($("ct"), width, height, (i) => {
    const grey = Math.floor(clamp((hu[i] - level) / span + 0.5, 0, 1) * 255 + 0.5);
    return (0xff000000 | (grey * 0x010101)) >>> 0;
  });
  $("timing").textContent = `${seconds.toFixed(2)} s`;
}

/** Set the sliders to the generator's own window. */
function resetWindow() {
  const { level, width } = state.generator ?? WINDOW;
  for (const [id, value] of [["level", level], ["width", width]]) { // a slider would round it, or stop at its end
    const slider = $(id);
    Object.assign(slider, { min: Math.min(slider.min, value), max: Math.max(slider.max, value) });
    slider.step = (value - slider.min) % 10 ? "any" : 10;
    slider.value = value;
  }
  showSliders();
  drawCt();
}

function showSliders() {
  for (const [id, unit] of [["size", "px"], ["level", "HU"], ["width", "HU"]]) {
    $(id).parentElement.querySelector("output").textContent = `${$(id).value} ${unit}`;
  }
  showRing(ring);
}

function showButtons() {
  $("undo").disabled = !state.past.length;
  $("redo").disabled = !state.future.length;
  $("save-ct").disabled = state.stale || state.busy || !state.ct;
  showReadout();
}

/** Show the brush: a circle of its size on the map. */
function showRing(point) {
  ring = point;
  const { width, height } = state.map, size = chosen("tool") === "fill" ? 1 : $("size").value;
  Object.assign($("ring").style, { left: `${(100 * point.x) / width}%`, top: `${(100 * point.y) / height}%` });
  Object.assign($("ring").style, { width: `${(100 * size) / width}%`, height: `${(100 * size) / height}%` });
}

/** Say what is at a point, or at the one before: its label and, of the slice of this very map, its HU. */
function showReadout(point = pointed) {
  if (!point) return;
  pointed = point;
  const { map, ct, stale, busy } = state, row = Math.floor(point.y), column = Math.floor(point.x);
  const at = row * map.width + column, inside = row < map.height && column < map.width;
  const hu = inside && ct && !stale && !busy ? `, ${clamp(ct.hu[at], -HU_OFFSET, 4095 - HU_OFFSET)} HU` : "";
  const label = inside ? LABELS[map.labels[at]] : "outside the map";
  $("readout").textContent = `Row ${row}, column ${column}: ${label}${hu}`; // HU as they are saved
}

const choose = (name, value) => { document.querySelector(`[name=${name}][value="${value}"]`).checked = true; };
const undo = () => travel(state.past, state.future);
const redo = () => travel(state.future, state.past);

function shortcut(event) {
  const key = event.key.toLowerCase();
  const resize = (change) => { $("size").value = Number($("size").value) + change; showSliders(); };
  if (event.ctrlKey || event.metaKey) {
    const action = { z: event.shiftKey ? redo : undo, y: redo }[key];
    if (action) { event.preventDefault(); action(); }
    return;
  }
  if (event.altKey || event.target.matches("select")) return;
  if (/^[0-3]$/.test(key)) choose("label", key);
  else if (key === "e") choose("label", 0);
  else if (key === "b") choose("tool", "brush");
  else if (key === "f") choose("tool", "fill");
  else if (key === "[" || key === "]") resize(key === "[" ? -2 : 2);
}

/** Join the controls with what they do. */
function wire() {
  const on = (target, events, action) => events.split(" ").forEach((event) => target.addEventListener(event, action));
  on($("map"), "pointerdown", beginStroke);
  on($("map"), "pointermove", moveStroke);
  on($("map"), "pointerup pointercancel", endStroke);
  on($("map"), "keydown", paintByKey);
  on($("ct"), "pointermove", (event) => state.ct && showReadout(pointOn($("ct"), event)));
  on(document, "keydown", shortcut);
  on($("size"), "input", showSliders);
  on($("level"), "input", () => { showSliders(); drawCt(); });
  on($("width"), "input", () => { showSliders(); drawCt(); });
  on($("reset"), "click", resetWindow);
  on($("undo"), "click", undo);
  on($("redo"), "click", redo);
  on($("clear"), "click", () => step(() => state.map.labels.fill(0)));
  on($("save-map"), "click", () => {
    saveAs(mapPng(state.map), `${state.map.name}_map.png`);
    state.kept = state.map;
  });
  on(window, "beforeunload", (event) => { // the browser asks, else the drawing would be lost
    if (state.past.length && state.kept !== state.map) event.returnValue = true; // older browsers want this way
  });
  on($("save-ct"), "click", () => saveAs(ctPng(state.ct), `${state.map.name}_ct.png`));
  on($("start"), "change", () => {
    startFrom($("start").value);
    $("start").selectedIndex = 0; // a menu: what was chosen may be chosen again
  });
  for (const what of ["map", "generator"]) {
    on($(`open-${what}`), "click", () => $(`${what}-file`).click());
    on($(`${what}-file`), "change", async ({ target }) => {
      if (target.files[0]) await openFile(target.files[0]);
      target.value = ""; // so that the same file can be opened again
    });
  }
  on(document, "dragover dragleave drop", (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", event.type === "dragover");
    if (event.type === "drop" && event.dataTransfer.files[0]) openFile(event.dataTransfer.files[0]);
  });
}

/** What this browser lacks, in one line; empty where it has all. */
function lacking() {
  const needed = { WebAssembly: "WebAssembly", Worker: "web workers", DecompressionStream: "DecompressionStream" };
  const lacks = Object.keys(needed).filter((name) => !(name in window)).map((name) => needed[name]);
  return lacks.length ? `This browser lacks ${lacks.join(", ")}: use a current Firefox, Chrome, Edge or Safari.` : "";
}

async function main() {
  state.map = drawLungs(SIZE);
  $("start").append(new Option("Two lungs", ""), ...EXAMPLES.map((name) => new Option(name, name)));
  wire();
  resetWindow();
  drawMap();
  if (lacking()) return void complain(lacking());
  worker = startWorker();
  worker.ready.catch((error) => complain(error.message));
  await openGenerator(GENERATOR.split("/").pop(), shippedGenerator());
}

main();
