"""Metrics, floors and panels against scikit-image, numpy and closed forms."""

import math

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


# ---- metrics


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


def test_nrmse_is_over_the_real_image():
    real, fake = torch.full((1, 1, 16, 16), 0.0), torch.full((1, 1, 16, 16), -1.0)
    assert covidgan.quality(real, fake)["nrmse"] == pytest.approx(1.0)


def test_figures_of_a_constant_offset_are_closed_forms():
    real = np.full((2, 1, 16, 16), 0.5)
    got = covidgan.quality(*as_tensors(real, real + 0.1))
    assert got["rmse"] == pytest.approx(0.1)
    assert got["psnr"] == pytest.approx(20.0)
    assert got["nrmse"] == pytest.approx(0.2)
    c1 = 0.01**2
    assert got["ssim"] == pytest.approx((2 * 0.5 * 0.6 + c1) / (0.5**2 + 0.6**2 + c1), rel=1e-6)


def test_identical_images_score_at_the_cap():
    real, _ = as_tensors(*pictures())
    got = covidgan.quality(real, real)
    assert got == {"psnr": 100.0, "ssim": pytest.approx(1.0), "rmse": 0.0, "nrmse": 0.0}


def test_black_images_give_finite_figures():
    black = torch.full((2, 1, 16, 16), -1.0)
    assert all(math.isfinite(value) for value in covidgan.quality(black, black).values())


def test_psnr_is_averaged_over_images_not_over_pixels():
    real = np.full((2, 1, 16, 16), 0.5)
    fake = real + np.array([0.1, 0.01]).reshape(2, 1, 1, 1)
    assert covidgan.quality(*as_tensors(real, fake))["psnr"] == pytest.approx((20 + 40) / 2)


@pytest.fixture(scope="module")
def trainer(tiny):
    return covidgan.Trainer(Covidgan, tiny(batch=4))


@pytest.mark.parametrize("stage", covidgan.STAGES)
def test_complete_and_lung_only_errors_are_equal_by_construction(trainer, stage):
    trainer.begin(stage)
    _, results = covidgan.evaluate(trainer)
    assert set(results) == {"covidgan", "mean HU per label", "nearest training case"}
    for name, result in results.items():
        assert result["complete"]["psnr"] == pytest.approx(result["lung only"]["psnr"], rel=1e-5), name
        assert result["complete"]["rmse"] == pytest.approx(result["lung only"]["rmse"], rel=1e-5), name
        assert result["complete"]["nrmse"] < result["lung only"]["nrmse"], name


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


def test_table_has_a_row_a_method_with_its_figures():
    figures = {"psnr": 26.89, "ssim": 0.8936, "rmse": 0.0813, "nrmse": 0.1813}
    lines = covidgan.table({"a": {"complete": figures, "lung only": {**figures, "psnr": 28.17}}}).splitlines()
    assert lines[-1].split() == ["a", "26.89", "0.8936", "0.0813", "0.1813", "28.17", "0.8936", "0.0813", "0.1813"]
    assert len({len(line) for line in lines}) == 1


