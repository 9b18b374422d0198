"""Table II: how good are the images? covidgan and its four rivals, on the same slices, with the same metrics.

Trains on the train side of --data at the size of --reference; side "test" chooses a rival's optimiser, side "seg_test"
is reported. What preset "best" and the clean rows add to the rows as published was also chosen by "test", but with
figures of "seg_test" in view (paper/fidelity.md). The picture is OUT/table2.png, since it may show patients.
"""

import argparse
import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import covidgan
from data.slices import coloured, png, read_image, windowed, write_bytes
from paper import generators, measures, runs
from paper.generators import CHOOSE, REPORT, RIVALS, ROWS
from paper.measures import BETTER, FID, FLOORS, KID, REGIONS, Figures
from paper.report import Table, apart, grid, over_seeds

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

# ----------------------------------------------------------------------------------------------- all that is known


def records_of(method: str, seed: int | None, figures: Figures) -> list[dict[str, Any]]:
    """A record for each region and metric that has a value."""
    found = []
    for region, metric in itertools.product(REGIONS, BETTER):
        value = figures[f"{region} {metric}"]["value"]
        record = {"method": method, "seed": seed, "region": region, "metric": metric, "value": value}
        found += [record | {"better": BETTER[metric]}] if value is not None else []
    return found


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """All that is known of Table II, from the measurements that are kept."""
    records, costs, progress = [], [], {}
    for name in FLOORS:
        records += records_of(name, None, measures.keep_floor(name, args))
    found = {name: measures.kept_generators(name, args) for name in ROWS}
    found = {name: seeds for name, seeds in found.items() if seeds}
    for name, seed, one in ((name, seed, one) for name, seeds in found.items() for seed, one in seeds.items()):
        records += records_of(name, seed, one["figures"])
        costs.append({key: one[key] for key in COSTS})
        if in_own_style := one.get(measures.IN_OWN_STYLE):
            records += records_of(self_of(name), seed, in_own_style)
        if one["progress"]:
            progress[name] = {"machine": one["machine"], "course": one["progress"]}
    ours = [name for name in ROWS if name.startswith("covidgan")]
    return {
        "setting": setting(args, found),
        "rows": {name: LISTED[name] for name in found},
        "records": records,
        "paper": paper_records(),
        "costs": costs,
        "comparisons": [comparison(records, one, block) for one in ours for block in ("", "-clean")],
        "progress": progress,
    }


def self_of(name: str) -> str:
    """A row's name where it takes the style of the slices themselves: SEAN-self, SEAN-self-clean."""
    published = name.removesuffix("-clean")
    return f"{published}-self{name.removeprefix(published)}"


def setting(args: argparse.Namespace, found: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "data": runs.sides_of(args.reference),
        "reported": REPORT,
        "chosen on": CHOOSE,
        "size": runs.size_of(args.reference),
        "ngf, ndf": args.ngf,
        "samples at full size": args.samples,
        "steps at full size": args.samples // args.batch,
        "batch": args.batch,
        "seeds": {name: [*seeds] for name, seeds in found.items()},
        "features": runs.FEATURES,
        "optimisers": {
            name: " and ".join(sorted({one["optimiser"] for one in found[name].values()})) for name in found
        },
        f"lung {KID} by which an optimiser was chosen": generators.tried_optimisers(args),
        "commits": sorted({one["commit"] for seeds in found.values() for one in seeds.values()}),
        "machines": sorted({one["machine"] for seeds in found.values() for one in seeds.values()}),
    }


def paper_records() -> list[dict[str, Any]]:
    """The paper's Table II."""
    heads = [*itertools.product(REGIONS, ("FID", "PSNR", "SSIM", "RMSE"))]
    return [
        {"method": method, "region": region, "metric": metric, "value": value}
        for method, values in PAPER.items()
        for (region, metric), value in zip(heads, values, strict=True)
    ]


# ----------------------------------------------------------------------------------------------- what the figures say


def by_method(records: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[float]]:
    """Values over the seeds of each method, region and metric."""
    values = defaultdict(list)
    for record in records:
        values[record["method"], record["region"], record["metric"]].append(record["value"])
    return values


def comparison(records: list[dict[str, Any]], ours: str, block: str) -> dict[str, Any]:
    """In how many of the 32 comparisons a method of ours is ahead of the rivals of a block, "" or "-clean".

    Clearly: beyond the 95 % interval of the difference of the two means over the seeds, by Welch's t; of one seed
    nothing is clear.
    """
    values, told = by_method(records), []
    for name, region, metric in itertools.product(RIVALS, REGIONS, COMPARED):
        a, b = values.get((ours, region, metric)), values.get((name + block, region, metric))
        if a is None or b is None:
            continue
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


def time_to(progress: dict[str, dict[str, Any]], block: str) -> dict[str, float | None]:
    """Seconds until each method of a block reaches the lung KID that pix2pixHD ends with; None where it never does.

    Without the methods that were trained on another machine than it.
    """
    reference = progress.get(f"pix2pixHD{block}")
    if not reference:
        return {}
    goal, names = reference["course"][-1]["KID"], [f"{name}{block}" for name in ("covidgan", *RIVALS)]
    if goal is None:  # of too few slices
        return {}
    return {
        name: next((p["seconds"] for p in progress[name]["course"] if p["KID"] is not None and p["KID"] <= goal), None)
        for name in [*names, "covidgan-best"]
        if name in progress and progress[name]["machine"] == reference["machine"]
    }


