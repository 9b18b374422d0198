/* Files of maps and slices, for paint.js: PNG as data/slices.py has it, and axial slices of NIfTI-1 volumes. */

"use strict";

// ---------------------------------------------------------------------------------------------- PNG
// By hand in both directions: a canvas writes no 16-bit PNG, and on reading it mixes colours and forgets palettes.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const CHANNELS = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 }; // by colour type: grey, RGB, palette, grey and alpha, RGBA

const mapPng = ({ width, height, labels }) => writePng(width, height, 8, labels, COLOURS);
const stored = (hu) => clamp(hu + HU_OFFSET, 0, 4095);

/** The 16-bit grey PNG of HU + 1024 that data/slices.py reads, high byte first. */
function ctPng({ map, hu }) {
  const samples = new DataView(new ArrayBuffer(2 * hu.length));
  hu.forEach((value, i) => samples.setUint16(2 * i, stored(value)));
  return writePng(map.width, map.height, 16, new Uint8Array(samples.buffer));
}

/** A PNG of raw rows, one channel of 8 or 16 bits, with a palette or grey. */
async function writePng(width, height, depth, raw, palette = null) {
  const stride = (width * depth) / 8, rows = new Uint8Array(height * (stride + 1)); // each begins with a 0: no filter
  for (let y = 0; y < height; y++) rows.set(raw.subarray(y * stride, (y + 1) * stride), y * (stride + 1) + 1);
  const content = await through(new CompressionStream("deflate"), rows);
  const header = [...uint32(width), ...uint32(height), depth, palette ? 3 : 0, 0, 0, 0];
  const colours = palette ? [chunk("PLTE", palette.flat())] : [];
  const chunks = [chunk("IHDR", header), ...colours, chunk("IDAT", content), chunk("IEND", [])];
  return new Blob([new Uint8Array(SIGNATURE), ...chunks], { type: "image/png" });
}

/** Send bytes through a CompressionStream or DecompressionStream of zlib's format, which is PNG's. */
async function through(stream, bytes) {
  return new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(stream)).arrayBuffer());
}

const uint32 = (value) => [24, 16, 8, 0].map((shift) => (value >>> shift) & 255);

