"""Tables III, IV and V, and beyond them: are synthetic slices of use, and which part of the method pays off?

Table III swaps a share of a U-Net's real slices for synthetic ones of the same maps; Table IV adds synthetic slices of
augmented maps. Table V changes one part of the method at a time: FID and PSNR of its images, and infection Dice of a
U-Net with half of its slices swapped, which is what the paper's Table V repeats from its Table III (89.19). Beyond the
paper, "few" asks whether synthetic slices help where real ones are few, and more than the same augmentations of the
real slices do; the generators are Table II's, which have seen the whole training side. "beta" is Table V for who moves
beta, which the paper does not say.

Figures are mean +- 95 % interval as in the paper, over ten folds of the test slices, and beside it the interval over
patients, which is the one to go by, as slices of a patient are alike; it is about the mean of the patients' means. Both
are for one U-Net, averaged over the seeds; the deviation over seeds is in brackets. Where a map has no lesion, Dice is
100 if none is found, else 0. The head of paper/mixes.py says which sides train and test.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.slices import SIDES
from eval import LESIONS
from paper import generators, mixes, report, runs
from paper.mixes import Mix, Scores
from paper.report import apart, grid, interval

FOLDS = 10
METRICS = ("Dice", "sensitivity", "specificity")
FIGURES = [f"{lesion} {metric}" for lesion in LESIONS for metric in METRICS]
HEADLINE = "infection Dice"  # by which rows are compared
OF_PATIENTS = f"{HEADLINE} of patients"  # among what is kept: by patient two U-Nets are compared
KEY = "options of generator"  # among what is kept
IMAGES = {"FID 24": 4, "KID 1280": 4, "PSNR": 2}  # Table V's figures of complete images, and their decimals
FEW = {"20": 20, "50": 50, "all": 0}  # real slices; all: about 100 of the public set of 14 patients
TOLD = {
    "train": "slices that the generators have trained on, as the paper's text has it",
    "seg_test": "patients that neither network has seen, where the split is by patient",
}

Record = dict[str, Any]
Kept = dict[int, dict[str, Any]]  # what the U-Nets of a row have measured, by seed
FIGURE = ("mean", "ci95", "mean_patients", "ci95_patients")

# Tables III and IV: ratio -> Dice, Sen, Spec of GGO, of consolidation and of infection, in %; e is less than 1e-5
PAPER_3 = {
    "0%": "87.55±0.20 86.84±0.31 99.82±0.01 84.88±0.33 82.80±0.51 99.96±e 89.57±0.18 88.58±0.23 99.82±0.01",
    "10%": "87.34±0.27 85.08±0.45 99.85±0.01 85.91±0.44 84.23±0.55 99.96±e 89.35±0.32 87.14±0.39 99.85±0.01",
    "20%": "84.22±0.36 83.38±0.41 99.77±0.01 84.30±0.19 83.60±0.33 99.95±e 86.67±0.36 85.83±0.27 99.76±0.01",
    "30%": "87.43±0.35 85.73±0.41 99.84±0.01 86.01±0.21 87.14±0.21 99.95±e 89.32±0.22 88.11±0.30 99.82±0.01",
    "40%": "87.07±0.27 86.70±0.29 99.80±0.01 85.81±0.24 81.94±0.36 99.97±e 88.92±0.20 87.90±0.30 99.81±0.01",
    "50%": "86.98±0.35 86.46±0.40 99.80±0.01 85.58±0.23 82.18±0.36 99.97±e 89.19±0.24 88.12±0.37 99.82±0.01",
    "50% SEAN": "85.23±0.40 84.99±0.31 99.80±0.01 83.54±0.22 83.66±0.19 99.97±e 86.04±0.29 86.00±0.39 99.82±0.01",
    "50% SPADE": "83.04±0.28 81.56±0.24 99.80±0.01 81.89±0.20 81.50±0.30 99.96±e 85.99±0.21 84.05±0.15 99.81±0.01",
    "50% pix2pixHD": "81.24±0.37 79.53±0.29 99.79±0.01 80.20±0.44 78.14±0.46 99.96±e 83.22±0.45 83.01±0.48 99.80±0.01",
    "50% pix2pix": "75.33±0.24 71.02±0.38 99.75±0.01 72.01±0.25 70.55±0.21 99.95±e 79.10±0.25 78.89±0.39 99.77±0.01",
}
PAPER_4 = {
    "0%": PAPER_3["0%"],
    "10%": "87.65±0.40 85.82±0.32 99.84±0.01 86.12±0.33 86.02±0.63 99.95±e 89.67±0.31 88.11±0.32 99.84±0.01",
    "20%": "87.87±0.34 87.67±0.28 99.81±0.01 85.52±0.34 84.16±0.53 99.96±e 89.87±0.12 89.44±0.20 99.81±0.01",
    "30%": "87.99±0.36 87.25±0.36 99.82±0.01 86.33±0.30 86.38±0.51 99.95±e 89.78±0.22 89.17±0.27 99.82±0.01",
    "40%": "88.33±0.22 88.71±0.32 99.81±0.01 87.25±0.28 86.30±0.38 99.96±e 90.19±0.17 90.34±0.31 99.81±e",
    "50%": "88.16±0.30 86.88±0.01 99.84±0.01 87.09±0.34 86.54±0.47 99.96±e 90.06±0.30 88.88±0.18 99.83±0.01",
}
PAPER_5 = {  # FID, PSNR and Dice
    "ours": "0.0327 26.89 89.19±0.24",
    "without-DESUM": "0.0395 26.77 84.60±0.39",
    "F_global": "0.0355 26.70 87.88±0.29",
    "alpha-0.5": "0.0380 26.51 85.87±0.31",
    "without-DFM": "0.0381 26.62 86.10±0.33",
    "D2-feature": "0.0340 26.75 88.84±0.21",
    "beta-0.5": "0.0404 26.71 83.50±0.40",
    "D=1": "0.0579 26.55 79.44±0.80",
    "D=3": "0.0330 26.80 88.93±0.26",
    "G=1": "0.0604 26.51 76.03±0.52",
    "G=3": "0.0325 26.85 89.01±0.20",
}

# ------------------------------------------------------------------------------------------------ rows: what is trained

STEPS = (0.1, 0.2, 0.3, 0.4, 0.5)
OURS = ("covidgan", "covidgan-best")
ROWS_3: dict[str, Mix] = {
    "0%": Mix(),
    **{f"{share:.0%}": Mix(replaced=share) for share in STEPS},
    **{f"50% {name}": Mix(replaced=0.5, generator=name) for name in (*reversed(generators.RIVALS), OURS[1])},
}
ROWS_4: dict[str, Mix] = {
    "0%": Mix(),
    **{f"{share:.0%}": Mix(added=share) for share in STEPS},
    f"50% {OURS[1]}": Mix(added=0.5, generator=OURS[1]),
}


def half_swapped(rows: dict[str, generators.Row]) -> dict[str, Mix]:
    """Rows of Table V or its kind: ours, and each changed generator."""
    return {"ours": Mix(replaced=0.5), **{name: Mix(replaced=0.5, generator=name) for name in rows}}


def few_rows() -> dict[str, Mix]:
    """N real slices alone, beside synthetic ones, and beside as many of their own augmentations."""
    rows = {}
    for told, n in FEW.items():
        rows[f"{told} real"] = Mix(n)
        rows[f"{told} + augmented"] = Mix(n, augmented=mixes.TIMES)
        rows |= {f"{told} + {name}": Mix(n, added=mixes.TIMES, generator=name) for name in OURS}
    return rows


def few_against(row: str) -> list[str]:
    """The rows that a row of "few" is compared with."""
    n = row.split()[0]
    return [other for other in (f"{n} real", f"{n} + augmented") if other != row and not row.endswith("real")]


def against_first(rows: dict[str, Mix]) -> Callable[[str], list[str]]:
    """Compare every row with the first, and a rival's with those of ours that swap as much."""
    first = next(iter(rows))
    ours = [row for row, mix in rows.items() if mix.replaced == 0.5 and mix.generator in OURS]
    rival = [row for row, mix in rows.items() if mix.generator in generators.RIVALS]
    return lambda row: [] if row == first else [first, *ours] if row in rival else [first]


