"""A toy dataset, small configs, and covidgan.py run as a user runs it."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: runs are compared bit by bit
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before ONNX Runtime is imported, as in data/runtime.py

import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from data import slices

# Ctrl-C is ignored by what a shell starts in the background, and would be by all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SIZE = 64
HU = {"air": -1000.0, "body": 40.0, 1: -850.0, 2: -550.0, 3: 20.0}  # plausible HU, by label inside the lung


def ellipse(cy, cx, ry, rx):
    """Mask of an ellipse, centre and half axes in parts of the picture's side."""
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1


def draw_toy(rng, lesions=True):
    """HU and labels of a chest of ellipses: body, two lungs, a ground-glass and a consolidation blob in them."""
    hu, labels = np.full((SIZE, SIZE), HU["air"]), np.zeros((SIZE, SIZE), np.uint8)
    hu[ellipse(0.5, 0.5, 0.40, 0.46)] = HU["body"]
    lungs = ellipse(0.5, 0.31, *rng.uniform((0.24, 0.13), (0.30, 0.16)))
    lungs |= ellipse(0.5, 0.69, *rng.uniform((0.24, 0.13), (0.30, 0.16)))
    labels[lungs] = 1
    if lesions:
        side = rng.permutation((0.31, 0.69))
        glass = ellipse(rng.uniform(0.4, 0.6), side[0], *rng.uniform(0.07, 0.12, 2))
        dense = ellipse(rng.uniform(0.4, 0.6), side[1], *rng.uniform(0.05, 0.09, 2))
        labels[glass & lungs], labels[dense & lungs] = 2, 3
    for label in (1, 2, 3):
        hu[labels == label] = HU[label]
    return hu + rng.normal(0, 25, hu.shape), labels


def draw_map(height=64, width=64, shift=0):
    """Two lungs with a lesion of either kind, uint8 [H, W]."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    labels = np.zeros((height, width), np.uint8)
    for side in (-0.45, 0.45):
        labels[((x - side) / 0.4) ** 2 + (y - shift / 50) ** 2 < 0.6] = 1
    labels[(x - 0.45) ** 2 + (y - 0.2) ** 2 < 0.06] = 2
    labels[(x + 0.45) ** 2 + (y + 0.2) ** 2 < 0.03] = 3
    return labels


def draw_chest(depth=6, size=64):
    """HU int16 and labels uint8 [Z, H, W] of lungs that no turn maps on themselves: wide at the back, left smaller."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    labels = np.zeros((depth, size, size), np.uint8)
    for z in range(depth):
        width = (0.12 + 0.2 * (y + 0.5)) * (1 - 0.1 * z)
        for side, part in ((-0.4, 1.0), (0.45, 0.6)):
            labels[z][(np.abs(x - side) < part * width) & (np.abs(y) < 0.5)] = 1
    hu = np.full(labels.shape, -1000, np.int16)
    hu[:, (x / 0.9) ** 2 + (y / 0.75) ** 2 < 1] = 40
    hu[labels == 1] = -850
    return hu, labels


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def files(folder):
    """The bytes of all files under a folder, by their paths in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TURNS = {
    "rows reversed": lambda picture: picture[..., ::-1, :],
    "columns reversed": lambda picture: picture[..., ::-1],
    "rows and columns reversed": lambda picture: picture[..., ::-1, ::-1],
    "rows and columns exchanged": lambda picture: picture.swapaxes(-1, -2),
}


Toy = namedtuple("Toy", "folder hu labels train test")  # a dataset on disk, and what was written into it


def write_toy(folder):
    """Write the toy dataset of 5 patients with 6 slices each; the last patient is the test side."""
    rng, toy = np.random.default_rng(7), Toy(folder, {}, {}, [], [])
    for sub in ("images", "maps"):
        (folder / sub).mkdir(parents=True)
    for patient in range(1, 6):
        for position in range(1, 7):
            name = slices.slice_name(patient, position)
            toy.hu[name], toy.labels[name] = draw_toy(rng, lesions=position > 1)
            slices.write_image(folder / "images" / f"{name}.png", toy.hu[name])
            slices.write_map(folder / "maps" / f"{name}.png", toy.labels[name])
            (toy.test if patient == 5 else toy.train).append(name)
    slices.write_split(folder / "split.json", toy.train, toy.test, [], {"seed": 7})
    return toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy dataset; read it only."""
    return write_toy(tmp_path_factory.mktemp("toy") / "set")


@pytest.fixture(scope="session")
def three_sides(toy, tmp_path_factory):
    """The toy dataset with three sides: three patients to train, one each for test and seg_test; read it only."""
    folder, names = tmp_path_factory.mktemp("sides"), sorted([*toy.train, *toy.test])
    for part in ("images", "maps"):
        (folder / part).symlink_to(toy.folder / part)
    slices.write_split(folder / "split.json", names[:18], names[18:24], names[24:], {})
    return folder


