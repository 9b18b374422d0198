"""Two runs on one folder: one writes, the other is told, or waits; the dead hold nothing."""

import errno
import fcntl
import json
import os
import signal
import threading
from collections import Counter

import nibabel
import numpy as np
import pytest
from conftest import ROOT
from test_infer import build_generator, draw_map
from test_prepare import body, put_patient
from test_runs import PROGRAM

import covidgan
import data.volumes
import export
import infer_onnx
from data import phantom, prepare, slices
from data.slices import Mistake, write_map
from paper import runs

HOLD = """
import fcntl, pathlib, sys, time
path = pathlib.Path(sys.argv[1])
path.parent.mkdir(parents=True, exist_ok=True)
file = open(path, "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(cli):
    """Let another process hold a lock, by the system's own call; it is killed at the end, if not before."""
    started = []

    def hold(path):
        process = cli.start("-c", HOLD, path, script=None)
        assert process.stdout.readline() == "held\n"
        started.append(process)
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def model(tmp_path):
    return build_generator(tmp_path / "model.onnx")


@pytest.fixture
def maps(tmp_path):
    """Five maps."""
    (tmp_path / "maps").mkdir()
    for k in range(5):
        write_map(tmp_path / "maps" / f"P01_S{k:03d}.png", draw_map(64, 64, shift=k))
    return tmp_path / "maps"


def writers(tmp_path, maps, model):
    """Name -> a command in this process that writes into tmp_path/out, and the lock that it takes."""
    out = str(tmp_path / "out")
    for number in (1, 2):
        put_patient(tmp_path / "src", number, volumes=body(depth=2))
    infer = [str(maps), "--model", str(model), "--out", out, "--provider", "cpu"]
    small = ["--size", "64", "--patients", "3", "--slices", "1", "--workers", "1"]
    return {
        "phantom": (lambda: phantom.main(["--out", out, *small]), ".lock"),
        "prepare": (lambda: prepare.main([str(tmp_path / "src"), "--out", out, "--size", "24"]), ".lock"),
        "all slices": (lambda: infer_onnx.main(infer), ".1-of-1.lock"),
        "a shard": (lambda: infer_onnx.main([*infer, "--shard", "2/3"]), ".2-of-3.lock"),
        "all slices beside a shard": (lambda: infer_onnx.main(infer), ".2-of-3.lock"),
    }


NAMES = ("phantom", "prepare", "all slices", "a shard", "all slices beside a shard")


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_is_refused_while_the_first_lives_and_not_when_it_was_killed(
    name, tmp_path, maps, model, holder, count
):
    run, lock = writers(tmp_path, maps, model)[name]
    other = holder(tmp_path / "out" / lock)
    with pytest.raises(Mistake, match=rf"^{tmp_path}/out: another run is writing to it: wait for its end"):
        run()
    assert [path for path in (tmp_path / "out").rglob("[!.]*") if path.is_file()] == []
    other.send_signal(signal.SIGKILL)
    other.wait()
    run()
    assert len([path for path in (tmp_path / "out").rglob("*.png")]) > 1
    assert [path.name for path in (tmp_path / "out").glob(".*")] == []
    count("second run refused, and let in when the first was killed")


