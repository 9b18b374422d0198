"""Reading, checking, splitting, windowing and augmenting slices."""

import dataclasses
import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import TURNS, draw_chest
from PIL import Image

import covidgan
from data import slices


def painted(labels):
    return np.array(covidgan.COLOURS, np.uint8)[labels]


@pytest.fixture
def labels():
    """A small map with every label."""
    return np.random.default_rng(0).integers(0, 4, (12, 12)).astype(np.uint8)


def one_line(mistake):
    (text,) = mistake.value.args
    assert "\n" not in text
    return text


# ---- the format


@pytest.mark.parametrize(
    "fact", ["LABELS", "COLOURS", "HU_OFFSET", "LARGEST", "LARGEST_FILE", "TURNED", "AERATED", "NEARLY"]
)
def test_both_modules_state_the_same_facts_of_the_format(fact):
    assert getattr(covidgan, fact) == getattr(slices, fact)


def test_both_modules_read_the_same_from_the_same_files(toy):
    for name in toy.train[:8]:
        image, map_ = toy.folder / "images" / f"{name}.png", toy.folder / "maps" / f"{name}.png"
        assert np.array_equal(covidgan.read_image(image), slices.read_image(image))
        assert np.array_equal(covidgan.read_map(map_, 4), slices.read_map(map_))


def test_what_was_written_is_read(toy):
    name = toy.train[3]
    hu = covidgan.read_image(toy.folder / "images" / f"{name}.png")
    assert hu.dtype == np.int16
    assert np.abs(hu - np.maximum(toy.hu[name], -1024)).max() <= 0.5
    assert np.array_equal(covidgan.read_map(toy.folder / "maps" / f"{name}.png", 4), toy.labels[name])


def test_image_holds_hu_plus_1024_over_its_whole_range(tmp_path):
    stored = np.array([[0, 24, 1024], [1025, 4094, 4095]], np.uint16)
    iio.imwrite(tmp_path / "a.png", stored)
    assert covidgan.read_image(tmp_path / "a.png").tolist() == [[-1024, -1000, 0], [1, 3070, 3071]]


def test_palette_grey_and_colour_maps_are_one_and_the_same(tmp_path, labels):
    slices.write_map(tmp_path / "palette.png", labels)
    iio.imwrite(tmp_path / "grey.png", labels)
    iio.imwrite(tmp_path / "rgb.png", painted(labels))
    iio.imwrite(tmp_path / "rgba.png", np.dstack([painted(labels), np.full(labels.shape, 255, np.uint8)]))
    assert Image.open(tmp_path / "palette.png").mode == "P"
    for name in ("palette", "grey", "rgb", "rgba"):
        read = covidgan.read_map(tmp_path / f"{name}.png", 4)
        assert read.dtype == np.uint8
        assert np.array_equal(read, labels), name
        assert np.array_equal(slices.read_map(tmp_path / f"{name}.png"), labels), name


def test_a_colour_counts_wherever_in_a_palette_it_stands(tmp_path):
    """A paint program may add the same red a second time, behind the paper's four."""
    picture = Image.fromarray(np.array([[0, 1, 2, 3, 4]], np.uint8), "P")
    picture.putpalette([*sum(covidgan.COLOURS, ()), 255, 0, 0])
    picture.save(tmp_path / "map.png")
    for read in (covidgan.read_map(tmp_path / "map.png", 4), slices.read_map(tmp_path / "map.png")):
        assert read.tolist() == [[0, 1, 2, 3, 1]]


# ---- bad maps


@pytest.mark.parametrize(("value", "n_labels"), [(4, 4), (255, 4), (3, 3)])
def test_label_beyond_the_models_is_named_with_its_pixel(tmp_path, value, n_labels):
    bad = np.ones((9, 9), np.uint8)
    bad[5, 7] = value
    path = tmp_path / "P01_S001.png"
    iio.imwrite(path, bad)
    with pytest.raises(covidgan.Mistake) as mistake:
        covidgan.read_map(path, n_labels)
    text = one_line(mistake)
    assert str(path) in text
    assert f"label {value} at row 5, column 7" in text
    assert f"0..{n_labels - 1}" in text


