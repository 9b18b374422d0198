"""Several processes of one training, by torchrun on one machine: as one, stopped, dying, mistaken."""

import os
import signal
import time

import pytest
import torch
from conftest import ROOT
from test_training import stats_of
from whole import check_whole, leftovers, with_long_alone

import covidgan

DYING = """
import os, signal, covidgan
step = covidgan.Trainer.step
def dying(self):
    if os.environ["RANK"] == os.environ["DYING"] and self.step_done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
covidgan.Trainer.step = dying
covidgan.exit_on_mistake(covidgan.main)
"""


def torchrun(processes, script=ROOT / "covidgan.py"):
    """Arguments of Python that start so many processes of a script."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script]


def our_lines(stderr):
    """What the processes themselves have said, without torchrun's words and the bars."""
    lines = stderr.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith(("error: ", "stopped at", "note: "))]


@pytest.fixture
def joint(toy, small_run):
    """Options of a short joint stage."""
    return ["--stage", "joint", "--data", toy.folder, *small_run, "--batch", 4, "--epochs", 1, "--epoch-len", 24]


def test_four_processes_train_as_one_on_the_joined_batch(joint, cli, here, tmp_path, count):
    done = cli(*torchrun(4), *joint, "--out", tmp_path / "four", script=None, timeout=600)
    assert done.status == 0, done.stderr
    assert here(*joint, "--out", tmp_path / "one").status == 0
    one, four = (stats_of(tmp_path / name) for name in ("one", "four"))
    assert len(one) == len(four) == 6
    for ours, theirs in zip(one, four, strict=True):
        assert [ours[name] for name in ("d", "g", "dfm")] == pytest.approx([theirs[n] for n in ("d", "g", "dfm")], 1e-3)
    assert leftovers(tmp_path / "four") == []
    count("torchrun, four processes against one")


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_that_dies_ends_all_soon_with_one_line_and_the_checkpoint_goes_on(
    dying, joint, cli, here, tmp_path, count, tries
):
    if dying:
        with_long_alone(tries)
    (tmp_path / "worker.py").write_text(DYING)
    env = {"PYTHONPATH": os.fspath(ROOT), "DYING": str(dying)}
    command = [*torchrun(2, tmp_path / "worker.py"), *joint, "--interval", 1, "--out", tmp_path / "out"]
    done = cli(*command, script=None, env=env, timeout=600)
    assert done.status != 0
    lines = [line for line in done.stderr.splitlines() if "error: " in line]  # after a bar that the dead has left
    assert len(lines) == 1, done.stderr
    assert "another process of this training has ended" in lines[0] and "--resume" in lines[0]
    assert 'covidgan.py", line' not in done.stderr  # no traceback of ours
    check_whole(tmp_path / "out")
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == 2
    done = here("--resume", "--out", tmp_path / "out")
    assert done.status == 0, done.stderr
    count("torchrun, a process killed")


def test_a_mistake_of_all_processes_is_one_line(joint, cli, tmp_path, count):
    done = cli(*torchrun(4), *joint, "--batch", 3, "--out", tmp_path / "out", script=None, timeout=600)
    assert done.status != 0
    assert our_lines(done.stderr) == ["error: --batch 3: give a multiple of the 4 processes"]
    count("torchrun, a mistake of all processes")


def test_a_second_torchrun_on_one_folder_is_refused_in_one_line(joint, cli, tmp_path, count, tries):
    with_long_alone(tries)
    with covidgan.held(tmp_path / "out"):
        done = cli(*torchrun(2), *joint, "--out", tmp_path / "out", script=None, timeout=600)
    assert done.status != 0
    lines = our_lines(done.stderr)
    assert len(lines) == 1 and f"error: {tmp_path}/out: another run is writing to it" in lines[0]
    assert 'covidgan.py", line' not in done.stderr
    count("torchrun, a second on one folder")


def test_told_to_stop_it_leaves_a_checkpoint_that_another_number_of_processes_goes_on_with(
    joint, cli, here, tmp_path, count
):
    out = tmp_path / "out"
    long = [*joint, "--epoch-len", 4000, "--interval", 5, "--out", out]
    process = cli.start(*torchrun(2), *long, script=None)
    until = time.monotonic() + 300
    while not (out / "ckpt.pt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = our_lines(stderr)
    assert len(lines) == 1 and "--resume goes on from there" in lines[0]
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    step = checkpoint["step"]
    assert 0 < step < 1000 and f"step {step}:" in lines[0]
    assert leftovers(out) == []
    done = here("--resume", "--out", out, "--epoch-len", 4 * (step + 2), "--interval", 100)
    assert done.status == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert told == [
        f"note: {out}/ckpt.pt: stage joint, at step {step}, had 1000 steps and would have {step + 2}: "
        "the learning rate goes on with these",
        f"note: {out}/ckpt.pt: trained by 2 processes, going on with 1: "
        "each draws dropout and noise of its own, and sums are rounded otherwise",
    ]
    assert [line["step"] for line in stats_of(out)] == [*range(1, step + 3)]
    count("torchrun, SIGTERM and going on with one process")


def test_more_processes_go_on_as_one_would_have_gone(joint, cli, here, tmp_path, count):
    assert here(*joint, "--out", tmp_path / "one").status == 0
    config = covidgan.parse_config([str(word) for word in [*joint, "--out", tmp_path / "more"]])
    trainer = covidgan.Trainer(covidgan.Covidgan, config)
    (tmp_path / "more").mkdir()
    trainer.write_split()
    for _ in range(3):
        trainer.step()
    trainer.save()
    done = cli(*torchrun(2), "--resume", "--out", tmp_path / "more", script=None, timeout=600)
    assert done.status == 0, done.stderr
    assert "trained by 1 processes, going on with 2" in done.stdout
    one, more = stats_of(tmp_path / "one"), stats_of(tmp_path / "more")
    assert [line["step"] for line in more] == [4, 5, 6]
    for ours, theirs in zip(one[3:], more, strict=True):
        assert [ours[name] for name in ("d", "g", "dfm")] == pytest.approx([theirs[n] for n in ("d", "g", "dfm")], 1e-3)
    count("torchrun, more processes going on")


def test_processes_that_stand_at_different_steps_are_told_apart(tiny, monkeypatch):
    """As on machines that do not share OUT: one has found a checkpoint, the other none."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    trainer = covidgan.Trainer(covidgan.Covidgan, tiny(batch=2))
    sums = {"stands": 1}

    def largest(tensor, _):
        n = len(tensor) // 2
        tensor[1] += sums["stands"]  # another's step
        tensor[n + 1] = max(tensor[n + 1], -trainer.step_done)

    monkeypatch.setattr(covidgan.dist, "all_reduce", largest)
    with pytest.raises(covidgan.Mistake, match="not the same on all machines"):
        trainer.check_alike()
    sums["stands"] = 0
    trainer.check_alike()
