"""Several processes of one training, by torchrun on one machine: as one, and stopped."""

import signal
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_training import stats_of
from whole import leftovers, wait_for

pytestmark = pytest.mark.long
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "covidgan.py"]


@pytest.fixture
def joint(toy, small_run):
    """Options of a short joint stage."""
    return ["--stage", "joint", "--data", toy.folder, *small_run, "--batch", 4, "--epochs", 1, "--epoch-len", 24]


def test_two_processes_train_as_one_on_the_joined_batch(joint, cli, tmp_path):
    for command in ([*TORCHRUN, *joint, "--out", tmp_path / "two"], ["covidgan.py", *joint, "--out", tmp_path / "one"]):
        done = cli(*command, script=None, timeout=600)
        assert done.status == 0, done.stderr
        assert done.stdout.count("24 slices of ") == 1  # read once for both, from one memory
        assert not [*Path(tempfile.gettempdir()).glob("covidgan_*.pt")]
    one, two = (stats_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for ours, theirs in zip(one, two, strict=True):
        assert [ours[name] for name in ("d", "g", "dfm")] == pytest.approx([theirs[n] for n in ("d", "g", "dfm")], 1e-3)
    assert leftovers(tmp_path / "two") == []


def test_told_to_stop_it_leaves_a_checkpoint_that_one_process_goes_on_with(joint, cli, tmp_path):
    out = tmp_path / "out"
    process = cli.start(*TORCHRUN, *joint, "--epoch-len", 4000, "--interval", 5, "--out", out, script=None)
    wait_for(process, (out / "ckpt.pt").exists)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0, stderr
    step = torch.load(out / "ckpt.pt", weights_only=True)["step"]
    assert step == stats_of(out)[-1]["step"] and 0 < step < 1000
    assert leftovers(out) == []
    done = cli("--resume", "--out", out, "--epoch-len", 4 * (step + 2), "--interval", 100)
    assert done.status == 0, done.stderr
    assert [line["step"] for line in stats_of(out)] == [*range(1, step + 3)]