@dataclass(frozen=True)
class Experiment:
    """A table of U-Nets: its rows, what each is compared with, the paper's figures, and the sides reported."""

    rows: dict[str, Mix]
    against: Callable[[str], list[str]]
    paper: dict[str, str]
    sides: tuple[str, ...] = mixes.TESTED
    images: bool = False  # whether the images are measured too, as in Table V

    @property
    def sides_needed(self) -> tuple[str, ...]:
        """Sides that the datasets must have."""
        return SIDES if self.images or "train" not in self.sides else ("train", mixes.SIDE)

    def told(self, row: str) -> str:
        """What --list says of a row: its mix, and how its generator is trained."""
        return f"{self.rows[row].name:36} {mixes.options_of(self.rows[row])}".rstrip()

    def make(self, row: str, seed: int, args: argparse.Namespace) -> None:
        """Train and measure a row with a seed, and its generator, unless they are kept already. Raises Mistake."""
        mix = self.rows[row]
        runs.keep(args.results, f"{mixes.unet_of(mix)}_{seed}", lambda: measure(mix, seed, args))
        if self.images:
            generators.keep(mix.generator, seed, args)

    def collect(self, args: argparse.Namespace) -> dict[str, Any]:
        """All that is known of the table, from the measurements that are kept."""
        kept = {
            row: found
            for row, mix in self.rows.items()
            if (found := runs.kept(args.results, mixes.unet_of(mix), KEY, mixes.options_of(mix)))
        }
        sides = [side for side in mixes.tested_sides(args) if side in self.sides]
        records, differences = [], []
        for side, (row, found) in itertools.product(sides, kept.items()):
            records += lesion_records(row, side, found)
            compared = [difference(row, other, side, found, kept.get(other, {})) for other in self.against(row)]
            differences += [one for one in compared if one]
        for row, mix in self.rows.items() if self.images else ():
            records += image_records(row, mix, args)
        return {
            "setting": setting(kept, sides, args),
            "rows": {row: self.told(row) for row in dict.fromkeys(one["row"] for one in records)},
            "records": records,
            "paper": paper_records(self),
            "differences": differences,
            "differences of images": image_differences(records, self.against),
        }

    def markdown(self, table: dict[str, Any]) -> list[str]:
        """The table, for people to read."""
        lines = images_told(table) if self.images else []
        for side in table["setting"]["U-Net tested on"]:
            lines += side_told(table, side, [HEADLINE] if self.images else FIGURES)
        if self.paper:
            heads = [*dict.fromkeys(f"{one['class']} {one['metric']}" for one in table["paper"])]
            rows = [[row, *cells] for row, _, *cells in of_rows(table["paper"], None, heads)]
            lines += ["**The paper's**, on other data and by a U-Net of full width", "", *grid(["row", *heads], rows)]
        return lines