def quality(records: list[dict[str, Any]], region: str) -> list[str]:
    """A region's figures for all methods as Markdown: means and standard deviations over the seeds."""
    values, lines = by_method(records), []
    for method in dict.fromkeys(record["method"] for record in records):
        seeds = "-" if method in FLOORS else len(values[method, region, "PSNR"])
        lines.append([method, seeds, *(over_seeds(values.get((method, region, m)), DIGITS[m]) for m in BETTER)])
    return [f"**{region}**", "", *grid(["method", "seeds", *BETTER], lines)]


def costs(runs_of: list[dict[str, Any]]) -> list[str]:
    """What the methods cost, as Markdown: means over the seeds, of seconds over those on the first seed's machine."""
    lines = []
    for name, group in itertools.groupby(runs_of, key=lambda cost: cost["method"]):
        every = [*group]
        several = [cost for cost in every if cost["machine"] == every[0]["machine"]]
        known = [cost["seconds"] for cost in several if cost["seconds"] is not None]
        seconds = f"{np.mean(known):,.0f}" if known else "-"
        counts = [f"{several[0][key]:,}" for key in ("samples", "parameters")]
        synthesis = np.mean([cost["synthesis"] for cost in several])
        ends = [cost["d_at_end"] for cost in every if cost["d_at_end"] is not None]
        lines.append([name, seconds, *counts, f"{synthesis:.3f}", f"{np.mean(ends):.2f}" if ends else "-"])
    heads = ["method", "CPU seconds of training", "samples at full size", "parameters of G", "CPU seconds a slice"]
    return grid([*heads, "D's loss at the end"], lines)


def verdicts(table: dict[str, Any]) -> list[str]:
    """Who is ahead, and how soon, as Markdown."""
    compared = f"Of {len(RIVALS) * len(COMPARED) * len(REGIONS)} comparisons ({', '.join(COMPARED)}"
    same = "PSNR and NRMSE of complete slices and of lungs are one error of pixels, told four times"
    clearly = "clearly: beyond the 95 % interval over the seeds, of these patients"
    lines = [f"{compared}; {same}; {clearly}):", ""]
    for one in (one for one in table["comparisons"] if one["compared"]):
        told = f"- {one['ours']} against the rivals as {one['rivals']}: ahead in {one['ahead']} of {one['compared']}"
        seeds = f"of the {one['tested']} with several seeds clearly ahead in {one['clearly ahead']}"
        verdict = f"{seeds}, clearly behind in {one['clearly behind']}" if one["tested"] else "one seed, no verdict"
        lines.append(f"{told}; {verdict}")
    for block in ("", "-clean"):
        if times := time_to(table["progress"], block):
            told = ", ".join(f"{name} {'never' if s is None else f'{s:,} CPU seconds'}" for name, s in times.items())
            first = f"first seed, the first of {generators.KEPT} checkpoints of a stage that has it"
            lines += ["", f"Time to the lung KID that pix2pixHD{block} ends with, {first}: {told}"]
    return lines


def markdown(table: dict[str, Any]) -> str:
    """The table, for people to read."""
    paper = [[method, *(f"{figure:.{2 if figure > 20 else 4}f}" for figure in row)] for method, row in PAPER.items()]
    heads = [f"{region} {metric}" for region in REGIONS for metric in ("FID", "PSNR", "SSIM", "RMSE (our NRMSE)")]
    lines = [line for region in REGIONS for line in quality(table["records"], region)]
    lines += ["**the paper's**, on other data, its FID of another network", "", *grid(["method", *heads], paper)]
    lines += [*costs(table["costs"]), *verdicts(table), "", f"Setting: `{json.dumps(table['setting'])}`"]
    return "\n".join(lines)


def write_picture(path: Path, args: argparse.Namespace) -> None:
    """Draw one row per case, zoomed on its lesion, as Fig. 6: map | real slice | the slice completed by each method."""
    side = measures.load_side(args.reference, REPORT)
    first, lines = {}, []
    for name, _, run in generators.whole_runs(ROWS, args):
        if (run / f"synthetic_{REPORT}").exists():  # not yet where another command only trained it
            first.setdefault(name, run)
    for k in covidgan.choose_cases(side, 3):
        labels, real = side.labels[k, 0].numpy(), side.hu[k, 0].numpy()
        files = [run / f"synthetic_{REPORT}" / "images" / f"{side.names[k]}.png" for run in first.values()]
        greys = [windowed(np.where(labels > 0, hu, real)) for hu in (real, *map(read_image, files))]
        tiles = [coloured(labels), *[np.stack([grey] * 3, 2) for grey in greys]]
        lines.append(np.concatenate([tile[lesion_window(labels)].repeat(4, 0).repeat(4, 1) for tile in tiles], 1))
    write_bytes(path, png(covidgan.under_titles(np.concatenate(lines), ["label map", "real slice", *first])))
    print(f"wrote {path}")


def lesion_window(labels: np.ndarray) -> tuple[slice, slice]:
    """A square of ZOOM of a map's side, around the middle of its rarer lesion, or of its lung, within the map."""
    rarest = min((label for label in (3, 2, 1) if (labels == label).any()), key=lambda label: (labels == label).sum())
    side = round(ZOOM * len(labels))
    starts = [min(max(int(np.mean(at)) - side // 2, 0), len(labels) - side) for at in np.nonzero(labels == rarest)]
    return tuple(slice(start, start + side) for start in starts)


LISTED = {name: " ".join((row.method, *row.options)) for name, row in ROWS.items()}
TABLE = Table(LISTED, measures.keep_generator, str, collect, markdown, write_picture)
