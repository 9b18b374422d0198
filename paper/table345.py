"""Tables III, IV and V, and beyond them: are synthetic slices of use, and which part of the method pays off?

Table III swaps a share of a U-Net's real slices for synthetic ones of the same maps. Table IV adds synthetic slices of
augmented maps. Table V changes one part of the method at a time: figures of its images, and infection Dice of a U-Net
with half of its slices swapped, as in Table III. Beyond the paper, "beta" is Table V for who moves beta.

Figures are mean +- 95 % interval as in the paper, over ten folds of the test slices. Beside it stands that over
patients, about the mean of their means: go by that, as slices of a patient are alike. Both are for one U-Net, averaged
over the seeds; the deviation over seeds is in brackets. The head of paper/mixes.py says which sides train and test.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval import LESIONS
from paper import generators, mixes, report, runs
from paper.generators import DIGITS, FID, KID
from paper.mixes import Mix
from paper.report import PAPER, apart, by_patient, grid, interval

FOLDS = 10
METRICS = ("Dice", "sensitivity", "specificity")
FIGURES = [f"{lesion} {metric}" for lesion in LESIONS for metric in METRICS]
HEADLINE = "infection Dice"  # by which rows are compared
OF_PATIENTS = f"{HEADLINE} of patients"  # among what is kept: by patient two U-Nets are compared
KEY = "options of generator"  # among what is kept
IMAGES = (FID, KID, "PSNR")  # Table V's figures of complete images
SEES = "On our data this bench sees no gain of Dice below about 8 points: 4,000 samples a U-Net, of two mild patients."
TOLD = {
    "train": "slices that the generators have trained on, as the paper's text has it",
    "seg_test": "patients that neither network has seen, where the split is by patient",
}

Record = dict[str, Any]
Kept = dict[int, dict[str, Any]]  # what the U-Nets of a row have measured, by seed
FIGURE = ("mean", "ci95", "mean_patients", "ci95_patients")

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

    def told(self, row: str) -> str:
        """What --list says of a row: its mix, and how its generator is trained."""
        return f"{self.rows[row].name:36} {self.rows[row].options}".rstrip()

    def make(self, row: str, seed: int, args: argparse.Namespace) -> None:
        """Train and measure a row with a seed, and its generator, unless they are kept already. Raises Mistake."""
        mix = self.rows[row]
        runs.keep(args.results, f"{mix.name}_{seed}", lambda: measure(mix, seed, args))
        if self.images:
            generators.keep(mix.generator, seed, args)

    def collect(self, args: argparse.Namespace) -> dict[str, Any]:
        """All that is known of the table, from the measurements that are kept."""
        kept = {row: runs.kept(args.results, mix.name, KEY, mix.options) for row, mix in self.rows.items()}
        kept = {row: found for row, found in kept.items() if found}
        unets = [one for found in kept.values() for one in found.values()]
        records, differences, images = [], [], []
        for side, (row, found) in itertools.product(self.sides, kept.items()):
            records += records_of(row, side, found)
            compared = [difference(row, other, side, found, kept.get(other, {})) for other in self.against(row)]
            differences += [one for one in compared if one]
        for row, mix in self.rows.items() if self.images else ():
            images += generators.records_of(row, generators.kept(mix.generator, args))
        return {
            "setting": runs.read_json(args.results / "runs" / "setting.json"),
            "slices without": {side: unets[0]["sides"][side]["slices without"] for side in self.sides if unets},
            "rows": {row: self.told(row) for row in kept},
            "slices": {row: next(iter(found.values()))["slices"] for row, found in kept.items()},
            "records": records,
            "differences": differences,
            "images": images,
            "differences of images": image_differences(images, self.against),
            "paper": self.paper,
        }

    def markdown(self, table: dict[str, Any]) -> list[str]:
        """The table, for people to read."""
        heads = [HEADLINE] if self.images else FIGURES
        lines = [SEES, "", *(images_told(table) if self.images else [])]
        for side in table["slices without"]:
            lines += side_told(table, side, heads)
        if self.paper:
            heads = ["complete FID", "complete PSNR", HEADLINE] if self.images else FIGURES
            rows = [[row, *figures.split()] for row, figures in self.paper.items()]
            lines += ["**The paper's**, on other data and by a U-Net of full width", "", *grid(["row", *heads], rows)]
        return lines


ROWS_5, ROWS_BETA = half_swapped(generators.ABLATIONS), half_swapped(generators.POLICIES)
TABLES = {
    "3": Experiment(ROWS_3, against_first(ROWS_3), PAPER["3"]),
    "4": Experiment(ROWS_4, against_first(ROWS_4), PAPER["4"]),
    "5": Experiment(ROWS_5, against_first(ROWS_5), PAPER["5"], images=True),
    "beta": Experiment(ROWS_BETA, against_first(ROWS_BETA), {}, images=True),
}


def measure(mix: Mix, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and test the U-Net of a mix: what is kept of it."""
    out = mixes.train(mix, seed, args)
    drawn = runs.read_json(out / "data" / "split.json")["drawn"]
    return {
        KEY: mix.options,
        "parameters": runs.read_json(out / "results.json")["parameters"],
        **runs.begun(out),
        "slices": {kind: len(names) for kind, names in drawn.items()},
        "sides": {side: summary(*mixes.find_lesions(out, args.reference, side)) for side in mixes.TESTED},
    }