@pytest.mark.parametrize(("colour", "n_labels"), [((254, 0, 0), 4), ((255, 255, 255), 4), ((0, 255, 0), 3)])
def test_colour_of_no_label_is_named_with_its_pixel(tmp_path, labels, colour, n_labels):
    picture = painted(labels % n_labels)
    picture[3, 8] = colour
    path = tmp_path / "map.png"
    iio.imwrite(path, picture)
    with pytest.raises(covidgan.Mistake) as mistake:
        covidgan.read_map(path, n_labels)
    text = one_line(mistake)
    assert str(path) in text
    assert str(list(colour)) in text
    assert "row 3, column 8" in text


def test_colours_offered_are_those_of_the_models_labels(tmp_path):
    """A model of three labels must not tell a green map that green is among the colours."""
    path = tmp_path / "map.png"
    iio.imwrite(path, np.full((4, 4, 3), (0, 255, 0), np.uint8))
    with pytest.raises(covidgan.Mistake) as mistake:
        covidgan.read_map(path, 3)
    assert "(0, 255, 0)" not in one_line(mistake)


def write_uint16(path):
    iio.imwrite(path, np.ones((8, 8), np.uint16))


def write_float(path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(path, format="TIFF")


def write_truncated(path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 4, (64, 64)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:300])


def write_empty(path):
    path.write_bytes(b"")


def write_text(path):
    path.write_text("no picture")


BROKEN = [write_truncated, write_empty, write_text]


@pytest.mark.parametrize("write", [write_uint16, write_float, *BROKEN])
def test_a_file_that_is_no_map_is_named(tmp_path, write):
    path = tmp_path / "P01_S001.png"
    write(path)
    with pytest.raises(covidgan.Mistake) as mistake:
        covidgan.read_map(path, 4)
    assert one_line(mistake).startswith(f"{path}: ")


# ---- bad images


def write_8_bit(path):
    iio.imwrite(path, np.full((8, 8), 200, np.uint8))


def write_rgb(path):
    iio.imwrite(path, np.full((8, 8, 3), 200, np.uint8))


def write_too_high(path):
    stored = np.full((8, 8), 1024, np.uint16)
    stored[2, 2] = 4096
    iio.imwrite(path, stored)


def write_truncated_image(path):
    slices.write_image(path, np.random.default_rng(0).normal(0, 300, (64, 64)))
    path.write_bytes(path.read_bytes()[:2000])


def write_broken_header(path):
    """A bit of the header's length is wrong."""
    slices.write_map(path, np.zeros((8, 8), np.uint8))
    content = bytearray(path.read_bytes())
    content[11] = 4
    path.write_bytes(content)


BAD_IMAGES = [write_8_bit, write_rgb, write_too_high, write_float, write_truncated_image, write_broken_header, *BROKEN]


@pytest.mark.parametrize("write", BAD_IMAGES)
def test_a_file_that_is_no_image_is_named(tmp_path, write):
    path = tmp_path / "P01_S001.png"
    write(path)
    with pytest.raises(covidgan.Mistake) as mistake:
        covidgan.read_image(path)
    text = one_line(mistake)
    assert text.startswith(f"{path}: ")
    if write is write_too_high:
        assert "4096" in text


def test_a_map_with_a_broken_header_is_named(tmp_path):
    write_broken_header(tmp_path / "map.png")
    with pytest.raises(covidgan.Mistake, match=r"map\.png"):
        covidgan.read_map(tmp_path / "map.png", 4)


def test_an_image_cut_anywhere_is_a_mistake_or_whole(tmp_path):
    path = tmp_path / "a.png"
    hu = np.random.default_rng(0).normal(0, 300, (16, 16))
    slices.write_image(path, hu)
    whole = path.read_bytes()
    wanted = covidgan.read_image(path)
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        try:
            assert np.array_equal(covidgan.read_image(path), wanted)
        except covidgan.Mistake:
            continue


# ---- a side of the data


def test_slices_are_loaded_in_the_order_asked_for(tiny, toy):
    names = [toy.train[5], toy.train[0], toy.test[2]]
    side = covidgan.load_slices(toy.folder, names, tiny())
    assert side.names == names
    assert side.hu.dtype == torch.int16
    assert side.labels.dtype == torch.uint8
    assert side.hu.shape == side.labels.shape == (3, 1, 64, 64)
    for k, name in enumerate(names):
        assert np.array_equal(side.labels[k, 0].numpy(), toy.labels[name])
        assert np.abs(side.hu[k, 0].numpy() - np.maximum(toy.hu[name], -1024)).max() <= 0.5


