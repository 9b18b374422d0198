"""Metrics, floors and panels against scikit-image, numpy and closed forms."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from skimage.metrics import normalized_root_mse, peak_signal_noise_ratio, structural_similarity

import covidgan
from covidgan import Covidgan

STRIP = 16  # pixels of caption above a panel


def pictures(n=3, size=48, noise=0.1):
    """Smooth pictures [n, 1, size, size] in 0..1, and noisy versions."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    real = np.stack([0.5 + 0.4 * np.sin(7 * x * k + 5 * y) * np.cos(3 * y) for k in range(1, n + 1)])[:, None]
    return real, (real + rng.normal(0, noise, real.shape)).clip(0, 1)


def as_tensors(*arrays):
    """From 0..1 to tensors in [-1, 1]."""
    return [torch.from_numpy(2 * a - 1) for a in arrays]


def test_ssim_agrees_with_scikit_image():
    real, fake = pictures()
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)
    wanted = [structural_similarity(a[0], b[0], **settings) for a, b in zip(real, fake, strict=True)]
    got = covidgan.ssim(torch.from_numpy(real), torch.from_numpy(fake))
    assert got.tolist() == pytest.approx(wanted, abs=1e-7)
    assert max(wanted) < 0.95


def test_psnr_and_errors_agree_with_scikit_image():
    real, fake = pictures()
    got = covidgan.quality(*as_tensors(real, fake))
    pairs = [(a[0], b[0]) for a, b in zip(real, fake, strict=True)]
    assert got["psnr"] == pytest.approx(np.mean([peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]))
    assert got["nrmse"] == pytest.approx(np.mean([normalized_root_mse(a, b) for a, b in pairs]))
    assert got["rmse"] == pytest.approx(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in pairs]))


@pytest.fixture(scope="module")
def trainer(tiny):
    return covidgan.Trainer(Covidgan, tiny(batch=4))


@pytest.mark.parametrize("stage", ["g1", "joint"])
def test_figures_compare_each_synthetic_slice_with_its_own_real_one(trainer, toy, monkeypatch, stage):
    """Slice k is off by 0.01 (k + 1) of the window in its lung: all figures but SSIM follow by hand."""
    shrink = 2 if stage == "g1" else 1
    names = [name for name in toy.test if toy.labels[name].any()]
    grey = ((np.stack([toy.hu[name] for name in names]).round().clip(-1024) + 1350) / 1500).clip(0, 1)
    grey = grey.reshape(len(names), 64 // shrink, shrink, 64 // shrink, shrink).mean((2, 4))
    lung = np.stack([toy.labels[name] for name in names])[:, ::shrink, ::shrink] > 0
    off = 0.01 * (1 + np.arange(len(names)))[:, None, None]
    fake = torch.from_numpy(np.where(lung, 2 * (grey + off) - 1, -1)[:, None]).float()
    monkeypatch.setattr(trainer, "synthesize", lambda labels: fake)
    trainer.begin(stage)
    size, results = covidgan.evaluate(trainer)
    assert size == 64 // shrink
    rmse = np.sqrt((lung * off**2).mean((1, 2)))
    rms = {"complete": np.sqrt((grey**2).mean((1, 2))), "lung only": np.sqrt((lung * grey**2).mean((1, 2)))}
    for region, got in results["covidgan"].items():
        assert got["rmse"] == pytest.approx(rmse.mean(), rel=1e-3)
        assert got["psnr"] == pytest.approx((-20 * np.log10(rmse)).mean(), rel=1e-3)
        assert got["nrmse"] == pytest.approx((rmse / rms[region]).mean(), rel=1e-3)


def test_mean_paint_is_the_mean_of_each_label(trainer, toy):
    c, train, test = trainer.c, trainer.train, trainer.test
    painted = covidgan.mean_paint(train, test.labels, c).numpy()
    hu = np.stack([toy.hu[name] for name in toy.train]).round().clip(-1024)
    labels = np.stack([toy.labels[name] for name in toy.train])
    grey = ((hu + 600) / 750).clip(-1, 1)
    for label in range(4):
        wanted = -1.0 if label == 0 else grey[labels == label].mean()
        assert painted[test.labels.numpy() == label] == pytest.approx(wanted, abs=1e-5)


def test_nearest_copy_has_the_most_overlap(trainer):
    """Counted anew in numpy, case by case."""
    train, test = trainer.train, trainer.test
    theirs = train.labels[:, 0].numpy()
    best = []
    for ours in test.labels[:, 0].numpy():
        overlaps = [((ours == t) & ((ours > 0) | (t > 0))).sum() / ((ours > 0) | (t > 0)).sum() for t in theirs]
        best.append(int(np.argmax(overlaps)))
    wanted = covidgan.lung_target(covidgan.window(train.hu[best], trainer.c), train.labels[best])
    wanted = covidgan.lung_target(wanted, test.labels)
    assert torch.equal(covidgan.nearest_copy(train, test.labels, trainer.c), wanted)


@pytest.fixture(scope="module")
def panel(trainer, tmp_path_factory):
    """Panels with a full-size and a half-size lung: (columns [5, rows, S, S, 3] each), labels, real, lung."""
    folder = tmp_path_factory.mktemp("panel")
    labels, real = trainer.test.labels[:3], covidgan.window(trainer.test.hu[:3], trainer.c)
    torch.manual_seed(0)
    drawn = {}
    for side in (64, 32):
        lung = covidgan.lung_target(torch.rand(3, 1, side, side) * 2 - 1, labels[..., :: 64 // side, :: 64 // side])
        covidgan.write_panel(folder / f"{side}.png", labels, real, lung)
        picture = iio.imread(folder / f"{side}.png")
        enlarge = (picture.shape[0] - STRIP) // (3 * 64)
        assert picture.shape == (STRIP + 3 * 64 * enlarge, 5 * 64 * enlarge, 3)
        rows = picture[STRIP:].reshape(3, 64, enlarge, 5, 64, enlarge, 3)
        assert (rows == rows[:, :, :1, :, :, :1]).all()  # whole pixels
        drawn[side] = rows[:, :, 0, :, :, 0].transpose(2, 0, 1, 3, 4), lung
    return drawn, labels[:, 0].numpy(), real[:, 0].numpy()


def grey(image):
    return np.repeat(np.rint((image.astype(np.float64) + 1) * 127.5)[..., None], 3, -1)


@pytest.mark.parametrize("side", [64, 32])
def test_completed_slice_is_the_real_one_outside_the_lung_and_synthetic_inside(panel, side):
    drawn, labels, _ = panel
    _, _, synthetic, real, completed = drawn[side][0]
    assert (completed[labels == 0] == real[labels == 0]).all()
    assert (completed[labels > 0] == synthetic[labels > 0]).all()
    assert (completed[labels > 0] != real[labels > 0]).any(-1).mean() > 0.9
    colours = {0: (0, 0, 0), 1: (255, 0, 0), 2: (0, 0, 255), 3: (0, 255, 0)}
    assert all((drawn[side][0][0][labels == label] == colour).all() for label, colour in colours.items())
