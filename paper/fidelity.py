"""The study of paper/fidelity.md: which training paints believable lungs? A row is a set of options.

    python data/prepare.py DOWNLOAD --size 256 --out data/ct
    python data/prepare.py DOWNLOAD --size 128 --out data/ct128
    python -m paper.fidelity --results out/results --rows base best-half --seeds 0 1 2
    python -m paper.fidelity --results out/results --epochs 1 --out out/screen          # all rows, half as long
    python -m paper.fidelity --list

Trains on the train side of --data at the size of --reference, chooses by the side "test" and also reports "seg_test",
each row beside its cost. Written as RESULTS/fidelity-EPOCHS.json and .md; a row and seed that is there is not made
again. The same command resumes a stopped study.
"""

import argparse
import itertools
from collections import defaultdict
from typing import Any

from data.slices import exit_on_mistake, held
from paper import report, runs
from paper.report import grid, over_seeds

HALF, WHOLE = ["--epoch-len", "2100"], ["--epoch-len", "4200"]  # for two epochs per stage, see --epochs
BEST = ["--preset", "best"]
CLEAN_TARGETS = ["--preset", "paper", "--noise", "0", "--ema", "0.998"]  # that a generator can match
SCALE = ["--ngf", "32", "--ndf", "32", "--n-blocks", "6", "--batch", "4"]
SIDES = ("test", "seg_test")  # the one that chooses, and the one that does not
FIGURES = {  # column -> table of eval.py's results, row, key, factor, decimals
    "PSNR": ("pixels", "complete PSNR", "mean", 1, 2),
    "SSIM": ("pixels", "complete SSIM", "mean", 1, 4),
    "lung FD 24": ("features", "lung FID 24", "value", 1, 2),
    "lung KID": ("features", "lung KID 1280", "value", 1000, 0),
    "complete KID": ("features", "complete KID 1280", "value", 1000, 0),
    "fine texture %": ("texture", "fine texture", "value", 100, 0),
}
# name -> what it tries, its options. Half: 4,200 samples per stage, whole: 8,400
ROWS: dict[str, tuple[str, list[str]]] = {
    "paper": ("preset paper as it is: noise on the target, no average", [*HALF, "--preset", "paper"]),
    "base": ("the paper's losses and rate, clean targets, average", [*HALF, *CLEAN_TARGETS]),
    "contrast": ("D sees the lung alone, four times enlarged", [*HALF, *CLEAN_TARGETS, "--contrast", "4"]),
    "best-half": ("preset best: that, beta fixed at 0.1, lambda 3", [*HALF, *BEST]),
    "best": ("preset best, twice as long", [*WHOLE, *BEST]),
    # best-half with one thing changed
    "contrast-6": ("D sees the lung six times enlarged", [*HALF, *BEST, "--contrast", "6"]),
    "beta": ("beta fixed at 0.5", [*HALF, *BEST, "--beta", "0.5"]),
    "rate": ("learning rate 6e-4", [*HALF, *BEST, "--lr", "6e-4"]),
    "share": ("g1 and g2 a quarter as long, at its time", [*BEST, "--epoch-len", "2750", "--individual", "0.25"]),
    "joint": ("no individual training, at its time", [*BEST, "--epoch-len", "4200", "--individual", "0"]),
    "batch-1": ("batch 1, at its time", [*BEST, "--epoch-len", "1200", "--batch", "1"]),
    "batch-2": ("batch 2, at its time", [*BEST, "--epoch-len", "1700", "--batch", "2"]),
    "lsgan": ("least squares", [*HALF, *BEST, "--gan", "lsgan"]),
}


Record = dict[str, Any]


def measure(row: str, seed: int, args: argparse.Namespace) -> list[Record]:
    """Train a row with a seed and measure it on both sides: a record of each figure, and of its CPU seconds."""
    out, options = args.out / f"{row}_{seed}", ROWS[row][1]
    given = {"data": args.data, "size": runs.size_of(args.reference), "seed": seed}
    given |= {"epochs": args.epochs, "interval": 250 * args.epochs}
    runs.train([str(runs.ROOT / "covidgan.py")], [*runs.as_options(given), *SCALE, *options], out, " ".join(options))
    records = []
    for side in SIDES:
        results = runs.measure(out, args.reference, side)
        found = {"seconds": runs.begun(out)["seconds"]}
        for column, (table, name, key, factor, _) in FIGURES.items():
            value = results[table][name][key]  # None where eval.py refuses it, such as FD of few slices
            found[column] = value if value is None else factor * value
        where = {"row": row, "seed": seed, "side": side}
        records += [where | {"metric": metric, "value": value} for metric, value in found.items()]
    return records


def markdown(records: list[Record]) -> list[str]:
    """Lines of a table: a row's mean over its seeds, +- its standard deviation where there are several."""
    head = ["row", "seeds", *(f"{column} ({side})" for side in ("chosen on", "not") for column in FIGURES), "CPU s"]
    lines = []
    for row in dict.fromkeys(one["row"] for one in records):
        ours = [one for one in records if one["row"] == row]

        values = defaultdict(list)
        for one in ours:
            values[one["side"], one["metric"]] += [one["value"]] if one["value"] is not None else []
        cells = [over_seeds(values[side, column], FIGURES[column][-1]) for side in SIDES for column in FIGURES]
        cost = over_seeds(values["test", "seconds"], 0).partition(" ")[0]
        lines.append([row, len({one["seed"] for one in ours}), *cells, cost])
    return grid(head, lines)


def main(argv: list[str]) -> None:
    """Train and measure the rows asked for; print the table and write its JSON. Raises Mistake."""
    parser = runs.parser(__doc__, "out/fidelity", [0])
    parser.add_argument("--epochs", type=int, default=2, help="per stage; 1 makes every row half as long")
    args = parser.parse_args(argv)
    runs.choose_rows(args, ROWS)
    if args.list:
        print("\n".join(f"{row:16} {about:60} {' '.join(options)}" for row, (about, options) in ROWS.items()))
        return
    runs.check_sides(args.data, args.reference)
    path = args.results / f"fidelity-{args.epochs}.json"
    table = runs.read_json(path) if path.exists() else {"setting": {"commits": []}, "records": []}
    records, commits = table["records"], {*table["setting"]["commits"]}
    there = {(one["row"], one["seed"]) for one in records}
    with held(args.out):
        runs.keep_setting(args.out, args, "epochs")
        for seed, row in itertools.product(args.seeds, args.rows):
            if (row, seed) not in there:
                records += measure(row, seed, args)
                commits.add(runs.begun(args.out / f"{row}_{seed}")["commit"])
    told = {row: " ".join([*SCALE, *options]) for row, (_, options) in ROWS.items()}
    told |= {row: old for row, old in table["setting"].get("rows", {}).items() if row not in ROWS}  # gone since
    records.sort(key=lambda one: ([*told].index(one["row"]), one["seed"]))
    setting = {"epochs": args.epochs, "features": runs.FEATURES, "commits": sorted(commits)}
    setting |= {"rows": {row: told[row] for row in dict.fromkeys(one["row"] for one in records)}}
    report.write(args.results, path.stem, {"setting": setting, "records": records, "paper": []}, markdown(records))


if __name__ == "__main__":
    exit_on_mistake(main)