@pytest.mark.parametrize("size", [32, 96])
def test_resampling_keeps_a_map_a_map_and_the_image_in_its_range(tiny, toy, size):
    side = covidgan.load_slices(toy.folder, toy.train, tiny(size=size))
    assert side.hu.shape == side.labels.shape == (len(toy.train), 1, size, size)
    for k, name in enumerate(toy.train):
        assert set(side.labels[k].unique().tolist()) == set(np.unique(toy.labels[name]).tolist())
        overshoot = 0.1 * np.ptp(toy.hu[name])  # a bicubic filter's at an edge, at most
        assert side.hu[k].min() >= -1024
        assert side.hu[k].max() <= toy.hu[name].max() + overshoot
        share = [(labels > 0).mean() for labels in (side.labels[k].numpy(), toy.labels[name])]
        assert share[0] == pytest.approx(share[1], rel=0.05)


def test_resampling_to_a_smaller_size_does_not_lose_fine_lines(tiny, own_toy):
    """Every fourth column is bright: a quarter of the size must hold their mean, whichever columns it looks at.

    Within the window, to whose ends HU are cut before.
    """
    for first in range(4):
        lines = np.full((64, 64), -1000)
        lines[:, first::4] = 0
        slices.write_image(own_toy.folder / "images" / f"{own_toy.train[first]}.png", lines)
    side = covidgan.load_slices(own_toy.folder, own_toy.train[:4], tiny(size=16, unchecked=True))
    for picture in side.hu[:, 0, 2:-2, 2:-2].float():
        assert picture.mean().item() == pytest.approx(-750, abs=125)


def remove_image(toy, name):
    (toy.folder / "images" / f"{name}.png").unlink()
    return f"images/{name}.png"


def remove_map(toy, name):
    (toy.folder / "maps" / f"{name}.png").unlink()
    return f"maps/{name}.png"


def shrink_map(toy, name):
    slices.write_map(toy.folder / "maps" / f"{name}.png", toy.labels[name][:60, :60])
    return f"maps/{name}.png"


def crop_both(toy, name):
    slices.write_map(toy.folder / "maps" / f"{name}.png", toy.labels[name][:48])
    slices.write_image(toy.folder / "images" / f"{name}.png", toy.hu[name][:48])
    return f"images/{name}.png"


@pytest.mark.parametrize("spoil", [remove_image, remove_map, shrink_map, crop_both])
def test_a_slice_that_does_not_fit_is_named(tiny, own_toy, spoil):
    named = spoil(own_toy, own_toy.train[4])
    with pytest.raises(covidgan.Mistake) as mistake:
        covidgan.load_slices(own_toy.folder, own_toy.train, tiny())
    assert named in one_line(mistake)


@pytest.mark.parametrize("turn", TURNS)
def test_a_patient_whose_maps_are_turned_against_the_slices_is_refused_unless_overruled(tiny, tmp_path, turn):
    hu, labels = draw_chest()
    names = [slices.slice_name(patient, z) for patient in (1, 2) for z in range(len(hu))]
    for part in ("images", "maps"):
        (tmp_path / part).mkdir()
    for name, one, its_labels in zip(names, [*hu, *hu], [*labels, *labels], strict=True):
        slices.write_image(tmp_path / "images" / f"{name}.png", one)
        slices.write_map(tmp_path / "maps" / f"{name}.png", its_labels)
    covidgan.load_slices(tmp_path, names, tiny())
    for name, its_labels in zip(names[6:], labels, strict=True):
        slices.write_map(tmp_path / "maps" / f"{name}.png", TURNS[turn](its_labels))
    complaint = r"P02_S000\.png: .*(they are turned|-\d+ HU where the patient's maps say lung)"
    with pytest.raises(covidgan.Mistake, match=complaint):
        covidgan.load_slices(tmp_path, names, tiny())
    covidgan.load_slices(tmp_path, names, tiny(unchecked=True))


def test_a_whole_side_of_grey_levels_is_refused(tiny, own_toy):
    for name in own_toy.train:
        grey = slices.windowed(own_toy.hu[name]).astype(np.uint16)
        iio.imwrite(own_toy.folder / "images" / f"{name}.png", grey)
    with pytest.raises(covidgan.Mistake, match="grey levels"):
        covidgan.load_slices(own_toy.folder, own_toy.train, tiny())
    covidgan.load_slices(own_toy.folder, own_toy.test, tiny())


