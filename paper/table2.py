"""Table II: how good are the images? covidgan and its four rivals, on the same slices, with the same metrics.

Trains on the train side of --data at the size of --reference; side "seg_test" is reported. What preset "best" and the
clean rows add to the rows as published was chosen by side "test", but with figures of "seg_test" in view
(paper/fidelity.md). The picture is OUT/table2.png, since it may show patients.
"""

import argparse
import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import covidgan
from data.slices import SIDES, coloured, png, read_image, windowed, write_bytes
from paper import generators, report
from paper.generators import BETTER, FID, FLOORS, IN_OWN_STYLE, KID, REGIONS, REPORT, RIVALS, ROWS, Figures
from paper.report import apart, grid, over_seeds

DIGITS = {FID: 2, "FID 32": 4, KID: 4, "PSNR": 2, "SSIM": 4, "RMSE": 4, "NRMSE": 4}
# The paper's four metrics, with 4 rivals and 2 regions its 32 comparisons. Its "RMSE" is over the real slice's own RMS,
# as its PSNR shows: NRMSE here.
COMPARED = (FID, "PSNR", "SSIM", "NRMSE")
COSTS = ("method", "seed", "seconds", "samples", "parameters", "synthesis", "d_at_end", "commit", "machine")
ZOOM = 0.4  # share of a slice's side that the picture shows, around the lesion

# Table II: method -> FID, PSNR, SSIM, RMSE of the complete images and of the lungs alone
PAPER = {
    "covidgan": (0.0327, 26.89, 0.8936, 0.0813, 0.3641, 28.17, 0.8959, 0.2747),
    "SEAN": (0.0341, 26.69, 0.8922, 0.0837, 0.3575, 28.02, 0.8952, 0.2795),
    "SPADE": (0.0389, 26.50, 0.8903, 0.0854, 0.4812, 27.79, 0.8928, 0.2864),
    "pix2pixHD": (0.0430, 26.63, 0.8893, 0.0840, 0.4283, 27.82, 0.8910, 0.2856),
    "pix2pix": (0.0611, 26.56, 0.8870, 0.0913, 8.4077, 26.56, 0.8855, 0.3301),
}

Record = dict[str, Any]


class Images:
    """Table II as paper/tables.py takes it."""

    rows, sides_needed = ROWS, SIDES

    def told(self, row: str) -> str:
        """What --list says of a row."""
        return f"{ROWS[row].method} {generators.options_of(row)}"

    def make(self, row: str, seed: int, args: argparse.Namespace) -> None:
        """Train and measure a row with a seed, if it is not kept yet. Raises Mistake."""
        generators.keep(row, seed, args)

    def collect(self, args: argparse.Namespace) -> dict[str, Any]:
        """All that is known of Table II, from the measurements that are kept."""
        records, costs = [], []
        for name in FLOORS:
            records += records_of(name, None, generators.keep_floor(name, args))
        found = {name: kept for name in ROWS if (kept := generators.kept(name, args))}
        for name, seeds in found.items():
            for seed, one in seeds.items():
                records += records_of(name, seed, one["figures"])
                records += records_of(name.replace("SEAN", "SEAN-self"), seed, one.get(IN_OWN_STYLE, {}))
                costs.append({key: one[key] for key in COSTS})
        ours = [name for name in ROWS if name.startswith("covidgan")]
        return {
            "setting": {"reported": REPORT, **report.setting(args, found.values())},
            "rows": {name: self.told(name) for name in found},
            "records": records,
            "paper": paper_records(),
            "costs": costs,
            "comparisons": [comparison(records, one, block) for one in ours for block in ("", "-clean")],
        }

    def markdown(self, table: dict[str, Any]) -> list[str]:
        """The table, for people to read."""
        paper = [
            [method, *(f"{figure:.{2 if figure > 20 else 4}f}" for figure in row)] for method, row in PAPER.items()
        ]
        heads = [f"{region} {metric}" for region in REGIONS for metric in ("FID", "PSNR", "SSIM", "RMSE (our NRMSE)")]
        lines = [line for region in REGIONS for line in quality(table["records"], region)]
        lines += ["**The paper's**, on other data, its FID of another network", "", *grid(["method", *heads], paper)]
        return [*lines, "**Costs**", "", *costs_of(table["costs"]), "**Comparisons**", "", *verdicts(table)]


# ----------------------------------------------------------------------------------------------- all that is known


def records_of(method: str, seed: int | None, figures: Figures) -> list[Record]:
    """A record for each region and metric that has a value."""
    found = []
    for region, metric in itertools.product(REGIONS, BETTER if figures else ()):
        if (value := figures[f"{region} {metric}"]["value"]) is not None:
            record = {"method": method, "seed": seed, "region": region, "metric": metric, "value": value}
            found.append(record | {"better": BETTER[metric]})
    return found


def paper_records() -> list[Record]:
    """The paper's Table II."""
    heads = [*itertools.product(REGIONS, ("FID", "PSNR", "SSIM", "RMSE"))]
    return [
        {"method": method, "region": region, "metric": metric, "value": value}
        for method, values in PAPER.items()
        for (region, metric), value in zip(heads, values, strict=True)
    ]


# ----------------------------------------------------------------------------------------------- what the figures say


def by_method(records: list[Record]) -> dict[tuple[str, str, str], list[float]]:
    """Values over the seeds of each method, region and metric."""
    values = defaultdict(list)
    for record in records:
        values[record["method"], record["region"], record["metric"]].append(record["value"])
    return values


