"""The switches of paper/study.py do what their names say, and a run of the study is one of the loop's."""

import pytest
import torch

import covidgan
import export
from paper.study import R1_EVERY, Study, StudyConfig


@pytest.fixture
def study(tiny):
    """Networks of the study with some switches on."""
    return lambda **on: covidgan.build(Study, StudyConfig(**{**vars(tiny()), **on}))


@pytest.fixture
def onehot():
    """Two random maps with lung in the middle."""
    labels = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    labels[:, :, 16:48, 10:54] = torch.randint(1, 4, (2, 1, 32, 44), generator=torch.Generator().manual_seed(0)).byte()
    return covidgan.one_hot(labels, 4)


def test_with_all_switches_off_it_is_the_papers_method(study, tiny, onehot):
    ours, papers = study(), covidgan.build(covidgan.Covidgan, tiny())
    mine = ours.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in papers.state_dict().items())
    target = torch.rand(2, 1, 64, 64) * 2 - 1
    theirs = papers.losses(onehot, target, "joint")
    assert all(value.item() == theirs[name].item() for name, value in ours.losses(onehot, target, "joint").items())


def test_r1_is_the_squared_gradient_at_real_slices_in_its_turn_alone(study, onehot):
    made, plain = study(r1=3.0), study()
    target = (torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1) * onehot[:, 1:].sum(1, True)
    extra = [
        (made.losses(onehot, target, "joint")["d"] - plain.losses(onehot, target, "joint")["d"]).item()
        for _ in range(R1_EVERY)
    ]
    assert extra[:-1] == [0] * (R1_EVERY - 1)
    # the directional derivative along the gradient, by finite differences, is its length
    x = made.seen_by_d(target, onehot).double().requires_grad_()
    made.double()
    verdict = lambda image: sum(f[-1].mean((1, 2, 3)) for f in made.d(onehot.double(), image))  # noqa: E731
    (gradient,) = torch.autograd.grad(verdict(x).sum(), x)
    length = gradient.flatten(1).norm(dim=1)
    step = 1e-5 * gradient / length.view(-1, 1, 1, 1)
    slopes = (verdict(x + step) - verdict(x - step)) / 2e-5
    assert slopes.tolist() == pytest.approx(length.tolist(), rel=1e-3)
    assert extra[-1] == pytest.approx(R1_EVERY * 3 / 2 * length.square().mean().item(), rel=1e-2)


@pytest.mark.long
def test_with_all_switches_on_it_trains_and_exports(toy, tmp_path):
    options = "--preset tiny --device cpu --dtype float32 --stage joint --n-blocks 1 --n-local-blocks 1"
    options += " --epoch-len 80 --interval 50 --spectral --r1 1 --noise-inputs 1 --position --flip"
    covidgan.main(["--data", str(toy.folder), *options.split(), "--out", str(tmp_path)], Study)
    export.main([str(tmp_path / "ckpt.pt"), "-o", str(tmp_path / "g.onnx")])
    assert (tmp_path / "g.onnx").exists()
