"""The U-Net in covidgan's loop: what it sees, what it learns, that a run goes on, and that its file is export's."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import batch_of

import covidgan
import export
from paper import segment

OPTIONS = "--preset tiny --device cpu --dtype float32 --interval 100"


def config(toy, out, **given):
    """A small U-Net's config on the toy data."""
    small = {**segment.PRESETS["tiny"], "dtype": "float32", "device": "cpu"}
    return segment.UNetConfig(**small | {"data": str(toy.folder), "out": str(out)} | given)


def test_the_published_unet_has_31036676_parameters_and_16_times_fewer_at_a_quarter_of_the_widths():
    with torch.device("meta"):
        full, quarter = (sum(p.numel() for p in segment.UNet(4, width).parameters()) for width in (64, 16))
    assert full == 31_036_676
    assert full / quarter == pytest.approx(16, rel=0.01)


def test_it_sees_the_whole_windowed_slice_and_the_map_as_it_is(toy, tmp_path):
    still = dict(resize=1.0, rotate=0.0, elastic=0.0, noise=0.0)
    trainer = segment.SegmentationTrainer(segment.Segmentation, config(toy, tmp_path, **still))
    images, labels = batch_of(trainer)
    order = covidgan.sample_order(len(trainer.train.names), trainer.c.epoch_len, [trainer.c.seed, 0, 0])
    names = [trainer.train.names[k] for k in order[: len(images)]]
    for image, drawn, name in zip(images, labels, names, strict=True):
        expected = (np.clip(toy.hu[name].round(), -1024, 150) + 600) / 750
        assert np.abs(image[0].numpy() - expected).max() < 0.01
        assert (drawn[0].numpy() == toy.labels[name]).all()
    outside = torch.cat([image[drawn == 0] for image, drawn in zip(images, labels, strict=True)])
    assert outside.max() > 0.5  # the body wall, which the generator's target does not have


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_its_loss_is_the_cross_entropy_of_the_labels_pixel_by_pixel_and_soft_dice_as_told(toy, tmp_path, weight):
    method = covidgan.build(segment.Segmentation, config(toy, tmp_path, dice=weight))
    image, labels = torch.randn(2, 1, 32, 32), torch.randint(0, 4, (2, 1, 32, 32))
    loss = method.losses(covidgan.one_hot(labels.byte(), 4), image, "whole")["loss"].item()
    found = method.unet(image).double().softmax(1).detach().numpy()
    truth = np.eye(4)[labels[:, 0].numpy()].transpose(0, 3, 1, 2)
    entropy = -np.log(found[truth == 1]).mean()
    dice = np.mean([(2 * (found * truth)[:, k].sum() + 1) / ((found + truth)[:, k].sum() + 1) for k in range(4)])
    assert loss == pytest.approx(entropy + weight * (1 - dice), rel=1e-5)


def test_soft_dice_is_0_for_the_map_itself_and_1_where_no_pixel_agrees():
    labels = torch.randint(0, 4, (2, 1, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    onehot = covidgan.one_hot(labels, 4)
    assert segment.dice_loss(100 * onehot, onehot).item() == pytest.approx(0, abs=1e-6)
    assert segment.dice_loss(100 * onehot.roll(1, 1), onehot).item() == pytest.approx(1, abs=1e-3)
    half = segment.dice_loss(torch.zeros(2, 4, 64, 64), onehot).item()
    shares = [(labels == k).double().mean().item() for k in range(4)]
    assert half == pytest.approx(1 - np.mean([2 * 0.25 * s / (0.25 + s) for s in shares]), abs=1e-3)


def test_slices_are_relit_each_by_its_own_gamma_gain_and_shift_and_order_of_grey_is_kept(toy, tmp_path):
    image, asked = torch.linspace(-0.9, 0.9, 64).view(1, 1, 8, 8).repeat(32, 1, 1, 1), config(toy, tmp_path)
    assert segment.relit(image, asked) is image
    seen = segment.relit(image, config(toy, tmp_path, gamma=0.1, intensity=0.03))
    assert (seen.flatten(1).diff(dim=1) >= 0).all() and len(seen.mean((1, 2, 3)).unique()) == 32
    moved = (seen - image).abs().amax((1, 2, 3))
    assert 0.02 < moved.median() < 0.2 and seen.abs().max() <= 1


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """A run on the toy data, whose labels tell themselves apart by their HU; its folder."""
    out = tmp_path_factory.mktemp("unet") / "out"
    segment.main([*OPTIONS.split(), "--epoch-len", "480", "--lr", "1e-2", "--data", str(toy.folder), "--out", str(out)])
    return out


def test_it_learns_to_find_lung_and_ground_glass_on_a_patient_that_it_has_not_seen(toy, trained):
    trainer = segment.SegmentationTrainer(segment.Segmentation, config(toy, trained))
    trainer.load(trained / "ckpt.pt")
    found, truth = trainer.segment(trainer.test.hu), trainer.test.labels
    right = [(found[truth == label] == label).float().mean().item() for label in (0, 1, 2)]
    assert min(right) > 0.9, right  # consolidation has the chest wall's HU, and takes longer


def test_its_file_exports_and_labels_as_the_trained_network_does(toy, trained, tmp_path):
    export.main([str(trained), "-o", str(tmp_path / "unet.onnx")])  # its folder, or unet.pt in it
    trainer = segment.SegmentationTrainer(segment.Segmentation, config(toy, trained))
    trainer.load(trained / "ckpt.pt")
    ours = trainer.segment(trainer.test.hu)[:, 0].numpy()
    session = ort.InferenceSession(tmp_path / "unet.onnx", providers=["CPUExecutionProvider"])
    (labels,) = session.run(["map"], {"ct": trainer.test.hu[:, 0].numpy()})
    assert (labels == ours).mean() > 0.999 and len(np.unique(labels)) > 2
    likeliest = segment.probabilities(trained / "unet.pt", trainer.test.hu[:, 0].numpy()).argmax(1)
    assert (likeliest == ours).mean() > 0.999
