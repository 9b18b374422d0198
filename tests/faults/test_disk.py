"""A disk that fills up, a folder that turns read-only, Ctrl-C and SIGTERM: one line, nothing in part, and a way on."""

import os
import random
import shutil
import signal
import subprocess
import time

import nibabel
import numpy as np
import pytest
from conftest import ROOT
from test_infer import build_generator, draw_map
from test_prepare import put_patient
from test_training import differing, leaves
from whole import check_whole, leftovers, with_long_alone

from data.slices import write_image, write_map


def error_of(done, lines_of=1):
    """The one line that a run ended with; of a script that starts another, the other's."""
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert done.status == 2 and len(lines) == lines_of and "Traceback" not in done.stderr, done.stderr
    return lines[0]


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own for OUT: disk(kilobytes) mounts it, or gives the mounted one another size."""
    out = tmp_path / "out"

    def mount(kilobytes):
        given = f"size={kilobytes}k" if not out.is_mount() else f"remount,size={kilobytes}k"
        out.mkdir(exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", given, "tmpfs", out], capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        return out

    yield mount
    if out.is_mount():
        subprocess.run(["umount", out], check=True)


@pytest.fixture
def immutable():
    """Turn a folder read-only even for root, while files in it are open: immutable(folder, True), and back."""
    turned = set()

    def turn(folder, on):
        if subprocess.run(["chattr", "+i" if on else "-i", folder], capture_output=True).returncode:
            pytest.skip("no folder can be made immutable here")
        (turned.add if on else turned.discard)(folder)

    yield turn
    for folder in [*turned]:
        turn(folder, False)


@pytest.fixture
def writers(tmp_path):
    """Name -> a command that writes into tmp_path/out, and its first file there."""
    out = tmp_path / "out"
    for number in (1, 2, 3):
        put_patient(tmp_path / "src", number)
    (tmp_path / "maps").mkdir()
    for k in range(6):
        write_map(tmp_path / "maps" / f"P01_S{k:03d}.png", draw_map(128, 128, shift=k))
    (tmp_path / "labels").mkdir()
    for k in range(3):
        labels = np.stack([draw_map(96, 96, shift=k + z) for z in range(6)]).transpose(2, 1, 0)
        nibabel.save(nibabel.Nifti1Image(labels, np.diag([-1.0, -1, 5, 1])), tmp_path / "labels" / f"{k}.nii.gz")
    model = build_generator(tmp_path / "model.onnx", work=2)
    infer = ["--model", model, "--out", out, "--threads", 1]
    phantom = ["--size", 64, "--patients", 3, "--slices", 8, "--workers", 2]
    return {
        "data/phantom.py": (["data/phantom.py", "--out", out, *phantom], "images"),
        "data/prepare.py": (["data/prepare.py", tmp_path / "src", "--out", out, "--size", 128], "images"),
        "slices": (["infer_onnx.py", tmp_path / "maps", *infer, "--variants", 3], "images"),
        "volumes": (["infer_onnx.py", tmp_path / "labels", *infer], "volumes"),
    }


WRITERS = ("data/phantom.py", "data/prepare.py", "slices", "volumes")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_is_full_is_one_line_and_with_room_again_the_command_ends_well(writer, writers, disk, cli, count):
    command, _ = writers[writer]
    out = disk(8 if writer == "volumes" else 60)
    assert f"{out}/" in (told := error_of(cli(*command, script=None))) and "No space left" in told
    count(f"full disk: {writer}")
    check_whole(out)
    assert leftovers(out) == []
    disk(4000)
    done = cli(*command, script=None)
    assert done.status == 0, done.stderr
    check_whole(out)


def test_a_disk_that_fills_while_training_keeps_the_last_checkpoint(disk, toy, small_run, whole_run, cli, count, tries):
    with_long_alone(tries)
    size = (whole_run[0] / "ckpt.pt").stat().st_size // 1024
    out = disk(size + size // 2)  # beside a checkpoint there is no room for the next one
    done = cli("--data", toy.folder, "--out", out, *small_run)
    assert f"{out}/" in (told := error_of(done)) and "make room" in told
    count("full disk: covidgan.py")
    check_whole(out)
    assert leftovers(out) == []
    disk(10 * size)
    done = cli("--resume", "--out", out)
    assert done.status == 0, done.stderr
    ours, theirs = (
        {k: v for k, v in leaves(one / "ckpt.pt").items() if "config" not in k} for one in (out, whole_run[0])
    )
    assert differing(ours, theirs) == []


# kilobytes of a disk that is too small for what they write
RESULTS = {"eval.py": 8, "export.py": 40, "paper.tables": 100}


@pytest.fixture
def results(tmp_path, toy, whole_run, table_command):
    """Name -> a command that writes its results into tmp_path/out."""
    out, fake = tmp_path / "out", tmp_path / "fake"
    fake.mkdir()
    for name in toy.test:
        write_image(fake / f"{name}.png", np.minimum(toy.hu[name] + 20, 3071))
    table = table_command("2", "<!-- table 2 -->\n<!-- end of table 2 -->\n", "--samples", "64", "--rows", "covidgan")
    table[table.index("--out") + 1] = out
    evaluated = ["--out", out / "eval", "--json", out / "results.json", "--provider", "cpu"]
    return {
        "eval.py": ["eval.py", toy.folder / "images", fake, "--maps", toy.folder / "maps", *evaluated],
        "export.py": ["export.py", whole_run[0] / "ckpt.pt", "-o", out / "generator.onnx"],
        "paper.tables": ["-m", "paper.tables", *table],
    }


@pytest.mark.parametrize("writer", RESULTS)
def test_results_that_a_full_disk_cannot_hold_are_one_line_and_made_when_there_is_room(
    writer, results, disk, cli, count, tries
):
    if writer != "eval.py":
        with_long_alone(tries)
    out = disk(RESULTS[writer])
    (out / "of_before.json").write_text("{}")
    told = error_of(cli(*results[writer], script=None), 2 if writer == "paper.tables" else 1)
    assert f"{out}/" in told and "cannot be written" in told
    count(f"full disk: {writer}")
    check_whole(out)
    assert leftovers(out) == [] and (out / "of_before.json").read_text() == "{}"
    disk(80_000)
    done = cli(*results[writer], script=None, timeout=600)
    assert done.status == 0, done.stderr
    assert check_whole(out) > 1


@pytest.mark.parametrize("writer", RESULTS)
def test_results_into_a_folder_that_has_turned_read_only_are_one_line_and_back_again_made(
    writer, results, tmp_path, immutable, cli, count, tries
):
    if writer != "eval.py":
        with_long_alone(tries)
    out = tmp_path / "out"
    out.mkdir()
    (out / "of_before.json").write_text("{}")
    immutable(out, True)
    told = error_of(cli(*results[writer], script=None))
    assert str(out) in told and "not permitted" in told
    count(f"read-only folder: {writer}")
    immutable(out, False)
    assert [path.name for path in out.iterdir()] == ["of_before.json"]
    done = cli(*results[writer], script=None, timeout=600)
    assert done.status == 0, done.stderr
    assert check_whole(out) > 1


def check_stopped(status, stderr, out):
    """A run that was asked to stop has said so in its last line, and left nothing in part."""
    assert status == 130 and "Traceback" not in stderr, stderr
    assert "stopped" in stderr.replace("\r", "\n").splitlines()[-1]
    check_whole(out)
    assert leftovers(out) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("writer", ["eval.py", "export.py"])
def test_asked_to_stop_what_writes_results_says_so_and_leaves_none_in_part(
    writer, signum, results, tmp_path, cli, count, tries
):
    if (writer, signum) != ("eval.py", signal.SIGINT):
        with_long_alone(tries)
    out, rng, stopped = tmp_path / "out", random.Random(writer), 0
    assert cli(writer, "-h", script=None).status == 0  # the first time Python compiles what it imports
    out.mkdir()
    began = time.monotonic()
    assert cli(*results[writer], script=None).status == 0
    took = time.monotonic() - began
    for _ in range(40):
        shutil.rmtree(out)
        out.mkdir()
        process = cli.start(*results[writer], script=None)
        time.sleep(took * rng.uniform(0.3, 0.95))  # past most imports
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=300)
        if process.returncode in (0, -signum):  # it was done before, or still importing
            assert "exit_on_mistake" not in stderr, stderr
            continue
        check_stopped(process.returncode, stderr, out)
        count(f"{signum.name}: {writer}")
        stopped += 1
        if stopped == tries(1, 5):
            break
    assert stopped == tries(1, 5)  # else it was too quick to be stopped


def wait_for(process, folder, files):
    """Wait until a run has written so many files of data."""
    until = time.monotonic() + 300
    while len([path for path in folder.glob("[!.]*") if path.is_file()]) < files:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_turns_read_only_is_one_line_and_back_again_the_command_ends_well(
    writer, writers, tmp_path, immutable, cli, count, tries
):
    if writer in WRITERS[:2]:
        with_long_alone(tries)
    command, first = writers[writer]
    out = tmp_path / "out"
    process = cli.start(*command, script=None)
    wait_for(process, out / first, 1)
    immutable(out / first, True)
    _, stderr = process.communicate(timeout=300)
    told = [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "Traceback" not in stderr, stderr
    assert len(told) == 1 and f"{out / first}/" in told[0] and "not permitted" in told[0]
    count(f"read-only folder: {writer}")
    immutable(out / first, False)
    check_whole(out)
    done = cli(*command, script=None)
    assert done.status == 0, done.stderr
    check_whole(out)
    assert leftovers(out) == []  # only now: what was unfinished when the folder turned could not be taken away


def test_a_folder_that_turns_read_only_while_training_keeps_the_last_checkpoint(
    toy, small_run, tmp_path, immutable, cli, count, tries
):
    with_long_alone(tries)
    out = tmp_path / "out"
    process = cli.start("--data", toy.folder, "--out", out, *small_run)
    wait_for(process, out, 2)
    immutable(out, True)
    _, stderr = process.communicate(timeout=300)
    told = [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "Traceback" not in stderr, stderr
    assert len(told) == 1 and f"{out}/" in told[0] and "cannot be written" in told[0]
    count("read-only folder: covidgan.py")
    immutable(out, False)
    check_whole(out)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("writer", WRITERS)
def test_asked_to_stop_a_run_says_so_in_one_line_and_leaves_nothing_in_part(
    writer, signum, writers, tmp_path, cli, count, tries
):
    if (writer, signum) not in {("data/phantom.py", signal.SIGINT), ("data/prepare.py", signal.SIGTERM)}:
        with_long_alone(tries)
    command, first = writers[writer]
    if writer == "data/phantom.py":
        command = [*command, "--slices", 80]  # 24 are drawn before a signal comes
    out, rng, stopped = tmp_path / "out", random.Random(writer), 0
    for _ in range(20):
        shutil.rmtree(out, ignore_errors=True)  # in a new folder the first file says that it works
        process = cli.start(*command, script=None, start_new_session=True)
        wait_for(process, out / first, 1)
        time.sleep(rng.uniform(0, 0.05))
        send = os.killpg if signum == signal.SIGINT else os.kill  # a terminal's Ctrl-C reaches the workers too
        send(process.pid, signum)
        _, stderr = process.communicate(timeout=300)
        if process.returncode == 0:  # it was done before
            continue
        check_stopped(process.returncode, stderr, out)
        count(f"{signum.name}: {writer}")
        stopped += 1
        if stopped == tries(1, 5):
            break
    assert stopped == tries(1, 5)  # else it was too quick to be stopped
    done = cli(*command, script=None)
    assert done.status == 0, done.stderr


CALLER = """
import pathlib, sys
from data.slices import exit_on_mistake
from paper import runs
exit_on_mistake(lambda argv: runs.train([argv[0]], [], pathlib.Path(argv[1])))
"""
TRAINING = """
import pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
def stop(*_):
    time.sleep(1)
    (out / "ckpt.pt").write_text("written when told to stop")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
(out / "started").touch()
time.sleep(600)
"""


def test_tables_that_are_asked_to_stop_let_their_training_write_its_checkpoint(cli, tmp_path, count):
    (tmp_path / "train.py").write_text(TRAINING)
    out = tmp_path / "run"
    out.mkdir()
    path = {"PYTHONPATH": str(ROOT)}
    process = cli.start("-c", CALLER, tmp_path / "train.py", out, script=None, env=path)
    wait_for(process, out, 2)  # the commit, and started
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "stopped\n")
    assert (out / "ckpt.pt").read_text() == "written when told to stop"
    assert (out / "seconds.json").exists()
    count("SIGTERM: paper/runs.py")