def comparison(records: list[Record], ours: str, block: str) -> dict[str, Any]:
    """In how many of the 32 comparisons a method of ours is ahead of the rivals of a block, "" or "-clean".

    Clearly: beyond the 95 % interval of the difference of the two means over the seeds, by Welch's t; of one seed
    nothing is clear.
    """
    values, told = by_method(records), []
    for name, region, metric in itertools.product(RIVALS, REGIONS, COMPARED):
        a, b = values.get((ours, region, metric)), values.get((name + block, region, metric))
        if a and b:
            difference, ci95 = apart(a, b)
            lead = difference if BETTER[metric] == "higher" else -difference
            told.append({"rival": name + block, "region": region, "metric": metric, "lead": lead, "ci95": ci95})
    tested = [one for one in told if one["ci95"] is not None]
    clear = [one for one in tested if abs(one["lead"]) > one["ci95"]]
    return {
        "ours": ours,
        "rivals": "clean" if block else "published",
        "compared": len(told),
        "ahead": sum(one["lead"] > 0 for one in told),
        "tested": len(tested),
        "clearly ahead": sum(one["lead"] > 0 for one in clear),
        "clearly behind": sum(one["lead"] < 0 for one in clear),
        "each": told,
    }


def quality(records: list[Record], region: str) -> list[str]:
    """A region's figures for all methods as Markdown: means and standard deviations over the seeds."""
    values, lines = by_method(records), []
    for method in dict.fromkeys(record["method"] for record in records):
        seeds = "-" if method in FLOORS else len(values[method, region, "PSNR"])
        lines.append([method, seeds, *(over_seeds(values.get((method, region, m)), DIGITS[m]) for m in BETTER)])
    return [f"**{region}**", "", *grid(["method", "seeds", *BETTER], lines)]


def costs_of(found: list[Record]) -> list[str]:
    """What the methods cost, as Markdown: means over the seeds, of seconds over those on the first seed's machine."""

    def mean(costs: list[Record], key: str, digits: str) -> str:
        known = [cost[key] for cost in costs if cost[key] is not None]
        return f"{np.mean(known):{digits}}" if known else "-"

    lines = []
    for name, group in itertools.groupby(found, key=lambda cost: cost["method"]):
        every = [*group]
        alike = [cost for cost in every if cost["machine"] == every[0]["machine"]]
        counts = [f"{every[0][key]:,}" for key in ("samples", "parameters")]
        lines.append([name, mean(alike, "seconds", ",.0f"), *counts, mean(alike, "synthesis", ".3f")])
        lines[-1].append(mean(every, "d_at_end", ".2f"))
    heads = ["method", "CPU seconds of training", "samples at full size", "parameters of G", "CPU seconds a slice"]
    return grid([*heads, "D's loss at the end"], lines)


def verdicts(table: dict[str, Any]) -> list[str]:
    """Who is ahead, and how soon, as Markdown."""
    lines = [
        f"Of {len(RIVALS) * len(COMPARED) * len(REGIONS)} comparisons ({', '.join(COMPARED)}).",
        "PSNR and NRMSE of complete slices and of lungs are one error of pixels, told four times.",
        "Clearly: beyond the 95 % interval over the seeds, of these patients.",
        "",
    ]
    for one in (one for one in table["comparisons"] if one["compared"]):
        told = f"- {one['ours']} against the rivals as {one['rivals']}: ahead in {one['ahead']} of {one['compared']}"
        seeds = f"of the {one['tested']} with several seeds clearly ahead in {one['clearly ahead']}"
        verdict = f"{seeds}, clearly behind in {one['clearly behind']}" if one["tested"] else "one seed, no verdict"
        lines.append(f"{told}; {verdict}")
    return lines


# ------------------------------------------------------------------------------------------------- the picture


def draw(path: Path, args: argparse.Namespace) -> None:
    """Draw one row per case, zoomed on its lesion, as Fig. 6: map | real slice | completed by each method."""
    side, rows, folders = generators.load_side(args.reference, REPORT), [], {}
    for name in ROWS:
        for folder in sorted(args.out.glob(f"{name}_*/synthetic_{REPORT}/images")):
            folders.setdefault(name, folder)  # of the first seed
    for k in covidgan.choose_cases(side, 3):
        labels, real = side.labels[k, 0].numpy(), side.hu[k, 0].numpy()
        made = [read_image(folder / f"{side.names[k]}.png") for folder in folders.values()]
        greys = [windowed(np.where(labels > 0, hu, real)) for hu in (real, *made)]
        tiles = [coloured(labels), *[np.stack([grey] * 3, 2) for grey in greys]]
        window = lesion_window(labels)
        rows.append(np.concatenate([tile[window].repeat(4, 0).repeat(4, 1) for tile in tiles], 1))
    write_bytes(path, png(covidgan.under_titles(np.concatenate(rows), ["label map", "real slice", *folders])))
    print(f"wrote {path}")


def lesion_window(labels: np.ndarray) -> tuple[slice, slice]:
    """A square of ZOOM of a map's side, around the middle of its rarer lesion, or of its lung, within the map."""
    rarest = min((label for label in (3, 2, 1) if (labels == label).any()), key=lambda label: (labels == label).sum())
    side = round(ZOOM * len(labels))
    starts = [min(max(int(np.mean(at)) - side // 2, 0), len(labels) - side) for at in np.nonzero(labels == rarest)]
    return tuple(slice(start, start + side) for start in starts)
