"""kill -9 at random moments: nothing half-written stands under a final name, and the same command ends the same."""

import os
import random
import shutil
import signal
import subprocess
import time

import nibabel
import numpy as np
import pytest
from test_infer import build_generator, draw_map
from test_prepare import put_patient
from whole import check_same, check_whole, leftovers, with_long_alone

from data.slices import write_map

LATEST = 900  # seconds for any of the commands, on however busy a machine


def alive(group):
    """Whether a process of a group is left."""
    return subprocess.run(["pgrep", "-g", str(group)], capture_output=True).returncode == 0


class Killer:
    """Runs a command to its end, or kills it at a random moment: itself alone, or with all that it has started."""

    def __init__(self, start, seed):
        self.start, self.rng, self.took = start, random.Random(seed), 0.0

    def whole(self, command):
        """Run to the end and note how long it took."""
        began = time.monotonic()
        process = self.start(*command, script=None, start_new_session=True)
        _, stderr = process.communicate(timeout=LATEST)
        assert process.returncode == 0, stderr
        self.took = max(self.took, time.monotonic() - began)

    def kill(self, command):
        """Whether it could be killed before it ended by itself. The first quarter, of importing, is left out."""
        process = self.start(*command, script=None, start_new_session=True)
        moment = time.monotonic() + self.took * self.rng.uniform(0.25, 1)
        while time.monotonic() < moment and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[1]
            return False
        alone = self.rng.random() < 0.5
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        process.wait()
        if not alone:
            while alive(process.pid):
                time.sleep(0.01)
        return True


def next_command(command, resume, out):
    """How a user goes on: training has a command of its own for that."""
    return resume if resume and (out / "ckpt.pt").exists() else command


def check_end(out, whole):
    """A run that was killed and went on has left what an unkilled one leaves, and no more."""
    check_whole(out)
    assert leftovers(out) == []
    check_same(out, whole)


@pytest.fixture
def survives(cli, tmp_path, tries, count):
    """Kill a command's runs so many times, each going on with the last, and compare its ends with an unkilled one's."""

    def check(what, command, short, long, resume=None):
        if not short:
            with_long_alone(tries)
        killer, out, whole = Killer(cli.start, what), tmp_path / "out", tmp_path / "whole"
        out.mkdir()
        killer.whole(command)
        out.rename(whole)
        kills = 0
        while kills < tries(short, long):
            out.mkdir(exist_ok=True)
            if killer.kill(next_command(command, resume, out)):
                kills += 1
                count(f"kill -9: {what}")
                count("files opened after a kill -9", check_whole(out))
            else:  # it was done as soon as that
                check_end(out, whole)
                shutil.rmtree(out)
        out.mkdir(exist_ok=True)
        killer.whole(next_command(command, resume, out))
        check_end(out, whole)

    return check


def test_the_phantom_is_drawn_whole_or_anew(survives, tmp_path):
    size = ["--size", 64, "--patients", 3, "--slices", 4, "--workers", 2]
    survives("data/phantom.py", ["data/phantom.py", "--out", tmp_path / "out", *size], 1, 12)


def test_volumes_are_prepared_whole_or_anew(survives, tmp_path):
    for number in (1, 2, 3):
        put_patient(tmp_path / "src", number)
    survives("data/prepare.py", ["data/prepare.py", tmp_path / "src", "--out", tmp_path / "out", "--size", 64], 1, 12)


def test_training_goes_on_to_the_same_tensors(survives, toy, small_run, tmp_path):
    """With a checkpoint and pictures after every other step, so that many kills meet their writing."""
    out = ["--out", tmp_path / "out"]
    train = ["covidgan.py", "--data", toy.folder, *out, *small_run, "--interval", 2]
    survives("covidgan.py, all stages", train, 1, 28, resume=["covidgan.py", "--resume", *out])


def test_a_rivals_training_goes_on_to_the_same_tensors(survives, toy, tmp_path):
    rival, out = ["-m", "paper.rivals", "SPADE"], ["--out", tmp_path / "out"]
    small = ["--ngf", 4, "--ndf", 4, "--batch", 2, "--epochs", 2, "--epoch-len", 16, "--interval", 2]
    train = [*rival, "--preset", "paper", "--size", 64, "--data", toy.folder, *out, *small]
    survives("paper/rivals.py, SPADE", train, 0, 14, resume=[*rival, "--resume", *out])


def test_an_export_leaves_a_whole_file_or_none(survives, whole_run, tmp_path):
    command = ["export.py", whole_run[0] / "ckpt.pt", "-o", tmp_path / "out" / "generator.onnx"]
    survives("export.py", command, 0, 8)


def test_slices_are_synthesized_whole_and_none_is_missing(survives, tmp_path):
    (tmp_path / "maps").mkdir()
    for k in range(6):
        write_map(tmp_path / "maps" / f"P01_S{k:03d}.png", draw_map(128, 128, shift=k))
    model = build_generator(tmp_path / "slow.onnx", work=2)
    command = ["infer_onnx.py", tmp_path / "maps", "--model", model, "--out", tmp_path / "out"]
    survives("infer_onnx.py, slices", [*command, "--variants", 4, "--panel", "--threads", 1], 1, 8)


def test_volumes_are_synthesized_whole_and_none_is_missing(survives, tmp_path):
    (tmp_path / "labels").mkdir()
    for k in range(4):
        labels = np.stack([draw_map(96, 96, shift=k + z) for z in range(8)]).transpose(2, 1, 0)
        nibabel.save(nibabel.Nifti1Image(labels, np.diag([-1.0, -1, 5, 1])), tmp_path / "labels" / f"{k}.nii.gz")
    model = build_generator(tmp_path / "slow.onnx", work=2)
    command = ["infer_onnx.py", tmp_path / "labels", "--model", model, "--out", tmp_path / "out", "--threads", 1]
    survives("infer_onnx.py, volumes", command, 0, 8)


def test_a_row_of_a_table_is_made_to_the_same_end(survives, table_command, tmp_path):
    """Killed alone, paper/tables.py leaves its scripts running: the next command waits for them."""
    arguments = table_command("2", "", "--samples", "64", "--rows", "covidgan", "--seeds", "1")  # 0: much to measure
    for option, place in (("--out", "out"), ("--results", "out/results")):
        arguments[arguments.index(option) + 1] = tmp_path / place
    survives("paper.tables", ["-m", "paper.tables", *arguments], 0, 10)
