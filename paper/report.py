"""What paper/tables.py takes as a table of the paper, and how one is written for people."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from data.slices import SIDES, write_bytes


@dataclass(frozen=True)
class Table:
    """A table: its rows, how one is made, and how all that exists becomes JSON, Markdown and perhaps a picture."""

    rows: dict[str, str]  # name -> what --list says of it
    make: Callable[[str, int, argparse.Namespace], Any]  # a row with a seed: train and measure what is missing
    kept: Callable[[str], str]  # a row's name among what is kept of runs
    collect: Callable[[argparse.Namespace], dict[str, Any]]  # "setting", "records", "paper" and more
    markdown: Callable[[dict[str, Any]], str]
    draw: Callable[[Path, argparse.Namespace], None] | None = None
    sides: tuple[str, ...] = SIDES  # that the datasets must have


def grid(head: list[str], lines: list[list[Any]]) -> list[str]:
    """Lines of a Markdown table, and an empty line."""
    return [f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *lines)] + [""]


def over_seeds(values: list[float] | None, digits: int) -> str:
    """Mean +- standard deviation over the seeds, - for none."""
    if not values:
        return "-"
    spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def apart(a: list[float], b: list[float]) -> tuple[float, float | None]:
    """By how much the mean of a is above that of b, and half its 95 % interval over the seeds, by Welch's t.

    None where one of them has a single seed. Neither equal numbers of seeds nor equal spreads are assumed.
    """
    difference, half = float(np.mean(a) - np.mean(b)), None
    if min(len(a), len(b)) > 1:
        within = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        half = float(within.high - within.low) / 2
    return difference, half


def write_readme(path: Path, what: str, text: str) -> None:
    """Put a text between its two marks in a README.md; one that has none is left as it is, with a note."""
    begin, end = f"<!-- {what} -->", f"<!-- end of {what} -->"
    content = path.read_text() if path.exists() else ""
    before, found, rest = content.partition(begin)
    _, closed, after = rest.partition(end)
    if found and closed:
        write_bytes(path, f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())
    elif content:
        print(f"{path}: left as it is: without {begin} and {end}, between which it would stand")
