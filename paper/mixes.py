"""What a U-Net of Tables III to V trains on, real and synthetic slices together, and what it then finds (§IV-B.2).

It trains on the slices of SIDE, whose maps no generator has trained on, and is tested on real slices. The paper says in
its Table I that these are a third set, and in its text that they are the generators' training set: both are tested. On
the latter the generators have seen the very slices, so that a synthetic slice may carry over what a U-Net should not
know; "seg_test" holds patients that neither network has seen, where the split is by patient.

Whatever it trains on, a U-Net sees the same number of samples. All slices have one size and the same resolution, which
is why real ones are taken from --reference: a larger original would be sharper than a synthetic slice.
"""

import argparse
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import eval as evaluation
import infer_onnx
from data.slices import LABELS, Mistake, read_split, write_bytes, write_image, write_map, write_split
from paper import generators, runs

SIDE = "test"  # its slices and maps train a U-Net
TESTED = ("train", "seg_test")  # their real slices test it
TIMES = 4  # at most as many synthetic slices are added per real one
VARIANTS = TIMES + 1  # augmentations of each map, one more than is used: a map without lung has none


@dataclass(frozen=True)
class Mix:
    """A training set: N real slices, and shares of N of others; `added` or `augmented`, whose names are the same."""

    real: int = 0  # N; 0: all there are
    replaced: float = 0.0  # real slices replaced by the synthetic ones of the same maps
    added: float = 0.0  # synthetic slices of augmented maps, beside the real ones
    augmented: float = 0.0  # the same augmentations of the real slices themselves, beside the real ones
    generator: str = "covidgan"  # its name in paper/generators.py

    @property
    def name(self) -> str:
        """A name for its folder."""
        shares = {"replaced": self.replaced, "added": self.added, "augmented": self.augmented}
        parts = [f"{kind}{100 * share:.0f}" for kind, share in shares.items() if share]
        parts += [self.generator] if self.replaced or self.added else []
        return "-".join([f"real{self.real or ''}", *parts])


Members = dict[str, list[str]]  # names of a mix's slices: real, replaced, added, augmented


def members(mix: Mix, names: list[str], whole: list[str], variants: list[str], seed: int) -> Members:
    """Which slices a mix holds: of the side's `names`, those `whole` with a synthetic slice, and `variants` of maps.

    A seed draws one order, and every set is the beginning of it, so that a smaller share is part of a larger one.
    Raises Mistake where there are too few.
    """
    if mix.real > len(names):
        raise Mistake(f"{mix.real} real slices wanted, there are {len(names)}: leave the row out")
    order = [names[k] for k in np.random.default_rng(seed).permutation(len(names))]
    chosen = order[: mix.real or None]
    able, made = {*whole}, {*variants}
    swappable = [name for name in chosen if name in able]
    turns = [f"{name}v{k:02d}" for k in range(1, VARIANTS + 1) for name in chosen]  # as infer_onnx.py names them
    turns = [name for name in turns if name in made]

    def first(share: float, of: list[str], what: str) -> list[str]:
        wanted = round(share * len(chosen))
        if wanted > len(of):
            told = f"{wanted} {what} slices wanted beside {len(chosen)} real ones, there are {len(of)}"
            raise Mistake(f"{told}: leave the row out")
        return of[:wanted]

    replaced = first(mix.replaced, swappable, "synthetic")
    return {
        "real": [name for name in chosen if name not in {*replaced}],
        "replaced": replaced,
        "added": first(mix.added, turns, "synthetic"),
        "augmented": first(mix.augmented, turns, "augmented"),
    }


# ------------------------------------------------------------------------------------------------ slices of all kinds


def synthetic_slices(mix: Mix, seed: int, args: argparse.Namespace, variants: int = 0) -> Path:
    """Dataset of complete synthetic slices by a mix's generator, of SIDE's maps or that many augmentations of each."""
    run = generators.trained(mix.generator, seed, args)
    complete = ["--complement", args.reference]
    if not variants:
        return runs.synthesize(run, args.reference, SIDE, "complete", complete)
    return runs.synthesize(run, args.reference, SIDE, "variants", [*complete, "--variants", variants, "--seed", seed])


def augmented_slices(seed: int, args: argparse.Namespace) -> Path:
    """Dataset of SIDE's real slices under the augmentations that the synthetic variants of a seed have."""
    out = args.out / f"augmented_{SIDE}_{seed}"
    with runs.making(out):
        make_augmented(out, seed, args)
    return out


def make_augmented(out: Path, seed: int, args: argparse.Namespace) -> None:
    """Write those of `augmented_slices` that are not there yet."""
    for part in ("images", "maps"):
        (out / part).mkdir(parents=True, exist_ok=True)
    maps = infer_onnx.find_maps(args.reference, SIDE)
    reals = infer_onnx.find_reals(args.reference, maps)
    for job in infer_onnx.plan(maps, VARIANTS):
        image = out / "images" / f"{job.name}.png"
        if image.exists():
            continue
        if made := infer_onnx.load(job, len(LABELS), reals, seed, unchecked=True):  # None: no lung is left in it
            write_map(out / "maps" / image.name, made.labels)
            write_image(image, made.real)


def split_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """Names of the reference's sides. Raises Mistake where there are none to train on, or none to test on."""
    path = args.reference / "split.json"
    split = read_split(path)
    if not (split.get(SIDE) and tested_sides(split)):
        raise Mistake(f"{path}: {SIDE} trains a U-Net, {' and '.join(TESTED)} test it: prepare a set with these sides")
    return split


def tested_sides(split: dict[str, list[str]]) -> list[str]:
    """Those of TESTED that hold slices."""
    return [side for side in TESTED if split.get(side)]


