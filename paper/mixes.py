"""What a U-Net of Tables III to V trains on, real and synthetic slices together, and what it then finds (§IV-B.2).

It trains on the slices of SIDE, whose maps no generator has trained on. The paper says in its Table I that a third set
tests it, and in its text that the generators' training set does: both are tested. On the latter a synthetic slice may
carry over what a U-Net should not know; "seg_test" holds patients that neither network has seen.

Whatever it trains on, a U-Net sees the same number of samples. Real slices are those of --reference: a larger original
would be sharper than a synthetic slice.
"""

import argparse
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.slices import Mistake, read_image, read_map, read_split, write_split
from eval import LESIONS
from paper import generators, runs, segment

SIDE = "test"  # its slices and maps train a U-Net
TESTED = ("train", "seg_test")  # their real slices test it
VARIANTS = 2  # augmentations of each map, one more than is used: a map without lung has none


@dataclass(frozen=True)
class Mix:
    """A training set: real slices, and shares of their number of others."""

    replaced: float = 0.0  # real slices replaced by the synthetic ones of the same maps
    added: float = 0.0  # synthetic slices of augmented maps, beside the real ones
    generator: str = "covidgan"  # its name in paper/generators.py

    @property
    def options(self) -> str:
        """How its generator is trained; "" where it has no synthetic slices."""
        return generators.options_of(self.generator) if self.replaced or self.added else ""

    @property
    def name(self) -> str:
        """The name of its U-Nets: of their folders, and among what is kept."""
        shares = {"replaced": self.replaced, "added": self.added}
        parts = [f"{kind}{100 * share:.0f}" for kind, share in shares.items() if share]
        parts += [self.generator] if self.replaced or self.added else []
        return "-".join(["unet_real", *parts])


Members = dict[str, list[str]]  # names of a mix's slices: real, replaced, added


def members(mix: Mix, names: list[str], whole: list[str], variants: list[str], seed: int) -> Members:
    """Which slices a mix holds: of the side's `names`, those `whole` with a synthetic slice, and `variants` of maps.

    A seed draws one order, and every set is the beginning of it, so that a smaller share is part of a larger one.
    Raises Mistake where there are too few.
    """
    chosen = [names[k] for k in np.random.default_rng(seed).permutation(len(names))]
    turns = [f"{name}v{k:02d}" for k in range(1, VARIANTS + 1) for name in chosen]  # as infer_onnx.py names them
    swappable, turns = ([name for name in of if name in {*made}] for of, made in ((chosen, whole), (turns, variants)))

    def first(share: float, of: list[str]) -> list[str]:
        wanted = round(share * len(chosen))
        if wanted > len(of):
            raise Mistake(f"{mix.name}: {wanted} synthetic slices wanted, there are {len(of)}: leave it out")
        return of[:wanted]

    replaced = first(mix.replaced, swappable)
    real = [name for name in chosen if name not in {*replaced}]
    return {"real": real, "replaced": replaced, "added": first(mix.added, turns)}


def synthetic_slices(mix: Mix, seed: int, args: argparse.Namespace, kind: str) -> Path:
    """Dataset of complete synthetic slices by a mix's generator, of SIDE's maps; kind "variants": of augmented maps."""
    run = generators.train(mix.generator, seed, args)
    several = ["--variants", VARIANTS, "--seed", seed] if kind == "variants" else []
    return runs.synthesize(run, args.reference, SIDE, kind, "--complement", args.reference, *several)


def link(out: Path, source: Path, names: list[str], ending: str = "") -> list[str]:
    """Put links to slices and maps of a dataset into another, under their names and an ending; returns these."""
    for part, name in itertools.product(("images", "maps"), names):
        (out / part).mkdir(parents=True, exist_ok=True)
        path = out / part / f"{name}{ending}.png"
        path.unlink(missing_ok=True)
        path.symlink_to((source / part / f"{name}.png").resolve())
    return [name + ending for name in names]


def dataset(out: Path, mix: Mix, seed: int, args: argparse.Namespace) -> Path:
    """The mix as a dataset of links, made if it is not there yet.

    Its train side is the mix, its test side real slices to look at; split.json says which is which. Raises Mistake.
    """
    if (out / "split.json").exists():
        return out
    sources = {
        "real": args.reference,
        "replaced": synthetic_slices(mix, seed, args, "complete") if mix.replaced else None,
        "added": synthetic_slices(mix, seed, args, "variants") if mix.added else None,
    }
    made = {kind: sorted(path.stem for path in of.glob("images/*.png")) if of else [] for kind, of in sources.items()}
    split = read_split(args.reference / "split.json")
    found = members(mix, split[SIDE], made["replaced"], made["added"], seed)
    looked_at = split[TESTED[-1]]
    for kind, several in [*found.items(), ("real", looked_at)]:
        if several:
            link(out, sources[kind], several)
    write_split(out / "split.json", [*itertools.chain(*found.values())], looked_at, [], found)
    return out


def train(mix: Mix, seed: int, args: argparse.Namespace) -> Path:
    """Train the U-Net of a mix, or go on with it; returns its folder. Raises Mistake."""
    out = args.out / f"{mix.name}_{seed}"
    return generators.train_unet(out, dataset(out / "data", mix, seed, args), seed, args, mix.options)


def overlap(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Dice, sensitivity and specificity of masks, bool [H, W], over the full frame, in %.

    Dice of two empty masks is 100; sensitivity is NaN where the truth is empty, specificity where it is full.
    """
    both, found, true = (int(mask.sum()) for mask in (predicted & truth, predicted, truth))
    outside, rejected = truth.size - true, truth.size - found - true + both
    return {
        "Dice": 200 * both / (found + true) if found + true else 100.0,
        "sensitivity": 100 * both / true if true else math.nan,
        "specificity": 100 * rejected / outside if outside else math.nan,
    }


def find_lesions(run: Path, data: Path, side: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """Test a trained U-Net on a dataset's real slices of a side: their names, and of each figure the slices' values.

    Those without lung are left out, as in eval.py.
    """
    tested, images, maps, found = [], [], [], defaultdict(list)
    for name in sorted(read_split(data / "split.json")[side]):
        hu, labels = read_image(data / "images" / f"{name}.png"), read_map(data / "maps" / f"{name}.png")
        if labels.any():
            tested, images, maps = [*tested, name], [*images, hu], [*maps, labels]
    segmented = segment.probabilities(run / "unet.pt", np.stack(images)).argmax(1)
    for likeliest, labels in zip(segmented, maps, strict=True):
        for lesion, of_lesion in LESIONS.items():
            predicted, truth = np.isin(likeliest, of_lesion), np.isin(labels, of_lesion)
            for metric, value in overlap(predicted, truth).items():
                found[f"{lesion} {metric}"].append(value)
    return tested, {figure: np.array(values) for figure, values in found.items()}