def test_synthesized_images_do_not_depend_on_how_they_are_shared_into_batches(trainer, toy):
    trainer.begin("joint")
    together = trainer.synthesize(trainer.test.labels)
    alone = torch.cat([trainer.synthesize(one) for one in trainer.test.labels.split(1)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together[trainer.test.labels == 0] == -1).all()


# ---- floors


def test_mean_paint_is_the_mean_of_each_label(trainer, toy):
    c, train, test = trainer.c, trainer.train, trainer.test
    painted = covidgan.mean_paint(train, test.labels, c).numpy()
    hu = np.stack([toy.hu[name] for name in toy.train]).round().clip(-1024)
    labels = np.stack([toy.labels[name] for name in toy.train])
    grey = ((hu + 600) / 750).clip(-1, 1)
    for label in range(4):
        wanted = -1.0 if label == 0 else grey[labels == label].mean()
        assert painted[test.labels.numpy() == label] == pytest.approx(wanted, abs=1e-5)


def test_mean_paint_of_a_label_never_seen_is_the_floor(trainer):
    train = covidgan.Slices(trainer.train.names, trainer.train.hu, trainer.train.labels.clamp(max=2))
    painted = covidgan.mean_paint(train, torch.full((1, 1, 64, 64), 3), trainer.c)
    assert (painted == -1).all()


def test_nearest_copy_of_a_training_map_is_that_training_case(trainer):
    chosen = [17, 2, 9]
    copies = covidgan.nearest_copy(trainer.train, trainer.train.labels[chosen], trainer.c)
    real = covidgan.window(trainer.train.hu[chosen], trainer.c)
    assert torch.equal(copies, covidgan.lung_target(real, trainer.train.labels[chosen]))


def test_nearest_copy_is_cut_to_the_map_asked_for(trainer):
    copies = covidgan.nearest_copy(trainer.train, trainer.test.labels, trainer.c)
    assert copies.shape == trainer.test.labels.shape
    assert (copies[trainer.test.labels == 0] == -1).all()


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


# ---- panels


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


def test_panel_shows_maps_in_the_papers_colours(panel):
    drawn, labels, _ = panel
    colours = {0: (0, 0, 0), 1: (255, 0, 0), 2: (0, 0, 255), 3: (0, 255, 0)}
    for columns, _ in drawn.values():
        for label, colour in colours.items():
            assert (columns[0][labels == label] == colour).all()


def test_panel_shows_real_lung_synthetic_lung_and_real_slice(panel):
    drawn, labels, real = panel
    columns, lung = drawn[64]
    wanted = np.where(labels > 0, real, -1), lung[:, 0].numpy(), real
    for column, image in zip(columns[1:4], wanted, strict=True):
        assert np.abs(column - grey(image)).max() <= 1
    assert (columns[1][labels == 0] == 0).all()


@pytest.mark.parametrize("side", [64, 32])
def test_completed_slice_is_the_real_one_outside_the_lung_and_synthetic_inside(panel, side):
    drawn, labels, _ = panel
    _, _, synthetic, real, completed = drawn[side][0]
    assert (completed[labels == 0] == real[labels == 0]).all()
    assert (completed[labels > 0] == synthetic[labels > 0]).all()
    assert (completed[labels > 0] != real[labels > 0]).any(-1).mean() > 0.9


def test_panel_has_a_caption(panel, trainer, tmp_path):
    labels = trainer.test.labels[:1] * 0
    black = torch.full(labels.shape, -1.0)
    covidgan.write_panel(tmp_path / "panel.png", labels, black, black)
    strip = iio.imread(tmp_path / "panel.png")[:STRIP]
    for column in np.split(strip, 5, 1):
        assert column.max() > 128


def test_curves_are_a_picture(tmp_path, whole_run):
    covidgan.write_curves(tmp_path / "curves.png", whole_run[0] / "stats.jsonl", Covidgan.curves)
    picture = iio.imread(tmp_path / "curves.png")
    assert min(picture.shape[:2]) > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_curves_of_one_step_are_a_picture(tmp_path, whole_run):
    line = (whole_run[0] / "stats.jsonl").read_text().splitlines()[0]
    (tmp_path / "stats.jsonl").write_text(line + "\n")
    covidgan.write_curves(tmp_path / "curves.png", tmp_path / "stats.jsonl", Covidgan.curves)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# ---- which cases are shown


def side_of(names, lesions):
    """Slices with so many pixels of ground glass and of consolidation each."""
    labels = torch.ones(len(names), 1, 16, 16, dtype=torch.uint8)
    for k, (glass, dense) in enumerate(lesions):
        labels[k].view(-1)[:glass] = 2
        labels[k].view(-1)[glass : glass + dense] = 3
    return covidgan.Slices(names, torch.zeros(labels.shape), labels)


def test_cases_are_of_different_patients_first():
    names = ["P01_S001", "P01_S002", "P01_S003", "P02_S001", "P02_S002", "P03_S001"]
    side = side_of(names, [(50, 50), (60, 60), (40, 40), (5, 5), (9, 9), (0, 0)])
    chosen = [names[k] for k in covidgan.choose_cases(side)]
    assert chosen == ["P01_S002", "P02_S002", "P03_S001", "P01_S001"]


def test_a_case_with_both_lesions_comes_before_one_with_much_of_one():
    side = side_of(["P01_S001", "P02_S001"], [(200, 0), (3, 3)])
    assert covidgan.choose_cases(side) == [1, 0]


def test_no_more_cases_are_chosen_than_there_are():
    side = side_of(["P01_S001", "P01_S002"], [(0, 0), (1, 1)])
    assert covidgan.choose_cases(side) == [1, 0]
    assert len(covidgan.choose_cases(side_of([f"P{k:02d}_S001" for k in range(9)], [(k, k) for k in range(9)]))) == 4


def test_the_same_cases_are_chosen_every_time(trainer):
    assert covidgan.choose_cases(trainer.test) == covidgan.choose_cases(trainer.test)
    assert len(set(covidgan.choose_cases(trainer.test))) == 4
