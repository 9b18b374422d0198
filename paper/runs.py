"""Runs of the paper's experiments: train, export, synthesize and evaluate, each by the script that a user would call.

A run is a folder: what training leaves (ckpt.pt, results.json at its end, ...), begun.json with how, where and by which
code it was begun, generator.onnx, synthetic_SIDE/ and eval_SIDE/. What is complete is not made again, and a stopped
training goes on, so that the command that began a study also resumes it. Two commands, on one machine or two, may need
the same run: what is being made is locked, and whoever else wants it waits, and then finds it there.
"""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import processor
from data.slices import JSON_ERRORS, SIDES, Mistake, held, list_pngs, patient_of, read_image, read_split, write_bytes

ROOT = Path(__file__).resolve().parents[1]
FEATURES = "efficientnet-lite0"  # for FID and KID: Inception's weights are a download
Beside = Callable[[int], AbstractContextManager[None]]


def call(*arguments: str | Path, beside: Beside | None = None) -> None:
    """Run a script of the repository with this Python. Raises Mistake where it fails, having said why.

    beside: what is done meanwhile, given the script's process id.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    script = subprocess.Popen([sys.executable, *map(str, arguments)], env=os.environ | {"PYTHONPATH": path})
    with beside(script.pid) if beside else contextlib.nullcontext():
        try:
            status = script.wait()
        except KeyboardInterrupt:  # a training writes its checkpoint before it ends
            script.terminate()
            script.wait()
            raise
    if status:
        raise Mistake(f"{' '.join(map(str, arguments))}: stopped with status {status}, see above")


@contextlib.contextmanager
def making(product: Path, script: Path | None = None) -> Iterator[None]:
    """Lock a file or folder to be made, or wait for whoever is making it: it may exist afterwards.

    script: the lock of the script that makes it, which may have outlived its caller.
    """
    with held(product.parent, f".{product.name}.maker.lock", wait=True):  # not a name that scripts themselves lock
        if script:
            with held(script.parent, script.name, wait=True):
                pass
        yield


def cpu_seconds() -> float:
    """CPU seconds of all scripts run so far, of all their threads."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cpu_seconds_of(pid: int) -> float | None:
    """CPU seconds of a running script so far, of all its threads; None on systems without Linux's /proc."""
    with contextlib.suppress(OSError):
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return None


