/* One axial slice of a NIfTI-1 volume, for paint.js: its labels or its HU, turned as data/volumes.py turns it. */

"use strict";

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
  if (!values.every(Number.isFinite) || !values.some((value) => value < -200)) {
    throw new Error("neither labels 0 to 3 nor HU, which air has below -200");
  }
  const hu = Int16Array.from(values, (value) => Math.round(clamp(value, -HU_OFFSET, 4095 - HU_OFFSET)));
  return { width, height, lies, hu };
}