# ---- the split


def patient(name):
    return name.rpartition("_")[0]


def test_split_json_is_followed(own_toy):
    slices.write_split(own_toy.folder / "split.json", own_toy.test, own_toy.train[:3], [], {})
    assert covidgan.read_split(own_toy.folder, 0) == {"train": own_toy.test, "test": own_toy.train[:3]}


def test_without_split_json_whole_patients_are_held_out(own_toy):
    (own_toy.folder / "split.json").unlink()
    held = set()
    for seed in range(12):
        split = covidgan.read_split(own_toy.folder, seed)
        train, test = ({patient(name) for name in split[side]} for side in ("train", "test"))
        assert not train & test
        assert len(test) == 1  # about a fifth of five
        assert sorted(split["train"] + split["test"]) == sorted(own_toy.train + own_toy.test)
        assert covidgan.read_split(own_toy.folder, seed) == split
        held |= test
    assert len(held) > 1  # the seed decides


@pytest.mark.parametrize("keep", [lambda name: patient(name) == "P01", lambda name: name in ("P01_S001", "P01_S002")])
def test_the_last_slices_of_a_single_patient_are_held_out(own_toy, keep):
    (own_toy.folder / "split.json").unlink()
    names = sorted(own_toy.train + own_toy.test)
    for name in names:
        if not keep(name):
            (own_toy.folder / "maps" / f"{name}.png").unlink()
    left = [name for name in names if keep(name)]
    assert covidgan.read_split(own_toy.folder, 0) == {"train": left[:-1], "test": left[-1:]}


def test_a_set_whose_making_was_cut_off_is_refused_until_it_is_made(own_toy):
    (own_toy.folder / ".unfinished").touch()
    assert covidgan.read_split(own_toy.folder, 0)["train"] == own_toy.train
    (own_toy.folder / "split.json").unlink()
    with pytest.raises(covidgan.Mistake, match="its making was cut off"):
        covidgan.read_split(own_toy.folder, 0)


def test_slices_without_lung_count_in_no_figure(own_toy, tiny):
    for name in own_toy.test[:2]:
        slices.write_map(own_toy.folder / "maps" / f"{name}.png", np.zeros((64, 64), np.uint8))

    def figures():
        trainer = covidgan.Trainer(covidgan.Covidgan, tiny(data=str(own_toy.folder), batch=2))
        return covidgan.evaluate(trainer)[1]["mean HU per label"]

    among = figures()
    slices.write_split(own_toy.folder / "split.json", own_toy.train, own_toy.test[2:], [], {})
    assert figures() == among


