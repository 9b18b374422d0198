"""The generators that the paper's tables compare: which there are, how one is trained, and what it is worth.

A generator is a row, trained with a seed into OUT/ROW_SEED. Tables III to V take what Table II has trained. All see the
same number of samples at full size: one with two stages there sees half of them in each. With --seconds each sees as
many as these CPU seconds give. What one has measured is kept as RESULTS/runs/ROW_SEED.json, of which alone the tables
are made: rows that were trained on another machine, or a year ago, stand beside the others without their weights.
"""

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import covidgan
from data.slices import Mistake, read_split, write_image
from paper import report, rivals, runs

RIVALS = ("pix2pix", "pix2pixHD", "SPADE", "SEAN")
REPORT = "seg_test"  # side
WARM, TIMED_STEPS = 5, 20  # steps of a stage, of which the first are slower


@dataclass(frozen=True)
class Row:
    """A method as a table trains it: by which script, and with which options besides data and scale."""

    kind: type[covidgan.Method]
    program: tuple[str, ...]
    options: tuple[str, ...]


def ours(switches: str = "", preset: str = "paper") -> Row:
    """A row of ours, with one part of the method changed."""
    return Row(covidgan.Covidgan, (str(runs.ROOT / "covidgan.py"),), ("--preset", preset, *switches.split()))


def rival(name: str, switches: str = "") -> Row:
    """A rival's row."""
    return Row(rivals.METHODS[name], ("-m", "paper.rivals", name), ("--preset", "paper", *switches.split()))


# As published: noise on the target, D sees whole images, no average of the weights. Clean: what is part of no method
# and helped ours, applied to all alike. All rivals have the paper's Adam, which SPADE and SEAN did better with than
# with their authors': of lower lung KID on the side "test", kept as optimiser_SPADE.json and optimiser_SEAN.json.
LOOP = covidgan.LoopConfig()
CLEAN = f"--noise 0 --contrast {LOOP.contrast} --ema {LOOP.ema}"
ROWS: dict[str, Row] = {
    "covidgan": ours(),
    "covidgan-best": ours(preset="best"),
    **{name: rival(name) for name in RIVALS},
    "covidgan-clean": ours(CLEAN),
    **{f"{name}-clean": rival(name, CLEAN) for name in RIVALS},
}
# Table II at equal CPU seconds: all clean. -steer: told two numbers of a slice besides; -draws: and given noise.
TIMED: dict[str, Row] = {
    "best": ours(preset="best"),
    "best-steer": ours("--steer", "best"),
    "best-draws": ours(f"--steer --draws {covidgan.PRESETS['steered']['draws']:g}", "best"),
    **{f"{name}-clean": rival(name, CLEAN) for name in RIVALS},
    **{f"{name}-steer": rival(name, f"{CLEAN} --steer") for name in RIVALS},
}
# Table V's, besides covidgan itself
ABLATIONS: dict[str, Row] = {
    "without-DESUM": ours("--desum sum"),
    "F_global": ours("--desum global"),
    "alpha-0.5": ours("--desum fixed"),
    "without-DFM": ours("--dfm off"),
    "D2-feature": ours("--dfm d2"),
    "beta-0.5": ours("--dfm fixed --beta 0.5"),
    "D=1": ours("--n-dis 1"),
    "D=3": ours("--n-dis 3"),
    "G=1": ours("--n-gen 1"),
    "G=3": ours("--n-gen 3"),
}
# Beyond the paper, which does not say who moves beta. Three are kept alone: the code at tag before-small trains them.
POLICIES: dict[str, Row] = {
    f"beta-{policy}": Row(covidgan.Covidgan, (), ("--preset", "paper", "--beta-policy", policy))
    for policy in ("entropy", "min", "max")
}
POLICIES |= {f"beta-{beta}": ours(f"--dfm fixed --beta {beta}") for beta in (0.1, 0.9)}


def row_of(name: str) -> Row:
    """A row by its name, from whichever table."""
    return (ROWS | TIMED | ABLATIONS | POLICIES)[name]


def options_of(name: str) -> str:
    """How a row's generator is trained, beside data and scale."""
    return " ".join(row_of(name).options)


def full_size(kind: type[covidgan.Method], c: covidgan.LoopConfig) -> float:
    """Total length of a method's stages at full size, as a multiple of --epochs: all but G1's own."""
    return sum(length for stage, length in kind.stages(c).items() if stage != "g1")


