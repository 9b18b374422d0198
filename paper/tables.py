"""The paper's tables, measured: all rows of a table by one program, on the same slices, with the same metrics.

    python data/prepare.py DOWNLOAD --size 256 --out data/ct
    python data/prepare.py DOWNLOAD --size 128 --out data/ct128
    python -m paper.tables 2 --list                            # Table II: its rows and their options
    python -m paper.tables 2                                   # trains, synthesizes and measures them all
    python -m paper.tables 2 --rows SPADE SEAN --seeds 1       # some of them; the same command resumes a stopped one
    python -m paper.tables 3                                   # a U-Net on real slices, some swapped for synthetic ones
    python -m paper.tables 4                                   # the same with synthetic slices added to the real ones
    python -m paper.tables 5                                   # which part of the method earns its place
    python -m paper.tables few                                 # beyond the paper: few real slices
    python -m paper.tables beta                                # beyond the paper: who moves beta

The heads of paper/table2.py and paper/table345.py say what each does. What runs have measured is kept in RESULTS/runs,
and a table shows all that is kept there, trained here or elsewhere, whichever rows were asked for; so all of it has one
setting, RESULTS/runs/setting.json, as all runs under --out have. Which optimiser a rival takes is kept there too; with
an empty --results it is chosen anew. The table is written as --results/tableN.json, and as Markdown between its two
marks in the README.md beside --results. A table reuses what another has trained. Commands may run side by side on one
--out, on one machine or several: whichever needs what another is making waits for it, and then finds it there.
"""

import argparse
import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import covidgan
from data.slices import Mistake, OneLineParser, exit_on_mistake, write_bytes
from paper import generators, runs, table2, table345
from paper.report import Table, write_readme

SETTING = ("ngf", "samples", "channels", "unet_samples", "batch")  # what all runs in --out share
TABLES: dict[str, Table] = {"2": table2.TABLE, **table345.TABLES}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked. Raises Mistake."""
    parser = OneLineParser(__doc__)
    option = parser.add_argument
    option("table", choices=list(TABLES), help="its number in the paper, or one beyond the paper")
    option(
        "--data", type=Path, default=Path("data/ct"), help="dataset that generators train on, best at twice the size"
    )
    option("--reference", type=Path, default=Path("data/ct128"), help="the same, of the size to train and measure at")
    option("--rows", nargs="*", metavar="ROW", help="rows that --list shows; none: only write (default: all)")
    option("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    option("--ngf", type=int, default=16, help="channels of the first layers, G's and D's: 64 as published")
    option("--samples", type=int, default=12_000, help="samples that each generator sees at full size")
    option("--channels", type=int, default=16, help="channels of the U-Net's first level: 64 as published")
    option("--unet-samples", type=int, default=4_000, help="samples that each U-Net sees, however many slices it has")
    option("--batch", type=int, default=4)
    option("--out", type=Path, default=Path("out/tables"), help="folder of the runs")
    option(
        "--results",
        type=Path,
        default=runs.ROOT / "paper" / "results",
        help="folder of the tables and of what runs measured",
    )
    option("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of training, as in covidgan.py")
    option("--list", action="store_true", help="show the rows and what they are")
    args = parser.parse_args(argv)
    rows = TABLES[args.table].rows
    args.rows = list(rows) if args.rows is None else args.rows
    if unknown := [row for row in args.rows if row not in rows]:
        raise Mistake(f"--rows {unknown[0][:80]}: give of {', '.join(rows)}")
    if min(args.seeds) < 0:
        raise Mistake(f"--seeds {min(args.seeds)}: give 0 or more")
    least = 2 * generators.KEPT * args.batch  # each of two stages sees half
    if args.batch < 1 or min(args.samples, args.unet_samples) < least:
        given = f"--samples {args.samples}, --unet-samples {args.unet_samples}, --batch {args.batch}"
        raise Mistake(f"{given}: give {2 * generators.KEPT} batches or more")
    return args


@contextlib.contextmanager
def mistakes_alike() -> Iterator[None]:
    """Turn covidgan.py's Mistake into that of data/slices.py: each of the two files stands alone."""
    try:
        yield
    except covidgan.Mistake as mistake:
        raise Mistake(str(mistake)) from mistake


@mistakes_alike()
def main(argv: list[str]) -> None:
    """Train and measure the rows asked for, then write what is known of the table. Raises Mistake."""
    args = parse(argv)
    made = TABLES[args.table]
    if args.list:
        print("\n".join(f"{name:24} {told}" for name, told in made.rows.items()))
        return
    runs.check_sides(args.data, args.reference, made.sides)
    setting = {name: getattr(args, name) for name in SETTING}
    kept = args.results / "runs"
    runs.keep_setting(kept, args.data, args.reference, setting, "another --results", begun=("setting.json",))
    runs.keep_setting(args.out, args.data, args.reference, setting)
    title = f"table {args.table}" if args.table.isdecimal() else args.table
    path = args.results / f"{title.replace(' ', '')}.json"
    check_rows(path, made, args)
    for seed, name in itertools.product(args.seeds, args.rows):
        made.make(name, seed, args)
    with runs.making(readme := args.results.parent / "README.md"):
        table = made.collect(args)
        text = made.markdown(table)
        print(text)
        write_bytes(path, (json.dumps(table, indent=1) + "\n").encode())
        write_readme(readme, title, text)
        if made.draw:
            made.draw(args.out / f"{path.stem}.png", args)


def check_rows(path: Path, made: Table, args: argparse.Namespace) -> None:
    """Raise Mistake where a table would lose rows: those whose measurements are not kept, and that are not made now."""
    there = runs.read_measures(path).get("rows", {}) if path.exists() else {}
    made_now = {*args.rows}
    lost = [row for row in there if row in made.rows and row not in made_now]
    if lost := [row for row in lost if not runs.kept_seeds(args.results, made.kept(row))]:
        told = f"{path} has rows of which {args.results / 'runs'} has nothing: {', '.join(lost)}"
        raise Mistake(f"{told}: name these with --rows too, or give another --results")


if __name__ == "__main__":
    exit_on_mistake(main)
