"""What a trained generator is worth: the figures of its images, its cost, and how it came to them.

RESULTS/runs/ holds one small file for each run, and the tables are made of these files alone: a row that is trained on
another machine, or a year later, stands beside the others, whose weights need not be there. What is measured again
replaces its file.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import covidgan
import export
from data.runtime import ort
from data.slices import Mistake, read_split, write_image
from paper import generators, rivals, runs
from paper.generators import REPORT

FLOORS = {"label means": covidgan.mean_paint, "nearest training case": covidgan.nearest_copy}
FID, KID = "FID 24", "KID 1280"  # by features of that many dimensions, for FID fewer than any side here has slices
BETTER = {FID: "lower", "FID 32": "lower", KID: "lower"} | {"PSNR": "higher", "SSIM": "higher"}
BETTER |= {"RMSE": "lower", "NRMSE": "lower"}
REGIONS = ("complete", "lung")

IN_OWN_STYLE = "figures in the style of the slices themselves"
Figures = dict[str, dict[str, float | None]]  # "lung PSNR" and so on -> value, of pixels also what is beside it

# ------------------------------------------------------------------------------------ what no exported file synthesizes


def load_side(data: Path, side: str) -> covidgan.Slices:
    """A side of a dataset, at the dataset's own size."""
    c = covidgan.Config(data=str(data), size=runs.size_of(data))
    return covidgan.load_slices(data, read_split(data / "split.json")[side], c)


def write_slices(out: Path, names: list[str], images: torch.Tensor) -> None:
    """Write windowed lungs [N, 1, S, S] in [-1, 1] as slices in HU, from which eval.py takes the lung."""
    hu = covidgan.LoopConfig.level + images[:, 0].numpy() * covidgan.LoopConfig.width / 2
    out.mkdir(parents=True, exist_ok=True)
    for name, one in zip(names, hu, strict=True):
        write_image(out / f"{name}.png", one)


def measure_floor(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """eval.py's results for a floor: no network, and what every network has to beat."""
    out = args.out / name.replace(" ", "_")

    def make() -> dict[str, Any]:
        train_side, side = load_side(args.reference, "train"), load_side(args.reference, REPORT)
        write_slices(out / "images", side.names, FLOORS[name](train_side, side.labels, covidgan.Config()))
        return compare_lungs(out, args)

    return runs.once(out / "results.json", make)


@torch.no_grad()
def measure_self(run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """eval.py's results for SEAN in the style of the very slices that it is to synthesize, as its authors test it."""
    out = run / "self"

    def make() -> dict[str, Any]:
        method = export.load_method(covidgan.read_checkpoint(run / "ckpt.pt", rivals.Sean), rivals.Sean)
        side, images = load_side(args.reference, REPORT), []
        for hu, labels in zip(side.hu.split(8), side.labels.split(8), strict=True):
            real = covidgan.lung_target(covidgan.window(hu, method.c), labels)
            images.append(method.synthesize_self(covidgan.one_hot(labels, method.c.n_labels), real))
        write_slices(out / "images", side.names, torch.cat(images))
        return compare_lungs(out, args)

    return runs.once(out / "results.json", make)


def compare_lungs(out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Compare OUT/images with the real slices of the same names."""
    return runs.compare(args.reference, out / "images", runs.feature_network(args.out), out)


# ------------------------------------------------------------------------------------------------ what a run is worth


def figures_of(results: dict[str, Any]) -> Figures:
    """Of eval.py's results what the tables show; a value is None where it refuses one, such as FID of few slices."""
    found: Figures = {}
    for region, metric in itertools.product(REGIONS, BETTER):
        name = f"{region} {metric}"
        if metric.startswith(("FID", "KID")):
            found[name] = {"value": results["features"][name]["value"]}
        else:
            row = results["pixels"][name]
            beside = {key: row[key] for key in ("interval", "patients_mean", "patients_interval")}
            found[name] = {"value": row["mean"], **beside}
    return found


def keep_floor(name: str, args: argparse.Namespace) -> Figures:
    """A floor's figures, measured if they are not kept yet."""
    kept = runs.kept_measures(args.results, note := name.replace(" ", "_"))
    if kept is None:
        kept = {"figures": figures_of(measure_floor(name, args))}
        runs.keep_measures(args.results, note, kept)
    return kept["figures"]


def keep_generator(name: str, seed: int, args: argparse.Namespace) -> None:
    """Train a row's generator with a seed, measure it, and keep its measurements. Raises Mistake."""
    run, optimiser = generators.trained(name, seed, args), generators.optimiser_of(name, args)
    told = {"optimiser": optimiser, "options": generators.options_of(name), **cost_of(name, seed, run)}
    told["figures"] = figures_of(generators.measured(run, args))
    if generators.row_of(name).method == "SEAN":
        told[IN_OWN_STYLE] = figures_of(measure_self(run, args))
    runs.keep_measures(args.results, f"{name}_{seed}", told | {"progress": progress_of(run, args)})


def kept_generators(name: str, args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """What a row's generators have measured, by seed. Raises Mistake for one that was trained otherwise."""
    kept = runs.kept_seeds(args.results, name)
    for seed, one in kept.items():
        check_options(f"{name}_{seed}", one["options"], generators.options_of(name), args)
    return kept


def check_options(run: str, kept: str, now: str, args: argparse.Namespace) -> None:
    """Raise Mistake where a run was measured before its row's options were changed."""
    if kept != now:
        path = runs.measures_file(args.results, run)
        raise Mistake(
            f"{path}: trained with {kept!r}, its row now has {now!r}: give the row another name, or delete it"
        )


def cost_of(name: str, seed: int, run: Path) -> dict[str, Any]:
    """What a run cost and what its generator costs."""
    method = generators.row_of(name).kind
    trained = export.load_method(covidgan.read_checkpoint(run / "ckpt.pt", method), method)
    c, begun = trained.c, runs.begun(run)
    return {
        "method": name,
        "seed": seed,
        "seconds": runs.seconds(run),
        "dtype": begun["dtype"],
        "samples": round(generators.full_size(method, c) * c.epochs * c.epoch_len),
        "parameters": sum(p.numel() for p in trained.generator().parameters()),
        "synthesis": synthesis_seconds(runs.export(run), c.size),
        "d_at_end": loss_of_d(run),
        "commit": begun["commit"],
        "machine": begun["machine"],
    }


def loss_of_d(run: Path) -> float | None:
    """D's loss at a run's end: the mean over the last tenth of the last stage's steps; None for a method without D."""
    steps = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    if "d" not in steps[-1]:
        return None
    last = [step["d"] for step in steps if step["stage"] == steps[-1]["stage"]]
    return float(np.mean(last[-max(1, len(last) // 10) :]))


def synthesis_seconds(model: Path, size: int) -> float:
    """CPU seconds per slice on one thread, ONNX Runtime: median of nine, whatever else the machine does."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    labels = np.ones((1, size, size), np.uint8)
    seconds = []
    for _ in range(9):
        start = time.process_time()
        session.run(None, {"map": labels})
        seconds.append(time.process_time() - start)
    return float(np.median(seconds))


def progress_of(run: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Lung KID along a run whose checkpoints were kept, at full size: by CPU seconds of training."""
    points = []
    for seconds in runs.kept_seconds(run):
        checkpoint = covidgan.read_weights(run / "kept" / seconds / "ckpt.pt")
        if checkpoint["stage"] in ("g1", "g2"):
            continue  # no whole generator yet
        results = generators.measured(run / "kept" / seconds, args)
        points.append({"seconds": int(seconds), "KID": results["features"][f"lung {KID}"]["value"]})
    return points
