"""What the tests of faults look for in a folder: that every file is whole, and that two folders hold the same."""

import gzip
import json

import nibabel
import onnx
import pytest
import torch
from PIL import Image
from test_training import differing

# what hangs on time and place: of a run of the tables, and of the tables themselves
TIMED = ("kept", "seconds.json", "begun.json", "covidgan_1.json", "table2.json")


def with_long_alone(tries):
    """Skip a test whose time CI has not."""
    if not tries(0, 1):
        pytest.skip("with --long alone")


def files_of(folder):
    """Files under a folder by their relative paths; what begins with a dot is none of them."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if path.name[0] != "."}


def leftovers(folder):
    """What was written in part, and not cleared away."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob(".*.tmp")]


def check_whole(folder):
    """Open every file that stands under its final name; returns how many there are."""
    files = files_of(folder)
    for path in files.values():
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".onnx":
            onnx.checker.check_model(onnx.load(path))
        elif path.suffix == ".gz":
            gzip.decompress(path.read_bytes())  # checks length and sum
            nibabel.load(path).get_fdata()
    return len(files)


def check_same(folder, other):
    """Both folders hold the same files: of a checkpoint the same tensors, of all others the same bytes."""
    ours, theirs = (
        {name: path for name, path in files_of(one).items() if not {*TIMED} & {*name.split("/")}}
        for one in (folder, other)
    )
    assert ours.keys() == theirs.keys()
    for name, path in ours.items():
        if path.suffix == ".pt":
            both = [torch.load(one, weights_only=True) for one in (path, theirs[name])]
            assert differing(*both) == [], name
        else:
            assert path.read_bytes() == theirs[name].read_bytes(), name
