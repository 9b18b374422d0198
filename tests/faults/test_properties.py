"""What holds for every input, where that says more than examples: drawn by hypothesis."""

import numpy as np
import pytest
import torch
from conftest import draw_map
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from whole import MODEL

import covidgan
import infer_onnx
from data import slices

pytestmark = pytest.mark.long
SQUARES = st.integers(1, 24).map(lambda side: (side, side))
MAPS = arrays(np.uint8, SQUARES, elements=st.integers(0, 3))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
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
