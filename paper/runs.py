"""Runs of the paper's experiments: train, export, synthesize and evaluate, each by the script that a user would call.

A run is a folder: what training leaves (ckpt.pt, results.json at its end, ...), generator.onnx, synthetic_SIDE/ and
eval_SIDE/. What is whole is not made again and a stopped training goes on, so that a study that was stopped is gone on
with by the command that began it. Two commands, on one machine or two, may need the same run: what is being made is
held, and who else wants it waits, and then finds it there.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.slices import Mistake, held, list_pngs, read_image, write_bytes

ROOT = Path(__file__).resolve().parents[1]
FEATURES = "efficientnet-lite0"  # of FID and KID: Inception's weights are a download


def call(*arguments: str | Path) -> None:
    """Run a script of the repository with this Python. Raises Mistake where it fails; it has said why."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    script = subprocess.Popen([sys.executable, *map(str, arguments)], env=os.environ | {"PYTHONPATH": path})
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
    """Hold a file or folder that is to be made, or wait for who makes it: it may be there afterwards.

    script: the lock of the script that makes it, which may have outlived whoever called it.
    """
    with held(product.parent, f".{product.name}.maker.lock", wait=True):  # no name that a script itself locks
        if script:
            with held(script.parent, script.name, wait=True):
                pass
        yield


def cpu_seconds() -> float:
    """CPU seconds of all scripts run so far, of all their threads."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def commit() -> str:
    """The repository's commit, with -dirty where files differ from it; "unknown" outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    return "unknown"


@contextlib.contextmanager
def keeping(out: Path) -> Iterator[None]:
    """Keep each checkpoint that a training writes meanwhile, in a run's folder of its own: OUT/kept/SECONDS.

    SECONDS are of training, by the clock, without what a stopped run did after its last checkpoint and does again.
    """
    checkpoint, kept, over = out / "ckpt.pt", out / "kept", threading.Event()
    start = time.monotonic() - max(map(int, kept_seconds(out)), default=0)

    def written() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    def watch(last: int) -> None:
        while True:
            ending = over.wait(0.5)
            if (now := written()) != last:
                last, folder = now, kept / f"{time.monotonic() - start:06.0f}"
                folder.mkdir(parents=True, exist_ok=True)
                write_bytes(folder / checkpoint.name, checkpoint.read_bytes())
            if ending:
                return

    watcher = threading.Thread(target=watch, args=[written()])
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def kept_seconds(out: Path) -> list[str]:
    """Names of the folders of a run's kept checkpoints, in order."""
    return sorted(path.parent.name for path in out.glob("kept/*/ckpt.pt"))


def train(program: list[str], options: list[str], out: Path, keep: bool = False) -> None:
    """Train into a folder, or go on there; its CPU seconds are added up in OUT/seconds.json.

    OUT/commit.txt is the repository's commit at its start; keep: see `keeping`. Raises Mistake.
    """
    with making(out / "results.json", script=out / ".lock"):
        if (out / "results.json").exists():
            return
        started, spent, before = (out / "ckpt.pt").exists(), seconds(out), cpu_seconds()
        if not started:
            spent = 0.0
            write_bytes(out / "commit.txt", commit().encode())
        (out / "seconds.json").unlink(missing_ok=True)  # until its end: a kill takes along what was spent
        try:
            with keeping(out) if keep else contextlib.nullcontext():
                call(*program, "--out", out, *(["--resume"] if started else options))
        finally:
            if spent is not None:
                write_bytes(out / "seconds.json", json.dumps(spent + cpu_seconds() - before).encode())


def seconds(out: Path) -> float | None:
    """CPU seconds that a run's training took; None where a kill has taken the count along."""
    path = out / "seconds.json"
    return json.loads(path.read_text()) if path.exists() else None


def size_of(data: Path) -> int:
    """Side of a dataset's slices in pixels."""
    return len(read_image(next(iter(list_pngs(data / "images", "images").values()))))


def feature_network(folder: Path) -> Path:
    """The feature network of FID and KID, made where it is not there yet."""
    return exported(folder / "features.onnx", "--features", FEATURES)


def export(out: Path) -> Path:
    """The generator of a run as a file, exported where it is not yet."""
    return exported(out / "generator.onnx", out / "ckpt.pt")


def exported(file: Path, *what: str | Path) -> Path:
    """A file of export.py's, of what its command line names, made where it is not there yet."""
    with making(file):
        if not file.exists():
            call(ROOT / "export.py", *what, "-o", file)
    return file


def synthesize(
    out: Path, data: Path, side: str, kind: str = "synthetic", options: list[str | Path] | None = None
) -> Path:
    """Synthesize a side of a dataset by a run's generator, with more options of infer_onnx.py; returns the folder."""
    synthetic, model = out / f"{kind}_{side}", export(out)
    script = ROOT / "infer_onnx.py"
    with making(synthetic, script=synthetic / ".1-of-1.lock"):
        call(script, data, "--side", side, "--model", model, "--out", synthetic, *(options or []))
    return synthetic


def compare(data: Path, synthetic: Path, features: Path, out: Path) -> dict[str, Any]:
    """Compare synthetic slices with the real ones of a dataset: eval.py's results, kept as OUT/results.json."""
    results = out / "results.json"
    call(ROOT / "eval.py", data, synthetic, "--features", features, "--out", out, "--json", results)
    return json.loads(results.read_text())


def measure(out: Path, data: Path, side: str, features: Path) -> dict[str, Any]:
    """Synthesize a side of a dataset by a trained run and compare it with the real slices: eval.py's results."""
    results = out / f"eval_{side}" / "results.json"
    with making(results):
        if results.exists():
            return json.loads(results.read_text())
        return compare(data, synthesize(out, data, side), features, results.parent)
