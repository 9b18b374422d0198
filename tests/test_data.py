"""Reading, checking, splitting, windowing and augmenting slices."""

import os
import unicodedata

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import batch_of
from PIL import Image
from scipy import ndimage

import covidgan
from covidgan import Mistake
from data import check, slices

STILL = dict(resize=1.0, rotate=0.0, elastic=0.0, noise=0.0)


@pytest.fixture
def labels():
    """A small map with every label."""
    return np.random.default_rng(0).integers(0, 4, (12, 12)).astype(np.uint8)


def painted(labels):
    return np.array(slices.COLOURS, np.uint8)[labels]


# ---- images and maps


def test_the_format_is_stated_as_in_the_other_scripts():
    ours = covidgan.LABELS, covidgan.COLOURS, covidgan.HU_OFFSET, covidgan.LUNG_HU
    assert ours == (slices.LABELS, slices.COLOURS, slices.HU_OFFSET, check.LUNG_HU)


def test_image_holds_hu_plus_1024_over_its_whole_range(tmp_path):
    iio.imwrite(tmp_path / "a.png", np.array([[0, 24, 1024, 4095]], np.uint16))
    assert covidgan.read_image(tmp_path / "a.png").tolist() == [[-1024, -1000, 0, 3071]]


def palette(labels, colours):
    """An indexed picture of labels with these colours in its palette."""
    picture = Image.fromarray(labels, "P")
    picture.putpalette([*sum(colours, ())])
    return picture


BLACK, RED, BLUE, GREEN = slices.COLOURS
ERASED = ((255, 0, 0, 0), (255, 0, 0, 255), (0, 0, 255, 255), (0, 255, 0, 255))  # red below a transparent background
MAPS = {
    "grey": Image.fromarray,
    "palette of the paper": lambda labels: palette(labels, slices.COLOURS),
    "palette in another order": lambda labels: palette((3 - labels).astype(np.uint8), (GREEN, BLUE, RED, BLACK)),
    "palette with red twice": lambda labels: palette(np.where(labels == 1, 4, labels), (*slices.COLOURS, RED)),
    "palette of other colours": lambda labels: palette(labels, ((9, 9, 9), (8, 8, 8), (7, 7, 7), (6, 6, 6))),
    "RGB": lambda labels: Image.fromarray(painted(labels)),
    "RGBA, erased": lambda labels: Image.fromarray(np.array(ERASED, np.uint8)[labels]),
}


@pytest.mark.parametrize("kind", MAPS)
def test_a_map_is_read_as_its_labels_whatever_it_was_painted_with(tmp_path, labels, kind):
    MAPS[kind](labels).save(tmp_path / "map.png")
    read = covidgan.read_map(tmp_path / "map.png", 4)
    assert read.dtype == np.uint8 and np.array_equal(read, labels)
    assert np.array_equal(slices.read_map(tmp_path / "map.png"), labels)


@pytest.mark.parametrize(
    ("value", "n_labels"), [(4, 4), (255, 4), (3, 3), ((254, 0, 0), 4), ((255, 255, 255), 4), ((0, 255, 0), 3)]
)
def test_a_value_or_colour_of_no_label_is_named_with_its_pixel(tmp_path, labels, value, n_labels):
    picture = np.minimum(labels, 2) if np.isscalar(value) else painted(np.minimum(labels, 2))
    picture[5, 7] = value
    iio.imwrite(tmp_path / "map.png", picture)
    with pytest.raises(Mistake) as mistake:
        covidgan.read_map(tmp_path / "map.png", n_labels)
    told = str(mistake.value)
    assert str(tmp_path / "map.png") in told and "row 5, column 7" in told and "\n" not in told
    assert "(0, 255, 0)" in told or n_labels == 3  # the model's own colours are offered


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 4, (64, 64)).astype(np.uint8))
NO_PNG = [lambda path: (NOISE.save(path), os.truncate(path, 100)), lambda path: path.write_text("no picture")]
NO_IMAGES = [NOISE.save, NOISE.convert("RGB").save, *NO_PNG]  # 8 bits, colours
NO_MAPS = [NOISE.convert("I;16").save, NOISE.convert("LA").save, *NO_PNG]  # 16 bits, grey with alpha


def test_a_file_that_is_no_image_or_no_map_is_named(tmp_path):
    path = tmp_path / "P01_S001.png"
    for read, writers in ((covidgan.read_image, NO_IMAGES), (lambda path: covidgan.read_map(path, 4), NO_MAPS)):
        for write in writers:
            write(path)
            with pytest.raises(Mistake, match=f"{path}: "):
                read(path)