def train(name: str, seed: int, args: argparse.Namespace) -> Path:
    """Train a row's run, or go on with it; returns its folder. Raises Mistake."""
    row, out = row_of(name), args.out / f"{name}_{seed}"
    if not row.program:
        raise Mistake(f"--rows {name}: no longer trained, only kept: leave it out, or take the code at before-small")
    given = {"data": args.data, "size": runs.size_of(args.reference), "ngf": args.ngf, "ndf": args.ngf, "seed": seed}
    given |= {"batch": args.batch, "dtype": args.dtype}
    c = covidgan.parse_config([*row.options, *runs.as_options(given)], row.kind)
    stage, pictures = round(args.samples / full_size(row.kind, c)), 8  # samples of one, and how often they are drawn
    if args.seconds:  # pictures cost seconds too
        stage, pictures = samples_in(args.seconds, row.kind.stages(c), cost_of_sample(name, c, args)), 2
    given |= {"epochs": 2, "epoch-len": max(args.batch, stage // 2)}
    given["interval"] = max(1, stage // args.batch // pictures)
    runs.train([*row.program], [*row.options, *runs.as_options(given)], out, options_of(name))
    return out


def cost_of_sample(name: str, c: covidgan.LoopConfig, args: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of a training sample in each stage of a row, of all threads, measured once and kept.

    Kept for all seeds, and in RESULTS: so a table has rows of as many samples wherever its seeds are trained.
    """

    def make() -> dict[str, Any]:
        trainer, seconds = covidgan.Trainer(row_of(name).kind, c), {}
        for stage in trainer.stages:
            trainer.begin(stage)
            for _ in range(WARM):
                trainer.step()
            start = time.process_time()
            for _ in range(TIMED_STEPS):
                trainer.step()
            seconds[stage] = (time.process_time() - start) / TIMED_STEPS / c.batch
        return {"seconds of a sample": seconds, "commit": runs.commit(), "machine": runs.machine()}

    return runs.keep(args.results, f"cost_{name}", make)["seconds of a sample"]


def samples_in(budget: float, stages: dict[str, float], cost: dict[str, float]) -> int:
    """Samples of a stage of length 1, of which a whole training takes a budget of CPU seconds."""
    return int(budget / sum(length * cost[stage] for stage, length in stages.items()))


def train_unet(
    out: Path, data: Path, seed: int, args: argparse.Namespace, row: str = "", samples: int = 0, more: str = ""
) -> Path:
    """Train a U-Net on the train side of a dataset, or go on with it; returns its folder. Raises Mistake.

    samples: how many it sees, by default --unet-samples. more: options of paper/segment.py.
    """
    samples = samples or args.unet_samples
    given = {"data": data, "size": runs.size_of(args.reference), "channels": args.channels, "seed": seed}
    given |= {"batch": args.batch, "epochs": 2, "epoch-len": samples // 2, "dtype": args.dtype}
    given["interval"] = max(1, samples // args.batch // 8)
    options = ["--preset", "paper", "--unchecked", *more.split()]  # slices were checked with the generator's data
    runs.train(["-m", "paper.segment"], [*options, *runs.as_options(given)], out, row)
    return out


def judge(args: argparse.Namespace) -> Path:
    """The U-Net of the train side's real slices that finds lesions in synthetic ones: do these show their labels?"""
    run = train_unet(args.out / "judge", args.reference, 0, args)
    return runs.exported(run / "unet.onnx", run / "unet.pt")


def mean_paint(train: covidgan.Slices, labels: Tensor) -> Tensor:
    """Labels [N, 1, S, S], each painted with its mean over the training slices, in [-1, 1]."""
    image = covidgan.lung_target(covidgan.window(train.hu, LOOP), train.labels)
    means = [image[train.labels == k].mean() if (train.labels == k).any() else -1.0 for k in range(LOOP.n_labels)]
    return torch.tensor(means)[labels.long()]


def nearest_copy(train: covidgan.Slices, labels: Tensor) -> Tensor:
    """The lung of the training slice whose map overlaps most, cut to labels [N, 1, S, S], in [-1, 1].

    Overlap is the share of equal labels in the union of the two lungs, on maps of 64 pixels.
    """
    ours, theirs = (F.interpolate(x.float(), (64, 64), mode="nearest").flatten(1) for x in (labels, train.labels))
    nearest = []
    for one in ours:
        lung = (one > 0) | (theirs > 0)
        overlap = ((one == theirs) & lung).sum(1) / lung.sum(1).clamp_min(1)
        nearest.append(int(overlap.argmax()))
    image = covidgan.window(train.hu[nearest], LOOP)
    image, own = covidgan.resample(image, train.labels[nearest], labels.shape[-1])
    return covidgan.lung_target(covidgan.lung_target(image.clamp(-1, 1), own), labels)


FLOORS = {"label means": mean_paint, "nearest training case": nearest_copy}
FID, KID = "FID 24", "KID 1280"  # by features of that many dimensions, for FID fewer than any side here has slices
DICE, CEILING = "U-Net's Dice", "its Dice on real slices"  # of `judge`, both lesions as one, in %
DIGITS = {FID: 2, "FID 32": 4, KID: 4, "PSNR": 2, "SSIM": 4, "RMSE": 4, "NRMSE": 4, DICE: 1}  # metric -> decimals
BETTER = {metric: "higher" if metric in ("PSNR", "SSIM", DICE) else "lower" for metric in DIGITS}
REGIONS = ("complete", "lung")
# HU, medians over maps, of eval.py's table "steering" -> decimals; kept as figures of a region "steering"
OBEYS = {"other lung, mean": 1, "other lung, RMS": 0, "moved, RMS": 0, "density default": 1, "detail default": 1}
OBEYS |= {f"{name} {level}": 1 for name in ("density", "detail") for level in ("low", "high")} | {"draws, RMS": 0}

IN_OWN_STYLE = "figures in the style of the slices themselves"  # kept of SEAN as its authors test it
TOLD, DRAWN = "figures told", "figures drawn"  # kept of who steers, by where the two numbers come from
Figures = dict[str, dict[str, float | None]]  # "lung PSNR" and so on -> "value"


def load_side(data: Path, side: str) -> covidgan.Slices:
    """A side of a dataset, at the dataset's own size."""
    c = covidgan.Config(data=str(data), size=runs.size_of(data))
    return covidgan.load_slices(data, read_split(data / "split.json")[side], c)


def keep_floor(name: str, args: argparse.Namespace) -> dict[str, Figures]:
    """A floor's "figures", measured if they are not kept yet: no network, and what every network has to beat."""
    note = name.replace(" ", "_")
    out = args.out / note / "images"

    def make() -> dict[str, Figures]:
        train_side, side = load_side(args.reference, "train"), load_side(args.reference, REPORT)
        lungs = FLOORS[name](train_side, side.labels)[:, 0].numpy()  # [N, S, S] in [-1, 1]
        out.mkdir(parents=True, exist_ok=True)
        for case, lung in zip(side.names, lungs, strict=True):  # of which eval.py takes the lung
            write_image(out / f"{case}.png", LOOP.level + lung * LOOP.width / 2)
        return {"figures": figures_of(runs.compare(args.reference, out, out.parent, args.out, judge(args)))}

    return runs.keep(args.results, note, make)


def keep(name: str, seed: int, args: argparse.Namespace) -> None:
    """Train and measure a row's generator with a seed, if its measurements are not kept yet. Raises Mistake."""

    def make() -> dict[str, Any]:
        run, kind = train(name, seed, args), row_of(name).kind
        method, c = covidgan.restore(covidgan.read_checkpoint(run / "ckpt.pt"), kind)
        found = {"options": options_of(name), "method": name, "seed": seed}
        # told: measured in the real slice. Drawn: as pairs of the training slices are, whatever the patient.
        ways = {TOLD: ("synthetic", "--complement", args.reference), DRAWN: ("drawn", "--draws", "1")}
        for key, way in ways.items() if c.steer else [("figures", ("synthetic",))]:
            found[key] = figures_of(runs.measure(run, args.reference, REPORT, judge(args), *way))
        if args.seconds:
            found["budget"] = args.seconds
            rows, first = runs.obeys(run, args.reference, REPORT), TOLD if c.steer else "figures"
            found[first] |= {f"steering {name}": {"value": row["median"]} for name, row in rows.items()}
        return found | cost_of(run, method)

    runs.keep(args.results, f"{name}_{seed}", make)


def kept(name: str, args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """What a row's generators have measured, by seed. Raises Mistake for one that was trained otherwise."""
    return runs.kept(args.results, name, "options", options_of(name))


def methods_of(name: str) -> dict[str, str]:
    """As which method tables show what is kept of a row under each key."""
    own = name.replace("SEAN", "SEAN-self")
    return {"figures": name, IN_OWN_STYLE: own, TOLD: f"{name} told", DRAWN: f"{name} drawn"}


def records_of(method: str, kept: dict[int | None, dict[str, Any]], key: str = "figures") -> list[dict[str, Any]]:
    """Of what is kept by seed a record for each region and metric that has a value, of a method told by this name."""
    found = []
    asked = [*itertools.product(REGIONS, DIGITS), *itertools.product(("steering",), OBEYS)]
    for (seed, one), (region, metric) in itertools.product(kept.items(), asked):
        if (value := one.get(key, {}).get(f"{region} {metric}", {}).get("value")) is not None:
            told = {"method": method, "seed": seed, "region": region, "metric": metric, "value": value}
            found.append(told | ({"on a GPU": True} if report.on_gpu(one) else {}))
    return found


def figures_of(results: dict[str, Any]) -> Figures:
    """Of eval.py's results what the tables show; a value is None where it refuses one, such as FID of few slices."""
    values = {name: row["mean"] for name, row in results["pixels"].items()}
    values |= {name: row["value"] for name, row in results["features"].items()}
    for name, side in ((f"complete {DICE}", "fake"), (CEILING, "real")):
        values[name] = 100 * results["segmentation"][f"{side} infection Dice"]["mean"]
    shown = [*map(" ".join, itertools.product(REGIONS, DIGITS)), CEILING]
    return {name: {"value": values[name]} for name in shown if name in values}


def cost_of(run: Path, method: covidgan.Method) -> dict[str, Any]:
    """What a run cost, and how large its generator is."""
    c = method.c
    return {
        **runs.begun(run),
        "samples": round(full_size(type(method), c) * c.epochs * c.epoch_len),
        "parameters": sum(p.numel() for p in method.generator().parameters()),
    }
