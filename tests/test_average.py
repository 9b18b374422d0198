"""The moving average of the generator's weights, and training slices that stay as sharp as real ones."""

import numpy as np
import pytest
import torch
from PIL import Image

import covidgan
import export
from covidgan import Covidgan
from data import slices

STILL = dict(resize=1.0, rotate=0.0, elastic=0.0, noise=0.0)


def test_the_average_follows_the_weights_by_a_decay_that_grows_to_the_one_asked_for(tiny):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, ema=0.5))
    trainer.begin("joint")
    name, p = next(iter(trainer.method.g.named_parameters()))
    mean, history = p.detach().double().clone(), []
    for step in range(14):
        trainer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * p.detach().double()
        history.append(decay)
    assert history[0] == 0.1 and history[-1] == 0.5
    assert torch.allclose(trainer.average[name].double(), mean, rtol=1e-5, atol=1e-7)
    assert not torch.equal(trainer.average[name], p)


def test_pictures_are_made_by_the_average_and_training_goes_on_with_the_weights(tiny):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2))
    trainer.begin("joint")
    trainer.step()
    labels = trainer.test.labels[1:3]
    before = {name: w.clone() for name, w in trainer.method.state_dict().items()}
    with torch.no_grad():
        live = covidgan.lung_target(trainer.method.g(covidgan.one_hot(labels, 4))[0], labels)
        trainer.method.g.load_state_dict(trainer.average)
        mean = covidgan.lung_target(trainer.method.g(covidgan.one_hot(labels, 4))[0], labels)
        trainer.method.load_state_dict(before)
    assert torch.equal(trainer.synthesize(labels), mean) and not torch.equal(live, mean)
    assert all(torch.equal(w, before[name]) for name, w in trainer.method.state_dict().items())


def test_without_an_average_pictures_are_made_by_the_weights(tiny):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, ema=0.0))
    trainer.begin("joint")
    trainer.step()
    labels = trainer.test.labels[1:3]
    with torch.no_grad():
        live = covidgan.lung_target(trainer.method.g(covidgan.one_hot(labels, 4))[0], labels)
    assert trainer.average == {} and torch.equal(trainer.synthesize(labels), live)


def test_export_takes_the_average(tiny, tmp_path):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, out=str(tmp_path)))
    trainer.begin("joint")
    trainer.step()
    trainer.save()
    exported = export.load_method(torch.load(tmp_path / "ckpt.pt", weights_only=True), Covidgan)
    assert all(torch.equal(w, trainer.average[name]) for name, w in exported.g.state_dict().items())
    assert not torch.equal(exported.g.g1.trunk[1].weight, trainer.method.g.g1.trunk[1].weight)


def test_the_papers_preset_has_neither_average_nor_clean_targets_and_the_others_have_both():
    presets = {name: covidgan.Config(**preset) for name, preset in covidgan.PRESETS.items()}
    assert (presets["paper"].ema, presets["paper"].noise) == (0.0, 0.01)
    assert all(c.ema > 0.9 and c.noise == 0 for name, c in presets.items() if name != "paper")


@pytest.mark.parametrize(
    ("individual", "lengths"),
    [(1.0, {"g1": 6, "g2": 6, "joint": 6}), (0.5, {"g1": 3, "g2": 3, "joint": 6}), (0.0, {"joint": 6})],
)
def test_individual_training_takes_its_share_or_none(tiny, individual, lengths):
    trainer = covidgan.Trainer(Covidgan, tiny(batch=2, epochs=2, epoch_len=6, individual=individual))
    found = {}
    for stage in trainer.stages:
        trainer.begin(stage)
        found[stage] = trainer.steps
    assert found == lengths


# ---- what counts as real


@pytest.fixture
def large(tmp_path):
    """A set of one patient's slices of 256 pixels with fine lines, larger than it is trained at."""
    rng = np.random.default_rng(0)
    for part in ("images", "maps"):
        (tmp_path / part).mkdir()
    names = [f"P01_S{k:03d}" for k in range(5)]
    for name in names:
        y, x = np.mgrid[:256, :256]
        labels = ((y - 128) ** 2 + (x - 128) ** 2 < 100**2).astype(np.uint8)
        hu = np.where(labels, -850 + 200 * rng.standard_normal((256, 256)), 40)
        slices.write_image(tmp_path / "images" / f"{name}.png", hu)
        slices.write_map(tmp_path / "maps" / f"{name}.png", labels)
    return tmp_path


