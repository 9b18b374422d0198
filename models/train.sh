#!/bin/sh
# Prepare, train, export and judge a generator that can be steered; a stopped run goes on.
#
#     models/train.sh DOWNLOAD 256        # out/ct256/generator.onnx: first of preset best, then made to obey
#     models/train.sh DOWNLOAD 512        # the paper's size, from the one of 256; meant for a GPU
#
# DOWNLOAD: see models/README.md, under Data. It trains at 128 pixels, then at twice that, and so on.
# SAMPLES, STEERED, WIDTH: augmented slices of best's and of steered's last stage, channels; others want another out/.
set -eu
[ $# = 2 ] || { echo "usage: models/train.sh DOWNLOAD 256|512" >&2; exit 2; }
download=$(cd "$1" && pwd) size=$2
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} split=${SPLIT:-510,86,0} width=${WIDTH:-32} samples=${SAMPLES:-20000}
first=${FIRST:-128} steered=${STEERED:-4000} stored=data/ct$((2 * size)) judged=data/ct$size out=out/ct$size
terms="CC BY-NC-SA 4.0, as the masks of Ma et al., Zenodo 3757476, that they were trained on"

prepare() {  # a set of slices of a size
    [ -f "$1/split.json" ] || "$python" data/prepare.py "$download" --size "$2" --split "$split" --out "$1"
}

train() {  # a preset into a folder, with these options
    preset=$1 folder=$2; shift 2
    if [ -f "$folder/results.json" ]; then return; fi
    if [ -f "$folder/ckpt.pt" ]; then "$python" covidgan.py --resume --out "$folder"; return; fi
    "$python" covidgan.py --preset "$preset" --data "$stored" --ngf "$width" --ndf "$width" --n-blocks 6 --epochs 2 \
        --out "$folder" "$@"
}

prepare "$stored" $((2 * size))  # augmentation works at twice the size, then halves it: no blur
prepare "$judged" "$size"
"$python" - "$stored" "$judged" <<'END'
import sys  # a slice may be kept at one size alone, which parts patients otherwise: they are held out alike
from pathlib import Path

from data.slices import held_split, patient_of, read_split, write_split

trained, judged = (Path(folder, "split.json") for folder in sys.argv[1:])
patients = {patient_of(name) for name in read_split(trained)["test"]}
names = {name for side in read_split(judged).values() for name in side}
held = sorted(name for name in names if patient_of(name) in patients)
write_split(judged, sorted(names - {*held}), held, held, held_split(judged.parent).get("drawn", {}))
END
at=$first
train best "out/best$at" --size "$at" --epoch-len $((samples / 2))
while [ "$at" -lt "$size" ]; do  # all networks go on at twice the size
    at=$((2 * at))
    train best "out/best$at" --size "$at" --stage joint --init "out/best$((at / 2))/ckpt.pt" \
        --epoch-len $((samples / 2))
done
train steered "$out" --size "$size" --stage joint --init "out/best$size/ckpt.pt" --epoch-len $((steered / 2))
"$python" export.py "$out" --pack -o "$out/generator.onnx" --terms "$terms"
[ -f features.onnx ] || "$python" export.py --features efficientnet-lite0
"$python" infer_onnx.py "$judged" --side test --complement "$judged/images" --model "$out/generator.onnx" \
    --out "$out/held_out"
"$python" eval.py "$judged" "$out/held_out" --features features.onnx --train "$judged" --out "$out/eval" \
    --json "$out/eval/results.json"
"$python" eval.py "$judged" "$out/generator.onnx" --maps "$out/held_out/maps" --out "$out/eval" \
    --json "$out/eval/steering.json"