def test_a_folder_of_jpeg_is_told_from_an_empty_one(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(covidgan.Mistake, match="JPEG, which changes grey levels"):
        covidgan.list_pngs(tmp_path)


def test_two_files_of_one_name_are_refused(own_toy):
    (own_toy.folder / "split.json").unlink()
    first = own_toy.folder / "maps" / "P01_S001.png"
    first.with_suffix(".PNG").write_bytes(first.read_bytes())
    with pytest.raises(covidgan.Mistake, match=r"P01_S001\.png: P01_S001\.PNG has the same name"):
        covidgan.read_split(own_toy.folder, 0)


def test_a_name_on_both_sides_of_a_split_is_refused(own_toy):
    slices.write_split(own_toy.folder / "split.json", own_toy.train, [*own_toy.test, "P01_S001"], [], {})
    with pytest.raises(covidgan.Mistake, match=r"split\.json: P01_S001 is under train and test"):
        covidgan.read_split(own_toy.folder, 0)


def test_a_name_that_a_split_lists_twice_is_refused(own_toy):
    path = own_toy.folder / "split.json"
    slices.write_split(path, [*own_toy.train, f"{own_toy.train[0]}.png"], own_toy.test, [], {})
    with pytest.raises(covidgan.Mistake, match=rf"split\.json: .*{own_toy.train[0]}' is listed 2 times"):
        covidgan.read_split(own_toy.folder, 0)
    with pytest.raises(slices.Mistake, match=rf"split\.json: {own_toy.train[0]} is listed 2 times under train"):
        slices.read_split(path)


def test_hu_are_checked_as_the_files_have_them_whatever_the_window(own_toy, tiny):
    read = covidgan.load_slices(own_toy.folder, own_toy.train, tiny(size=64, level=40.0, width=400.0))
    assert read.hu.min() == -160 and read.hu.max() <= 240
    for name in own_toy.train:
        iio.imwrite(own_toy.folder / "images" / f"{name}.png", np.full((64, 64), 200, np.uint16))
    with pytest.raises(covidgan.Mistake, match="no value above 255, so grey levels"):
        covidgan.load_slices(own_toy.folder, own_toy.train, tiny(size=64, level=0.0, width=1000.0))


def test_what_resampling_mixes_is_cut_to_the_window_before(own_toy, tiny):
    """Half lung of -800 and half bone of 1000 HU, which the window shows as 150, mix to -325 and not to 100."""
    hu = np.where(np.arange(64) % 2, 1000, -800)[None].repeat(64, 0)
    slices.write_image(own_toy.folder / "images" / "P01_S001.png", hu)
    slices.write_map(own_toy.folder / "maps" / "P01_S001.png", np.full((64, 64), 2, np.uint8))
    read = covidgan.load_slices(own_toy.folder, ["P01_S001"], tiny(data=str(own_toy.folder), size=32))
    assert read.stored == 64
    assert read.hu[0, 0, 4:-4, 4:-4].float().mean().item() == pytest.approx(-325, abs=5)


def test_names_without_a_patient_are_split_too(own_toy):
    (own_toy.folder / "split.json").unlink()
    for k, path in enumerate(sorted((own_toy.folder / "maps").glob("*.png"))):
        path.rename(path.with_name(f"slice{k:02d}.png"))
    split = covidgan.read_split(own_toy.folder, 0)
    assert (len(split["train"]), len(split["test"])) == (24, 6)
    assert not set(split["train"]) & set(split["test"])


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"train": ["P01_S001"]}', '{"train": 3, "test": 4}', '{"train": [], "test": []}', "\xff"],
)
def test_a_broken_split_is_named(own_toy, content):
    (own_toy.folder / "split.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(covidgan.Mistake) as mistake:
        covidgan.read_split(own_toy.folder, 0)
    assert str(own_toy.folder) in one_line(mistake)


@pytest.mark.parametrize("missing", ["images", "maps"])
def test_a_folder_without_images_or_maps_is_named(tmp_path, missing):
    (tmp_path / ({"images", "maps"} - {missing}).pop()).mkdir()
    with pytest.raises(covidgan.Mistake) as mistake:
        covidgan.read_split(tmp_path, 0)
    assert str(tmp_path) in one_line(mistake)


def test_a_single_slice_cannot_be_split(own_toy):
    (own_toy.folder / "split.json").unlink()
    for path in (own_toy.folder / "maps").glob("*.png"):
        if path.stem != "P01_S001":
            path.unlink()
    with pytest.raises(covidgan.Mistake, match="0 slices to train, 1 to test"):
        covidgan.read_split(own_toy.folder, 0)


# ---- window and target


def test_window_maps_its_ends_and_middle_to_minus_1_0_and_1_and_clamps_beyond(tiny):
    hu = torch.tensor([-1024 - 3000, -1351, -1350, -600, -225, 150, 151, 3071]).short()
    assert covidgan.window(hu, tiny()).tolist() == pytest.approx([-1, -1, -1, 0, 0.5, 1, 1, 1])
    assert covidgan.window(torch.tensor([40, 240, -60]), tiny(level=40, width=400)).tolist() == [0, 1, -0.5]


def test_target_is_the_lung_region_and_the_floor_elsewhere():
    image = torch.tensor([0.5, 0.5, 0.7, -0.2])
    labels = torch.tensor([0, 1, 2, 3], dtype=torch.uint8)
    assert torch.equal(covidgan.lung_target(image, labels), torch.tensor([-1.0, 0.5, 0.7, -0.2]))


# ---- augmentation

PAINT = torch.tensor([-1300, -900, -500, 0])  # HU of each label
STILL = dict(resize=1.0, rotate=0.0, elastic=0.0, noise=0.0)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def cases(toy, n=8):
    """HU painted from the map, and the map."""
    labels = torch.from_numpy(np.stack([toy.labels[name] for name in toy.train[:n]]))[:, None]
    return PAINT[labels.long()].short(), labels


def inner(labels, reach=3):
    """Pixels whose neighbours within reach are all there and have their label."""
    x, size = labels.float(), 2 * reach + 1
    highest, negated_lowest = (torch.nn.functional.max_pool2d(sign * x, size, 1) for sign in (1, -1))
    return torch.nn.functional.pad(highest == -negated_lowest, [reach] * 4)


@pytest.mark.parametrize("kind", ["all", "resize", "rotate", "elastic"])
def test_image_and_map_stay_aligned(tiny, toy, kind):
    ranges = dict(resize=1.3, rotate=25.0, elastic=3.0)
    c = tiny(**{**STILL, **(ranges if kind == "all" else {kind: ranges[kind]})})
    hu, labels = (x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in cases(toy, 24))
    target, moved = covidgan.augment(hu, labels, c, rng())
    assert (moved != labels).float().mean() > 0.005  # it does something
    painted = covidgan.window(PAINT[moved.long()], c)
    sure = inner(moved, reach=5 if kind == "all" else 4) & (moved > 0)
    assert sure.float().mean() > 0.05
    assert set(moved[sure].unique().tolist()) == {1, 2, 3}
    assert (target - painted)[sure].abs().max() < 1e-5


@pytest.mark.parametrize("column", [6, 32, 57])
def test_image_and_map_stay_aligned_to_a_fraction_of_a_pixel(tiny, column):
    """A ramp that crosses zero where the label changes does so, resampled, at the same pixels."""
    c = dataclasses.replace(tiny(noise=0.0), level=0.0, width=4000.0)
    hu = ((torch.arange(64) - column + 0.5) * 20).expand(40, 1, 64, 64)
    target, moved = covidgan.augment(hu, 1 + (hu > 0).byte(), c, rng())
    inside = moved > 0
    assert {1, 2} <= set(moved.unique().tolist())
    assert ((target > 0) == (moved == 2))[inside].float().mean() > 0.9999


def test_a_map_stays_a_map_and_an_image_in_its_range(tiny, toy):
    c = tiny(noise=0.2)
    hu, labels = cases(toy)
    target, moved = covidgan.augment(hu + 300, labels, c, rng())
    assert moved.dtype == torch.uint8
    assert moved.shape == target.shape == labels.shape
    assert set(moved.unique().tolist()) == {0, 1, 2, 3}
    assert target.abs().max() == 1


def test_a_steps_target_is_the_lung_of_its_own_map_and_the_floor_outside(tiny, toy):
    c = tiny(data=str(toy.folder))
    trainer = covidgan.Trainer(covidgan.Covidgan, c)
    target, labels, _ = trainer.batch()
    assert (target[labels == 0] == -1).all() and (target[labels > 0] > -1).float().mean() > 0.9


def test_zero_ranges_leave_the_target_as_it_is(tiny, toy):
    c = tiny(**STILL)
    hu = torch.from_numpy(np.stack([toy.hu[name] for name in toy.train[:8]]))[:, None].round().short()
    labels = cases(toy)[1]
    target, moved = covidgan.augment(hu, labels, c, rng())
    assert torch.equal(moved, labels)
    wanted = ((hu.double() + 1350) / 750 - 1).clamp(-1, 1)
    assert (target - wanted).abs().max() < 1e-4


def test_noise_has_its_stated_deviation_inside_the_lung(tiny, toy):
    c = tiny(**{**STILL, "noise": 0.03})
    labels = cases(toy, 24)[1]
    target, _ = covidgan.augment(torch.full(labels.shape, -600).short(), labels, c, rng())
    noise = target[labels > 0].double()
    assert noise.std().item() == pytest.approx(0.03 * 2, rel=0.02)  # of the window's range, which is 2
    assert noise.mean().item() == pytest.approx(0, abs=2e-3)


def test_the_same_generator_state_gives_the_same_draw_and_another_seed_another(tiny, toy):
    hu, labels = cases(toy)
    one, other = rng(3), rng(3)
    a, b, d = (covidgan.augment(hu, labels, tiny(), g) for g in (one, other, rng(4)))
    again = covidgan.augment(hu, labels, tiny(), one)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[1], d[1])
    assert not torch.equal(a[1], again[1])


