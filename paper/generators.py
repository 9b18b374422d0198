"""The generators that the paper's tables compare: which there are, and how one is trained.

A generator is a row, trained with a seed into OUT/ROW_OPTIMISER_SEED. Tables III to V take what Table II has trained.
All see the same number of samples at full size: one with two stages there sees half of them in each.
"""

import argparse
import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import covidgan
from data.slices import Mistake
from paper import rivals, runs
from paper.methods import METHODS

RIVALS = ("pix2pix", "pix2pixHD", "SPADE", "SEAN")
CHOOSE, REPORT = "test", "seg_test"  # sides
KIDS = "lung KID 1280"  # of each optimiser, among what is kept
FIRST_SEED = 0  # of the runs that choose an optimiser
INTERVALS = 8  # checkpoints and panels of a stage


@dataclass(frozen=True)
class Row:
    """A method as a table trains it."""

    method: str  # its name in checkpoints
    options: tuple[str, ...]
    optimisers: tuple[str, ...] = ("paper",)  # Adam's settings to choose between

    @property
    def kind(self) -> type[covidgan.Method]:
        """Its method."""
        return covidgan.Covidgan if self.method == "covidgan" else METHODS[self.method]

    @property
    def program(self) -> list[str]:
        """The script that trains it."""
        if self.method == "covidgan":
            return [str(runs.ROOT / "covidgan.py")]
        return ["-m", self.kind.__module__, *[self.method] * (self.method in rivals.METHODS)]


def ours(switches: str = "", preset: str = "paper") -> Row:
    """A row of ours, with one part of the method changed."""
    return Row("covidgan", ("--preset", preset, *switches.split()))


def rival(name: str, *options: str) -> Row:
    """A rival's row; where its authors set Adam differently from the paper, both are tried."""
    defaults = rivals.RivalConfig
    paper = dict.fromkeys("dg", (defaults.lr, (defaults.adam_beta1, defaults.adam_beta2)))
    optimisers = ("paper",) if rivals.METHODS[name].own == paper else ("own", "paper")
    return Row(name, ("--preset", "paper", *options), optimisers)


# As published: noise on the target, D sees whole images, no average of the weights. Clean: what is part of no method
# and helped ours, applied to all alike.
LOOP = covidgan.LoopConfig
CLEAN = ("--noise", "0", "--contrast", str(LOOP.contrast), "--ema", str(LOOP.ema))
ROWS: dict[str, Row] = {
    "covidgan": ours(),
    "covidgan-best": ours(preset="best"),
    **{name: rival(name) for name in RIVALS},
    "covidgan-clean": ours(" ".join(CLEAN)),
    **{f"{name}-clean": rival(name, *CLEAN) for name in RIVALS},
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
# Beyond the paper, which does not say who moves beta
POLICIES: dict[str, Row] = {
    "beta-entropy": ours("--beta-policy entropy"),
    "beta-min": ours("--beta-policy min"),
    "beta-max": ours("--beta-policy max"),
    "beta-0.1": ours("--dfm fixed --beta 0.1"),
    "beta-0.9": ours("--dfm fixed --beta 0.9"),
}


def row_of(name: str) -> Row:
    """A row by its name, from whichever table."""
    return (ROWS | ABLATIONS | POLICIES)[name]


def options_of(name: str) -> str:
    """How a row's generator is trained, beside data and scale."""
    return " ".join(row_of(name).options)


def full_size(kind: type[covidgan.Method], c: covidgan.LoopConfig) -> float:
    """Total length of a method's stages at full size, as a multiple of --epochs: all but G1's own."""
    return sum(kind.length(c, stage) for stage in kind.stages(c) if stage != "g1")


def folder(name: str, optimiser: str, seed: int, args: argparse.Namespace) -> Path:
    """The folder of a run."""
    return args.out / f"{name}_{optimiser}_{seed}"


def train(name: str, optimiser: str, seed: int, args: argparse.Namespace) -> Path:
    """Train a row's run, or go on with it; returns its folder."""
    row, out = row_of(name), folder(name, optimiser, seed, args)
    c = covidgan.parse_config([*row.options], row.kind)
    stage = round(args.samples / full_size(row.kind, c))  # samples of one
    given = {"data": args.data, "size": runs.size_of(args.reference), "ngf": args.ngf, "ndf": args.ngf, "seed": seed}
    given |= {"batch": args.batch, "epochs": 2, "epoch-len": stage // 2, "interval": stage // args.batch // INTERVALS}
    given |= {"dtype": args.dtype} | ({"optimiser": optimiser} if row.method in rivals.METHODS else {})
    options = [*itertools.chain(*[(f"--{key}", str(value)) for key, value in given.items()]), *row.options]
    bf16 = covidgan.uses_bf16(dataclasses.replace(c, dtype=args.dtype), covidgan.pick_device(c))
    runs.train(row.program, options, out, options_of(name), dtype="bfloat16" if bf16 else "float32")
    return out


def published_of(name: str) -> str:
    """The row as published of a clean row, where there is one; else the row itself."""
    return published if (published := name.removesuffix("-clean")) in ROWS else name


def optimiser_of(name: str, args: argparse.Namespace) -> str:
    """The optimiser of a row: among the candidates, the one with the lowest lung KID on the side that chooses.

    It is chosen once, by runs of one seed as published, for the clean row too, and kept beside the tables.
    """
    published, tried = published_of(name), row_of(name).optimisers

    def kid(optimiser: str) -> float:
        out, features = train(published, optimiser, FIRST_SEED, args), runs.feature_network(args.out)
        value = runs.measure(out, args.reference, CHOOSE, features)["features"][KIDS]["value"]
        if value is None:
            raise Mistake(f"{args.reference}: too few slices on side {CHOOSE} to choose an optimiser by their KID")
        return value

    if len(tried) == 1:
        return tried[0]
    kept = runs.keep(args.results, f"optimiser_{published}", lambda: {KIDS: {one: kid(one) for one in tried}})
    return min(kept[KIDS], key=kept[KIDS].get)


def tried_optimisers(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """For each row with several optimisers, the lung KID by which one was chosen; for the record."""
    paths = {name: args.results / "runs" / f"optimiser_{name}.json" for name in ROWS}
    return {name: runs.read_json(path)[KIDS] for name, path in paths.items() if path.exists()}


def trained(name: str, seed: int, args: argparse.Namespace) -> Path:
    """The folder of a row's generator with its chosen optimiser, trained if it is not yet."""
    return train(name, optimiser_of(name, args), seed, args)


def measured(run: Path, args: argparse.Namespace) -> dict[str, Any]:
    """eval.py's results of a generator on the patients that are reported."""
    return runs.measure(run, args.reference, REPORT, runs.feature_network(args.out))
