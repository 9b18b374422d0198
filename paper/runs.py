"""Runs of the paper's experiments: train, export, synthesize and evaluate, each by the script that a user would call.

A run is a folder: what training leaves (ckpt.pt, results.json at its end, ...), generator.onnx, synthetic_SIDE/ and
eval_SIDE/. What is whole is not made again and a stopped training goes on, so that a study that was stopped is gone on
with by the command that began it.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from data.slices import Mistake, write_bytes

ROOT = Path(__file__).resolve().parents[1]
FEATURES = "efficientnet-lite0"  # of FID and KID: Inception's weights are a download


def call(*arguments: str | Path) -> None:
    """Run a script of the repository with this Python. Raises Mistake where it fails; it has said why."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, *map(str, arguments)], env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        raise Mistake(f"{' '.join(map(str, arguments))}: stopped with status {done.returncode}, see above")


def cpu_seconds() -> float:
    """CPU seconds of all scripts run so far, of all their threads."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def train(program: list[str], options: list[str], out: Path) -> None:
    """Train into a folder, or go on there; its CPU seconds are added up in OUT/seconds.json. Raises Mistake."""
    if (out / "results.json").exists():
        return
    started, sum_file = (out / "ckpt.pt").exists(), out / "seconds.json"
    spent = json.loads(sum_file.read_text()) if started and sum_file.exists() else 0.0
    before = cpu_seconds()
    try:
        call(*program, "--out", out, *(["--resume"] if started else options))
    finally:
        if out.is_dir():
            write_bytes(sum_file, json.dumps(spent + cpu_seconds() - before).encode())


def feature_network(folder: Path) -> Path:
    """The feature network of FID and KID, made where it is not there yet."""
    path = folder / "features.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        call(ROOT / "export.py", "--features", FEATURES, "-o", path)
    return path


def measure(out: Path, data: Path, side: str, features: Path) -> dict[str, Any]:
    """Synthesize a side of a dataset by a trained run and compare it with the real slices: eval.py's results."""
    model, synthetic, results = out / "generator.onnx", out / f"synthetic_{side}", out / f"eval_{side}" / "results.json"
    if not results.exists():
        if not model.exists():
            call(ROOT / "export.py", out / "ckpt.pt", "-o", model)
        call(ROOT / "infer_onnx.py", data, "--side", side, "--model", model, "--out", synthetic)
        call(ROOT / "eval.py", data, synthetic, "--features", features, "--out", results.parent, "--json", results)
    return json.loads(results.read_text())
