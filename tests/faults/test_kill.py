"""kill -9: nothing half-written stands under a final name, and going on ends as if never stopped."""

import os
import random
import signal
import time

import pytest
from whole import MODEL, check_same, check_whole, leftovers, lines_of, put_maps, put_volumes, wait_for

pytestmark = pytest.mark.long


def test_a_training_killed_and_resumed_ends_with_the_same_bits(whole_run, toy, small_run, cli, tmp_path):
    out, rng = tmp_path / "out", random.Random(9)
    command = ["--stage", "all", "--data", toy.folder, "--out", out, *small_run, "--interval", 5]
    for steps in (6, 13, 22):  # of 30, ten a stage
        process = cli.start(*command)
        wait_for(process, lambda steps=steps: lines_of(out / "stats.jsonl") >= steps)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        _, stderr = process.communicate(timeout=300)
        assert process.returncode != 0, stderr
        check_whole(out)
        command = ["--resume", "--out", out]
    done = cli(*command)
    assert done.status == 0, done.stderr
    assert leftovers(out) == []
    check_same(out, whole_run[0])


def commands(folder):
    """Name -> what makes its command for an OUT."""
    maps, volumes = put_maps(folder / "maps"), put_volumes(folder / "src")
    size = ["--size", 64, "--patients", 3, "--slices", 20]
    variants = ["--model", MODEL, "--variants", 5, "--panel", "--threads", 1, "--provider", "cpu"]
    return {
        "phantom": lambda out: ["data/phantom.py", *size, "--out", out],
        "prepare": lambda out: ["data/prepare.py", volumes, "--size", 512, "--out", out],
        "infer_onnx": lambda out: ["infer_onnx.py", maps, *variants, "--out", out],
    }


@pytest.mark.parametrize("name", ["phantom", "prepare", "infer_onnx"])
def test_a_script_killed_halfway_leaves_whole_files_and_its_command_makes_the_rest(name, cli, tmp_path):
    command = commands(tmp_path)[name]
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = cli.start(*command(out), script=None, start_new_session=True)
    wait_for(process, lambda: len([*out.glob("images/[!.]*.png")]) > 2)
    os.killpg(process.pid, signal.SIGKILL)  # its workers too
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert check_whole(out) > 2
    for folder in (out, whole):
        done = cli(*command(folder), script=None)
        assert done.status == 0, done.stderr
        assert leftovers(folder) == []
    check_same(out, whole)
