"""What holds for every input, where that says more than examples: drawn by hypothesis."""

import numpy as np
import pytest
import torch
from conftest import draw_map
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from whole import MODEL

import covidgan
import infer_onnx
from data import slices

pytestmark = pytest.mark.long
SQUARES = st.integers(1, 24).map(lambda side: (side, side))
MAPS = arrays(np.uint8, SQUARES, elements=st.integers(0, 3))
IMAGES = arrays(np.int16, SQUARES, elements=st.integers(-1024, 3071))


def of_many(n=60):
    """A property's settings: n examples, the same in every run."""
    silent = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=silent)


def in_training(folder, hu, labels):
    """A slice and its map as covidgan.py loads them, through a window that holds all HU."""
    for part, write, pixels in (("images", slices.write_image, hu), ("maps", slices.write_map, labels)):
        (folder / part).mkdir(exist_ok=True)
        write(folder / part / "P01_S001.png", pixels)
    c = covidgan.Config(size=len(hu), level=1024, width=4096, unchecked=True)
    loaded = covidgan.load_slices(folder, ["P01_S001"], c)
    return loaded.hu[0, 0].numpy(), loaded.labels[0, 0].numpy()


@of_many()
@given(MAPS)
def test_every_map_is_read_as_it_was_written_by_both_readers(tmp_path, labels):
    slices.write_map(tmp_path / "a.png", labels)
    assert np.array_equal(slices.read_map(tmp_path / "a.png"), labels)
    labels[0, 0] = 1  # without any lung nothing is trained
    assert np.array_equal(in_training(tmp_path, np.full(labels.shape, -850), labels)[1], labels)


@of_many()
@given(IMAGES)
def test_every_slice_is_read_as_it_was_written_by_both_readers(tmp_path, hu):
    slices.write_image(tmp_path / "a.png", hu)
    assert np.array_equal(slices.read_image(tmp_path / "a.png"), hu)
    assert np.array_equal(in_training(tmp_path, hu, np.ones(hu.shape, np.uint8))[0], hu)


@of_many()
@given(MAPS, st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(0, 2**31))
def test_augmentation_in_training_invents_no_label(labels, known, seed):
    labels = np.array(known, np.uint8)[labels % len(known)]
    c = covidgan.Config(rotate=45, elastic=20, resize=2)
    image = torch.zeros(1, 1, *labels.shape)
    _, made = covidgan.augment(image, torch.from_numpy(labels)[None, None], c, torch.Generator().manual_seed(seed))
    assert made.shape == (1, 1, *labels.shape) and {*made.unique().tolist()} <= {0, *known}


def test_variants_of_a_map_invent_no_label(tmp_path):
    """Of maps that lack one label each: nothing between two labels is taken for a third."""
    (tmp_path / "maps").mkdir()
    for lacking in (1, 2, 3):
        labels = draw_map()
        slices.write_map(tmp_path / "maps" / f"P0{lacking}_S001.png", np.where(labels == lacking, 0, labels))
    options = ["--model", str(MODEL), "--provider", "cpu", "--variants", "8", "--out", str(tmp_path / "out")]
    infer_onnx.main([str(tmp_path / "maps"), *options])
    made = sorted((tmp_path / "out" / "maps").iterdir())
    assert len(made) == 3 * 8
    for path in made:
        assert {*np.unique(slices.read_map(path))} == {0, 1, 2, 3} - {int(path.name[2])}