ROWS_5, ROWS_BETA = half_swapped(generators.ABLATIONS), half_swapped(generators.POLICIES)
TABLES = {
    "3": Experiment(ROWS_3, against_first(ROWS_3), PAPER_3),
    "4": Experiment(ROWS_4, against_first(ROWS_4), PAPER_4),
    "5": Experiment(ROWS_5, against_first(ROWS_5), PAPER_5, images=True),
    "few": Experiment(few_rows(), few_against, {}, sides=("seg_test",)),
    "beta": Experiment(ROWS_BETA, against_first(ROWS_BETA), {}, images=True),
}

# ------------------------------------------------------------------------------------------------ what is kept


def measure(mix: Mix, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and test the U-Net of a mix: what is kept of it."""
    scores, out = mixes.score(mix, seed, args), mixes.folder(mix, seed, args)
    begun = runs.begun(out)
    return {
        KEY: mixes.options_of(mix),
        "parameters": runs.read_json(out / "results.json")["parameters"],
        **{key: begun[key] for key in ("seconds", "commit", "machine")},
        "slices": mixes.composition(mix, seed, args),
        "sides": {side: summary(found) for side, found in scores.items()},
    }


def folds(n: int) -> list[np.ndarray]:
    """Indices of n test slices in ten parts, drawn once for all rows."""
    return [part for part in np.array_split(np.random.default_rng(0).permutation(n), FOLDS) if len(part)]


def over_folds(values: np.ndarray) -> tuple[float | None, float | None]:
    """Mean of the folds' means and half its 95 % interval, of slices' values [n], NaN left out; None if too few."""
    parts = [values[part][~np.isnan(values[part])] for part in folds(len(values))]
    return interval([float(part.mean()) for part in parts if len(part)])


def summary(scores: Scores) -> dict[str, Any]:
    """What is kept of a U-Net's scores on a side: each figure over folds and over patients, the patients' headlines
    without their names, which may be of people, and how many slices are without a pixel of each lesion."""
    patients = {name: report.by_patient(values, scores.names) for name, values in scores.figures.items()}
    figures = {name: (*over_folds(values), *interval(patients[name])) for name, values in scores.figures.items()}
    without = {lesion: int(np.isnan(scores.figures[f"{lesion} sensitivity"]).sum()) for lesion in LESIONS}
    return {
        "figures": {name: dict(zip(FIGURE, figure, strict=True)) for name, figure in figures.items()},
        OF_PATIENTS: patients[HEADLINE],
        "slices without": without,
    }


# ------------------------------------------------------------------------------------------------ figures


def averaged(values: list[float | None]) -> float | None:
    """Mean over the seeds; None where one has none."""
    return None if None in values or not values else float(np.mean(values))


def record(where: Record, seeds: list[int], figures: list[tuple[float | None, ...]]) -> Record:
    """A figure of a row: mean and interval, and both over patients, averaged over the seeds, and the means' spread."""
    columns = [list(values) for values in zip(*figures, strict=True)]
    means = columns[0]
    spread = float(np.std(means, ddof=1)) if len(means) > 1 and None not in means else None
    found = dict(zip(FIGURE, map(averaged, columns), strict=True))
    return where | found | {"seeds": seeds, "of seeds": means, "sd_seeds": spread}


def lesion_records(row: str, side: str, found: Kept) -> list[Record]:
    """The figures of a row's U-Nets on a side, in %."""
    records = []
    for lesion, metric in itertools.product(LESIONS, METRICS):
        held = [one["sides"][side]["figures"][f"{lesion} {metric}"] for one in found.values()]
        where = {"row": row, "class": lesion, "metric": metric, "side": side}
        records.append(record(where, [*found], [tuple(one[key] for key in FIGURE) for one in held]))
    return records


def image_records(row: str, mix: Mix, args: argparse.Namespace) -> list[Record]:
    """FID, KID and PSNR of the complete images of a row's generators; empty where none was measured yet."""
    kept, records = generators.kept(mix.generator, args), []
    keys = ("value", "interval", "patients_mean", "patients_interval")  # a figure of features has a value alone
    for metric in IMAGES if kept else ():
        figures = [one["figures"][f"complete {metric}"] for one in kept.values()]
        where = {"row": row, "class": "complete", "side": generators.REPORT, "metric": metric}
        records.append(record(where, [*kept], [tuple(figure.get(key) for key in keys) for figure in figures]))
    return records


def difference(row: str, other: str, side: str, ours: Kept, theirs: Kept) -> Record | None:
    """By how much the headline of a row is above another's, in %, patient by patient, for the seeds that both have.

    Clear: beyond the 95 % interval over patients, and beyond that over seeds. Over folds it is known of seeds too of
    which patients' scores were not kept. None where they share no seed.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    pairs = {seed: (ours[seed]["sides"][side], theirs[seed]["sides"][side]) for seed in shared}
    folds = [a["figures"][HEADLINE]["mean"] - b["figures"][HEADLINE]["mean"] for a, b in pairs.values()]
    told = {"row": row, "against": other, "side": side, "metric": HEADLINE}
    told |= {"over folds": float(np.mean(folds)), "seeds over folds": shared, "of seeds over folds": folds}
    told |= {"ci95_seeds over folds": interval(folds)[1]}
    kept = {
        seed: (a[OF_PATIENTS], b[OF_PATIENTS])
        for seed, (a, b) in pairs.items()
        if OF_PATIENTS in a and OF_PATIENTS in b
    }
    patients = np.array([np.subtract(a, b) for a, b in kept.values()])  # [seeds, patients]
    means = [float(values.mean()) for values in patients]
    mean, half = interval(patients.mean(0).tolist()) if kept else (None, None)
    half_seeds = interval(means)[1]
    clear = half is not None and half_seeds is not None and abs(mean) > max(half, half_seeds)
    told |= {"difference": mean, "ci95_patients": half, "ci95_seeds": half_seeds}
    return told | {"of seeds": means, "clear": bool(clear), "seeds": [*kept]}


def image_differences(records: list[Record], against: Callable[[str], list[str]]) -> list[Record]:
    """By how much each image figure of a row is above another's, over all seeds of each, by Welch's t."""
    of = {(one["row"], one["metric"]): one for one in records if one["class"] == "complete"}
    found = []
    for (row, metric), ours in of.items():
        for theirs in (of[other, metric] for other in against(row) if (other, metric) in of):
            if None not in [*ours["of seeds"], *theirs["of seeds"]]:
                mean, half = apart(ours["of seeds"], theirs["of seeds"])
                told = {"row": row, "against": theirs["row"], "metric": metric, "difference": mean, "ci95": half}
                found.append(told | {"seeds": ours["seeds"], "seeds of other": theirs["seeds"]})
    return found


def paper_records(experiment: Experiment) -> list[Record]:
    """The paper's figures, with e, which is less than 1e-5, as 1e-5."""
    lesions = [*itertools.product(LESIONS, METRICS)]
    heads = [("complete", "FID"), ("complete", "PSNR"), ("infection", "Dice")] if experiment.images else lesions
    found = []
    for row, figures in experiment.paper.items():
        for (lesion, metric), figure in zip(heads, figures.split(), strict=True):
            mean, _, half = figure.partition("±")
            ci95 = {"ci95": 1e-5 if half == "e" else float(half)} if half else {}
            found.append({"row": row, "class": lesion, "metric": metric, "mean": float(mean)} | ci95)
    return found


def setting(kept: dict[str, Kept], sides: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """What the figures hold for."""
    unets = [one for found in kept.values() for one in found.values()]
    return report.setting(args, kept.values()) | {
        "unit": "% of Dice, sensitivity, specificity",
        "U-Net trained on": mixes.SIDE,
        "U-Net tested on": {side: TOLD[side] for side in sides},
        "slices": {row: next(iter(found.values()))["slices"] for row, found in kept.items()},
        "U-Net": {"channels": args.channels, "samples": args.unet_samples},
        "parameters of U-Nets": sorted({one["parameters"] for one in unets}),
        "CPU seconds of a U-Net": averaged([one["seconds"] for one in unets if one["seconds"] is not None]),
        "slices without": {side: next((one["sides"][side]["slices without"] for one in unets), {}) for side in sides},
    }


# ------------------------------------------------------------------------------------------------ for people to read


def shown(one: Record, mean: str, half: str, digits: int) -> str:
    """A mean ± its interval, where there is one."""
    return f"{one[mean]:.{digits}f}" + (f" ± {one[half]:.{digits}f}" if one.get(half) is not None else "")


def cell(one: Record | None, digits: int = 2) -> str:
    """mean ± interval over folds (the same over patients) [deviation over seeds], as far as known."""
    if not one or one["mean"] is None:
        return "-"
    text = shown(one, "mean", "ci95", digits)
    if one.get("ci95_patients") is not None:
        text += f" ({shown(one, 'mean_patients', 'ci95_patients', digits)})"
    return text + (f" [{one['sd_seeds']:.{digits}f}]" if one.get("sd_seeds") is not None else "")


def of_rows(records: list[Record], side: str | None, heads: list[str]) -> list[list[str]]:
    """Lines of a table: each row's name, its seeds, and a cell for each head, "class metric"."""
    held = {(one["row"], f"{one['class']} {one['metric']}"): one for one in records if side in (None, one.get("side"))}
    digits = [(IMAGES | {"FID": 4}).get(head.partition(" ")[2], 2) for head in heads]  # FID: the paper's
    lines = []
    for row in dict.fromkeys(row for row, head in held if head in heads):
        ones = [held.get((row, head)) for head in heads]
        seeds = next((one["seeds"] for one in ones if one and "seeds" in one), ["-"])
        lines.append([row, ", ".join(map(str, seeds)), *map(cell, ones, digits)])
    return lines


def slices_told(counts: dict[str, int]) -> str:
    """How many slices of which kind a mix has, in words."""
    kinds = {
        "real": counts["real"],
        "synthetic": counts["replaced"] + counts["added"],
        "augmented": counts["augmented"],
    }
    return " + ".join(f"{n} {kind}" for kind, n in kinds.items() if n)


def side_told(table: dict[str, Any], side: str, heads: list[str]) -> list[str]:
    """The figures of U-Nets on a side, and their differences, as Markdown."""
    counts, without = (table["setting"][key] for key in ("slices", "slices without"))
    rows = [[row, slices_told(counts[row]), *cells] for row, *cells in of_rows(table["records"], side, heads)]
    spread = "%, mean ± 95 % interval over folds (over patients) [deviation over seeds]"
    lines = [f"**Tested on {side}**: {TOLD[side]}. {spread}", ""]
    if empty := [f"{n} without {lesion}" for lesion, n in without[side].items() if n]:
        lines += [f"Slices {', '.join(empty)}: their Dice is 100 where none is found, else 0.", ""]
    lines += grid(["row", "trained on", "seeds", *heads], rows)
    if differences := [told_apart(one) for one in table["differences"] if one["side"] == side]:
        clear = "clear: beyond the 95 % intervals over patients and over seeds"
        lines += [f"{HEADLINE}, differences over patients; {clear}:", "", *differences, ""]
    return lines


def told_apart(one: Record) -> str:
    """A line about a difference."""
    folds = f"over folds {one['over folds']:+.2f}"
    if len(over := one["seeds over folds"]) > max(1, len(one["seeds"])):
        each = ", ".join(f"{mean:+.2f}" for mean in one["of seeds over folds"])
        folds += f" ± {one['ci95_seeds over folds']:.2f} over seeds {', '.join(map(str, over))}: {each}"
    head = f"- {one['row']} against {one['against']}:"
    if one["difference"] is None:
        return f"{head} {folds}; over patients not known"
    half = f" ± {one['ci95_patients']:.2f}" if one["ci95_patients"] is not None else ""
    each = ", ".join(f"{mean:+.2f}" for mean in one["of seeds"])
    several = f"seeds {each}, ± {one['ci95_seeds']:.2f}" if len(one["seeds"]) > 1 else "one seed, no verdict"
    verdict = ": clear" if one["clear"] else ": cannot be told from noise" if len(one["seeds"]) > 1 else ""
    return f"{head} {one['difference']:+.2f}{half} ({folds}; {several}){verdict}"


def images_told(table: dict[str, Any]) -> list[str]:
    """The figures of images, and their differences, as Markdown; clear: beyond the 95 % interval over the seeds."""
    judge = f"FID and KID by features of {runs.FEATURES} of so many dimensions"
    spread = "PSNR ± 95 % interval over slices (over patients); [deviation over seeds]"
    lines = [f"**Images**, of {TOLD[generators.REPORT]}; {judge}; {spread}", ""]
    heads = [f"complete {metric}" for metric in IMAGES]
    lines += grid(["row", "seeds", *IMAGES], of_rows(table["records"], generators.REPORT, heads))
    pairs = itertools.groupby(table["differences of images"], key=lambda one: (one["row"], one["against"]))
    for (row, other), group in pairs:
        ones = [*group]
        told = [image_apart(one) for one in ones]
        seeds, theirs = (", ".join(map(str, ones[0][key])) for key in ("seeds", "seeds of other"))
        lines.append(f"- {row} (seeds {seeds}) against {other} ({theirs}): {'; '.join(told)}")
    return [*lines, ""]


def image_apart(one: Record) -> str:
    """A difference of images."""
    digits, half = IMAGES[one["metric"]], one["ci95"]
    verdict = " clear" if half is not None and abs(one["difference"]) > half else ""
    spread = f" ± {half:.{digits}f}{verdict}" if half is not None else ", one seed, no verdict"
    return f"{one['metric']} {one['difference']:+.{digits}f}{spread}"
