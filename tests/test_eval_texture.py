"""The judges of `eval.py` that see texture, against prdc, scipy and what theory says of spectra."""

import json

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from prdc import compute_prdc
from test_eval import fid_of, save_features

import eval as evaluation
from data.slices import write_image, write_map

HU_OF_LABEL = np.array([40.0, -850, -550, 20])
MIDDLES = (np.arange(16) + 0.5) / 32  # of the rings, cycles a pixel


def lungs(height=96, width=96, lesions=True):
    """A label map of two lungs, with a patch of ground glass in the one and of consolidation in the other."""
    y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width])[:, None, None]
    labels = np.zeros((height, width), np.uint8)
    for x0, lesion in ((0.27, 2), (0.73, 3)):
        labels[((x - x0) / 0.21) ** 2 + ((y - 0.5) / 0.42) ** 2 < 1] = 1
        if lesions:
            labels[((x - x0) / 0.09) ** 2 + ((y - 0.4) / 0.15) ** 2 < 1] = lesion
    return labels


def noise(rng, shape, slope=0.0, deviation=40.0):
    """Noise whose power falls with frequency to the minus slope, as that of lungs does with a slope of about 2."""
    y, x = np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])
    frequency = np.hypot(y, x)
    frequency[0, 0] = np.inf if slope else 1
    drawn = np.fft.ifft2(np.fft.fft2(rng.normal(size=shape)) / frequency ** (slope / 2)).real
    return drawn * deviation / drawn.std()


def blurred(image, sigma):
    """The image convolved with a Gaussian, exactly: its transfer function is exp(-2 (pi sigma f)^2)."""
    y, x = np.fft.fftfreq(image.shape[0])[:, None], np.fft.fftfreq(image.shape[1])
    return np.fft.ifft2(np.fft.fft2(image) * np.exp(-2 * (np.pi * sigma) ** 2 * (y**2 + x**2))).real


def stored(hu):
    return hu.round().clip(-1024, 3071).astype(np.int16)


def texture_of(reals, fakes, labels):
    """Table "texture" of slices HU and their maps, of one size or several; as read, fakes are real outside the lung."""
    meter = evaluation.Texture(evaluation.Window())
    for real, fake, drawn in zip(map(stored, reals), map(stored, fakes), labels, strict=True):
        meter.update(evaluation.Batch(real[None], np.where(drawn > 0, fake, real)[None], drawn[None]))
    return meter.result([f"P{k:02d}_S000" for k in range(len(labels))])["texture"]


def write_set(folder, images, labels):
    for part in ("images", "maps"):
        (folder / part).mkdir(parents=True)
    for k, (hu, drawn) in enumerate(zip(images, labels, strict=True)):
        write_image(folder / "images" / f"P{k // 4:02d}_S{k:03d}.png", hu)
        write_map(folder / "maps" / f"P{k // 4:02d}_S{k:03d}.png", drawn)
    return folder


def evaluate(folder, real, fake, labels, *options):
    """Run the command line on slices HU and their maps; returns the JSON."""
    real, fake = write_set(folder / "real", real, labels), write_set(folder / "fake", fake, labels)
    fixed = ["--json", str(folder / "results.json"), "--out", str(folder / "out"), "--provider", "cpu"]
    evaluation.main([str(real), str(fake), *fixed, *map(str, options)])
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("n, m, d", [(40, 40, 3), (30, 55, 8), (57, 20, 64), (7, 7, 2)])
@pytest.mark.parametrize("shift, spread", [(0, 1), (0.7, 0.6), (0.2, 1.5), (9, 1)])
def test_precision_and_recall_are_those_of_prdc(n, m, d, shift, spread, rng, capsys):
    real, fake = rng.normal(size=(n, d)), rng.normal(shift, spread, (m, d))
    expected = compute_prdc(real, fake, nearest_k=5)
    for figure, value in evaluation.manifold(real, fake).items():
        assert value == pytest.approx(expected[figure], rel=1e-12)


def test_features_far_from_the_origin_have_the_figures_of_those_about_it(rng, capsys):
    real, fake = (np.round(rng.normal(size=(60, 4)) * 1000) for _ in range(2))
    expected = compute_prdc(real, fake, nearest_k=5)
    far = (features.astype(np.float32) + np.float32(2**22) for features in (real, fake))  # to the last digit
    assert evaluation.manifold(*far) == {figure: expected[figure] for figure in ("precision", "recall")}