def test_a_second_training_is_refused_and_changes_nothing(whole_run, toy, small_run, here, tmp_path, holder, count):
    out = tmp_path / "out"
    out.mkdir()
    (out / "ckpt.pt").write_bytes((whole_run[0] / "ckpt.pt").read_bytes())
    other = holder(out / ".lock")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for command in (["--resume", "--data", toy.folder], ["--overwrite", "--data", toy.folder, *small_run]):
        done = here("--out", out, *command)
        assert (done.status, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(f"error: {out}: another run is writing to it: wait for its end")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        count("second run refused, and let in when the first was killed")
    other.send_signal(signal.SIGKILL)
    other.wait()
    with covidgan.held(out):
        assert (out / ".lock").exists()
    assert not (out / ".lock").exists()


def test_other_shards_of_the_same_set_run_beside_each_other(tmp_path, maps, model, holder):
    holder(tmp_path / "out" / ".2-of-3.lock")
    infer = [str(maps), "--model", str(model), "--out", str(tmp_path / "out"), "--provider", "cpu"]
    for part in (1, 3):
        assert infer_onnx.main([*infer, "--shard", f"{part}/3"]) == 0
    assert len([*(tmp_path / "out" / "images").iterdir()]) == 3  # 0, 3 and 2


def test_a_dry_run_holds_nothing_and_is_not_held_up(tmp_path, maps, model, holder, capsys):
    holder(tmp_path / "out" / ".1-of-1.lock")
    out = ["--model", str(model), "--out", str(tmp_path / "out"), "--provider", "cpu", "--dry-run"]
    assert infer_onnx.main([str(maps), *out]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".1-of-1.lock"]


@pytest.mark.parametrize("held", [covidgan.held, slices.held])
@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_one_line_of_warning(held, answer, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held(tmp_path / "out"), held(tmp_path / "out"):
        pass
    told = capsys.readouterr().err.splitlines()
    assert told == [f"warning: {tmp_path}/out: no locks on this filesystem: let no two runs write there"] * 2


@pytest.mark.parametrize("held", [covidgan.held, slices.held])
def test_a_folder_that_cannot_be_is_a_mistake_that_names_it(held, tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises((Mistake, covidgan.Mistake), match=rf"{tmp_path}/file: cannot be made a folder"),
        held(tmp_path / "file"),
    ):
        pass


def test_a_fault_while_it_is_held_is_not_taken_for_one_of_the_lock(tmp_path):
    with pytest.raises(OSError, match="of the work"), slices.held(tmp_path):
        raise OSError(errno.ENOLCK, "of the work")
    assert [*tmp_path.iterdir()] == []


# ---- shards


@pytest.mark.parametrize("kind", ["slices", "volumes"])
def test_one_to_seven_shards_make_every_file_exactly_once(kind, tmp_path, maps, model, monkeypatch, count):
    written = Counter()
    real = slices.write_bytes
    for module in (slices, infer_onnx, data.volumes):
        monkeypatch.setattr(module, "write_bytes", lambda path, content: written.update([path]) or real(path, content))
    source = maps
    if kind == "volumes":
        (source := tmp_path / "labels").mkdir()
        for k in range(5):
            labels = np.stack([draw_map(32, 32, shift=k + z) for z in range(2)]).transpose(2, 1, 0)
            nibabel.save(nibabel.Nifti1Image(labels, np.diag([-1.0, -1, 5, 1])), source / f"{k}.nii.gz")
    wanted = 5 if kind == "volumes" else 5 * 2 * 3  # two variants of each: map, image and panel
    for parts in range(1, 8):
        out = tmp_path / f"in{parts}"
        argv = [str(source), "--model", str(model), "--out", str(out), "--provider", "cpu"]
        argv += ["--variants", "2", "--panel"] if kind == "slices" else []
        written.clear()
        for part in range(1, parts + 1):
            assert infer_onnx.main([*argv, "--shard", f"{part}/{parts}"]) == 0
        assert {*written.values()} == {1}
        assert len(written) == wanted + 1 and out / "run.json" in written
        assert {*written} == {path for path in out.rglob("*") if path.is_file()}
        count("shards of a set, each file made once", parts)


def test_a_shard_made_otherwise_is_refused_before_the_first_slice_of_the_other_is_there(tmp_path, maps, model, holder):
    """A run of another format holds its shard, and has left run.json, but nothing made yet."""
    out = tmp_path / "out"
    argv = [str(maps), "--model", str(model), "--out", str(out), "--provider", "cpu", "--shard"]
    assert infer_onnx.main([*argv, "1/2"]) == 0
    for path in out.rglob("*.png"):
        path.unlink()
    other = holder(out / ".1-of-2.lock")
    with pytest.raises(Mistake, match="made otherwise"):
        infer_onnx.main([*argv, "2/2", "--format", "npy"])
    other.kill()
    other.wait()
    assert infer_onnx.main([*argv, "2/2", "--format", "npy"]) == 0  # what a killed run left is no one's


def test_two_exports_to_one_file_have_one_writer(tmp_path, whole_run, holder):
    holder(tmp_path / ".g.onnx.lock")
    with pytest.raises(covidgan.Mistake, match=r"g\.onnx: another run is writing to it"):
        export.main([str(whole_run[0] / "ckpt.pt"), "-o", str(tmp_path / "g.onnx")])
    assert [path.name for path in tmp_path.iterdir()] == [".g.onnx.lock"]


# ---- the tables' runs

TRAIN = """
import pathlib, sys
from data.slices import exit_on_mistake
from paper import runs
exit_on_mistake(lambda argv: runs.train([argv[0]], [], pathlib.Path(argv[1])))
"""


def test_two_tables_that_need_one_run_make_it_once_and_the_second_waits(cli, tmp_path, count):
    slow = PROGRAM.replace('(out / "results.json")', 'import time; time.sleep(10); (out / "results.json")')
    (tmp_path / "train.py").write_text(slow)
    out, path = tmp_path / "run", {"PYTHONPATH": str(ROOT)}
    both = [cli.start("-c", TRAIN, tmp_path / "train.py", out, script=None, env=path) for _ in range(2)]
    told = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert sorted(text.count("waiting for another run") for text in told) == [0, 1]
    assert (out / "calls.txt").read_text().count("\n") == 1
    assert json.loads((out / "seconds.json").read_text()) > 0
    assert [path.name for path in out.glob(".*")] == []
    count("two tables that need one run")


def test_a_training_that_outlived_its_killed_caller_is_waited_for(tmp_path, holder, capsys):
    out = tmp_path / "run"
    training = holder(out / ".lock")
    (tmp_path / "train.py").write_text(PROGRAM)
    os.kill(training.pid, signal.SIGSTOP)  # it lives, and holds
    threading.Timer(1, training.kill).start()
    runs.train([str(tmp_path / "train.py")], [], out)
    assert f"waiting for another run: {out}/.lock is held" in capsys.readouterr().err
    assert (out / "results.json").exists()


def test_what_a_kill_took_along_of_the_cost_is_not_made_up(tmp_path):
    """A run that was killed once has no count of its seconds, rather than too small a one."""
    out = tmp_path / "run"
    out.mkdir()
    (tmp_path / "train.py").write_text(PROGRAM)
    (out / "begun.json").write_text('{"row": ""}')
    (out / "ckpt.pt").touch()  # and no seconds.json, which is written when a training ends
    runs.train([str(tmp_path / "train.py")], [], out)
    assert (out / "results.json").exists() and runs.seconds(out) is None
