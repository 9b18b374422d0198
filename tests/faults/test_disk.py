"""A disk that fills up: nothing in part, what was there stays, and with room again the command ends well."""

import subprocess

import pytest
from test_training import differing, load
from whole import check_whole, leftovers, put_volumes

pytestmark = pytest.mark.long


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own for OUT: disk(kilobytes) mounts it, or gives the mounted one another size."""
    out = tmp_path / "out"

    def mount(kilobytes):
        given = f"size={kilobytes}k" if not out.is_mount() else f"remount,size={kilobytes}k"
        out.mkdir(exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", given, "tmpfs", out], capture_output=True).returncode:
            pytest.skip("no disk can be mounted here: it takes root on Linux")
        return out

    yield mount
    if out.is_mount():
        subprocess.run(["umount", out], check=True)


def test_a_set_that_the_disk_cannot_hold_is_left_whole_and_made_when_there_is_room(disk, cli, tmp_path):
    out = disk(100)
    command = ["data/prepare.py", put_volumes(tmp_path / "src"), "--size", 256, "--out", out]
    done = cli(*command, script=None)
    assert done.status != 0 and str(out) in done.stderr
    check_whole(out)
    assert leftovers(out) == []
    disk(8000)
    done = cli(*command, script=None)
    assert done.status == 0, done.stderr
    assert check_whole(out) > 36  # images, maps and more


def test_a_disk_that_fills_while_training_keeps_the_last_checkpoint(disk, toy, small_run, whole_run, cli):
    size = (whole_run[0] / "ckpt.pt").stat().st_size // 1024
    out = disk(size + size // 2)  # beside a checkpoint there is no room for the next one
    done = cli("--stage", "all", "--data", toy.folder, "--out", out, *small_run, "--interval", 5)
    assert done.status != 0 and str(out) in done.stderr
    check_whole(out)
    assert (out / "ckpt.pt").exists() and leftovers(out) == []
    disk(10 * size)
    done = cli("--resume", "--out", out)
    assert done.status == 0, done.stderr
    assert differing(load(out), load(whole_run[0])) == []
