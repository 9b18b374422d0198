"""What the tests of faults share: small inputs, and whether a folder's files are whole and the same as another's."""

import gzip
import json
import time

import nibabel as nib
import numpy as np
import onnx
import torch
from conftest import ROOT, draw_chest, draw_map
from PIL import Image
from test_training import differing

from data.slices import write_map

MODEL = ROOT / "models" / "covid-ct-256.onnx"


def put_volumes(folder, patients=3):
    """A small download: CT, lung mask and lesion mask of each patient."""
    hu, lung = draw_chest()
    lesion = np.zeros_like(lung)
    lesion[:, 30:36, 16:22], lesion[:, 40:43, 16:22] = 1, 2
    hu[lesion == 1], hu[lesion == 2] = -550, 20
    for number in range(1, patients + 1):
        for part, voxels in (("rp_im", hu + number), ("rp_lung_msk", lung), ("rp_msk", lesion)):
            put_volume(folder / part / f"{number}.nii.gz", voxels)
    return folder


def put_volume(path, voxels):
    """Write [Z, H, W], which lie as they are displayed, as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels.transpose(2, 1, 0), np.diag([-1.0, -1, 5, 1])), path)


def put_maps(folder, count=6):
    """Label maps of 64 x 64."""
    folder.mkdir()
    for k in range(count):
        write_map(folder / f"P01_S{k:03d}.png", draw_map(shift=k))
    return folder


def wait_for(process, ready):
    """Wait until a run is as far as told; it must not have ended by then."""
    until = time.monotonic() + 300
    while not ready():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
        time.sleep(0.005)


def lines_of(path):
    """How many lines a file has by now."""
    return path.read_text().count("\n") if path.exists() else 0


def files_of(folder):
    """Files under a folder by their relative paths; what begins with a dot is none of them."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if path.name[0] != "."}


def leftovers(folder):
    """What was written in part, and not cleared away: temporary files, whose names begin with a dot."""
    kept = (".lock", ".unfinished")  # a lock, and what tells that a set is not whole yet
    return [path for path in folder.rglob(".*") if path.is_file() and not path.name.endswith(kept)]


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
    return len(files)


def check_same(folder, other):
    """Both folders hold the same files: of a checkpoint the same tensors, of all others the same bytes."""
    ours, theirs = files_of(folder), files_of(other)
    assert ours.keys() == theirs.keys()
    for name, path in ours.items():
        if path.suffix == ".pt":
            assert differing(*(torch.load(one, weights_only=True) for one in (path, theirs[name]))) == [], name
        else:
            assert path.read_bytes() == theirs[name].read_bytes(), name