def test_the_table_of_features_has_all_figures_and_their_floors(tmp_path, rng):
    labels = [lungs()] * 14
    real, fake = ([HU_OF_LABEL[labels[0]] + noise(rng, (96, 96), 2) for _ in labels] for _ in range(2))
    model, means = save_features(tmp_path / "f.onnx", {"4": (48, 48)}), {}
    rows = evaluate(tmp_path, real, fake, labels, "--features", model)["features"]
    for side, images in (("real", real), ("fake", fake)):
        grey = [np.floor(((stored(hu) + 1350) / 1500).clip(0, 1) * 255 + 0.5) * (labels[0] > 0) for hu in images]
        means[side] = np.array([of.reshape(2, 48, 2, 48).mean((1, 3)).ravel() for of in grey])
    first, second = np.random.default_rng(0).permutation(14).reshape(2, 7)
    expected = compute_prdc(means["real"], means["fake"], nearest_k=5)
    floors = compute_prdc(means["real"][first], means["real"][second], nearest_k=5)
    for figure in ("precision", "recall"):
        row = rows[f"lung {figure} 4"]
        assert (row["value"], row["floor_value"]) == pytest.approx((expected[figure], floors[figure]), rel=1e-9)
    floor = fid_of(means["real"][first], means["real"][second])
    assert rows["lung FID 4"]["floor_value"] == pytest.approx(floor, rel=1e-3)


@pytest.mark.parametrize("size", [(128, 128), (75, 170), (300, 90)])
def test_white_noise_has_its_variance_in_every_ring_whatever_the_size(size, rng):
    labels = [lungs(*size)] * 24
    real, fake = ([HU_OF_LABEL[labels[0]] + noise(rng, size, 0, deviation) for _ in labels] for deviation in (40, 20))
    row = texture_of(real, fake, labels)["spectrum"]
    assert row["frequency"] == pytest.approx(MIDDLES)
    assert row["real"][1:] == pytest.approx([40**2] * 15, rel=0.12)  # the first lacks the labels' means
    assert row["fake"][1:] == pytest.approx([20**2] * 15, rel=0.12)
    assert row["value"] == pytest.approx(10 * np.log10(4), abs=0.15)


@pytest.mark.parametrize("across, down", [(0.11, 0), (0, 0.36), (0.2, 0.2), (-0.3, 0.1)])
def test_a_sine_stands_in_the_ring_of_its_frequency_with_half_its_squared_amplitude(across, down):
    labels = lungs(150, 130, lesions=False)
    y, x = np.mgrid[:150, :130]
    hu = -850 + 90 * np.sin(2 * np.pi * (across * x + down * y) + 1)
    power = np.array(texture_of([hu], [hu], [labels])["spectrum"]["real"])
    part = power * np.pi * np.diff((np.arange(17) / 32) ** 2)  # of each ring in the variance
    assert part.sum() == pytest.approx(90**2 / 2, rel=0.05)
    ring = int(np.hypot(across, down) * 32)
    assert part.argmax() == ring
    assert part[ring - 1 : ring + 2].sum() > 0.95 * part.sum()


@pytest.mark.parametrize("sigma", [0.3, 0.5])
def test_a_gaussian_blur_takes_what_its_transfer_function_says(sigma, rng):
    labels = [lungs(160, 160)] * 16
    real = [noise(rng, (160, 160), slope=2, deviation=90) for _ in labels]
    rows = texture_of(
        [HU_OF_LABEL[1] + texture for texture in real],
        [HU_OF_LABEL[1] + blurred(texture, sigma) for texture in real],
        labels,
    )
    kept = np.exp(-4 * (np.pi * sigma * MIDDLES) ** 2)
    found = np.array(rows["spectrum"]["fake"]) / rows["spectrum"]["real"]
    assert 10 * np.log10(found[2:]) == pytest.approx(10 * np.log10(kept[2:]), abs=0.8)
    power = MIDDLES**-2.0 * MIDDLES  # in a ring, of a spectrum with slope 2
    expected = (power * kept)[8:].sum() / power[8:].sum()
    assert rows["fine texture"]["value"] == pytest.approx(expected, rel=0.08)
    assert rows["fine texture"]["floor_value"] == pytest.approx(1, abs=0.1)


def test_neither_the_chest_wall_nor_a_lesions_edge_is_texture(rng):
    labels, texture = lungs(128, 128), noise(rng, (128, 128), deviation=20)
    soft = scipy.ndimage.gaussian_filter(HU_OF_LABEL[labels], 1)  # a pixel at an edge is partly what is beyond
    rows = texture_of([soft + texture], [HU_OF_LABEL[labels] + texture], [labels])
    assert rows["spectrum"]["value"] < 0.02