# paper's tests only
@pytest.fixture(scope="session")
def table_command(three_sides, tmp_path_factory):
    """Arguments of paper/tables.py at toy size, in a folder whose paper/README.md is the one given."""

    def command(number, readme, *options):
        folder = tmp_path_factory.mktemp("table")
        (folder / "paper").mkdir()
        (folder / "paper" / "README.md").write_text(readme)
        places = {"data": three_sides, "reference": three_sides}
        places |= {"out": folder / "out", "results": folder / "paper" / "results"}
        size = ["--seeds", "0", "--ngf", "4", "--batch", "4", *options]
        return [number, *size, *(word for name, place in places.items() for word in (f"--{name}", str(place)))]

    return command


@pytest.fixture
def own_toy(tmp_path):
    """A toy dataset of the test's own, to break."""
    return write_toy(tmp_path / "set")


@pytest.fixture(scope="session")
def tiny(toy, tmp_path_factory):
    """Make a Config of the preset tiny, smaller still, in float32 on the CPU: tiny(n_dis=3, ...)."""
    import covidgan

    out = str(tmp_path_factory.mktemp("tiny") / "out")
    small = dict(dtype="float32", device="cpu", n_blocks=1, n_local_blocks=1, data=str(toy.folder), out=out)
    return lambda **given: covidgan.Config(**{**covidgan.PRESETS["tiny"], **small, **given})


def batch_of(trainer):
    """Target and labels [B, 1, S, S] of a Trainer's next step."""
    trainer.feed()
    return trainer.batch()


@pytest.fixture(scope="session")
def small_run():
    """Options of a run of ten steps a stage."""
    options = "--preset tiny --device cpu --dtype float32 --ngf 8 --ndf 8 --n-blocks 1 --n-local-blocks 1"
    return [*options.split(), "--batch", "2", "--epochs", "2", "--epoch-len", "10", "--interval", "4"]


Done = namedtuple("Done", "status stdout stderr")  # how a command ended


def start(*arguments, script=ROOT / "covidgan.py", **more):
    """Start a script with this Python from the repository's root, on one core."""
    command = [sys.executable, *map(str, [script] if script else []), *map(str, arguments)]
    env = {**os.environ, "PYTHONFAULTHANDLER": "1", **more.pop("env", {})}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=env, **(pipes | more))


@pytest.fixture(scope="session")
def cli():
    """Run `python covidgan.py ARGUMENTS` and return its status, stdout and stderr; script=... runs another."""

    def run(*arguments, timeout=120, **more):
        process = start(*arguments, **more)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # it says where it hangs
            _, stderr = process.communicate(timeout=timeout)
            pytest.fail(f"{process.args} did not end in {timeout} s:\n{stderr}")
        return Done(process.returncode, stdout, stderr)

    run.start = start
    return run


@pytest.fixture(autouse=True)
def signals():
    """The training loop takes over its process's signals: give them back."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture
def here(monkeypatch, capfd):
    """`python covidgan.py ARGUMENTS` in this process: spares the seconds of importing torch."""
    import covidgan

    def run(*arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["covidgan.py", *map(str, arguments)])
        capfd.readouterr()
        try:
            covidgan.exit_on_mistake(covidgan.main)
            status = 0
        except SystemExit as leave:
            status = leave.code or 0
        return Done(status, *capfd.readouterr())

    return run


@pytest.fixture
def infer(tmp_path, model, capfd):
    """Run infer_onnx.py in this process: options -> exit status, OUT, all of stderr but the progress bar."""
    import infer_onnx

    def call(*options, out="out", model=model):
        argv = [*map(str, options), "--model", str(model), "--out", str(tmp_path / out)]
        argv += [] if "--provider" in argv else ["--provider", "cpu"]
        try:
            status, told = infer_onnx.main(argv), []
        except slices.Mistake as mistake:
            status, told = 2, [f"error: {mistake}"]
        noise = capfd.readouterr().err.replace("\r", "\n").splitlines()
        return status, tmp_path / out, "\n".join(told + [line for line in noise if line and "%|" not in line])

    return call


@pytest.fixture(scope="session")
def stop_after():
    """Train by a command line until SIGTERM comes in a step of a stage, or of the first: stop_after(4, arguments)."""
    import covidgan

    def train(steps, arguments, method=covidgan.Covidgan, stage=None):
        class Stopping(covidgan.Trainer):
            def update(self):
                if self.step_done == steps and stage in (None, self.stage):
                    signal.raise_signal(signal.SIGTERM)
                super().update()

        with pytest.raises(KeyboardInterrupt):
            covidgan.main([*map(str, arguments)], method, Stopping)

    return train


@pytest.fixture(scope="session")
def whole_run(toy, small_run, cli, tmp_path_factory):
    """The folder of a whole run of all three stages, and how it ended; read it only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = cli("--data", toy.folder, "--out", out, *small_run, "--interval", 5)
    assert done.status == 0, done.stderr
    return out, done
