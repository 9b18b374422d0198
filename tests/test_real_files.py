"""Files as people really have them, through covidgan.py: the right slices, or one line that helps."""

import codecs
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import covidgan
from covidgan import Covidgan
from data import slices

pytestmark = pytest.mark.long
CASES = Path(__file__).resolve().parents[2] / "shared" / "cases" / "make_cases.py"


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """Real CT as people bring it, a folder a case."""
    if not CASES.exists():
        pytest.skip("no cases of real files here")
    out = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, CASES, out], check=True)
    return out / "slices"


def names_in(cases):
    return sorted(path.stem for path in (cases / "base" / "maps").iterdir())


@pytest.mark.parametrize("case", ["indexed_colours", "upper_case", "split_with_endings"])
def test_a_case_trains_on_the_same_slices_as_its_base(cases, tiny, case):
    names, c = names_in(cases), tiny(size=64)
    base, other = (covidgan.load_slices(cases / name, names, c) for name in ("base", case))
    assert torch.equal(base.labels, other.labels) and torch.equal(base.hu, other.hu)
    assert base.labels.max() == 3
    split = covidgan.read_split(cases / case, 0)
    assert {*split["train"], *split["test"]} <= {*names}


def test_jpeg_maps_are_told_by_name_of_their_folder(cases, tiny):
    with pytest.raises(covidgan.Mistake, match=r"jpeg_maps/maps: .*JPEG"):
        covidgan.load_slices(cases / "jpeg_maps", names_in(cases), tiny(size=64))


def test_slices_without_lung_train(cases, tiny):
    folder, names = cases / "no_lung_in_some", names_in(cases)
    slices.write_split(folder / "split.json", names[:6], names[6:], [], {})  # five of the six are empty
    trainer = covidgan.Trainer(Covidgan, tiny(data=str(folder), batch=2))
    assert all(np.isfinite([*trainer.step().values()]).all() for _ in range(3))


def test_a_byte_order_mark_dot_files_and_endings_are_no_mistake(own_toy):
    split = own_toy.folder / "split.json"
    sides = {"train": [f"{name}.png" for name in own_toy.train], "test": own_toy.test}
    split.write_bytes(codecs.BOM_UTF8 + json.dumps(sides).encode())
    for part in ("images", "maps"):
        (own_toy.folder / part / f"._{own_toy.train[0]}.png").write_bytes(b"\x00\x05\x16\x07")
        (own_toy.folder / part / ".DS_Store").write_bytes(b"\x00")
    assert covidgan.read_split(own_toy.folder, 0) == {"train": own_toy.train, "test": own_toy.test}
    split.unlink()
    drawn = covidgan.read_split(own_toy.folder, 0)
    assert sorted(drawn["train"] + drawn["test"]) == sorted(own_toy.train + own_toy.test)


@pytest.mark.parametrize(("mean", "fine"), [(-1001, False), (-999, True), (-401, True), (-399, False)])
def test_lung_lies_between_minus_1000_and_minus_400_hu(own_toy, tiny, mean, fine):
    for name in own_toy.train:
        hu = np.where(own_toy.labels[name] == 1, mean, own_toy.hu[name])
        hu[own_toy.labels[name] > 1] += mean + 850  # lesions stay denser than the lung
        slices.write_image(own_toy.folder / "images" / f"{name}.png", hu)
    c = tiny(data=str(own_toy.folder))
    if fine:
        covidgan.Trainer(Covidgan, c)
    else:
        with pytest.raises(covidgan.Mistake, match="HU"):
            covidgan.Trainer(Covidgan, c)