def folds(n: int) -> list[np.ndarray]:
    """Indices of n test slices in ten parts, drawn once for all rows."""
    return [part for part in np.array_split(np.random.default_rng(0).permutation(n), FOLDS) if len(part)]


def over_folds(values: np.ndarray) -> tuple[float | None, float | None]:
    """Mean of the folds' means and half its 95 % interval, of slices' values [n], NaN left out; None if too few."""
    parts = [values[part][~np.isnan(values[part])] for part in folds(len(values))]
    return interval([float(part.mean()) for part in parts if len(part)])


def summary(names: list[str], scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is kept of a U-Net's scores on a side: each figure over folds and over patients, the patients' headlines
    without their names, which may be of people, and how many slices are without a pixel of each lesion.

    scores: of each figure, "GGO Dice" and so on, in %, those of the slices of these names, NaN: not defined.
    """
    patients = {name: by_patient(values, names) for name, values in scores.items()}
    figures = {name: (*over_folds(values), *interval(patients[name])) for name, values in scores.items()}
    without = {lesion: int(np.isnan(scores[f"{lesion} sensitivity"]).sum()) for lesion in LESIONS}
    named = {name: dict(zip(FIGURE, figure, strict=True)) for name, figure in figures.items()}
    return {"figures": named, OF_PATIENTS: patients[HEADLINE], "slices without": without}


def records_of(row: str, side: str, found: Kept) -> list[Record]:
    """The figures of a row's U-Nets on a side, in %: averaged over the seeds, and the deviation of their means."""
    records = []
    for lesion, metric in itertools.product(LESIONS, METRICS):
        held = [one["sides"][side]["figures"][f"{lesion} {metric}"] for one in found.values()]
        means = [one["mean"] for one in held]
        spread = float(np.std(means, ddof=1)) if len(means) > 1 and None not in means else None
        told = {"row": row, "class": lesion, "metric": metric, "side": side, "seeds": [*found]}
        told["on a GPU"] = [seed for seed, one in found.items() if report.on_gpu(one)]
        for key in FIGURE:
            values = [one[key] for one in held]
            told[key] = None if None in values else float(np.mean(values))
        records.append(told | {"of seeds": means, "sd_seeds": spread})
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
    of_folds = [a["figures"][HEADLINE]["mean"] - b["figures"][HEADLINE]["mean"] for a, b in pairs.values()]
    told = {"row": row, "against": other, "side": side, "metric": HEADLINE}
    told |= {"over folds": float(np.mean(of_folds)), "seeds over folds": shared, "of seeds over folds": of_folds}
    told |= {"ci95_seeds over folds": interval(of_folds)[1]}
    kept = {seed: pair for seed, pair in pairs.items() if all(OF_PATIENTS in one for one in pair)}
    patients = np.array([np.subtract(a[OF_PATIENTS], b[OF_PATIENTS]) for a, b in kept.values()])  # [seeds, patients]
    means = [float(values.mean()) for values in patients]
    mean, half = interval(patients.mean(0).tolist()) if kept else (None, None)
    half_seeds = interval(means)[1]
    clear = half is not None and half_seeds is not None and abs(mean) > max(half, half_seeds)
    told |= {"difference": mean, "ci95_patients": half, "ci95_seeds": half_seeds}
    return told | {"of seeds": means, "clear": bool(clear), "seeds": [*kept]}


def image_differences(images: list[Record], against: Callable[[str], list[str]]) -> list[Record]:
    """By how much each figure of complete images of a row is above another's, over all seeds of each, by Welch's t."""
    values, found = report.over_records(images), []
    for row, metric in itertools.product(dict.fromkeys(one["method"] for one in images), IMAGES):
        for other in against(row):
            ours, theirs = (values.get((one, "complete", metric)) for one in (row, other))
            if ours and theirs:
                mean, half = apart(ours, theirs)
                told = {"row": row, "against": other, "metric": metric, "difference": mean, "ci95": half}
                found.append(told | {"clear": half is not None and abs(mean) > half})
    return found


def cell(one: Record) -> str:
    """mean ± interval over folds (the same over patients) [deviation over seeds], as far as known."""
    if one["mean"] is None:
        return "-"
    half, half_patients, spread = (one[key] for key in ("ci95", "ci95_patients", "sd_seeds"))
    text = f"{one['mean']:.2f}" + (f" ± {half:.2f}" if half is not None else "")
    text += f" ({one['mean_patients']:.2f} ± {half_patients:.2f})" if half_patients is not None else ""
    return text + (f" [{spread:.2f}]" if spread is not None else "")


def slices_told(counts: dict[str, int]) -> str:
    """How many slices of which kind a mix has, in words."""
    kinds = {**counts, "synthetic": counts["replaced"] + counts["added"]}
    return " + ".join(f"{kinds[kind]} {kind}" for kind in ("real", "synthetic") if kinds.get(kind))


def side_told(table: dict[str, Any], side: str, heads: list[str]) -> list[str]:
    """The figures of U-Nets on a side, and their differences, as Markdown."""
    spread = "%, mean ± 95 % interval over folds (over patients) [deviation over seeds]"
    lines = [f"**Tested on {side}**: {TOLD[side]}. {spread}", ""]
    without = table["slices without"][side]
    if empty := [f"{n} without {lesion}" for lesion, n in without.items() if n]:
        lines += [f"Slices {', '.join(empty)}: their Dice is 100 where none is found, else 0.", ""]
    ours = [one for one in table["records"] if one["side"] == side and f"{one['class']} {one['metric']}" in heads]
    rows = []
    for row, group in itertools.groupby(ours, key=lambda one: one["row"]):
        several = [*group]
        seeds = ", ".join(report.marked(seed, seed in several[0]["on a GPU"]) for seed in several[0]["seeds"])
        rows.append([row, slices_told(table["slices"][row]), seeds, *map(cell, several)])
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
    if len(one["seeds"]) == 1:
        return f"{head} {one['difference']:+.2f}{half} ({folds}; one seed, no verdict)"
    seeds = f"seeds {', '.join(f'{mean:+.2f}' for mean in one['of seeds'])}, ± {one['ci95_seeds']:.2f}"
    verdict = "clear" if one["clear"] else "cannot be told from noise"
    return f"{head} {one['difference']:+.2f}{half} ({folds}; {seeds}): {verdict}"


def images_told(table: dict[str, Any]) -> list[str]:
    """The figures of images, and their differences, as Markdown; clear: beyond the 95 % interval over the seeds."""
    judge = f"FID and KID by features of {runs.FEATURES} of so many dimensions; +- deviation over seeds"
    lines = [f"**Images**, of {TOLD[generators.REPORT]}; {judge}", ""]
    lines += report.quality(table["images"], "complete", {metric: DIGITS[metric] for metric in IMAGES})
    pairs = itertools.groupby(table["differences of images"], key=lambda one: (one["row"], one["against"]))
    for (row, other), group in pairs:
        told = []
        for one in group:
            digits, half = DIGITS[one["metric"]], one["ci95"]
            spread = f" ± {half:.{digits}f}{' clear' * one['clear']}" if half is not None else ", one seed, no verdict"
            told.append(f"{one['metric']} {one['difference']:+.{digits}f}{spread}")
        lines.append(f"- {row} against {other}: {'; '.join(told)}")
    return [*lines, ""]
