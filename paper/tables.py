"""The paper's tables, measured: all rows of a table by one program, on the same slices, with the same metrics.

    python -m paper.tables 2 --list                            # Table II: its rows and their options
    python -m paper.tables 2 --results out/results             # trains, synthesizes and measures them all
    python -m paper.tables 2 --rows SPADE SEAN --seeds 1       # some of them; the same command resumes a stopped one
    python -m paper.tables 2 --seconds 600                     # other rows, of equal CPU seconds, into RESULTS/600s
    python -m paper.tables 3                                   # 4, 5, beta: U-Nets, see paper/table345.py

The heads of paper/table2.py and paper/table345.py say what each does. What a run has measured is kept in RESULTS/runs:
a row and seed that is there is not made again, and a table shows all that is there. To make the rows anew, give an
empty --results. All that is there has one setting, as all runs under --out have. A table is written as
RESULTS/tableN.json and tableN.md, and reuses what another has trained. Rows of equal seconds have folders of their own
below RESULTS and OUT; the first seed measures, on its machine, how many samples these are, and all others take as many.
"""

import argparse
import itertools

import torch

import covidgan
from data.slices import Mistake, exit_on_mistake, held
from paper import report, runs, table2, table345

SETTING = ("ngf", "channels", "unet_samples", "batch")  # what all runs in --out share, besides their length
TABLES = {"2": table2.EQUAL_SAMPLES, **table345.TABLES}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked. Raises Mistake."""
    parser = runs.parser(__doc__, "out/tables", [0, 1, 2])
    option = parser.add_argument
    option("table", choices=list(TABLES), help="its number in the paper, or one beyond the paper")
    option("--ngf", type=int, default=16, help="channels of the first layers, G's and D's: 64 as published")
    option("--samples", type=int, default=12_000, help="samples that each generator sees at full size")
    option("--seconds", type=int, help="train by CPU seconds instead: Table II of rows that cost alike")
    option("--channels", type=int, default=16, help="channels of the U-Net's first level: 64 as published")
    option("--unet-samples", type=int, default=4_000, help="samples that each U-Net sees, however many slices it has")
    option("--batch", type=int, default=4)
    option("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of training, as in covidgan.py")
    args = parser.parse_args(argv)
    if args.seconds and (args.table != "2" or args.seconds < 0 or torch.cuda.is_available()):
        raise Mistake("--seconds: CPU seconds, 1 or more, of Table II alone; hide a GPU by CUDA_VISIBLE_DEVICES=")
    if args.seconds:
        args.out, args.results = (folder / f"{args.seconds}s" for folder in (args.out, args.results))
    runs.choose_rows(args, table_of(args).rows)
    return args


def table_of(args: argparse.Namespace) -> table2.Images | table345.Experiment:
    """The table that the command line asks for."""
    return table2.EQUAL_SECONDS if args.seconds else TABLES[args.table]


def main(argv: list[str]) -> None:
    """Train and measure the rows asked for, then write what is known of the table. Raises Mistake."""
    args = parse(argv)
    table = table_of(args)
    if args.list:
        print("\n".join(f"{row:24} {table.told(row)}".rstrip() for row in table.rows))
        return
    runs.check_sides(args.data, args.reference)
    with held(args.out):
        for folder in (args.results / "runs", args.out):
            runs.keep_setting(folder, args, *SETTING, "seconds" if args.seconds else "samples")
        for seed, row in itertools.product(args.seeds, args.rows):
            table.make(row, seed, args)
        name = f"table{args.table}" if args.table.isdecimal() else args.table
        found = table.collect(args)
        report.write(args.results, name, found, table.markdown(found))


if __name__ == "__main__":
    exit_on_mistake(main, more=(covidgan.Mistake,))