def names_in(dataset: Path | None) -> list[str]:
    """Names of a dataset's slices; none for None."""
    return sorted(path.stem for path in (dataset / "images").glob("*.png")) if dataset else []


def unet_of(mix: Mix) -> str:
    """The name of a mix's U-Nets: of their folders, and among what is kept."""
    return f"unet_{mix.name}"


def folder(mix: Mix, seed: int, args: argparse.Namespace) -> Path:
    """The folder of a U-Net's run."""
    return args.out / f"{unet_of(mix)}_{seed}"


def dataset(mix: Mix, seed: int, args: argparse.Namespace) -> Path:
    """The mix as a dataset of links in the U-Net's folder, made if it is not there yet.

    Its train side is the mix, its test side real slices to look at; split.json says which is which. Raises Mistake.
    """
    out = folder(mix, seed, args) / "data"
    with runs.making(out):
        if not (out / "split.json").exists():
            make_dataset(out, mix, seed, args)
    return out


def make_dataset(out: Path, mix: Mix, seed: int, args: argparse.Namespace) -> None:
    """Link the slices of `dataset`."""
    split = split_of(args)
    sources = {
        "real": args.reference,
        "replaced": synthetic_slices(mix, seed, args) if mix.replaced else None,
        "added": synthetic_slices(mix, seed, args, VARIANTS) if mix.added else None,
        "augmented": augmented_slices(seed, args) if mix.augmented else None,
    }
    variants = names_in(sources["added"] or sources["augmented"])
    found = members(mix, split[SIDE], names_in(sources["replaced"]), variants, seed)
    looked_at = split[tested_sides(split)[-1]]
    for part in ("images", "maps"):
        (out / part).mkdir(parents=True, exist_ok=True)
        for kind, names in [*found.items(), ("real", looked_at)]:
            for name in names:
                link = out / part / f"{name}.png"
                link.unlink(missing_ok=True)
                link.symlink_to((sources[kind] / part / link.name).resolve())
    write_split(out / "split.json", [*itertools.chain(*found.values())], looked_at, [], found)


# ------------------------------------------------------------------------------------------------ the U-Net


def train(mix: Mix, seed: int, args: argparse.Namespace) -> Path:
    """Train the U-Net of a mix, or go on with it; returns its folder. Raises Mistake."""
    out = folder(mix, seed, args)
    if (out / "results.json").exists():  # its generator need not be there any more
        runs.check_row(out, options_of(mix))
        return out
    size, length = runs.size_of(args.reference), args.unet_samples
    given = {"data": dataset(mix, seed, args), "size": size, "channels": args.channels, "seed": seed}
    given |= {"batch": args.batch, "epochs": 2, "epoch-len": length // 2, "dtype": args.dtype}
    given["interval"] = length // args.batch // generators.KEPT
    options = ["--preset", "paper", "--unchecked"]  # real slices were checked with the generator's data
    options += itertools.chain(*[(f"--{key}", str(value)) for key, value in given.items()])
    runs.train(["-m", "paper.segment"], options, out, options_of(mix))
    return out


def options_of(mix: Mix) -> str:
    """How a mix's generator is trained; "" where it has no synthetic slices."""
    return generators.options_of(mix.generator) if mix.replaced or mix.added else ""


@dataclass(frozen=True)
class Scores:
    """What a U-Net finds on real slices: eval.py's figures, "GGO Dice" and so on, of each slice, NaN: not defined."""

    names: list[str]
    figures: dict[str, np.ndarray]  # [N] each


def find_lesions(unet: Path, data: Path, names: list[str]) -> Scores:
    """Test an exported U-Net on real slices of a dataset; those without lung are left out, as in eval.py."""
    wanted = {*names}
    pairs = [pair for pair in evaluation.find_pairs(data, data) if pair.name in wanted]
    meter, kept = evaluation.Segmentation(unet, "auto"), []
    for together, batch in evaluation.batches(pairs, 1):
        meter.update(batch)
        kept += [pair.name for pair in together]
    real = {row.removeprefix("real "): np.concatenate(parts) for row, parts in meter.found.items() if row[:4] == "real"}
    return Scores(kept, real)


def score(mix: Mix, seed: int, args: argparse.Namespace) -> dict[str, Scores]:
    """Train the U-Net of a mix, export it and test it, except what is done already: its scores on each side.

    Raises Mistake.
    """
    out, split, found = train(mix, seed, args), split_of(args), {}
    for side in tested_sides(split):
        with runs.making(file := out / f"scores_{side}.json"):
            if not file.exists():
                write_scores(file, export(out), args.reference, split[side])
        found[side] = read_scores(file)
    return found


def export(out: Path) -> Path:
    """The U-Net of a run as a file, exported if it is not yet."""
    return runs.exported(out / "unet.onnx", out / "unet.pt")


def write_scores(file: Path, unet: Path, data: Path, names: list[str]) -> None:
    """Test an exported U-Net on real slices and write what it finds."""
    found = find_lesions(unet, data, names)
    figures = {row: [None if math.isnan(v) else float(v) for v in values] for row, values in found.figures.items()}
    write_bytes(file, (json.dumps({"names": found.names, "figures": figures}) + "\n").encode())


def read_scores(file: Path) -> Scores:
    """Read what `write_scores` wrote."""
    held = json.loads(file.read_text())
    return Scores(held["names"], {row: np.array(values, float) for row, values in held["figures"].items()})


def composition(mix: Mix, seed: int, args: argparse.Namespace) -> dict[str, int]:
    """How many slices of each kind the mix of a U-Net has."""
    drawn = json.loads((folder(mix, seed, args) / "data" / "split.json").read_text())["drawn"]
    return {kind: len(names) for kind, names in drawn.items()}
