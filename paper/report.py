"""What the tables have in common: intervals over seeds and patients, and how a table is written."""

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from data.slices import patient_of, write_bytes
from paper import runs

ON_GPU = "*: trained on a GPU; those of this repository by a program outside of it, see its paper/README.md."
# The paper's Tables II to V as printed, their columns in order: table -> row -> figures. "e" is less than 1e-5.
PAPER: dict[str, dict[str, str]] = runs.read_json(Path(__file__).with_name("published.json"))


def interval(values: list[float]) -> tuple[float | None, float | None]:
    """Mean of values and half its 95 % interval, by Student's t; None where there are too few."""
    n = len(values)
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(values)) if n > 1 else None
    return float(np.mean(values)) if n else None, half


def by_patient(values: np.ndarray, names: list[str]) -> list[float]:
    """Each patient's mean of slices' values [n], NaN left out: slices of one patient are alike."""
    patients = defaultdict(list)
    for name, value in zip(names, values, strict=True):
        if not math.isnan(value):
            patients[patient_of(name)].append(value)
    return [float(np.mean(group)) for group in patients.values()]


def apart(a: list[float], b: list[float]) -> tuple[float, float | None]:
    """By how much the mean of a is above that of b, and half its 95 % interval over the seeds, by Welch's t.

    None where one of them has a single seed. Neither equal numbers of seeds nor equal spreads are assumed.
    """
    difference, half = float(np.mean(a) - np.mean(b)), None
    if min(len(a), len(b)) > 1:
        within = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        half = float(within.high - within.low) / 2
    return difference, half


def over_records(records: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[float]]:
    """Values over the seeds of each method, region and metric of images."""
    values = defaultdict(list)
    for one in records:
        values[one["method"], one["region"], one["metric"]].append(one["value"])
    return values


def quality(records: list[dict[str, Any]], region: str, digits: dict[str, int]) -> list[str]:
    """A region's figures of images as Markdown, mean +- standard deviation over the seeds; digits: of each metric."""
    values, lines = over_records(records), []
    digits = {metric: n for metric, n in digits.items() if any(key[1:] == (region, metric) for key in values)}
    for method in dict.fromkeys(one["method"] for one in records if one["region"] == region):
        ours = [one for one in records if one["method"] == method]
        seeds = dict.fromkeys("-" if one["seed"] is None else marked(one["seed"], "on a GPU" in one) for one in ours)
        cells = [over_seeds(values.get((method, region, metric)), n) for metric, n in digits.items()]
        lines.append([method, ", ".join(seeds), *cells])
    return grid(["row", "seeds", *digits], lines)


def over_seeds(values: list[float] | None, digits: int) -> str:
    """Mean +- standard deviation over the seeds, - for none."""
    if not values:
        return "-"
    spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def grid(head: list[str], lines: list[list[Any]]) -> list[str]:
    """Lines of a Markdown table, and an empty line."""
    return [f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *lines)] + [""]


def on_gpu(one: dict[str, Any]) -> bool:
    """Whether a GPU did the work of what is kept: then no CPU seconds are known, and no processor's name."""
    return one.get("seconds") is None and "threads" not in one.get("machine", "") and "commit" in one


def marked(seed: int, gpu: bool) -> str:
    """A seed, with a mark where a GPU did the work."""
    return f"{seed}*" if gpu else f"{seed}"


def write(results: Path, name: str, table: dict[str, Any], lines: list[str]) -> None:
    """Print a table, and write it as RESULTS/NAME.json and, for people, as RESULTS/NAME.md."""
    notes = [ON_GPU] if any(re.search(r"\d\*", line) for line in lines) else []
    text = "\n".join([*lines, *notes]).rstrip() + "\n"
    print(text)
    runs.write_json(results / f"{name}.json", table)
    write_bytes(results / f"{name}.md", f"# {name}\n\n{text}".encode())
