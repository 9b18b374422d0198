"""Two runs in one folder: the second is refused and changes nothing; the dead hold nothing."""

import signal

import pytest
from whole import files_of, lines_of, put_volumes, wait_for

from data import slices

pytestmark = pytest.mark.long


def test_a_second_training_is_refused_and_one_that_was_killed_goes_on(toy, small_run, cli, tmp_path):
    out = tmp_path / "out"
    command = ["--stage", "g1", "--data", toy.folder, "--out", out, *small_run, "--interval", 2]
    first = cli.start(*command)
    wait_for(first, lambda: lines_of(out / "stats.jsonl") > 2)
    first.send_signal(signal.SIGSTOP)  # it lives
    before = {name: path.read_bytes() for name, path in files_of(out).items()}
    done = cli(*command)
    assert done.status == 2 and str(out) in done.stderr
    assert {name: path.read_bytes() for name, path in files_of(out).items()} == before
    first.kill()
    first.communicate()
    done = cli("--resume", "--out", out)
    assert done.status == 0, done.stderr


@pytest.mark.parametrize("script", ["data/phantom.py", "data/prepare.py"])
def test_a_second_writer_of_a_set_is_refused_while_the_first_lives(script, cli, tmp_path):
    out, sources = tmp_path / "out", put_volumes(tmp_path / "src")
    small = ["--size", 64, "--patients", 3, "--slices", 1] if "phantom" in script else [sources, "--size", 64]
    with slices.held(out):
        done = cli(script, *small, "--out", out, script=None)
        assert done.status != 0 and str(out) in done.stderr
        assert files_of(out) == {}
    done = cli(script, *small, "--out", out, script=None)
    assert done.status == 0, done.stderr
