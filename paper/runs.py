"""Runs of the paper's experiments: train, export, synthesize and evaluate, each by the script that a user would call.

A run is a folder: what training leaves (ckpt.pt, results.json at its end), begun.json with how, where and by which code
it was begun, generator.onnx, synthetic_SIDE/ and eval_SIDE/. A stopped training goes on; what is whole is left alone.
What runs have measured is kept in RESULTS/runs, one small file each, of which all tables are made.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.slices import SIDES, Mistake, OneLineParser, list_pngs, read_image, read_split, write_bytes

ROOT = Path(__file__).resolve().parents[1]
FEATURES = "efficientnet-lite0"  # for FID and KID: Inception's weights are a download


def parser(about: str, out: str, seeds: list[int]) -> OneLineParser:
    """The options of a study: its data, rows and folders."""
    made = OneLineParser(about)
    option = made.add_argument
    option("--data", type=Path, default=Path("data/ct"), help="dataset to train on, best at twice the size")
    option("--reference", type=Path, default=Path("data/ct128"), help="the same, of the size to train and measure at")
    option("--rows", nargs="*", metavar="ROW", help="rows that --list shows; none: only write (default: all)")
    option("--seeds", nargs="+", type=int, default=seeds, metavar="N")
    option("--out", type=Path, default=Path(out), help="folder of the runs")
    option("--results", type=Path, default=ROOT / "paper" / "results", help="folder of the tables")
    option("--list", action="store_true", help="show the rows and what they are")
    return made


def choose_rows(args: argparse.Namespace, rows: Iterable[str]) -> None:
    """Take all rows where none are named. Raises Mistake for one that there is not."""
    args.rows = [*rows] if args.rows is None else args.rows
    if unknown := [row for row in args.rows if row not in rows]:
        raise Mistake(f"--rows {unknown[0]:.80}: give of {', '.join(rows)}")


def call(*arguments: str | Path) -> None:
    """Run a script of the repository with this Python. Raises Mistake where it fails, having said why."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    script = subprocess.Popen([sys.executable, *map(str, arguments)], env=os.environ | {"PYTHONPATH": path})
    try:
        script.wait()
    finally:  # a training that is stopped writes its checkpoint before it ends
        script.terminate()
        status = script.wait()
    if status:
        raise Mistake(f"{' '.join(map(str, arguments))}: stopped with status {status}, see above")


def as_options(given: dict[str, Any]) -> list[str]:
    """A command line's options and their values, by their names."""
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def train(program: list[str], options: list[str], out: Path, row: str = "") -> None:
    """Train into a folder, or go on there, unless it is whole. Raises Mistake, also where its row has changed since.

    row: the run's options without data and scale. These, the repository's commit, the machine, and CPU seconds of all
    parts, unless a GPU did the work or one of them was killed, are noted in OUT/begun.json.
    """
    note = out / "begun.json"
    if note.exists() and (was := begun(out)["row"]) != row:
        raise Mistake(f"{out}: trained with {was!r}, its row now has {row!r}: give the row another name, or delete it")
    if (out / "results.json").exists():
        return
    about, given = {"row": row, "commit": commit(), "machine": machine(), "seconds": 0.0}, options
    if (out / "ckpt.pt").exists():
        about, given = begun(out), ["--resume"]
    write_json(note, about | {"seconds": None})  # as it stays where this program is killed
    before = cpu_seconds()
    try:
        call(*program, "--out", out, *given)
    finally:
        if about["seconds"] is not None and not torch.cuda.is_available():
            write_json(note, about | {"seconds": about["seconds"] + cpu_seconds() - before})


def begun(out: Path) -> dict[str, Any]:
    """How a run was begun: its row, commit, machine and seconds."""
    return read_json(out / "begun.json")