# ---- a side of the data


@pytest.mark.parametrize("size", [32, 64, 128])
def test_slices_are_resampled_as_by_pillow_and_the_mean_hu_of_each_label_told(tiny, toy, size, capsys):
    """Images, cut to the window, bicubic, and maps nearest; HU are those of the files, whatever the window."""
    names = [toy.train[5], *toy.train[:3], toy.test[2]]  # in the order asked for
    side = covidgan.load_slices(toy.folder, names, tiny(size=size, level=-500.0, width=1000.0))
    assert (side.names, side.hu.dtype, side.labels.dtype) == (names, torch.int16, torch.uint8)
    for k, name in enumerate(names):
        seen = Image.fromarray(toy.hu[name].round().clip(-1000, 0).astype(np.float32))
        wanted = np.asarray(seen.resize((size, size), Image.Resampling.BICUBIC)).clip(-1024)
        assert np.abs(side.hu[k, 0].numpy() - wanted).max() <= (1 if size <= 64 else 100)  # enlarging, kernels differ
        nearest = Image.fromarray(toy.labels[name]).resize((size, size), Image.Resampling.NEAREST)
        assert np.array_equal(side.labels[k, 0].numpy(), np.asarray(nearest))
    hu, labels = (np.stack([part[name] for name in names]) for part in (toy.hu, toy.labels))
    told = [f"{what} {hu.round()[labels == k].mean():.0f}" for k, what in enumerate(slices.LABELS)][1:]
    assert ", ".join(told) in capsys.readouterr().out


@pytest.fixture
def large(own_toy):
    """Five slices of 256 pixels, with texture finer than what is trained at."""
    rng, names = np.random.default_rng(0), own_toy.train[:5]
    lung = np.hypot(*(np.mgrid[:256, :256] - 128)) < 100
    for name in names:
        hu = np.where(lung, -850 + 200 * rng.standard_normal(lung.shape), 40)
        slices.write_image(own_toy.folder / "images" / f"{name}.png", hu)
        slices.write_map(own_toy.folder / "maps" / f"{name}.png", lung.astype(np.uint8))
    return own_toy.folder, names


def test_slices_of_twice_the_size_are_augmented_there_and_stay_as_sharp_as_real_ones(large, tiny):
    c = tiny(**STILL | {"rotate": 10.0})
    assert covidgan.load_slices(*large, tiny(size=144), room=2).hu.shape[-1] == 144
    double, single = (covidgan.load_slices(*large, c, room) for room in (2, 1))
    assert (double.hu.shape[-1], single.hu.shape[-1]) == (128, 64)

    def sharpness(image):  # power above a quarter of the sampling rate, well inside the lung
        fine = np.abs(np.fft.fftfreq(24)) > 0.25
        return (np.abs(np.fft.fft2(image[:, 0, 20:44, 20:44])) ** 2)[:, fine[:, None] | fine].mean()

    augmented, labels = covidgan.augment(double.hu, double.labels, c, rng(1), size=64)
    assert augmented.shape == labels.shape == single.hu.shape
    assert sharpness(augmented) > 0.8 * sharpness(covidgan.window(single.hu, c))
    assert sharpness(augmented) > 1.2 * sharpness(covidgan.augment(single.hu, single.labels, c, rng(1))[0])


def test_slices_of_another_size_or_not_square_are_named(tiny, own_toy):
    name = own_toy.train[4]
    slices.write_map(own_toy.folder / "maps" / f"{name}.png", own_toy.labels[name][:, :60])
    with pytest.raises(Mistake, match=f"maps/{name}.png: "):
        covidgan.load_slices(own_toy.folder, own_toy.train, tiny())
    slices.write_image(own_toy.folder / "images" / f"{name}.png", own_toy.hu[name][:, :60])
    for names in (own_toy.train, [name]):
        with pytest.raises(Mistake, match=f"images/{name}.png: .* square"):
            covidgan.load_slices(own_toy.folder, names, tiny())


def renamed(*order):
    return lambda hu, labels: (hu, np.array(order, np.uint8)[labels])