/** One chunk of a PNG: length, type, content, CRC. */
function chunk(type, content) {
  const named = new Uint8Array([...new TextEncoder().encode(type), ...content]);
  return new Uint8Array([...uint32(content.length), ...named, ...uint32(crc32(named))]);
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

/** What a PNG holds, by the rules of data/slices.py: labels, or a slice's HU, int16. Throws for what is neither. */
async function readMapOrSlice(bytes) {
  const png = await readPng(bytes).catch((error) => {
    throw new Error(`not a readable PNG (${error.message}): write it again, without interlacing`);
  });
  const { width, height, depth, type, samples } = png;
  if (type === 0 && depth === 16) {
    const values = Uint16Array.from({ length: width * height }, (_, i) => 256 * samples[2 * i] + samples[2 * i + 1]);
    if (values.some((value) => value > 4095)) throw new Error(`no slice: store HU + ${HU_OFFSET}, clipped to 0..4095`);
    return { width, height, hu: Int16Array.from(values, (value) => value - HU_OFFSET) };
  }
  if (type === 4 || (type !== 3 && depth !== 8)) {
    throw new Error(`give a label map of 8-bit grey, palette or RGB, or a slice of 16-bit grey, HU + ${HU_OFFSET}`);
  }
  const contentAt = contentOf(png), labels = new Uint8Array(width * height);
  for (let i = 0; i < labels.length; i++) {
    const content = contentAt(i), label = labelOf(content);
    if (!(label in LABELS)) {
      const told = typeof content === "number" ? `label ${content}` : `colour ${content}`;
      const place = `row ${Math.floor(i / width)}, column ${i % width}`;
      throw new Error(`${told} at ${place}: give labels 0 to 3, or exactly the colours ${COLOURS.join("; ")}`);
    }
    labels[i] = label;
  }
  return { width, height, labels };
}

/** What pixel i holds, as a function: a label, or a colour where colours tell the labels. */
function contentOf({ type, samples, palette }) {
  if (type === 2) return (i) => samples.subarray(3 * i, 3 * i + 3);
  if (type === 6) return (i) => (samples[4 * i + 3] ? samples.subarray(4 * i, 4 * i + 3) : COLOURS[0]); // 0: erased
  if (type === 3 && decides(palette, samples)) return (i) => palette[samples[i]];
  return (i) => samples[i];
}

/** Whether a palette tells the labels, and not only dresses them up: it holds the paper's colours, or all is black. */
function decides(palette, samples) {
  const empty = samples.every((sample) => sample === samples[0]) && labelOf(palette[samples[0]]) === 0;
  return empty || palette.some((colour) => labelOf(colour) > 0);
}

/** The label that a label or a colour means; -1 for a colour that is none of the paper's. */
function labelOf(content) {
  if (typeof content === "number") return content;
  return COLOURS.findIndex((colour) => colour.every((value, k) => value === content[k]));
}

/** A PNG's header, samples [height * width * channels], and palette of 256, transparent and missing colours black. */
async function readPng(bytes) {
  if (!SIGNATURE.every((byte, i) => bytes[i] === byte)) throw new Error("it does not begin like a PNG");
  const view = new DataView(bytes.buffer), found = {}, data = [];
  for (let at = 8; !found.IEND;) { // past the end of a file that is cut short, DataView throws
    const length = view.getUint32(at), type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    found[type] = bytes.subarray(at + 8, at + 8 + length);
    if (type === "IDAT") data.push(found.IDAT);
    at += 12 + length;
  }
  const [depth, type, , , interlaced] = found.IHDR.subarray(8);
  const width = view.getUint32(16), height = view.getUint32(20), png = { width, height, depth, type };
  if (interlaced) throw new Error("interlaced");
  const raw = await through(new DecompressionStream("deflate"), await new Blob(data).arrayBuffer());
  const { PLTE = [], tRNS = [] } = found;
  const palette = Array.from({ length: 256 }, (_, i) => {
    const visible = 3 * i < PLTE.length && tRNS[i] !== 0;
    return visible ? PLTE.slice(3 * i, 3 * i + 3) : COLOURS[0];
  });
  return { ...png, samples: unpack(unfilter(raw, png), png), palette };
}

/** Undo PNG's filters: each byte was written less a guess from those at its left, above, and above left. */
function unfilter(raw, { width, height, depth, type }) {
  const bits = depth * CHANNELS[type], step = Math.ceil(bits / 8), stride = Math.ceil((width * bits) / 8);
  const rows = new Uint8Array(height * stride);
  for (let y = 0; y < height; y++) {
    const filter = raw[y * (stride + 1)];
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

// ---------------------------------------------------------------------------------------------- NIfTI

const VOXELS = { // by the header's data type
  2: Uint8Array, 4: Int16Array, 8: Int32Array, 16: Float32Array, 64: Float64Array, 256: Int8Array, 512: Uint16Array,
};

/** The slice of this number, 1 at the feet, which ask(depth) gives: {width, height, lies, labels uint8 or hu int16}.

    The front comes up and the patient's right to the left, by the header's sform. lies: where its first pixel is, and
    the width and height of one, mm. Throws for what is neither labels nor HU. */
async function readNifti(bytes, ask) {
  const packed = bytes[0] === 0x1f && bytes[1] === 0x8b;
  const whole = packed ? await through(new DecompressionStream("gzip"), bytes).catch(() => new Uint8Array()) : bytes;
  const view = new DataView(whole.buffer, whole.byteOffset), mend = "take it through data/prepare.py";
  const [int, float] = [(at) => view.getInt16(at, true), (at) => view.getFloat32(at, true)];
  const isWhole = whole.length > 352 && view.getInt32(0, true) === 348 && view.getInt16(344) === 0x6e2b; // "n+"
  if (!isWhole || float(108) < 352) throw new Error(`no whole NIfTI-1 file, little-endian: get it again, or ${mend}`);
  const lengths = [1, 2, 3, 4, 5, 6, 7].map((k) => (k <= int(40) ? int(40 + 2 * k) : 1)), shape = lengths.slice(0, 3);
  const Voxels = VOXELS[int(70)], more = lengths.slice(3); // times, or parts of a vector
  if (!Voxels || more.some((length) => length > 1)) throw new Error(`not one number a voxel: ${mend}`);
  const rows = [280, 296, 312].map((at) => [0, 4, 8].map((k) => float(at + k))); // to the right, front, head in mm
  const axes = rows.map((row) => row.reduce((best, step, k) => (Math.abs(step) > Math.abs(row[best]) ? k : best), 0));
  const known = int(254) > 0 && new Set(axes).size === 3, step = (k) => Math.abs(rows[k][axes[k]]);
  if (!known || Math.abs(step(0) / step(1) - 1) > 0.1) throw new Error(`no sform of axial, square pixels: ${mend}`);
  const size = shape[0] * shape[1] * shape[2] * Voxels.BYTES_PER_ELEMENT, from = whole.byteOffset + float(108);
  if (from + size > whole.buffer.byteLength) throw new Error("cut short: get it again");
  const voxels = new Voxels(whole.buffer.slice(from, from + size));
  const [width, height, depth] = axes.map((axis) => shape[axis]), number = depth > 1 ? ask(depth) : 1;
  if (!Number.isInteger(number) || number < 1 || number > depth) throw new Error(`no such slice: give 1 to ${depth}`);
  const strides = [1, shape[0], shape[0] * shape[1]];
  // a voxel's index along an axis, so many steps to the left, to the back, or up
  const index = (k, steps) => ((k === 2) === rows[k][axes[k]] > 0 ? steps : shape[axes[k]] - 1 - steps);
  const along = (k, steps) => strides[axes[k]] * index(k, steps), first = [0, 0, number - 1].map((at, k) => index(k, at));
  const corner = rows.map((row, j) => axes.reduce((sum, axis, k) => sum + row[axis] * first[k], float(292 + 16 * j)));
  const lies = [...corner, step(0), step(1)];
  const [slope, shift] = float(112) ? [float(112), float(116)] : [1, 0];
  const values = Float32Array.from({ length: width * height }, (_, i) => {
    return slope * voxels[along(0, i % width) + along(1, Math.floor(i / width)) + along(2, number - 1)] + shift;
  });
  if (values.every((value) => value in LABELS)) return { width, height, lies, labels: Uint8Array.from(values) };
  const isHu = values.every(Number.isFinite) && values.some((value) => value < -200);
  if (!isHu) throw new Error("neither labels 0 to 3 nor HU, which air has below -200");
  return { width, height, lies, hu: Int16Array.from(values, (value) => Math.round(stored(value)) - HU_OFFSET) };
}
