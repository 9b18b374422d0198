"""The phantom against what is known of chest CT, and its folder against what the format promises."""

import json
import shutil

import numpy as np
import pytest
from conftest import files

from data import check, phantom
from data.slices import Mistake

LUNG, GLASS, DENSE = 1, 2, 3
SMALL = ["--size", "64", "--patients", "4", "--slices", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom") / "set"
    phantom.main(["--out", str(out), *SMALL])
    return out


@pytest.fixture(scope="module")
def stacks():
    """Ten levels of six patients: (level, HU, labels), 128 x 128."""
    patients = [phantom.draw_patient(0, number) for number in range(1, 7)]
    levels = np.linspace(0.05, 0.95, 10)
    return [[(level, *phantom.draw_slice(patient, level, 128)) for level in levels] for patient in patients]


def pixels_of(stacks, label):
    return np.concatenate([hu[labels == label] for stack in stacks for _, hu, labels in stack])


# ---- the pictures


def test_lung_is_as_dense_as_aerated_lung(stacks):
    assert -900 < np.median(pixels_of(stacks, LUNG)) < -780


def test_labels_of_lesions_agree_with_density(stacks):
    assert -700 < np.median(pixels_of(stacks, GLASS)) < -430
    assert -100 < np.median(pixels_of(stacks, DENSE)) < 60
    assert (pixels_of(stacks, GLASS) > -800).mean() > 0.9  # all of it is denser than healthy lung


def test_spine_is_at_the_bottom(stacks):
    for stack in stacks:
        for _, hu, labels in stack[2:8]:
            rows, _ = np.nonzero(labels)
            middle = hu[:, 54:74] > 250  # bone about the midline: much spine, little sternum
            assert middle[int(rows.mean()) :].sum() > 3 * middle[: int(rows.mean())].sum()


def test_another_seed_or_number_is_another_patient():
    pictures = [phantom.draw_slice(phantom.draw_patient(*key), 0.5, 64)[1] for key in ((0, 1), (1, 1), (0, 2))]
    assert all(np.mean(a != b) > 0.01 for a, b in zip(pictures, pictures[1:] + pictures[:1], strict=True))


# ---- the folder


def test_no_slice_and_no_patient_is_on_two_sides(folder):
    split = json.loads((folder / "split.json").read_text())
    sides = [split[side] for side in ("train", "test", "seg_test")]
    patients = [{name.split("_")[0] for name in side} for side in sides]
    assert all(sides)
    assert sum(map(len, patients)) == len(set.union(*patients)) == 4
    written = sorted(path.stem for path in (folder / "images").iterdir())
    assert sorted(name for side in sides for name in side) == written
    assert written == sorted(path.stem for path in (folder / "maps").iterdir())


def test_a_set_is_left_alone_another_is_refused_and_overwrite_draws_it_again(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    same = ["--out", str(tmp_path), *SMALL]
    (tmp_path / "maps" / "P01_S001.png").write_bytes(b"by hand")
    phantom.main(same)
    assert (tmp_path / "maps" / "P01_S001.png").read_bytes() == b"by hand"
    with pytest.raises(Mistake, match=f"{tmp_path}.*--overwrite"):
        phantom.main([*same, "--seed", "1"])
    phantom.main([*same, "--overwrite"])
    assert files(tmp_path) == files(folder)


def test_check_finds_nothing_in_it(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert check.check_set(tmp_path) == 0


@pytest.mark.parametrize("arguments", [("--size", 63), ("--patients", 2), ("--slices", 0), ("--seed", -1)])
def test_bad_arguments_are_mistakes_that_write_nothing(tmp_path, arguments):
    out = tmp_path / "set"
    with pytest.raises(Mistake, match=arguments[0]):
        phantom.main(["--out", str(out), *map(str, arguments)])
    assert not out.exists()
