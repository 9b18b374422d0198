"""Table II: how good are the images? covidgan and its four rivals, on the same slices, with the same metrics.

Trains on the train side of --data at the size of --reference; side "seg_test" is reported. What preset "best" and the
clean rows add to the rows as published was chosen by side "test", but with figures of "seg_test" in view
(paper/fidelity.md).
"""

import argparse
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from paper import generators, report, runs
from paper.generators import BETTER, DICE, DIGITS, FID, FLOORS, KID, OBEYS, REGIONS, RIVALS, ROWS, records_of
from paper.report import PAPER, apart, grid

# One error of pixels, of which the paper has four. Its "RMSE" is over the real slice's own RMS, as its PSNR shows.
COMPARED = (*itertools.product(REGIONS, (FID, KID)), ("lung", "PSNR"))
COSTS = ("method", "seed", "budget", "seconds", "samples", "parameters", "synthesis", "commit", "machine")

Record = dict[str, Any]


@dataclass(frozen=True)
class Images:
    """Table II as paper/tables.py takes it: its rows, and which of ours are compared with rivals of which ending."""

    rows: dict[str, generators.Row]
    pairs: list[tuple[str, str]]

    def told(self, row: str) -> str:
        """What --list says of a row."""
        return f"{self.rows[row].kind.name} {generators.options_of(row)}"

    def make(self, row: str, seed: int, args: argparse.Namespace) -> None:
        """Train and measure a row with a seed, if it is not kept yet. Raises Mistake."""
        generators.keep(row, seed, args)

    def collect(self, args: argparse.Namespace) -> dict[str, Any]:
        """All that is known of Table II, from the measurements that are kept."""
        records, every = [], []
        for name in FLOORS:
            floor = generators.keep_floor(name, args)
            records += records_of(name, {None: floor})
        ceiling = {f"complete {DICE}": floor["figures"].get(generators.CEILING, {})}
        records += records_of("real slices", {None: {"figures": ceiling}})
        for name in self.rows:
            kept = generators.kept(name, args)
            every += kept.values()
            for key, method in generators.methods_of(name).items():
                records += records_of(method, kept, key)
        return {
            "setting": runs.read_json(args.results / "runs" / "setting.json"),
            "rows": {one["method"]: self.told(one["method"]) for one in every},
            "records": records,
            "paper": PAPER["2"],
            "costs": [{key: one[key] for key in COSTS if key in one} for one in every],
            "comparisons": [comparison(records, ours, ending) for ours, ending in self.pairs],
        }

    def markdown(self, table: dict[str, Any]) -> list[str]:
        """The table, for people to read."""
        budget, lines = table["setting"].get("seconds"), []
        if budget:
            lines += [f"Each row is trained on as many samples as {budget:,} CPU seconds give.", *ABOUT, ""]
        for region in REGIONS:
            lines += [f"**{region}**, mean +- deviation over the seeds", ""]
            lines += report.quality(table["records"], region, DIGITS)
        if budget:
            lines += ["**steering**: medians over maps, HU", "", *report.quality(table["records"], "steering", OBEYS)]
        heads = [f"{region} {metric}" for region in REGIONS for metric in ("FID", "PSNR", "SSIM", "RMSE (our NRMSE)")]
        paper = grid(["method", *heads], [[method, *figures.split()] for method, figures in PAPER["2"].items()])
        lines += ["**The paper's**, on other data, its FID of another network", "", *paper]
        return [*lines, "**Costs**", "", *costs_of(table["costs"]), "**Comparisons**", "", *verdicts(table)]


ABOUT = (
    "Told: given the real slice's density and detail of healthy lung. Drawn: given those of a training slice.",
    f"{DICE}: how well one trained on the train side's real slices finds the lesions of the synthetic ones, %.",
)
OURS = [name for name in ROWS if name.startswith("covidgan")]
EQUAL_SAMPLES = Images(ROWS, [*itertools.product(OURS, ("", "-clean"))])
STEERED = [(f"best-{row} {how}", f"-steer {how}") for row in ("steer", "draws") for how in ("told", "drawn")]
EQUAL_SECONDS = Images(generators.TIMED, [("best", "-clean"), *STEERED])


def comparison(records: list[Record], ours: str, ending: str) -> dict[str, Any]:
    """In how many of the 20 comparisons a method of ours is ahead of the rivals of this ending, such as "-clean".

    Clearly: beyond the 95 % interval of the difference of the two means over the seeds, by Welch's t; of one seed
    nothing is clear.
    """
    values, told = report.over_records(records), []
    for name, (region, metric) in itertools.product(RIVALS, COMPARED):
        a, b = values.get((ours, region, metric)), values.get((name + ending, region, metric))
        if a and b:
            difference, ci95 = apart(a, b)
            lead = difference if BETTER[metric] == "higher" else -difference
            told.append({"rival": name + ending, "region": region, "metric": metric, "lead": lead, "ci95": ci95})
    tested = [one for one in told if one["ci95"] is not None]
    clear = [one for one in tested if abs(one["lead"]) > one["ci95"]]
    return {
        "ours": ours,
        "rivals": ending.strip("-") or "published",
        "compared": len(told),
        "ahead": sum(one["lead"] > 0 for one in told),
        "tested": len(tested),
        "clearly ahead": sum(one["lead"] > 0 for one in clear),
        "clearly behind": sum(one["lead"] < 0 for one in clear),
        "each": told,
    }


def costs_of(found: list[Record]) -> list[str]:
    """What the methods cost, as Markdown: means over the seeds, of seconds over those on the first seed's machine."""

    def mean(costs: list[Record], key: str, digits: str) -> str:
        known = [cost[key] for cost in costs if cost.get(key) is not None]
        return f"{np.mean(known):{digits}}" if known else "-"

    lines = []
    for name, group in itertools.groupby(found, key=lambda cost: cost["method"]):
        every = [*group]
        alike = [cost for cost in every if cost["machine"] == every[0]["machine"]]
        counts = [f"{every[0][key]:,}" for key in ("samples", "parameters")]
        lines.append([name, mean(alike, "seconds", ",.0f"), *counts, mean(alike, "synthesis", ".3f")])
    heads = ["method", "CPU seconds of training", "samples at full size", "parameters of G", "CPU seconds a slice"]
    return grid(heads, lines)


def verdicts(table: dict[str, Any]) -> list[str]:
    """Who is ahead, and how soon, as Markdown."""
    lines = [
        f"Of {len(RIVALS) * len(COMPARED)} comparisons: {', '.join(map(' '.join, COMPARED))}, with each rival.",
        "Clearly: beyond the 95 % interval over the seeds, of these patients.",
        "",
    ]
    for one in (one for one in table["comparisons"] if one["compared"]):
        told = f"- {one['ours']} against the rivals as {one['rivals']}: ahead in {one['ahead']} of {one['compared']}"
        seeds = f"of the {one['tested']} with several seeds clearly ahead in {one['clearly ahead']}"
        verdict = f"{seeds}, clearly behind in {one['clearly behind']}" if one["tested"] else "one seed, no verdict"
        lines.append(f"{told}; {verdict}")
    return lines