def cpu_seconds() -> float:
    """CPU seconds of all scripts run so far, of all their threads."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def commit() -> str:
    """The repository's commit, with -dirty where a program differs from it; "unknown" without git."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return "unknown"
    told = partial(subprocess.run, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    changed = told(["git", "status", "--porcelain", "--untracked-files=no", "--", "*.py"]).stdout
    return told(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip() + "-dirty" * bool(changed)


def machine() -> str:
    """The processor and how PyTorch uses it, or the GPU: by it seconds can be compared."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    names = re.findall("model name\t: (.*)", info.read_text()) if info.exists() else []
    name = [*names, platform.processor() or platform.machine()][0]
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"


def exported(file: Path, *what: str | Path) -> Path:
    """A file from export.py, of what its command line names, made if it is not there yet."""
    if not file.exists():
        call(ROOT / "export.py", *what, "-o", file)
    return file


def synthesize(out: Path, data: Path, side: str, kind: str = "synthetic", *options: str | Path) -> Path:
    """Synthesize a side of a dataset with a run's generator and more options of infer_onnx.py; returns the folder."""
    synthetic, model = out / f"{kind}_{side}", exported(out / "generator.onnx", out / "ckpt.pt")
    places = [data, "--side", side, "--model", model, "--out", synthetic]
    call(ROOT / "infer_onnx.py", *places, "--unchecked", *options)
    return synthetic


def compare(data: Path, synthetic: Path, out: Path, runs: Path, unet: Path | None = None) -> dict[str, Any]:
    """Compare synthetic slices with the real ones of a dataset: eval.py's results, written as OUT/results.json.

    runs: the folder of all runs, which share the network for FID and KID. unet: finds lesions in both.
    """
    results, features = out / "results.json", exported(runs / "features.onnx", "--features", FEATURES)
    models = ["--features", features, *(["--unet", unet] if unet else [])]
    call(ROOT / "eval.py", data, synthetic, *models, "--out", out, "--json", results)
    return read_json(results)


def measure(
    out: Path, data: Path, side: str, unet: Path | None = None, kind: str = "synthetic", *options: str | Path
) -> dict[str, Any]:
    """Synthesize a side of a dataset with a trained run and compare it with the real slices: eval.py's results."""
    slices = synthesize(out, data, side, kind, *options)
    if kind == "synthetic":
        return compare(data, slices, out / f"eval_{side}", out.parent, unet)
    return compare(data, first_draws(slices), out / f"eval_{kind}_{side}", out.parent, unet)


def obeys(out: Path, data: Path, side: str) -> dict[str, Any]:
    """How a run's generator obeys, on maps of a side that it has made slices of: rows of eval.py's table "steering"."""
    found = out / "steering.json"
    call(ROOT / "eval.py", data, out / "generator.onnx", "--maps", out / f"synthetic_{side}" / "maps", "--json", found)
    return read_json(found)["steering"]


def first_draws(drawn: Path) -> Path:
    """A folder of links to the first draw of each map, under the map's name, by which eval.py pairs slices."""
    links = drawn.with_name(f"{drawn.name}_first")
    links.mkdir(exist_ok=True)
    for path in (drawn / "images").glob("*d01.png"):
        link = links / f"{path.stem.removesuffix('d01')}.png"
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    return links


def read_json(path: Path) -> Any:
    """Read JSON that was written here, as a merge or an editor has left it. Raises Mistake."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise Mistake(f"{path}: not JSON ({error}): restore it, or delete it and make its row again") from error


def write_json(path: Path, content: Any) -> None:
    """Write a value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def keep(results: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a run has measured, kept as RESULTS/runs/NAME.json; if it is not yet, make() makes and measures it."""
    path = results / "runs" / f"{name}.json"
    if not path.exists():
        write_json(path, make())
    return read_json(path)


def kept(results: Path, name: str, key: str, options: str) -> dict[int, dict[str, Any]]:
    """What runs NAME_SEED have measured, by seed; other endings, such as those of copies put aside, do not count.

    key: where a run has how its generator was trained. Raises Mistake where that is not by these options: the figures
    would bear another row's name.
    """
    ending = re.compile(re.escape(name) + r"_(\d+)\.json")
    paths = {int(match[1]): path for path in (results / "runs").iterdir() if (match := ending.fullmatch(path.name))}
    found = {seed: read_json(paths[seed]) for seed in sorted(paths)}
    for seed, one in found.items():
        if one[key] != options:
            told = f"trained with {one[key]!r}, its row now has {options!r}"
            raise Mistake(f"{paths[seed]}: {told}: rename the row, or delete the file")
    return found


def check_sides(data: Path, reference: Path) -> None:
    """Raise Mistake unless both datasets have all sides, of the same slices.

    Otherwise a generator trained on one would be measured on its own training slices in the other.
    """
    split, judged = (read_split(folder / "split.json") for folder in (data, reference))
    for side in SIDES:
        if not judged.get(side):
            raise Mistake(f"{reference / 'split.json'}: no names under {side}: prepare a set of {', '.join(SIDES)}")
        if {*split.get(side, [])} != {*judged[side]}:
            raise Mistake(f"{data}, {reference}: not the same slices under {side}: prepare both alike, but for --size")


def keep_setting(folder: Path, args: argparse.Namespace, *names: str) -> None:
    """Write FOLDER/setting.json: what all that is in it has in common. Raises Mistake where it is another.

    names: options that count. Of the datasets their sizes and split do.
    """
    split = json.dumps(read_split(args.reference / "split.json"), sort_keys=True).encode()
    told = {name: getattr(args, name) for name in names}
    told |= {"size of the data": size_of(args.data), "size of the reference": size_of(args.reference)}
    told["split of both"] = hashlib.sha256(split).hexdigest()[:16]
    path = folder / "setting.json"
    there = read_json(path) if path.exists() else told
    for name in told:
        if there.get(name) != told[name]:
            raise Mistake(f"{path}: made with {name} {there.get(name)}, not {told[name]}: give that, or another folder")
    write_json(path, told)


def size_of(data: Path) -> int:
    """Side length of a dataset's slices, in pixels."""
    return len(read_image(next(iter(list_pngs(data / "images", "images").values()))))
