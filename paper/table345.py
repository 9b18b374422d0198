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
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import eval as evaluation
from data.slices import SIDES, patient_of
from paper import generators, measures, mixes, runs
from paper.mixes import Mix, Scores
from paper.report import Table, apart, grid

FOLDS = 10
METRICS = ("Dice", "sensitivity", "specificity")
FIGURES = [f"{lesion} {metric}" for lesion in evaluation.LESIONS for metric in METRICS]  # as eval.py names them
HEADLINE = "infection Dice"  # by which rows are compared
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


@dataclass(frozen=True)
class Experiment:
    """A table of U-Nets: its rows, the sides reported, what each row is compared with, and the paper's figures."""

    rows: dict[str, Mix]
    against: Callable[[str], list[str]]
    paper: dict[str, str]
    sides: tuple[str, ...] = mixes.TESTED
    images: bool = False  # whether the images are measured too, as in Table V


def against_first(rows: dict[str, Mix]) -> Callable[[str], list[str]]:
    """Compare every row with the first, and a rival's with those of ours that swap as much."""
    first = next(iter(rows))
    ours = [row for row, mix in rows.items() if mix.replaced == 0.5 and mix.generator in OURS]
    rival = [row for row, mix in rows.items() if mix.generator in generators.RIVALS]
    return lambda row: [] if row == first else [first, *ours] if row in rival else [first]


ROWS_5, ROWS_BETA = half_swapped(generators.ABLATIONS), half_swapped(generators.POLICIES)
EXPERIMENTS = {
    "3": Experiment(ROWS_3, against_first(ROWS_3), PAPER_3),
    "4": Experiment(ROWS_4, against_first(ROWS_4), PAPER_4),
    "5": Experiment(ROWS_5, against_first(ROWS_5), PAPER_5, images=True),
    "few": Experiment(few_rows(), few_against, {}, sides=("seg_test",)),
    "beta": Experiment(ROWS_BETA, against_first(ROWS_BETA), {}, images=True),
}


def make(experiment: Experiment, name: str, seed: int, args: argparse.Namespace) -> None:
    """Train and measure a row with a seed, and its generator if it is not there yet, and keep it. Raises Mistake."""
    mix = experiment.rows[name]
    scores, out = mixes.score(mix, seed, args), mixes.folder(mix, seed, args)
    told = {
        "options of generator": mixes.options_of(mix),
        "parameters": json.loads((out / "results.json").read_text())["parameters"],
        "seconds": runs.seconds(out),
        "commit": runs.begun(out)["commit"],
        "machine": runs.begun(out)["machine"],
        "commit of generator": generators.commit_of(mix.generator, seed, args) if mixes.options_of(mix) else None,
        "slices": mixes.composition(mix, seed, args),
        "sides": {side: summary(found) for side, found in scores.items()},
    }
    runs.keep_measures(args.results, f"{mixes.unet_of(mix)}_{seed}", told)
    if experiment.images:
        measures.keep_generator(mix.generator, seed, args)


# ------------------------------------------------------------------------------------------------ figures


def folds(n: int) -> list[np.ndarray]:
    """Indices of n test slices in ten parts, drawn once for all rows."""
    return [part for part in np.array_split(np.random.default_rng(0).permutation(n), FOLDS) if len(part)]


def over_folds(values: np.ndarray) -> tuple[float | None, float | None]:
    """Mean of the folds' means and half its 95 % interval, of slices' values [n], NaN left out; None if too few."""
    parts = [values[part][~np.isnan(values[part])] for part in folds(len(values))]
    mean, half, _ = evaluation.interval([float(part.mean()) for part in parts if len(part)])
    return mean, half


def over_patients(values: np.ndarray, names: list[str]) -> tuple[float | None, float | None]:
    """Mean of the patients' means and half its 95 % interval, of slices' values [n]; None where there are too few."""
    found = evaluation.estimate(values, names)
    return found["patients_mean"], found["patients_interval"]


def summary(scores: Scores) -> dict[str, Any]:
    """What is kept of a U-Net's scores on a side, in %: each figure over folds and over patients, and the headline of
    each patient, by which two U-Nets are compared; also how many slices are without a pixel of each lesion."""
    percent = {name: 100 * values for name, values in scores.figures.items()}
    return {
        "figures": {
            name: dict(zip(FIGURE, (*over_folds(values), *over_patients(values, scores.names)), strict=True))
            for name, values in percent.items()
        },
        f"{HEADLINE} of patients": of_patients(percent[HEADLINE], scores.names),
        "slices without": {
            lesion: int(np.isnan(percent[f"{lesion} sensitivity"]).sum()) for lesion in evaluation.LESIONS
        },
    }