FAULTS = {
    "grey levels": lambda hu, labels: (slices.windowed(hu) - 1024.0, labels),
    "no offset": lambda hu, labels: (hu - 1024, labels),
    "offset twice": lambda hu, labels: (hu + 1024, labels),
    "lesions exchanged": renamed(0, 1, 3, 2),
    "lung and consolidation exchanged": renamed(0, 3, 2, 1),
    "map of another slice": lambda hu, labels: (hu, np.roll(labels, 20, axis=1)),
    "no label": renamed(0, 0, 0, 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_labels_without_the_hu_of_lung_and_lesions_are_refused_unless_overruled(tiny, own_toy, fault):
    for name in own_toy.train:
        hu, labels = FAULTS[fault](own_toy.hu[name], own_toy.labels[name])
        slices.write_image(own_toy.folder / "images" / f"{name}.png", hu)
        slices.write_map(own_toy.folder / "maps" / f"{name}.png", labels)
    with pytest.raises(Mistake, match="--unchecked"):
        covidgan.load_slices(own_toy.folder, own_toy.train, tiny())
    covidgan.load_slices(own_toy.folder, own_toy.train, tiny(unchecked=True))


# ---- the split


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_split_json_is_followed_with_endings_and_byte_order_mark_or_without(own_toy, encoding):
    text = '{"train": ["P01_S001.png", "P02_S001.png"], "test": ["P03_S001"], "seg_test": []}'
    (own_toy.folder / "split.json").write_text(text, encoding=encoding)
    wanted = {"train": ["P01_S001", "P02_S001"], "test": ["P03_S001"]}
    assert covidgan.read_split(own_toy.folder, 0) == wanted


def test_without_split_json_whole_patients_are_held_out(own_toy):
    (own_toy.folder / "split.json").unlink()
    held = set()
    for seed in range(12):
        split = covidgan.read_split(own_toy.folder, seed)
        train, test = ({name.rpartition("_")[0] for name in split[side]} for side in ("train", "test"))
        assert not train & test and len(test) == 1  # about a fifth of five
        assert sorted(split["train"] + split["test"]) == sorted(own_toy.train + own_toy.test)
        assert covidgan.read_split(own_toy.folder, seed) == split
        held |= test
    assert len(held) > 1  # the seed decides


def test_of_a_single_patient_the_last_fifth_is_held_out(own_toy):
    (own_toy.folder / "split.json").unlink()
    for path in own_toy.folder.glob("*/*.png"):
        if path.stem not in own_toy.train[:6]:
            path.unlink()
    assert covidgan.read_split(own_toy.folder, 0) == {"train": own_toy.train[:5], "test": own_toy.train[5:6]}


def test_a_name_on_both_sides_is_refused(own_toy):
    slices.write_split(own_toy.folder / "split.json", own_toy.train, [*own_toy.test, "P01_S001"], [], {})
    with pytest.raises(Mistake, match="P01_S001 is under train and test"):
        covidgan.read_split(own_toy.folder, 0)


@pytest.mark.parametrize("part", ["images", "maps"])
def test_a_slice_without_image_or_without_map_is_named(own_toy, part, capsys):
    name = own_toy.train[4]
    path = own_toy.folder / part / f"{name}.png"
    path.unlink()
    with pytest.raises(Mistake, match=f"{path}: missing"):
        covidgan.read_split(own_toy.folder, 0)
    (own_toy.folder / "split.json").unlink()
    split = covidgan.read_split(own_toy.folder, 0)
    assert (
        name not in [*split["train"], *split["test"]]
        and f"1 slices without map, image or side, {name}" in capsys.readouterr().out
    )


def test_names_of_another_unicode_form_belong_together(own_toy):
    for folder, form in {"images": "NFD", "maps": "NFC"}.items():
        path = own_toy.folder / folder / f"{own_toy.train[0]}.png"
        path.rename(path.with_name(unicodedata.normalize(form, "Zoë_S001.png")))
    names = [unicodedata.normalize("NFD", "Zoë_S001"), *own_toy.train[1:]]
    slices.write_split(own_toy.folder / "split.json", names, own_toy.test, [], {})
    assert covidgan.read_split(own_toy.folder, 0)["train"][0] == unicodedata.normalize("NFC", "Zoë_S001")


def test_a_set_whose_making_was_cut_off_is_refused(own_toy):
    (own_toy.folder / ".unfinished").touch()
    (own_toy.folder / "split.json").unlink()
    with pytest.raises(Mistake, match="cut off"):
        covidgan.read_split(own_toy.folder, 0)


# ---- window and target


def test_window_maps_its_ends_and_middle_to_minus_1_0_and_1_and_clamps_beyond(tiny):
    hu = torch.tensor([-4024, -1351, -1350, -600, -225, 150, 151, 3071]).short()
    assert covidgan.window(hu, tiny()).tolist() == pytest.approx([-1, -1, -1, 0, 0.5, 1, 1, 1])
    assert covidgan.window(torch.tensor([40, 240, -60]), tiny(level=40, width=400)).tolist() == [0, 1, -0.5]


def test_a_steps_target_is_the_lung_of_its_own_map_and_the_floor_elsewhere(tiny):
    image, labels = torch.tensor([0.5, 0.5, 0.7, -0.2]), torch.arange(4)
    assert torch.equal(covidgan.lung_target(image, labels), torch.tensor([-1.0, 0.5, 0.7, -0.2]))
    target, labels = batch_of(covidgan.Trainer(covidgan.Covidgan, tiny()))
    assert (target[labels == 0] == -1).all() and (target[labels > 0] > -1).float().mean() > 0.9


# ---- augmentation (Table I)

PAINT = torch.tensor([-1300, -900, -500, 0])  # HU of each label


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def cases(toy, n=8):
    """HU painted from the map, and the map."""
    labels = torch.from_numpy(np.stack([toy.labels[name] for name in toy.train[:n]]))[:, None]
    return PAINT[labels.long()].short(), labels


def test_augmentation_takes_each_pixel_from_where_scipy_takes_it(tiny, toy):
    """From the same draws: where a pixel comes from in numpy, what lies there by ndimage.map_coordinates."""
    c, n, (_, labels) = tiny(**STILL | dict(resize=1.3, rotate=25.0, elastic=12.0)), 6, cases(toy, 6)
    y, x = np.mgrid[:64, :64]
    smooth = (-600 + 300 * np.sin(x / 9) * np.cos(y / 7)).round()
    image, moved = covidgan.augment(torch.from_numpy(smooth).expand(n, 1, 64, 64), labels, c, rng(5))
    draws = rng(5)
    zoom, angle, left, down = (torch.rand(n, generator=draws).double().numpy() for _ in range(4))
    zoom, angle = 1 + 0.3 * zoom, np.radians(50 * angle - 25)
    coarse = torch.randn(n, 2, 22, 22, generator=draws) * 12 * 2 / 512  # a point for every 24 of 512 pixels
    bend = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").double().numpy()
    u, v = (2 * x + 1) / 64 - 1, (2 * y + 1) / 64 - 1  # of pixels' centres, -1..1 over the slice
    for k in range(n):
        room = 1 - 1 / zoom[k]
        from_x = (np.cos(angle[k]) * u - np.sin(angle[k]) * v) / zoom[k] + (2 * left[k] - 1) * room + bend[k, 0]
        from_y = (np.sin(angle[k]) * u + np.cos(angle[k]) * v) / zoom[k] + (2 * down[k] - 1) * room + bend[k, 1]
        places = np.stack([(from_y + 1) * 32 - 0.5, (from_x + 1) * 32 - 0.5])
        wanted = ndimage.map_coordinates(labels[k, 0].numpy(), places, order=0, mode="constant")
        assert (moved[k, 0].numpy() == wanted).mean() > 0.999  # but for ties
        inside = ((places > 2) & (places < 61)).all(0)
        wanted = (ndimage.map_coordinates(smooth, places, order=3) + 600) / 750
        assert np.abs(image[k, 0].numpy() - wanted)[inside].max() < 0.005 and inside.mean() > 0.5


def test_without_ranges_all_stays_as_it_is_and_noise_comes_only_if_asked(tiny, toy):
    hu, labels = cases(toy, 24)
    image, moved = covidgan.augment(hu, labels, tiny(**STILL), rng())
    assert torch.equal(moved, labels)
    assert (image - ((hu.double() + 1350) / 750 - 1).clamp(-1, 1)).abs().max() < 1e-4
    noisy, moved = covidgan.augment(torch.full(hu.shape, -600).short(), labels, tiny(**STILL | {"noise": 0.03}), rng())
    assert torch.equal(moved, labels)
    assert noisy.std().item() == pytest.approx(0.03 * 2, rel=0.02)  # of the window's range, which is 2
    assert noisy.mean().item() == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("size", [0, 32])
def test_a_processs_share_is_that_part_of_the_whole_batch(tiny, toy, size):
    hu, labels = cases(toy, 9)
    whole = covidgan.augment(hu, labels, tiny(noise=0.02), rng(), size)
    share = covidgan.augment(hu[1::3], labels[1::3], tiny(noise=0.02), rng(), size, 1, 3)
    assert torch.equal(share[1], whole[1][1::3]) and torch.allclose(share[0], whole[0][1::3], atol=1e-6)