def test_a_flat_painting_of_the_labels_has_no_texture_and_a_finite_distance(rng):
    labels = [lungs(128, 128)] * 4
    real = [HU_OF_LABEL[labels[0]] + noise(rng, (128, 128)) for _ in labels]
    rows = texture_of(real, [HU_OF_LABEL[labels[0]]] * 4, labels)
    assert rows["fine texture"]["value"] < 1e-3
    assert rows["spectrum"]["value"] == pytest.approx(10 * np.log10(40**2 * 12), abs=0.7)  # to the rounding of HU
    assert rows["spectrum"]["fake"] == pytest.approx([1 / 12] * 16)


def test_what_the_window_does_not_show_is_no_texture(rng):
    labels = [lungs(128, 128)] * 3
    real = [noise(rng, (128, 128), deviation=500) for _ in labels]  # level -600, width 1500 by default
    rows = texture_of(real, [hu.clip(-1350, 150) for hu in real], labels)
    assert (rows["spectrum"]["value"], rows["HU of lung"]["value"]) == (0, 0)
    assert rows["spectrum"]["floor_value"] > 0


def test_slices_of_several_sizes_are_pooled_by_the_area_of_their_lungs(rng):
    sizes = [(96, 96), (192, 192)] * 12
    labels = [lungs(*size, lesions=False) for size in sizes]
    deviations = [20 if size == (96, 96) else 60 for size in sizes]
    real = [-850 + noise(rng, size, 0, deviation) for size, deviation in zip(sizes, deviations, strict=True)]
    power = np.mean(texture_of(real, real, labels)["spectrum"]["real"][2:])
    assert 0.8 * 60**2 < power < 0.95 * 60**2  # a fifth of the pixels at most is of the small ones'


def pixels_of(images, labels, label):
    """HU of a label's pixels in all slices, clipped to the window."""
    pixels = [stored(hu)[drawn == label] for hu, drawn in zip(images, labels, strict=True)]
    return np.concatenate(pixels).clip(-1350, 150)


def test_the_distance_of_densities_is_scipys_wasserstein_distance_and_its_floor_that_of_the_halves(rng):
    labels = [lungs(64 + 4 * k, 80) for k in range(7)]
    real = [rng.normal(HU_OF_LABEL[drawn], 80 + 10 * k) for k, drawn in enumerate(labels)]
    fake = [rng.gumbel(HU_OF_LABEL[drawn] - 60 * (drawn == 2), 120) for drawn in labels]
    rows = texture_of(real, fake, labels)
    first, second = np.random.default_rng(0).permutation(6).reshape(2, 3)
    for label, name in enumerate(("lung", "ground-glass opacity", "consolidation"), start=1):
        row = rows[f"HU of {name}"]
        distance = scipy.stats.wasserstein_distance(pixels_of(real, labels, label), pixels_of(fake, labels, label))
        of_halves = ([[array[k] for k in half] for array in (real, labels)] for half in (first, second))
        floor = scipy.stats.wasserstein_distance(*(pixels_of(*half, label) for half in of_halves))
        assert row["value"] == pytest.approx(distance, abs=1)  # a step of the window is 5.9 HU
        assert row["floor_value"] == pytest.approx(floor, abs=1)
        assert (row["N"], row["floor_N"]) == (7, 3)
        assert distance > 20


def test_a_label_that_is_in_no_map_has_no_distance(rng):
    labels = [np.minimum(lungs(), 2)] * 3  # no consolidation
    real = [HU_OF_LABEL[labels[0]] + noise(rng, (96, 96)) for _ in labels]
    rows = texture_of(real, real, labels)
    assert (rows["HU of consolidation"]["value"], rows["HU of consolidation"]["floor_value"]) == (None, None)
    assert rows["HU of ground-glass opacity"]["value"] == 0


# ------------------------------------------------------------------------------------------------ the whole program


def test_a_single_pair_with_lungs_too_thin_for_a_spectrum_is_no_crash(tmp_path, rng):
    labels = np.zeros((40, 40), np.uint8)
    labels[10:30, 18:22] = 1
    hu = HU_OF_LABEL[labels] + noise(rng, labels.shape)
    rows = evaluate(tmp_path, [hu], [hu + 30], [labels])["texture"]
    assert (rows["spectrum"]["value"], rows["fine texture"]["value"]) == (None, None)
    assert rows["HU of lung"]["value"] == pytest.approx(30, abs=3)
    assert rows["HU of lung"]["floor_value"] is None
