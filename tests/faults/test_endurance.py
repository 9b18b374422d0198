"""Long work holds its memory, open files and threads: synthesis of many maps, training of many steps."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import covidgan
import export
from data.slices import write_map

FEW = 5  # open files that may be there for a moment: a leak is of hundreds
MIB = 2**20


def usage(pid):
    """Resident bytes, open files and threads of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len([*Path(f"/proc/{pid}/fd").iterdir()])
    return int(status["VmRSS"].split()[0]) * 1024, files, int(status["Threads"])


@pytest.fixture
def log(tmp_path):
    """Where a process writes what it says: nobody reads a pipe meanwhile, and a full one would stop it."""
    with open(tmp_path / "log", "w") as file:
        yield {"stdout": file, "stderr": file}


def watch(process, done):
    """How far a process is and its usage then, [n, 4], until it ends; done() counts what it has made."""
    seen = []
    while process.poll() is None:
        try:
            seen.append((done(), *usage(process.pid)))
        except (OSError, KeyError):  # it ends meanwhile
            break
        time.sleep(0.02)
    assert process.wait() == 0
    return np.array(seen, float)


def growth(what, seen):
    """What grew while the second half of the work was done, its report left out: bytes, files, threads; and a line.

    Bytes are by least squares over that half; of files and threads it is the median's step from its first part.
    """
    during = seen[(seen[:, 0] > seen[:, 0].max() / 2) & (seen[:, 0] < seen[:, 0].max())]
    done, resident, files, threads = during.T
    assert len(done) > 20, "too quick to be watched"
    slope = np.polyfit(done, resident, 1)[0]
    parts = np.array_split(np.stack([files, threads]), 2, axis=1)
    more = np.median(parts[1], 1) - np.median(parts[0], 1)
    line = f"{what}: {slope:+.0f} bytes a piece of {resident.max() / MIB:.0f} MiB, files and threads {more}"
    return slope * (done.max() - done.min()), *more, line


@pytest.fixture
def model(tmp_path):
    """A small generator's file."""
    c = covidgan.Config(size=64, ngf=8, ndf=8, n_blocks=1, n_local_blocks=1)
    method = covidgan.build(covidgan.Covidgan, c)
    checkpoint = {"config": dataclasses.asdict(c), "networks": method.state_dict()}
    export.export_generator(checkpoint, "0" * 64, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def test_synthesis_of_many_maps_holds_its_memory_files_and_threads(cli, toy, model, log, tmp_path, tries, count):
    n, labels = tries(1500, 5000), [toy.labels[name] for name in toy.train]
    (tmp_path / "maps").mkdir()
    for k in range(n):
        write_map(tmp_path / "maps" / f"P{k // 100:02d}_S{k % 100:03d}.png", np.roll(labels[k % len(labels)], k, 1))
    out = tmp_path / "out"
    options = ["--model", model, "--out", out, "--provider", "cpu", "--threads", 1, "--batch", 2]
    process = cli.start(tmp_path / "maps", *options, script=ROOT / "infer_onnx.py", **log)
    seen = watch(process, lambda: len([*(out / "images").glob("[!.]*.png")]) if out.exists() else 0)
    assert len([*(out / "images").glob("*.png")]) == n
    grown, files, threads, line = growth("synthesis, a map", seen)
    print(line)
    assert grown < 16 * MIB and files <= FEW and threads <= 0, line
    count("maps synthesized in a row with flat memory", n)


def test_training_of_many_steps_holds_its_memory_files_and_threads(cli, toy, log, tmp_path, tries, count):
    steps = tries(600, 20_000)
    interval = tries(steps, 200)  # drawing takes some twenty pictures to settle: too long for CI
    out, stats = tmp_path / "out", tmp_path / "out" / "stats.jsonl"
    size = "--preset tiny --device cpu --dtype float32 --ngf 4 --ndf 4 --n-blocks 1 --n-local-blocks 1 --batch 1"
    length = ["--epochs", 1, "--epoch-len", steps, "--interval", interval, "--stage", "joint"]
    process = cli.start("--data", toy.folder, "--out", out, *size.split(), *length, **log)
    seen = watch(process, lambda: stats.stat().st_size if stats.exists() else 0)
    assert sum(1 for _ in stats.open()) == steps
    seen[:, 0] *= steps / max(seen[:, 0].max(), 1)
    grown, files, threads, line = growth("training, a step", seen)
    print(line)
    assert grown < 16 * MIB and files <= FEW and threads <= 0, line
    count("training steps in a row with flat memory", steps)