def commit() -> str:
    """The repository's commit, with -dirty where code differs from it; "unknown" outside git.

    What the tables themselves write is no code: JSON, Markdown and pictures.
    """
    git, written = ["git", "-C", str(ROOT)], [":!*.json", ":!*.md", ":!*.png"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        told = partial(subprocess.run, capture_output=True, check=True, text=True)
        name = told([*git, "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return name + "-dirty" * bool(told([*git, "status", "--porcelain", "-uno", "--", ".", *written]).stdout)
    return "unknown"


@contextlib.contextmanager
def keeping(out: Path, pid: int) -> Iterator[None]:
    """Keep each checkpoint that a training writes meanwhile, in a run folder of its own: OUT/kept/SECONDS.

    SECONDS are CPU seconds of training, or wall-clock seconds where the system does not report those, without what a
    stopped run did after its last checkpoint and does again. pid: the training's process.
    """
    checkpoint, kept, over = out / "ckpt.pt", out / "kept", threading.Event()
    for part in kept.glob("*/.*.tmp"):  # of a kill, in a folder that is not written to again
        part.unlink()
    before, start = max(map(int, kept_seconds(out)), default=0), time.monotonic()

    def written() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    def watch(last: int) -> None:
        spent = cpu_seconds_of(pid)
        by_clock = spent is None
        while True:
            ending = over.wait(0.5)
            cpu = time.monotonic() - start if by_clock else cpu_seconds_of(pid)
            spent = spent if cpu is None else cpu  # the last ones, once the process has ended
            if (now := written()) != last:
                last, folder = now, kept / f"{before + spent:06.0f}"
                folder.mkdir(parents=True, exist_ok=True)
                write_bytes(folder / checkpoint.name, checkpoint.read_bytes())
            if ending:
                return

    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(watch, written())
        try:
            yield
        finally:
            over.set()
        if error := watched.exception():  # such as a full disk
            shutil.rmtree(kept, ignore_errors=True)  # rather than a course with holes
            raise error


def kept_seconds(out: Path) -> list[str]:
    """Names of the folders of a run's kept checkpoints, in order."""
    return sorted(path.parent.name for path in out.glob("kept/*/ckpt.pt"))


def train(
    program: list[str], options: list[str], out: Path, row: str = "", keep: bool = False, **told: str | None
) -> None:
    """Train into a folder, or go on there; CPU seconds are added up in OUT/seconds.json, where no GPU does the work.

    row: the run's options without data and scale. These, the repository's commit, the machine and what else is told
    are noted in OUT/begun.json at the start. keep: see `keeping`. Raises Mistake, also where the run was begun with
    another row.
    """
    with making(out / "results.json", script=out / ".lock"):
        check_row(out, row)
        if (out / "results.json").exists():
            return
        started, spent, before = (out / "ckpt.pt").exists(), seconds(out), cpu_seconds()
        if not started:
            spent = 0.0
            note = {"row": row, "commit": commit(), "machine": machine(), **told}
            write_bytes(out / "begun.json", (json.dumps(note, indent=1) + "\n").encode())
        (out / "seconds.json").unlink(missing_ok=True)  # until the end: a kill loses what was spent
        try:
            beside = partial(keeping, out) if keep else None
            call(*program, "--out", out, *(["--resume"] if started else options), beside=beside)
        finally:
            if spent is not None and not torch.cuda.is_available():
                write_bytes(out / "seconds.json", json.dumps(spent + cpu_seconds() - before).encode())


def begun(out: Path) -> dict[str, Any]:
    """How a run was begun: "row", "commit", "machine" and what else was told of it. Raises Mistake."""
    return read_measures(out / "begun.json")


def check_row(out: Path, row: str) -> None:
    """Raise Mistake where a run was begun with other options than its row has now: its figures would bear their name.

    Nor is one that has lost its note taken, before it trains on.
    """
    if (out / "ckpt.pt").exists() and not (out / "begun.json").exists():
        raise Mistake(
            f"{out}: its begun.json, which tells its row and its machine, is gone: restore it, or delete the run"
        )
    if (out / "begun.json").exists() and (was := begun(out)["row"]) != row:
        raise Mistake(f"{out}: trained with {was!r}, its row now has {row!r}: give the row another name, or delete it")


def machine() -> str:
    """The processor and how PyTorch uses it, or the GPU: by it seconds can be compared."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"


def seconds(out: Path) -> float | None:
    """CPU seconds that a run's training took; None where a GPU did the work, or a kill has lost the count."""
    path = out / "seconds.json"
    return json.loads(path.read_text()) if path.exists() else None


def seeded(folder: Path, name: str, suffix: str = "") -> dict[int, Path]:
    """Runs NAME_SEED in a folder by seed; other endings, such as those of copies put aside, do not count."""
    paths = folder.glob(f"{name}_*{suffix}")
    ends = {path.name.removeprefix(f"{name}_").removesuffix(suffix): path for path in paths}
    return {int(end): ends[end] for end in sorted(ends, key=lambda end: (len(end), end)) if end.isdecimal()}


def check_sides(data: Path, reference: Path, needed: Iterable[str] = SIDES) -> None:
    """Raise Mistake unless both datasets split the same slices alike, and no slice is on two sides.

    Otherwise a generator trained on one would be measured on its own training slices in the other. needed: sides that
    must hold slices.
    """
    split, judged = (read_split(folder / "split.json") for folder in (data, reference))
    for side in needed:
        if not judged.get(side):
            raise Mistake(f"{reference / 'split.json'}: no names under {side}: prepare a set of {', '.join(SIDES)}")
    for side in judged:
        if {*split.get(side, [])} != {*judged[side]}:
            raise Mistake(f"{data}, {reference}: not the same slices under {side}: prepare both alike, but for --size")
    names = [name for side in judged.values() for name in side]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Mistake(f"{reference / 'split.json'}: {min(twice)} is on two sides: prepare a set whose sides are apart")


def keep_setting(
    folder: Path,
    data: Path,
    reference: Path,
    setting: dict[str, Any],
    option: str = "another --out",
    begun: tuple[str, ...] = ("*/ckpt.pt", "*/results.json", "*/images", "*/data"),
) -> None:
    """Write FOLDER/setting.json: what all runs in it have in common. Raises Mistake where existing ones differ.

    Without it a run with other options would be taken for one of these. Of the datasets it holds sizes and split.
    option: what to give for another folder. begun: patterns of what is there once the setting holds, which by default
    are runs, floors and mixes: without them, a mistyped command has left it.
    """
    split = json.dumps(read_split(reference / "split.json"), sort_keys=True).encode()
    told = setting | {"size of the data": size_of(data), "size of the reference": size_of(reference)}
    told["split of both"] = hashlib.sha256(split).hexdigest()[:16]
    with making(path := folder / "setting.json"):
        holds = path.exists() and any(any(folder.glob(pattern)) for pattern in begun)
        there = read_measures(path) if holds else told
        for name, value in told.items():
            if there.get(name) != value:
                given = name if " " in name else f"--{name.replace('_', '-')}"
                raise Mistake(f"{folder}: made with {given} {there.get(name)}, not {value}: give that, or {option}")
        if not holds:
            write_bytes(path, (json.dumps(told, indent=1) + "\n").encode())


def measures_file(results: Path, name: str) -> Path:
    """The file of what a run has measured."""
    return results / "runs" / f"{name}.json"


def digest_of_setting(results: Path) -> str:
    """What all that is kept in a folder of results must have in common, as a short digest."""
    return hashlib.sha256((results / "runs" / "setting.json").read_bytes()).hexdigest()[:16]


def keep_measures(results: Path, name: str, told: dict[str, Any]) -> None:
    """Keep what a run has measured beside the tables, which are made of it; it takes the place of what was there."""
    whose = {"run": name, "setting": digest_of_setting(results)}
    with making(path := measures_file(results, name)):
        write_bytes(path, (json.dumps(whose | told, indent=1, allow_nan=False) + "\n").encode())


def kept_measures(results: Path, name: str) -> dict[str, Any] | None:
    """What a run has measured; None where that was not kept. Raises Mistake for a file that is not this run's."""
    path = measures_file(results, name)
    if not path.exists():
        return None
    told = read_measures(path)
    if (told.get("run"), told.get("setting")) != (name, digest_of_setting(results)):
        raise Mistake(
            f"{path}: of another run, or of another setting than {path.parent / 'setting.json'}: take it away"
        )
    return told


def kept_seeds(results: Path, name: str) -> dict[int, dict[str, Any]]:
    """What runs NAME_SEED have measured, by seed. Raises Mistake for a file that is not theirs."""
    seeds = seeded(results / "runs", name, ".json")
    return {seed: kept for seed in seeds if (kept := kept_measures(results, f"{name}_{seed}"))}


def read_measures(path: Path) -> dict[str, Any]:
    """Read a JSON object that was written here, as a merge or an editor has left it. Raises Mistake."""
    try:
        read = json.loads(path.read_text())
    except JSON_ERRORS as error:
        raise Mistake(f"{path}: not JSON ({error}): restore it, or delete it and make its row again") from error
    if not isinstance(read, dict):
        raise Mistake(f"{path}: not what a run has measured: restore it, or delete it and make its row again")
    return read


def sides_of(reference: Path) -> dict[str, dict[str, int]]:
    """How many slices and patients each side of a dataset has, for the record of a setting."""
    split = read_split(reference / "split.json")
    return {side: {"slices": len(s), "patients": len({*map(patient_of, s)})} for side, s in split.items()}


def size_of(data: Path) -> int:
    """Side length of a dataset's slices, in pixels."""
    return len(read_image(next(iter(list_pngs(data / "images", "images").values()))))


def feature_network(folder: Path) -> Path:
    """The feature network for FID and KID, made if it is not there yet."""
    return exported(folder / "features.onnx", "--features", FEATURES)


def export(out: Path) -> Path:
    """The generator of a run as a file, exported if it is not yet."""
    return exported(out / "generator.onnx", out / "ckpt.pt")


def exported(file: Path, *what: str | Path) -> Path:
    """A file from export.py, of what its command line names, made if it is not there yet, or older than that."""
    with making(file, script=file.with_name(f".{file.name}.lock")):
        sources = [path for path in what if isinstance(path, Path) and path.exists()]
        newest = max((path.stat().st_mtime_ns for path in sources), default=0)
        if not file.exists() or file.stat().st_mtime_ns < newest:
            call(ROOT / "export.py", *what, "-o", file)
    return file


def synthesize(
    out: Path, data: Path, side: str, kind: str = "synthetic", options: list[str | Path] | None = None
) -> Path:
    """Synthesize a side of a dataset with a run's generator and more options of infer_onnx.py; returns the folder."""
    synthetic, model = out / f"{kind}_{side}", export(out)
    script = ROOT / "infer_onnx.py"
    with making(synthetic, script=synthetic / ".1-of-1.lock"):
        call(script, data, "--side", side, "--model", model, "--out", synthetic, "--unchecked", *(options or []))
    return synthetic


def once(results: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file of results holds; where it is not there yet, make() makes it, and returns what it holds."""
    with making(results):
        return json.loads(results.read_text()) if results.exists() else make()


def compare(data: Path, synthetic: Path, features: Path, out: Path) -> dict[str, Any]:
    """Compare synthetic slices with the real ones of a dataset: eval.py's results, kept as OUT/results.json."""
    results = out / "results.json"
    call(ROOT / "eval.py", data, synthetic, "--features", features, "--out", out, "--json", results)
    return json.loads(results.read_text())


def measure(out: Path, data: Path, side: str, features: Path) -> dict[str, Any]:
    """Synthesize a side of a dataset with a trained run and compare it with the real slices: eval.py's results."""
    results = out / f"eval_{side}" / "results.json"
    return once(results, lambda: compare(data, synthesize(out, data, side), features, results.parent))