def of_patients(values: np.ndarray, names: list[str]) -> list[float]:
    """Each patient's mean of slices' values [n], none of which is NaN; without the names, which may be of people."""
    patients = [patient_of(name) for name in names]
    return [float(values[np.array(patients) == patient].mean()) for patient in dict.fromkeys(patients)]


def averaged(values: list[float | None]) -> float | None:
    """Mean over the seeds; None where one has none."""
    return None if None in values or not values else float(np.mean(values))


def spread(means: list[float | None]) -> float | None:
    """Standard deviation over the seeds; None for one."""
    return float(np.std(means, ddof=1)) if len(means) > 1 and None not in means else None


def record(where: Record, seeds: list[int], figures: list[tuple[float | None, ...]]) -> Record:
    """A figure of a row: mean and interval, and both over patients, averaged over the seeds, and the means' spread."""
    columns = [list(values) for values in zip(*figures, strict=True)]
    found = dict(zip(FIGURE, map(averaged, columns), strict=True))
    return where | found | {"seeds": seeds, "of seeds": columns[0], "sd_seeds": spread(columns[0])}


def lesion_record(row: str, lesion: str, metric: str, side: str, found: Kept) -> Record:
    """A figure of a row's U-Nets on a side, in %."""
    held = [one["sides"][side]["figures"][f"{lesion} {metric}"] for one in found.values()]
    where = {"row": row, "class": lesion, "metric": metric, "side": side}
    return record(where, [*found], [tuple(one[key] for key in FIGURE) for one in held])


def difference(row: str, other: str, side: str, ours: Kept, theirs: Kept) -> Record | None:
    """By how much the headline of a row is above another's, in %, patient by patient, for the seeds that both have.

    Clear: beyond the 95 % interval over patients, and beyond that over seeds. Over folds it is known of seeds too of
    which patients' scores were not kept. None where they share no seed.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    both = {seed: (ours[seed]["sides"][side], theirs[seed]["sides"][side]) for seed in shared}
    folds = [np.subtract(*(one["figures"][HEADLINE]["mean"] for one in pair)).item() for pair in both.values()]
    told = {"row": row, "against": other, "side": side, "metric": HEADLINE}
    told |= {"over folds": float(np.mean(folds)), "seeds over folds": shared, "of seeds over folds": folds}
    told |= {"ci95_seeds over folds": evaluation.interval(folds)[1]}
    key = f"{HEADLINE} of patients"
    kept = {seed: pair for seed, pair in both.items() if all(key in one for one in pair)}
    return told | over_the_same_patients([[one[key] for one in pair] for pair in kept.values()]) | {"seeds": [*kept]}


def over_the_same_patients(pairs: list[list[list[float]]]) -> Record:
    """A difference over patients of each seed's pair of U-Nets, [seeds][2][patients]; None where there is no seed."""
    if not pairs:
        return {"difference": None, "ci95_patients": None, "ci95_seeds": None, "of seeds": [], "clear": False}
    patients = np.array([np.subtract(*pair) for pair in pairs])
    means = patients.mean(1).tolist()
    mean, half, _ = evaluation.interval(patients.mean(0).tolist())
    half_seeds = evaluation.interval(means)[1]
    clear = half is not None and half_seeds is not None and abs(mean) > max(half, half_seeds)
    told = {"difference": mean, "ci95_patients": half, "ci95_seeds": half_seeds}
    return told | {"of seeds": means, "clear": bool(clear)}


def image_differences(records: list[Record], against: Callable[[str], list[str]]) -> list[Record]:
    """By how much each image figure of a row is above another's, over all seeds of each, by Welch's t."""
    of = {(one["row"], one["metric"]): one for one in records if one["class"] == "complete"}
    found = []
    for (row, metric), ours in of.items():
        for theirs in (of[other, metric] for other in against(row) if (other, metric) in of):
            if None not in [*ours["of seeds"], *theirs["of seeds"]]:
                difference, ci95 = apart(ours["of seeds"], theirs["of seeds"])
                told = {"row": row, "against": theirs["row"], "metric": metric, "difference": difference, "ci95": ci95}
                found.append(told | {"seeds": ours["seeds"], "seeds of other": theirs["seeds"]})
    return found


def image_records(row: str, mix: Mix, args: argparse.Namespace) -> list[Record]:
    """FID, KID and PSNR of the complete images of a row's generators; empty where none was measured yet."""
    kept = measures.kept_generators(mix.generator, args)
    where = {"row": row, "class": "complete", "side": generators.REPORT}
    keys = ("value", "interval", "patients_mean", "patients_interval")  # a figure of features has a value alone
    found = []
    for metric in IMAGES if kept else []:
        figures = [one["figures"][f"complete {metric}"] for one in kept.values()]
        each = [tuple(figure.get(key) for key in keys) for figure in figures]
        found.append(record(where | {"metric": metric}, [*kept], each))
    return found