def test_every_image_of_a_batch_is_drawn_for_itself(tiny, toy):
    hu, labels = (x[:1].expand(4, -1, -1, -1) for x in cases(toy))
    moved = covidgan.augment(hu, labels, tiny(), rng())[1]
    assert len({x.numpy().tobytes() for x in moved}) == 4


def slope_of(bar):
    """Angle of a bar in degrees from its second moments."""
    y, x = bar.nonzero()
    y, x = y - y.mean(), x - x.mean()
    return np.degrees(0.5 * np.arctan2(2 * (x * y).mean(), (x * x).mean() - (y * y).mean()))


def test_rotation_keeps_to_its_range_and_uses_it(tiny):
    labels = torch.zeros(300, 1, 64, 64, dtype=torch.uint8)
    labels[:, :, 30:34, 14:50] = 1
    moved = covidgan.augment(torch.zeros(labels.shape), labels, tiny(**{**STILL, "rotate": 15.0}), rng())[1]
    angles = np.array([slope_of(x[0].numpy()) for x in moved])
    assert np.abs(angles).max() < 15 + 0.7
    assert angles.min() < -13.5
    assert angles.max() > 13.5
    assert angles.std() == pytest.approx(15 / 3**0.5, rel=0.12)  # uniform


def test_resize_enlarges_up_to_its_range_and_crops_inside_the_slice(tiny):
    labels = torch.zeros(300, 1, 64, 64, dtype=torch.uint8)
    labels[:, :, 24:40, 24:40] = 1
    c = tiny(**{**STILL, "resize": 1.5})
    moved = covidgan.augment(torch.zeros(labels.shape), labels, c, rng())[1]
    zoom = ((moved > 0).sum((1, 2, 3)) / 16**2).sqrt()
    assert zoom.min() > 0.93
    assert zoom.max() < 1.5 * 1.07
    assert zoom.max() > 1.4
    centres = np.array([np.argwhere(x[0].numpy()).mean(0) - 31.5 for x in moved])  # moved by U(-1, 1) (zoom - 1) 32
    assert centres.std(0) == pytest.approx(32 / 6, rel=0.2) and abs(np.corrcoef(centres.T)[0, 1]) < 0.2
    whole = covidgan.augment(torch.zeros(labels.shape), torch.ones_like(labels), c, rng())[1]
    assert (whole == 1).all()  # nothing from beyond the slice


