"""Beta's policies in paper/study.py do what their names say, and a run of the study is one of the loop's."""

import numpy as np
import pytest
import torch

import covidgan
import export
from paper.study import Study, StudyConfig


@pytest.fixture
def study(tiny):
    """Networks of the study."""
    return lambda **on: covidgan.build(Study, StudyConfig(**{**vars(tiny()), **on}))


@pytest.fixture
def pair():
    """Two one-hot maps with lung in the middle, and targets."""
    rng, labels = torch.Generator().manual_seed(0), torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    labels[:, :, 16:48, 10:54] = torch.randint(1, 4, (2, 1, 32, 44), generator=rng).byte()
    return covidgan.one_hot(labels, 4), torch.rand(2, 1, 64, 64, generator=rng) * 2 - 1


def test_with_the_clamp_it_is_the_papers_method(study, tiny, pair):
    ours, papers = study(), covidgan.build(covidgan.Covidgan, tiny())
    mine = ours.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in papers.state_dict().items())
    theirs = papers.losses(*pair, "joint")
    assert all(value.item() == theirs[name].item() for name, value in ours.losses(*pair, "joint").items())


def test_max_moves_beta_against_min_and_entropy_pays_for_staying_undecided(study, pair):
    found = {policy: study(beta_policy=policy, dfm="learned").losses(*pair, "joint") for policy in ("min", "max")}
    undecided = study(beta_policy="entropy", dfm="learned", beta_entropy=0.2).losses(*pair, "joint")
    least = found["min"]["loss_beta"].item()
    assert found["max"]["loss_beta"].item() == -least != 0
    assert found["min"]["beta"].item() == pytest.approx(0.5)  # at the start
    assert undecided["loss_beta"].item() == pytest.approx(least - 0.2 * np.log(2), abs=1e-6)


@pytest.mark.long
def test_it_trains_and_exports(toy, tmp_path):
    options = "--preset tiny --device cpu --dtype float32 --stage joint --n-blocks 1 --n-local-blocks 1"
    options += " --epoch-len 80 --interval 50 --beta-policy entropy --dfm learned"
    covidgan.main(["--data", str(toy.folder), *options.split(), "--out", str(tmp_path)], Study)
    export.main([str(tmp_path / "ckpt.pt"), "-o", str(tmp_path / "g.onnx")])
    assert (tmp_path / "g.onnx").exists()