def paper_records(experiment: Experiment) -> list[Record]:
    """The paper's figures, with e, which is less than 1e-5, as 1e-5."""
    heads = [("complete", "FID"), ("complete", "PSNR"), ("infection", "Dice")]
    if not experiment.images:
        heads = [*itertools.product(evaluation.LESIONS, METRICS)]
    found = []
    for row, figures in experiment.paper.items():
        for (lesion, metric), figure in zip(heads, figures.split(), strict=True):
            mean, _, half = figure.partition("±")
            ci95 = {"ci95": 1e-5 if half == "e" else float(half)} if half else {}
            found.append({"row": row, "class": lesion, "metric": metric, "mean": float(mean)} | ci95)
    return found


def collect(experiment: Experiment, args: argparse.Namespace) -> dict[str, Any]:
    """All that is known of a table, from the measurements that are kept."""
    kept = {row: runs.kept_seeds(args.results, mixes.unet_of(mix)) for row, mix in experiment.rows.items()}
    kept = {row: found for row, found in kept.items() if found}
    for row, found in kept.items():
        for seed, one in found.items():
            mix = experiment.rows[row]
            now = mixes.options_of(mix)
            measures.check_options(f"{mixes.unet_of(mix)}_{seed}", one["options of generator"], now, args)
    sides = [side for side in mixes.tested_sides(mixes.split_of(args)) if side in experiment.sides]
    records, differences = [], []
    for side, (row, found) in itertools.product(sides, kept.items()):
        for lesion, metric in itertools.product(evaluation.LESIONS, METRICS):
            records.append(lesion_record(row, lesion, metric, side, found))
        for other in experiment.against(row):
            differences.append(difference(row, other, side, found, kept.get(other, {})))
    if experiment.images:
        records += [one for row, mix in experiment.rows.items() for one in image_records(row, mix, args)]
    known = dict.fromkeys(one["row"] for one in records)
    return {
        "setting": setting(kept, sides, args),
        "rows": {row: listed_row(experiment.rows[row]) for row in known},
        "records": records,
        "paper": paper_records(experiment),
        "differences": [one for one in differences if one],
        "differences of images": image_differences(records, experiment.against),
    }


