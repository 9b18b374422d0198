#!/bin/sh
# Prepare, train, export and judge the shipped generator; a stopped run goes on.
#
#     models/train.sh DOWNLOAD 256        # models/covid-ct-256.onnx anew, as out/ct256/generator.onnx
#     models/train.sh DOWNLOAD 512        # the paper's size, from the one of 256; meant for a GPU
#
# DOWNLOAD: see models/README.md, under Data. SAMPLES: augmented slices of the last stage at each size.
set -eu
download=$1 size=$2 python=${PYTHON:-.venv/bin/python}
split=${SPLIT:-510,86,0} width=${WIDTH:-24} first=${FIRST:-128} samples=${SAMPLES:-8000}
terms="CC BY-NC-SA 4.0, as the masks of Ma et al., Zenodo 3757476, that they were trained on"
cd "$(dirname "$0")/.."

prepare() {  # of a size in pixels
    [ -f "data/ct$1/split.json" ] || $python data/prepare.py "$download" --size "$1" --split "$split" --out "data/ct$1"
}

train() {  # into a folder, with these options
    out=$1; shift
    if [ -f "$out/results.json" ]; then return; fi
    if [ -f "$out/ckpt.pt" ]; then $python covidgan.py --resume --out "$out"; return; fi
    $python covidgan.py --preset best --ngf "$width" --ndf "$width" --n-blocks 6 --out "$out" "$@"
}

prepare $((2 * size))  # training augments at twice its size, then halves it: no blur
prepare "$size"
at=$first
train "out/ct$at" --size "$at" --data "data/ct$((2 * size))" --individual 0.45 --epochs 2 --epoch-len $((samples / 4))
while [ "$at" -lt "$size" ]; do  # G1, G2, D1 and D2 go on at twice the size, together
    at=$((2 * at))
    train "out/ct$at" --size "$at" --data "data/ct$((2 * size))" --stage joint --init "out/ct$((at / 2))/ckpt.pt" \
        --epochs 2 --epoch-len $((samples / 2))
done
$python export.py "out/ct$size" --pack -o "out/ct$size/generator.onnx" --terms "$terms"
[ -f features.onnx ] || $python export.py --features efficientnet-lite0
$python infer_onnx.py "data/ct$size" --side test --complement "data/ct$size/images" \
    --model "out/ct$size/generator.onnx" --out "out/ct$size/held_out"
$python eval.py "data/ct$size" "out/ct$size/held_out" --features features.onnx --train "data/ct$size" \
    --out "out/ct$size/eval" --json "out/ct$size/eval/results.json"
$python eval.py "data/ct$size" "out/ct$size/generator.onnx" --out "out/ct$size/eval" \
    --json "out/ct$size/eval/steering.json"