def fine_power(image):
    """Power of an image [S, S] above a quarter of the sampling rate."""
    spectrum = np.abs(np.fft.fft2(image - image.mean())) ** 2
    f = np.abs(np.fft.fftfreq(len(image)))
    return spectrum[(f[:, None] > 0.25) | (f[None] > 0.25)].sum()


def test_an_augmented_slice_is_as_sharp_as_a_real_one(large, tiny):
    c = tiny(size=64, data=str(large), rotate=10.0, resize=1.0, elastic=0.0)
    train = covidgan.load_slices(large, [f"P01_S{k:03d}" for k in range(5)], c, room=2)
    test = covidgan.load_slices(large, [f"P01_S{k:03d}" for k in range(5)], c)
    assert train.hu.shape[-1] == 128 and test.hu.shape[-1] == 64
    inside = np.s_[20:44, 20:44]
    real = covidgan.window(test.hu, c)[:, 0].numpy()
    image, labels = covidgan.augment(train.hu, train.labels, c, torch.Generator().manual_seed(1), size=64)
    assert image.shape == labels.shape == (5, 1, 64, 64) and labels.dtype == torch.uint8
    sharp = [fine_power(x[inside]) for x in image[:, 0].numpy()]
    assert np.mean(sharp) > 0.8 * np.mean([fine_power(x[inside]) for x in real])
    small = covidgan.Slices(test.names, test.hu, test.labels)
    blurred, _ = covidgan.augment(small.hu, small.labels, c, torch.Generator().manual_seed(1))
    assert np.mean(sharp) > 1.2 * np.mean([fine_power(x[inside]) for x in blurred[:, 0].numpy()])


def test_a_trainer_reads_larger_slices_at_twice_its_size_and_measures_at_its_own(large, tiny):
    trainer = covidgan.Trainer(Covidgan, tiny(data=str(large), batch=2))
    assert (trainer.train.hu.shape[-1], trainer.test.hu.shape[-1]) == (128, 64)
    target, labels, _ = trainer.batch()
    assert target.shape == labels.shape == (2, 1, 64, 64)
    assert covidgan.evaluate(trainer)[1]["nearest training case"]["complete"]["psnr"] > 10


@pytest.mark.parametrize(("size", "read"), [(128, 256), (112, 224), (144, 144)])
def test_slices_of_twice_the_size_or_more_are_read_at_twice_the_size(large, tiny, size, read):
    """Those of `large` have 256 pixels."""
    names = ["P01_S000", "P01_S001"]
    assert covidgan.load_slices(large, names, tiny(size=size), room=2).hu.shape[-1] == read
    assert covidgan.load_slices(large, names, tiny(size=size)).hu.shape[-1] == size


def test_an_image_that_is_not_moved_is_the_one_that_reading_gives(large, tiny):
    c = tiny(size=64, data=str(large), **STILL)
    names = [f"P01_S{k:03d}" for k in range(5)]
    train, test = covidgan.load_slices(large, names, c, room=2), covidgan.load_slices(large, names, c)
    image, labels = covidgan.augment(train.hu, train.labels, c, torch.Generator(), size=64)
    real = covidgan.lung_target(covidgan.window(test.hu, c), test.labels)
    same = (labels > 0) & (test.labels > 0)
    assert (labels != test.labels).float().mean() < 0.01
    assert torch.corrcoef(torch.stack([image[same], real[same]]))[0, 1] > 0.97


def test_reading_keeps_what_bicubic_resampling_keeps(tmp_path, large, tiny):
    """Against Pillow's own anti-aliased bicubic filter."""
    c = tiny(size=64, data=str(large))
    side = covidgan.load_slices(large, ["P01_S000"], c)
    stored = np.asarray(Image.open(large / "images" / "P01_S000.png")).astype(np.float32) - 1024
    wanted = np.asarray(Image.fromarray(stored).resize((64, 64), Image.Resampling.BICUBIC))
    assert np.abs(side.hu[0, 0].numpy() - wanted).max() <= 1