def setting(kept: dict[str, Kept], sides: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """What the figures hold for."""
    unets = [one for found in kept.values() for one in found.values()]
    first = {row: next(iter(found.values())) for row, found in kept.items()}
    return {
        "unit": "% of Dice, sensitivity, specificity",
        "data": runs.sides_of(args.reference),
        "U-Net trained on": mixes.SIDE,
        "U-Net tested on": {side: TOLD[side] for side in sides},
        "slices": {row: one["slices"] for row, one in first.items()},
        "size": runs.size_of(args.reference),
        "U-Net": {
            "channels": args.channels,
            "samples": args.unet_samples,
            "parameters": sorted({one["parameters"] for one in unets}),
        },
        "generators": {"ngf, ndf": args.ngf, "samples at full size": args.samples},
        "batch": args.batch,
        "features": runs.FEATURES,
        "CPU seconds of a U-Net": averaged([one["seconds"] for one in unets if one["seconds"] is not None]),
        "commits": sorted({one["commit"] for one in unets}),
        "machines of U-Nets, as far as kept": sorted({one["machine"] for one in unets if "machine" in one}),
        "commits of generators": sorted({one["commit of generator"] for one in unets} - {None}),
        "slices without": {side: next((one["sides"][side]["slices without"] for one in unets), {}) for side in sides},
    }


# ------------------------------------------------------------------------------------------------ for people to read


def cell(one: Record | None, digits: int = 2) -> str:
    """mean ± interval over folds (the same over patients) [deviation over seeds], as far as known."""
    if not one or one["mean"] is None:
        return "-"

    def shown(mean: str, half: str) -> str:
        spread = f" ± {one[half]:.{digits}f}" if one.get(half) is not None else ""
        return f"{one[mean]:.{digits}f}{spread}"

    of_patients = f" ({shown('mean_patients', 'ci95_patients')})" if one.get("ci95_patients") is not None else ""
    seeds = f" [{one['sd_seeds']:.{digits}f}]" if one.get("sd_seeds") is not None else ""
    return shown("mean", "ci95") + of_patients + seeds


def of_rows(records: list[Record], side: str | None, heads: list[str]) -> list[list[str]]:
    """Lines of a table: each row's name, its seeds, and a cell for each head, "class metric"."""
    held = {(one["row"], f"{one['class']} {one['metric']}"): one for one in records if side in (None, one.get("side"))}
    lines = []
    for row in dict.fromkeys(row for row, _ in held):
        seeds = next((held[row, head]["seeds"] for head in heads if "seeds" in held.get((row, head), {})), ["-"])
        digits = [(IMAGES | {"FID": 4}).get(head.partition(" ")[2], 2) for head in heads]  # FID: the paper's
        cells = [cell(held.get((row, head)), d) for head, d in zip(heads, digits, strict=True)]
        lines.append([row, ", ".join(map(str, seeds)), *cells])
    return lines


def slices_told(counts: dict[str, int]) -> str:
    """How many slices of which kind a mix has, in words."""
    kinds = {
        "real": counts["real"],
        "synthetic": counts["replaced"] + counts["added"],
        "augmented": counts["augmented"],
    }
    return " + ".join(f"{n} {kind}" for kind, n in kinds.items() if n)


def empty_told(counts: dict[str, int]) -> list[str]:
    """A line about slices without a lesion, whose Dice counts as 100 or 0; none where each slice has every lesion."""
    told = [f"{n} without {lesion}" for lesion, n in counts.items() if n]
    return [f"Slices {', '.join(told)}: their Dice is 100 where none is found, else 0.", ""] if told else []


def images_apart(differences: list[Record]) -> list[str]:
    """Lines about the differences of images, one per row; clear: beyond the 95 % interval over the seeds."""
    lines = []
    for row, other in dict.fromkeys((one["row"], one["against"]) for one in differences):
        told = []
        for one in (one for one in differences if (one["row"], one["against"]) == (row, other)):
            digits, half = IMAGES[one["metric"]], one["ci95"]
            verdict = " clear" if half is not None and abs(one["difference"]) > half else ""
            spread = f" ± {half:.{digits}f}{verdict}" if half is not None else ", one seed, no verdict"
            told.append(f"{one['metric']} {one['difference']:+.{digits}f}{spread}")
        seeds, theirs = (", ".join(map(str, one[key])) for key in ("seeds", "seeds of other"))
        lines.append(f"- {row} (seeds {seeds}) against {other} ({theirs}): {'; '.join(told)}")
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


def markdown(experiment: Experiment, table: dict[str, Any]) -> str:
    """A table for people to read."""
    lines, sides = [], table["setting"]["U-Net tested on"]
    if experiment.images:
        heads = [f"complete {metric}" for metric in IMAGES]
        judge = f"FID and KID by features of {runs.FEATURES} of so many dimensions; PSNR ± 95 % interval over slices"
        judge += " (over patients); [deviation over seeds]"
        lines += [f"**Images**, of {TOLD[generators.REPORT]}; {judge}", ""]
        lines += grid(["row", "seeds", *IMAGES], of_rows(table["records"], generators.REPORT, heads))
        lines += [*images_apart(table["differences of images"]), ""]
    for side, told in sides.items():
        heads = [HEADLINE] if experiment.images else FIGURES
        segmented = [one for one in table["records"] if one["class"] != "complete"]
        spread = "± 95 % interval over folds (over patients) [deviation over seeds]"
        lines += [f"**Tested on {side}**: {told}. %, mean {spread}", ""]
        lines += empty_told(table["setting"]["slices without"][side])
        counts = table["setting"]["slices"]
        rows = [[row, slices_told(counts[row]), *cells] for row, *cells in of_rows(segmented, side, heads)]
        lines += grid(["row", "trained on", "seeds", *heads], rows)
        differences = [told_apart(one) for one in table["differences"] if one["side"] == side]
        clear = "clear: beyond the 95 % intervals over patients and over seeds"
        lines += [f"{HEADLINE}, differences over patients; {clear}:", "", *differences, ""] if differences else []
    if table["paper"]:
        heads = [*dict.fromkeys(f"{one['class']} {one['metric']}" for one in table["paper"])]
        lines += ["**The paper's**, on other data and by a U-Net of full width", ""]
        lines += grid(["row", *heads], [[row, *cells] for row, _, *cells in of_rows(table["paper"], None, heads)])
    lines += [f"Setting: `{json.dumps(table['setting'])}`"]
    return "\n".join(lines)


def listed(experiment: Experiment) -> dict[str, str]:
    """What --list says of each row."""
    return {row: listed_row(mix) for row, mix in experiment.rows.items()}


def listed_row(mix: Mix) -> str:
    """A mix's name and how its generator is trained."""
    return f"{mix.name:36} {mixes.options_of(mix)}".rstrip()


def table(experiment: Experiment) -> Table:
    """An experiment as paper/tables.py takes it."""
    sides = SIDES if experiment.images or experiment.sides != mixes.TESTED else ("train", mixes.SIDE)
    made, found, told = (partial(work, experiment) for work in (make, collect, markdown))
    return Table(listed(experiment), made, lambda row: mixes.unet_of(experiment.rows[row]), found, told, sides=sides)


TABLES: dict[str, Table] = {key: table(experiment) for key, experiment in EXPERIMENTS.items()}
