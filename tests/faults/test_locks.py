"""Two runs in one folder: the second is refused and changes nothing; the dead hold nothing."""

import signal

import pytest
from whole import files_of, lines_of, wait_for

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
