"""What a trained generator is worth: the figures of its images, and its cost.

RESULTS/runs/ holds one small file for each run, and the tables are made of these files alone: a row that is trained on
another machine, or a year later, stands beside the others, whose weights need not be there.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import covidgan
import infer_onnx
from data.slices import Mistake, read_split, write_image
from paper import generators, rivals, runs
from paper.generators import REPORT

Floor = Callable[[covidgan.Slices, torch.Tensor, covidgan.LoopConfig], torch.Tensor]
FLOORS: dict[str, Floor] = {"label means": covidgan.mean_paint, "nearest training case": covidgan.nearest_copy}
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


def restored(run: Path, kind: type[covidgan.Method]) -> covidgan.Method:
    """The method that a run has trained, ready to synthesize."""
    return covidgan.restore(covidgan.read_checkpoint(run / "ckpt.pt", kind), kind)[0]


def figures_of_lungs(out: Path, names: list[str], images: torch.Tensor, args: argparse.Namespace) -> Figures:
    """Figures of windowed lungs [N, 1, S, S] in [-1, 1], written as slices in HU, of which eval.py takes the lung."""
    hu = covidgan.LoopConfig.level + images[:, 0].numpy() * covidgan.LoopConfig.width / 2
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name, one in zip(names, hu, strict=True):
        write_image(out / "images" / f"{name}.png", one)
    return figures_of(runs.compare(args.reference, out / "images", runs.feature_network(args.out), out))


def keep_floor(name: str, args: argparse.Namespace) -> Figures:
    """A floor's figures, measured if they are not kept yet: no network, and what every network has to beat."""
    note = name.replace(" ", "_")

    def make() -> dict[str, Figures]:
        train_side, side = load_side(args.reference, "train"), load_side(args.reference, REPORT)
        images = FLOORS[name](train_side, side.labels, covidgan.Config())
        return {"figures": figures_of_lungs(args.out / note, side.names, images, args)}

    return runs.keep(args.results, note, make)["figures"]


@torch.no_grad()
def figures_in_own_style(run: Path, args: argparse.Namespace) -> Figures:
    """SEAN's in the style of the very slices that it is to synthesize, as its authors test it."""
    method, side, images = restored(run, rivals.Sean), load_side(args.reference, REPORT), []
    for hu, labels in zip(side.hu.split(8), side.labels.split(8), strict=True):
        real = covidgan.lung_target(covidgan.window(hu, method.c), labels)
        images.append(method.synthesize_self(covidgan.one_hot(labels, method.c.n_labels), real))
    return figures_of_lungs(run / "self", side.names, torch.cat(images), args)


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


def keep_generator(name: str, seed: int, args: argparse.Namespace) -> None:
    """Train and measure a row's generator with a seed, if its measurements are not kept yet. Raises Mistake."""

    def make() -> dict[str, Any]:
        run, optimiser = generators.trained(name, seed, args), generators.optimiser_of(name, args)
        told = {"optimiser": optimiser, "options": generators.options_of(name), **cost_of(name, seed, run)}
        told["figures"] = figures_of(generators.measured(run, args))
        if generators.row_of(name).method == "SEAN":
            told[IN_OWN_STYLE] = figures_in_own_style(run, args)
        return told

    runs.keep(args.results, f"{name}_{seed}", make)


def kept_generators(name: str, args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """What a row's generators have measured, by seed. Raises Mistake for one that was trained otherwise."""
    kept = runs.kept(args.results, name)
    for seed, one in kept.items():
        check_options(f"{name}_{seed}", one["options"], generators.options_of(name))
    return kept


def check_options(run: str, kept: str, now: str) -> None:
    """Raise Mistake where a run was measured before its row's options were changed: it would bear their name."""
    if kept != now:
        raise Mistake(f"{run}.json: trained with {kept!r}, its row now has {now!r}: rename the row, or delete the file")


def cost_of(name: str, seed: int, run: Path) -> dict[str, Any]:
    """What a run cost and what its generator costs."""
    kind, begun = generators.row_of(name).kind, runs.begun(run)
    method = restored(run, kind)
    return {
        "method": name,
        "seed": seed,
        "seconds": runs.seconds(run),
        "dtype": begun["dtype"],
        "samples": round(generators.full_size(kind, method.c) * method.c.epochs * method.c.epoch_len),
        "parameters": sum(p.numel() for p in method.generator().parameters()),
        "synthesis": synthesis_seconds(runs.export(run), method.c.size),
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
    session, _ = infer_onnx.open_session(model, "cpu", threads=1)
    labels, seconds = np.ones((1, size, size), np.uint8), []
    for _ in range(9):
        start = time.process_time()
        session.run(None, {"map": labels})
        seconds.append(time.process_time() - start)
    return float(np.median(seconds))