def test_elastic_displacement_has_its_stated_deviation(tiny):
    """A ramp shows the displacement: on a picture of 64 pixels, 16 of 512 are 2."""
    c = dataclasses.replace(tiny(**{**STILL, "elastic": 16.0}), level=0.0, width=2000.0)
    ramp = ((torch.arange(64) - 31.5) * 25).expand(40, 1, 64, 64).round()
    moves = []
    for hu in (ramp, ramp.mT):  # columns, rows
        target, _ = covidgan.augment(hu, torch.ones(hu.shape, dtype=torch.uint8), c, rng())
        moved = (target * 1000 - hu)[..., 16:48, 16:48] / 25
        assert moved.mean().item() == pytest.approx(0, abs=0.1)
        assert 0.6 * 2 < moved.std().item() < 1.1 * 2  # between the drawn points it is smoother
        moves.append(moved.flatten())
    assert abs(torch.corrcoef(torch.stack(moves))[0, 1].item()) < 0.1


def test_augmentation_moves_a_small_picture_as_it_moves_a_large_one(tiny, toy):
    """Lengths are in pixels of a 512-pixel slice, so the preset's size does not change what is learnt."""
    hu, labels = cases(toy, 4)
    big = labels.repeat_interleave(4, 2).repeat_interleave(4, 3)
    c = tiny(elastic=12.0, noise=0.0)
    small_moved = covidgan.augment(hu, labels, c, rng())[1]
    big_moved = covidgan.augment(PAINT[big.long()].short(), big, c, rng())[1]
    centre = big_moved[..., 2::4, 2::4]
    assert (centre == small_moved).float().mean() > 0.97


def test_a_folder_of_painted_maps_without_a_split_trains(own_toy, here, tmp_path, small_run):
    (own_toy.folder / "split.json").unlink()
    for path in (own_toy.folder / "maps").glob("*.png"):
        iio.imwrite(path, painted(own_toy.labels[path.stem]))
    out = tmp_path / "out"
    done = here("--stage", "g1", "--data", own_toy.folder, "--out", out, *small_run, "--epoch-len", 2, "--interval", 9)
    assert done.status == 0, done.stderr
    assert "24 slices of 4 patients to train, 6 slices of 1 patients to test" in done.stdout
    assert json.loads((out / "results.json").read_text())["n"] == 6
