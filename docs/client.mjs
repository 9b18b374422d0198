/* A client of generator.onnx in JavaScript: labels in, HU out. The contract is at the head of export.py.

       cp docs/client.mjs models/covid-ct-256.onnx FOLDER && cd FOLDER     # any folder outside the repository
       npm install --ignore-scripts onnxruntime-node@1.30.0                # without scripts that fetch CUDA
       node client.mjs covid-ct-256.onnx map.raw 256 256                   # height, width
       node client.mjs generator.onnx map.raw 256 256 -880 60 7            # density, detail, HU, and a seed

   map.raw holds labels 0..3, a byte each, row by row: in Python, read_map("map.png").tofile("map.raw"). It writes
   ct.raw, HU as int16 with the low byte first, and ct.pgm, a picture of it. The last three are for models that can be
   steered; what is left out, or given as nan, is the model's default. Research only, not for diagnosis. */

import { readFileSync, writeFileSync } from "node:fs";
import ort from "onnxruntime-node";

const MULTIPLE = 16, LEVEL = -600, WIDTH = 1500; // the model's metadata, which no ONNX Runtime for JavaScript hands out

const [model, file, ...numbers] = process.argv.slice(2);
const [height, width, density = NaN, detail = NaN, seed = 0] = numbers.map(Number), labels = readFileSync(file);
if (labels.length !== height * width) throw new Error(`${file}: ${labels.length} labels, not ${height} x ${width}`);

const [h, w] = [height, width].map((side) => Math.max(2, Math.ceil(side / MULTIPLE)) * MULTIPLE);
const padded = new Uint8Array(h * w), hu = new Int16Array(height * width);
for (let y = 0; y < height; y++) padded.set(labels.subarray(y * width, (y + 1) * width), y * w);

const session = await ort.InferenceSession.create(model);
if (numbers.length > 2 && session.inputNames.length < 2) throw new Error(`${model}: has no input that steers`);
const inputs = {
  map: new ort.Tensor("uint8", padded, [1, h, w]),
  density: new ort.Tensor("float32", [density], [1]),
  detail: new ort.Tensor("float32", [detail], [1]),
  seed: new ort.Tensor("int64", [BigInt(Number.isNaN(seed) ? 0 : seed)], [1]),
};
const given = Object.fromEntries(session.inputNames.map((name) => [name, inputs[name]])); // those that this model has
const { ct } = await session.run(given, ["ct"]);
for (let y = 0; y < height; y++) hu.set(ct.data.subarray(y * w, y * w + width), y * width);

const grey = Uint8ClampedArray.from(hu, (value) => 255 * ((value - LEVEL) / WIDTH + 0.5)); // rounds and clips
writeFileSync("ct.raw", hu);
writeFileSync("ct.pgm", Buffer.concat([Buffer.from(`P5 ${width} ${height} 255\n`), Buffer.from(grey)]));
